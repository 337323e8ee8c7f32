"""Scores: what a run is judged by, one number per example.

A score is a function of the logits at one position, `[batch d_vocab]` to `[batch]`, with a name and the position it
reads (`-1` unless said otherwise).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import PlanError
from .positions import PositionLike
from .sites import Site
from .trace import Run

Target = int | Tensor
"""Token id, or ids `[batch]`."""


@dataclass(frozen=True)
class Score:
    """One number per example.

    Attributes:
        name: for tables.
        fn: logits `[batch d_vocab]`, and one tensor `[batch]` per target, to values `[batch]`; row by row, so that a
            sweep can give it many variants of one example.
        at: position whose logits it reads.
        targets: token ids.
        clean: `fn` takes the logits of the run without edits too, after the targets; for sweeps only.
    """

    name: str
    fn: Callable[..., Float[Tensor, " batch"]]
    at: PositionLike = -1
    targets: tuple[Target, ...] = ()
    clean: bool = False

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        """The score of a run that kept all logits, or those at this score's position."""
        logits = run.logits
        if self.clean:
            raise PlanError(f"score {self.name} compares with a clean run; use it in a sweep")
        if logits.site.pos is None:
            return self.rows(logits.at(self.at))
        if logits.site != Site("logits").at(self.at):
            raise PlanError(f"score {self.name} reads logits at {self.at}, the run kept {logits.site}")
        return self.rows(logits.as_subclass(Tensor))

    def rows(self, logits: Tensor, example: int | None = None, clean: Tensor | None = None) -> Tensor:
        """Values `[row]` of logits `[row d_vocab]`: one row per example, or all rows of one example."""
        ids = [torch.as_tensor(target, device=logits.device) for target in self.targets]
        if example is not None:
            ids = [target if target.ndim == 0 else target[example] for target in ids]
        more = [] if clean is None else [clean]
        return self.fn(logits, *[target.expand(len(logits)) for target in ids], *more)


def logprob(target: Target, at: PositionLike = -1) -> Score:
    """Log-probability of the target token, in nats."""
    return Score("logprob", lambda logits, ids: _pick(torch.log_softmax(logits, -1), ids), at, (target,))


def probability(target: Target, at: PositionLike = -1) -> Score:
    """Probability of the target token."""
    return Score("probability", lambda logits, ids: _pick(torch.softmax(logits, -1), ids), at, (target,))


def logit_diff(target: Target, other: Target, at: PositionLike = -1) -> Score:
    """Logit of the target token minus that of another."""
    return Score("logit_diff", lambda logits, a, b: _pick(logits, a) - _pick(logits, b), at, (target, other))


def rank(target: Target, at: PositionLike = -1) -> Score:
    """How many tokens have a larger logit than the target; 0 is best. Not differentiable."""
    return Score("rank", lambda logits, ids: (logits > _pick(logits, ids)[:, None]).sum(-1).float(), at, (target,))


def kl(at: PositionLike = -1) -> Score:
    """KL divergence of the next-token distribution from that of the run without edits, in nats: KL(clean ‖ edited)."""

    def fn(logits: Tensor, clean: Tensor) -> Tensor:
        wanted = torch.log_softmax(clean, -1)
        return (wanted.exp() * (wanted - torch.log_softmax(logits, -1))).sum(-1)

    return Score("kl", fn, at, clean=True)


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, ids[:, None])[:, 0]
