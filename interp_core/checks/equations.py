"""Equations between the sites of a model, which the self-check at load holds against the model itself.

The residual stream adds up, in a pass without edits and after them; head outputs sum to the output projection, patterns
to one, pattern times values is z, and the readout gives the model's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..architectures.atlas import Atlas, Entry
from ..architectures.hook_points import HookPoint, transposed
from ..architectures.shards import called
from ..errors import InterpError, ReadError, first_line
from ..plan import Plan
from ..run import CompiledPlan, Run
from ..session import Session
from ..sites import VISION_, Edit, Site

UNFIT = (InterpError, RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""How models fail on inputs that they are not made for, and sites where they are not what they are taken for."""
ROUNDING = 16
"""How many roundings of its terms a sum may be off."""


class Law(Enum):
    """What a finding of the self-check is about, and what becomes of the sites if it fails."""

    VALUE = "withdrawn: not what the model computes with"
    SUM = "withdrawn: they do not add up"
    EDIT = "not to be edited: an edit does not act as it should"
    READOUT = "refused: it gives other logits"
    PADDING = "refused: a padded row is not what it is alone"
    BATCH = "changes the numbers of its rows: sweeps run one variant after the other"


class Finding(NamedTuple):
    """One thing that was checked.

    Attributes:
        site: name of a site, or what else of the model (`readout`, `left padding`).
        what: the sentence that should hold of it.
        ok: whether it does.
        detail: by how much.
        law: what it is about.
        others: further sites of the equation, which fail with it.
        layers: where it fails; () for everywhere.
        note: what a user should know though it holds.
    """

    site: str
    what: str
    ok: bool
    detail: str
    law: Law = Law.VALUE
    others: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    note: str = ""

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that goes if it fails."""
        return (self.site, *self.others)


@dataclass(frozen=True)
class Sum:
    """How the residual stream goes on in one layer: from the site `before`, with what `parts` add, to `after`.

    Attributes:
        before: "" where no site has the stream that the parts are added to.
    """

    layer: int
    before: str
    parts: tuple[str, ...]
    after: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every site of the sum, in the order of the formula."""
        return (*((self.before,) if self.before else ()), *self.parts, self.after)

    @property
    def defined(self) -> tuple[str, ...]:
        """The sites that go if it fails: what is added, and the stream between, which it is that makes. A block's input
        and output are what they are."""
        return (*self.parts, *([self.after] if self.after.endswith("resid_mid") else []))

    def within(self, atlas: Atlas) -> Sum | None:
        """What can still be asked of it after sites were withdrawn."""
        if any((name, self.layer) not in atlas.entries for name in (*self.parts, self.after)):
            return None
        known = not self.before or (self.before, self.layer) in atlas.entries
        return self if known else replace(self, before="")

    def __str__(self) -> str:
        return f"adds up: {' + '.join((self.before or 'stream', *self.parts))} is {self.after}"


def sums(atlas: Atlas, prefix: str = "") -> list[Sum]:
    """The sums that a model's sites allow, layer by layer. Where the mixer's part is known and the MLP's is not, the
    block may have none.

    Args:
        prefix: of the names, `vision_` for the layers of a vision tower.
    """
    totals = list[Sum]()

    def add(layer: int, before: str, parts: tuple[str, ...], after: str) -> None:
        totals.append(Sum(layer, before and prefix + before, tuple(prefix + part for part in parts), prefix + after))

    for layer in range(atlas.tower if prefix else atlas.shape.n_layers):
        resid_pre, attn_out, mixer_out, resid_mid, mlp_out, resid_post = (
            (prefix + name, layer) in atlas.entries
            for name in ("resid_pre", "attn_out", "mixer_out", "resid_mid", "mlp_out", "resid_post")
        )
        mixed = "attn_out" if attn_out else "mixer_out" if mixer_out else ""
        if resid_pre and resid_mid and mixed:
            add(layer, "resid_pre", (mixed,), "resid_mid")
        if resid_post and mlp_out and (resid_mid or not mixed):
            add(layer, "resid_mid" if resid_mid else "", ("mlp_out",), "resid_post")
        elif resid_pre and resid_post and mixed and not resid_mid:
            add(layer, "resid_pre", (mixed, "mlp_out") if mlp_out else (mixed,), "resid_post")
    return totals


