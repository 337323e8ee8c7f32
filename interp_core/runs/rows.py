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
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import LoadError, PlanError
from .identity import difference, plain
from .stages import Stages, csv_text, json_lines

Row = dict[str, Any]


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
        self._file: int | None = None

    def __enter__(self) -> Rows:
        self.folder.last = self.name
        self.folder.claim([self.name])
        whole = self._read() if self.journal.exists() else 0
        self.folder.root.begin_change()
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, whole)  # without a line that was torn
        if not whole:
            self._append([self.inputs])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        if error is None:
            os.fsync(self._file)
        os.close(self._file)
        self._file = None
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
        self._append(group)
        self.groups[group[0][self.key]] = group

    def _append(self, group: list[Row]) -> None:
        """One line; nothing of it where it does not fit on the disk."""
        if self._file is None:
            raise PlanError(f"rows of {self.name} are added in a `with` block")
        line, size = (json.dumps(group, ensure_ascii=False) + "\n").encode(), os.fstat(self._file).st_size
        try:
            if (written := os.write(self._file, line)) != len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written to {self.journal}; make room")
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _read(self) -> int:
        """Take up the journal; gives the length of what is whole.

        Raises:
            LoadError: a line that is no group, before the last.
            PlanError: rows of other inputs.
        """
        whole = 0
        for number, line in enumerate(self.journal.read_bytes().splitlines(keepends=True), 1):
            try:
                group = json.loads(line)
                assert line.endswith(b"\n") and isinstance(group, list)
                key = None if number == 1 else group[0][self.key]
            except (ValueError, KeyError, IndexError, TypeError, AssertionError) as error:
                if not line.endswith(b"\n"):  # what a killed process was writing
                    break
                raise LoadError(
                    f"{self.journal}, line {number}, is not what was written ({error}); delete the file"
                ) from error
            if number == 1:
                self._check(group[0])
            else:
                self.groups[key] = group
            whole += len(line)
        return whole

    def _check(self, inputs: Row) -> None:
        if differs := difference(inputs, self.inputs):
            raise PlanError(
                f"{self.journal} holds rows of other inputs: {differs}; delete it, or give the run another folder"
            )


class Folder(Stages):
    """Stages with rows."""

    def rows(self, name: str, key: str, *, inputs: Mapping[str, Any] | None = None) -> Rows:
        """Rows that come one by one and are not lost when the run is stopped; see `Rows`."""
        return Rows(self, name, key, inputs)
