"""How two orders of the same samples agree: ranks, correlations, and how well scores tell two classes apart.

    Pearson    Σ (x - x̄)(y - ȳ) / √(Σ (x - x̄)² Σ (y - ȳ)²)
    Spearman   Pearson of the ranks, equal values sharing their mean rank
    Kendall    τ_b = (C - D) / √((n₀ - n₁)(n₀ - n₂)): concordant minus discordant pairs over pairs not tied in x, in y
    AUROC      P(score of a positive > of a negative) + P(equal) / 2 = Mann and Whitney's U over pairs

Source: Kendall (1945), "The treatment of ties in ranking problems"; Knight (1966) for counting pairs in n log n.
Must equal: scipy.stats rankdata, pearsonr, spearmanr, kendalltau, mannwhitneyu.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from math import factorial
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from ..errors import PlanError
from ..progress import Progress
from .permutations import EXACT, Alternative, PermutationTest, check_drawing, judged
from .samples import aligned, numbers, one_of

Kind = Literal["pearson", "spearman", "kendall"]
Vector = Float[np.ndarray, " sample"]
Rows = Float[np.ndarray, "row sample"]


def ranks(values: Any) -> Vector:
    """Ranks from 1; equal values share their mean rank. Infinities are ranked, NaN is refused.

    Raises:
        PlanError: empty, not numbers, NaN.
    """
    return _ranked(numbers("stats.ranks: values", values, finite=False))


def pearson(x: Any, y: Any) -> float:
    """Pearson's correlation of the values; NaN where a side is the same everywhere, which correlates with nothing.

    Raises:
        PlanError: different lengths, fewer than two samples, not finite.
    """
    return _correlation("pearson", x, y)


def spearman(x: Any, y: Any) -> float:
    """Spearman's correlation, of ranks; NaN where a side is the same everywhere.

    Raises:
        PlanError: different lengths, fewer than two samples, NaN.
    """
    return _correlation("spearman", x, y)


def kendall(x: Any, y: Any) -> float:
    """Kendall's τ_b; NaN where a side is the same everywhere.

    Raises:
        PlanError: different lengths, fewer than two samples, NaN.
    """
    return _correlation("kendall", x, y)


def auroc(scores: Any, labels: Any, weights: Any = None) -> float:
    """How well scores tell positives from negatives: 1 all positives above, 0.5 chance, ties half.

    Args:
        scores: `[sample]`, infinities allowed.
        labels: 1 or True for positives; between 0 and 1 for samples that are positive in part (the share of a patch's
            pixels that lie in a box).
        weights: of samples (how many pixels a patch has); None: all alike.

    Raises:
        PlanError: different lengths, labels that are no shares, weights below 0, only one class.
    """
    s = numbers("stats.auroc: scores", scores, finite=False)
    y = numbers("stats.auroc: labels", labels)
    w = np.ones(len(s)) if weights is None else numbers("stats.auroc: weights", weights)
    aligned("stats.auroc", scores=s, labels=y, weights=w)
    if y.min() < 0 or y.max() > 1 or w.min() < 0:
        raise PlanError("stats.auroc: labels are between 0 and 1, weights at least 0")
    _, group = np.unique(s, return_inverse=True)
    positive, negative = (np.bincount(group, weights=w * part) for part in (y, 1 - y))
    if not positive.sum() or not negative.sum():
        only = "positives" if positive.sum() else "negatives"
        raise PlanError(f"stats.auroc: all {len(s)} samples are {only}; it compares two classes")
    above = positive * (negative.cumsum() - negative / 2)
    return float(above.sum() / (positive.sum() * negative.sum()))


def correlation_test(
    x: Any,
    y: Any,
    kind: Kind = "spearman",
    *,
    alternative: Alternative = "two-sided",
    resamples: int = 1999,
    seed: int = 0,
) -> PermutationTest:
    """Whether a correlation is more than chance: the same with y in every other order. For an interval of the
    correlation, `Bootstrap().of(spearman, x, y)`.

    Args:
        x, y: numbers `[sample]`, each sample by itself.
        kind: which correlation.
        alternative: "greater" asks for a positive one.
        resamples: random orders, where there are too many to go through all (from 9 samples on).
        seed: of the orders.

    Raises:
        PlanError: as the correlation.
    """
    one_of("stats.correlation_test: kind", kind, tuple(_STATISTICS))
    check_drawing("stats.correlation_test", alternative, resamples, seed)
    a, b = _sides(kind, x, y)
    n = len(a)
    statistic = _STATISTICS[kind](a, b[None])[0]
    exact = n < 13 and factorial(n) <= EXACT
    if exact:
        orders = np.array(list(permutations(range(n))))
        null = _STATISTICS[kind](a, b[orders])
    else:
        null = _shuffled(kind, a, b, resamples, seed)
    notes = [note for note in (_told("x", a), _told("y", b)) if note]
    if np.isnan(statistic):
        statistic, null = 0.0, np.zeros(len(null))  # the same in every order
    test = PermutationTest(
        float(statistic), 1.0, alternative, exact, len(null), kind, "orders of y", n, n, None if exact else seed,
        "; ".join(notes),
    )  # fmt: skip
    return judged(test, null, 8 * n * np.finfo(np.float64).eps)


def _told(side: str, values: Vector) -> str:
    """What is to be said of equal values."""
    distinct = len(np.unique(values))
    if distinct == 1:
        return f"{side} is the same everywhere, which correlates with nothing"
    return f"{side} has ties ({distinct} values in {len(values)} samples)" if distinct < len(values) else ""


def _shuffled(kind: Kind, x: Vector, y: Vector, resamples: int, seed: int) -> Vector:
    """The correlation under random orders."""
    rng, rows = np.random.default_rng(seed), max(1, 1_000_000 // len(x))
    out = []
    with Progress(f"permutations of {kind}", resamples) as progress:
        for start in range(0, resamples, rows):
            block = np.broadcast_to(y, (min(rows, resamples - start), len(y)))
            out.append(_STATISTICS[kind](x, rng.permuted(block, axis=1)))
            progress.add(len(block))
    return np.concatenate(out)


def _correlation(kind: Kind, x: Any, y: Any) -> float:
    a, b = _sides(kind, x, y)
    return float(_STATISTICS[kind](a, b[None])[0])


def _sides(kind: Kind, x: Any, y: Any) -> tuple[Vector, Vector]:
    """Both sides, checked; as ranks where only their order counts."""
    finite = kind == "pearson"
    a, b = (numbers(f"stats.{kind}: {name}", side, finite=finite) for name, side in (("x", x), ("y", y)))
    aligned(f"stats.{kind}", x=a, y=b)
    if len(a) < 2:
        raise PlanError(f"stats.{kind}: a correlation takes two samples at least, not {len(a)}")
    return (a, b) if finite else (_ranked(a), _ranked(b))


def _ranked(values: Vector) -> Vector:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[group])


def _pearson(x: Vector, ys: Rows) -> Float[np.ndarray, " row"]:
    """Pearson's correlation of x with every row."""
    if (x == x[0]).all() or (ys[0] == ys[0, 0]).all():  # by values: rounding in the mean would leave a shadow
        return np.full(len(ys), np.nan)
    a, b = _unit(x[None])[0], _unit(ys)
    return np.clip(b @ a, -1, 1)


