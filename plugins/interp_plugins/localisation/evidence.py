"""Evidence in patches: how many pixels each patch of a grid has, and how many of them are evidence.

    pixel row r of H  →  patch row min(gh - 1, ⌊r · gh / H⌋), columns alike
    boxes             floor of left and top, ceiling of right and bottom, clipped to the image; their union

Source: the conventions of FlashTrace's multimodal evaluation (arXiv:2602.01914).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

import interp_core as ic


@dataclass(frozen=True, eq=False)
class Evidence:
    """Pixels of each patch.

    Attributes:
        pixels: that are evidence.
        area: all of them.
    """

    pixels: Float[np.ndarray, "row col"]
    area: Float[np.ndarray, "row col"]

    @property
    def share(self) -> Float[np.ndarray, "row col"]:
        """The share of each patch that is evidence; 0 of a patch without pixels."""
        return np.divide(self.pixels, self.area, out=np.zeros_like(self.pixels), where=self.area > 0)


def evidence(
    where: Sequence[Sequence[int | float]] | Bool[np.ndarray, "height width"],
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
) -> Evidence:
    """The evidence of an image, counted in the patches of a grid.

    Args:
        where: boxes (left, top, right, bottom in pixels), or a mask.
        grid: rows and columns of patches.
        size: height and width of the image in pixels, for boxes.

    Raises:
        PlanError: no pixel is evidence, a box that is none, or a grid without patches.
    """
    rows, cols = grid
    if rows < 1 or cols < 1:
        raise ic.PlanError(f"evidence: a grid has at least one row and column, not {tuple(grid)}")
    mask = where if isinstance(where, np.ndarray) and where.dtype == bool else _mask(where, size)
    if mask.ndim != 2 or not mask.any():
        raise ic.PlanError("evidence: no pixel is evidence; give a box that lies in the image, or a mask with some")
    height, width = mask.shape
    down = np.minimum(rows - 1, np.arange(height) * rows // height)
    across = np.minimum(cols - 1, np.arange(width) * cols // width)
    patch = (down[:, None] * cols + across).ravel()
    pixels = np.bincount(patch, weights=mask.ravel(), minlength=rows * cols)
    area = np.bincount(patch, minlength=rows * cols).astype(float)
    return Evidence(pixels.reshape(rows, cols), area.reshape(rows, cols))


def _mask(boxes: Any, size: tuple[int, int] | None) -> Bool[np.ndarray, "height width"]:
    if size is None:
        raise ic.PlanError("evidence: boxes need size=, height and width of the image in pixels")
    height, width = size
    mask = np.zeros((height, width), dtype=bool)
    for box in boxes:
        numbers = np.asarray(box, dtype=float)
        if numbers.shape != (4,) or not np.isfinite(numbers).all() or (numbers[:2] > numbers[2:]).any():
            raise ic.PlanError(ic.errors.wrong("evidence", "boxes of left, top, right and bottom in pixels", box))
        left, top, right, bottom = numbers
        rows = slice(max(0, math.floor(top)), max(0, math.ceil(bottom)))
        mask[rows, max(0, math.floor(left)) : max(0, math.ceil(right))] = True
    return mask
