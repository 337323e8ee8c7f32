"""How well a map lies on evidence, with e evidence pixels and A pixels in each patch, and s its score.

    pointing    the mean, over all patches that tie at the maximum, of [e > 0]
    energy      Σ max(s, 0) e / A over Σ max(s, 0); 0 where nothing is above 0
    rank_auc    ROC AUC of pixels, each with its patch's score, ties half
    recall[q]   evidence pixels in the top ⌈q · patches⌉ (at least 1) over all evidence
    iou         the same budget as the evidence's share of the image, ⌈·⌉ patches: intersection over union in pixels

Ties at a budget's edge are shared: each tied patch counts by its chance to be drawn. Rank AUC is None where every pixel
is evidence.

Source: FlashTrace's multimodal evaluation (arXiv:2602.01914); the pointing game is Zhang et al.'s (2016).
Must equal: the same pixel by pixel, each pixel with its patch's score, and the mean over all orders of tied patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

import interp_core as ic
from interp_core import stats

from .evidence import Evidence

SHARES = (0.01, 0.05, 0.1, 0.2)
ROUNDING = 1e-9
"""Of a budget in patches: 0.1 · 30 is 3 patches, not 4."""


@dataclass(frozen=True)
class Hits:
    """How well a map lies on evidence.

    Attributes:
        pointing, energy, rank_auc, iou: see above; 1 is best.
        recall: by the share of patches.
        evidence: the evidence's share of the image, which a map of one value gets as its energy.
        tied: how many patches tie at the maximum.
    """

    pointing: float
    energy: float
    rank_auc: float | None
    recall: dict[float, float]
    iou: float
    evidence: float
    tied: int

    def record(self) -> dict[str, float | None]:
        """The numbers by name: "R@0.05" for recall."""
        numbers = {"pointing": self.pointing, "energy": self.energy, "rank_auc": self.rank_auc, "iou": self.iou}
        return numbers | {f"R@{share:g}": value for share, value in self.recall.items()} | {"evidence": self.evidence}


def hits(scores: Any, evidence: Evidence, shares: tuple[float, ...] = SHARES) -> Hits:
    """How well a map lies on evidence.

    Args:
        scores: `[row col]`, a number per patch, of any sign.
        evidence: of the same grid.
        shares: of patches, for recall.

    Raises:
        PlanError: a map of another grid, or with numbers that are none.
    """
    s = checked_map("hits", scores)
    if s.shape != evidence.pixels.shape:
        raise ic.PlanError(f"hits: the map is {s.shape}, the evidence is counted in patches {evidence.pixels.shape}")
    if not all(0 < share <= 1 for share in shares):
        raise ic.PlanError(ic.errors.wrong("hits: shares", "shares of patches, above 0 and up to 1", shares))
    s, e, area = s.ravel(), evidence.pixels.ravel(), evidence.area.ravel()
    top, positive = s == s.max(), s.clip(0)
    energy = float(positive @ evidence.share.ravel() / positive.sum()) if positive.any() else 0.0
    auc = stats.auroc(s, evidence.share.ravel(), area) if e.sum() < area.sum() else None
    whole = float(e.sum() / area.sum())
    chosen = _drawn(s, whole)
    both, budget = float(chosen @ e), float(chosen @ area)
    recall = {share: float(_drawn(s, share) @ e / e.sum()) for share in shares}
    pointing = float((e[top] > 0).mean())
    return Hits(pointing, energy, auc, recall, both / (budget + float(e.sum()) - both), whole, int(top.sum()))


def _drawn(scores: Float[np.ndarray, " patch"], share: float) -> Float[np.ndarray, " patch"]:
    """How much of each patch is among the top share: 1, 0, or its chance where it ties with others at the edge."""
    count = max(1, math.ceil(share * len(scores) - ROUNDING))
    edge = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, tied = scores > edge, scores == edge
    return above + tied * ((count - above.sum()) / tied.sum())


def checked_map(owner: str, scores: Any) -> Float[np.ndarray, "row col"]:
    """A map as numbers in float64.

    Raises:
        PlanError: it is no map, or not finite.
    """
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu().double().numpy()
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ic.PlanError(ic.errors.wrong(owner, "a map of numbers [row col]", scores)) from error
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        what = f"[{' '.join(map(str, array.shape))}]" if array.ndim != 2 or not array.size else "one that is not finite"
        raise ic.PlanError(f"{owner} takes a map of finite numbers [row col], not {what}")
    return array
