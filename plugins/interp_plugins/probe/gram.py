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
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 1 << 28
"""Bytes of states at a time."""
ROUNDING = 8
"""Units of the states' own rounding, relative to a column's largest number: what varies less is constant."""
LOST = 1e-7
"""Relative to a column's largest deviation from its mean: where moments of the fold lose all digits."""


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


class Standardised:
    """States of some layers, and what each split needs to standardise them: one pass over them per split.

    Args:
        states: of some layers, float64 from here on.
        train: the splits' train samples.
    """

    def __init__(self, states: Float[Tensor, "sample layer d"], train: Bool[Tensor, "split sample"]) -> None:
        eps = torch.finfo(states.dtype).eps if states.is_floating_point() else 0.0
        x = states.transpose(0, 1).double()
        largest = x.abs().amax(1)
        self.x = x - x.mean(1, keepdim=True)  # [layer sample d]; close to the folds' means, so that moments keep digits
        shares = train.double() / train.sum(1, keepdim=True)
        mean = torch.einsum("fs,lsd->lfd", shares, self.x)
        variance = torch.einsum("fs,lsd->lfd", shares, self.x.square()) - mean.square()
        std = variance.clamp(min=0).sqrt()
        least = torch.maximum(ROUNDING * eps * largest, LOST * self.x.abs().amax(1))
        self.scale = torch.where(std <= least[:, None], 0.0, 1 / std)  # [layer split d]

    def split(self, number: int, train: Int[Tensor, " t"], test: Int[Tensor, " s"], inner: Int[Tensor, " t"]) -> Split:
        """Inner products of a split: of scaled states, then centred as their train rows are.

        Args:
            number: of the split.
            train, test: its samples.
            inner: inner fold of each train sample.
        """
        z = self.x[:, torch.cat([train, test])]
        z *= self.scale[:, number, None]
        centred = z @ z[:, : len(train)].mT
        centred -= centred[:, : len(train)].mean(1, keepdim=True)  # each train row with the mean of all
        centred -= centred.mean(2, keepdim=True)
        return Split(centred[:, : len(train)], centred[:, len(train) :], inner, self.x.shape[-1])


def layers_at_a_time(states: Float[Tensor, "sample layer d"]) -> Iterator[slice]:
    """Layers whose states fit into `CHUNK` bytes."""
    n, n_layers, d = states.shape
    size = max(1, CHUNK // (8 * n * d))
    return (slice(start, start + size) for start in range(0, n_layers, size))
