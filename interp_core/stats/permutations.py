"""Tests that ask nothing of a distribution: how often chance alone gives a statistic like the one seen.

    sign flip      paired differences: every difference may as well have the other sign
    permutation    two groups: every sample may as well be of the other group
    p              share of arrangements at least as far as the one seen; two-sided, twice the smaller side's share

All arrangements are gone through where there are at most 2^16 (16 differences, two groups of 9): the p is exact. Else
random ones are drawn, the one seen counts among them, p = (b + 1) / (m + 1), and the result says so.
For curves, `adjust="max"` holds each place against the largest statistic of all places under the same flips.

Source: Phipson and Smyth (2010), "Permutation p-values should never be zero"; of the maximum Westfall and Young (1993).
Must equal: scipy.stats.permutation_test where both go through all arrangements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import comb
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from ..errors import PlanError
from ..progress import Progress
from .many import benjamini_hochberg, holm
from .samples import numbers, one_of, units_of, whole

Alternative = Literal["two-sided", "greater", "less"]
Adjust = Literal["max", "holm", "bh", "none"]
ALTERNATIVES = ("two-sided", "greater", "less")
EXACT = 2**16
"""Arrangements up to which all are gone through."""
BLOCK = 256
"""Arrangements that are worked on together."""
SHOWN = 12


@dataclass(frozen=True)
class PermutationTest:
    """How often chance gives such a statistic.

    Attributes:
        statistic: of the samples as they are.
        p: how often an arrangement is as far.
        alternative: "two-sided", or the side that counts.
        exact: whether all arrangements were gone through.
        arrangements: how many there were.
        name: what the statistic is.
        what: what was arranged.
        n: how many samples.
        units: how many independent ones: clusters where there are some.
        seed: of the random arrangements; None if exact.
        note: what to know before believing it; empty if nothing.
    """

    statistic: float
    p: float
    alternative: str
    exact: bool
    arrangements: int
    name: str
    what: str
    n: int
    units: int
    seed: int | None = None
    note: str = ""

    def row(self) -> dict[str, Any]:
        """Its fields for a table."""
        return {"statistic": self.statistic, "p": self.p, "exact": self.exact, "n": self.n, "units": self.units}

    def __str__(self) -> str:
        return f"{self.name} {self.statistic:.4g}, p = {self.p:.3g} ({said(self)})"


@dataclass(frozen=True, eq=False)
class PermutationTests:
    """The same along named axes.

    Attributes:
        statistic, p: at each place, arrays of the axes.
        adjusted: p with regard to there being many places.
        adjust: how: "max", "holm", "bh", "none".
        axes: their names.
        alternative, exact, arrangements, name, what, n, units, seed, note: as of a `PermutationTest`.
    """

    statistic: Float[np.ndarray, "*axes"]
    p: Float[np.ndarray, "*axes"]
    adjusted: Float[np.ndarray, "*axes"]
    adjust: str
    axes: tuple[str, ...]
    alternative: str
    exact: bool
    arrangements: int
    name: str
    what: str
    n: int
    units: int
    seed: int | None = None
    note: str = ""

    def below(self, level: float = 0.05) -> Bool[np.ndarray, "*axes"]:
        """Where the adjusted p is at most a level."""
        return self.adjusted <= level

    def table(self) -> list[dict[str, Any]]:
        """One row per place: its numbers by axis, statistic, p and adjusted p."""
        return [
            dict(zip(self.axes, place, strict=True))
            | {"statistic": float(self.statistic[place]), "p": float(self.p[place])}
            | {"adjusted": float(self.adjusted[place])}
            for place in np.ndindex(self.p.shape)
        ]

    def __str__(self) -> str:
        rows = sorted(self.table(), key=lambda row: row["adjusted"])
        head = f"{self.name} along {' '.join(self.axes)} ({said(self)}); p adjusted by {self.adjust}"
        lines = [
            "  ".join(f"{axis} {row[axis]:<3}" for axis in self.axes)
            + f"  {row['statistic']:10.4g}  p = {row['p']:.3g}, adjusted {row['adjusted']:.3g}"
            for row in rows[:SHOWN]
        ]
        more = [f"… and {len(rows) - SHOWN} more, of larger p"] if len(rows) > SHOWN else []
        return "\n  ".join([head, *lines, *more])


def said(test: PermutationTest | PermutationTests) -> str:
    """How a p came about, in words."""
    how = f"exact, all {test.arrangements:,}" if test.exact else f"{test.arrangements:,} random"
    size = f"n = {test.n}" + (f" in {test.units} clusters" if test.units != test.n else "")
    seed = [] if test.seed is None else [f"seed {test.seed}"]
    words = ", ".join([f"{how} {test.what}", test.alternative, size, *seed])
    return "; ".join([words, *([test.note] if test.note else [])])


def p_value(statistic: int | float, null: Any, alternative: Alternative = "two-sided") -> float:
    """p of a statistic against those of random arrangements of one's own (shuffled labels, permuted token classes):
    (b + 1) / (m + 1), b of the m being as far.

    Raises:
        PlanError: no arrangements, or numbers that are not finite.
    """
    drawn = numbers("stats.p_value: null", null)
    one_of("stats.p_value: alternative", alternative, ALTERNATIVES)
    seen = numbers("stats.p_value: statistic", [statistic])[0]
    return float(_p(seen, drawn, alternative, exact=False, slack=0.0))


def sign_flip(
    differences: Any,
    *,
    clusters: Any = None,
    alternative: Alternative = "two-sided",
    resamples: int = 9999,
    seed: int = 0,
) -> PermutationTest:
    """Whether the mean of paired differences is more than chance.

    Args:
        differences: `[sample]`.
        clusters: a label per sample: differences of one label change their signs together.
        alternative: "greater" asks for a mean above 0.
        resamples: random flips, where there are too many to go through all (from 17 units on).
        seed: of the flips.

    Raises:
        PlanError: empty or not finite, other lengths, fewer than two units.
    """
    x = numbers("stats.sign_flip: differences", differences)
    done = _flips("stats.sign_flip", x[:, None], clusters, alternative, resamples, seed, "none")
    return PermutationTest(
        float(done.statistic[0]), float(done.p[0]), alternative, done.exact, done.arrangements, done.name, done.what,
        done.n, done.units, done.seed, done.note,
    )  # fmt: skip


def sign_flips(
    differences: Any,
    *,
    axes: Sequence[str],
    adjust: Adjust = "max",
    clusters: Any = None,
    alternative: Alternative = "two-sided",
    resamples: int = 9999,
    seed: int = 0,
) -> PermutationTests:
    """The same at every place of curves or maps, all under the same flips: which layers differ.

    Args:
        differences: `[sample *axes]`.
        axes: names of the axes after `sample`.
        adjust: for many places: "max" (the largest |mean| / √Σ x² of all places; keeps the chance of any false claim
            below the level, and knows how places go together), "holm", "bh", or "none".
        clusters, alternative, resamples, seed: as of `sign_flip`.

    Raises:
        PlanError: as `sign_flip`; axes that do not name the numbers'.
    """
    one_of("stats.sign_flips: adjust", adjust, ("max", "holm", "bh", "none"))
    x = numbers("stats.sign_flips: differences", differences, ndim=None)
    if x.ndim != len(axes) + 1:
        raise PlanError(f"stats.sign_flips: axes {tuple(axes)} do not name those after sample, of shape {x.shape[1:]}")
    done = _flips("stats.sign_flips", x.reshape(len(x), -1), clusters, alternative, resamples, seed, adjust)
    arrays = {name: getattr(done, name).reshape(x.shape[1:]) for name in ("statistic", "p", "adjusted")}
    return replace(done, axes=tuple(axes), **arrays)


def permutation(
    first: Any,
    second: Any,
    *,
    statistic: Callable[[np.ndarray, np.ndarray], float] | None = None,
    alternative: Alternative = "two-sided",
    resamples: int = 9999,
    seed: int = 0,
) -> PermutationTest:
    """Whether two groups differ more than chance.

    Args:
        first, second: numbers `[sample]` of each group.
        statistic: of both groups; None: the first's mean minus the second's.
        alternative: "greater" asks for a larger statistic than chance gives.
        resamples: random divisions, where there are too many to go through all.
        seed: of the divisions.

    Raises:
        PlanError: empty or not finite.
    """
    check_drawing("stats.permutation", alternative, resamples, seed)
    a, b = numbers("stats.permutation: first", first), numbers("stats.permutation: second", second)
    together, n, size = np.concatenate([a, b]), len(a) + len(b), len(a)
    name = "mean difference" if statistic is None else getattr(statistic, "__name__", "statistic").strip("<>")
    exact = comb(n, size) <= EXACT
    total = comb(n, size) if exact else resamples
    null = []
    with Progress(f"permutations of {name}", total) as progress:
        for groups in _all_divisions(n, size) if exact else _random_divisions(n, size, resamples, seed):
            null.append(_of_groups(together, groups, statistic))
            progress.add(len(groups))
    seen = _of_groups(together, np.arange(n)[None] < size, statistic)[0]
    notes = ["all samples are the same"] if (together == together[0]).all() else []
    # Sums in another order differ by rounding, and must not count as another value
    slack = 8 * n * np.finfo(np.float64).eps * np.abs(together).max() if statistic is None else 0.0
    return judged(
        PermutationTest(
            float(seen), 1.0, alternative, exact, total, name, "divisions into groups", n, n, None if exact else seed,
            "; ".join(notes),
        ),
        np.concatenate(null), slack,
    )  # fmt: skip


def check_drawing(owner: str, alternative: str, resamples: int, seed: int) -> None:
    """Refuse an alternative that there is not, and drawings that are none.

    Raises:
        PlanError: naming the first.
    """
    one_of(f"{owner}: alternative", alternative, ALTERNATIVES)
    whole(f"{owner}: resamples", resamples, 99)
    whole(f"{owner}: seed", seed, 0)


def judged(test: PermutationTest, null: Float[np.ndarray, " arrangement"], slack: float) -> PermutationTest:
    """A test with the p that its statistic has among those of the arrangements; nearer than `slack` counts as equal.

    Raises:
        PlanError: a statistic that is not a number.
    """
    if not np.isfinite(test.statistic) or not np.isfinite(null).all():
        raise PlanError(f"permutations of {test.name}: not a number, with the samples as they are or in another order")
    return replace(test, p=_p(test.statistic, null, test.alternative, test.exact, slack))


def _p(seen: float, null: Float[np.ndarray, " arrangement"], alternative: str, exact: bool, slack: float) -> float:
    """The share of arrangements that are as far."""
    above, below = (_share(int(side.sum()), len(null), exact) for side in (null >= seen - slack, null <= seen + slack))
    return {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]


def _share(count: Any, of: int, exact: bool) -> Any:
    # Random ones: the arrangement that was seen counts among them, so that no p is zero.
    return count / of if exact else (count + 1) / (of + 1)


def _of_groups(
    together: Float[np.ndarray, " sample"],
    groups: Bool[np.ndarray, "row sample"],
    statistic: Callable[[np.ndarray, np.ndarray], float] | None,
) -> Float[np.ndarray, " row"]:
    """The statistic of every division: True is in the first group."""
    if statistic is None:
        size = groups[0].sum()
        return np.asarray(groups @ together / size - ~groups @ together / (len(together) - size))
    return np.array([float(statistic(together[row], together[~row])) for row in groups])


def _all_divisions(n: int, size: int) -> Iterator[Bool[np.ndarray, "row sample"]]:
    """Every way to choose the first group, in blocks."""
    chosen = combinations(range(n), size)
    while block := list(islice(chosen, BLOCK)):
        rows = np.zeros((len(block), n), dtype=bool)
        np.put_along_axis(rows, np.array(block), True, axis=1)
        yield rows


def _random_divisions(n: int, size: int, resamples: int, seed: int) -> Iterator[Bool[np.ndarray, "row sample"]]:
    """Random ones, in blocks."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        yield rng.permuted(np.tile(np.arange(n) < size, (min(BLOCK, resamples - start), 1)), axis=1)


