"""RISE, MAS and RISE+AP: how soon a target becomes unlikely as prompt tokens are deleted by descending weight.

    s_i            log p of the target after i of K steps (`orders.py`: groups of tokens, replaced, cumulative)
    density_i      1 - share of the weight deleted so far; 1 … 0 in equal steps where the weights add up to 0 or less
    n_i            running minimum, from 1, of clip((s_i - s_K) / |s_0 - s_K|, 0, 1); 1 where s_0 = s_K
    AP_i           |n_i - density_i|
    RISE           AUC(n): trapezoids over steps
    MAS            AUC(clip(n + AP, 0, 1) scaled to 0 … 1; 1 … 0 in equal steps where it is constant)
    RISE+AP        AUC(n + AP)

Lower is better in all three. Where deletion makes the target likelier (s_K > s_0), n is 0 everywhere and RISE is 0, the
best number there is, for any weights: such a vector is marked degenerate, and says nothing.

By default every prompt token is ranked and deleted, for all methods alike. `kept=` leaves tokens out: the reference
scores its own methods without stop words, an easier set of tokens than that of the baselines in the same table.

Source: RISE, Petsiuk et al. (2018), arXiv:1806.07421; MAS, Walker et al. (2024), "Attribution Quality Metrics with
Magnitude Alignment"; both in the form of FlashTrace's implementation (arXiv:2602.01914).
Cost: 1 + K forward passes for one ordering; 1 + 1 + (K - 1) × orderings for several.
Must equal: the published numbers, 2e-7 of the same curve and order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

import interp_core as ic

from .orders import (
    STEPS,
    checked_count,
    checked_deleted,
    checked_order,
    checked_weights,
    deletion_steps,
    named,
    ordered,
    tied_share,
)
from .perturbed import Perturbed

METRICS = ("RISE", "MAS", "RISE+AP")
ENDS = ("low", "mean", "high")


class Metrics(NamedTuple):
    """The three numbers of curves, and what they are made of."""

    scores: Float[Tensor, "vector metric"]
    density: Float[Tensor, "vector step"]
    degenerate: Bool[Tensor, " vector"]


@dataclass(frozen=True, eq=False)
class Faithfulness(ic.Result):
    """RISE, MAS and RISE+AP of several weight vectors on one text.

    Attributes:
        scores: RISE, MAS, RISE+AP (`METRICS`); lower is better.
        curve: log-probability of the target after each step, the first without any deletion.
        density: share of the weight that is left.
        steps: the step in which each prompt token is deleted; -1: never.
        degenerate: deletion made the target likelier, so that the scores say nothing.
        tied: share of ranked tokens whose weight another one has too.
        tie_range: least, mean and largest score over random orders among equals (the declared order counts among the
            ends, not in the mean); None if not asked for.
        names: of the vectors.
        tie_orders: how many random orders, seeds 0 to n - 1.
        order: "stable" (lower position first among equals) or "given".
        replace_id: the token that stands for deleted ones.
        asked, passes, logits: perturbed texts asked for, forward passes run, positions whose logits were computed.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "scores": ("vector", "metric"), "curve": ("vector", "step"), "density": ("vector", "step"),
        "steps": ("vector", "prompt"), "degenerate": ("vector",), "tied": ("vector",),
        "tie_range": ("vector", "metric", "end"),
    }  # fmt: skip
    scores: Float[Tensor, "vector metric"]
    curve: Float[Tensor, "vector step"]
    density: Float[Tensor, "vector step"]
    steps: Int[Tensor, "vector prompt"]
    degenerate: Bool[Tensor, " vector"]
    tied: Float[Tensor, " vector"]
    tie_range: Float[Tensor, "vector metric end"] | None
    names: tuple[str, ...]
    tie_orders: int
    order: str
    replace_id: int
    asked: int
    passes: int
    logits: int

    @property
    def rise(self) -> Float[Tensor, " vector"]:
        """RISE of each vector."""
        return self.scores[:, 0]

    @property
    def mas(self) -> Float[Tensor, " vector"]:
        """MAS of each vector."""
        return self.scores[:, 1]

    def table(self) -> list[dict[str, Any]]:
        """A row per vector."""
        rows = []
        for number, name in enumerate(self.names):
            row: dict[str, Any] = {"vector": name, **dict(zip(METRICS, self.scores[number].tolist(), strict=True))}
            row |= {"degenerate": bool(self.degenerate[number]), "tied": float(self.tied[number])}
            if self.tie_range is not None:
                ends = zip(METRICS, self.tie_range[number].tolist(), strict=True)
                row |= {f"{metric} ties {end}": x for metric, xs in ends for end, x in zip(ENDS, xs, strict=True)}
            rows.append(row)
        return rows

    def __str__(self) -> str:
        lines = []
        for number, name in enumerate(self.names):
            numbers = ", ".join(f"{m} {x:.4f}" for m, x in zip(METRICS, self.scores[number].tolist(), strict=True))
            said = " DEGENERATE: deletion made the target likelier" * bool(self.degenerate[number])
            tied = f" ({self.tied[number]:.0%} of weights tied)" if self.tied[number] else ""
            lines.append(f"{name}: {numbers}{tied}{said}")
        return "\n".join([*lines, f"{self.passes} forward passes for {self.asked} perturbed texts"])


