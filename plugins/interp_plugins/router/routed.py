"""Routing of tokens by one layer, as dense tensors that every statistic of this package takes.

    chosen      [n expert]   the executed set S_t
    weights     [n expert]   what the block multiplies by: zero outside S_t, of any sum (scaling factors, no renorm)
    normalised  [n expert]   weights / Σ weights
    probs       [n expert]   the family's scores as probabilities
    logits      [n expert]   raw

Executed and normalised weights are kept apart: usage and total variation take normalised ones, contributions executed
ones. What was imported as expert ids alone has neither weights, probs nor logits, and statistics that need them say so.

Source: this package; names of sites are interp_core's.
Cost: n · expert numbers for each tensor that is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import interp_core as ic


@dataclass(frozen=True, eq=False)
class Routed:
    """How one layer routed n tokens.

    Attributes:
        chosen: experts that are executed.
        weights: executed weights; None where only ids are known.
        probs: probabilities over all experts; None where they are not known.
        logits: the router's logits; None where they are not known.

    Raises:
        PlanError: tensors of different shapes, or a token without an expert.
    """

    chosen: Bool[Tensor, "n expert"]
    weights: Float[Tensor, "n expert"] | None = None
    probs: Float[Tensor, "n expert"] | None = None
    logits: Float[Tensor, "n expert"] | None = None

    def __post_init__(self) -> None:
        if self.chosen.dtype != torch.bool or self.chosen.ndim != 2:
            raise ic.PlanError(f"Routed: chosen is a mask [n expert], not {self.chosen.dtype} {[*self.chosen.shape]}")
        for name in ("weights", "probs", "logits"):
            value = getattr(self, name)
            if value is not None and value.shape != self.chosen.shape:
                raise ic.PlanError(f"Routed: {name} are {[*value.shape]}, the chosen experts {[*self.chosen.shape]}")

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def n_experts(self) -> int:
        """How many experts there are."""
        return self.chosen.shape[1]

    @cached_property
    def normalised(self) -> Float[Tensor, "n expert"]:
        """Executed weights over their sum; zeros where the sum is 0 (every weight was taken away by an edit)."""
        weights = self.need("weights")
        weights = weights if weights.dtype == torch.float64 else weights.float()
        total = weights.sum(-1, keepdim=True)
        return torch.where(total == 0, 0.0, weights / total)

    def need(self, what: str) -> Tensor:
        """A tensor that may not be there.

        Raises:
            ReadError: it is not.
        """
        value: Tensor | None = getattr(self, what)
        if value is None:
            raise ic.ReadError(
                f"this routing has no {what}: it holds expert ids alone, of which counts can be made; "
                "read it from a model for the rest"
            )
        return value

    def take(self, rows: Tensor | Sequence[int] | slice) -> Routed:
        """Some of the tokens, by number or mask."""
        rows = rows if isinstance(rows, (Tensor, slice)) else torch.tensor(rows, dtype=torch.long)
        parts = (self.weights, self.probs, self.logits)
        return Routed(self.chosen[rows], *(None if part is None else part[rows] for part in parts))

    @staticmethod
    def of_ids(
        ids: Int[Tensor, "n k"],
        n_experts: int,
        weights: Float[Tensor, "n expert"] | None = None,
        probs: Float[Tensor, "n expert"] | None = None,
        logits: Float[Tensor, "n expert"] | None = None,
    ) -> Routed:
        """Routing from the executed ids.

        Raises:
            PlanError: an id that is no expert's.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n_experts:
            raise ic.PlanError(
                f"expert ids run from {int(ids.min())} to {int(ids.max())}, there are {n_experts} experts"
            )
        return Routed(chosen_of(ids, n_experts), weights, probs, logits)

    @staticmethod
    def joined(parts: Sequence[Routed]) -> Routed:
        """Tokens of several after one another; what one of them lacks, the whole lacks."""

        def whole(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else torch.cat(values)

        return Routed(torch.cat([part.chosen for part in parts]), *map(whole, ("weights", "probs", "logits")))


Layers = Mapping[int, Routed]
"""Routing by decoder layer; dense layers are absent."""


def chosen_of(ids: Int[Tensor, "n k"], n_experts: int) -> Bool[Tensor, "n expert"]:
    """Ids as a mask over experts."""
    return torch.zeros(len(ids), n_experts, dtype=torch.bool, device=ids.device).scatter_(-1, ids.long(), True)


# What one token's routing is like


def entropy(routed: Routed) -> Float[Tensor, " n"]:
    """H(p) of the router's probabilities, in nats; exp of it is the effective number of experts."""
    return torch.special.entr(routed.need("probs").double()).sum(-1)


def top1_share(routed: Routed) -> Float[Tensor, " n"]:
    """The largest normalised weight of a token."""
    return routed.normalised.amax(-1)


def margin(routed: Routed) -> Float[Tensor, " n"]:
    """The smallest logit among the chosen minus the largest among the others: z_(k) - z_(k+1) where logits alone
    decide; negative where a correction bias or groups overruled them. NaN where all are chosen."""
    logits = routed.need("logits").double()
    inside = logits.masked_fill(~routed.chosen, float("inf")).amin(-1)
    outside = logits.masked_fill(routed.chosen, float("-inf")).amax(-1)
    return torch.where(routed.chosen.all(-1), torch.nan, inside - outside)


def z_loss(routed: Routed) -> Float[Tensor, " n"]:
    """(log Σ exp z)², of which the router z-loss is the mean (Zoph et al. 2022)."""
    return routed.need("logits").double().logsumexp(-1).square()
