"""What the recipe `moe_experts` finds: matrices, curves with bands, lists with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from interp_plugins.pairs.pair import SIDES, Side
from interp_plugins.pairs.routing import VIEWS, View, usage_of
from interp_plugins.router.divergence import Chance
from interp_plugins.router.points import Points, Shape, Thresholded, points_of, thresholded
from interp_plugins.router.usage import Usage, total_variation
from jaxtyping import Float
from torch import Tensor

from interp_core import stats

from .config import MoeExpertsConfig

Curve = Literal["tv", "jaccard", "intersection"]
CURVES: tuple[Curve, ...] = ("tv", "jaccard", "intersection")
LISTS = ("agentic_minus_assisted", "assisted_minus_agentic", "agentic")
"""Ranked lists of the last token's usage."""
TOP = 20
"""Cells of a list that get intervals."""


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that is written, worked out of the samples' sums.

    Attributes:
        settings: what was asked for.
        shape: of the model.
        names: of the samples.
        sums: `pairs.routing.pair_sums` of all samples.
        dropped: samples and targets that were left out.
        layouts: of the assisted contexts.
        source: where the pairs came from.
    """

    settings: MoeExpertsConfig
    shape: Shape
    names: Sequence[str]
    sums: Mapping[str, Tensor]
    dropped: Sequence[Mapping[str, Any]]
    layouts: Sequence[str]
    source: str

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that have a router: rows of every matrix."""
        return self.shape.moe_layers

    @property
    def top_k(self) -> int:
        """Experts per token in every set."""
        return self.settings.top_k or self.shape.top_k

    @property
    def executed(self) -> bool:
        """Whether sets are those that the model executes."""
        return self.top_k == self.shape.top_k

    @cached_property
    def usage(self) -> Mapping[tuple[View, Side], Usage]:
        """Usage of both views and contexts."""
        both = itertools.product(VIEWS, SIDES)
        return {(view, side): usage_of(self.sums, view, side, self.layers) for view, side in both}

    def matrix(self, view: View, side: Side) -> Float[np.ndarray, "layer expert"]:
        """Normalised weights, averaged over the view's targets of all samples."""
        return self.usage[view, side].matrix().numpy()

    def difference(self, view: View) -> Float[np.ndarray, "layer expert"]:
        """Usage of the agentic context minus that of the assisted one."""
        return self.matrix(view, "agentic") - self.matrix(view, "assisted")

    @cached_property
    def thresholded(self) -> Mapping[View, Thresholded]:
        """Cells that stand out."""
        settings = self.settings
        return {
            v: thresholded(self.difference(v), settings.threshold_percentile, settings.threshold_min) for v in VIEWS
        }

    @property
    def targets(self) -> list[int]:
        """Number of targets of each sample."""
        return [int(n) for n in self.sums["all_agentic_tokens"][:, 0]]

    @cached_property
    def boot(self) -> stats.Bootstrap:
        """One for all numbers, so that they are paired."""
        return stats.Bootstrap()

    @property
    def few(self) -> str:
        """What is to be said of the number of samples; "" where there are enough."""
        n = len(self.names)
        return (
            "There is one sample, and intervals need two." if n == 1
            else f"Intervals of {n} samples are narrower than the truth." if n < 10 else ""
        )  # fmt: skip

    def curve(self, name: str) -> Float[np.ndarray, " layer"]:
        """Mean over samples of each one's mean over its targets."""
        return self.sums[f"curve_{name}"].mean(0).numpy()

    @cached_property
    def bands(self) -> Mapping[str, stats.Band]:
        """The curves with 95 % intervals over samples; none of one sample."""
        if len(self.names) < 2:
            return {}
        return {name: self.boot.band(self.sums[f"curve_{name}"], axes=("layer",), name=name) for name in CURVES}

    @property
    def chance(self) -> Mapping[Curve, float]:
        """What random sets give: of equal weights, for the total variation. Nothing where sets hold every expert."""
        if self.top_k == self.shape.n_experts:
            return {}
        chance = Chance.of(self.top_k, self.shape.n_experts)
        return {"tv": 1 - chance.overlap, "jaccard": chance.jaccard, "intersection": chance.intersection}

    @cached_property
    def points(self) -> Mapping[str, Points]:
        """Ranked cells of the last token's usage, by the names of their lists."""
        a, b = (self.matrix("last", side) for side in SIDES)
        said = {
            "agentic_minus_assisted": (a - b, "usage_weight last agentic-assisted"),
            "assisted_minus_agentic": (b - a, "usage_weight last assisted-agentic"),
            "agentic": (a, "usage_weight last agentic"),
        }
        return {
            name: points_of(
                values, self.layers, a=a, b=b, statistic=statistic, shape=self.shape, positive=name != "agentic"
            )
            for name, (values, statistic) in said.items()
        }

    def top_rows(self, view: View) -> list[dict[str, Any]]:
        """The cells of largest difference in size, with paired intervals over samples."""
        difference = self.difference(view)
        order = np.argsort(-np.abs(difference).ravel(), kind="stable")[:TOP]
        rows, experts = np.unravel_index(order, difference.shape)
        sums = [self.sums[f"{view}_{side}_weight"].numpy()[:, rows, experts] for side in SIDES]
        tokens = self.sums[f"{view}_agentic_tokens"].numpy()[:, 0]
        band = None
        if len(self.names) > 1:
            band = self.boot.band(
                sums[0] - sums[1], tokens, axes=("cell",), statistic=lambda d, n: d.sum(0) / n.sum(), name="difference"
            )
        return [
            {
                "view": view, "layer": self.layers[row], "expert": int(expert),
                "difference": float(difference[row, expert]), "low": float(band.low[i]) if band else "",
                "high": float(band.high[i]) if band else "",
                **{side: float(self.matrix(view, side)[row, expert]) for side in SIDES},
            }
            for i, (row, expert) in enumerate(zip(rows, experts, strict=True))
        ]  # fmt: skip

    def layer_rows(self) -> list[dict[str, Any]]:
        """A row per layer: the published columns first."""
        count = {"n_tokens_all": sum(self.targets), "n_tokens_last": len(self.names)}
        usage = {view: total_variation(*(self.matrix(view, side) for side in SIDES)) for view in VIEWS}
        rows = []
        for i, layer in enumerate(self.layers):
            row: dict[str, Any] = {"layer": layer}
            row |= {f"{name}_topk": float(self.curve(name)[i]) for name in CURVES} | count
            for name, band in self.bands.items():
                row |= {f"{name}_topk_low": float(band.low[i]), f"{name}_topk_high": float(band.high[i])}
            row |= {f"{name}_chance": self.chance.get(name, "") for name in CURVES}
            row |= {"tv_full": float(self.curve("tv_full")[i]), "top1_same": float(self.curve("top1_same")[i])}
            row |= {f"{name}_topk_last": float(self.curve(f"{name}_last")[i]) for name in CURVES}
            row |= {f"tv_usage_{view}": float(usage[view][i]) for view in VIEWS}
            sums = {side: float(self.usage["all", side].executed_sum[i]) for side in SIDES}
            rows.append(row | {f"weight_sum_{side}": value for side, value in sums.items()})
        return rows

    def arrays(self) -> dict[str, np.ndarray]:
        """The matrices by the published names, then ours."""
        arrays: dict[str, np.ndarray] = {}
        for view in VIEWS:
            arrays |= {f"avg_{view}_{side}": self.matrix(view, side) for side in SIDES}
        arrays |= {f"diff_{view}": self.difference(view) for view in VIEWS}
        arrays |= {f"thresholded_{view}": self.thresholded[view].map for view in VIEWS}
        arrays |= {f"{name}_mean": self.curve(name) for name in CURVES}
        for name, band in self.bands.items():
            arrays |= {f"{name}_low": band.low, f"{name}_high": band.high}
        arrays |= {f"{name}_persample": self.sums[f"curve_{name}"].numpy() for name in CURVES}
        arrays |= {f"threshold_{view}": np.array(self.thresholded[view].threshold) for view in VIEWS}
        arrays |= {f"count_{v}_{s}": self.usage[v, s].counts.numpy() for v, s in itertools.product(VIEWS, SIDES)}
        return arrays | {"layers": np.array(self.layers), "samples": np.array(self.names)}
