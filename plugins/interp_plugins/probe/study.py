"""Fitting and testing probes on states of one image mode, split by split, with shuffled and control labels.

Inner products are made once per layer and split; all labelings share them, and of the ridge the inverse, too.

Source: decoders.py, logistic.py and mlp.py say whose each probe is.
Shapes: states `[sample layer d]`, labels `[sample]`.
Cost: per layer and split n² · d for inner products, then what the probe takes. Memory 4 · sample · layers at a time · d
in float64.
Must equal: splits fitted one by one, in the states themselves, to 1e-8 in scores.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic

from . import decoders
from .decoders import Scores, balanced, members, predicted
from .decoding import Decoding
from .folds import Folds, numbered
from .gram import Standardised, layers_at_a_time
from .logistic import logistic
from .mlp import mlp
from .nulls import control_labels, shuffled

Decoder = Literal["ridge", "logistic", "means", "lda", "mlp"]
DECODERS: tuple[Decoder, ...] = get_args(Decoder)
RIDGE = (1e-3, 1e-2, 1e-1, 1.0)
"""Penalties in units of the mean diagonal of the inner products."""
LOGISTIC = tuple(10.0**k for k in range(-4, 3))


def decode(
    states: Any,
    labels: Any,
    folds: Folds,
    *,
    decoder: Decoder = "ridge",
    penalties: tuple[float, ...] | None = None,
    shuffles: int = 0,
    types: Any = None,
    controls: int = 10,
    seed: int = 0,
) -> Decoding:
    """Fit and test a probe on every split and layer.

    Args:
        states: `[sample layer d]`.
        labels: one per sample, any kind of two or more.
        folds: of `make_folds`, the same for all that is compared.
        decoder: "ridge", "logistic", "means", "lda" or "mlp".
        penalties: to choose from in inner folds: of ridge in units of the mean inner product, of logistic C.
        shuffles: how many permuted labelings; they cost ridge little, the others a fit each.
        types: of the questions, for control tasks; None: none.
        controls: draws of the control task.
        seed: of shuffles, controls and networks.

    Raises:
        PlanError: states, labels and folds that do not fit each other, or no such probe.
    """
    x = _states(states)
    y, classes = numbered(labels)
    _demand(x, y, folds, decoder, penalties, shuffles)
    # the labels first, then every other labeling: the fits share all but their targets
    columns = [y[:, None], shuffled(y, folds.groups, shuffles, seed)]
    if types is not None:
        columns.append(control_labels(y, types, controls, seed))
    every = np.concatenate(columns, 1)
    grid = penalties or {"ridge": RIDGE, "logistic": LOGISTIC}.get(decoder, ())
    book = _Book(every, len(folds), x.shape[1], len(classes), len(y))
    with ic.Progress(f"probe {decoder}", len(folds) * x.shape[1]) as progress:
        for layers in layers_at_a_time(x):
            part = Standardised(x[:, layers], torch.from_numpy(folds.train))
            for number in range(len(folds)):
                train, test = (torch.from_numpy(np.flatnonzero(of[number])) for of in (folds.train, folds.test))
                train = train[torch.from_numpy(folds.inner[number])[train].argsort(stable=True)]  # folds lie together
                inner = torch.from_numpy(folds.inner[number])[train]
                split = part.split(number, train, test, inner)
                targets = torch.from_numpy(every)[train]
                scores = _fitted(decoder, split, targets, len(classes), grid, seed)
                book.note(number, layers, train.numpy(), test.numpy(), scores)
                progress.add(len(scores.test))
    repeats = len(np.unique(folds.repeat))
    return Decoding(
        book.hits, book.counts, book.inner, book.correct / repeats, book.ranking, book.penalty, folds.repeat, shuffles,
        every.shape[1] - 1 - shuffles, folds.ratio, y, folds.groups, classes, decoder,
    )  # fmt: skip


def _fitted(
    decoder: str, split: Any, labels: Int[Tensor, "t column"], n_classes: int, penalties: tuple[float, ...], seed: int
) -> Scores:
    if decoder == "ridge":
        return decoders.ridge(split, labels, n_classes, penalties)
    if decoder == "logistic":
        return logistic(split, labels, n_classes, penalties)
    if decoder == "mlp":
        return mlp(split, labels, n_classes, seed)
    return {"means": decoders.difference_of_means, "lda": decoders.lda}[decoder](split, labels, n_classes)


class _Book:
    """Counts of right predictions, as splits come."""

    def __init__(
        self, labels: Int[np.ndarray, "sample labeling"], splits: int, layers: int, classes: int, n: int
    ) -> None:
        self.labels, self.classes = labels, classes
        self.hits = np.zeros((splits, layers, labels.shape[1], classes))
        self.counts = np.zeros((splits, labels.shape[1], classes))
        self.inner = np.full((splits, layers, labels.shape[1]), np.nan)
        self.correct = np.zeros((n, layers))
        self.ranking, self.penalty = np.full((2, splits, layers), np.nan)

    def note(
        self, split: int, layers: slice, train: Int[np.ndarray, " t"], test: Int[np.ndarray, " s"], scores: Scores
    ) -> None:
        """What a probe said of a split, of some layers."""
        labels = torch.from_numpy(self.labels[test])
        one_hot = (labels[..., None] == torch.arange(self.classes)).double()
        right = (predicted(scores.test) == labels).double()
        self.hits[split, layers] = torch.einsum("lsp,spc->lpc", right, one_hot).numpy()
        self.counts[split] = one_hot.sum(0).numpy()
        self.correct[test, layers] += right[:, :, 0].T.numpy()
        self.penalty[split, layers] = scores.penalty[:, 0].numpy()
        self.ranking[split, layers] = _ranking(scores.test[:, :, 0], members(labels[:, :1], self.classes)[:, 0])
        if scores.held is not None:
            fitted = torch.from_numpy(self.labels[train])
            self.inner[split, layers] = balanced(predicted(scores.held), fitted, self.classes).numpy()


def _ranking(scores: Float[Tensor, "layer s score"], high: Tensor) -> Float[np.ndarray, " layer"]:
    """Area under the ROC curve, ties half; NaN where a side is missing."""
    areas = []
    for number in range(high.shape[1]):
        above, below = scores[:, high[:, number], number], scores[:, ~high[:, number], number]
        areas.append(((above[:, :, None] - below[:, None]).sign() + 1).mean((1, 2)) / 2)
    return torch.stack(areas).mean(0).numpy()


def _states(states: Any) -> Float[Tensor, "sample layer d"]:
    """States as a tensor.

    Raises:
        PlanError: not numbers with three axes, or not finite.
    """
    try:
        x = (
            states.detach().cpu().as_subclass(Tensor)
            if isinstance(states, Tensor)
            else torch.from_numpy(np.array(states))
        )
    except (TypeError, ValueError) as error:
        raise ic.PlanError(ic.errors.wrong("decode: states", "numbers [sample layer d]", states)) from error
    if x.ndim != 3 or 0 in x.shape:
        raise ic.PlanError(f"decode: states [sample layer d] are needed, these have shape {list(x.shape)}")
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bool(bad.any()):
        raise ic.PlanError(
            f"decode: states of {int(bad.sum())} of {len(x)} samples are not finite, the first is sample "
            f"{int(bad.nonzero()[0])}; leave them out, and say how many"
        )
    return x


def _demand(
    x: Tensor, y: Int[np.ndarray, " sample"], folds: Folds, decoder: str, penalties: Any, shuffles: int
) -> None:
    if decoder not in DECODERS:
        raise ic.PlanError(f"no probe {decoder!r}. {ic.errors.nearest(decoder, DECODERS)}")
    if not len(x) == len(y) == folds.test.shape[1]:
        raise ic.PlanError(
            f"decode: {len(x)} states, {len(y)} labels, folds of {folds.test.shape[1]} samples; give one per sample"
        )
    if penalties is not None and (decoder not in ("ridge", "logistic") or not penalties or min(penalties) <= 0):
        raise ic.PlanError(f"decode: penalties {penalties} of {decoder}: numbers above 0, of ridge or logistic")
    if isinstance(shuffles, bool) or not isinstance(shuffles, int) or shuffles < 0:
        raise ic.PlanError(ic.errors.wrong("decode: shuffles", "how many permuted labelings", shuffles))
    for number in range(len(folds)):
        if len(np.unique(y[folds.train[number]])) < y.max() + 1:
            raise ic.PlanError(f"split {number} has no train sample of some class; take fewer folds")
