"""How alike two sets of the same rows are: linear CKA, as published and without its bias.

    CKA          ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖), X and Y centred, Frobenius norms
    debiased     HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)), K = X Xᵀ and L = Y Yᵀ with zero diagonal,
                 HSIC = [tr K L + (1ᵀK1)(1ᵀL1) / ((n-1)(n-2)) - 2 · 1ᵀK L 1 / (n-2)] / (n (n-3)); not clipped

Row i of one is compared with row i of the other: the number means nothing unless they are of the same thing. So rows
carry `keys` that say what each is of, and two sets of other keys are refused. What may be compared: the same tokens at
two layers, the same visual positions of a picture and of a blind one, pooled visual rows with pooled text rows (a row
is a sample). What may not: visual tokens with text tokens of one sample, which have no order in common.

Source: Kornblith et al. (2019), arXiv:1905.00414; Song et al. (2012) for the unbiased HSIC; Nguyen et al. (2021),
arXiv:2010.15327 for its use; Murphy et al. (2024), arXiv:2405.01012 on the bias at n below d.
Cost: n² · d, memory n².
Must equal: 1 for rotated, scaled and shifted copies; for independent Gaussian rows CKA tends to 1 as d/n grows,
debiased CKA is 0 on average.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .rows import as_rows, centred
from .spectrum import vanishing


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that say what each is of.

    Attributes:
        values: `[n d]`.
        keys: one per row, all different: (sample, position) of tokens, sample of pooled rows.
        name: for messages.

    Raises:
        PlanError: another number of keys, or one that comes twice.
    """

    values: Float[Tensor, "n d"]
    keys: tuple[Hashable, ...]
    name: str = "rows"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", as_rows(self.values, self.name))
        object.__setattr__(self, "keys", tuple(self.keys))
        if len(self.keys) != len(self.values):
            raise ic.PlanError(f"{self.name}: {len(self.keys)} keys for {len(self.values)} rows; give one per row")
        if len(set(self.keys)) < len(self.keys):
            twice = next(key for key in self.keys if self.keys.count(key) > 1)
            raise ic.PlanError(f"{self.name}: two rows have the key {twice!r}; a key says which row it is")

    @staticmethod
    def tokens(values: Any, sample: Hashable, positions: Sequence[int], name: str = "rows") -> Rows:
        """Rows of tokens of one sample, by their positions in its text."""
        return Rows(values, tuple((sample, int(position)) for position in positions), name)

    @staticmethod
    def pooled(values: Sequence[Any], samples: Sequence[Hashable], name: str = "rows") -> Rows:
        """A row per sample: the mean of its rows."""
        means = [as_rows(rows, f"{name} of {key!r}", 1).mean(0) for rows, key in zip(values, samples, strict=True)]
        return Rows(torch.stack(means), tuple(samples), name)


def cka(first: Rows, second: Rows) -> float:
    """Linear CKA of two sets of the same rows, 0 to 1; large by chance where n is not much larger than d.

    Raises:
        PlanError: rows that are not of the same things, or all the same.
    """
    k, l = (_doubly_centred(rows @ rows.T) for rows in _paired(first, second))  # noqa: E741
    return _ratio(float((k * l).sum()), float((k * k).sum()), float((l * l).sum()))


def debiased_cka(first: Rows, second: Rows) -> float:
    """Linear CKA whose expectation is 0 for independent rows; may be below 0.

    Raises:
        PlanError: rows that are not of the same things, all the same, or fewer than four.
    """
    x, y = _paired(first, second)
    # its terms are divided by n - 3 (`_hsic`)
    if len(x) < 4:
        raise ic.PlanError(f"debiased_cka takes four rows at least, not {len(x)}")
    k, l = (_hollow(rows) for rows in (x, y))  # noqa: E741
    return _ratio(_hsic(k, l), _hsic(k, k), _hsic(l, l))


def _paired(first: Rows, second: Rows) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n e"]]:
    """Values of two sets of the same rows, centred.

    Raises:
        PlanError: they are not of the same things in the same order.
    """
    for rows in (first, second):
        if not isinstance(rows, Rows):
            raise ic.PlanError(ic.errors.wrong("CKA", "Rows(values, keys), whose keys say what each row is of", rows))
    if first.keys != second.keys:
        common = len({*first.keys} & {*second.keys})
        what = "the same rows in another order; sort one" if common == len(first.keys) == len(second.keys) else (
            f"{common} rows in common, of {len(first.keys)} and {len(second.keys)}. Compare the same tokens at two "
            "layers or in two runs, or pooled rows (Rows.pooled: a row per sample); visual and text tokens of one "
            "sample have no rows in common"
        )  # fmt: skip
        raise ic.PlanError(f"CKA compares row i with row i: {first.name} and {second.name} have {what}")
    a, b = (_varying(rows) for rows in (first, second))
    return a, b


def _varying(rows: Rows) -> Float[Tensor, "n d"]:
    """Centred values.

    Raises:
        PlanError: nothing is left of them but rounding.
    """
    values = centred(rows.values)
    if float(values.norm()) <= vanishing(rows.values):
        raise ic.PlanError(f"CKA: {rows.name}: the {len(values)} rows are all the same; they resemble nothing")
    return values


def _doubly_centred(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _hollow(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    gram = rows @ rows.T
    return gram - torch.diag(gram.diagonal())


def _hsic(k: Float[Tensor, "n n"], l: Float[Tensor, "n n"]) -> float:  # noqa: E741
    n = len(k)
    here, there = k.sum(0), l.sum(0)
    total = (k * l).sum() + here.sum() * there.sum() / ((n - 1) * (n - 2)) - 2 * (here @ there) / (n - 2)
    return float(total) / (n * (n - 3))


def _ratio(cross: float, own: float, other: float) -> float:
    if own <= 0 or other <= 0:  # of the debiased one, where all rows but one are the same
        raise ic.PlanError("CKA: the rows of one side hardly differ from each other; they resemble nothing")
    return cross / (own * other) ** 0.5