SEVERAL = "the model has several residual streams, and a site is of one"
TWINS = {"attn_in": "mixer_in", "attn_out": "mixer_out"}
"""Names of one tensor in layers that mix by attention alone: what is found of the first is true of the second."""


def add_up(model: Session, run: Run, totals: list[Sum], edited: Sequence[Entry] = ()) -> list[Finding]:
    """Hold sums against a run that has read their sites, in all its rows; one finding for layers alike.

    Args:
        edited: what is edited in each row but the first.
    """
    kinds: dict[str, list[Sum]] = {}
    for total in totals:
        if total.before:
            kinds.setdefault(str(total), []).append(total)
    return [_held(model, run, what, alike, edited) for what, alike in kinds.items()]


def _held(model: Session, run: Run, what: str, alike: list[Sum], edited: Sequence[Entry]) -> Finding:
    checked = [_adds_up(model, run, total, edited) for total in alike]
    if model.atlas.family.summed is not None and alike[0].after == "resid_post" and not all(ok for ok, *_ in checked):
        again, changed = _summed(model, run, alike)
        checked = [
            _adds_up(model, again if total.layer in changed else run, total, edited, summed=total.layer in changed)
            for total in alike
        ]
    failed = tuple(total.layer for total, (ok, _, _) in zip(alike, checked, strict=True) if not ok)
    worst = _worst(off for _, off, _ in checked)
    first, *others = alike[0].defined
    note = ""
    if not failed and any(joined for _, _, joined in checked):
        note = f"{alike[0].after} is no plain sum: the family norms or scales the stream itself, see docs/families.md"
    # without edits every layer was seen, with them only those that are edited stand for the others
    layers, when = ((), " after edits") if edited else (failed, "")
    return Finding(first, what + when, not failed, f"{worst:.1e}", Law.SUM, tuple(others), layers, note)


def _summed(model: Session, run: Run, alike: list[Sum]) -> tuple[Run, list[int]]:
    """The same pass once more, in which `resid_post` is the stream that parts were added to, of blocks that go on to
    change it; and the layers of these."""
    inside, place = copy(model.atlas), model.atlas.family.summed
    inside.entries = dict(model.atlas.entries)
    changed: list[int] = []
    for layer in (total.layer for total in alike):
        entry = inside.entries["resid_post", layer] = copy(inside.entries["resid_post", layer])
        assert entry.read is not None and place is not None
        if (path := f"{entry.read.module}.{place.module}") in model.engine.modules:
            entry.read = HookPoint(path, place.side)
            changed.append(layer)
    edits = run._compiled.edits
    sites = tuple(dict.fromkeys(Site(name, total.layer) for total in alike for name in total.names))
    return _read_by(model, inside, run, sites, edits), changed


def _read_by(model: Session, atlas: Atlas, run: Run, sites: tuple[Site, ...], edits: tuple[Edit, ...] = ()) -> Run:
    """A pass over a run's tokens that reads sites where another atlas has them."""
    plan = CompiledPlan(model, model.engine.compile(Plan.of(sites, edits), atlas), sites, edits)
    return plan.run(run.tokens, logits=-1, allow_noop=True)


def _adds_up(
    model: Session, run: Run, total: Sum, edited: Sequence[Entry], *, summed: bool = False
) -> tuple[bool, float, bool]:
    """Whether a sum holds up to rounding, how far it is off in parts of the largest number, and whether it does so by
    the family's own `join` only, or before its block goes on (`summed`)."""
    shown = _shown(model.atlas, total)
    rows = [0, *(i for i, entry in enumerate(edited, 1) if id(entry) not in shown)]
    before, *parts, after = (run[Site(name, total.layer)].plain[rows] for name in total.names)
    added = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    terms = before.abs() + sum(part.abs() for part in parts)
    if edited:  # of a part that lies beside others: their rounding is in it, and no site has them
        terms = terms.amax(-1, keepdim=True)
    ok, off = within_rounding(model, before + added, after, terms)
    join = None if total.after.startswith(VISION_) else model.atlas.family.join
    if ok or join is None or summed:
        return ok, off, summed
    block = model.atlas.entries["resid_pre", total.layer].module
    if block is None:
        return ok, off, False
    with torch.no_grad():
        off = distance(join(block, total.after, before, added), after)
    return off <= tolerance(model), off, True


