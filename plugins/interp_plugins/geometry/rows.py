"""Rows `[n d]`: how they are prepared, drawn in equal numbers, and moved into fewer coordinates without loss.

    raw              as they are
    centred          minus their mean
    row_normalised   of length 1, then centred
    sink_free        without rows whose norm is over 10 times the median, then centred; what was dropped is listed

Directions (anisotropy, share of the mean direction) are taken before centring, but for `centred` rows after it.

Source: massive norms of few tokens: Sun et al. (2024), Massive Activations in Large Language Models, arXiv:2402.17762;
the factor of 10 is ours.
Cost: n · d; `coordinates` n² · d, after which everything costs n instead of d.
Must equal: singular values, distances and cosines of `coordinates(x)` are those of x to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic

Variant = Literal["raw", "centred", "row_normalised", "sink_free"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
SINK = 10.0
"""Times the median norm, above which a row is a sink."""


@dataclass(frozen=True)
class Prepared:
    """Rows of a variant.

    Attributes:
        rows: before centring.
        kept: which of the rows they are.
        dropped: which were left out, rising.
        centre: whether a spectrum is taken of centred rows.
        turned: whether directions are, too.
    """

    rows: Float[Tensor, "n d"]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    centre: bool
    turned: bool

    @property
    def for_spectrum(self) -> Float[Tensor, "n d"]:
        """Rows whose singular values are asked for."""
        return centred(self.rows) if self.centre else self.rows

    @property
    def for_directions(self) -> Float[Tensor, "n d"]:
        """Rows whose directions are compared."""
        return centred(self.rows) if self.turned else self.rows


def as_rows(values: Any, what: str = "rows", least: int = 2) -> Float[Tensor, "n d"]:
    """Lists, arrays and tensors as float64 rows.

    Raises:
        PlanError: no numbers, not two axes, not finite, or too few rows.
    """
    try:
        rows = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ic.PlanError(ic.errors.wrong(what, "numbers [n d]", values)) from error
    rows = rows.as_subclass(Tensor).to("cpu", torch.float64)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ic.PlanError(f"{what} has shape {list(rows.shape)}; give rows [n d], one per token or sample")
    if len(rows) < least:
        raise ic.PlanError(f"{what} has {len(rows)} rows; this takes {least} at least")
    bad = ~torch.isfinite(rows).all(1)
    if bool(bad.any()):
        raise ic.PlanError(f"{what}: {int(bad.sum())} of {len(rows)} rows are not finite, the first is row "
                           f"{int(bad.nonzero()[0])}; leave them out yourself, and say how many")  # fmt: skip
    return rows


def centred(rows: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
    """Rows minus their mean."""
    return rows - rows.mean(-2, keepdim=True)


def unit(rows: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
    """Rows of length 1.

    Raises:
        PlanError: a row of zeros, which has no direction.
    """
    norm = rows.norm(dim=-1, keepdim=True)
    if bool((norm == 0).any()):
        raise ic.PlanError(f"{int((norm == 0).sum())} of {norm.numel()} rows are zero and have no direction; leave "
                           "them out")  # fmt: skip
    return rows / norm


def sinks(rows: Float[Tensor, "n d"]) -> tuple[int, ...]:
    """Rows whose norm is over `SINK` times the median norm."""
    norm = rows.norm(dim=-1)
    return tuple((norm > SINK * norm.median()).nonzero().flatten().tolist())


def prepare(values: Any, variant: Variant = "centred") -> Prepared:
    """Rows of a variant, with what was dropped.

    Raises:
        PlanError: no such variant, or rows that are none.
    """
    if variant not in VARIANTS:
        raise ic.PlanError(f"no variant {variant!r} of rows. {ic.errors.nearest(variant, VARIANTS)}")
    rows = as_rows(values)
    dropped = sinks(rows) if variant == "sink_free" else ()
    kept = tuple(i for i in range(len(rows)) if i not in set(dropped))
    if len(kept) < 2:
        raise ic.PlanError(f"sink_free leaves {len(kept)} of {len(rows)} rows; take another variant")
    rows = unit(rows) if variant == "row_normalised" else rows[list(kept)]
    return Prepared(rows, kept, dropped, variant != "raw", variant == "centred")


def coordinates(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
    """The same rows in an orthonormal basis of what they span: r is the smaller of n and d."""
    if rows.shape[0] >= rows.shape[1]:
        return rows
    # Xᵀ = Q R, so that R's columns have the inner products of the rows: no decomposition of [d d] is needed
    return torch.linalg.qr(rows.T, mode="r").R.T.contiguous()


def subsamples(n: int, size: int, repeats: int = 20, seed: int = 0) -> Int[Tensor, "repeat size"]:
    """Which rows each repeat has, drawn without replacement; all of them once where size is n.

    Raises:
        PlanError: more than there are, fewer than two, or no repeats.
    """
    if not 2 <= size <= n or repeats < 1:
        raise ic.PlanError(f"{repeats} draws of {size} of {n} rows; draw 2 to {n} rows, once at least")
    if size == n:
        return torch.arange(n)[None]
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([np.sort(rng.permutation(n)[:size]) for _ in range(repeats)]))


def single(n: int, seed: int = 0) -> int:
    """One of n rows, each as likely as any other over seeds; the same for the same n and seed."""
    return int(np.random.default_rng((seed, n)).integers(n))


def equal_numbers(groups: Sequence[Any], repeats: int = 20, seed: int = 0) -> list[Float[Tensor, "repeat n d"]]:
    """Groups of rows cut to as many rows as the smallest has, several times: what is compared depends on n.

    Raises:
        PlanError: rows that are none, or a group of fewer than two.
    """
    rows = [as_rows(group, f"group {number}") for number, group in enumerate(groups)]
    size = min(map(len, rows))
    return [group[subsamples(len(group), size, repeats, seed)] for group in rows]
