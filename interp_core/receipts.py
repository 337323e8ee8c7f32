"""What edits did in a run: receipts of where they acted and how far, and the refusal of those that did nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .engines.protocol import PassRecord
from .errors import CapabilityError, EffectError
from .positions import Rows
from .sites import BOOSTS, TENSOR_OPS, Edit


@dataclass(frozen=True)
class Routing:
    """What proves an edit of a router, counted over layers, passes and tokens that are no padding.

    Attributes:
        tokens: that were edited.
        broken: banned experts that were executed there all the same, or forced ones that were not; a run with any is
            refused.
        held: tokens whose experts were selected again from the router's own logits, without the edit.
        differing: of these, tokens where experts or weights (beyond rounding) came out otherwise than the model's own
            router had them; a run that edits logits is refused then.
        changed: slots whose expert is not executed any more.
        unmasked: tokens left as they are, since their whole set is banned (modes "keep" and "drop").
    """

    tokens: int
    broken: int
    held: int
    differing: int
    changed: int
    unmasked: int

    def __str__(self) -> str:
        left = f", {self.unmasked} tokens left as they are" if self.unmasked else ""
        again = f"the selection reproduced the router at {self.held - self.differing} of {self.held}"
        return f"{self.changed} slots went to others at {self.tokens} tokens{left}; {again}"


@dataclass(frozen=True)
class Receipt:
    """What an edit did in a run.

    Attributes:
        edit: the edit.
        fired: how often it changed a value: once per layer and forward pass that had any of its positions.
        layers: in which layers.
        positions: per row, the positions it changed (counted over real tokens); None for all of them.
        norm: Euclidean norm of all its changes together. For `knockout` that of the probabilities taken away, for
            `mask` of the number of logits banned, for other edits of what a router selects that of the change of
            executed weights.
        routing: what proves an edit of a router.
    """

    edit: Edit
    fired: int
    layers: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...] | None
    norm: float
    routing: Routing | None = None

    def __str__(self) -> str:
        if not self.fired:
            return f"{self.edit}: never fired"
        positions = "all positions" if self.positions is None else places_shown(self.positions, ",")
        routing = "" if self.routing is None else f"; {self.routing}"
        return f"{self.edit}: fired {self.fired}×, {positions}, changed by norm {self.norm:.4g}{routing}"


def places_shown(positions: Sequence[Sequence[int]], comma: str) -> str:
    """Positions row by row, those of the first four rows that have some."""
    shown = [f"row {i} at {comma.join(map(str, row))}" for i, row in enumerate(positions) if row]
    return "; ".join(shown[:4]) + (f"; and {len(shown) - 4} more rows" if len(shown) > 4 else "")


def receipts(edits: Sequence[Edit], passes: Sequence[PassRecord], rows: Rows) -> list[Receipt]:
    """One receipt per edit, over all passes."""
    if not edits:
        return []
    fires = [fire for record in passes for fire in record.fires]
    fires_of: list[list[tuple[int, Any, float]]] = [[] for _ in edits]
    for (number, layer, columns, _), norm in zip(fires, _numbers([fire[3] for fire in fires]), strict=True):
        fires_of[number].append((layer, columns, norm))
    listed = [_receipt(edit, fires, rows) for edit, fires in zip(edits, fires_of, strict=True)]
    counted = routings(passes)
    return [replace(receipt, routing=counted[i][0]) if i in counted else receipt for i, receipt in enumerate(listed)]


def routings(passes: Sequence[PassRecord]) -> dict[int, tuple[Routing, list[int]]]:
    """What proves the edits of routers, by number, and how often each of their experts is executed."""
    counts: dict[int, list[Tensor]] = {}
    for record in passes:
        for proof in record.routed:
            assert proof.counts is not None
            counts.setdefault(proof.number, []).append(proof.counts.cpu())  # layers may lie on several devices
    totals = {number: torch.stack(of_edit).sum(0).tolist() for number, of_edit in counts.items()}
    n = len(fields(Routing))
    return {number: (Routing(*total[:n]), total[n:]) for number, total in totals.items()}


def demand_proof(edits: Sequence[Edit], passes: Sequence[PassRecord]) -> None:
    """Refuse a run in which a router did not do as it was told, or its family's selection is not what the model does.

    Raises:
        CapabilityError: selecting again without the edit gives another result than the model's own router.
        EffectError: banned experts were executed, or forced ones were not.
    """
    for number, (routing, _) in routings(passes).items():
        if routing.differing and edits[number].site.name == "router_logits":
            raise CapabilityError(
                f"{edits[number]}: selecting experts again as the family file says gives other experts or weights than "
                f"the model's own router, at {routing.differing} of {routing.held} tokens; an edit would be another "
                "model's. Please report this family and version of transformers"
            )
        if routing.broken:
            what = "banned experts were executed" if edits[number].op.startswith("mask") else "forced ones were not"
            raise EffectError(
                f"{edits[number]}: {what} after all, {routing.broken} times at {routing.tokens} tokens: a later edit "
                "of the same router undid it; leave that edit out, or choose other positions"
            )


def _numbers(norms: list[Tensor]) -> list[float]:
    """Values of many scalars with one transfer, unless they lie on several devices."""
    if len(norms) == 1:
        return [float(norms[0])]
    if len({(norm.device, norm.dtype) for norm in norms}) == 1:
        return torch.stack(norms).tolist()
    return [float(norm) for norm in norms]


def _receipt(edit: Edit, fires: list[tuple[int, Any, float]], rows: Rows) -> Receipt:
    layers = tuple(sorted({layer for layer, _, _ in fires}))
    norm = math.sqrt(sum(norm**2 for _, _, norm in fires))
    if any(columns is None for _, columns, _ in fires) or not fires:
        return Receipt(edit, len(fires), layers, None, norm)
    rows = rows.patches.rows if edit.site.info.tower and rows.patches is not None else rows
    hit: list[set[int]] = [set() for _ in rows.real]
    for _, columns, _ in fires:
        for row, chosen in enumerate(columns):
            hit[row].update(chosen)
    index = [{column: i for i, column in enumerate(real)} for real in rows.real]
    last = [(len(real), real[-1] if real else 0) for real in rows.real]  # generated columns follow the last real one
    positions = tuple(
        tuple(sorted(index[row].get(c, last[row][0] + c - last[row][1] - 1) for c in chosen))
        for row, chosen in enumerate(hit)
    )
    return Receipt(edit, len(fires), layers, positions, norm)


def demand_used(edits: Sequence[Edit], passes: Sequence[PassRecord]) -> None:
    """Refuse a boost of an expert that is chosen nowhere.

    Raises:
        EffectError: naming it.
    """
    if not any(edit.op in BOOSTS for edit in edits):
        return
    for number, (_, used) in routings(passes).items():
        idle = [e for e, n in zip(edits[number].experts, used, strict=True) if not n]
        if edits[number].op in BOOSTS and idle:
            raise EffectError(
                f"{edits[number]}: expert {', '.join(map(str, idle))} is chosen at none of these positions, so there "
                "is no weight to boost; use S.router_logits.force to have it executed, or pass allow_noop=True"
            )


def demand_effect(
    edits: Sequence[Edit], passes: Sequence[PassRecord], make_receipts: Callable[[], list[Receipt]]
) -> None:
    """Refuse edits that did nothing. Receipts are made only to word the error.

    Raises:
        EffectError: naming the first of them.
    """
    demand_used(edits, passes)
    norms: list[list[Tensor]] = [[] for _ in edits]
    for record in passes:
        for number, _, _, norm in record.fires:
            norms[number].append(norm)
    for number, of_edit in enumerate(norms):
        sizes, edit = _numbers(of_edit) if of_edit else [], edits[number]
        if any(map(math.isnan, sizes)) and edit.op in TENSOR_OPS and (lost := int(torch.isnan(edit.value).sum())):
            raise EffectError(
                f"{edit}: {lost} of {edit.value.numel()} numbers of the value are NaN, and so is what follows; "
                "look at where the value comes from, or pass allow_noop=True if that is meant"
            )
        if any(sizes):
            continue
        receipt = make_receipts()[number]
        did = "changed nothing: the value was already so" if receipt.fired else "never fired in this run"
        raise EffectError(
            f"{receipt.edit} {did}. If that is meant (a sweep over equal tokens, say), pass allow_noop=True."
        )
