"""The self-check at load: a few short passes that hold the atlas against the model itself.

The first reads every site: shapes are as declared, and the equations between them hold. The second has one row per kind
of site, each row with an edit at its site: its logits must differ from those of the row without, and the residual
stream must add up in every row, so that an edit of what is added moves the stream by just that. The last two run a row
alone and padded on either side: that must not change it. What fails is taken out of the atlas, with the reason.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from ..architectures.atlas import CAUSAL, Atlas, Entry
from ..architectures.parameters import is_special
from ..errors import CapabilityError, InterpError, first_line
from ..model_inputs import model_inputs
from ..positions import VISION, Mask, Span
from ..run import Run, forward
from ..session import Session
from ..sites import SITES, Edit, Site
from ..text import Tokens
from ..vision.places import placeholder_ids
from .equations import (
    TWINS,
    UNFIT,
    Finding,
    Law,
    Sum,
    add_up,
    declared,
    distance,
    equations,
    sums,
    tolerance,
    within_rounding,
)
from .repeats import passing_once, run_again, shared_modules, turns
from .tower import check_tower

log = logging.getLogger(__name__)
WIDTH = 6
CHECKED_POSITIONS = (WIDTH - 3, WIDTH - 1)
"""Positions that are edited: not all that a sliding window sees, which would shift all scores alike."""
ALONE = WIDTH - 2
"""Length of the row that is run alone and padded."""
HIDDEN = 1e4
"""Numbers beyond it are of masks."""
DERIVED_ONCE = ("expert_out",)
"""Sites read in one layer only, because reading them costs as much as the layer."""


@dataclass(frozen=True)
class Check:
    """What the self-check found.

    Attributes:
        rows: everything that was checked; each starts with `site, what, ok, detail`.
    """

    rows: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether everything passed."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(f"{'ok  ' if row.ok else 'FAIL'}  {row.site:15}{row.what}  {row.detail}" for row in self.rows)


def checked_sites(atlas: Atlas) -> list[str]:
    """Names of what the check looks at, which runs on text. `vision_embed` is checked by taking text tokens for visual
    ones; features of images that are added later exist with images only, and are left to the tests. A vision tower is
    checked by itself: `checks.tower`."""
    return [name for name, info in SITES.items() if name != "deepstack" and not info.tower and atlas.layers(name)]


def check_atlas(model: Session) -> Check:
    """Check a model's atlas, and take out of it what fails: each failed equation takes its own sites, and no others.

    What is taken out is said in one line of the log, and stands in the atlas' notes.

    Raises:
        CapabilityError: a model that does not run, or that runs its blocks more than once in a pass.
    """
    rows: list[Finding] = []
    try:
        for finding in _checks(model):
            rows.append(finding)
            if not finding.ok:
                _withdraw(model.atlas, finding)
    except InterpError:
        raise
    except UNFIT as error:
        raise _cannot_run(model, error) from error
    _tell(model.atlas, rows)
    return Check(tuple(rows))


def _withdraw(atlas: Atlas, finding: Finding) -> None:
    why = f"self-check: {finding.what} fails ({finding.detail})"
    for name in finding.sites:
        if name in atlas.lacking:
            continue
        if name not in SITES:
            atlas.lacking[name] = why
            continue
        layers = [layer for layer in atlas.layers(name) if layer in finding.layers or not finding.layers]
        twin = TWINS.get(name, "")
        of_twin = [layer for layer in layers if (twin, layer) in atlas.entries and _is_twin(atlas, twin, layer)]
        for gone, where in ((name, layers), (twin, of_twin)):
            if where and finding.law is not Law.EDIT:
                atlas.drop(gone, why, where)
            for layer in where if finding.law is Law.EDIT else ():
                entry = atlas.entries[gone, layer]
                entry.write = None
                entry.why = dict.fromkeys(("write", "grad"), why) | entry.why
        if name == "final_norm" and finding.law is not Law.EDIT:
            atlas.lacking.setdefault("readout", why)


def _tell(atlas: Atlas, rows: list[Finding]) -> None:
    """Put what was taken out of the atlas into its notes, and log it as one warning."""
    clauses = []
    for law in Law:
        failed = [row for row in rows if row.law is law and not row.ok]
        if failed:
            names = ", ".join(dict.fromkeys(name for row in failed for name in row.sites))
            clauses.append(f"{names}{_where(failed, atlas)} {law.value} ({failed[0].detail})")
    atlas.notes += [*clauses, *dict.fromkeys(row.note for row in rows if row.note)]
    if clauses:
        log.warning("%s: %s", atlas.family.name, "; ".join(clauses))


def _where(failed: list[Finding], atlas: Atlas) -> str:
    """In which layers, where it is not in all."""
    layers = sorted({layer for row in failed for layer in row.layers})
    if not all(row.layers for row in failed) or len(layers) == atlas.shape.n_layers:
        return ""
    return f" in {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"


def _checks(model: Session) -> Iterator[Finding]:
    atlas = model.atlas
    ids = check_tokens(model)
    tokens = Tokens(ids[None], torch.ones(1, WIDTH, dtype=torch.bool), spans={VISION: ((Span(0, WIDTH),),)})
    with turns(model) as often:
        try:
            run = forward(model, tokens, read=_everything(atlas))
        except UNFIT as error:
            _demand_a_pass(model, tokens, error)
            yield from _unreadable(model, tokens)
            run = forward(model, tokens, read=_everything(atlas))
        _demand_its_logits(model, tokens, run)
    yield from run_again(atlas, often)
    for name in checked_sites(atlas):
        layers = atlas.layers(name)[: 1 if name in DERIVED_ONCE else None]
        known = dict.fromkeys(("pos", "query", "key", "visual"), WIDTH)
        shape = declared(run, (check_site(name, layer) for layer in layers), {"batch": 1, **known})
        yield Finding(name, "has the declared shape", *shape)
    yield from _alike(run)
    yield from _opened(model, tokens, run)
    yield from _routers(model, tokens)
    totals = sums(model.atlas)
    yield from equations(model, run, totals)
    yield from _effects(model, run, ids, [left for total in totals if (left := total.within(atlas))])
    yield from _alone(model, run, ids[:ALONE])
    yield from check_tower(model, ids)


def _demand_its_logits(model: Session, tokens: Tokens, run: Run) -> None:
    """Refuse an engine whose copy of the model computes something else than the model, such as without an adapter that
    lies where the engine splits a projection.

    Raises:
        CapabilityError: by how much its logits differ.
    """
    if model.engine.model is model.hf or getattr(model.engine, "remote", False):
        return
    with torch.no_grad():
        own = model.hf(**model_inputs(model, tokens), **model.without_cache).logits
    ours = run.logits.plain
    if "folded" in model.engine.name:  # which may shift all logits of a position alike
        ours, own = (x - x.mean(-1, keepdim=True) for x in (ours, own))
    most = limit(model)
    if distance(ours, own) > most and _inside(model):  # if opening attention alone does that, it is not to be opened
        ours = forward(model, tokens).logits.plain
    if (off := distance(ours, own)) > most:
        raise CapabilityError(
            f"engine {model.engine.name!r} gives other logits than this {type(model.hf).__name__} itself (off by "
            f"{off:.1e} of the largest), so its copy leaves something of the model out; load with engine='torch'"
        )


def limit(model: Session) -> float:
    """How far logits of one model may be off that are computed in two ways; in half precision rounding may send a token
    to other experts."""
    return tolerance(model) if torch.finfo(model.dtype).eps < 1e-4 else 0.5


def _opened(model: Session, tokens: Tokens, run: Run) -> Iterator[Finding]:
    """What is read inside attention is what the model computes with: opening it changes no logits."""
    if inside := _inside(model):
        off = distance(run.logits.plain, forward(model, tokens).logits.plain)
        first, *others = inside
        what = "is the attention that the model does"
        yield Finding(first, what, off <= limit(model), f"logits differ by {off:.1e}", others=tuple(others))


def _inside(model: Session) -> list[str]:
    """Sites that open attention."""
    return [name for name in ("pattern", "scores", "rot_q", "rot_k") if model.atlas.layers(name)]


def _alike(run: Run) -> Iterator[Finding]:
    """Of a model that processes share, whether every one of them has the same numbers: where one had a part alone, or
    other weights, they would differ."""
    atlas = run.model.atlas
    if atlas.processes is None:
        return
    for name in checked_sites(atlas):
        layers = atlas.layers(name)[: 1 if name in DERIVED_ONCE else None]
        mine = torch.stack([_sums(run[check_site(name, layer)].plain) for layer in layers])
        each = [torch.empty_like(mine) for _ in range(dist.get_world_size(atlas.processes))]
        dist.all_gather(each, mine, group=atlas.processes)
        sums, sizes = torch.stack(each).unbind(-1)  # [process layer]
        apart = (sums - sums[0]).abs().amax(0)
        wrong = [layer for layer, far in zip(layers, (apart > 1e-3 * sizes.amax(0)).tolist(), strict=True) if far]
        detail = f"layer {wrong[0]}: processes differ by {apart.max():.2g}" if wrong else ""
        yield Finding(name, "is the same in every process", not wrong, detail, layers=tuple(wrong))


def _sums(x: Tensor) -> Tensor:
    """A sum of all numbers that their order changes, and one of their sizes; without those that are masked."""
    numbers = torch.where(x.isfinite(), x, 0).double().flatten()
    return torch.stack([numbers @ torch.linspace(1, 2, len(numbers)).to(numbers), numbers.abs().sum()])


def _everything(atlas: Atlas) -> list[Site]:
    names = checked_sites(atlas)
    return [check_site(name, atlas.layers(name)[0]) if name in DERIVED_ONCE else Site(name) for name in names]


def _demand_a_pass(model: Session, tokens: Tokens, error: Exception) -> None:
    """Refuse a model that cannot even run.

    Raises:
        CapabilityError: with what it said.
    """
    try:
        forward(model, tokens)
    except UNFIT as problem:
        raise _cannot_run(model, problem) from error


def _cannot_run(model: Session, error: Exception) -> CapabilityError:
    kind = type(model.hf).__name__
    return CapabilityError(f"engine {model.engine.name!r} cannot run this {kind} in {model.dtype}: {first_line(error)}")


def _unreadable(model: Session, tokens: Tokens) -> Iterator[Finding]:
    """After a pass that reads all sites has failed: one finding for each site that cannot be read."""
    for site in _everything(model.atlas):
        try:
            forward(model, tokens, read=site)
        except UNFIT as error:
            yield Finding(site.name, "can be read", False, first_line(error))


def check_site(name: str, layer: int) -> Site:
    """A site in one layer, or one unit of it where reading it all costs too much."""
    return Site(name, layer if SITES[name].layered else None, 0 if name in DERIVED_ONCE else None)


def check_tokens(model: Session) -> Tensor:
    """A few ordinary token ids, the same for every load."""
    config = model.hf.config
    special = placeholder_ids(config)
    for kind in ("pad", "bos", "eos"):
        ids_of = getattr(config, f"{kind}_token_id", None)  # one, or a list, as Llama 3 has for the end
        special |= {*ids_of} if isinstance(ids_of, (list, tuple)) else {int(ids_of)} if ids_of is not None else set()
    size = model.atlas.shape.n_ids
    ids = [i * 7919 % size for i in range(1, 4 * WIDTH)]
    return torch.tensor([i for i in ids if i not in special][:WIDTH])


def _routers(model: Session, tokens: Tokens) -> Iterator[Finding]:
    """Experts selected again from a router's own logits, as the family file says, against what its module returned: an
    edit selects by that rule, so one that is not the model's must not be edited by."""
    entries = [entry for (name, _), entry in model.atlas.entries.items() if name == "router_logits" and entry.write]
    if not entries:
        return
    same = [Site("router_logits", entry.layer).scale(1.0) for entry in entries]
    what, why = "selects as the family does", ""
    try:
        forward(model, tokens, edits=same, logits=-1, allow_noop=True)
    except InterpError as error:
        why = str(error)
    yield Finding("router_logits", what, not why, why, Law.EDIT)


