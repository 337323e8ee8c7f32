"""What edits of a router do: experts banned, forced and weighed otherwise, and the proof that it came so.

Everything is worked out on what the router's module returned, with the family's own `Selection`. Tokens that an edit
does not select keep the bits that they had.

    replace              banned experts out of the selection score, before groups and top-k; the slots go to others
    keep, drop           the set stays as chosen; banned ones get weight 0, the others' weights are rescaled to the old
                         sum (keep) or not (drop); a token whose whole set is banned stays as it is
    force own_weight     the weakest of the chosen give way; the set is weighed by the family's rule on its own logits
    force steermoe       the logit of a forced expert becomes max + 0.01, then the family's choice and weights: what
                         log_softmax scores give (a softmax does not see the shift). Where a correction bias or groups
                         keep it out all the same, the weakest of the chosen give way; its weight is then the one that
                         the best logit + 0.01 has by the family's rule (a sigmoid, say), without the bias
    boost                executed weights times a factor, rescaled to the old sum or not

Slots that are over repeat an expert of the token with weight 0: what is banned is not executed, not even for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import PlanError
from .routing import BANNED, Router, Selection, dense, wide

WHOLE = slice(None)
ABOVE = 0.01
"""How far above the best logit "steermoe" puts those of forced experts."""


@runtime_checkable
class Called(Protocol):
    """A call of a router's module, as `hook_points.Call` is one: what it was called with, what it returned, what the
    block is to go on with, and what has been forced so far."""

    module: Any
    args: tuple[Any, ...]
    output: Any
    unedited: Any
    taken: list[Taken]


class Taken(NamedTuple):
    """Experts that were forced, and for which tokens `[n]` of which part of the batch."""

    experts: tuple[int, ...]
    here: Tensor
    part: slice


class Routes(NamedTuple):
    """How tokens are routed: the router's logits `[n expert]`, executed weights and experts `[n k]`."""

    logits: Tensor
    weights: Tensor
    chosen: Tensor

    def where(self, here: Tensor, other: Routes) -> Routes:
        """Those of other routes for the tokens `here` `[n 1]`, one's own for the rest."""
        return Routes(*(torch.where(here, b, a) for a, b in zip(self, other, strict=True)))


class Proof(NamedTuple):
    """What is counted of an edit of a router in one layer and pass; all tensors may lie on the device.

    Attributes:
        routed: the router.
        number: of the edit.
        layer: of the router.
        op: of the edit.
        experts: that it names.
        part: of the batch that the rest is about.
        here: tokens that it selects and that are text `[n]`, without those left as they were.
        unmasked: how many of them were left as they were, since their whole set is banned.
        counts: as `COUNTS` says, once all edits of the router are done.
    """

    routed: Routed
    number: int
    layer: int
    op: str
    experts: tuple[int, ...]
    part: slice
    here: Tensor
    unmasked: Tensor
    counts: Tensor | None = None


COUNTS = ("tokens", "broken", "held", "differing", "changed", "unmasked")
"""Tokens that were edited; banned experts executed, or forced ones not executed; tokens whose experts were selected
again without any edit; of these, tokens where experts or weights came out otherwise; slots whose expert is not executed
any more; tokens left as they were. Then, per expert of the edit, how often it is executed."""


