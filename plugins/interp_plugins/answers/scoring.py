"""Scores of answers: one prediction, and many with what is counted about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import interp_core as ic
from interp_core import errors, stats

from .extraction import Extraction, extract


@dataclass(frozen=True)
class Score:
    """What one prediction is worth.

    Attributes:
        value: 0 to 1.
        answer: the text that was compared, after extraction.
        read: what it was read as: "yes", "3", a cleaned text; empty if it was not.
        gold: the gold answer that it scored best with.
        problem: why it could not be read; it scores 0. Empty if it was.
        cut: words were left off for `max_words`.
    """

    value: float
    answer: str
    read: str
    gold: str
    problem: str = ""
    cut: bool = False

    @property
    def parsed(self) -> bool:
        """Whether there was an answer to compare."""
        return not self.problem

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Scores:
    """Scores of many predictions.

    Attributes:
        scorer: its name and options, in words.
        scores: in the order of the predictions.
        legacy: the scorer is kept for comparison with old numbers alone.
    """

    scorer: str
    scores: tuple[Score, ...]
    legacy: bool = False

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def values(self) -> list[float]:
        """The numbers, in order."""
        return [score.value for score in self.scores]

    @property
    def mean(self) -> float:
        """Their mean, unparsable ones as 0."""
        return sum(self.values) / len(self)

    @property
    def unparsable(self) -> int:
        """How many predictions had no answer that could be read."""
        return sum(not score.parsed for score in self.scores)

    @property
    def problems(self) -> dict[str, int]:
        """Why they could not be read, and how often."""
        return dict(Counter(score.problem for score in self.scores if score.problem))

    def interval(self, images: Sequence[Any] | None = None, **settings: Any) -> stats.Interval:
        """The mean with its bootstrap interval.

        Args:
            images: a label per prediction: questions about one image are drawn together.
            settings: of `stats.Bootstrap`.
        """
        return stats.Bootstrap(clusters=images, **settings).mean(self.values, name=self.scorer)

    def by(self, labels: Sequence[Any]) -> dict[Any, Scores]:
        """The scores of each label (human and augmented questions, kinds), in the order in which labels appear.

        Raises:
            PlanError: another number of labels.
        """
        if len(labels) != len(self):
            raise ic.PlanError(f"Scores.by: {len(labels)} labels for {len(self)} scores; give one per prediction")
        parts: dict[Any, list[Score]] = {}
        for label, score in zip(labels, self.scores, strict=True):
            parts.setdefault(label, []).append(score)
        return {label: type(self)(self.scorer, tuple(part), self.legacy) for label, part in parts.items()}

    def record(self) -> dict[str, Any]:
        """The counts as plain data."""
        record: dict[str, Any] = {"scorer": self.scorer, "n": len(self), "mean": self.mean}
        record |= {"unparsable": self.unparsable, "problems": self.problems, "cut": sum(s.cut for s in self.scores)}
        return record | ({"legacy": True} if self.legacy else {})

    def __str__(self) -> str:
        said = f"{self.scorer}: {self.mean:.4f} (n = {len(self)}, {self.unparsable} unparsable)"
        return said + " LEGACY: counts any answer that contains the gold one" * self.legacy


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What a kind of scorer says; its options are its fields.

    Attributes:
        extraction: find the answer within the text first; else the text is scored as it is.
        max_words: how many words of the answer count.
    """

    name: ClassVar[str]
    legacy: ClassVar[bool] = False
    extraction: bool = True
    max_words: int | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, value in self.options.items():
            if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
                near = errors.nearest(value, get_args(hints[name]))
                raise ic.PlanError(f"scorer {self.name!r} has no {name} {value!r}. {near}")
            if hints[name] is bool and not isinstance(value, bool):
                raise ic.PlanError(errors.wrong(f"scorer {self.name!r}: {name}", "True or False", value))
        # refuses a number of words that is none now, not at the first prediction
        extract("", self.max_words)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        changed = [f"{name}={v!r}" for name, v in self.options.items() if name == "convention" or v != defaults[name]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def __call__(self, prediction: str, golds: str | Sequence[str]) -> Score:
        """The score of a prediction.

        Args:
            prediction: what a model wrote.
            golds: the gold answer, or several.

        Raises:
            TextError: no gold answer, or one that is none of its kind.
            PlanError: a prediction that is no text.
        """
        return self.scored(prediction, self.checked_golds(golds))

    def all(self, predictions: Sequence[str], golds: Sequence[str | Sequence[str]]) -> Scores:
        """The scores of predictions, each with its gold answers.

        Raises:
            PlanError: different numbers of them, or none.
            TextError: a question without gold answer, naming it by its number.
        """
        self._aligned(predictions, golds=golds)
        return self._together(lambda i: self(predictions[i], golds[i]), len(predictions))

    def _aligned(self, predictions: Sequence[str], **others: Sequence[Any]) -> None:
        for what, other in others.items():
            if isinstance(predictions, str) or isinstance(other, str) or len(predictions) != len(other):
                raise ic.PlanError(
                    f"scorer {self.name!r}: {len(predictions)} predictions and {len(other)} {what}; give lists of one "
                    "length"
                )
        if not len(predictions):
            raise ic.PlanError(f"scorer {self.name!r}: there is no prediction to score")

    def _together(self, score: Any, count: int) -> Scores:
        scores = []
        for number in range(count):
            try:
                scores.append(score(number))
            except ic.InterpError as error:
                raise type(error)(f"prediction {number}: {error}") from error
        return self._sum(tuple(scores))

    def _sum(self, scores: tuple[Score, ...]) -> Scores:
        return Scores(str(self), scores, self.legacy)

    def checked_golds(self, golds: str | Sequence[str]) -> tuple[str, ...]:
        what, takes = f"scorer {self.name!r}: golds", "a text, or several"
        several = (golds,) if isinstance(golds, str) else errors.several(what, takes, golds, ic.TextError)
        if not several or not all(isinstance(gold, str) for gold in several):
            raise ic.TextError(errors.wrong(what, takes, golds))
        return several

    def _extracted(self, prediction: str) -> Extraction:
        if self.extraction or not isinstance(prediction, str):
            return extract(prediction, self.max_words)
        return Extraction(prediction, "text")

    def scored(self, prediction: str, golds: tuple[str, ...]) -> Score:
        answer = self._extracted(prediction)
        if answer.problem:
            return Score(0.0, "", "", golds[0], answer.problem)
        read, problem = self._read(answer.answer)
        if problem:
            return Score(0.0, answer.answer, "", golds[0], problem, answer.cut)
        values = [self._value(read, gold) for gold in golds]
        best = max(range(len(golds)), key=values.__getitem__)
        return Score(values[best], answer.answer, read, golds[best], cut=answer.cut)

    def _read(self, answer: str) -> tuple[str, str]:
        """What an answer is read as, and why it cannot be read."""
        return answer, ""

    def _value(self, read: str, gold: str) -> float:
        """What an answer that was read is worth beside one gold answer."""
        raise NotImplementedError