def _effects(model: Session, run: Run, ids: Tensor, totals: list[Sum]) -> Iterator[Finding]:
    """One row per kind of site and end of the model, each with one edit; row 0 has none."""
    shared = shared_modules(model)
    entries = _checked_entries(model.atlas, shared)
    try:
        edited = _edited(model, run, ids, entries, totals)
    except UNFIT:
        yield from _uneditable(model, run, ids, entries)
        entries = _checked_entries(model.atlas, shared)
        edited = _edited(model, run, ids, entries, totals)
    layers = {entry.layer for entry in entries}
    seen = [total for total in totals if total.layer in layers]
    yield from [
        *passing_once(entries, edited, shared),
        *add_up(model, edited, seen, entries),
        *_added(model, edited, seen, entries),
    ]
    changed = edited.logits.plain
    if any(map(is_special, model.hf.modules())):  # kernels may round by the largest number of a whole batch
        off = distance(changed[0].flatten(), run.logits.plain[0, -1])
        yield Finding("batch", "leaves a row as it is alone", off <= tolerance(model), f"{off:.1e}", Law.BATCH)
    few = changed[0].numel() < 8  # labels of a classifier, which may be one, and has no spread
    scale = float(changed[0].float().abs().max() if few else changed[0].float().std())
    for row, entry in enumerate(entries):
        effect = float((changed[row + 1] - changed[0]).float().abs().max())
        acted, what = effect > 1e-4 * scale, f"an edit in layer {entry.layer} changes the logits"
        yield Finding(entry.name, what, acted, f"by {effect:.1e}", Law.EDIT)


