"""All numbers of one layer of one sample: groups of rows, as they are and cut to equal numbers.

Rows are first moved into coordinates of what they span, n of them instead of d, without loss; every variant and repeat
then costs n³ at most.

Source: spectrum.py, directions.py, similarity.py, dimension.py.
Must equal: the functions of those modules, called one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic

from .dimension import LEAST, two_nn
from .directions import anisotropy_of, mean_direction_of, modality_gap, separability
from .rows import VARIANTS, Variant, centred, coordinates, sinks, subsamples, unit
from .similarity import Rows, debiased_cka
from .spectrum import effective_rank_of, most, participation_ratio_of, singular_values, stable_rank_of, vanishing

MEASURES = (
    "effective_rank", "effective_rank_share", "participation_ratio", "stable_rank", "anisotropy", "mean_direction",
)  # fmt: skip
"""Of one group; in this order along the axis `measure`."""


@dataclass(frozen=True)
class How:
    """What is asked for.

    Attributes:
        variants: of the rows.
        size: rows of each group that are compared; None: as many as the smallest has.
        repeats, seed: of the draws.
    """

    variants: tuple[Variant, ...] = VARIANTS
    size: int | None = None
    repeats: int = 20
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Layer:
    """Numbers of a layer; NaN where there is none (rows all the same, too few of them).

    Attributes:
        whole: of all rows of each group.
        equal: of as many rows of each, mean over draws.
        dimension: intrinsic dimension of all rows.
        gap, separability: of the first two groups; NaN if there is one.
        dropped: which rows of each group are sinks.
    """

    whole: Float[Tensor, "group variant measure"]
    equal: Float[Tensor, "group variant measure"]
    dimension: Float[Tensor, " group"]
    gap: float
    separability: float
    dropped: tuple[tuple[int, ...], ...]


def measure_layer(groups: Sequence[Float[Tensor, "n d"]], how: How) -> Layer:
    """Numbers of a layer.

    Args:
        groups: float64 rows of each, two at least.
        how: what is asked for.

    Raises:
        PlanError: `how.size` is more than a group has.
    """
    d = groups[0].shape[1]
    # one decomposition for all groups: what follows costs n instead of d
    together = coordinates(torch.cat(list(groups)))
    small = together.split([len(group) for group in groups])
    dropped = tuple(sinks(rows) for rows in small)
    wholes, equals = [], []
    for variant in how.variants:
        kept = [
            torch.tensor([i for i in range(len(rows)) if variant != "sink_free" or i not in out])
            for rows, out in zip(small, dropped, strict=True)
        ]
        fewest = min(map(len, kept))
        # measures depend on how many rows there are: groups are compared at equal numbers
        size = fewest if how.size is None else min(how.size, fewest)
        wholes.append([_measures(rows[keep][None], variant, d) for rows, keep in zip(small, kept, strict=True)])
        equals.append([
            _measures(rows[keep][subsamples(len(keep), size, how.repeats, how.seed)], variant, d) if size > 1 else
            torch.full((len(MEASURES),), torch.nan, dtype=torch.float64)
            for rows, keep in zip(small, kept, strict=True)
        ])  # fmt: skip
    pair = groups[:2] if len(groups) > 1 else None
    return Layer(
        torch.stack([torch.stack(row) for row in wholes], 1), torch.stack([torch.stack(row) for row in equals], 1),
        torch.tensor([_or_nan(partial(two_nn, rows)) if len(rows) >= LEAST else torch.nan for rows in small],
                     dtype=torch.float64),
        _or_nan(lambda: modality_gap(*pair)) if pair else torch.nan,
        _or_nan(lambda: separability(*pair)) if pair else torch.nan, dropped,
    )  # fmt: skip


def same_rows(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], positions: Sequence[int]) -> float:
    """Debiased CKA of one sample's rows at the same positions; NaN below four rows, or where they are all the same."""
    if len(first) < 4:
        return torch.nan
    return _or_nan(lambda: debiased_cka(*(Rows.tokens(coordinates(rows), 0, positions) for rows in (first, second))))


def _or_nan(number: Callable[[], float]) -> float:
    try:
        return number()
    except ic.PlanError:
        return torch.nan


def _measures(rows: Float[Tensor, "repeat n r"], variant: Variant, d: int) -> Float[Tensor, " measure"]:
    """The measures, mean over repeats."""
    n = rows.shape[1]
    zero = bool((rows.norm(dim=-1) == 0).any())
    none = torch.full(rows.shape[:1], torch.nan, dtype=rows.dtype)
    if n < 2 or (zero and variant == "row_normalised"):
        return torch.full((len(MEASURES),), torch.nan, dtype=rows.dtype)
    turned = centred(rows) if variant == "centred" else rows
    if variant == "row_normalised":
        rows = unit(rows)
    centre = variant != "raw"
    sigma = singular_values(centred(rows) if centre else rows)
    # rows that are all the same leave rounding alone after centring: no spectrum
    flat = sigma[:, 0] <= torch.tensor([vanishing(each) for each in rows])
    sigma = torch.where(flat[:, None], torch.nan, sigma)
    rank = effective_rank_of(sigma)
    pointless = zero or bool((turned.norm(dim=-1) == 0).any())
    columns: list[Int[Tensor, " repeat"] | Float[Tensor, " repeat"]] = [
        rank, rank / most(n, d, centre=centre), participation_ratio_of(sigma), stable_rank_of(sigma),
        none if pointless else anisotropy_of(turned), none if pointless else mean_direction_of(turned),
    ]  # fmt: skip
    return torch.stack(columns).nanmean(1)