def faithfulness(
    text: Perturbed,
    weights: Shaped[Tensor, "*vector prompt"],
    *,
    names: Sequence[str] = (),
    kept: Any = None,
    steps: int = STEPS,
    order: Any = None,
    tie_orders: int = 0,
) -> Faithfulness:
    """RISE, MAS and RISE+AP of weight vectors.

    Args:
        text: what is perturbed; other metrics of the same text share its forward passes.
        weights: one row per vector (or a single vector), a weight per prompt token.
        names: of the vectors.
        kept: prompt tokens that are ranked and deleted (a mask, or indices); None: all.
        steps: of the curve.
        order: prompt tokens in the order of deletion, one row per vector; None: descending weight, then position.
        tie_orders: how many random orders among equal weights to score for `tie_range`.

    Raises:
        PlanError: weights, tokens or an order that do not fit the text, before the model runs.
    """
    weights = checked_weights(weights, text.size, "faithfulness")
    keep = checked_deleted("faithfulness", kept, text.size, steps)
    checked_count("faithfulness: tie_orders=", tie_orders, 0)
    labels = named(names, len(weights), "faithfulness")
    ranking = ordered(weights, keep) if order is None else checked_order(order, keep, len(weights))
    step = deletion_steps(ranking, steps, text.size)
    before = text.cost
    curve = deletion_curve(text, step)
    measured = metrics(curve, weights, step)
    tied = tied_share(weights, keep)
    ties = _tie_range(text, weights, keep, steps, tie_orders, tied, measured) if tie_orders else None
    spent = text.cost - before
    return Faithfulness(
        measured.scores, curve, measured.density, step, measured.degenerate, tied, ties, labels, tie_orders,
        "stable" if order is None else "given", text.replace_id, spent.asked, spent.passes, spent.logits,
    )  # fmt: skip


def deletion_curve(text: Perturbed, step: Int[Tensor, "vector prompt"]) -> Float[Tensor, "vector step"]:
    """Log-probability of the target without deletions and after each step."""
    count = int(step.max()) + 1
    upto = torch.arange(-1, count)[:, None]
    gone = (step[:, None] >= 0) & (step[:, None] <= upto)
    return text.log_prob(gone.flatten(0, 1)).view(len(step), count + 1)


def metrics(
    curve: Float[Tensor, "vector step"], weights: Float[Tensor, "vector prompt"], step: Int[Tensor, "vector prompt"]
) -> Metrics:
    """RISE, MAS and RISE+AP of curves.

    Args:
        curve: log-probabilities, the first without deletions.
        weights: of all prompt tokens.
        step: in which each of them is deleted; -1: never.
    """
    curve, weights = curve.double(), weights.double()
    density = _density(weights, step, curve.shape[1])
    first, last = curve[:, :1], curve[:, -1:]
    level = ((curve - last) / (first - last).abs()).clamp(0, 1)
    level = torch.where(first == last, 1.0, level).cummin(1).values
    return Metrics(alignment(level, density), density, (last > first)[:, 0])


def alignment(
    level: Float[Tensor, "vector step"], density: Float[Tensor, "vector step"]
) -> Float[Tensor, "vector metric"]:
    """RISE, MAS and RISE+AP of curves that run from 1 to 0, beside the share of the weight that is left."""
    penalty = (level - density).abs()
    corrected = (level + penalty).clamp(0, 1)
    low, high = corrected.amin(1, keepdim=True), corrected.amax(1, keepdim=True)
    scaled = torch.where(high > low, (corrected - low) / (high - low), _falling(level.shape[1]))
    return torch.stack([area(level), area(scaled), area(level + penalty)], 1)


def area(curve: Float[Tensor, "vector step"]) -> Float[Tensor, " vector"]:
    """Area under curves over steps from 0 to 1, by trapezoids."""
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


def _density(
    weights: Float[Tensor, "vector prompt"], step: Int[Tensor, "vector prompt"], points: int
) -> Float[Tensor, "vector step"]:
    ranked = torch.where(step >= 0, weights, 0.0)
    groups = torch.zeros(len(weights), points, dtype=torch.float64).scatter_add_(1, step + 1, ranked)
    total = ranked.sum(1, keepdim=True)
    left = 1 - groups.cumsum(1) / total
    return torch.where(total > 0, left, _falling(points))


def _falling(points: int) -> Float[Tensor, " step"]:
    return torch.linspace(1, 0, points, dtype=torch.float64)


def _tie_range(
    text: Perturbed,
    weights: Float[Tensor, "vector prompt"],
    keep: Bool[Tensor, " prompt"],
    steps: int,
    orders: int,
    tied: Float[Tensor, " vector"],
    measured: Metrics,
) -> Float[Tensor, "vector metric end"]:
    """Scores over random orders among equal weights; the score itself where nothing is tied."""
    out = measured.scores[..., None].repeat(1, 1, 3)
    # only vectors with ties have orders to draw; the others keep their one score at all three ends
    tied_vectors = (tied > 0).nonzero()[:, 0]
    if len(tied_vectors):
        tied_weights = weights[tied_vectors]
        ranks = [deletion_steps(ordered(tied_weights, keep, seed), steps, text.size) for seed in range(orders)]
        curves = deletion_curve(text, torch.cat(ranks))
        drawn = metrics(curves, tied_weights.repeat(orders, 1), torch.cat(ranks)).scores.unflatten(0, (orders, -1))
        declared = measured.scores[tied_vectors]
        ends = torch.minimum(drawn.amin(0), declared), drawn.mean(0), torch.maximum(drawn.amax(0), declared)
        out[tied_vectors] = torch.stack(ends, -1)
    return out
