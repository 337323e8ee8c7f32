"""How deep a model needs its image: the layers at which curves of effects fall, with their uncertainty.

    Δ_i(l)          s_i(clean) - s_i(intervened at layer l), nats; > 0: the intervention harms
    EVD_i           max{l : Δ_i(l) ≥ τ}, -1 if there is none: effective visual depth of a sample; of the mean: EVD
    cliff           min{l : Δ̄(l') < τ for all l' ≥ l} = EVD + 1, the sustained crossing; L: no cliff
    first crossing  min{l : Δ̄(l) < τ};  steepest drop  argmin_l Δ̄(l + 1) - Δ̄(l)
    E(l)            Σ_i Δ_i(l) / Σ_i Δ_i(blind), a ratio of sums
    window          first l with E < 0.9, first l from which on E < 0.1
    soft depth      1/L Σ_l clip(E(l), 0, 1), needs no threshold
    τ               fixed, or max(ν, ratio · max_l Δ̄_pilot(l));  ν  97.5 % quantile of |Δ| under a null intervention

Source: EVD from GAP 2.0's readiness notes (origin: last layer at or above τ); sustained crossing, noise floor, E and
soft depth are our definitions. Knockout effects in per cent of the probability: Zhang et al. (2025), arXiv:2411.18620.
Shapes: `[sample layer]`, layers rising; layers of estimates are decoder layers, L where a curve never falls.
Cost: resamples · layers for each interval. Must equal: planted curves and arrays by hand (tests/test_visual_depth.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import interp_core as ic
from interp_core import stats

Delta = Float[np.ndarray, "sample layer"]
Curve = Float[np.ndarray, "*any layer"]
UNEVEN = 2
"""Layers by which first and sustained crossing may differ before a curve counts as non-monotone."""


def visual_depths(delta: Curve, tau: float) -> Int[np.ndarray, "*any"]:
    """Index of the last layer at or above τ, of every curve; -1 where there is none."""
    above = np.asarray(delta) >= tau
    last = above.shape[-1] - 1 - np.flip(above, -1).argmax(-1)
    return np.asarray(np.where(above.any(-1), last, -1))


def falls_below(curve: Curve, level: float) -> Int[np.ndarray, "*any"]:
    """Index of the first layer from which on a curve stays below a level; the number of layers: never."""
    return np.asarray(visual_depths(curve, level) + 1)


def first_below(curve: Curve, level: float) -> Int[np.ndarray, "*any"]:
    """Index of the first layer below a level, whatever comes after; the number of layers: none."""
    below = np.asarray(curve) < level
    return np.asarray(np.where(below.any(-1), below.argmax(-1), below.shape[-1]))


def steepest_drop(curve: Curve) -> Int[np.ndarray, "*any"]:
    """Index of the layer after which a curve falls most.

    Raises:
        PlanError: a single layer.
    """
    values = np.asarray(curve)
    if values.shape[-1] < 2:
        raise ic.PlanError("steepest drop: a curve of one layer has no slope; give two layers or more")
    return np.asarray(np.diff(values, axis=-1).argmin(-1))


def share(delta: Delta, blind: Float[np.ndarray, " sample"]) -> Float[np.ndarray, " layer"]:
    """E(l), the ratio of sums; NaN where blinding does nothing in sum."""
    total = np.asarray(blind).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.asarray(delta).sum(0) / total) if total else np.full(np.shape(delta)[1], np.nan)


def soft_depth(shares: Curve) -> Float[np.ndarray, "*any"]:
    """Mean of E over layers, each cut to 0 … 1."""
    return np.asarray(np.clip(shares, 0, 1).mean(-1))


def crossing(visual: Curve, text: Curve) -> Int[np.ndarray, "*any"]:
    """Index of the first layer from which on replacing the text rows harms at least as much as the visual rows: where
    the image's information has gone over; the number of layers: never."""
    # the smallest number above 0 as the threshold: layers with visual > text, so that equal ones count as crossed
    return np.asarray(visual_depths(np.asarray(visual) - np.asarray(text), float(np.nextafter(0, 1))) + 1)


@dataclass(frozen=True)
class LayerEstimate:
    """A layer with its bootstrap distribution.

    Attributes:
        value: of the samples themselves.
        mode: the layer that most resamples give, and the `agreement`, their share.
        low, high: ends of the 95 % interval; layers that resamples gave.
        agreement: see `mode`.
        counts: how many resamples gave each layer.
    """

    value: int
    mode: int
    low: int
    high: int
    agreement: float
    counts: tuple[tuple[int, int], ...]

    @staticmethod
    def of(value: int, draws: Sequence[int] | np.ndarray, level: float = 0.95) -> LayerEstimate:
        """From the layers of resamples."""
        layers, counts = np.unique(np.asarray(draws, dtype=np.int64), return_counts=True)
        low = np.quantile(draws, (1 - level) / 2, method="inverted_cdf")
        high = np.quantile(draws, (1 + level) / 2, method="inverted_cdf")
        best = int(counts.argmax())
        every = tuple((int(layer), int(count)) for layer, count in zip(layers, counts, strict=True))
        return LayerEstimate(
            int(value), int(layers[best]), int(low), int(high), float(counts[best] / counts.sum()), every
        )

    @property
    def width(self) -> int:
        """Of the interval, in layers."""
        return self.high - self.low

    def row(self) -> dict[str, Any]:
        """Its fields for a table."""
        return {"value": self.value, "mode": self.mode, "low": self.low, "high": self.high, "agreement": self.agreement}

    def __str__(self) -> str:
        return f"{self.value} (mode {self.mode} of {self.agreement:.0%} of resamples, 95 % {self.low} to {self.high})"


@dataclass(frozen=True)
class Layers:
    """Which decoder layers a curve has.

    Attributes:
        numbers: rising.
        count: all decoder layers of the model; what a curve that never falls is said to reach.
    """

    numbers: tuple[int, ...]
    count: int

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.numbers, self.numbers[1:], strict=False))
        if not self.numbers or not rising or self.numbers[0] < 0 or self.numbers[-1] >= self.count:
            raise ic.PlanError(
                f"layers {list(self.numbers)} of {self.count}: give rising numbers, 0 to {self.count - 1}"
            )

    def at(self, index: Any) -> Int[np.ndarray, "*any"]:
        """Decoder layers of indices; -1 stays, one past the last is the number of layers."""
        # indices run from -1 (no layer) to one past the last (never), which are names of their own
        names = np.array([-1, *self.numbers, self.count])
        return np.asarray(names[np.asarray(index) + 1])

    def estimate(self, boot: stats.Bootstrap, index: Callable[..., Any], *samples: np.ndarray) -> LayerEstimate:
        """A layer that is a function of the samples, with its bootstrap distribution.

        Args:
            index: gets arrays whose first axis is `sample`, returns the index of a layer.
        """
        # counts of layers rather than percentiles of a mean: between two layers there is none
        draws = boot.draws(index, *samples)
        return LayerEstimate.of(int(self.at(index(*samples))), self.at(draws.astype(np.int64)), boot.level)
