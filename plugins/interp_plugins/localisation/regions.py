"""Regions of an image: about 64, nearly square; their order under a map; the image with some of them blurred.

    rows = max(1, round(√(64 · H / W))), cols = max(1, round(64 / rows))
    region (r, c) spans pixels ⌊r · H / rows⌋ … ⌊(r + 1) · H / rows⌋, columns alike
    its score is that of patch ⌊r · gh / rows⌋, ⌊c · gw / cols⌋ of the map (nearest)
    order: ascending, stable, reversed: of ties the later region first; signs count
    10 groups in that order, as equal as can be, the larger ones first
    replacement: the image under a Gaussian blur of radius max(W, H) / 12 (Pillow's)

Source: FlashTrace's multimodal evaluation (arXiv:2602.01914).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import interp_core as ic

from ..attribution.evaluation.orders import checked_count, step_sizes
from .hits import checked_map

TARGET = 64
STEPS = 10
BLUR = 12
"""The blur's radius is the image's longer side over this."""


@dataclass(frozen=True, eq=False)
class Regions:
    """Regions of an image in the order in which they go.

    Attributes:
        grid: rows and columns.
        size: height and width of the image in pixels.
        scores: of the regions, row by row.
        step: in which each of them goes, from 0.
        tied: the share of regions whose score another one has too: their order is the rule's, not the map's.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    scores: Float[np.ndarray, " region"]
    step: Int[np.ndarray, " region"]
    tied: float

    @property
    def steps(self) -> int:
        """How many steps."""
        return int(self.step.max()) + 1

    def box(self, region: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a region in pixels."""
        (rows, cols), (height, width) = self.grid, self.size
        row, col = divmod(region, cols)
        return col * width // cols, row * height // rows, (col + 1) * width // cols, (row + 1) * height // rows


def regions(scores: Any, size: tuple[int, int], *, target: int = TARGET, steps: int = STEPS) -> Regions:
    """The regions of an image under a map.

    Args:
        scores: `[row col]`, a number per patch, of any sign.
        size: height and width of the image in pixels.
        target: about how many regions, at least 4.
        steps: in how many groups they go.

    Raises:
        PlanError: a map with numbers that are none, or numbers out of range.
    """
    checked_count("regions: target", target, 4)
    checked_count("regions: steps", steps, 1)
    array, (height, width) = checked_map("regions", scores), size
    if min(height, width) < 1:
        raise ic.PlanError(ic.errors.wrong("regions: size", "height and width in pixels", size))
    rows = max(1, round(math.sqrt(target * height / width)))
    cols = max(1, round(target / rows))
    down, across = (np.arange(n) * patches // n for n, patches in zip((rows, cols), array.shape, strict=True))
    flat = array[down[:, None], across].ravel()
    # reversed after a stable ascending sort, as published: of equal scores the later region goes first
    order = np.argsort(flat, kind="stable")[::-1]
    step = np.empty(len(order), dtype=np.int64)
    sizes = step_sizes(len(order), steps)
    step[order] = np.repeat(np.arange(len(sizes)), sizes)
    _, group, count = np.unique(flat, return_inverse=True, return_counts=True)
    return Regions((rows, cols), (height, width), flat, step, float((count[group] > 1).mean()))


def blurred(image: Any) -> Any:
    """An image of Pillow with nothing left but blur."""
    from PIL import ImageFilter

    return image.convert("RGB").filter(ImageFilter.GaussianBlur(radius=max(image.size) / BLUR))


def perturbed(image: Any, regions: Regions) -> Iterator[tuple[Any, Any]]:
    """The image with its regions deleted, and with them inserted, step by step.

    Args:
        image: of Pillow.
        regions: of its size.

    Yields:
        steps + 1 pairs: nothing deleted and nothing inserted first, everything last. Deleted: blurred there; inserted:
        blurred but there.

    Raises:
        PlanError: regions of an image of another size.
    """
    if image.size[::-1] != regions.size:
        raise ic.PlanError(
            f"perturbed: the regions are of {regions.size}, the image is {image.size[::-1]} (height, width)"
        )
    from PIL import Image

    clean, blur = image.convert("RGB"), blurred(image)
    mask = Image.new("L", clean.size, 0)
    for step in range(-1, regions.steps):
        for region in np.flatnonzero(regions.step == step):
            mask.paste(255, regions.box(int(region)))
        yield Image.composite(blur, clean, mask), Image.composite(clean, blur, mask)
