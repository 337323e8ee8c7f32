"""What all probes of a split share: inner products of states, standardised by the train fold.

    z = (x - mean_train) / std_train; a column that is constant in the train fold, but for rounding, is 0
    K = Z Z_trainᵀ

With n samples of d ≫ n numbers, every linear probe is a function of K alone.

Source: Saunders et al. (1998), Ridge regression learning algorithm in dual variables.
Cost: n · n_train · d per layer and split, once for all probes, penalties and shuffled labels.
Must equal: K of the train rows has mean 0 along both axes, and mean diagonal d, less the
constant columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 1 << 28
"""Bytes of standardised states at a time."""
ROUNDING = 8
"""Units of the states' own rounding, relative to a column's largest number: what varies less is constant."""


@dataclass(frozen=True, eq=False)
class Split:
    """Inner products of one split, of some layers.

    Attributes:
        train: of train rows with each other.
        test: of test rows with train rows.
        inner: inner fold of each train row.
        d: how many numbers a state has.
    """

    train: Float[Tensor, "layer t t"]
    test: Float[Tensor, "layer s t"]
    inner: Int[Tensor, " t"]
    d: int


def layers_at_a_time(states: Float[Tensor, "sample layer d"]) -> Iterator[slice]:
    """Layers whose standardised states fit into `CHUNK` bytes."""
    n, n_layers, d = states.shape
    size = max(1, CHUNK // (8 * n * d))
    return (slice(start, start + size) for start in range(0, n_layers, size))


def split_of(
    states: Float[Tensor, "layer sample d"],
    train: Int[Tensor, " t"],
    test: Int[Tensor, " s"],
    inner: Int[Tensor, " t"],
    rounding: float = torch.finfo(torch.float64).eps,
) -> Split:
    """Inner products of a split.

    Args:
        states: float64.
        train, test: samples.
        inner: inner fold of each train sample.
        rounding: eps of the dtype in which the states came.
    """
    fitted = states[:, train]
    mean, std = fitted.mean(1, keepdim=True), fitted.std(1, correction=0, keepdim=True)
    constant = std <= ROUNDING * rounding * fitted.abs().amax(1, keepdim=True)
    scale = torch.where(constant, 0.0, 1 / std)
    z = (fitted - mean).mul_(scale)
    other = (states[:, test] - mean).mul_(scale)
    return Split(z @ z.mT, other @ z.mT, inner, states.shape[-1])
