"""Selectivity against capacity: probes that see only the first principal directions of the states.

    x_r           the states with their first r principal directions alone (of all samples; labels play no part in it)
    accuracy(r)   of probes on x_r        control(r)   the same on control tasks        selectivity(r)   the difference

A probe of many directions can memorise a random label for each type, one of few cannot; what is still decoded there is
in the states. At full rank, x_r are the states.

Source: Hewitt and Liang (2019), arXiv:1909.03368, section 4, who restrict the rank of probes.
Cost: ranks × what `decode` costs.
Must equal: `decode` on the states themselves, at full rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .folds import make_folds
from .nulls import seen_types
from .study import Decoder, decode

RANKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, eq=False)
class Capacity:
    """Accuracy by the number of directions.

    Attributes:
        ranks: how many.
        accuracy, control: balanced, of the labels and of control tasks.
        ceiling: share of test samples whose type occurs in train.
        places: names along `layer`.
    """

    ranks: tuple[int, ...]
    accuracy: Float[np.ndarray, "rank layer"]
    control: Float[np.ndarray, "rank layer"]
    ceiling: float
    places: tuple[str, ...]

    @property
    def selectivity(self) -> Float[np.ndarray, "rank layer"]:
        """Accuracy minus that of the control task."""
        return self.accuracy - self.control

    def table(self) -> list[dict[str, Any]]:
        """One row per rank and layer."""
        return [
            {"rank": rank, "layer": place, "accuracy": float(self.accuracy[i, k]), "control": float(self.control[i, k]),
             "selectivity": float(self.selectivity[i, k])}
            for i, rank in enumerate(self.ranks)
            for k, place in enumerate(self.places)
        ]  # fmt: skip

    def curves(self) -> ic.report.Curves:
        """Accuracy, control task and selectivity against ranks, at the layer where the labels are decoded best."""
        best = int(self.accuracy.max(0).argmax())
        parts = {"accuracy": self.accuracy, "control task": self.control, "selectivity": self.selectivity}
        return ic.report.Curves(
            [ic.report.Line(name, part[:, best]) for name, part in parts.items()], [str(rank) for rank in self.ranks],
            xlabel="principal directions", ylabel="balanced accuracy",
            title=f"Capacity of probes, layer {self.places[best]}",
        )  # fmt: skip


def by_rank(
    states: Any,
    labels: Any,
    types: Any,
    ranks: Sequence[int] = RANKS,
    *,
    groups: Any = None,
    n_folds: int = 5,
    repeats: int = 5,
    decoder: Decoder = "ridge",
    controls: int = 10,
    seed: int = 0,
    places: Sequence[str] = (),
) -> Capacity:
    """Fit probes of the labels and of control tasks on states of each rank, on the same folds.

    Args:
        states: `[sample layer d]`.
        labels: one per sample.
        types: what control labels are drawn for, one per sample.
        ranks: numbers of principal directions; more than there are mean all.
        groups, n_folds, repeats, decoder, controls, seed: as of `compare`.
        places: names along `layer` (default: numbers).

    Raises:
        PlanError: no ranks, or what does not fit.
    """
    if not ranks or min(ranks) < 1:
        raise ic.PlanError(f"by_rank: ranks {list(ranks)}; give numbers of directions, 1 or more")
    x = torch.as_tensor(np.asarray(states)).double()
    folds = make_folds(labels, groups, n_folds=n_folds, repeats=repeats, seed=seed)
    mean = x.mean(0)
    left, sizes, right = torch.linalg.svd((x - mean).transpose(0, 1), full_matrices=False)
    accuracy, control = [], []
    for rank in ranks:
        kept: Tensor = (left[..., :rank] * sizes[:, None, :rank]) @ right[:, :rank]
        decoded = decode(
            kept.transpose(0, 1) + mean, labels, folds, decoder=decoder, types=types, controls=controls, seed=seed
        )
        accuracy.append(decoded.accuracy)
        control.append(decoded.control.mean(0))
    names = tuple(places) or tuple(str(layer) for layer in range(x.shape[1]))
    return Capacity(tuple(ranks), np.stack(accuracy), np.stack(control), seen_types(types, folds), names)
