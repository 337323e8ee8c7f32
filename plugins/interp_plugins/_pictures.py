"""How studies show matrices of effects: heatmaps in pages and as files, with numbers in the cells.

Source: this package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from interp_core import report

from ._contrast import SHARE

WIDEST = 32
"""Columns up to which a file has numbers in its cells."""


class Picture(NamedTuple):
    """A matrix to look at: numbers, names along its sides, limits of its colours (None: its own)."""

    title: str
    values: list[list[float]]
    rows: list[str]
    columns: list[str]
    limits: tuple[float, float] | None = None


def pages(pictures: Sequence[Picture], unit: str, note: str) -> str:
    """Heatmaps below each other, and what is to be said of them. Cells say their whole number when pointed at."""
    return "".join(drawn(chart, unit).html() for chart in pictures) + f"<pre>{report.escape(note)}</pre>"


def picture(path: str | Path, chart: Picture, unit: str) -> Path:
    """A heatmap as a file."""
    return drawn(chart, unit, WIDEST).png(path)


def drawn(chart: Picture, unit: str, widest: float = math.inf) -> report.Heatmap:
    """A matrix as a chart; of more columns than `widest`, without numbers in its cells."""
    return report.Heatmap(
        chart.values, chart.rows, chart.columns, diverging=True, limits=chart.limits, title=chart.title,
        texts=texts(chart.values, unit) if len(chart.columns) <= widest else None,
        caption=f"{chart.title} ({unit})", colorbar=unit,
    )  # fmt: skip


def texts(values: Sequence[Sequence[float]], unit: str) -> list[list[str]]:
    """Numbers as the cells show them: to two digits of the largest, shares in percent."""
    factor, sign = (100, "%") if unit == SHARE else (1, "")
    top = factor * max((abs(value) for line in values for value in line if math.isfinite(value)), default=0.0)
    digits = max(0, 1 - math.floor(math.log10(top))) if top else 0

    def say(value: float) -> str:
        if not math.isfinite(value):
            return "–"
        rounded = round(factor * value, digits)
        return f"{rounded:.{digits}f}{sign}" if rounded else "0"

    return [[say(value) for value in line] for line in values]
