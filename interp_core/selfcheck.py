"""The self-check at load: two short passes that hold the atlas against the model itself.

The first reads every site: shapes are as declared, the residual stream adds up, head outputs sum to the attention
output, patterns to one, and the readout gives the model's logits. The second has one row per kind of site, each row
with an edit at its site: its logits must differ from those of the row without. What fails is taken out of the atlas,
with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .architectures.atlas import Atlas, Entry
from .edits import Edit
from .errors import CapabilityError, InterpError, ReadError
from .positions import VISION, Mask, Span
from .sites import SITES, Site
from .text import Tokens
from .trace import Run
from .vision import placeholder_ids

if TYPE_CHECKING:
    from .model import Model

WIDTH = 6
PROBED = (WIDTH - 3, WIDTH - 1)
"""Positions that are edited: not all that a sliding window sees, which would shift all scores alike."""
CHECKED = tuple(name for name in SITES if name != "deepstack")
"""The check runs on text. `vision_embed` is checked by taking text tokens for visual ones; features of images that are
added later exist with images only, and are left to the tests."""
DERIVED_ONCE = ("expert_out",)
"""Sites read in one layer only, because reading them costs as much as the layer."""


@dataclass(frozen=True)
class Check:
    """What the self-check found.

    Attributes:
        rows: `(site, what was checked, passed, detail)`.
    """

    rows: tuple[tuple[str, str, bool, str], ...]

    @property
    def ok(self) -> bool:
        """Whether everything passed."""
        return all(row[2] for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(f"{'ok  ' if ok else 'FAIL'}  {site:15}{what}  {more}" for site, what, ok, more in self.rows)


def check_atlas(model: Model) -> Check:
    """Check a model's atlas, and take out of it what fails."""
    found: list[tuple[str, str, bool, str]] = []
    for name, what, ok, detail in _checks(model):
        found.append((name, what, ok, detail))
        if not ok and name in model.atlas.lacking:
            continue
        if not ok and name == "readout":
            model.atlas.lacking["readout"] = f"self-check: {what} ({detail})"
        elif not ok and what.startswith("an edit"):
            _refuse(model.atlas, name, ("write", "grad"), f"self-check: {what} {detail}")
        elif not ok and what.startswith("adds up"):
            _refuse(model.atlas, "resid_mid", ("write",), f"self-check: {what} fails ({detail})")
            model.atlas.notes.append(f"{name} {what} fails ({detail}): the family scales what it adds")
        elif not ok:
            model.atlas.drop(name, f"self-check: {what} ({detail})")
    return Check(tuple(found))


def _refuse(atlas: Atlas, name: str, uses: Sequence[str], why: str) -> None:
    for layer in atlas.layers(name):
        entry = atlas.entries[name, layer]
        entry.write = None
        entry.why = dict.fromkeys(uses, why) | entry.why


def _checks(model: Model) -> Iterator[tuple[str, str, bool, str]]:
    atlas = model.atlas
    ids = probe_ids(model)
    tokens = Tokens(ids[None], torch.ones(1, WIDTH, dtype=torch.bool), spans={VISION: ((Span(0, WIDTH),),)})
    try:
        run = model.run(tokens, read=_everything(atlas))
    except (InterpError, RuntimeError) as error:
        _demand_a_pass(model, tokens, error)
        yield from _unreadable(model, tokens)
        run = model.run(tokens, read=_everything(atlas))
    for name in [name for name in CHECKED if atlas.layers(name)]:
        yield name, "has the declared shape", *_shape(run, name, atlas)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    yield from _sums(model, run, tolerance)
    yield from _effects(model, run, ids)


def _everything(atlas: Atlas) -> list[Site]:
    return [first_unit(Site(name), atlas) for name in CHECKED if atlas.layers(name)]


def _demand_a_pass(model: Model, tokens: Tokens, error: Exception) -> None:
    """Refuse a model that cannot even run.

    Raises:
        CapabilityError: with what it said.
    """
    try:
        model.run(tokens)
    except (InterpError, RuntimeError) as problem:
        raise CapabilityError(
            f"engine {model.engine.name!r} cannot run this {type(model.hf).__name__} in {model.dtype}: {problem}"
        ) from error


def _unreadable(model: Model, tokens: Tokens) -> Iterator[tuple[str, str, bool, str]]:
    """Sites whose reading raises."""
    for site in _everything(model.atlas):
        try:
            model.run(tokens, read=site)
        except (InterpError, RuntimeError) as error:
            yield site.name, "can be read", False, str(error)


