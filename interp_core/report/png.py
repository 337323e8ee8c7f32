"""PNG pictures through matplotlib (extra `plot`)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..errors import CapabilityError
from .colors import _AMOUNT, _MISSING, _SIGNED, css, limits_of
from .html import short, visible

SIDE = 24.0
"""Inches that the cells of a picture take at most, along either side."""


def heatmap(
    path: str | Path,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    texts: Sequence[Sequence[str]] | None = None,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    title: str = "",
    ylabel: str = "",
    colorbar: str = "",
) -> Path:
    """A matrix as a picture. Of many rows or columns, only some are named.

    Raises:
        CapabilityError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CapabilityError("pictures need matplotlib: pip install 'interp-core[plot]'") from error
    low, high = limits or limits_of(values, diverging)
    stops = [tuple(channel / 255 for channel in stop) for stop in (_SIGNED if diverging else _AMOUNT)]
    wide, tall = min(0.72 if texts else 0.42, SIDE / len(columns)), min(0.36, SIDE / len(rows))
    figure = Figure(figsize=(1.9 + wide * len(columns), 1.2 + tall * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scale = LinearSegmentedColormap.from_list("ic", stops).with_extremes(bad=_MISSING)
    image = axes.imshow(values, cmap=scale, vmin=low, vmax=high, aspect="auto")
    with matplotlib.rc_context({"font.size": 8}):
        some, few = _named(len(columns), wide), _named(len(rows), tall)
        axes.set_xticks(some, [visible(columns[i]) for i in some], rotation=60, ha="right", fontsize=7)
        axes.set_yticks(few, [rows[i] for i in few], fontsize=7)
        axes.set_title(textwrap.fill(title, max(20, int(11 * figure.get_figwidth()))), fontsize=10)
        axes.set_ylabel(ylabel, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for i, line in enumerate(texts or ()):
            for j, text in enumerate(line):
                ink = css(values[i][j], low, high, diverging)[1]
                axes.text(
                    j, i, short(visible(text), 9), ha="center", va="center", fontsize=6, color=ink, parse_math=False
                )
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015)
        bar.set_label(colorbar, fontsize=7)
        bar.ax.tick_params(labelsize=6, length=0)
        bar.outline.set_visible(False)
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def _named(count: int, size: float) -> range:
    """Which of so many rows or columns, of a size in inches, can be named without running into each other."""
    return range(0, count, math.ceil(0.14 / size))
