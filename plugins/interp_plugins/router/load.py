"""How evenly experts are used: load statistics per layer, from counts or shares.

    f          count share of each expert, Σ_e f = 1
    cv         std(f) / mean(f), std of the population          0: even
    max_vio    max f · E - 1                                    0: even
    entropy    H(f) / ln E                                      1: even
    gini       Σ_i (2i - E - 1) f_(i) / E, f sorted rising      0: even, (E - 1) / E: one expert takes all
    dead       experts that no token chose (or below a tolerance)
    aux_loss   E Σ_e f_e · mean p_e                             1: even

Source: cv Shazeer et al. (2017); max_vio Wang et al. (2024), arXiv:2408.15664; aux_loss Fedus et al. (2021).
transformers' `aux_loss` is k times this, pooled over layers.
Shapes: `[layer expert]` to `[layer]`, numpy float64.
Must equal: golden numbers within 1e-6 (dead exactly); uniform counts give 0, 0, 1, 0, 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

import interp_core as ic

from .usage import Usage, shares

Shares = Float[np.ndarray, "layer expert"]
Curve = Float[np.ndarray, " layer"]


def cv(f: Any) -> Curve:
    """Coefficient of variation."""
    values = shares(f)
    return values.std(-1) / values.mean(-1)


def max_vio(f: Any) -> Curve:
    """How far the busiest expert is above an even share, in even shares."""
    values = shares(f)
    return values.max(-1) * values.shape[-1] - 1


def entropy(f: Any) -> Curve:
    """Entropy over that of even use; 1 of a layer with a single expert."""
    values = shares(f)
    if values.shape[-1] == 1:
        return np.ones(values.shape[:-1])
    logs = np.log(values, where=values > 0, out=np.zeros_like(values))
    return -(values * logs).sum(-1) / np.log(values.shape[-1])


def gini(f: Any) -> Curve:
    """Gini coefficient."""
    values = np.sort(shares(f), -1)
    n = values.shape[-1]
    rank = 2 * np.arange(1, n + 1) - n - 1
    return (values * rank).sum(-1) / n


def dead(counts: Any, tolerance: float = 0.0) -> Int[np.ndarray, " layer"]:
    """How many experts have a share of `tolerance` or less; by default those that no token chose."""
    return (shares(counts) <= tolerance).sum(-1)


def aux_loss(f: Any, prob: Any) -> Curve:
    """Load balancing loss of shares and mean probabilities.

    Raises:
        PlanError: of different shapes.
    """
    values, probs = shares(f), np.asarray(prob, dtype=np.float64)
    if values.shape != probs.shape:
        raise ic.PlanError(f"aux_loss: shares are {list(values.shape)}, probabilities {list(probs.shape)}")
    return values.shape[-1] * (values * probs).sum(-1)


def load(counts: Any, prob: Any = None) -> dict[str, np.ndarray]:
    """Every load statistic by name, of counts or shares `[layer expert]`; aux_loss where probabilities are given.

    Raises:
        PlanError: negative counts, or a layer without any.
    """
    statistics: dict[str, np.ndarray] = {
        "cv": cv(counts), "max_vio": max_vio(counts), "entropy": entropy(counts), "gini": gini(counts),
        "dead": dead(counts),
    }  # fmt: skip
    return statistics if prob is None else statistics | {"aux_loss": aux_loss(counts, prob)}


def load_of(usage: Usage) -> dict[str, np.ndarray]:
    """Every load statistic of a usage."""
    try:
        prob = usage.matrix("prob")
    except ic.ReadError:
        prob = None
    return load(usage.counts, prob)