def _edited(model: Session, run: Run, ids: Tensor, entries: list[Entry], totals: list[Sum]) -> Run:
    """The pass with one row for each edit, and the first without. It reads the sums of the layers that are edited."""
    n = len(entries) + 1
    visual = [entry.visual for entry in entries]
    spans = {VISION: ((), *(((Span(1, WIDTH),) if is_visual else ()) for is_visual in visual))} if any(visual) else {}
    tokens = Tokens(ids.expand(n, -1).clone(), torch.ones(n, WIDTH, dtype=torch.bool), spans=spans)
    edits = [check_edit(entry, row + 1, n, run) for row, entry in enumerate(entries)]
    layers = {entry.layer for entry in entries}
    read = tuple(dict.fromkeys(Site(name, t.layer) for t in totals if t.layer in layers for name in t.names))
    return forward(model, tokens, read=read, edits=edits, logits=-1, allow_noop=True)


def _uneditable(model: Session, run: Run, ids: Tensor, entries: list[Entry]) -> Iterator[Finding]:
    """After a pass with all edits has failed: one finding for each site whose edit fails by itself."""
    for entry in entries:
        try:
            _edited(model, run, ids, [entry], [])
        except UNFIT as error:
            yield Finding(entry.name, f"can be edited in layer {entry.layer}", False, first_line(error), Law.EDIT)


