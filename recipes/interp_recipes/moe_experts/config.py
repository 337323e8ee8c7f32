"""Settings of the recipe `moe_experts`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from interp_plugins.router.points import Shape

import interp_core as ic

from ..configs import TreeConfig

ON_WHICH_NUMBERS_DEPEND = ("top_k", "threshold_percentile", "threshold_min", "max_samples", "layout")


class MoeExpertsConfig(TreeConfig):
    """Which pairs a mixture of experts routes, and what stands out in its usage of experts.

    Attributes:
        data_path: pairs, as docs/moe_pairs.md has them.
        top_k: experts per token (None: the model's own number). With another number than the model's, sets are the
            largest so many of the router's probabilities, a statistic that the model does not execute.
        threshold_percentile: cells of a difference map stand out from this percentile of all cells on.
        threshold_min: and from this size on, whatever the percentile says.
    """

    data_path: Path
    top_k: int | None = None
    threshold_percentile: float = 99.0
    threshold_min: float = 0.005

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers depend on, beside model and pairs."""
        return {name: getattr(self, name) for name in ON_WHICH_NUMBERS_DEPEND}

    def check(self, shape: Shape | None = None) -> None:
        """Refuse what is out of range, as far as it is known without the model.

        Raises:
            PlanError: naming setting and range.
        """
        if not 0 <= self.threshold_percentile <= 100:
            raise ic.PlanError(f"threshold_percentile is {self.threshold_percentile}: give 0 to 100")
        if not 0 <= self.threshold_min < math.inf:
            raise ic.PlanError(f"threshold_min is {self.threshold_min}: give 0 or more, a finite number")
        most = None if shape is None else shape.n_experts
        if self.top_k is not None and (self.top_k < 1 or (most is not None and self.top_k > most)):
            raise ic.PlanError(
                f"top_k is {self.top_k}: give 1 to {most or 'the number of experts'}, or leave it out for the model's "
                "own"
            )
