"""Rows that come one by one. Every `add` is one line of a journal in the run's record; the file is made when all are
there.

    with run.rows("scores.jsonl", key="example") as rows:
        for example in examples:
            if example.id not in rows:
                rows.add({"example": example.id, "score": score(example)})

A line that was torn by a kill or a full disk is left out when the journal is read, and what it held is done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import LoadError, PlanError
from . import journals
from .identity import difference, plain
from .journals import Journal, Row
from .mapping import Beside, Made, Table
from .stages import Stages, csv_text, json_lines


class Rows:
    """Rows in groups: the groups' keys, and all rows in the order in which their groups first came.

    Rows of a key that is there already take the place of those before. When the `with` block ends without an error the
    file is written, as CSV where its name says so.
    """

    def __init__(self, folder: Stages, name: str, key: str, inputs: Mapping[str, Any] | None = None) -> None:
        if Path(name).suffix not in (".jsonl", ".csv"):
            raise PlanError(f"rows are written as .jsonl or .csv, not as {name}")
        self.folder, self.name, self.key = folder, name, key
        self.inputs: Row = plain(dict(inputs or {}), "inputs")
        self.journal = folder.root.record / "rows" / folder.prefix / f"{name}.journal"
        self.groups: dict[Any, list[Row]] = {}
        self._writing: Journal | None = None

    def __enter__(self) -> Rows:
        self.folder.last = self.name
        self.folder.claim([self.name])
        leads = self.folder.root.leads(lambda: self.folder.has_made(self.name))
        if self.journal.exists():
            self._read()
        if not leads:
            return self
        self.folder.root.begin_change()
        self._writing = Journal(self.journal)
        if self._writing.is_new:
            self._writing.append([self.inputs])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is None:
            return
        self._writing.close(sync=error is None)
        self._writing = None
        if error is None:
            rows = list(self)
            text = csv_text(rows) if self.name.endswith(".csv") else json_lines(rows)
            self.folder.put({self.name: text}, stage=self.name, inputs=self.inputs)

    def __contains__(self, key: object) -> bool:
        return key in self.groups

    def __iter__(self) -> Iterator[Row]:
        return (row for group in self.groups.values() for row in group)

    def __len__(self) -> int:
        return len(self.groups)

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Note a group of rows, which have one value under `key`: all of them or none.

        Raises:
            PlanError: rows of several keys, or something that JSON cannot hold.
        """
        group = [plain(dict(row), "a row") for row in rows]
        if len({json.dumps(row.get(self.key)) for row in group}) != 1 or group[0].get(self.key) is None:
            raise PlanError(f"rows of one group have one value under {self.key!r}; add other values' rows apart")
        if self._writing is None:
            raise PlanError(f"rows of {self.name} are added in a `with` block")
        self._writing.append(group)
        self.groups[group[0][self.key]] = group

    def _read(self) -> None:
        """Take up the journal.

        Raises:
            LoadError: a line that is no group, before the last.
            PlanError: rows of other inputs.
        """
        groups, _ = journals.read(self.journal)
        if groups:
            self._check(groups[0][0])
        for number, group in enumerate(groups[1:], 2):
            if self.key not in group[0]:
                raise LoadError(
                    f"{self.journal}, line {number}, is not what was written (no {self.key!r}); delete the file"
                )
            self.groups[group[0][self.key]] = group

    def _check(self, inputs: Row) -> None:
        if differs := difference(inputs, self.inputs):
            raise PlanError(
                f"{self.journal} holds rows of other inputs: {differs}; delete it, or give the run another folder"
            )


class Folder(Stages):
    """Stages with rows."""

    def map(
        self,
        name: str,
        make: Callable[[Any], Made],
        items: Iterable[Any],
        *,
        by: Callable[[Any], str | int],
        inputs: Mapping[str, Any] | None = None,
        batch: int | None = None,
        alike: Callable[[Any], Any] | None = None,
        strict: bool = False,
        beside: Beside = None,
        file: bool = True,
    ) -> list[Row]:
        """Rows of items that do not depend on each other: those of earlier runs, and the others made now, here or by
        every process that is at work on the run. An item that raises an error is noted, and the rest goes on.

        Args:
            name: of the file that all rows are written to, in the order of the items; `.jsonl` or `.csv`, unless there
                is no file.
            make: the row of an item, or its rows, if any. With `batch`, of a list of items, a list of these.
            items: worked at one by one; each is a piece of work which the run can be stopped before and after.
            by: what an item is called; no two have the same name.
            inputs: what the rows depend on beside the run's settings, its model and the items.
            batch: so many items are made together, the same ones whatever was done before.
            alike: only items of which it says the same are made together.
            strict: an item's error ends the run.
            beside: of an item and its rows, names of the files that `make` put; without them the rows are made again.
            file: false for rows of which a stage is made that is `shared`: they stand in the run's record alone, and
                those of other inputs are others.

        Raises:
            ItemError: items raised errors; the others are done.
            PlanError: two items of one name; rows that are there are of other items or inputs.
        """
        return Table(self, name, inputs, strict, beside, file).map(make, list(items), by, batch, alike)

    def rows(self, name: str, key: str, *, inputs: Mapping[str, Any] | None = None) -> Rows:
        """Rows that come one by one and are not lost when the run is stopped; see `Rows`."""
        return Rows(self, name, key, inputs)
