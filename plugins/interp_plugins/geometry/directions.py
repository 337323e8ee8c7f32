"""How alike rows point, and how far two groups of rows lie apart.

    anisotropy       (‖Σ u‖² - n) / (n (n - 1)), u = rows of length 1: the mean cosine of two different rows (the
                     intraclass correlation of some authors), without an n · n matrix
    mean direction   ‖mean u‖²
    modality gap     ‖mean_a - mean_b‖ / ((s_a + s_b) / 2), s = root mean square distance of rows from their mean
    separability     area under the ROC curve of held-out ridge scores that tell the groups apart, mean of folds

Source: Ethayarajh (2019), arXiv:1909.00512 (anisotropy); Liang et al. (2022), Mind the Gap, arXiv:2203.02053 (gap).
Cost: n · d; separability folds · n² · (n + d).
Must equal: the mean of the off-diagonal cosines; rows that are all the same have anisotropy 1, isotropic ones 0 on
average; groups of one distribution have separability 0.5 on average, whatever d.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from ..probe.folds import make_folds
from ..probe.study import decode
from .rows import as_rows, unit


def anisotropy_of(rows: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    """Mean cosine of two different rows.

    Raises:
        PlanError: a row of zeros.
    """
    n = rows.shape[-2]
    return (unit(rows).sum(-2).square().sum(-1) - n) / (n * (n - 1))


def mean_direction_of(rows: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    """Squared length of the mean of rows of length 1.

    Raises:
        PlanError: a row of zeros.
    """
    return unit(rows).mean(-2).square().sum(-1)


def anisotropy(values: Any) -> float:
    """Mean cosine of two different rows of `[n d]`.

    Raises:
        PlanError: rows that are none, or zero.
    """
    return float(anisotropy_of(as_rows(values)))


def mean_direction_share(values: Any) -> float:
    """Squared length of the mean of rows `[n d]` of length 1.

    Raises:
        PlanError: rows that are none, or zero.
    """
    return float(mean_direction_of(as_rows(values)))


def modality_gap(first: Any, second: Any) -> float:
    """Distance of the means over the mean deviation within; the groups need not have as many rows.

    Raises:
        PlanError: rows that are none, of other sizes, or all the same in both groups.
    """
    a, b = _two(first, second)
    within = sum(float((rows - rows.mean(0)).square().sum(-1).mean().sqrt()) for rows in (a, b)) / 2
    if not within:
        raise ic.PlanError(
            "modality_gap: the rows of each group are all the same, and there is nothing to compare with"
        )
    return float((a.mean(0) - b.mean(0)).norm()) / within


def separability(first: Any, second: Any, *, folds: int = 5, seed: int = 0) -> float:
    """Held-out area under the ROC curve of a linear score of which group a row is of.

    In the rows themselves n < d directions always tell the groups apart; only held-out rows can say.

    Raises:
        PlanError: rows that are none, of other sizes, or fewer of a group than folds.
    """
    a, b = _two(first, second)
    labels = np.repeat([0, 1], [len(a), len(b)])
    splits = make_folds(labels, n_folds=folds, repeats=1, seed=seed)
    return float(decode(torch.cat([a, b])[:, None], labels, splits, penalties=(1e-2,)).auroc[0])


def _two(first: Any, second: Any) -> tuple[Float[Tensor, "a d"], Float[Tensor, "b d"]]:
    a, b = as_rows(first, "first"), as_rows(second, "second")
    if a.shape[1] != b.shape[1]:
        raise ic.PlanError(
            f"rows of {a.shape[1]} numbers are compared with rows of {b.shape[1]}; take one layer's width"
        )
    return a, b
