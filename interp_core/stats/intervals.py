"""Numbers with their intervals: one (`Interval`) or many along named axes (`Band`); shares by Wilson's formula.

Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

from ..errors import PlanError, wrong
from .samples import share, whole

NORMAL = NormalDist()
POWER = 0.8
"""Of `detectable`: how often a true effect of that size would be seen."""
SHOWN = 12
"""Rows of a band that are printed."""


@dataclass(frozen=True)
class Interval:
    """A number and the interval that holds the true one in `level` of all studies like this.

    Attributes:
        value: of the samples themselves.
        low, high: ends of the interval.
        error: standard error; of a bootstrap, the deviation of its resamples.
        level: 0.95 for a 95 % interval.
        method: how it was made: "BCa bootstrap", "percentile bootstrap", "Wilson".
        name: what the number is.
        n: how many samples.
        units: how many independent ones: clusters where there are some, else `n`.
        resamples, seed: of a bootstrap; 0 and None otherwise.
        note: what to know before believing it; empty if nothing.
    """

    value: float
    low: float
    high: float
    error: float
    level: float
    method: str
    name: str
    n: int
    units: int
    resamples: int = 0
    seed: int | None = None
    note: str = ""

    @property
    def detectable(self) -> float:
        """The smallest true effect that such a study sees in 80 % of cases: 2.80 standard errors at 95 %."""
        return detectable(self.error, self.level)

    def excludes(self, value: float = 0.0) -> bool:
        """Whether a number lies outside."""
        return not self.low <= value <= self.high

    def row(self) -> dict[str, Any]:
        """Its fields for a table; the ends named `low` and `high`."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "units": self.units}

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return (
            f"{self.name} {self.value:.4g}, {100 * self.level:.4g} % interval {self.low:.4g} to {self.high:.4g} "
            f"({said(self.method, self.n, self.units, self.resamples, self.seed, self.note)})"
        )


@dataclass(frozen=True, eq=False)
class Band:
    """Numbers along named axes, each with its interval.

    Attributes:
        value, low, high, error: as of an `Interval`, arrays of the axes.
        axes: their names.
        simultaneous: whether the band holds the whole true curve at once in `level` of all studies; else each number by
            itself.
        level, method, name, n, units, resamples, seed, note: as of an `Interval`.
    """

    value: Float[np.ndarray, "*axes"]
    low: Float[np.ndarray, "*axes"]
    high: Float[np.ndarray, "*axes"]
    error: Float[np.ndarray, "*axes"]
    axes: tuple[str, ...]
    simultaneous: bool
    level: float
    method: str
    name: str
    n: int
    units: int
    resamples: int
    seed: int
    note: str = ""

    @property
    def detectable(self) -> Float[np.ndarray, "*axes"]:
        """As of an `Interval`, at each place."""
        return detectable(1.0, self.level) * self.error

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.value.shape

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, place: int | tuple[int, ...]) -> Interval:
        place = place if isinstance(place, tuple) else (place,)
        if len(place) != len(self.axes):
            raise PlanError(f"a band along {' '.join(self.axes)} takes {len(self.axes)} number(s), not {len(place)}")
        value, low, high, error = (float(array[place]) for array in (self.value, self.low, self.high, self.error))
        where = ", ".join(f"{axis} {i}" for axis, i in zip(self.axes, place, strict=True))
        return Interval(
            value, low, high, error, self.level, self.method, f"{self.name}, {where}", self.n, self.units,
            self.resamples, self.seed, self.note,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Interval]:
        return (self[tuple(place)] for place in np.ndindex(self.shape))

    def table(self) -> list[dict[str, Any]]:
        """One row per place: its numbers by axis, then value and ends."""
        return [dict(zip(self.axes, place, strict=True)) | self[place].row() for place in np.ndindex(self.shape)]

    def __str__(self) -> str:
        kind = "simultaneous band" if self.simultaneous else "intervals"
        head = (
            f"{self.name} along {' '.join(self.axes)}, {100 * self.level:.4g} % {kind} "
            f"({said(self.method, self.n, self.units, self.resamples, self.seed, self.note)})"
        )
        rows = self.table()
        lines = [
            "  ".join(f"{axis} {row[axis]:<3}" for axis in self.axes)
            + f"  {row['value']:10.4g}  [{row['low']:.4g}, {row['high']:.4g}]"
            for row in rows[:SHOWN]
        ]
        more = [f"… and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
        return "\n  ".join([head, *lines, *more])


def said(method: str, n: int, units: int, resamples: int, seed: int | None, note: str) -> str:
    """How an interval came about, in words."""
    size = f"n = {n}" + (f" in {units} clusters" if units != n else "")
    drawn = [f"{resamples:,} resamples", f"seed {seed}"] if resamples else []
    return "; ".join([", ".join([method, size, *drawn]), *([note] if note else [])])


def normal(level: float) -> float:
    """The normal quantile of a two-sided interval: 1.96 of 0.95."""
    return NORMAL.inv_cdf(0.5 + level / 2)


def detectable(error: float, level: float) -> float:
    """The smallest true effect seen in 80 % of studies with such a standard error."""
    return (normal(level) + NORMAL.inv_cdf(POWER)) * error


def wilson(hits: int | float, n: int, level: float = 0.95) -> Interval:
    """The interval of a share, hits out of n, by Wilson's formula: also at none and at all, and of small n.

    Args:
        hits: how many of the n; a fraction where a prompt counts in part.
        n: how many there are, each by itself; of clusters, use `Bootstrap(clusters=…)`.
        level: how sure.

    Raises:
        PlanError: no n, or more hits than n.
    """
    n = whole("stats.wilson: n", n, 1)
    level = share("stats.wilson: level", level)
    if not isinstance(hits, (int, float, np.number)) or not 0 <= hits <= n:
        raise PlanError(wrong("stats.wilson: hits", f"a number between 0 and n = {n}", hits))
    p, z = float(hits) / n, normal(level)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At the ends the formula gives exactly 0 and 1, rounding does not
    low, high = (0.0 if not hits else middle - half), (1.0 if hits == n else middle + half)
    return Interval(p, low, high, math.sqrt(p * (1 - p) / n), level, "Wilson", "share", n, n)