def _shown(atlas: Atlas, total: Sum) -> set[int]:
    """Entries whose edit shows in what is read of a sum and goes nowhere else: the sum itself, and what is read at the
    very place where a term is (`mlp_in` at `resid_mid` in OLMo 2)."""
    entries = {name: atlas.entries[name, total.layer] for name in total.names}
    places = {(point.module, point.side) for entry in entries.values() if (point := entry.read) is not None}
    others = [entry for (name, layer), entry in atlas.entries.items() if layer == total.layer and name not in entries]
    beside = [entry for entry in others if entry.write and (entry.write.module, entry.write.side) in places]
    return {id(entry) for entry in (*beside, entries[total.after])}


def within_rounding(model: Session, a: Tensor, b: Tensor, terms: Tensor) -> tuple[bool, float]:
    """Whether two results of a sum differ by rounding only, and how far they are off, in parts of the largest."""
    narrow = getattr(model.hf.config.get_text_config(), "residual_in_fp32", False)  # in Mamba, whatever the dtype
    dtypes = (a.dtype, b.dtype, model.dtype, *([torch.float32] if narrow else []))
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    ok = (a - b).abs() <= ROUNDING * eps * (terms + b.abs())
    return bool(ok.all()), distance(a, b)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, in parts of the largest number of `b`."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-12))


def tolerance(model: Session) -> float:
    """How far results of a few layers may be off, in parts of the largest number."""
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2


def equations(model: Session, run: Run, totals: list[Sum]) -> Iterator[Finding]:
    """The equations between the sites of a pass that has read them all, sums among them."""
    atlas = model.atlas
    covered = {(alias, total.layer) for total in totals for name in total.defined for alias in (name, TWINS.get(name))}
    alone = "no site has the stream that it is part of"
    why = next(
        (SEVERAL for (name, _), said in atlas.withdrawn.items() if name == "resid_pre" and SEVERAL in said), alone
    )
    for name in ("attn_out", "mixer_out", "resid_mid", "mlp_out"):
        if open_ := tuple(layer for layer in atlas.layers(name) if (name, layer) not in covered):
            yield Finding(name, "adds up", False, why, Law.SUM, layers=open_)
    yield from add_up(model, run, totals)
    if both(atlas, "vision_embed", "embed"):
        yield _close(model, "vision_embed", "is what is embedded", [(at(run, "vision_embed", 0), at(run, "embed", 0))])
    yield from projections(model, run)
    yield from _attention(model, run)
    if (last := ("resid_post", atlas.shape.n_layers - 1)) in atlas.entries and "readout" not in atlas.lacking:
        yield from _readout(model, run, at(run, *last))


def declared(run: Run, sites: Iterable[Site], known: Mapping[str, int]) -> tuple[bool, str]:
    """Whether sites, each of one layer at most, have the shapes that the atlas declares; and what is not as declared.

    Args:
        known: sizes of axes that the input gives.
    """
    for site in sites:
        info, layer = site.info, site.layers if isinstance(site.layers, int) else 0
        sizes = {**run.model.atlas.entries[site.name, layer].sizes, **known}
        wanted = [sizes[axis] for axis in info.axes if axis != info.unit or site.units is None]
        try:
            shape = list(run[site].shape)
        except ReadError:
            return False, f"nothing passes there in layer {layer}"
        except RuntimeError as error:  # a view that does not fit what the module returns
            return False, f"layer {layer}: {error}"
        if shape != wanted:
            streams = site.name.startswith("resid") and len(shape) == len(wanted) + 1 and shape[-1] == wanted[-1]
            why = f"; {SEVERAL}" if streams else ""
            return False, f"layer {layer} gives {shape}, not {wanted}{why}"
    return True, ""


def projections(model: Session, run: Run, prefix: str = "") -> Iterator[Finding]:
    """Head outputs sum to what the output projection gives; of a vision tower with its prefix."""
    layers = both(model.atlas, f"{prefix}head_out", f"{prefix}z")
    if layers := [i for i in layers if model.atlas.entries[f"{prefix}z", i].module is not None]:
        pairs = (_projected(model, run, i, prefix) for i in layers)
        yield _close(model, f"{prefix}head_out", "sums to the output projection", pairs)


