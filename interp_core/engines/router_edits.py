"""Edits of routers, carried out at a hook: for which tokens, what they changed, and what proves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..architectures.atlas import Entry
from ..architectures.hook_points import Call, HookPoint
from ..architectures.rerouting import WHOLE, Proof, Routed
from ..architectures.routing import wide
from ..errors import PlanError
from ..positions import Rows, Slice
from ..sites import ROUTING, Edit
from .pass_state import PassState
from .selection import BoundSelection, Selection


@runtime_checkable
class RouterEdit(Protocol):
    """What is needed here of an edit in one layer, as `SiteEdit` is one."""

    number: int
    entry: Entry
    point: HookPoint
    state: PassState
    bound: BoundSelection | None

    @property
    def selection(self) -> Selection:
        """The experts and positions that it selects."""

    def take(self, value: Tensor) -> Tensor:
        """The selected part of a value."""

    def note(self, edit: Edit, value: Tensor, old: Tensor, new: Tensor, x: Tensor) -> None:
        """Note in the pass' record that it fired, and how much it changed."""

    def derive_value(self, call: Call) -> None:
        """Carry it out on the value that the hook point computes."""


TURN = {"force_steermoe": 1, "force": 2}
"""Forces come after whatever else is done to the logits: what they have executed, nothing takes away again."""


def reroute(change: RouterEdit, call: Call, row: int | None = None) -> None:
    """Carry out an edit whose hook point is a router's, and begin its proof.

    Args:
        row: the one row of the batch that it is about.
    """
    state, routed = change.state, change.point.routed
    assert routed is not None
    edit, width = state.edits[change.number], call.shape[1]
    part = WHOLE if row is None else slice(row * width, (row + 1) * width)
    here = _selected(change, call, row, routed.n_experts)
    text = None if row is not None else _text(state, positions=change.selection.pos is not None)
    counted = (here if text is None else here & text.to(here.device)).flatten()
    here = here.flatten()
    if edit.op in ROUTING:
        before = _measured(edit, call, routed)[part].view(-1, width, routed.n_experts)
        left = routed.edit(call, edit.op, edit.value, here, part)
        after = _measured(edit, call, routed)[part].view_as(before)
        change.note(edit, before, change.take(before), change.take(after), call.first)
    else:
        left = torch.zeros_like(here)
        change.derive_value(call)
    number, layer = change.number, change.entry.layer
    unmasked = (counted & left).sum()
    call.proofs.append(Proof(routed, number, layer, edit.op, edit.experts, part, counted & ~left, unmasked))


def _measured(edit: Edit, call: Call, routed: Routed) -> Tensor:
    """What the size of an edit is measured by `[n expert]`: which logits are banned, or executed weights."""
    if edit.op == "mask":
        return (~torch.isfinite(routed.router.logits(call.output))).float()
    weights = routed.router.weights(call.output, routed.n_experts)
    return weights.to(wide(weights))


def _selected(change: RouterEdit, call: Call, row: int | None, n_experts: int) -> Tensor:
    """Tokens `[batch pos]` of which an edit selects some expert in this pass, of one row or all."""
    batch, width = call.shape
    here = torch.zeros(batch if row is None else 1, width, n_experts, dtype=torch.bool, device=call.first.device)
    if change.bound is None:
        here.fill_(True)
    else:
        change.bound.put(here, torch.ones_like(change.bound.take(here)))
    return here.any(-1)


def _text(state: Any, *, positions: bool) -> Tensor | None:
    """Tokens `[batch pos]` of a pass that are neither padding nor what fills up a row that has ended; None: all.

    Args:
        positions: of an edit at chosen positions, which select no padding.
    """
    if not positions:
        return state.real
    return None if state.live is None else torch.tensor(state.live)[:, None].expand(state.shape)


def close(state: PassState, call: Call) -> None:
    """Count what became of the edits of a router, when all of them are done."""
    text = _text(state, positions=False)
    text = None if text is None else text.flatten().to(call.first.device)
    parity = call.proofs[0].routed.parity(call, text)  # of the one router that all of them are about
    state.record.routed += [proof.routed.close(call, proof, parity) for proof in call.proofs]


def check_experts(change: RouterEdit, edit: Edit) -> None:
    """Refuse experts that there are not, and more forced ones than a token takes.

    Raises:
        PlanError: naming the first of them.
    """
    routed = change.point.routed
    if routed is None:
        raise PlanError(f"{edit}: nothing there selects experts")
    n, k = routed.n_experts, routed.k
    for expert in edit.experts:
        if not 0 <= expert < n:
            raise PlanError(f"{edit}: no expert {expert}, there are {n}, 0 to {n - 1}")
    if edit.op.startswith("force") and len(set(edit.experts)) > k:
        raise PlanError(
            f"{edit}: {len(set(edit.experts))} experts are forced, and a token takes {k}; force {k} or fewer"
        )


def check_together(changes: Sequence[RouterEdit], rows: Rows) -> None:
    """Refuse edits of routers that cannot all hold at one token.

    Raises:
        PlanError: experts both banned and forced, more forced than a token takes, or a set that one edit keeps and
            another one changes.
    """
    by_layer: dict[int, list[RouterEdit]] = {}
    for change in changes:
        if change.entry.name == "router_logits":
            by_layer.setdefault(change.entry.layer, []).append(change)
    for layer, of_layer in by_layer.items():
        if len(of_layer) > 1 and any(_edit(change).op.startswith("force") for change in of_layer):
            _check_layer(layer, of_layer, rows)


def _edit(change: RouterEdit) -> Edit:
    return change.state.edits[change.number]


def _check_layer(layer: int, changes: Sequence[RouterEdit], rows: Rows) -> None:
    routed = changes[0].point.routed
    assert routed is not None
    shape = len(rows.real), rows.width, routed.n_experts
    banned, forced = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    kept = torch.zeros(shape[:2], dtype=torch.bool)
    for change in changes:
        edit, pos = _edit(change), change.selection.pos
        for row, columns in enumerate(change.selection.columns(rows, Slice() if pos is None else pos)):
            at = torch.tensor(list(columns), dtype=torch.long)
            if edit.op.startswith("mask"):
                banned[row, at[:, None], torch.tensor(edit.experts)] = True
                kept[row, at] |= edit.op != "mask"
            elif edit.op.startswith("force"):
                forced[row, at[:, None], torch.tensor(edit.experts)] = True
    if bool((both := banned & forced).any()):
        raise PlanError(
            f"layer {layer}: expert {int(both.any(0).any(0).nonzero()[0])} is both banned and forced at a token; take "
            "it out of one of these edits, or choose other positions"
        )
    if int(most := forced.sum(-1).max()) > routed.k:
        raise PlanError(f"layer {layer}: {most} experts are forced at a token, which takes {routed.k}; force fewer")
    if bool((kept & forced.any(-1)).any()):
        raise PlanError(
            f"layer {layer}: mask with mode 'keep' or 'drop' leaves a token's set as it is, and force changes it at "
            "the same token; mask with mode 'replace', or choose other positions"
        )
