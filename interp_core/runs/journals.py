"""Journals: lists, one per line, of which a kill or a full disk loses none but the one being written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LoadError

Row = dict[str, Any]


class Journal:
    """A journal that is being written.

    Args:
        path: of the file; what is whole in it stays, a torn last line goes.
    """

    def __init__(self, path: Path) -> None:
        whole = read(path)[1] if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, whole)
        self.is_new = not whole

    def append(self, group: Sequence[Any]) -> None:
        """One line; nothing of it where it does not fit on the disk."""
        assert self._file is not None
        line, size = line_of(group), os.fstat(self._file).st_size
        try:
            if (written := os.write(self._file, line)) != len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written to {self.path}; make room")
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def close(self, sync: bool = True) -> None:
        """Close the file; what it holds is on the disk then, unless `sync` is false."""
        assert self._file is not None
        try:
            if sync:
                os.fsync(self._file)
        finally:
            os.close(self._file)
            self._file = None


def line_of(group: Sequence[Any]) -> bytes:
    """A group as its line."""
    return (json.dumps(group, ensure_ascii=False) + "\n").encode()


def read(path: Path) -> tuple[list[list[Any]], int]:
    """Groups of a journal, and how many bytes of it are whole.

    Raises:
        LoadError: a line that is no group, before the last.
    """
    groups, whole = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            group = json.loads(line)
            assert line.endswith(b"\n") and isinstance(group, list) and group
        except (ValueError, AssertionError) as error:
            if not line.endswith(b"\n"):  # what a killed process was writing
                break
            raise LoadError(f"{path}, line {number}, is not what was written ({error}); delete the file") from error
        groups.append(group)
        whole += len(line)
    return groups, whole
