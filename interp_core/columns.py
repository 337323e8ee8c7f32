"""Rows of cells as lines of text, shortened with an ellipsis where a terminal is too narrow for them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

GAP = 2
NARROWEST = 8
"""Letters with which a column still says something."""


def terminal_width() -> int | None:
    """How many letters a line of the terminal has; None where standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def shortened(text: str, width: int) -> str:
    """The text in so many letters, the last an ellipsis where some are missing."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def aligned(rows: Sequence[Sequence[str]], width: int | None = None, keep: int = 1) -> list[str]:
    """Lines with aligned columns. In `width` letters the last columns are left out until the others have room, and the
    widest are shortened, the first of all last.

    Args:
        keep: how many columns are never left out.
    """
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        widths = _fitted(widths, width, keep)
    return [
        (" " * GAP).join(shortened(cell, w).ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]


def _fitted(widths: list[int], width: int, keep: int) -> list[int]:
    least = [widths[0], *(min(each, NARROWEST) for each in widths[1:])]
    count = len(widths)
    while count > keep and sum(least[:count]) + GAP * (count - 1) > width:
        count -= 1
    fitted, room = widths[:count], width - GAP * (count - 1)
    while sum(fitted) > room and max(fitted) > 1:
        widest = max(fitted[1:], default=0)
        fitted[1 + fitted[1:].index(widest) if widest > NARROWEST else fitted.index(max(fitted))] -= 1
    return fitted


def wrapped(text: str, width: int | None = None, indent: str = "  ") -> str:
    """Sentences in lines of `width` letters, those after the first indented; as they are without one."""
    if width is None:
        return text
    lines = (textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) for line in text.split("\n"))
    return "\n".join("\n".join(line) for line in lines)