def first_unit(site: Site, atlas: Atlas) -> Site:
    """The site, or one unit in one layer of it where reading it all costs too much."""
    return site[atlas.layers(site.name)[0], 0] if site.name in DERIVED_ONCE else site


def probed(name: str, layer: int) -> Site:
    """A site in one layer, or one unit of it where reading it all costs too much."""
    return Site(name, layer if SITES[name].layered else None, 0 if name in DERIVED_ONCE else None)


def probe_ids(model: Model) -> Tensor:
    """A few ordinary token ids, the same for every load."""
    config = model.hf.config
    special = placeholder_ids(config) | {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")}
    size = model.atlas.shape.d_vocab
    ids = [i * 7919 % size for i in range(1, 4 * WIDTH)]
    return torch.tensor([i for i in ids if i not in special][:WIDTH])


def _shape(run: Run, name: str, atlas: Atlas) -> tuple[bool, str]:
    known = {"batch": 1, "pos": WIDTH, "query": WIDTH, "key": WIDTH, "visual": WIDTH}
    for layer in atlas.layers(name):
        entry = atlas.entries[name, layer]
        site = probed(name, layer)
        axes = [axis for axis in SITES[name].axes if not (axis == SITES[name].unit and site.units is not None)]
        wanted = [known[axis] if axis in known else entry.sizes[axis] for axis in axes]
        try:
            found = list(run[site].shape)
        except ReadError:
            return False, f"nothing passes there in layer {layer}"
        except RuntimeError as error:  # a view that does not fit what the module returns
            return False, f"layer {layer}: {error}"
        if found != wanted:
            return False, f"layer {layer} gives {found}, not {wanted}"
        if name in DERIVED_ONCE:
            break
    return True, ""


def _sums(model: Model, run: Run, tolerance: float) -> Iterator[tuple[str, str, bool, str]]:
    """The equations between sites."""
    atlas = model.atlas

    def close(name: str, what: str, pairs: list[tuple[Tensor, Tensor]]) -> tuple[str, str, bool, str]:
        worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)
        return name, what, worst <= tolerance, f"{worst:.1e}"

    def both(*names: str) -> list[int]:
        return sorted(set.intersection(*(set(atlas.layers(name)) for name in names)))

    def at(name: str, layer: int) -> Tensor:
        return run[Site(name, layer)].as_subclass(Tensor)

    if both("vision_embed", "embed"):
        yield close("vision_embed", "is what is embedded", [(at("vision_embed", 0), at("embed", 0))])
    if layers := both("resid_mid", "attn_out"):
        pairs = [(at("resid_pre", i) + at("attn_out", i), at("resid_mid", i)) for i in layers]
        yield close("resid_mid", "adds up: resid_pre + attn_out", pairs)
    if layers := both("attn_out", "mlp_out"):
        start = "resid_mid" if atlas.layers("resid_mid") else None
        pairs = [
            (
                (at(start, i) if start else at("resid_pre", i) + at("attn_out", i)) + at("mlp_out", i),
                at("resid_post", i),
            )
            for i in layers
        ]
        yield close("resid_post", "adds up: stream + mlp_out", pairs)
    if layers := both("head_out", "z"):
        yield close("head_out", "sums to the output projection", [_projected(model, run, i) for i in layers])
    if layers := both("pattern"):
        sinks = any("sinks" in name for name, _ in model.hf.named_parameters())
        sums = [at("pattern", i).sum(-1) for i in layers]
        ones = [x.clamp(max=1) if sinks else torch.ones_like(x) for x in sums]
        what = "sums to less than one, the rest is the sink's" if sinks else "sums to one"
        yield close("pattern", what, list(zip(sums, ones, strict=True)))
        pairs = [(at("scores", i).float().softmax(-1), at("pattern", i).float()) for i in both("scores", "pattern")]
        if pairs and not sinks:
            yield close("scores", "give the pattern by softmax", pairs)
    if layers := both("pattern", "v", "z"):
        mixed = [(_mixed(at("pattern", i), at("v", i)), at("z", i)) for i in layers]
        if atlas.family.gated:
            pairs = [(z, z.clamp(x.clamp(max=0), x.clamp(min=0))) for x, z in mixed]
            yield close("v", "times pattern, times a gate between 0 and 1, is z", pairs)
        else:
            yield close("v", "times pattern is z", mixed)
    if (layers := both("scores", "q", "k")) and not _normed(model):
        pairs = [_first_scores(at("q", i), at("k", i), at("scores", i)) for i in layers]
        for name in ("q", "k"):
            yield close(name, "gives the scores of the first position", pairs)
    if atlas.layers("final_norm"):
        last = at("resid_post", atlas.shape.n_layers - 1)
        with torch.no_grad():
            yield close("readout", "gives the model's logits", [(model.readout(last), run.logits.as_subclass(Tensor))])


