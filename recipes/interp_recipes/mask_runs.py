"""What a mask does to one context of a pair: likelihood of the targets, and how the routers' choices changed.

    all         a forward pass per mask; every token of the context is routed without the banned experts
    targets     only the targets' own positions p
    predicting  only the positions p - 1, which predict the targets
    segment     only a stretch of positions of the context

The narrow scopes go through `model.sweep`, which does again only what a mask can change. It gives likelihoods; how many
slots went to others is counted in forward passes, so the first context of such a run is done both ways, its likelihoods
held against each other, and `slots` of the other contexts stand empty.

Cost: scope all, masks × samples × 2 forward passes; else what docs/sweeps.md says. Logits of the predicting positions
alone are worked out. Must equal: /tests/data/moe/mask_sweep.json within 2e-5 nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from interp_plugins.pairs import Pair
from interp_plugins.pairs.pair import Side
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .mask_orders import Mode, Variant

Scope = Literal["all", "targets", "predicting", "segment"]
SCOPES: tuple[Scope, ...] = ("all", "targets", "predicting", "segment")
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
                    f"sample {pair.name!r}, {side}, {variant.key}: the sweep gives {row['nll_all']:.6f} nats, a forward "
                    f"pass {proof['nll_all']:.6f}; please report this model, and use scope='all' until then"
                )
            row = proof | {name: row[name] for name in ("nll_all", "nll_last", "hits")}
        yield row


def _run(model: ic.Model, pair: Pair, side: Side, variant: Variant, at: Sequence[int] | None) -> Row:
    """One forward pass; its receipts prove the mask."""
    tokens, targets = pair.tokens(side), list(pair.positions(side))
    logits = model.run(
        tokens, edits=edits_of(variant, at), logits=[p - 1 for p in targets], allow_noop=True
    )  # fmt: skip
    values = logits.logits.plain[0].double()
    ids = pair.target_ids(side).to(values.device)
    nll = -values.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    row = _row(pair, side, variant, nll, (values.argmax(-1) == ids).sum())
    proofs = [receipt.routing for receipt in logits.receipts if receipt.routing is not None]
    row["tokens"] = sum(proof.tokens + proof.unmasked for proof in proofs)
    row["slots_changed"] = sum(proof.changed for proof in proofs)
    row["unmasked"] = sum(proof.unmasked for proof in proofs)
    row["banned_executed"] = sum(proof.broken for proof in proofs)
    return row


def _swept(model: ic.Model, pair: Pair, side: Side, masks: Sequence[Variant], at: Sequence[int]) -> list[Row]:
    """All masks of a narrow scope at once."""
    targets = list(pair.positions(side))
    ids = pair.target_ids(side)

    def nll(logits: Tensor, wanted: Tensor) -> Tensor:
        return -logits.double().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]

    def score(name: str, fn: Any) -> ic.score.Score:
        return ic.score.Score(name, fn, [[p - 1 for p in targets]], ((ids,),), span=True)

    scores = [
        score("nll", lambda x, y: nll(x, y).mean(-1)),
        score("nll of the last", lambda x, y: nll(x, y)[..., -1]),
        score("hits", lambda x, y: (x.argmax(-1) == y).double().sum(-1)),
    ]
    edited = [variant for variant in masks if variant.banned]
    columns = [[p - 1 for p in targets]]
    if not edited:
        return [_run(model, pair, side, variant, at) for variant in masks]
    alls, lasts, hits = model.sweep(pair.tokens(side), [edits_of(variant, at) for variant in edited], scores)
    assert columns
    found: dict[str, tuple[float, float, float]] = {
        variant.key: (float(a), float(b), float(c))
        for variant, a, b, c in zip(edited, alls.values[:, 0], lasts.values[:, 0], hits.values[:, 0], strict=True)
    }
    found["none"] = (float(alls.clean[0]), float(lasts.clean[0]), float(hits.clean[0]))
    rows = []
    for variant in masks:
        mean, last, right = found[variant.key]
        nlls = torch.tensor([mean, last], dtype=torch.float64)
        row = _row(pair, side, variant, nlls, torch.tensor(right))
        row["nll_all"], row["nll_last"] = mean, last
        rows.append(row)
    return rows


def _row(pair: Pair, side: Side, variant: Variant, nll: Tensor, hits: Tensor) -> Row:
    return {
        "id": row_key(pair.name, side, variant), "sample": pair.name, "side": side, "mask": variant.key,
        "nll_all": float(nll.mean()), "nll_last": float(nll[-1]), "targets": len(pair), "hits": int(hits),
        "tokens": None, "slots_changed": None, "unmasked": None, "banned_executed": None,
    }  # fmt: skip


def none_of(mode: Mode, variants: Sequence[Variant]) -> Variant:
    """The run without a mask, N = 0."""
    return Variant(mode, variants[0].order, 0, {})
