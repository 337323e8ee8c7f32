"""Scores of experts for two sets of texts, or for classes of tokens.

    risk difference   RD = a₁ / (a₁ + d₁) - a₂ / (a₂ + d₂)       a tokens of a set that go to the expert, d the others
                      interval: texts drawn again with replacement, pairs of texts together
    nPMI              log(p(y|x) / p(y)) / -log p(x, y)           x: the token is of a class; y: it goes to the expert
                      1 always together and never apart, 0 independent, -1 never together
                      null: the class permuted over tokens; p from the largest nPMI of a layer

RD is that of SteerMoE (Fayyaz et al. 2025, arXiv:2509.09660), nPMI that of RICE (Wang et al. 2025, arXiv:2505.14681).
nPMI is bounded by the base rates, so that experts are ranked within a layer, and only with enough tokens of the class.

Shapes: counts `[text layer expert]` and `[layer expert]`.
Cost: RD one matrix product of resamples with texts; nPMI permutations · n · expert.
Must equal: rates (8, 2, 0) / 10 against (3, 2, 5) / 10 give RD .5, 0, -.5; nPMI 1, 0, -1 in the three cases.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import interp_core as ic
from interp_core import stats

from .routed import Routed

MIN_TOKENS = 50
"""Tokens of a class below which its nPMI is not trusted."""


class RiskDifference(NamedTuple):
    """Difference of activation rates of two sets of texts.

    Attributes:
        first, second: rates.
        value, low, high: their difference and its interval.
        counts: a₁, d₁, a₂, d₂ of each expert.
        level, resamples: of the interval.
        texts: how many pairs of texts were drawn.
    """

    first: Float[np.ndarray, "layer expert"]
    second: Float[np.ndarray, "layer expert"]
    value: Float[np.ndarray, "layer expert"]
    low: Float[np.ndarray, "layer expert"]
    high: Float[np.ndarray, "layer expert"]
    counts: Float[np.ndarray, "4 layer expert"]
    level: float
    resamples: int
    texts: int

    def table(self, layers: Any) -> list[dict[str, Any]]:
        """One row per expert, by the size of the difference; ties by layer, then expert."""
        rows = []
        for row, layer in enumerate(layers):
            for expert in range(self.value.shape[1]):
                a1, d1, a2, d2 = self.counts[:, row, expert].astype(int).tolist()
                names = ("first", "second", "value", "low", "high")
                cell = {name: float(getattr(self, name)[row, expert]) for name in names}
                rows.append({"layer": int(layer), "expert": expert, "a1": a1, "d1": d1, "a2": a2, "d2": d2} | cell)
        return sorted(rows, key=lambda row: (-abs(row["value"]), row["layer"], row["expert"]))


def risk_difference(
    first: Any, first_tokens: Any, second: Any, second_tokens: Any, boot: stats.Bootstrap | None = None
) -> RiskDifference:
    """RD with its interval over texts.

    Args:
        first, second: tokens of each text that go to each expert, `[text layer expert]`; text i of both is a pair.
        first_tokens, second_tokens: tokens of each text.
        boot: settings of the bootstrap; its percentiles are taken. Its draws are those of all its other statistics.

    Raises:
        PlanError: sets of different numbers of texts, fewer than two, or numbers that do not fit.
    """
    boot = boot or stats.Bootstrap()
    a, b = (np.asarray(value, dtype=np.float64) for value in (first, second))
    n, m = (np.asarray(value, dtype=np.float64) for value in (first_tokens, second_tokens))
    if a.ndim != 3 or a.shape != b.shape or n.shape != m.shape or len(n) != len(a) or not ((n > 0) & (m > 0)).all():
        raise ic.PlanError(
            f"risk_difference: counts {list(a.shape)} and {list(b.shape)}, tokens of {len(n)} and {len(m)} texts; the "
            "texts of both sets are pairs, with a token each at least"
        )
    # how often each text is drawn: the rates of all experts are then products with it
    weights = boot.draws(lambda i: np.bincount(i.astype(int), minlength=len(a)), np.arange(len(a)))

    def rate(counts: np.ndarray, tokens: np.ndarray, by: np.ndarray) -> np.ndarray:
        drawn = by @ counts.reshape(len(counts), -1) / (by @ tokens)[:, None]
        return drawn.reshape(len(by), *counts.shape[1:])

    whole = np.ones((1, len(a)))
    rates = rate(a, n, whole)[0], rate(b, m, whole)[0]
    if max(rates[0].max(), rates[1].max()) > 1:
        raise ic.PlanError("risk_difference: an expert was chosen by more tokens than there are")
    draws = rate(a, n, weights) - rate(b, m, weights)
    low, high = np.quantile(draws, [(1 - boot.level) / 2, (1 + boot.level) / 2], axis=0)
    sums = a.sum(0), b.sum(0)
    counts = np.stack([sums[0], n.sum() - sums[0], sums[1], m.sum() - sums[1]])
    return RiskDifference(*rates, rates[0] - rates[1], low, high, counts, boot.level, boot.resamples, len(a))


def npmi(both: Any, class_tokens: Any, expert_tokens: Any, tokens: int) -> Float[np.ndarray, "*layer expert"]:
    """nPMI from counts; NaN where no token is of the class or none goes to the expert.

    Args:
        both: tokens of the class that go to the expert.
        class_tokens: tokens of the class.
        expert_tokens: tokens that go to the expert.
        tokens: all tokens.

    Raises:
        PlanError: counts that cannot be.
    """
    xy, x, y = (np.asarray(value, dtype=np.float64) for value in (both, class_tokens, expert_tokens))
    if tokens <= 0 or (xy > np.minimum(x, y)).any() or (np.maximum(x, y) > tokens).any() or (xy < 0).any():
        raise ic.PlanError(f"npmi: counts do not fit together: of {tokens} tokens, a pair cannot outnumber its sides")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(xy * tokens / (x * y)) / -np.log(xy / tokens)
    # the limits, where the formula has log 0 or 0 / 0: never together, and together at every token
    value = np.where(xy == 0, -1.0, np.where(xy == tokens, 1.0, value))
    return np.where((x == 0) | (y == 0), np.nan, value)


class Association(NamedTuple):
    """nPMI of a layer's experts with a class of tokens.

    Attributes:
        value: nPMI.
        null: the mean of permuted classes.
        p: how often the largest nPMI of the layer's experts, with the class permuted, is as large as this one's.
        class_tokens: tokens of the class.
    """

    value: Float[np.ndarray, " expert"]
    null: Float[np.ndarray, " expert"]
    p: Float[np.ndarray, " expert"]
    class_tokens: int


def associated(
    routed: Routed,
    of_class: Bool[Tensor, " n"],
    *,
    min_tokens: int = MIN_TOKENS,
    permutations: int = 200,
    seed: int = 0,
) -> Association:
    """nPMI of each expert of a layer with a class of tokens, against the class permuted over tokens.

    Raises:
        PlanError: too few tokens of the class, or a mask that does not fit.
    """
    if len(of_class) != len(routed) or of_class.dtype != torch.bool:
        raise ic.PlanError(f"associated: {len(routed)} tokens, a class {of_class.dtype} {list(of_class.shape)}")
    n, members = len(routed), int(of_class.sum())
    if members < min_tokens or members == n:
        raise ic.PlanError(
            f"associated: {members} of {n} tokens are of the class; {min_tokens} at least and not all (min_tokens=)"
        )
    chosen = routed.chosen.cpu().double()
    random = torch.Generator().manual_seed(seed)
    masks = torch.stack([of_class.cpu()[torch.randperm(n, generator=random)] for _ in range(permutations)])
    drawn = npmi((masks.double() @ chosen).numpy(), members, chosen.sum(0).numpy(), n)
    value = npmi((of_class.cpu().double() @ chosen).numpy(), members, chosen.sum(0).numpy(), n)
    # the largest of the layer answers for looking at all its experts; equal counts must not part by rounding
    most = np.nanmax(drawn, 1)
    p = (1 + (most[:, None] >= value - 1e-12).sum(0)) / (1 + permutations)
    return Association(value, drawn.mean(0), np.where(np.isnan(value), np.nan, p), members)
