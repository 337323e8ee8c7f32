"""The threshold τ of effective visual depth: from pilots, above the noise, and only where there is something to see.

    ν  97.5 % quantile over pilots and layers of |Δ| under a null intervention (the same image re-encoded; 0 if none)
    τ  fixed; or adaptive: max(ν, ratio · max_l Δ̄_pilot(l))

A study stops with "no visual dependence measurable" where the pilots' mean effect nowhere exceeds ν, or where blinding
them whole has no effect whose interval lies above 0: a threshold below 0, or pushed up to a floor, would measure noise.

Source: ours; the origin takes the mean at layer 0 and floors it at 1e-6, whatever its sign.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

import interp_core as ic
from interp_core import stats

from .depth import Delta

QUANTILE = 0.975
FEWEST = 8
"""Pilots that an adaptive τ needs."""


@dataclass(frozen=True)
class Threshold:
    """τ, and where it comes from.

    Attributes:
        tau: in nats.
        kind: how it was found.
        floor: ν, which it is not below if adaptive.
        ratio: of the pilots' peak.
        peak: max over layers of their mean effect; NaN without pilots.
        pilots: how many.
        blind_low: lower end of the interval of the effect of blinding them.
    """

    tau: float
    kind: Literal["fixed", "adaptive"]
    floor: float
    ratio: float
    peak: float
    pilots: int
    blind_low: float

    def row(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def __str__(self) -> str:
        how = f"{self.ratio:g} of the pilots' peak {self.peak:.4g}" if self.kind == "adaptive" else "as given"
        return f"τ = {self.tau:.4g} nats ({self.kind}: {how}; noise floor {self.floor:.3g}, {self.pilots} pilots)"


def noise_floor(null: Any) -> float:
    """ν of effects under an intervention that leaves what the image shows, `[sample layer]` or `[sample]`."""
    values = np.abs(np.asarray(null, dtype=np.float64)).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise ic.PlanError(
            f"noise floor: {len(values)} effects under the null intervention; all must be finite numbers"
        )
    return float(np.quantile(values, QUANTILE))


def threshold(
    pilots: Delta,
    *,
    blind: Float[np.ndarray, " sample"] | None = None,
    tau: float = 0.01,
    adaptive: bool = False,
    ratio: float = 0.1,
    floor: float = 0.0,
    boot: stats.Bootstrap | None = None,
) -> Threshold:
    """τ from the effects on pilots, who take no part in the estimates.

    Args:
        pilots: Δ of the pilots.
        blind: their Δ when the whole image is replaced; None: that at the first layer.
        tau: a fixed one.
        adaptive: find it from the pilots.
        ratio: of their peak.
        floor: ν.
        boot: with the pilots' images as clusters.

    Raises:
        PlanError: settings out of range, too few pilots, numbers that are not finite.
        EffectError: no visual dependence measurable.
    """
    values = np.asarray(pilots, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ic.PlanError(f"pilots are effects [sample layer], all finite; these are {list(values.shape)}")
    if not (tau > 0 and 0 < ratio <= 1 and floor >= 0):
        raise ic.PlanError(f"tau {tau:g}, tau_ratio {ratio:g}, floor {floor:g}: they are > 0, in (0, 1], and ≥ 0")
    if len(values) < (FEWEST if adaptive else 2):
        raise ic.PlanError(
            f"{len(values)} pilots: τ needs {FEWEST if adaptive else 2} at least; give more pilot samples"
        )
    whole = values[:, 0] if blind is None else np.asarray(blind, dtype=np.float64)
    mean = values.mean(0)
    interval = (boot or stats.Bootstrap()).mean(whole, name="effect of blinding the pilots")
    why = _nothing(mean, interval, floor)
    if why:
        raise ic.EffectError(
            f"no visual dependence measurable: {why}. Check that the answer is teacher-forced and read at the "
            "positions that predict it, that the model answers these questions, and that the blind images differ"
        )
    peak = float(mean.max())
    chosen = max(floor, ratio * peak) if adaptive else tau
    kind: Literal["fixed", "adaptive"] = "adaptive" if adaptive else "fixed"
    return Threshold(float(chosen), kind, float(floor), float(ratio), peak, len(values), float(interval.low))


def _nothing(mean: Float[np.ndarray, " layer"], blind: stats.Interval, floor: float) -> str:
    """Why pilots show no dependence; empty if they do."""
    if mean.max() <= floor:
        return f"the pilots' mean effect is {mean.max():.4g} nats at most, the noise floor {floor:.4g}"
    # the mean alone may be above 0 by luck, and a share of it would then be a threshold in noise
    if blind.low <= 0:
        return f"blinding the pilots takes {blind:.4g} nats, an interval that does not lie above 0"
    return ""


def histogram(pilots: Delta, least: float = 1e-3) -> list[dict[str, float]]:
    """The distribution of the pilots' effects over all layers, to choose τ by: rows `low`, `high` (exclusive, but for
    the last) and `count`.

    Bins are 1, 2, 5, 10, … times `least`, as effects span decades and τ lies low among them; below is a bin from 0 on,
    and one of what is below 0.
    """
    values = np.asarray(pilots, dtype=np.float64).ravel()
    edges = [float(values.min()), 0.0] if values.min() < 0 else [0.0]
    steps = (least * step * 10**decade for decade in range(400) for step in (1, 2, 5))
    while edges[-1] <= values.max():
        edges.append(next(steps))
    if len(edges) < 2:
        edges.append(next(steps))
    counts, _ = np.histogram(values, edges)
    return [{"low": low, "high": high, "count": int(n)} for low, high, n in zip(edges, edges[1:], counts, strict=False)]
