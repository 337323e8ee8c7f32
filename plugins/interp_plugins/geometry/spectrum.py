"""How many directions rows use, from their singular values σ.

    effective rank       exp(-Σ p ln p), p = σ / Σ σ            1 to min(n - 1, d) after centring
    participation ratio  (Σ λ)² / Σ λ², λ = σ²
    stable rank          Σ σ² / σ_1²

Source: Roy and Vetterli (2007), The effective rank; Gao et al. (2017), bioRxiv 214262 (participation ratio); Rudelson
and Vershynin (2007), arXiv:math/0503442 (stable rank). An "entropy rank" of λ instead of σ is another number.
Shapes: rows `[… n d]`; results `[…]`.
Cost: one singular value decomposition without vectors, n · d · min(n, d).
Must equal: k orthogonal directions of equal length give k in all three; participation ratio and stable rank never
exceed the effective rank; a rotation changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .rows import as_rows, centred


def singular_values(rows: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch r"]:
    """Falling."""
    return torch.linalg.svdvals(rows)


def effective_rank_of(sigma: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch"]:
    """From singular values; NaN where all are zero."""
    return torch.special.entr(sigma / sigma.sum(-1, keepdim=True)).sum(-1).exp()


def participation_ratio_of(sigma: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch"]:
    """From singular values; NaN where all are zero."""
    # ratios to the largest first, so that powers stay in range whatever the units
    power = (sigma / sigma[..., :1]).square()
    return power.sum(-1).square() / power.square().sum(-1)


def stable_rank_of(sigma: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch"]:
    """From singular values; NaN where all are zero."""
    return (sigma / sigma[..., :1]).square().sum(-1)


def most(n: int, d: int, *, centre: bool = True) -> int:
    """The largest rank that n rows of d numbers can have."""
    return min(n - 1 if centre else n, d)


def effective_rank(values: Any, *, centre: bool = True, share: bool = False) -> float:
    """Effective rank of rows `[n d]`.

    Args:
        values: rows.
        centre: subtract their mean first.
        share: of the largest rank that they could have.

    Raises:
        PlanError: rows that are none, or all the same.
    """
    rows = as_rows(values)
    rank = float(effective_rank_of(_sigma(rows, centre)))
    return rank / most(*rows.shape, centre=centre) if share else rank


def participation_ratio(values: Any, *, centre: bool = True) -> float:
    """Participation ratio of rows `[n d]`.

    Raises:
        PlanError: rows that are none, or all the same.
    """
    return float(participation_ratio_of(_sigma(as_rows(values), centre)))


def stable_rank(values: Any, *, centre: bool = True) -> float:
    """Stable rank of rows `[n d]`.

    Raises:
        PlanError: rows that are none, or all the same.
    """
    return float(stable_rank_of(_sigma(as_rows(values), centre)))


def _sigma(rows: Float[Tensor, "n d"], centre: bool) -> Float[Tensor, " r"]:
    """Singular values.

    Raises:
        PlanError: nothing is left but rounding.
    """
    sigma = singular_values(centred(rows) if centre else rows)
    if float(sigma[0]) <= vanishing(rows):
        raise ic.PlanError(f"the {len(rows)} rows are {'all the same' if centre else 'zero'}: they have no rank")
    return sigma


def vanishing(rows: Float[Tensor, "n d"]) -> float:
    """The largest singular value that rounding alone leaves of rows that are all the same."""
    return float(rows.norm()) * 4 * torch.finfo(torch.float64).eps * max(rows.shape) ** 0.5