@dataclass(frozen=True, eq=False)
class Routed:
    """A layer's router, and how many experts it has and gives a token."""

    router: Router
    n_experts: int
    k: int

    def select_again(self, call: Called, logits: Tensor) -> None:
        """Go on with what the module would have returned for other logits `[n expert]`; tokens whose logits are what
        they were keep their experts and weights.

        Raises:
            PlanError: no expert is left for a token.
        """
        self._return(call, self._selected_again(self._rule(call), self.routes(call.output), logits))

    def edit(self, call: Called, op: str, value: Any, here: Tensor, part: slice) -> Tensor:
        """Carry an edit of `ROUTING` out for the tokens `here` `[n]` of a part of the batch; gives which of them stay
        as they are, since their whole set is banned."""
        rule, every, left = self._rule(call), self.routes(call.output), torch.zeros_like(here)
        if part != WHOLE:
            rule = self.router.within(rule, part)
        routes = every if part == WHOLE else Routes(*(x[part] for x in every))
        if op == "mask":
            banned = here[:, None] & self._among(value, here.device)
            routes = self._selected_again(rule, routes, routes.logits.masked_fill(banned, BANNED))
        elif op in ("mask_keep", "mask_drop"):
            routes, left = self._thinned(routes, value, here, rescale=op == "mask_keep")
        elif op in ("force", "force_steermoe"):
            taken = [*(earlier for earlier in call.taken if earlier.part == part), Taken(value, here, part)]
            routes = (self._raised if op == "force_steermoe" else self._admitted)(rule, routes, taken)
            call.taken.append(taken[-1])
        else:
            experts, factor = value
            routes = self._boosted(routes, experts, factor, here, rescale=op == "boost_renormalised")
        if part != WHOLE:
            routes = _laid(every, routes, part)
        self._return(call, routes)
        return left

    def routes(self, output: Any) -> Routes:
        """How an output of the module routes."""
        return Routes(self.router.logits(output), *self.router.slots(output, self.k))

    def _selected_again(self, rule: Any, routes: Routes, logits: Tensor) -> Routes:
        weights, chosen = routes.weights, routes.chosen
        fresh, others = selected(self.router.selection, rule, logits, weights.dtype)
        same = (logits == routes.logits).all(-1, keepdim=True)
        if fresh.requires_grad:  # the same number, with its gradient
            weights = torch.where(others == chosen, weights + (fresh - fresh.detach()), weights)
        return Routes(logits, torch.where(same, weights, fresh), torch.where(same, chosen, others))

    def _thinned(self, routes: Routes, experts: Sequence[int], here: Tensor, *, rescale: bool) -> tuple[Routes, Tensor]:
        """Weight and slots taken from banned experts of the chosen set."""
        dead = here[:, None] & self._among(experts, here.device)[routes.chosen]
        whole = dead.all(-1)
        dead = dead & ~whole[:, None]
        weights, chosen = cleared(routes.weights, routes.chosen, dead)
        if rescale:
            weights = torch.where(dead.any(-1, keepdim=True), rescaled(weights, routes.weights), weights)
        return Routes(routes.logits, weights, chosen), whole

    def _boosted(self, routes: Routes, experts: Sequence[int], factor: float, here: Tensor, *, rescale: bool) -> Routes:
        """Weights of experts times a factor, where they are chosen."""
        hit = here[:, None] & self._among(experts, here.device)[routes.chosen]
        weights = torch.where(hit, routes.weights * factor, routes.weights)
        if rescale:
            weights = torch.where(hit.any(-1, keepdim=True), rescaled(weights, routes.weights), weights)
        return routes._replace(weights=weights)

    def _raised(self, rule: Any, routes: Routes, taken: Sequence[Taken]) -> Routes:
        """Experts forced by logits above all that no edit has raised."""
        experts, here, _ = taken[-1]
        logits = others = routes.logits.to(wide(routes.logits))  # 0.01 is lost in half precision
        for before in taken[:-1]:
            others = others.masked_fill(before.here[:, None] & self._among(before.experts, here.device), BANNED)
        top = others.amax(-1, keepdim=True) + ABOVE
        logits = torch.where(here[:, None] & self._among(experts, here.device), top, logits)
        raised = Routes(logits, *selected(self.router.selection, rule, logits, routes.weights.dtype))
        raised = self._admitted(rule, Routes(logits, routes.weights, routes.chosen).where(here[:, None], raised), taken)
        return raised._replace(logits=raised.logits.to(routes.logits.dtype))

    def _admitted(self, rule: Any, routes: Routes, taken: Sequence[Taken]) -> Routes:
        """The weakest of the chosen give way to forced experts; tokens that have them all stay as they are."""
        logits, weights, chosen = routes
        strength = self.router.selection.scores(rule, logits).gather(-1, chosen)
        over = spare(weights, chosen)
        strength = strength.to(wide(strength)).masked_fill(over, BANNED)
        wanted = [(expert, forced.here) for forced in taken for expert in forced.experts]
        for expert, here in wanted:
            strength = strength.masked_fill((chosen == expert) & here[:, None] & ~over, float("inf"))
        for expert, here in wanted:
            lacks = here & ~((chosen == expert) & ~over).any(-1)
            slot = torch.nn.functional.one_hot(strength.argmin(-1), chosen.shape[-1]).bool() & lacks[:, None]
            chosen, over = chosen.masked_fill(slot, expert), over & ~slot
            strength = strength.masked_fill(slot, float("inf"))
        empty = logits.argmin(-1, keepdim=True)  # slots are over where experts are banned, which weigh nothing
        fresh = self.router.selection.weigh(rule, logits, torch.where(over, empty, chosen)).to(weights.dtype)
        fresh, sole = cleared(fresh, chosen, over)
        changed = (routes.chosen != chosen).any(-1, keepdim=True)
        return routes.where(changed, Routes(logits, fresh, sole))

    def close(self, call: Called, proof: Proof, parity: tuple[Tensor, Tensor]) -> Proof:
        """Count what became of an edit, all edits of this router done."""
        unedited = self.routes(call.unedited).chosen[proof.part]
        _, weights, chosen = (x[proof.part] for x in self.routes(call.output))
        here = proof.here
        live, named = ~spare(weights, chosen), self._among(proof.experts, chosen.device)
        broken = here.new_zeros((), dtype=torch.long)
        if proof.op.startswith("mask"):
            broken = (named[chosen] & here[:, None]).sum()
        elif proof.op.startswith("force"):
            has = torch.stack([((chosen == expert) & live).any(-1) for expert in proof.experts], -1)
            broken = (~has & here[:, None]).sum()
        gone = (~(unedited[:, :, None] == chosen[:, None, :]).any(-1) & here[:, None]).sum()
        used = [((chosen == expert) & live & here[:, None]).sum() for expert in proof.experts]
        return proof._replace(counts=torch.stack([here.sum(), broken, *parity, gone, proof.unmasked, *used]))

    def parity(self, call: Called, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens whose experts were selected again from the router's own logits, without any edit, and of these how
        many came out otherwise than the router has them, beyond rounding. `text` `[n]` leaves padding out."""
        logits, weights, chosen = self.routes(call.unedited)
        fresh, others = selected(self.router.selection, self._rule(call), logits, weights.dtype)
        a, b = (dense(w, c, self.n_experts).detach() for w, c in ((weights, chosen), (fresh, others)))
        eps = max(torch.finfo(kind).eps for kind in (a.dtype, torch.float32))  # families weigh in float32 at least
        near = 16 * eps * a.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        wrong = (chosen.sort(-1).values != others.sort(-1).values).any(-1) | ((a - b).abs() > near).any(-1)
        counted = torch.ones_like(wrong) if text is None else text
        return counted.sum(), (wrong & counted).sum()

    def _rule(self, call: Called) -> Any:
        return self.router.rule(call.module, call.args)

    def _return(self, call: Called, routes: Routes) -> None:
        output = self.router.returned(call.output, *routes)
        call.output = self.router.completed(self._rule(call), call.output, output)

    def _among(self, experts: Sequence[int], device: torch.device) -> Tensor:
        """Which experts are among these `[expert]`."""
        named = torch.zeros(self.n_experts, dtype=torch.bool)
        named[list(experts)] = True
        return named.to(device)


def _laid(every: Routes, routes: Routes, part: slice) -> Routes:
    """Routes with those of a part of the batch in their place."""
    laid = Routes(*(x.clone() for x in every))
    for x, new in zip(laid, routes, strict=True):
        x[part] = new
    return laid


def spare(weights: Tensor, chosen: Tensor) -> Tensor:
    """Slots `[n k]` that are over: they repeat an expert, with weight zero."""
    twin = (chosen[:, :, None] == chosen[:, None, :]).sum(-1) > 1
    return twin & (weights == 0)


def cleared(weights: Tensor, chosen: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """Slots that are dead `[n k]` spent on an expert that the token has, with weight zero."""
    other = chosen.gather(-1, (~dead).int().argmax(-1, keepdim=True))
    return torch.where(dead, 0, weights), torch.where(dead, other, chosen)


def rescaled(weights: Tensor, like: Tensor) -> Tensor:
    """Weights `[n k]` scaled to the sum of others; as they are where they sum to nothing."""
    total, wanted = (x.sum(-1, keepdim=True, dtype=wide(x)) for x in (weights, like))
    return (weights * torch.where(total == 0, 1, wanted / total)).to(weights.dtype)


def selected(selection: Selection, router: Any, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights and indices `[n k]` for `logits`, where minus infinity bans an expert.

    Raises:
        PlanError: no expert is left for a token.
    """
    chosen = selection.choose(router, logits)
    weights = selection.weigh(router, logits, chosen).to(dtype)
    dead = logits.gather(-1, chosen) == BANNED
    if bool(dead.any()):
        if bool(dead.all(-1).any()):
            raise PlanError("router_logits: a token has no expert left to go to; ban fewer")
        weights, chosen = cleared(weights, chosen, dead)
    return weights, chosen
