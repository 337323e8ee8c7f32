"""Tables of evaluations in their published form, to the letter.

    faithfulness/<data set>/<model>/<method>_<num_examples>_examples.csv
        Method,RISE,MAS,RISE+AP / Seq, Row, Recursive Attr Scores Mean / the same Var / Avg Sample Time (s)
    recovery/<data set>/<model>/<method>_<num_examples>_examples.csv
        Method,Recovery@10% / Seq, Row, Recursive Attr Recovery Mean / Std / Examples Used / Examples Skipped / the time

"Var" rows hold standard deviations there, and do so here: over examples, of the population. num_examples is what was
asked for, not what was there. Our own tables are in `comparing.py`.

Source: the files that FlashTrace's experiments write (`exp2`, commit 075e7e4).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import interp_core as ic

from .faithfulness import METRICS

FORMS = ("Seq", "Row", "Recursive")
RECOVERY = "Recovery@10%"
TIME = "Avg Sample Time (s)"
COUNTS = ("Examples Used", "Examples Skipped")


@dataclass(frozen=True)
class Published:
    """A published table.

    Attributes:
        columns: RISE, MAS and RISE+AP, or Recovery@10%.
        mean, spread: per form (seq, row, rec) a number per column; spread is a standard deviation.
        seconds: per example.
        used, skipped: numbers of examples; None where the table has none.
    """

    columns: tuple[str, ...]
    mean: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...]
    seconds: float
    used: int | None = None
    skipped: int | None = None

    def text(self) -> str:
        """The file."""
        what, spread = ("Scores", "Var") if self.used is None else ("Recovery", "Std")
        rows: list[Sequence[Any]] = [("Method", *self.columns)]
        for word, numbers in (("Mean", self.mean), (spread, self.spread)):
            rows += [(f"{form} Attr {what} {word}", *line) for form, line in zip(FORMS, numbers, strict=True)]
        if self.used is not None:
            rows += list(zip(COUNTS, (self.used, self.skipped), strict=True))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (TIME, self.seconds)])
        return text.getvalue()


def faithfulness_table(scores: Any, seconds: Sequence[float]) -> Published:
    """The table of RISE, MAS and RISE+AP.

    Args:
        scores: `[example, form, metric]`: of seq, row and rec, in the order of `METRICS`.
        seconds: of each example's attribution.

    Raises:
        PlanError: no examples, other shapes, numbers that are not finite.
    """
    values = _examples("faithfulness_table", scores, (len(FORMS), len(METRICS)))
    return _published(METRICS, values, seconds)


def recovery_table(recovered: Any, seconds: Sequence[float], *, skipped: int = 0) -> Published:
    """The table of Recovery@10%.

    Args:
        recovered: `[example, form]`, of the examples that have gold tokens.
        seconds: of each of these examples' attribution.
        skipped: examples without gold tokens.

    Raises:
        PlanError: no examples (the published command writes no file then), other shapes, numbers that are not finite.
    """
    values = _examples("recovery_table", recovered, (len(FORMS),))[..., None]
    return _published((RECOVERY,), values, seconds, len(values), skipped)


def _published(
    columns: tuple[str, ...], values: np.ndarray, seconds: Sequence[float], used: int | None = None,
    skipped: int | None = None,
) -> Published:  # fmt: skip
    # numpy's std is that of the population, as in the published files
    mean, spread = (tuple(map(tuple, part.tolist())) for part in (values.mean(0), values.std(0)))
    return Published(columns, mean, spread, float(np.mean(seconds)) if len(seconds) else 0.0, used, skipped)


def _examples(owner: str, values: Any, axes: tuple[int, ...]) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        raise ic.PlanError(f"{owner}: there are no examples, and a table of none says nothing")
    if numbers.shape[1:] != axes:
        raise ic.PlanError(f"{owner} takes [example, {', '.join(map(str, axes))}], not {list(numbers.shape)}")
    if not np.isfinite(numbers).all():
        example = int(np.argwhere(~np.isfinite(numbers))[0][0])
        raise ic.PlanError(f"{owner}: example {example} has numbers that are not finite; leave it out, and count it")
    return numbers


def read_table(text: str) -> Published:
    """A published table, of either kind.

    Raises:
        LoadError: another file, naming the first line that differs.
    """
    rows = list(csv.reader(io.StringIO(text)))
    kinds = {METRICS: ("Scores", "Var", ()), (RECOVERY,): ("Recovery", "Std", COUNTS)}
    columns = tuple(rows[0][1:]) if rows else ()
    if columns not in kinds:
        raise ic.LoadError(f"no table of an evaluation: it begins with {rows[0] if rows else 'nothing'}")
    what, spread, counts = kinds[columns]
    names = [f"{form} Attr {what} {word}" for word in ("Mean", spread) for form in FORMS]
    wanted = [*names, *counts, TIME]
    for number, name in enumerate(wanted, 1):
        have = rows[number] if number < len(rows) else []
        expected = 1 + (len(columns) if number <= len(names) else 1)
        if not have or have[0] != name or len(have) != expected:
            raise ic.LoadError(f"line {number + 1} of the table is {have}, not {name!r} and {expected - 1} number(s)")
    try:
        lines = [tuple(map(float, row[1:])) for row in rows[1 : 1 + len(names)]]
        tail = [row[1] for row in rows[1 + len(names) : 1 + len(wanted)]]
        used, skipped = (int(tail[0]), int(tail[1])) if counts else (None, None)
        seconds = float(tail[-1])
    except ValueError as error:
        raise ic.LoadError(f"the table holds something that is no number: {error}") from error
    return Published(columns, tuple(lines[:3]), tuple(lines[3:]), seconds, used, skipped)


def table_path(kind: str, dataset: str, model: str, method: str, num_examples: int) -> str:
    """Where a table lies in a published tree; a data set given as a path, or a model by its hub id, makes more folders.

    Args:
        kind: "faithfulness" or "recovery".
        dataset: a name, or the path of a file (from the root: without it, to stay in the tree).
        model: the label.
        num_examples: as asked for.

    Raises:
        PlanError: names that lead out of the tree.
    """
    places = {"data set": dataset.lstrip("/"), "model": model, "method": f"{method}_{num_examples}_examples.csv"}
    for what, place in places.items():
        parts = place.split("/")
        if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
            raise ic.PlanError(f"{what} {place!r} cannot be a place in a tree of results; give a plain name")
    return "/".join((kind, *places.values()))
