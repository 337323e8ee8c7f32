"""Tasks: pairs of input and output, and their split into training, validation and test rows.

A task file is a JSON list of objects with `input` and `output`, as `ericwtodd/function_vectors` publishes them. Split
of n rows at test_split s: p = RandomState(seed).permutation(n), m = ceil(s n); training p[m:], rest p[:m]; the rest is
split again with the same s and seed into test (first part) and validation (second part). That is scikit-learn's
`train_test_split`, applied twice as the reference does; antonym gives 1678, 216 and 504 rows.

Files hold pairs more than once (product-company: 20), and inputs with several outputs (national_parks: 26). Row numbers
make the split, so all rows stay; `Task.repeated` lists them. A demonstration may then be the query's own pair.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import interp_core as ic
from interp_core.errors import nearest

GROUPS = ("abstractive", "extractive")


class Pair(NamedTuple):
    """One example: what is asked and what is answered, without the template's spaces."""

    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """Pairs and their split.

    Attributes:
        name: of the task.
        pairs: all rows, in the order of the file.
        train, valid, test: row numbers, in split order.
        seed, test_split: of the split.
        source: the file, or the name where there is none.
    """

    name: str
    pairs: tuple[Pair, ...]
    train: tuple[int, ...]
    valid: tuple[int, ...]
    test: tuple[int, ...]
    seed: int = 0
    test_split: float = 0.3
    source: str = ""

    @staticmethod
    def of(
        name: str, pairs: Iterable[tuple[str, str]], *, seed: int = 0, test_split: float = 0.3, source: str = ""
    ) -> Task:
        """A task from pairs, or from a mapping's items.

        Raises:
            PlanError: no pairs, text that is missing, empty or not text, or a split outside (0, 1).
        """
        rows = tuple(Pair(*pair) for pair in pairs)
        if not rows:
            raise ic.PlanError(f"task {name} has no pairs")
        for row, pair in enumerate(rows):
            for field, text in zip(Pair._fields, pair, strict=True):
                _check_text(f"task {name}, row {row}", field, text)
        if not 0 < test_split < 1:
            raise ic.PlanError(f"task {name}: test_split is a share between 0 and 1, not {test_split}")
        train, rest = _parts(np.arange(len(rows)), test_split, seed)
        test, valid = _parts(rest, test_split, seed)
        first, second, third = (tuple(map(int, part)) for part in (train, valid, test))
        return Task(name, rows, first, second, third, seed, test_split, source or name)

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, split: str) -> tuple[int, ...]:
        """Row numbers of a split: "train", "valid" or "test"."""
        if split not in (names := ("train", "valid", "test")):
            raise ic.PlanError(f"task {self.name} has no split {split!r}. {nearest(split, names)}")
        rows: tuple[int, ...] = getattr(self, split)
        return rows

    @property
    def repeated(self) -> dict[str, tuple[str, ...]]:
        """Inputs that occur more than once, with all their outputs."""
        outputs: dict[str, list[str]] = {}
        for pair in self.pairs:
            outputs.setdefault(pair.input, []).append(pair.output)
        return {key: tuple(answers) for key, answers in outputs.items() if len(answers) > 1}

    def __str__(self) -> str:
        sizes = f"{len(self.train)} training, {len(self.valid)} validation, {len(self.test)} test"
        return f"{self.name}: {len(self)} pairs ({sizes}; seed {self.seed})"


def load_task(
    path_or_name: str | Path, *, folder: str | Path | None = None, seed: int = 0, test_split: float = 0.3
) -> Task:
    """A task from its file.

    Args:
        path_or_name: a JSON file; or, with `folder`, a task name.
        folder: where `{name}.json` lies, itself or in its `abstractive` or `extractive`.
        seed, test_split: of the split; see the module.

    Raises:
        LoadError: no such file, the name in both groups, or a file that is no list of pairs.
        PlanError: a pair that is missing, empty or not text.
    """
    path = Path(path_or_name) if folder is None else _named(Path(folder), str(path_or_name))
    if not path.is_file():
        around = path.parent if path.parent.is_dir() else Path()
        raise ic.LoadError(f"there is no task file {path}. {nearest(path.stem, _names(around))}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ic.LoadError(f"{path} is not JSON ({error}); copy the file again") from error
    if not isinstance(rows, list):
        raise ic.LoadError(f"{path} holds a {type(rows).__name__}, not a list of objects with 'input' and 'output'")
    pairs = [_pair(f"{path}, row {row}", item) for row, item in enumerate(rows)]
    if not pairs:
        raise ic.LoadError(f"{path} holds an empty list; a task needs pairs")
    return Task.of(path.stem, pairs, seed=seed, test_split=test_split, source=str(path))


def _pair(where: str, item: Any) -> Pair:
    if not isinstance(item, Mapping):
        raise ic.PlanError(f"{where} is {item!r}, not an object with 'input' and 'output'")
    for field in Pair._fields:
        if field not in item:
            raise ic.PlanError(f"{where} has no {field!r}. {nearest(field, map(str, item))}")
        _check_text(where, field, item[field])
    return Pair(item["input"], item["output"])


def _check_text(where: str, field: str, text: Any) -> None:
    if not isinstance(text, str):
        fix = f"; write {json.dumps(str(text))}" if isinstance(text, (int, float)) else ""
        raise ic.PlanError(f"{where}: {field} is {text!r} ({type(text).__name__}), not text{fix}")
    if not text.strip():
        raise ic.PlanError(f"{where}: {field} is empty ({text!r}); leave the pair out or fill it in")


def _named(folder: Path, name: str) -> Path:
    """The one file of a name in a folder of tasks."""
    paths = [path for group in ("", *GROUPS) if (path := folder / group / f"{name}.json").is_file()]
    if len(paths) > 1:
        raise ic.LoadError(f"{name} is ambiguous: {' and '.join(map(str, paths))}; give the file")
    if not paths:
        raise ic.LoadError(f"there is no task {name!r} in {folder}. {nearest(name, _names(folder))}")
    return paths[0]


def _names(folder: Path) -> list[str]:
    return sorted({path.stem for group in ("", *GROUPS) for path in (folder / group).glob("*.json")})


def _parts(
    rows: np.ndarray[Any, np.dtype[Any]], test_split: float, seed: int
) -> tuple[np.ndarray[Any, np.dtype[Any]], np.ndarray[Any, np.dtype[Any]]]:
    """Rows in two parts, the second with ceil(test_split · n) of them."""
    order = np.random.RandomState(seed).permutation(len(rows))
    cut = math.ceil(test_split * len(rows))
    return rows[order[cut:]], rows[order[:cut]]
