"""Effective rank after a layer over that before it, and what the same ratio is at any other layer.

    ρ_i(c) = mean_{l ≥ c} ER_i(l) / mean_{l < c} ER_i(l), of each sample i; c comes from other samples
    mean ρ and mean ln ρ over samples with their intervals
    random cuts   mean ln ρ(c') at every cut c' = 1 … L - 1: any trend has ρ ≠ 1 everywhere, so c must stand out
    ratio of ratios   ρ_i of visual rows over ρ_i of text rows

Source: ours, after the definitions in docs/methods/geometry.md.
Shapes: curves `[sample layer]`.
Must equal: flat curves give 1; a step at c gives its height, and is the most extreme cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

import interp_core as ic
from interp_core import stats


@dataclass(frozen=True, eq=False)
class CutRatio:
    """The ratio at a cut, beside that at all cuts.

    Attributes:
        cut: the layer, c.
        ratio: mean over samples of each sample's ratio.
        log: mean over samples of its logarithm; 0 if nothing changes.
        cuts: mean logarithm at each cut 1 … L - 1.
        low, high: the band of random cuts: 2.5 and 97.5 % of `cuts` but the one itself.
        p: share of all cuts whose mean logarithm is as far from 0, the cut itself counted; 1 / (L - 1) at best.
        per_sample: each sample's ratio at the cut.
    """

    cut: int
    ratio: stats.Interval
    log: stats.Interval
    cuts: Float[np.ndarray, " cut"]
    low: float
    high: float
    p: float
    per_sample: Float[np.ndarray, " sample"]

    @property
    def stands_out(self) -> bool:
        """Whether the interval of the logarithm excludes 0 and lies outside the band of random cuts."""
        return self.log.excludes(0) and (self.log.low > self.high or self.log.high < self.low)

    def row(self) -> dict[str, Any]:
        """Numbers for a table."""
        ends = {"cuts_low": self.low, "cuts_high": self.high, "p_cut": self.p}
        return {"cut": self.cut} | self.ratio.row() | {"log": self.log.value} | ends

    def __str__(self) -> str:
        return (
            f"effective rank from layer {self.cut} on over before it: {self.ratio:.3f}; its logarithm {self.log:.3f} "
            f"against {self.low:.3f} to {self.high:.3f} at random cuts (p {self.p:.2g})"
        )


def cut_ratio(curves: Any, cut: int, boot: stats.Bootstrap | None = None) -> CutRatio:
    """The ratio of effective ranks at a layer.

    Args:
        curves: effective ranks `[sample layer]`.
        cut: the first layer that counts as after, 1 to L - 1; found on other samples than these.
        boot: intervals over samples; clusters where samples share an image.

    Raises:
        PlanError: no such curves or cut.
    """
    values = _curves(curves)
    n_layers = values.shape[1]
    if isinstance(cut, bool) or not isinstance(cut, (int, np.integer)) or not 1 <= cut < n_layers:
        raise ic.PlanError(
            ic.errors.wrong("cut_ratio: cut", f"a layer, 1 to {n_layers - 1}: one has to be before", cut)
        )
    before = values.cumsum(1)[:, :-1] / np.arange(1, n_layers)
    after = values[:, ::-1].cumsum(1)[:, ::-1][:, 1:] / np.arange(n_layers - 1, 0, -1)
    logs = np.log(after / before)
    of_cuts = logs.mean(0)
    # the cut itself is not among those that it is held against
    others = np.delete(of_cuts, cut - 1) if n_layers > 2 else of_cuts
    low, high = np.quantile(others, [0.025, 0.975])
    boot = boot or stats.Bootstrap()
    extreme = float((np.abs(of_cuts) >= np.abs(of_cuts[cut - 1]) - 1e-12).mean())
    ratios = (after / before)[:, cut - 1]
    return CutRatio(
        int(cut), boot.mean(ratios, name="ratio of effective ranks"), boot.mean(logs[:, cut - 1], name="its logarithm"),
        of_cuts, float(low), float(high), extreme, ratios,
    )  # fmt: skip


def ratio_of_ratios(visual: Any, text: Any, cut: int, boot: stats.Bootstrap | None = None) -> stats.Interval:
    """Each sample's ratio of visual rows over its ratio of text rows; their mean with its interval.

    Raises:
        PlanError: no such curves or cut, or of other samples.
    """
    here, there = cut_ratio(visual, cut, boot).per_sample, cut_ratio(text, cut, boot).per_sample
    if len(here) != len(there):
        raise ic.PlanError(f"ratio_of_ratios: {len(here)} samples of visual rows, {len(there)} of text rows")
    return (boot or stats.Bootstrap()).mean(here / there, name="ratio of ratios")


def _curves(curves: Any) -> Float[np.ndarray, "sample layer"]:
    values = np.asarray(curves, dtype=np.float64)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all() or not (values > 0).all():
        raise ic.PlanError(
            "effective ranks [sample layer] above 0, of two samples and layers at least, are needed; these have shape "
            f"{list(values.shape)}, {int((~(values > 0)).sum())} are not above 0"
        )
    return values
