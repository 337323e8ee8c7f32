"""Deletion and insertion curves of an image, and their areas.

    s            mean log-probability of the answer's tokens, thinking and answer teacher-forced
    deletion     n_i = clip((s_i - s_K) / (s_0 - s_K), 0, 1), its running minimum; from the image to blur
    insertion    the same from blur to the image, its running maximum
    AUC          trapezoids over the share of regions; deletion: lower is better, insertion: higher
    MAS          as for texts (`faithfulness`), with the share of the positive score that is left

Where the blurred image is as good, |s_0 - s_K| ≤ 1e-8, the curves are straight lines, and where it is better they say
nothing either: both are marked degenerate, and counted.

Source: Petsiuk et al. (2018), arXiv:1806.07421; the normalisation is that of the curves of texts (`areas`), as in
FlashTrace's multimodal evaluation (arXiv:2602.01914).
Cost: none here: the scores are of steps + 1 images deleted and as many inserted, the ends shared.
Must equal: curves by hand (tests/test_visual_localisation.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

import interp_core as ic

from ..attribution.evaluation.areas import normalised
from ..attribution.evaluation.faithfulness import alignment
from .regions import Regions


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves of one map on one image.

    Attributes:
        deletion_auc, insertion_auc: areas; lower and higher are better.
        mas: lower is better.
        deletion, insertion: normalised, from nothing to everything.
        shares: of the regions that are deleted or inserted.
        density: the share of the positive score that is left.
        degenerate: the blurred image is as good or better.
        tied: the share of regions whose order is the rule's.
    """

    deletion_auc: float
    insertion_auc: float
    mas: float
    deletion: Float[np.ndarray, " step"]
    insertion: Float[np.ndarray, " step"]
    shares: Float[np.ndarray, " step"]
    density: Float[np.ndarray, " step"]
    degenerate: bool
    tied: float

    def record(self) -> dict[str, float]:
        """The numbers by name."""
        return {"deletion": self.deletion_auc, "insertion": self.insertion_auc, "mas": self.mas}


def perturbation_curves(regions: Regions, deleted: Sequence[float], inserted: Sequence[float]) -> Curves:
    """Curves and areas of the scores of `perturbed`'s images.

    Args:
        regions: in their order.
        deleted, inserted: the model's mean log-probability of the answer on each of them, steps + 1 numbers.

    Raises:
        PlanError: another number of them, numbers that are none, or ends that do not meet.
    """
    for name, numbers in (("deleted", deleted), ("inserted", inserted)):
        if len(numbers) != regions.steps + 1 or not np.isfinite(numbers).all():
            takes = f"{regions.steps + 1} finite numbers, one per image"
            raise ic.PlanError(ic.errors.wrong(f"perturbation_curves: {name}", takes, list(numbers)))
    down, up = (torch.as_tensor(np.asarray(numbers, dtype=np.float64))[None] for numbers in (deleted, inserted))
    # nothing deleted is everything inserted: scores in another order, or of other images, show here
    apart = max(abs(float(down[0, 0] - up[0, -1])), abs(float(down[0, -1] - up[0, 0])))
    if apart > ENDS * (1 + float(torch.maximum(down.abs().max(), up.abs().max()))):
        raise ic.PlanError(
            f"perturbation_curves: the ends differ by {apart:.2g}: the first image of `deleted` is the last of "
            "`inserted`, and the last is the first"
        )
    counts = np.bincount(regions.step, minlength=regions.steps)
    shares = np.concatenate([[0.0], counts.cumsum() / counts.sum()])
    positive = regions.scores.clip(0)
    gone = np.bincount(regions.step, weights=positive, minlength=regions.steps).cumsum()
    # a map with nothing above 0 says no order: its density falls as evenly as the regions do
    left = (1 - gone / positive.sum()).clip(0) if positive.any() else 1 - shares[1:]
    density = np.concatenate([[1.0], left])
    at = torch.as_tensor(shares)
    deletion, insertion, degenerate = normalised(down, up, at)
    mas = alignment(deletion, torch.as_tensor(density)[None])[0, 1]
    areas = [float(torch.trapezoid(curve, at, dim=1)) for curve in (deletion, insertion)]
    return Curves(
        areas[0], areas[1], float(mas), deletion[0].numpy(), insertion[0].numpy(), shares, density, bool(degenerate),
        regions.tied,
    )  # fmt: skip


ENDS = 1e-3
"""How far the ends of the two curves may be apart, relative to the largest: rounding of another batch."""
