"""Localisation: whether a map over an image lies where the evidence is, and whether the model needs what it marks.

    evidence    boxes or a mask of pixels, counted patch by patch
    hits        pointing game, energy, rank AUC, R@q, top-area IoU
    baselines   a random map and a blob in the centre, which every table needs beside it
    regions     the regions of an image, their order under a map, images with regions blurred
    curves      deletion and insertion curves, their areas, visual MAS
    comparing   methods beside each other over samples, paired

A map is numbers `[row col]`, one per patch, of any grid; nothing is interpolated between patches.
"""

from __future__ import annotations

from .baselines import centre_map, random_map
from .comparing import Comparison, compare
from .curves import Curves, perturbation_curves
from .evidence import Evidence, evidence
from .hits import Hits, hits
from .regions import Regions, blurred, perturbed, regions

__all__ = [
    "Comparison", "Curves", "Evidence", "Hits", "Regions", "blurred", "centre_map", "compare", "evidence", "hits",
    "perturbation_curves", "perturbed", "random_map", "regions",
]  # fmt: skip
