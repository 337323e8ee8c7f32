"""JSON and JSON lines from files: every error names the file, and the line where there are lines.

Empty lines are passed over, and so is a byte order mark, which editors on Windows put in front.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import interp_core as ic
from interp_core import runs

Bad = Callable[[int, ic.InterpError], None]
"""What gets the line and the error of a row that cannot be used."""


def read_json(path: str | Path, takes: str) -> Any:
    """What a JSON file says.

    Args:
        takes: which file is wanted, for the error.

    Raises:
        LoadError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ic.LoadError(f"{path} cannot be read ({error}); give {takes}") from error


def json_lines(
    path: str | Path, bad: Bad | None = None, takes: str = "a file with a JSON object per line"
) -> Iterator[tuple[int, Any]]:
    """What each line of a file says, with its line number.

    Args:
        bad: called with the number and error of every line that is no JSON, which is left out; without it the first one
            is raised.
        takes: which file is wanted, for the error.

    Raises:
        LoadError: no such file, or a line that is no JSON.
    """
    try:
        lines = runs.split_lines(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ic.LoadError(f"{path} cannot be read ({error}); give {takes}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parsed(line, f"{path}, line {number},")
        except ic.LoadError as error:
            if bad is None:
                raise
            bad(number, error)
            continue
        yield number, value


def json_rows(path: str | Path, bad: Bad | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines; a line of something else counts as one that is no JSON.

    Raises:
        LoadError: as `json_lines`.
    """
    for number, row in json_lines(path, bad):
        if isinstance(row, dict):
            yield number, row
            continue
        error = ic.LoadError(f"{path}, line {number}, is a {type(row).__name__}; a line holds one JSON object")
        if bad is None:
            raise error
        bad(number, error)


def parsed(text: str, where: str, what: str = "JSON") -> Any:
    """What a JSON text says.

    Raises:
        LoadError: it is none, or holds halves of characters, which no file and no tokenizer takes.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ic.LoadError(
            f"{where} holds half a character ({error.object[error.start]!r}); write whole ones"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ic.LoadError(f"{where} is no {what} ({error}); it may be cut off") from error
    return value