def _mixed(pattern: Tensor, v: Tensor) -> Tensor:
    """Values mixed by the pattern `[batch pos head d_head]`."""
    groups = pattern.shape[1] // v.shape[2]
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(groups, 2))


def _normed(model: Model) -> bool:
    """Whether queries and keys pass a norm or scores a cap, so that their product does not show."""
    named = any(name.endswith(("q_norm", "k_norm", "q_layernorm", "k_layernorm")) for name in model.engine.modules)
    return named or bool(getattr(model.hf.config.get_text_config(), "attn_logit_softcapping", None))


def _first_scores(q: Tensor, k: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the first position, where rotary embeddings do nothing, by q and k and as they are, up to scale."""
    product = (q[:, 0] * k[:, 0].repeat_interleave(q.shape[2] // k.shape[2], 1)).sum(-1).float()
    found = scores[:, :, 0, 0].float()
    return product * (found.norm() / product.norm()), found


def _projected(model: Model, run: Run, layer: int) -> tuple[Tensor, Tensor]:
    """Sum of head outputs plus bias, and what the output projection makes of z."""
    module = model.atlas.entries["z", layer].module
    assert module is not None
    z = run[Site("z", layer)].as_subclass(Tensor)
    total = run[Site("head_out", layer)].as_subclass(Tensor).sum(2)
    if (bias := getattr(module, "bias", None)) is not None:
        total = total + bias.detach()
    with torch.no_grad():
        return total, module(z.reshape(*z.shape[:2], -1))


def _effects(model: Model, run: Run, ids: Tensor) -> Iterator[tuple[str, str, bool, str]]:
    """One row per kind of site and end of the model, each with one edit; row 0 has none."""
    atlas = model.atlas
    entries = [
        atlas.entries[name, layer]
        for name in CHECKED
        for layer in sorted({*atlas.layers(name)[:1], *atlas.layers(name)[-1:]})
        if atlas.entries[name, layer].write is not None
        if name not in DERIVED_ONCE or layer == atlas.layers(name)[0]
    ]
    n = len(entries) + 1
    visual = [entry.visual for entry in entries]
    spans = {VISION: ((), *(((Span(1, WIDTH),) if seen else ()) for seen in visual))} if any(visual) else {}
    tokens = Tokens(ids.expand(n, -1).clone(), torch.ones(n, WIDTH, dtype=torch.bool), spans=spans)
    edits = [probe_edit(entry, row + 1, n, run) for row, entry in enumerate(entries)]
    changed = model.run(tokens, edits=edits, logits=-1, allow_noop=True).logits.as_subclass(Tensor)
    scale = float(changed[0].float().std())
    for row, entry in enumerate(entries):
        effect = float((changed[row + 1] - changed[0]).float().abs().max())
        acted = effect > 1e-4 * scale
        yield entry.name, f"an edit in layer {entry.layer} changes the logits", acted, f"by {effect:.1e}"


def probe_edit(entry: Entry, row: int, n_rows: int, run: Run) -> Edit:
    """An edit of one row, at some of the last positions, that no symmetry of the model can undo."""
    mask = Mask(tuple(PROBED if i == row else () for i in range(n_rows)), WIDTH)
    info = SITES[entry.name]
    site = probed(entry.name, entry.layer)
    if entry.name == "router_weights":
        return site.at(mask).scale(0.5)
    value = run[site].as_subclass(Tensor)
    attention = "query" in info.axes
    size = int(value.shape[1] if attention else value.shape[-1])
    generator = torch.Generator().manual_seed(row)
    noise = torch.randn(size, generator=generator).to(value.device, value.dtype)
    size_of = value[value.abs() < 1e4].float().pow(2).mean().sqrt().clamp(min=0.1)
    place = site.at(query=mask, key=WIDTH - 2) if attention else site if info.visual else site.at(mask)
    return place.add(noise * (3 * size_of).to(value.dtype))
