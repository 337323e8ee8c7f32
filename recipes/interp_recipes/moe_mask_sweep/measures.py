"""What a mask does to one context of a pair: likelihood of the targets, and how the routers' choices changed.

    all         a forward pass per mask; every token of the context is routed without the banned experts
    targets     only the targets' own positions p
    predicting  only the positions p - 1, which predict the targets
    segment     only a stretch of positions of the context

The narrow scopes go through `model.sweep`, which does again only what a mask can change. It gives likelihoods; how many
slots went to others is counted in forward passes, so the first context of such a run is done both ways, its likelihoods
held against each other, and the slots of other contexts stand empty.
A run in which a banned expert was executed, or whose selection does not reproduce the family's router, is refused.

Cost: scope all, masks × samples × 2 forward passes; else what docs/sweeps.md says. Logits of the predicting positions
alone are worked out. Must equal: the golden model's 37 masks (tests/data/moe/mask_sweep.json) within 2e-5 nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from interp_plugins.pairs import Pair
from interp_plugins.pairs.pair import Side
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .orders import Variant

Scope = Literal["all", "targets", "predicting", "segment"]
Row = dict[str, Any]
TOLERANCE = 1e-3
"""Nats by which a sweep and a forward pass of a model may differ in any dtype; what is larger is no rounding."""


def row_key(pair: str, side: Side, variant: Variant) -> str:
    """The name of a row in the run's journal."""
    return f"{pair} · {side} · {variant.key}"


def edits_of(variant: Variant, positions: Sequence[int] | None = None) -> list[ic.Edit]:
    """The mask as edits, at all positions (None) or at some."""
    sites = {layer: S.router_logits[layer] for layer in variant.banned}
    if positions is not None:
        sites = {layer: site.at(list(positions)) for layer, site in sites.items()}
    return [sites[layer].mask(list(experts), mode=variant.mode) for layer, experts in variant.banned.items()]


def positions_of(pair: Pair, side: Side, scope: Scope, segment: Sequence[int] | None) -> list[int] | None:
    """Where a mask bans, counted over the context's real tokens; None: everywhere.

    Raises:
        PlanError: a segment outside the context.
    """
    targets = pair.positions(side)
    if scope == "all":
        return None
    if scope == "targets":
        return list(targets)
    if scope == "predicting":
        return [p - 1 for p in targets]
    start, stop = segment or (0, 0)
    length = pair.tokens(side).lengths[0]
    if not 0 <= start < min(stop, length):
        raise ic.PlanError(
            f"sample {pair.name!r}, {side}: segment {start} to {stop} is none of its {length} tokens; give start and "
            "stop (not part of it), counted from 0"
        )
    return list(range(start, min(stop, length)))


def measured(
    model: ic.Model, pair: Pair, side: Side, masks: Sequence[Variant], at: Sequence[int] | None, check: bool
) -> Iterator[Row]:
    """A row per mask, in their order.

    Args:
        at: `positions_of` this pair.
        check: of a narrow scope, also run every mask in a forward pass of its own.

    Raises:
        EffectError: a sweep that does not give what a forward pass gives.
    """
    if at is None:
        for variant in masks:
            yield _run(model, pair, side, variant, None)
        return
    swept = _swept(model, pair, side, masks, at)
    for variant, row in zip(masks, swept, strict=True):
        if check:
            proof = _run(model, pair, side, variant, at)
            if abs(proof["nll_all"] - row["nll_all"]) > TOLERANCE * max(1.0, abs(proof["nll_all"])):
                raise ic.EffectError(
                    f"sample {pair.name!r}, {side}, {variant.key}: the sweep gives {row['nll_all']:.6f} nats, a "
                    f"forward pass {proof['nll_all']:.6f}; please report this model, and use scope='all' until then"
                )
            row |= {name: proof[name] for name in ("slots", "slots_changed", "unmasked")}
        yield row


def _run(model: ic.Model, pair: Pair, side: Side, variant: Variant, at: Sequence[int] | None) -> Row:
    """One forward pass; its receipts prove the mask."""
    tokens, targets = pair.tokens(side), list(pair.positions(side))
    top_k = model.sizes(S.router_indices)["k"]
    run = model.run(tokens, edits=edits_of(variant, at), logits=[p - 1 for p in targets], allow_noop=True)
    # float64 only from here on: differences of masks are small beside a log-softmax over the whole vocabulary
    values = run.logits.plain[0].double()
    ids = pair.target_ids(side).to(values.device)
    nll = -values.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    hits = float((values.argmax(-1) == ids).sum())
    row = _row(pair, side, variant, float(nll.mean()), float(nll[-1]), hits)
    proofs = [receipt.routing for receipt in run.receipts if receipt.routing is not None]
    if len(proofs) != len(variant.banned):
        raise ic.EffectError(
            f"{variant.key}: {len(proofs)} of {len(variant.banned)} layers prove that they were masked"
        )
    row["slots"] = sum(proof.tokens + proof.unmasked for proof in proofs) * top_k
    row["slots_changed"] = sum(proof.changed for proof in proofs)
    row["unmasked"] = sum(proof.unmasked for proof in proofs)
    return row


def _swept(model: ic.Model, pair: Pair, side: Side, masks: Sequence[Variant], at: Sequence[int]) -> list[Row]:
    """All masks of a narrow scope at once."""
    edited = [variant for variant in masks if variant.banned]
    if not edited:  # the clean context alone, which a sweep of no variants would not give
        return [_run(model, pair, side, variant, at) for variant in masks]
    sweeps = model.sweep(pair.tokens(side), [edits_of(variant, at) for variant in edited], _scores(pair, side))
    numbers = {"none": [float(sweep.clean[0]) for sweep in sweeps]}
    for i, variant in enumerate(edited):
        numbers[variant.key] = [float(sweep.values[i, 0]) for sweep in sweeps]
    return [_row(pair, side, variant, *numbers[variant.key]) for variant in masks]


def _scores(pair: Pair, side: Side) -> list[ic.score.Score]:
    """Mean NLL of the targets, that of the last, and how many come first; of the same positions."""

    def nll(logits: Tensor, ids: Tensor) -> Tensor:
        return -logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "nll": lambda x, y: nll(x, y).mean(-1),
        "nll of the last": lambda x, y: nll(x, y)[..., -1],
        "hits": lambda x, y: (x.argmax(-1) == y).double().sum(-1),
    }
    places, ids = [[p - 1 for p in pair.positions(side)]], pair.target_ids(side)
    return [ic.score.Score(name, fn, places, ((ids,),), span=True) for name, fn in functions.items()]


def _row(pair: Pair, side: Side, variant: Variant, mean: float, last: float, hits: float) -> Row:
    return {
        "id": row_key(pair.name, side, variant), "sample": pair.name, "side": side, "mask": variant.key,
        "nll_all": mean, "nll_last": last, "targets": len(pair), "hits": round(hits),
        "slots": None, "slots_changed": None, "unmasked": None,
    }  # fmt: skip
