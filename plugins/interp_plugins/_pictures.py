"""How studies show matrices of effects: heatmaps in pages and as files, with numbers in the cells.

Source: this package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ._contrast import SHARE


class Picture(NamedTuple):
    """A matrix to look at: numbers, names along its sides, and what a cell says when one points at it."""

    title: str
    values: list[list[float]]
    rows: list[str]
    columns: list[str]
    tips: list[list[str]] | None = None


def pages(pictures: Sequence[Picture], unit: str, note: str) -> str:
    """Heatmaps below each other, and what is to be said of them."""
    from interp_core.report.html import escape, heatmap

    grids = [
        heatmap(
            one.values, one.rows, one.columns, texts=_texts(one.values, unit), tips=one.tips, diverging=True,
            caption=f"{one.title} ({unit})",
        )
        for one in pictures
    ]  # fmt: skip
    return "".join(grids) + f"<pre>{escape(note)}</pre>"


def picture(path: str | Path, one: Picture, unit: str) -> Path:
    """A heatmap as a file."""
    from interp_core.report.png import heatmap

    return heatmap(
        path, one.values, one.rows, one.columns, texts=_texts(one.values, unit), diverging=True, title=one.title,
        colorbar=unit,
    )  # fmt: skip


def _texts(values: list[list[float]], unit: str) -> list[list[str]]:
    """Whole percents of shares; else two digits of the largest value. Nothing for what is no number."""
    top = max((abs(value) for line in values for value in line if math.isfinite(value)), default=0.0) or 1.0
    digits = 0 if unit == SHARE else max(0, 1 - math.floor(math.log10(top)))

    def say(value: float) -> str:
        if not math.isfinite(value):
            return ""
        return f"{round(100 * value) + 0}%" if unit == SHARE else f"{round(value, digits) + 0:.{digits}f}"

    return [[say(value) for value in line] for line in values]
