"""How studies show matrices of effects: heatmaps in pages and as files, with numbers in the cells.

Source: this package.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from interp_core import report

from ._contrast import SHARE

WIDEST = 32
"""Columns up to which a matrix has numbers in its cells."""


class Picture(NamedTuple):
    """A matrix to look at: numbers, names along its sides, limits of its colours (None: its own)."""

    title: str
    values: list[list[float]]
    rows: list[str]
    columns: list[str]
    limits: tuple[float, float] | None = None


class Pictured:
    """The part of results that show matrices of effects: what they draw, and how it was worked out."""

    unit: str
    explain: str

    def pictures(self) -> list[Picture]:
        """The matrices, the main one first."""
        raise NotImplementedError

    def charts(self) -> list[report.Heatmap]:
        """The matrices as charts."""
        return [drawn(chart, self.unit) for chart in self.pictures()]

    def details(self) -> dict[str, str]:
        """How the effects were worked out."""
        return {"What it cost": self.explain}


def drawn(chart: Picture, unit: str) -> report.Heatmap:
    """A matrix as a chart, with numbers in its cells unless there are many columns. Cells say their whole number when
    pointed at."""
    return report.Heatmap(
        chart.values, chart.rows, chart.columns, diverging=True, limits=chart.limits, title=chart.title,
        texts=report.cell_texts(chart.values, unit == SHARE) if len(chart.columns) <= WIDEST else None,
        colorbar=unit, percent=unit == SHARE,
    )  # fmt: skip


def effect_words(effect: float, unit: str, kind: str, score: str, base: float) -> str:
    """What a change does to a score, as the end of a sentence."""
    if unit == SHARE:
        if effect < 0:
            return f"moves the score the other way, by {-effect:.0%} of the difference between the prompts"
        verb = "takes away" if kind == "noising" else "gives back"
        return f"{verb} {effect:.0%} of the difference between the prompts"
    return f"changes {score} by {effect:+.3g} from {base:.3g}" + (f" ({unit})" if unit != score else "")


def which(row: int, rows: int) -> str:
    """Of several prompts, which one a chart shows; "" of one."""
    return f", prompt {row}" if rows > 1 else ""


def of_rows(scores: Tensor) -> str:
    """Over how many prompts a number is the mean; "" of one."""
    return f", in the mean of {len(scores)} prompts" if len(scores) > 1 else ""
