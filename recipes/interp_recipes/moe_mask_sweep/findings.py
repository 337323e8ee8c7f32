"""Statistics of a mask sweep: rises over the run without a mask, with intervals over samples, and areas between orders.

    rise        of a sample: its number under the mask minus without; over random orders, their mean
    area        of a sample: trapezoids under rise(order) - rise(random) over N, divided by the range of N: nats

N = 0, where every rise is 0, belongs to the area. Intervals are bootstrap intervals over samples
(`interp_core.stats`), the same resamples for every number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from interp_plugins.pairs.pair import SIDES
from jaxtyping import Float

from interp_core import stats

from .measures import Row, row_key
from .orders import Variant

METRICS = ("nll_all", "nll_last", "top1", "exact", "score")
RANDOM = ("random", "usage_random")


@dataclass(frozen=True)
class Findings:
    """Rows of a sweep, and what they say.

    Attributes:
        variants: all masks, skipped ones among them.
        samples: names.
        rows: one per sample, context and mask that was run.
        sizes: numbers of banned cells.
        kinds, modes: orders and modes, in their order.
        seed, resamples: of the bootstrap.
    """

    variants: Sequence[Variant]
    samples: Sequence[str]
    rows: Sequence[Row]
    sizes: Sequence[int]
    kinds: Sequence[str]
    modes: Sequence[str]
    seed: int
    resamples: int

    @cached_property
    def by_id(self) -> dict[str, Row]:
        """Rows by their names."""
        return {row["id"]: _full(row) for row in self.rows}

    @property
    def metrics(self) -> list[str]:
        """Those that there are."""
        return [name for name in METRICS if name != "score" or any("score" in row for row in self.rows)]

    @property
    def bootstrap(self) -> stats.Bootstrap | None:
        """None where there is one sample."""
        return stats.Bootstrap(resamples=self.resamples, seed=self.seed) if len(self.samples) > 1 else None

    def each(self, variant: Variant, side: str, metric: str) -> Float[np.ndarray, " sample"]:
        """The metric of every sample under a mask; NaN if it was skipped."""
        if variant.skipped:
            return np.full(len(self.samples), np.nan)
        return np.array([self.by_id[row_key(name, side, variant)][metric] for name in self.samples], dtype=float)  # type: ignore[arg-type]

    def clean(self, side: str, metric: str) -> Float[np.ndarray, " sample"]:
        """The metric of every sample without a mask."""
        return self.each(self.variants[0].clean, side, metric)

    def of(self, mode: str, kind: str, n: int) -> list[Variant]:
        """The masks of a mode, a kind of order and a size, one per draw."""
        return [v for v in self.variants if (v.mode, v.order.kind, v.n) == (mode, kind, n)]

    def rise(self, mode: str, kind: str, n: int, side: str, metric: str) -> Float[np.ndarray, " sample"]:
        """The rise of every sample, mean over draws; NaN where a draw was skipped."""
        masked = np.stack([self.each(variant, side, metric) for variant in self.of(mode, kind, n)])
        return np.asarray(masked.mean(0) - self.clean(side, metric))

    def interval(self, values: Float[np.ndarray, " sample"]) -> tuple[float, float, float]:
        """Mean over samples, low and high; NaN ends of one sample, NaN altogether of skipped masks."""
        if not np.isfinite(values).all():
            return (np.nan, np.nan, np.nan)
        if self.bootstrap is None or np.ptp(values) == 0:
            ends = (np.nan, np.nan) if self.bootstrap is None else (float(values[0]), float(values[0]))
            return (float(values.mean()), *ends)
        mean = self.bootstrap.mean(values)
        return mean.value, mean.low, mean.high

    def lines(self) -> list[dict[str, Any]]:
        """The table: a line per mode, order, draw and N, N = 0 first."""
        clean = self.variants[0].clean
        return [self._line(clean, "none", "none"), *(self._line(v, v.mode, v.order.kind) for v in self.variants)]

    def _line(self, variant: Variant, mode: str, kind: str) -> dict[str, Any]:
        line: dict[str, Any] = {
            "mode": mode, "order": kind, "draw": variant.order.draw, "n": variant.n,
            "banned": {str(layer): list(experts) for layer, experts in variant.banned.items()},
            "skipped": variant.skipped,
        }  # fmt: skip
        for side in SIDES:
            for metric in self.metrics:
                line[f"{metric}_{side}"] = _number(self.each(variant, side, metric).mean())
            for metric in ("nll_all", "nll_last"):
                rise = self.each(variant, side, metric) - self.clean(side, metric)
                names = (f"{metric}_{side}_rise", f"{metric}_{side}_low", f"{metric}_{side}_high")
                line |= dict(zip(names, map(_number, self.interval(rise)), strict=True))
            line |= self._routing(variant, side)
        return line

    def _routing(self, variant: Variant, side: str) -> dict[str, Any]:
        """What the proofs count: share of slots that went to others, tokens left with all their experts."""
        counted = [
            row
            for name in self.samples
            if not variant.skipped
            if (row := self.by_id[row_key(name, side, variant)])["slots"]  # type: ignore[arg-type]
        ]
        slots = sum(row["slots"] for row in counted)
        return {
            f"slots_changed_{side}": sum(row["slots_changed"] for row in counted) / slots if slots else None,
            f"tokens_unmasked_{side}": sum(row["unmasked"] for row in counted) if slots else None,
        }

    def areas(self) -> list[dict[str, Any]]:
        """Area between the orders that are not random and each random kind, per mode, context and metric."""
        chance = [kind for kind in self.kinds if kind in RANDOM]
        ranked = [kind for kind in self.kinds if kind not in RANDOM]
        cells = product(self.modes, ranked, chance, SIDES, ("nll_all", "nll_last"))
        return [self._area(*cell) for cell in cells]

    def _area(self, mode: str, kind: str, chance: str, side: str, metric: str) -> dict[str, Any]:
        gaps, sizes = [np.zeros(len(self.samples))], [0]
        for n in self.sizes:
            gap = self.rise(mode, kind, n, side, metric) - self.rise(mode, chance, n, side, metric)
            if np.isfinite(gap).all():
                gaps.append(gap)
                sizes.append(n)
        line = {"mode": mode, "order": kind, "against": chance, "context": side, "metric": metric}
        if len(sizes) == 1:
            return line | {"sizes": 0, "area": None, "low": None, "high": None, "excludes_0": None}
        area = np.asarray(np.trapezoid(np.stack(gaps), sizes, axis=0)) / sizes[-1]
        value, low, high = self.interval(np.asarray(area))
        sure = bool(low > 0 or high < 0) if np.isfinite(low) else None
        return line | {
            "sizes": len(sizes) - 1, "area": value, "low": _number(low), "high": _number(high), "excludes_0": sure,
        }  # fmt: skip


def _full(row: Row) -> Row:
    """A row with the shares of its targets that come first, and whether all do."""
    return row | {"top1": row["hits"] / row["targets"], "exact": float(row["hits"] == row["targets"])}


def _number(value: float) -> float | None:
    """A number for JSON: None where there is none."""
    return float(value) if np.isfinite(value) else None