def _attention(model: Session, run: Run) -> Iterator[Finding]:
    """Between patterns and what they are made of and mix."""
    atlas = model.atlas
    if layers := both(atlas, "pattern"):
        sinks = any(mark in name for mark in ("sinks", "sink_proj") for name, _ in model.hf.named_parameters())
        rows = [at(run, "pattern", i).sum(-1) for i in layers]
        ones = [x.clamp(max=1) if sinks else torch.ones_like(x) for x in rows]
        what = "sums to less than one, the rest is the sink's" if sinks else "sums to one"
        yield _close(model, "pattern", what, list(zip(rows, ones, strict=True)))
        both_of = both(atlas, "scores", "pattern")
        if both_of and not sinks:
            pairs = ((at(run, "scores", i).float().softmax(-1), at(run, "pattern", i).float()) for i in both_of)
            yield _close(model, "scores", "give the pattern by softmax", pairs)
    if layers := both(atlas, "pattern", "v", "z"):
        mixed = partial(_mixes, atlas, run, layers)
        finding = _close(model, "v", "times pattern is z", mixed())
        if not finding.ok and _by_itself(atlas, "pattern"):
            # An engine that does attention by itself does not show what is handed on; a gate is what may come behind.
            gated = ((z, z.clamp(x.clamp(max=0), x.clamp(min=0))) for x, z in mixed())
            finding = _close(model, "v", "times pattern, times a gate between 0 and 1, is z", gated)
        elif not finding.ok:
            finding = _handed(model, run, layers)
        yield finding
    if (layers := both(atlas, "scores", "rot_q", "rot_k")) and not _called(atlas, "rot_q") and not _capped(model):
        rotated = (_first_scores(at(run, "rot_q", i), at(run, "rot_k", i), at(run, "scores", i)) for i in layers)
        yield _close(model, "rot_q", "gives the scores, with rot_k", rotated)._replace(others=("rot_k",))
    if (layers := both(atlas, "scores", "q", "k")) and not _normed(model):
        finding = _scored(model, run, layers, _first_scores)
        if not finding.ok and not both(atlas, "rot_q"):  # nothing rotates; there may be a bias
            finding = _scored(model, run, layers, _unbiased_scores)
        yield from (finding, finding._replace(site="k"))


def _by_itself(atlas: Atlas, name: str) -> bool:
    """Whether an engine does attention by itself, so that a site is where it shows it and not where the model's own
    attention is opened."""
    points = [atlas.entries[name, layer].read for layer in atlas.layers(name)]
    return any(point is not None and not point.inside for point in points)


def _called(atlas: Atlas, name: str) -> bool:
    """Whether a site is what an attention function is called with, in every layer."""
    points = [atlas.entries[name, layer].read for layer in atlas.layers(name)]
    return all(point is not None and point.side == "attention" for point in points)


def _readout(model: Session, run: Run, last: Tensor) -> Iterator[Finding]:
    """The last stream through the final norm, and on to the logits."""
    read_out = ((model.readout(x), run.logits.plain) for x in (last,))
    yield _close(model, "readout", "gives the model's logits", read_out)._replace(law=Law.READOUT)
    if model.atlas.layers("final_norm"):
        normed = ((model.atlas.final_norm(x), at(run, "final_norm", 0)) for x in (last,))
        yield _close(model, "final_norm", "is the norm of the last stream", normed)


def _worst(distances: Iterable[float]) -> float:
    """The largest distance; NaN is the worst."""
    return max(distances, key=lambda x: (x != x, x))


