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
        fn: logits `[batch d_vocab]` to values `[batch]`.
        at: position whose logits it reads.
    """

    name: str
    fn: Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]
    at: PositionLike = -1

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        """The score of a run that kept all logits, or those at this score's position."""
        logits = run.logits
        if logits.site.pos is None:
            return self.fn(logits.at(self.at))
        if logits.site != Site("logits").at(self.at):
            raise PlanError(f"score {self.name} reads logits at {self.at}, the run kept {logits.site}")
        return self.fn(logits.as_subclass(Tensor))


def logprob(target: Target, at: PositionLike = -1) -> Score:
    """Log-probability of the target token, in nats."""
    return Score("logprob", lambda logits: _pick(torch.log_softmax(logits, -1), target), at)


def probability(target: Target, at: PositionLike = -1) -> Score:
    """Probability of the target token."""
    return Score("probability", lambda logits: _pick(torch.softmax(logits, -1), target), at)


def logit_diff(target: Target, other: Target, at: PositionLike = -1) -> Score:
    """Logit of the target token minus that of another."""
    return Score("logit_diff", lambda logits: _pick(logits, target) - _pick(logits, other), at)


def rank(target: Target, at: PositionLike = -1) -> Score:
    """How many tokens have a larger logit than the target; 0 is best. Not differentiable."""
    return Score("rank", lambda logits: (logits > _pick(logits, target)[:, None]).sum(-1).float(), at)


def _pick(values: Tensor, target: Target) -> Tensor:
    ids = torch.as_tensor(target, device=values.device).expand(len(values))
    return values.gather(-1, ids[:, None])[:, 0]