def _flips(
    owner: str,
    x: Float[np.ndarray, "sample place"],
    clusters: Any,
    alternative: Alternative,
    resamples: int,
    seed: int,
    adjust: str,
) -> PermutationTests:
    """Sign flips at every place, along one axis."""
    check_drawing(owner, alternative, resamples, seed)
    units = units_of(owner, len(x), clusters)
    sums = np.zeros((units.count, x.shape[1]))
    np.add.at(sums, units.of, x)
    sums = sums[(sums != 0).any(1)]  # a unit of zeros stays what it is under either sign
    exact = 2 ** len(sums) <= EXACT
    total = 2 ** len(sums) if exact else resamples
    length = np.sqrt((sums**2).sum(0))
    unit = np.divide(sums, length, out=np.zeros_like(sums), where=length > 0)  # one scale for all places
    side = {"two-sided": np.abs, "greater": np.positive, "less": np.negative}[alternative]
    seen = side(unit.sum(0)) - 8 * len(sums) ** 1.5 * np.finfo(np.float64).eps  # rounding is no difference
    alone, largest = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    with Progress("sign flips", total) as progress:
        for signs in _signs(len(sums), total, exact, seed):
            null = side(signs @ unit)
            alone += (null >= seen).sum(0)
            largest += (null.max(1)[:, None] >= seen).sum(0)
            progress.add(len(signs))
    p, above = _share(alone, total, exact), _share(largest, total, exact)
    adjusted = above if adjust == "max" else {"holm": holm, "bh": benjamini_hochberg}.get(adjust, np.copy)(p)
    return PermutationTests(
        x.mean(0), p, adjusted, adjust, ("place",), alternative, exact, total, "mean difference",
        "sign flips", len(x), units.count, None if exact else seed, _zeros(x),
    )  # fmt: skip


def _signs(n: int, total: int, exact: bool, seed: int) -> Iterator[Float[np.ndarray, "row unit"]]:
    """Signs of so many units: all of them, or random ones, in blocks."""
    rng = np.random.default_rng(seed)
    for start in range(0, total, BLOCK):
        rows = min(BLOCK, total - start)
        bits = np.arange(start, start + rows)[:, None] >> np.arange(n) & 1 if exact else rng.integers(0, 2, (rows, n))
        yield 2.0 * bits - 1


def _zeros(x: Float[np.ndarray, "sample place"]) -> str:
    """What is to be said of differences that are 0."""
    if x.shape[1] == 1:
        zero = int((x == 0).sum())
        return "all differences are 0" if zero == len(x) else f"{zero} differences are 0" if zero else ""
    still = int((x == 0).all(0).sum())
    return f"all differences are 0 at {still} of {x.shape[1]} places" if still else ""