def _close(model: Session, name: str, what: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> Finding:
    """Whether pairs are alike. They are computed here, one after the other: sites that do not fit each other, so that
    this fails, are not what they are taken for, and the model is none the worse."""
    try:
        with torch.no_grad():
            worst = _worst(distance(a, b) for a, b in pairs)
    except UNFIT as error:
        return Finding(name, what, False, first_line(error))
    return Finding(name, what, worst <= tolerance(model), f"{worst:.1e}")


def both(atlas: Atlas, *names: str) -> list[int]:
    """Layers that have all of these sites."""
    return sorted(set.intersection(*(set(atlas.layers(name)) for name in names)))


def at(run: Run, name: str, layer: int) -> Tensor:
    """What a run has read of a whole site in one layer."""
    return run[Site(name, layer)].plain


def _mixes(atlas: Atlas, run: Run, layers: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """What patterns and values give, and `z`."""
    for layer in layers:
        yield _mixed(atlas, layer, at(run, "pattern", layer), at(run, "v", layer)), at(run, "z", layer)


def _mixed(atlas: Atlas, layer: int, pattern: Tensor, v: Tensor) -> Tensor:
    """Values mixed by the pattern `[batch pos head d_head]`, as the family does it."""
    if atlas.family.mixed is not None:
        return atlas.family.mixed(atlas.module("attn", layer), pattern, v)
    groups = pattern.shape[1] // v.shape[2]
    return torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v.repeat_interleave(groups, 2))


def _handed(model: Session, run: Run, layers: list[int]) -> Finding:
    """Whether `v` is what attention mixes, of models that gate, norm or scale what it gives before they project it."""
    inside = copy(model.atlas)
    inside.entries = dict(model.atlas.entries)
    for layer in layers:
        entry = inside.entries["v", layer] = copy(inside.entries["v", layer])
        pattern = inside.entries["pattern", layer].read
        assert pattern is not None
        entry.read = HookPoint(pattern.module, pattern.side, "v", view=transposed)
    sites = tuple(Site("v", layer) for layer in layers)
    what = "is what attention mixes"
    try:
        handed = _read_by(model, inside, run, sites)
        return _close(model, "v", what, [(at(run, "v", i), at(handed, "v", i)) for i in layers])
    except (InterpError, RuntimeError) as error:
        return Finding("v", what, False, first_line(error))


NORMS_OF_HEADS = (
    "q_norm", "k_norm", "q_proj.norm", "k_proj.norm", "q_layernorm", "k_layernorm", "query_layernorm",
    "key_layernorm", "q_b_norm", "kv_norm",
)  # fmt: skip
"""How modules that norm queries and keys are called."""


def _normed(model: Session) -> bool:
    """Whether queries and keys pass a norm or scores a cap, so that their product does not show."""
    return _capped(model) or any(name.endswith(NORMS_OF_HEADS) for name in model.engine.modules)


def _capped(model: Session) -> bool:
    return bool(getattr(model.hf.config.get_text_config(), "attn_logit_softcapping", None))


def _scored(model: Session, run: Run, layers: list[int], by: Callable[..., tuple[Tensor, Tensor]]) -> Finding:
    """Whether `q` and `k` give the scores."""
    pairs = (by(*(at(run, name, layer) for name in ("q", "k", "scores"))) for layer in layers)
    return _close(model, "q", "gives the scores of the first position", pairs)


def _first_scores(q: Tensor, k: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the first position, where rotary embeddings do nothing, by q and k and as they are, up to scale."""
    product = (q[:, 0] * k[:, 0].repeat_interleave(q.shape[2] // k.shape[2], 1)).sum(-1).float()
    actual = scores[:, :, 0, 0].float()
    return product * (actual.norm() / product.norm()), actual


def _unbiased_scores(q: Tensor, k: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """How neighbouring keys' difference changes from a query to the next, by q and k and as it is, up to scale: a bias
    by how far a key lies behind, or by its position (ALiBi, MPNet), drops out."""
    product = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))

    def changes(x: Tensor) -> Tensor:
        steps = x[..., 1:].double() - x[..., :-1].double()
        return (steps[..., 1:, 1:] - steps[..., :-1, :-1]).tril(-1)

    by_hand, actual = changes(product), changes(scores)
    return by_hand * (actual.norm() / by_hand.norm()), actual


def _projected(model: Session, run: Run, layer: int, prefix: str) -> tuple[Tensor, Tensor]:
    """Sum of head outputs plus bias, and what the output projection makes of z."""
    module = model.atlas.entries[f"{prefix}z", layer].module
    assert module is not None
    z = at(run, f"{prefix}z", layer)
    total, mixed = at(run, f"{prefix}head_out", layer).sum(2), z.reshape(*z.shape[:2], -1)
    with torch.no_grad():
        return total + called(module, torch.zeros_like(mixed[:, :1])), called(module, mixed)