def _checked_entries(atlas: Atlas, shared: set[str]) -> list[Entry]:
    """Every kind of site in its first and last layer, and where it lies at a module that hangs in several layers."""

    def layers(name: str) -> set[int]:
        points = [(layer, atlas.entries[name, layer].write) for layer in atlas.layers(name)]
        within = [layer for layer, point in points if point is not None and point.module in shared]
        return {*atlas.layers(name)[:1], *atlas.layers(name)[-1:], *within}

    return [
        atlas.entries[name, layer]
        for name in checked_sites(atlas)
        for layer in sorted(layers(name))
        if atlas.entries[name, layer].write is not None
        if name not in DERIVED_ONCE or layer == atlas.layers(name)[0]
        if not _is_twin(atlas, name, layer)
    ]


def _is_twin(atlas: Atlas, name: str, layer: int) -> bool:
    """Whether a site is another one under a second name."""
    first = next((atlas.entries.get((of, layer)) for of, twin in TWINS.items() if twin == name), None)
    return first is not None and first.write is atlas.entries[name, layer].write


def _added(model: Session, edited: Run, totals: list[Sum], entries: list[Entry]) -> Iterator[Finding]:
    """Parts whose stream no site has: the stream after them moves by what an edit adds to them."""
    for total in totals:
        rows = [0, *(i + 1 for i, e in enumerate(entries) if (e.name, e.layer) == (total.parts[0], total.layer))]
        if total.before or len(rows) == 1:
            continue
        part, after = (edited[Site(name, total.layer)].plain[rows] for name in total.names)
        moved, added = after[1:] - after[:1], part[1:] - part[:1]
        terms = (after[1:].abs() + after[:1].abs() + part[1:].abs() + part[:1].abs()).amax(-1, keepdim=True)
        ok, off = within_rounding(model, moved, added, terms)
        yield Finding(total.parts[0], f"{total} after edits", ok, f"{off:.1e}", Law.SUM)


