"""What was decoded from states of one image mode: curves over layers from counts of right predictions.

    accuracy   of a repeat, the mean over classes of the share of right predictions, every sample predicted once;
               mean over repeats
    auroc      of two classes, within a test fold, mean over splits; of more, each against the rest, mean
    error      of repeated folds: √((1 / J + n_test / n_train) · variance over the J splits)
    chosen     the layer that is best in the inner folds of each split, never in its test fold

Source: Nadeau and Bengio (2003), Inference for the Generalization Error (the error of repeated folds); Brodersen et al.
(2010) for balanced accuracy.
Shapes: curves `[layer]`.
Must equal: the same numbers counted sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import interp_core as ic


@dataclass(frozen=True, eq=False)
class Decoding:
    """What was decoded. The first labeling is the labels themselves, then shuffles, then control tasks.

    Attributes:
        hits: right predictions of test rows by split, layer, labeling and class.
        counts: test rows by split, labeling and class.
        inner: held-out balanced accuracy within the train fold, for choices that may not see test rows; NaN where the
            probe has none.
        correct: share of repeats in which a sample was predicted right.
        ranking: area under the ROC curve within each test fold.
        penalty: that each split chose; NaN where the probe has none.
        repeat: of each split.
        shuffles, controls: how many of the labelings are such.
        ratio: test over train samples.
        labels: by number.
        groups: of the samples, by number.
        classes: the labels' names.
        decoder: the probe.
    """

    hits: Float[np.ndarray, "split layer labeling class"]
    counts: Float[np.ndarray, "split labeling class"]
    inner: Float[np.ndarray, "split layer labeling"]
    correct: Float[np.ndarray, "sample layer"]
    ranking: Float[np.ndarray, "split layer"]
    penalty: Float[np.ndarray, "split layer"]
    repeat: Int[np.ndarray, " split"]
    shuffles: int
    controls: int
    ratio: float
    labels: Int[np.ndarray, " sample"]
    groups: Int[np.ndarray, " sample"]
    classes: tuple[Any, ...]
    decoder: str

    @property
    def n_layers(self) -> int:
        """Of the states."""
        return self.hits.shape[1]

    @cached_property
    def _by_labeling(self) -> Float[np.ndarray, "layer labeling"]:
        return self._balanced(self.hits)

    def _balanced(self, hits: Float[np.ndarray, "split layer labeling class"]) -> Float[np.ndarray, "layer labeling"]:
        """Balanced accuracy of each repeat, mean of them."""
        out = []
        for number in np.unique(self.repeat):
            here = self.repeat == number
            out.append((hits[here].sum(0) / self.counts[here].sum(0)).mean(-1))
        return np.mean(out, axis=0)

    @property
    def accuracy(self) -> Float[np.ndarray, " layer"]:
        """Balanced accuracy."""
        return self._by_labeling[:, 0]

    @property
    def auroc(self) -> Float[np.ndarray, " layer"]:
        """Mean over splits."""
        return np.nanmean(self.ranking, axis=0)

    @property
    def null(self) -> Float[np.ndarray, "shuffle layer"]:
        """Balanced accuracy of shuffled labels, each predicted by probes that were fitted to them."""
        return self._by_labeling[:, 1 : 1 + self.shuffles].T

    @property
    def control(self) -> Float[np.ndarray, "draw layer"]:
        """Balanced accuracy on control tasks."""
        return self._by_labeling[:, 1 + self.shuffles :].T

    @property
    def selectivity(self) -> Float[np.ndarray, " layer"]:
        """Accuracy minus that of the control task.

        Raises:
            PlanError: there was none.
        """
        if not self.controls:
            raise ic.PlanError("selectivity needs a control task: decode(…, types=…)")
        return self.accuracy - self.control.mean(0)

    @property
    def by_split(self) -> Float[np.ndarray, "split layer"]:
        """Balanced accuracy of each test fold."""
        return (self.hits[:, :, 0] / np.maximum(self.counts[:, None, 0], 1)).mean(-1)

    @property
    def error(self) -> Float[np.ndarray, " layer"]:
        """Standard error of repeated folds; see `corrected_error`."""
        return corrected_error(self.by_split, self.ratio)

    def chosen(self) -> tuple[float, Float[np.ndarray, " shuffle"], Int[np.ndarray, " split"]]:
        """Balanced accuracy where each split takes the layer that is best in its own inner folds, the same of shuffled
        labels, and the layers.

        Raises:
            PlanError: the probe has no inner folds.
        """
        if np.isnan(self.inner).any():
            raise ic.PlanError(f"{self.decoder} was fitted without inner folds, in which alone a layer may be chosen; "
                               "take ridge, or logistic with several penalties")  # fmt: skip
        layers = self.inner.argmax(1)  # [split labeling]
        taken = np.take_along_axis(self.hits, layers[:, None, :, None], 1)
        values = self._balanced(taken)[0]
        return float(values[0]), values[1 : 1 + self.shuffles], layers[:, 0]


def corrected_error(by_split: Float[np.ndarray, " split *axes"], ratio: float) -> Float[np.ndarray, "*axes"]:
    """Standard error of a mean over splits of repeated folds, whose train sets overlap (Nadeau and Bengio).

    Args:
        by_split: values of each split; of two image modes, their differences.
        ratio: test samples over train samples.
    """
    return np.sqrt((1 / len(by_split) + ratio) * by_split.var(0, ddof=1))
