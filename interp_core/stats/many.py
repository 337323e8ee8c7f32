"""Corrections for many tests: adjusted p-values, to be compared with the level as they are.

    Holm                  any dependence; the chance of a single false claim stays below the level
    Benjamini-Hochberg    independent or positively dependent; the share of false claims stays below it on average

Source: Holm (1979), "A simple sequentially rejective multiple test procedure"; Benjamini and Hochberg (1995),
"Controlling the false discovery rate".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from ..errors import PlanError
from .samples import numbers


def holm(p: Any) -> Float[np.ndarray, "*axes"]:
    """Holm's adjusted p-values, in the shape of those given.

    Raises:
        PlanError: empty, or no probabilities.
    """
    flat, order, array = _sorted("stats.holm", p)
    steps = np.maximum.accumulate(flat * np.arange(len(flat), 0, -1))
    return _back(np.minimum(steps, 1.0), order, array)


def benjamini_hochberg(p: Any) -> Float[np.ndarray, "*axes"]:
    """Benjamini and Hochberg's adjusted p-values, in the shape of those given.

    Raises:
        PlanError: empty, or no probabilities.
    """
    flat, order, array = _sorted("stats.benjamini_hochberg", p)
    steps = np.minimum.accumulate((flat * len(flat) / np.arange(1, len(flat) + 1))[::-1])[::-1]
    return _back(np.minimum(steps, 1.0), order, array)


def _sorted(owner: str, p: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The p-values in rising order, that order, and the array that they came in."""
    array = numbers(f"{owner}: p", p, ndim=None)
    if array.min() < 0 or array.max() > 1:
        raise PlanError(f"{owner} takes probabilities, these go from {array.min():.4g} to {array.max():.4g}")
    order = np.argsort(array, axis=None, kind="stable")
    return array.ravel()[order], order, array


def _back(adjusted: np.ndarray, order: np.ndarray, array: np.ndarray) -> np.ndarray:
    out = np.empty_like(adjusted)
    out[order] = adjusted
    return out.reshape(array.shape)
