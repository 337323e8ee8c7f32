"""A sparse linear fit by coordinate descent in float64, and the sampler of random masks.

    minimise over w, b    1/(2n) |y/t - Z w - b|² + α |w|_1      Z: masks less their mean, over their deviation
    weight of a source  = w / deviation × t

t is the number of the answer's tokens, so α counts per token on standardised masks: weights come out too small by up to
α t / deviation. A source that every mask keeps, or none, has weight 0.

Source: Tibshirani (1996) for the lasso; Friedman et al. (2010) for coordinate descent; the scaling and the masks
are those of Cohen-Wang et al. (2024), arXiv:2409.00729.
Must equal: the optimality conditions, to rounding (`kkt`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROUNDS = 10_000
TOLERANCE = 1e-14


class Fit(NamedTuple):
    """A linear fit of values by masks.

    Attributes:
        weights: per source, in units of the values.
        intercept: value of the mask that keeps nothing.
        kkt: how far the optimality conditions are from holding, on the scale of α.
    """

    weights: np.ndarray
    intercept: float
    kkt: float

    def predicted(self, masks: np.ndarray) -> np.ndarray:
        """Values of masks `[mask source]`."""
        return np.asarray(masks @ self.weights + self.intercept)


def drawn(count: int, sources: int, keep: float, seed: int) -> np.ndarray:
    """Random masks `[mask source]`, True where a source is kept; the i-th by numpy's RandomState(i + seed)."""
    # a generator per mask, as published: further masks leave the first ones as they are
    each = [
        np.random.RandomState(seed + i).choice([False, True], size=sources, p=[1 - keep, keep]) for i in range(count)
    ]
    return np.stack(each)


def lasso(masks: np.ndarray, values: np.ndarray, alpha: float, tokens: int = 1) -> Fit:
    """The fit.

    Args:
        masks: `[mask source]`, True where a source is kept.
        values: one per mask.
        tokens: of the answer.
    """
    x, y = np.asarray(masks, dtype=np.float64), np.asarray(values, dtype=np.float64) / tokens
    mean, deviation = x.mean(0), x.std(0)
    z = np.divide(x - mean, deviation, out=np.zeros_like(x), where=deviation > 0)
    n, w = len(y), np.zeros(x.shape[1])
    residual = y - y.mean()
    moving = np.flatnonzero(deviation > 0)
    for _ in range(ROUNDS):
        change = 0.0
        for j in moving:
            # columns have deviation 1: the best single weight is the product with what is left, drawn in by α
            pull = z[:, j] @ residual / n + w[j]
            new = np.sign(pull) * max(abs(pull) - alpha, 0.0)
            residual += z[:, j] * (w[j] - new)
            change, w[j] = max(change, abs(w[j] - new)), new
        if change <= TOLERANCE * max(1.0, float(np.abs(w).max(initial=0.0))):
            break
    slope = z[:, moving].T @ (y - y.mean() - z @ w) / n
    # subgradients: ±α where a weight is not 0, anything up to α where it is
    off = np.where(w[moving] != 0, np.abs(slope - alpha * np.sign(w[moving])), np.maximum(np.abs(slope) - alpha, 0))
    weights = np.divide(w, deviation, out=np.zeros_like(w), where=deviation > 0) * tokens
    return Fit(weights, float(y.mean() * tokens - mean @ weights), float(off.max(initial=0.0)))