def _alone(model: Session, run: Run, ids: Tensor) -> Iterator[Finding]:
    """The first tokens alone: against the same with others behind them, which only an encoder's see, and against a row
    with padding on either side."""
    alone = forward(model, Tokens(ids[None], torch.ones(1, ALONE, dtype=torch.bool))).logits.plain[0]
    # In low precision a router may choose otherwise for no reason but the length, so modules that say it are believed.
    ahead = not model.atlas.looks_back and distance(run.logits.plain[0, :ALONE], alone) > tolerance(model)
    model.atlas.note_reach(ahead=ahead)
    if ahead:
        yield Finding("causal", "positions see later ones too", True, "", note=model.atlas.lacking[CAUSAL])
    yield from _padding(model, ids, alone)


def _padding(model: Session, ids: Tensor, alone: Tensor) -> Iterator[Finding]:
    pad, known = WIDTH - ALONE, getattr(model.hf.config.get_text_config(), "pad_token_id", None)
    filler = torch.full((pad,), known if isinstance(known, int) and 0 <= known < model.atlas.shape.n_ids else 0)
    sides = {"left": slice(pad, None), "right": slice(0, ALONE)}
    mask = torch.zeros(2, WIDTH, dtype=torch.bool)
    for row, real in enumerate(sides.values()):
        mask[row, real] = True
    padded = Tokens(torch.stack([torch.cat([filler, ids]), torch.cat([ids, filler])]), mask)
    try:
        logits = forward(model, padded).logits.plain
    except UNFIT as error:
        for side in sides:
            yield Finding(f"{side} padding", "changes nothing", False, first_line(error), Law.PADDING)
        return
    far = [distance(logits[row, real], alone) for row, real in enumerate(sides.values())]
    if math.isnan(far[0]):  # a query that sees nothing but padding; on the right only those behind a window do
        reaches = [reach for reach in model.atlas.reaches.values() if reach.window or reach.chunk]
        model.atlas.blind_behind = min((reach.window or 1 for reach in reaches), default=None)
    for side, off in zip(sides, far, strict=True):
        yield Finding(f"{side} padding", "changes nothing", off <= tolerance(model), f"{off:.1e}", Law.PADDING)


def check_edit(entry: Entry, row: int, n_rows: int, run: Run) -> Edit:
    """An edit of one row, at some of the last positions, that no symmetry of the model can undo."""
    mask = Mask(tuple(CHECKED_POSITIONS if i == row else () for i in range(n_rows)), WIDTH)
    info = SITES[entry.name]
    site = check_site(entry.name, entry.layer)
    if entry.name == "router_logits":  # other experts, also where a token has one, of weight 1
        return site.at(mask).scale(-1.0)
    if entry.name == "router_weights":
        # unevenly: a norm of what experts give undoes a factor that all have in common
        return site.at(mask).apply(
            lambda x: x * torch.linspace(0.25, 0.75, x.shape[-1], device=x.device, dtype=x.dtype)
        )
    value = run[site].plain
    attention = "query" in info.axes
    size = int(value.shape[1] if attention else value.shape[-1])
    generator = torch.Generator().manual_seed(row)
    dtype = value.dtype if entry.wide else run.model.dtype  # some models give float32 logits whatever their dtype
    noise = torch.randn(size, generator=generator).to(value.device, dtype)
    size_of = value[value.abs() < HIDDEN].float().pow(2).mean().sqrt().clamp(min=0.1)
    spot = site.at(query=mask, key=_seen_key(value)) if attention else site if info.visual else site.at(mask)
    return spot.add(noise * (3 * size_of).to(dtype))


def _seen_key(attention: Tensor) -> int:
    """The last key that most heads see from the checked positions: windows and indexers hide others, whose scores
    do nothing."""
    seen = (attention[0, :, list(CHECKED_POSITIONS), : WIDTH - 1] > -HIDDEN).sum((0, 1))  # [key]
    return int((seen == seen.max()).nonzero()[-1])
