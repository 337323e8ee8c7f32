"""Relations: a table of pairs by question, what is wrong with its rows, and folder names for its questions.

    id,ex_A,ex_B
    Q1,dog,puppy
    Q1,cat,kitten
    Q3,camel,desert

The header is row 1, as in a spreadsheet. Columns are found whatever their case and punctuation (`id`, `q`, `q_id` or
`qid`; `ex_A`, `exA`; `ex_B`, `exB`), others are ignored; separated by commas, semicolons or tabs. Cells are read
without the blanks around them. Questions are in the order in which they first occur.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import interp_core as ic
from interp_core.errors import nearest

from ..tasks import Pair

KNOWN = {"q_column": ("id", "q", "qid"), "a_column": ("exa",), "b_column": ("exb",)}
"""Columns by the setting that names them, in lower case and without punctuation."""
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}[A-Za-z0-9_-]|[A-Za-z0-9]")


class Problem(NamedTuple):
    """What is wrong with a row."""

    row: int
    column: str
    message: str

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column}: {self.message}"


@dataclass(frozen=True)
class Question:
    """Rows of a relation that belong together.

    Attributes:
        q_id: as the table has it.
        folder: its name in the run's folder.
        pairs: input and output of its rows.
        rows: where they are in the table.
        columns: names of the columns of inputs and outputs.
        problems: what is wrong with them.
    """

    q_id: str
    folder: str
    pairs: tuple[Pair, ...]
    rows: tuple[int, ...]
    columns: tuple[str, str] = ("ex_A", "ex_B")
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def digest(self) -> str:
        """SHA-256 of the pairs, in order."""
        return hashlib.sha256(json.dumps(self.pairs, ensure_ascii=False).encode()).hexdigest()


def read_relation(
    path: str | Path,
    *,
    q_column: str | None = None,
    a_column: str | None = None,
    b_column: str | None = None,
    numbers: bool = False,
) -> list[Question]:
    """The questions of a relation, each with what is wrong with its rows: empty cells, numbers, pairs that it holds
    twice.

    Args:
        q_column, a_column, b_column: columns of question, input and output (None: found by name).
        numbers: cells may be numbers.

    Raises:
        LoadError: no such file, no table, or no rows.
        PlanError: columns that are missing or cannot be told apart, a row of another length, or without a question.
    """
    names, records = _table(Path(path))
    columns_named = {"q_column": q_column, "a_column": a_column, "b_column": b_column}
    at = [_column(str(path), names, setting, column_name) for setting, column_name in columns_named.items()]
    by_question: dict[str, list[tuple[int, Pair]]] = {}
    for row, cells in records:
        if len(cells) != len(names):
            raise ic.PlanError(
                f"{path}, row {row} has {len(cells)} cells, the header {len(names)}; put cells that hold a separator "
                'in "quotes"'
            )
        q_id, a, b = (cells[place].strip() for place in at)
        if not q_id:
            raise ic.PlanError(f"{path}, row {row}, column {names[at[0]]} is empty; every pair belongs to a question")
        by_question.setdefault(q_id, []).append((row, Pair(a, b)))
    folders, columns = folder_names(by_question), (names[at[1]], names[at[2]])
    questions = []
    for q_id, listed in by_question.items():
        rows, pairs = tuple(row for row, _ in listed), tuple(pair for _, pair in listed)
        problems = tuple(_problems(listed, columns, numbers))
        questions.append(Question(q_id, folders[q_id], pairs, rows, columns, problems))
    return questions


def _table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Names of columns, and the rows that are not blank, with their numbers."""
    if not path.is_file():
        around = sorted(item.name for item in path.parent.glob("*.csv")) if path.parent.is_dir() else []
        raise ic.LoadError(f"there is no relation {path}. {nearest(path.name, around)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.splitlines()[0] if text.strip() else ""
        # spreadsheets save with the separator of their country: the header shows which
        separator = max(",;\t", key=first.count)
        rows = list(enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), 1))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ic.LoadError(f"{path} is no table of text ({error}); save it as CSV in UTF-8") from error
    filled = [(row, cells) for row, cells in rows if any(cell.strip() for cell in cells)]
    if len(filled) < 2:
        held = "only a header" if filled else "nothing"
        raise ic.LoadError(f"{path} holds {held}; a relation has columns id, ex_A, ex_B and a pair per row")
    return [name.strip() for name in filled[0][1]], filled[1:]


def _column(path: str, names: Sequence[str], setting: str, column_name: str | None) -> int:
    """Where a column is."""
    if column_name is not None:
        if column_name not in names:
            raise ic.PlanError(f"{path} has no column {column_name!r} ({setting}). {nearest(column_name, names)}")
        return names.index(column_name)
    fitting = [at for at, name in enumerate(names) if re.sub(r"[\W_]", "", name).lower() in KNOWN[setting]]
    if not fitting:
        raise ic.PlanError(
            f"{path} has no column for {setting}: it has {', '.join(map(repr, names))}, none like "
            f"{' or '.join(KNOWN[setting])}. Set {setting}"
        )
    if len(fitting) > 1:
        raise ic.PlanError(
            f"{path} has columns {' and '.join(repr(names[at]) for at in fitting)}, both like {setting}. Set {setting}"
        )
    return fitting[0]


def _problems(listed: Sequence[tuple[int, Pair]], columns: tuple[str, str], numbers: bool) -> Iterable[Problem]:
    """Empty cells, numbers, and pairs that are there before."""
    seen: dict[Pair, int] = {}
    for row, pair in listed:
        for column, text in zip(columns, pair, strict=True):
            if not text:
                yield Problem(row, column, "is empty")
            elif not numbers and _is_number(text):
                yield Problem(row, column, f"{text!r} is a number, not a word (numbers=true allows it)")
        if all(pair) and pair in seen:
            yield Problem(row, columns[0], f"{pair.input!r} → {pair.output!r} is in row {seen[pair]} already")
        seen.setdefault(pair, row)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def folder_names(q_ids: Iterable[str]) -> dict[str, str]:
    """A folder's name for every question: its own where that is a plain short name, else one with a digest.

    Letters, digits, `.`, `_` and `-` are plain, up to 64, neither begun nor ended by a full stop. Names that differ
    only in case get a digest too, since some file systems take them for one.
    """
    listed = list(dict.fromkeys(q_ids))
    names = {q_id: q_id if _SAFE.fullmatch(q_id) else _digested(q_id) for q_id in listed}
    # twice: a digest that is put in may itself be the plain name of another question
    for _ in range(2):
        counts = Counter(name.casefold() for name in names.values())
        names = {q_id: name if counts[name.casefold()] == 1 else _digested(q_id) for q_id, name in names.items()}
    return names


def _digested(q_id: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9]+", "_", q_id)[:40].strip("_") or "q"
    return f"{plain}-{hashlib.sha256(q_id.encode()).hexdigest()[:10]}"


def chosen(questions: Sequence[Question], q_ids: Sequence[str] | None, limit: int | None) -> list[Question]:
    """Some of the questions, in the table's order.

    Args:
        q_ids: which (None: all).
        limit: at most so many.

    Raises:
        PlanError: a question that the relation does not have.
    """
    known: Mapping[str, Question] = {question.q_id: question for question in questions}
    for q_id in q_ids or ():
        if q_id not in known:
            raise ic.PlanError(f"the relation has no question {q_id!r}. {nearest(q_id, known)}")
    selected = [question for question in questions if q_ids is None or question.q_id in q_ids]
    return selected[:limit]
