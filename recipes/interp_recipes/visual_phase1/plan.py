"""What the recipe `visual_phase1` measures, and at which layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from interp_plugins.visual.gates import Thresholds

import interp_core as ic
from interp_core import stats

from .samples import Mode

GRID = 13
"""Layers of the truncation grid at most, where none is given; the last is L."""


@dataclass(frozen=True)
class Plan:
    """What is measured; names as of the recipe's flags."""

    interventions: tuple[str, ...]
    blind: tuple[Mode, ...]
    null_image: Literal["jpeg", "none"]
    layers: tuple[int, ...] | None
    window: int
    tau: float
    adaptive_tau: bool
    tau_ratio: float
    cliff_boundary: int | None
    causal_record: str | None
    truncation_layers: tuple[int, ...] | None
    horizon_samples: int
    horizon_tokens: int | None
    keep_fractions: tuple[float, ...]
    random_subsets: int
    resamples: int
    seed: int
    thresholds: Thresholds

    def check(self, model: ic.Model) -> None:
        """Raises:
        PlanError: layers that the model does not have.
        """
        last = model.n_layers
        if self.cliff_boundary is not None and not 1 <= self.cliff_boundary < last:
            raise ic.PlanError(
                f"--cliff_boundary {self.cliff_boundary}: 1 to {last - 1} in this model of {last} layers"
            )
        truncated = self.truncation_layers  # at layer L nothing is taken away: the clean answers
        for name, layers, most in (("layers", self.layers, last - 1), ("truncation_layers", truncated, last)):
            for layer in layers or ():
                if not 0 <= layer <= most:
                    raise ic.PlanError(f"--{name} {layer}: 0 to {most} in this model of {last} layers")

    def boot(self, images: Sequence[str]) -> stats.Bootstrap:
        """Resamples of samples by their images."""
        return stats.Bootstrap(images, resamples=self.resamples, seed=self.seed)

    def bands(self, n_layers: int) -> list[tuple[int, int]]:
        """Quarters of the layers, in which alone the image is taken away."""
        width = -(-n_layers // 4)
        return [(start, min(start + width, n_layers)) for start in range(0, n_layers, width)]

    def grid(self, n_layers: int, cliff: int | None) -> list[int]:
        """Layers from which the image is taken away: the grid, layer 0, the boundary, and L, at which nothing is."""
        chosen = self.truncation_layers
        if chosen is None:
            chosen = tuple(np.unique(np.linspace(0, n_layers, min(GRID, n_layers + 1)).round().astype(int)).tolist())
        return sorted({*chosen, n_layers, *([] if cliff is None else [cliff])})
