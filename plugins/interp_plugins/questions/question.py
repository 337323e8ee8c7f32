"""What a question about images is, and what several are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import interp_core as ic
from interp_core import runs

from .images import RowError, demand_image, opened
from .selection import ranked


@dataclass(frozen=True)
class Question:
    """A question about images, with the answers that are right.

    Attributes:
        name: unique among the questions that it comes with.
        images: files, or images of Pillow.
        question: the text.
        answers: one, or several (DocVQA's variants, ten people's of VQAv2).
        kind: "human", "yes/no", "adversarial": what scores are told apart by.
        meta: what else the source says of it; "difficulty" and "boxes" (left, top, right, bottom in pixels) have a
            meaning here.

    Raises:
        RowError: no image, no question or no answer.
    """

    name: str
    images: tuple[Any, ...]
    question: str
    answers: tuple[str, ...]
    kind: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise RowError("question", "it has no question")
        if not self.images:
            raise RowError("image", "it has no image")
        if not any(isinstance(answer, str) and answer.strip() for answer in self.answers):
            raise RowError("answer", "it has no answer")

    def pictures(self) -> list[Any]:
        """The images, decoded, in RGB.

        Raises:
            LoadError: a file that is gone or cannot be decoded, naming the question.
        """
        try:
            return [opened(image) for image in self.images]
        except RowError as error:
            raise ic.LoadError(f"question {self.name!r}: {error}") from error

    @property
    def image(self) -> str:
        """A label of its images, the same for questions about the same ones: what a bootstrap draws."""
        labels = [
            str(image) if isinstance(image, Path) else runs.digest([list(image.size), image.tobytes().hex()])
            for image in self.images
        ]
        return " ".join(labels)

    @property
    def difficulty(self) -> str | None:
        """What the source says of it ("easy", "hard"); None where it says nothing. Never guessed from the text."""
        difficulty = self.meta.get("difficulty")
        return difficulty if isinstance(difficulty, str) else None


@dataclass(frozen=True)
class Skipped:
    """A row that could not be used.

    Attributes:
        where: file and row.
        field: what of it is wrong.
        reason: why.
        detail: the message.
    """

    where: str
    field: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Questions(Sequence[Question]):
    """Questions in the order of their file, and the rows that could not be used.

    Attributes:
        questions: those that can be.
        skipped: those that cannot.
        source: the file.
    """

    questions: tuple[Question, ...]
    skipped: tuple[Skipped, ...] = ()
    source: str = "questions"

    def __len__(self) -> int:
        return len(self.questions)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Questions: ...
    def __getitem__(self, index: int | slice) -> Question | Questions:
        if isinstance(index, slice):
            return Questions(self.questions[index], self.skipped, self.source)
        return self.questions[index]

    @property
    def counts(self) -> dict[str, int]:
        """How many rows could not be used, by field and reason."""
        return dict(Counter(f"{row.field}: {row.reason}" for row in self.skipped))

    @property
    def kinds(self) -> dict[str, int]:
        """How many questions of each kind."""
        return dict(Counter(question.kind for question in self.questions))

    def where(self, keep: Callable[[Question], bool]) -> Questions:
        """The questions of which something holds."""
        return Questions(tuple(filter(keep, self.questions)), self.skipped, self.source)

    def select(self, count: int, *, seed: int = 0, by: str | None = "kind") -> Questions:
        """So many questions, drawn by a seed, in the order of the file; fewer are among more.

        Args:
            by: "kind" or "difficulty": each in its share; None: all alike.

        Raises:
            PlanError: more than there are.
        """
        return self.split(count, seed=seed, by=by)[0]

    def split(self, *counts: int, seed: int = 0, by: str | None = "kind") -> tuple[Questions, ...]:
        """Several selections that share no question: pilots, and those that come after."""
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise ic.PlanError(ic.errors.wrong("select", "whole numbers of questions from 1 on", counts))
        if sum(counts) > len(self):
            why = "; ".join(f"{n} for {reason}" for reason, n in list(self.counts.items())[:3])
            left = f" ({len(self.skipped)} rows could not be used: {why})" if self.skipped else ""
            raise ic.PlanError(
                f"{sum(counts)} questions are asked for, {self.source} has {len(self)}{left}; give fewer"
            )
        if by not in ("kind", "difficulty", None):
            raise ic.PlanError(f"there is no by={by!r}. {ic.errors.nearest(by, ('kind', 'difficulty'))}")
        strata = [getattr(question, by) if by else None for question in self.questions]
        order = ranked([question.name for question in self.questions], strata, seed)
        parts, start = [], 0
        for count in counts:
            # drawn by rank, and put back into the file's order
            chosen = tuple(self.questions[i] for i in sorted(order[start : start + count]))
            parts.append(Questions(chosen, self.skipped, self.source))
            start += count
        return tuple(parts)

    def checked(self) -> Questions:
        """The questions whose images can be decoded; the others are skipped, with the reason."""
        good, bad = [], list(self.skipped)
        with ic.Progress("images", len(self)) as progress:
            for question in self.questions:
                try:
                    for image in question.images:
                        if isinstance(image, Path):
                            opened(image)
                    good.append(question)
                except RowError as error:
                    bad.append(Skipped(f"{self.source}, {question.name!r}", error.field, error.reason, str(error)))
                progress.add()
        return Questions(tuple(good), tuple(bad), self.source)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind or 'of no kind'}" for kind, count in self.kinds.items())
        lines = [f"{self.source}: {len(self)} questions ({kinds})"]
        lines += [f"  {count} rows skipped: {reason}" for reason, count in self.counts.items()]
        return "\n".join(lines)


Row = tuple[str, Callable[[], Question]]
"""Where a row stands, and what makes a question of it."""


def gathered(source: str, rows: Iterable[Row], *, strict: bool = False) -> Questions:
    """The questions of rows, with those that cannot be used.

    Args:
        strict: the first row that cannot be used is an error.

    Raises:
        LoadError: no row can be used; with `strict`, one that cannot, naming row and field.
    """
    good: dict[str, Question] = {}
    bad: list[Skipped] = []
    known: dict[Path, RowError | None] = {}
    with ic.Progress(f"questions of {source}") as progress:
        for where, make in rows:
            try:
                question = make()
                if question.name in good:
                    raise RowError("name", "another question has it", repr(question.name))
                for image in question.images:
                    if isinstance(image, Path):
                        _check(image, known)
                good[question.name] = question
            except RowError as error:
                if strict:
                    raise ic.LoadError(f"{where}: {error}") from error
                bad.append(Skipped(where, error.field, error.reason, str(error)))
            progress.add()
    questions = Questions(tuple(good.values()), tuple(bad), source)
    if not good:
        why = "; ".join(f"{count} {reason}" for reason, count in questions.counts.items()) or "it has no row"
        first = f". The first: {bad[0].where}: {bad[0].detail}" if bad else ""
        raise ic.LoadError(f"no question of {source} can be used: {why}{first}")
    return questions


def _check(path: Path, known: dict[Path, RowError | None]) -> None:
    """Read an image's header, once.

    Raises:
        RowError: it cannot be.
    """
    if path not in known:
        try:
            demand_image(path)
            known[path] = None
        except RowError as error:
            known[path] = error
    if (problem := known[path]) is not None:
        raise problem
