"""Intrinsic dimension by the ratio of each row's two nearest distances.

    μ_i = r_2 / r_1, whose logarithm is exponential of rate d; the top 10 % of μ count as censored at the largest kept
    d̂  = (m - 1) / (Σ_kept ln μ + (n - m) ln μ_(m)), m kept of n; without discarding (n - 1) / Σ ln μ

Source: Facco et al. (2017), Estimating the intrinsic dimension of datasets by a minimal neighborhood information,
Scientific Reports 7:12140. They discard the top 10 % and fit a line; leaving them out of (n - 1) / Σ ln μ instead would
give a third too much (1 / 0.744), which censoring does not.
Cost: n² · d.
Must equal: d on average for uniform rows in d dimensions, whatever they are embedded in.
"""

from __future__ import annotations

from typing import Any

import torch

import interp_core as ic

from .rows import as_rows, coordinates

LEAST = 50
"""Rows below which there is no estimate."""


def two_nn(values: Any, *, discard: float = 0.1) -> float:
    """Intrinsic dimension of rows `[n d]`. Copies of a row have no two nearest distances: one of each is kept.

    Args:
        values: rows, 50 different ones at least.
        discard: share of the largest ratios that are censored.

    Raises:
        PlanError: rows that are none, too few different ones, or a share that is none.
    """
    if not 0 <= discard < 1:
        raise ic.PlanError(ic.errors.wrong("two_nn: discard", "a share, 0 to below 1", discard))
    rows = coordinates(torch.unique(as_rows(values), dim=0))
    n = len(rows)
    if n < LEAST:
        raise ic.PlanError(f"two_nn: {n} different rows; {LEAST} at least are needed to tell a dimension")
    # by products, the distance of near rows would be what is left of large numbers
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.topk(3, largest=False).values  # the first is the row itself
    ratios = (nearest[:, 2] / nearest[:, 1]).log().sort().values
    kept = ratios[: n - int(discard * n)]
    total = float(kept.sum() + (n - len(kept)) * kept[-1])
    if total <= 0:
        raise ic.PlanError("two_nn: every row has two neighbours at one distance, as on a grid; there is no estimate")
    return (len(kept) - 1) / total
