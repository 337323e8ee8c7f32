"""The self-check of a vision tower: a small image of noise, which says nothing and costs one pass of the tower.

Every site is read, and shapes and sums must be as declared. Then each kind of site is edited in the first layer, in
passes that end behind it, and the last layer that the language model is handed something of, where what it is handed
must change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..architectures.grids import edge_of
from ..architectures.towers import last_used, tiles_of
from ..errors import first_line
from ..run import Run, forward
from ..session import Session
from ..sites import SITES, VISION_, Site
from ..text import Tokens
from .equations import UNFIT, Finding, Law, Sum, add_up, declared, projections, sums

HANDED = Site("vision_embed")
READS = "can be read of an image"


def check_tower(model: Session, ids: Tensor) -> Iterator[Finding]:
    """What holds of a model's vision tower; nothing where it has no sites in one.

    Args:
        ids: ordinary token ids.
    """
    names = [name for name in model.sites if SITES[name].tower]
    if not names:
        return
    try:
        tokens = probe_image(model, ids)
        forward(model, tokens, logits=-1)
    except UNFIT as error:
        yield Finding(names[0], READS, False, first_line(error), others=tuple(names[1:]))
        return
    try:
        run = forward(model, tokens, read=_reads(model), logits=-1)
    except UNFIT:
        for name in names:
            try:
                forward(model, tokens, read=Site(name), logits=-1)
            except UNFIT as error:
                yield Finding(name, READS, False, first_line(error))
        run = forward(model, tokens, read=_reads(model), logits=-1)
    known = {"batch": 1, "patch": len(run.tokens.patches[0][0])}  # type: ignore[index]
    for name in (name for name in model.sites if SITES[name].tower):
        sites = (_in_layer(name, layer) for layer in model.atlas.layers(name))
        yield Finding(name, "has the declared shape", *declared(run, sites, known))
    yield from add_up(model, run, _whole(model, sums(model.atlas, VISION_)))
    yield from projections(model, run, VISION_)
    yield from _effects(model, tokens, run)


def _reads(model: Session) -> list[Site]:
    return [Site(name) for name in model.sites if SITES[name].tower or name == HANDED.name]


def probe_image(model: Session, ids: Tensor) -> Tokens:
    """A text with an image of noise: one tile, or four tokens where an image may have any size."""
    config, family = model.hf.config, model.atlas.family
    inputs = _pixels(config, family.pixels)
    assert family.grid is not None
    count = 1
    while not (cells := family.grid(config, inputs, [count])) or not cells[0]:  # some say what a run of tokens shows
        count += 1
    count = len(cells[0])
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    row = torch.cat([ids[:2], torch.full((count,), int(image or 0)), ids[2:4]])[None]
    visual = row.eq(int(image or 0)).long()
    inputs |= dict.fromkeys(family.needs, visual)
    inputs |= {name: x.to(model.dtype) for name, x in inputs.items() if x.is_floating_point()}
    return model.input({"input_ids": row, "attention_mask": torch.ones_like(row), **inputs})


def _pixels(config: Any, kind: str) -> dict[str, Tensor]:
    """Pixels of noise, and their sizes, as a family's processor lays them out."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(0)
    channels = getattr(vision, "num_channels", getattr(vision, "in_channels", getattr(vision, "in_chans", 3)))
    patch = edge_of(vision.patch_size)
    if kind == "patch":
        edge = 2 * vision.spatial_merge_size
        pixels = torch.randn(edge**2, channels * vision.temporal_patch_size * patch**2, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, edge, edge]])}
    edge = edge_of(vision.image_size)
    more, shape = dict[str, Tensor](), [1]
    if hasattr(config, "image_grid_pinpoints"):
        more = {"image_sizes": torch.tensor([[edge, edge]])}
        shape = [1, *tiles_of(config, more)]
    elif kind == "row":
        shape = [1, 1]
    return {"pixel_values": torch.randn(*shape, channels, edge, edge, generator=generator), **more}


def _in_layer(name: str, layer: int) -> Site:
    return Site(name, layer if SITES[name].layered else None)


def _whole(model: Session, totals: list[Sum]) -> list[Sum]:
    known = model.atlas.entries
    return [total for total in totals if total.before and all((name, total.layer) in known for name in total.names)]


def _effects(model: Session, tokens: Tokens, run: Run) -> Iterator[Finding]:
    """Edits act: in the first layer on what enters the second, in the last on what the tower hands over."""
    atlas, last = model.atlas, last_used(model.hf.config, model.atlas.tower)
    if HANDED.name not in model.sites:
        return
    for name in [name for name in model.sites if SITES[name].tower]:
        entries = [atlas.entries[name, layer] for layer in atlas.layers(name)]
        edited_in = [entries[0], entries[last]] if name == "vision_resid_post" and last else entries[:1]
        for entry in edited_in:
            if entry.write is None:
                continue
            inside = SITES[name].layered and entry.layer < last and entry.layer + 1 in atlas.layers("vision_resid_pre")
            follows = Site("vision_resid_pre", entry.layer + 1) if inside else HANDED
            edit = _edit(_in_layer(name, entry.layer), run)
            edited = forward(model, tokens, read=follows, edits=edit, logits=False, allow_noop=True)
            before, after = (either[follows].plain.float() for either in (run, edited))
            effect = float((after - before).abs().max())
            what = f"an edit in layer {entry.layer} changes what follows"
            yield Finding(name, what, effect > 1e-4 * float(before.std()), f"by {effect:.1e}", Law.EDIT)


def _edit(site: Site, run: Run) -> Any:
    """Noise at one patch alone, behind a class token: what all keys have in common changes nothing."""
    value = run[site].plain
    noise = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(1))
    size = value.float().pow(2).mean().sqrt().clamp(min=0.1).cpu()
    return site.at(1).add((3 * size * noise).to(value.device, value.dtype))