def _unit(rows: Rows) -> Rows:
    """Rows centred, of length 1; scaled before they are squared, against under- and overflow."""
    rows = rows / np.abs(rows).max(1, keepdims=True)
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _kendall(x: Vector, ys: Rows) -> Float[np.ndarray, " row"]:
    """Kendall's τ_b of x with every row; rows are one another's permutations."""
    n = len(x)
    _, a, in_x = np.unique(x, return_inverse=True, return_counts=True)
    distinct, in_y = np.unique(ys[0], return_counts=True)
    pairs, tied_x, tied_y = (float((c * (c - 1) // 2).sum()) for c in (np.array([n]), in_x, in_y))
    if pairs in (tied_x, tied_y):
        return np.full(len(ys), np.nan)
    numbered = np.searchsorted(distinct, ys)
    keys = np.sort(a * n + numbered, axis=1)  # in order of x, and of y where x is tied
    same = np.diff(keys, axis=1) == 0
    both = np.array([_tied(row) for row in same]) if same.any() else 0.0
    excess = pairs - tied_x - tied_y + both - 2 * _inversions(keys % n)
    return np.asarray(excess / np.sqrt((pairs - tied_x) * (pairs - tied_y)))


def _tied(same: np.ndarray) -> float:
    """Pairs that are equal on both sides, of which neighbours are the same."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    runs = edges[1::2] - edges[::2] + 1
    return float((runs * (runs - 1) // 2).sum())


def _inversions(rows: Int[np.ndarray, "row sample"]) -> Float[np.ndarray, " row"]:
    """How many pairs of each row stand in falling order: by merging halves of 1, 2, 4 …, all blocks at once.

    Numbers are between 0 and n - 1. A block's numbers are lifted above those of the blocks before it, so that one
    sorted list of all left halves serves every right half.
    """
    n = rows.shape[1]
    total = np.zeros(len(rows))
    place = np.arange(n)
    half = 1
    while half < n:
        right = (place // half) % 2 == 1
        lift = (np.arange(len(rows))[:, None] * n + place // (2 * half)) * n
        left = np.sort((lift + rows)[:, ~right].ravel())
        upto, own = ((lift + n)[:, right].ravel(), (lift + rows)[:, right].ravel())
        larger = np.searchsorted(left, upto) - np.searchsorted(left, own, side="right")
        total += larger.reshape(len(rows), -1).sum(1)
        half *= 2
    return total


_STATISTICS: dict[str, Callable[[Vector, Rows], Float[np.ndarray, " row"]]] = {
    "pearson": _pearson,
    "spearman": _pearson,
    "kendall": _kendall,
}
