"""The bootstrap: samples drawn again with replacement, a statistic of each draw, and the interval that they span.

    percentile   quantiles α/2 and 1 - α/2 of the resamples
    BCa          quantiles Φ(z₀ + (z₀ + z) / (1 - a (z₀ + z))) of z = ±Φ⁻¹(1 - α/2): z₀ = Φ⁻¹(share of resamples below
                 the statistic, ties half), a = Σ u³ / 6 (Σ u²)^(3/2) of the jackknife's deviations u, each over its
                 stratum's number of units
    band         value ± c · error, c the level's quantile over resamples of the largest |t| along the axes

What is drawn are units: samples, or whole clusters of them, in each stratum as many as it has. The same settings and
number of samples draw the same units whatever the statistic, so that statistics of one `Bootstrap` are paired.

Source: Efron (1987), "Better bootstrap confidence intervals"; Davison and Hinkley (1997), section 5.3 (strata), 5.2.
Cost: `resamples` evaluations, and one per unit for BCa; means, ratios and quantiles are one matrix product.
Must equal: scipy.stats.bootstrap on the same draws (percentile, BCa).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ..errors import PlanError
from ..progress import Progress
from .intervals import NORMAL, Band, Interval
from .samples import Units, aligned, numbers, one_of, share, units_of, whole

Counts = Float[np.ndarray, "resample sample"]
Draws = Float[np.ndarray, " resample *axes"]
Evaluate = Callable[[Counts], Draws]
Statistic = Callable[..., Any]
SMALL = 100
"""Units below which "auto" is BCa; above, both agree and the jackknife costs."""
FEW = 10
"""Units below which intervals are said to be too narrow."""


class _Resampled(NamedTuple):
    """A statistic of the samples, of every resample, and without each unit (None: not asked for)."""

    value: Float[np.ndarray, "*axes"]
    draws: Draws
    jackknife: Float[np.ndarray, " unit *axes"] | None
    units: Units
    note: str


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Settings of a bootstrap, and the intervals that it gives.

    Attributes:
        clusters: a label per sample (an image, a document; a list, an array or a tensor): samples of one label are
            drawn together, since they are not independent. None: each by itself.
        strata: a label per sample (a task, a class): every resample has as many units of each as the samples.
        level: how sure, 0.95 for 95 % intervals; 0.9 for a one-sided bound of 95 %.
        method: "bca", "percentile", or "auto": BCa below 100 units.
        resamples: how many.
        seed: of the draws.

    Raises:
        PlanError: settings out of range; of every method: samples that are empty, not finite, of different lengths, in
            fewer than two units.
    """

    clusters: Any = None
    strata: Any = None
    level: float = 0.95
    method: Literal["auto", "bca", "percentile"] = "auto"
    resamples: int = field(default=2000, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        share("stats.Bootstrap: level", self.level)
        one_of("stats.Bootstrap: method", self.method, ("auto", "bca", "percentile"))
        whole("stats.Bootstrap: resamples", self.resamples, 100)
        whole("stats.Bootstrap: seed", self.seed, 0)

    def mean(self, values: Any, *, name: str = "mean") -> Interval:
        """The mean of numbers `[sample]`; of shares in small numbers that may all be the same, see `wilson`."""
        x = numbers("Bootstrap.mean: values", values)
        return self._interval(name, len(x), _means(x))

    def quantile(self, values: Any, q: float, *, name: str = "") -> Interval:
        """A quantile of numbers `[sample]`, between two of them by a straight line; q = 0.5 is the median."""
        x, q = numbers("Bootstrap.quantile: values", values), share("Bootstrap.quantile: q", q, ends=True)
        return self._interval(name or ("median" if q == 0.5 else f"quantile {q:g}"), len(x), _quantiles(x, q))

    def ratio(self, above: Any, below: Any, *, name: str = "ratio of sums") -> Interval:
        """The sum of one over the sum of another, of the same samples: rates per token, shares of an effect."""
        arrays = numbers("Bootstrap.ratio: above", above), numbers("Bootstrap.ratio: below", below)
        aligned("Bootstrap.ratio", above=arrays[0], below=arrays[1])

        def evaluate(counts: Counts) -> Draws:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray((counts @ arrays[0]) / (counts @ arrays[1]))

        return self._interval(name, len(arrays[0]), evaluate)

    def difference(self, first: Any, second: Any, *, paired: bool = True, name: str = "mean difference") -> Interval:
        """The mean of one minus the mean of another.

        Args:
            first, second: numbers `[sample]`.
            paired: of the same samples in the same order. Otherwise of two groups, each drawn by itself; clusters and
                strata, if any, have labels for the first group and then the second.
            name: what the number is.
        """
        a, b = numbers("Bootstrap.difference: first", first), numbers("Bootstrap.difference: second", second)
        if paired:
            aligned("Bootstrap.difference (paired=False for two groups)", first=a, second=b)
            return self._interval(name, len(a), _means(a - b))
        group = [0] * len(a) + [1] * len(b)
        labels = group if self.strata is None else list(zip(group, self.strata, strict=False))
        here, there = np.array(group) == 0, np.array(group) == 1

        def evaluate(counts: Counts) -> Draws:
            return _means(a)(counts[:, here]) - _means(b)(counts[:, there])

        return replace(self, strata=labels)._interval(name, len(group), evaluate)

    def of(self, statistic: Statistic, *samples: Any, name: str = "") -> Interval:
        """Any statistic.

        Args:
            statistic: gets the samples of one resample, arrays whose first axis is `sample`, and returns one number.
            samples: arrays of the same samples, drawn together.
            name: what the number is; else the function's name.
        """
        arrays = _arrays("Bootstrap.of", samples)
        label = name or getattr(statistic, "__name__", "statistic").strip("<>")
        return self._interval(label, len(arrays[0]), _calls(statistic, arrays))

    def band(
        self,
        *samples: Any,
        axes: Sequence[str],
        statistic: Statistic | None = None,
        simultaneous: bool = False,
        name: str = "",
    ) -> Band:
        """A curve or map with its band.

        Args:
            samples: numbers `[sample *axes]`; for a statistic, any arrays whose first axis is `sample`.
            axes: names of what comes out: `("layer",)`.
            statistic: gets the samples of one resample, returns numbers `[*axes]`. None: means over samples.
            simultaneous: a band for the curve as a whole, of one width in standard errors; else one interval per place.
            name: what the numbers are.
        """
        arrays = _arrays("Bootstrap.band", samples)
        if statistic is None and len(arrays) > 1:
            raise PlanError(f"Bootstrap.band: means are of one array, not {len(arrays)}; give a statistic of them")
        label = name or getattr(statistic, "__name__", "mean").strip("<>")
        evaluate = _means(arrays[0]) if statistic is None else _calls(statistic, arrays)
        drawn = self._resampled(label, len(arrays[0]), evaluate, jackknife=not simultaneous)
        if drawn.value.ndim != len(axes) or not drawn.value.ndim:
            raise PlanError(f"Bootstrap.band: axes {tuple(axes)} do not name numbers of shape {drawn.value.shape}")
        error = (drawn.draws - drawn.value).std(0, ddof=1)
        low, high, method, note = self._whole(drawn, error) if simultaneous else self._ends(drawn)
        return Band(
            drawn.value, low, high, error, tuple(axes), simultaneous, self.level, method, label, len(arrays[0]),
            drawn.units.count, self.resamples, self.seed, "; ".join(filter(None, (drawn.note, note))),
        )  # fmt: skip

    def draws(self, statistic: Statistic, *samples: Any) -> Draws:
        """A statistic of every resample `[resample *axes]`, for what an interval cannot say: the mode of a layer."""
        arrays = _arrays("Bootstrap.draws", samples)
        return self._resampled("draws", len(arrays[0]), _calls(statistic, arrays), jackknife=False).draws

    def _interval(self, name: str, n: int, evaluate: Evaluate) -> Interval:
        drawn = self._resampled(name, n, evaluate, jackknife=True)
        if drawn.value.shape:
            raise PlanError(f"bootstrap of {name}: one number is wanted, not {drawn.value.shape}; use `band`")
        low, high, method, note = self._ends(drawn)
        error = float((drawn.draws - drawn.value).std(ddof=1))
        note = "; ".join(filter(None, (drawn.note, note)))
        return Interval(
            float(drawn.value), float(low), float(high), error, self.level, method, name, n, drawn.units.count,
            self.resamples, self.seed, note,
        )  # fmt: skip

    def _resampled(self, name: str, n: int, evaluate: Evaluate, jackknife: bool) -> _Resampled:
        """Value, resamples and jackknife of a statistic; resamples without a number are left out, and counted."""
        units = units_of(f"bootstrap of {name}", n, self.clusters, self.strata)
        value = evaluate(np.ones((1, n)))[0]
        if np.isnan(value).any():
            raise PlanError(
                f"bootstrap of {name}: it is not a number on the {n} samples themselves. A correlation needs two sides "
                "that vary, a ratio a sum that is not 0"
            )
        bca = jackknife and (self.method == "bca" or (self.method == "auto" and units.count < SMALL))
        with Progress(f"bootstrap of {name}", self.resamples + (units.count if bca else 0)) as progress:
            draws = _evaluated(evaluate, units.drawn(self.resamples, self.seed), progress)
            left = _evaluated(evaluate, units.without_each(), progress) if bca else None
        good = np.isfinite(draws.reshape(len(draws), -1)).all(1)
        if good.sum() < max(2, len(good) / 2):
            raise PlanError(f"bootstrap of {name}: {int((~good).sum())} of {len(good)} resamples give no number")
        draws = draws[good]
        rounding = 4 * n * np.finfo(np.float64).eps * np.abs(draws).max(0)  # of a sum of n numbers
        draws = np.where(draws.max(0) - draws.min(0) <= rounding, value, draws)
        notes = [] if good.all() else [f"{int((~good).sum())} resamples give no number and are left out"]
        if units.count < FEW:
            notes.append(f"only {units.count} units: a bootstrap of so few is too narrow")
        return _Resampled(value, draws, left, units, "; ".join(notes))

    def _ends(self, drawn: _Resampled) -> tuple[np.ndarray, np.ndarray, str, str]:
        """Ends of an interval at each place, the method's name, and what is to be said."""
        tails = np.array([(1 - self.level) / 2, (1 + self.level) / 2])
        low, high = map(np.asarray, np.quantile(drawn.draws, tails, axis=0))
        notes = []
        if still := int((drawn.draws.min(0) == drawn.draws.max(0)).sum()):
            where = "" if not drawn.value.shape else f" at {still} of {drawn.value.size} places"
            notes.append(
                f"every resample gives the same{where}: the samples do not vary, and the interval has no width"
            )
        if drawn.jackknife is None:
            return low, high, "percentile bootstrap", "; ".join(notes)
        ends, odd = _bca(drawn, drawn.jackknife, tails)
        low, high = np.where(odd, low, ends[0]), np.where(odd, high, ends[1])
        if odd.sum() > still:
            notes.append(
                f"no BCa at {int(odd.sum()) - still} place(s), where all resamples lie on one side of the value or "
                "leaving out a unit leaves no number: percentiles there"
            )
        return low, high, "BCa bootstrap", "; ".join(notes)

    def _whole(self, drawn: _Resampled, error: np.ndarray) -> tuple[np.ndarray, np.ndarray, str, str]:
        """Ends of a simultaneous band."""
        moves = error > 0
        t = np.abs(drawn.draws - drawn.value)[:, moves] / error[moves]
        width = np.quantile(t.max(1), self.level) * error if moves.any() else error
        note = "" if moves.all() else f"{int((~moves).sum())} place(s) do not vary over resamples, and have no width"
        return drawn.value - width, drawn.value + width, "max-|t| bootstrap", note


def _bca(
    drawn: _Resampled, jackknife: Float[np.ndarray, " unit *axes"], tails: Float[np.ndarray, " 2"]
) -> tuple[Float[np.ndarray, " 2 *axes"], np.ndarray]:
    """BCa's ends at each place, and where there are none."""
    draws, value = drawn.draws.reshape(len(drawn.draws), -1), drawn.value.reshape(-1)
    left = np.where(np.isfinite(jackknife), jackknife, np.nan).reshape(len(jackknife), -1)
    below = ((draws < value).mean(0) + (draws <= value).mean(0)) / 2
    cubes, squares = np.zeros(len(value)), np.zeros(len(value))
    for units in (units for units in drawn.units.strata if len(units) > 1):
        u = (len(units) - 1) * (left[units].mean(0) - left[units]) / len(units)
        cubes, squares = cubes + (u**3).sum(0), squares + (u**2).sum(0)
    ends = np.zeros((2, len(value)))
    odd = (below <= 0) | (below >= 1) | (draws.min(0) == draws.max(0)) | np.isnan(squares)
    for place in np.flatnonzero(~odd):
        z0 = NORMAL.inv_cdf(below[place])
        a = cubes[place] / (6 * squares[place] ** 1.5) if squares[place] > 0 else 0.0
        z = [z0 + NORMAL.inv_cdf(tail) for tail in tails]
        levels = [NORMAL.cdf(z0 + part / (1 - a * part)) for part in z]
        ends[:, place] = np.quantile(draws[:, place], levels)
    return ends.reshape(2, *drawn.value.shape), odd.reshape(drawn.value.shape)


def _evaluated(evaluate: Evaluate, blocks: Iterator[Counts], progress: Progress) -> Draws:
    """A statistic of every resample."""
    values = []
    for counts in blocks:
        values.append(evaluate(counts))
        progress.add(len(counts))
    return np.concatenate(values)


def _arrays(owner: str, samples: Sequence[Any]) -> list[Float[np.ndarray, "sample ..."]]:
    """Arrays that are drawn together."""
    if not samples:
        raise PlanError(f"{owner} takes samples, none were given")
    arrays = [numbers(f"{owner}: sample array {i}", array, ndim=None) for i, array in enumerate(samples)]
    aligned(owner, **{f"array {i}": array for i, array in enumerate(arrays)})
    return arrays


def _means(values: Float[np.ndarray, " sample *axes"]) -> Evaluate:
    """Means along all axes but the first, of every resample."""
    flat = values.reshape(len(values), -1)

    def evaluate(counts: Counts) -> Draws:
        with np.errstate(invalid="ignore"):  # a group of one, left out
            return (counts @ flat / counts.sum(1, keepdims=True)).reshape(len(counts), *values.shape[1:])

    return evaluate


def _quantiles(values: Float[np.ndarray, " sample"], q: float) -> Evaluate:
    """Quantiles of every resample, from how often it has each of the sorted values."""
    order = np.argsort(values, kind="stable")
    rising = values[order]

    def evaluate(counts: Counts) -> Draws:
        upto = counts[:, order].cumsum(1)
        place = (upto[:, -1] - 1) * q
        below = np.floor(place)
        first, second = ((upto > step[:, None]).argmax(1) for step in (below, np.ceil(place)))
        return np.asarray(rising[first] + (place - below) * (rising[second] - rising[first]))

    return evaluate


def _calls(statistic: Statistic, arrays: Sequence[Float[np.ndarray, "sample ..."]]) -> Evaluate:
    """A function of the samples, called on every resample."""

    def evaluate(counts: Counts) -> Draws:
        everyone = np.arange(counts.shape[1])
        picks = (np.repeat(everyone, row.astype(np.int64)) for row in counts)
        return np.stack([np.asarray(statistic(*(a[pick] for a in arrays)), dtype=np.float64) for pick in picks])

    return evaluate
