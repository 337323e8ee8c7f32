"""POPE: whether an object is in the picture, and how often a model says yes.

    accuracy, precision, recall, F1 of "yes", and the share of predictions that are yes

    official   the text before the first full stop, without commas, split at spaces: "No", "no" or "not" among its words
               is no; everything else is yes ("NO", "don't" and the empty text too)
    strict     a first word yes or no, or one of the two among the words; else unparsable: wrong, and never a yes

Where a number has nothing under its line it is None. Intervals draw images, each with all its questions.

Source: Li et al. (2023), arXiv:2305.10355. Official takes the text as it is, without extraction, unless told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

import interp_core as ic
from interp_core import stats

from .scoring import Score, Scorer, Scores
from .words import yes_or_no

METRICS = ("accuracy", "precision", "recall", "f1", "yes_rate")


@dataclass(frozen=True)
class PopeScores(Scores):
    """POPE's scores."""

    def _sums(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What is above and below the line of each metric, question by question."""
        said = np.array([score.read == "yes" for score in self.scores], float)
        true = np.array([score.gold == "yes" for score in self.scores], float)
        right, every = np.array(self.values), np.ones(len(self))
        both = said * true
        return {
            "accuracy": (right, every), "precision": (both, said), "recall": (both, true),
            "f1": (2 * both, said + true), "yes_rate": (said, every),
        }  # fmt: skip

    @property
    def metrics(self) -> dict[str, float | None]:
        """The five numbers, over all questions; unparsable predictions are no yes and wrong."""
        return {k: float(a.sum() / b.sum()) if b.sum() else None for k, (a, b) in self._sums().items()}

    def intervals(self, images: Sequence[Any], **settings: Any) -> dict[str, stats.Interval | None]:
        """The numbers with bootstrap intervals.

        Args:
            images: a label per question.
            settings: of `stats.Bootstrap`.
        """
        boot = stats.Bootstrap(clusters=images, **settings)
        return {k: boot.ratio(a, b, name=k) if b.sum() else None for k, (a, b) in self._sums().items()}

    def record(self) -> dict[str, Any]:
        """The counts and the five numbers as plain data."""
        return super().record() | self.metrics


@dataclass(frozen=True, kw_only=True)
class POPE(Scorer):
    """Accuracy of yes and no, with what POPE reports.

    Attributes:
        convention: how a text is read.
        extraction: None: not in official, which reads the text as it is.
    """

    name: ClassVar[str] = "pope"
    convention: Literal["official", "strict"] = "official"
    extraction: bool | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.extraction is None:
            object.__setattr__(self, "extraction", self.convention == "strict")
        super().__post_init__()

    def all(self, predictions: Sequence[str], golds: Sequence[str | Sequence[str]]) -> PopeScores:
        """The scores of predictions, each with its label."""
        scores = super().all(predictions, golds)
        return PopeScores(scores.scorer, scores.scores)

    def checked_golds(self, golds: str | Sequence[str]) -> tuple[str, ...]:
        labels = tuple(gold.strip().lower() for gold in super().checked_golds(golds))
        if len(labels) != 1 or labels[0] not in ("yes", "no"):
            raise ic.TextError(ic.errors.wrong(f"scorer {self.name!r}: golds", "the label yes or no", golds))
        return labels

    def scored(self, prediction: str, golds: tuple[str, ...]) -> Score:
        if self.convention == "strict":
            return super().scored(prediction, golds)
        answer = self._extracted(prediction)
        read = official(answer.answer)
        return Score(float(read == golds[0]), answer.answer, read, golds[0], cut=answer.cut)

    def _read(self, answer: str) -> tuple[str, str]:
        return yes_or_no(answer)

    def _value(self, read: str, gold: str) -> float:
        return float(read == gold)


def official(text: str) -> str:
    """What the published script reads: yes or no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"
