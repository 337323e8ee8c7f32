"""PNG pictures through matplotlib (extra `plot`)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CapabilityError
from .colors import _AMOUNT, _MISSING, _SIGNED, SERIES, css, limits_of
from .html import number, short, visible
from .svg import ticks, written

if TYPE_CHECKING:
    from .figures import BarsData, CurvesData, OverlayData, TokenStripData

COLUMNS = 90
"""Letters in a line of a coloured text."""
LETTER = 0.062
"""Inches that a letter takes of a coloured text: 0.6 of its height, which is in points of 1/72 inch."""
DPI = 150
LAYOUT: Any = "constrained"
"""How the parts of a picture are moved so that they do not overlap."""
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
    xlabel: str = "",
    ylabel: str = "",
    colorbar: str = "",
) -> Path:
    """A matrix as a picture. Of many rows or columns, only some are named.

    Raises:
        CapabilityError: matplotlib is not installed.
    """
    low, high = limits or limits_of(values, diverging)
    stops = [tuple(channel / 255 for channel in stop) for stop in (_SIGNED if diverging else _AMOUNT)]
    wide, tall = min(0.72 if texts else 0.42, SIDE / len(columns)), min(0.36, SIDE / len(rows))
    figure, axes = _canvas(1.9 + wide * len(columns), 1.2 + tall * len(rows))
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("ic", stops).with_extremes(bad=_MISSING)
    image = axes.imshow(values, cmap=scale, vmin=low, vmax=high, aspect="auto")
    with matplotlib.rc_context({"font.size": 8}):
        some, few = _named(len(columns), wide), _named(len(rows), tall)
        axes.set_xticks(some, [visible(columns[i]) for i in some], rotation=60, ha="right", fontsize=7)
        axes.set_yticks(few, [rows[i] for i in few], fontsize=7)
        axes.set_title(textwrap.fill(title, max(20, int(11 * figure.get_figwidth()))), fontsize=10)
        axes.set_xlabel(xlabel, fontsize=8)
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
    return _saved(figure, path)


def curves(path: str | Path, chart: CurvesData) -> Path:
    """Lines with bands as a picture."""
    places, low, high = [str(place) for place in chart.places], *chart.span
    figure, axes = _canvas(6.4, 3.2)
    across = range(len(places))
    for series, line in enumerate(chart.lines):
        ink = SERIES[series % len(SERIES)]
        axes.plot(across, line.values, color=ink, marker="o", markersize=3.5, linewidth=1.6, label=_text(line.name))
        if line.bands is not None:
            axes.fill_between(across, *zip(*line.bands, strict=True), color=ink, alpha=0.15, linewidth=0)
        if line.base is not None:
            axes.axhline(line.base, color=ink, linestyle="--", linewidth=1)
    longest = max(map(len, places)) * 0.07 + 0.1
    some = range(0, len(places), max(1, len(places) // 16, math.ceil(longest * len(places) / 5.6)))
    axes.set_xticks(some, [_text(places[i]) for i in some], fontsize=7)
    axes.set_yticks(ticks(low, high, 5), [written(tick, chart.percent) for tick in ticks(low, high, 5)], fontsize=7)
    room = 0.015 * (high - low)  # half a marker
    axes.set_ylim(low - room, high + room)
    axes.margins(x=0.02)
    axes.grid(axis="y", color="#e4e7ec", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False)
    _dressed(axes, chart.title, chart.xlabel, chart.ylabel)
    return _saved(figure, path)


def bars(path: str | Path, chart: BarsData) -> Path:
    """Bars with intervals as a picture."""
    low, high = chart.span
    figure, axes = _canvas(6.4, 0.9 + 0.3 * len(chart.bars))
    rows = range(len(chart.bars))
    axes.barh(rows, [bar.value for bar in chart.bars], height=0.62, color=SERIES[0], alpha=0.75)
    for row, bar in enumerate(chart.bars):
        if bar.ends is not None:
            axes.plot(bar.ends, (row, row), color="#1b1f24", linewidth=1.2, marker="|", markersize=6)
        place = {"xy": (1.01, row), "xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
        axes.annotate(written(bar.value, chart.percent, 1), **place)
    if chart.base is not None:
        axes.axvline(chart.base, color=SERIES[1], linestyle="--", linewidth=1)
    axes.set_yticks(rows, [_text(short(bar.name, 40)) for bar in chart.bars], fontsize=7)
    axes.set_xticks(ticks(low, high), [written(tick, chart.percent) for tick in ticks(low, high)], fontsize=7)
    axes.set_xlim(low, high)
    axes.set_ylim(len(chart.bars) - 0.5, -0.5)
    axes.grid(axis="x", color="#e4e7ec", linewidth=0.8)
    _dressed(axes, chart.title, chart.xlabel, "")
    return _saved(figure, path)


def strip(path: str | Path, chart: TokenStripData) -> Path:
    """A coloured text as a picture, in lines of `COLUMNS` letters; layers stand below each other."""
    placed, lines = _laid_out(chart.tokens)
    wide = max(40, *(column + len(text) for _, _, column, text in placed))
    heads = len(chart.layers) > 1
    tall = len(chart.layers) * (lines + heads)
    figure, axes = _canvas(0.1 + wide * LETTER, 0.5 + 0.24 * tall + 0.2 * bool(chart.spans))
    inks = {name: SERIES[(i + 1) % len(SERIES)] for i, name in enumerate(chart.spans or {})}
    for i, (layer, values) in enumerate(chart.layers.items()):
        top = i * (lines + heads) + heads
        ends = chart.limits or limits_of([values], chart.diverging)
        if heads:
            said = f"{layer}: {number(ends[0])} to {number(ends[1])}"
            axes.text(0, top - 0.4, said, fontsize=7, va="center", parse_math=False)
        _coloured(axes, placed, top, values, ends, chart, inks)
    for i, (name, ink) in enumerate(inks.items()):
        axes.text(i * 20, tall + 0.6, short(name, 18), fontsize=7, color=ink, va="center", parse_math=False)
    axes.set_xlim(0, wide)
    axes.set_ylim(tall + bool(inks), 0)
    axes.set_xticks([])
    axes.set_yticks([])
    shown = chart.colorbar
    if not heads:
        low, high = ends
        shown = f"{shown + ': ' if shown else ''}{number(low)} to {number(high)}"
    _dressed(axes, "\n".join(line for line in (chart.title, shown) if line), "", "")
    return _saved(figure, path)


def overlay(path: str | Path, chart: OverlayData) -> Path:
    """Coloured boxes over a picture; layers stand beside each other."""
    width, height = chart.extent
    tall = min(6.0, max(1.5, 4.0 * height / width))
    titles = [_wrapped(_over(chart, layer), 50) for layer in chart.layers]
    lines = max(title.count("\n") + 1 for title in titles)
    figure, first = _canvas((4.0 + 0.2) * len(chart.layers), tall + 0.3 + 0.2 * lines)
    first.remove()
    places = figure.subplots(1, len(chart.layers), squeeze=False)[0]
    from matplotlib.patches import Rectangle

    for axes, title, (layer, values) in zip(places, titles, chart.layers.items(), strict=True):
        ends = chart.ends(layer)
        if chart.picture is not None:
            axes.imshow(chart.picture, extent=(0, width, height, 0), aspect="equal", interpolation="nearest")
        for (left, top, right, bottom), value in zip(chart.boxes, values, strict=True):
            colour = css(value, *ends, chart.diverging)[0]
            opacity = 1.0 if chart.picture is None else chart.opacity
            box = Rectangle((left, top), right - left, bottom - top, alpha=opacity, facecolor=colour, linewidth=0)
            axes.add_patch(box)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_aspect("equal", anchor="N")  # right below its title
        axes.set_xticks([])
        axes.set_yticks([])
        _dressed(axes, title, "", "")
    return _saved(figure, path)


def _over(chart: OverlayData, layer: str) -> str:
    """What stands above a layer: the title, and what its colours say."""
    named = ": ".join(part for part in (layer, chart.colorbar) if part)
    low, high = (number(float(end)) for end in chart.ends(layer))
    said = f"{named + ': ' if named else ''}{low} to {high}"
    return "\n".join(line for line in (chart.title, said) if line)


def _coloured(
    axes: Any,
    placed: Sequence[tuple[int, int, int, str]],
    top: int,
    values: Sequence[float],
    ends: tuple[float, float],
    chart: TokenStripData,
    inks: Mapping[str, str],
) -> None:
    """The tokens of one layer, `top` lines down, with the lines of their spans."""
    for number_of, line, column, text in placed:
        row = top + line
        back, ink = css(values[number_of], *ends, chart.diverging)
        axes.broken_barh([(column, len(text))], (row + 0.12, 0.8), facecolor=back)
        how = {
            "ha": "left",
            "va": "center",
            "fontsize": 112 * LETTER,
            "family": "monospace",
            "color": ink,
            "parse_math": False,
        }
        axes.text(column, row + 0.5, text, **how)
        for name, (start, stop) in (chart.spans or {}).items():
            if start <= number_of < stop:
                axes.plot((column, column + len(text)), (row + 0.96, row + 0.96), color=inks[name], linewidth=1.6)


def _laid_out(tokens: Sequence[str]) -> tuple[list[tuple[int, int, int, str]], int]:
    """Pieces of tokens with their line and column, and how many lines there are; tokens break where a line is full."""
    pieces, row, column = [], 0, 0
    for number_of, token in enumerate(tokens):
        shown = visible(token).replace("·", " ", 1) if token.startswith(" ") else visible(token)
        while shown:
            if column == COLUMNS:
                row, column = row + 1, 0
            piece, shown = shown[: COLUMNS - column], shown[COLUMNS - column :]
            pieces.append((number_of, row, column, piece))
            column += len(piece)
        if token.endswith("\n"):
            row, column = row + 1, 0
    return pieces, row + bool(column)


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure of so many inches, and its axes.

    Raises:
        CapabilityError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CapabilityError("pictures need matplotlib: pip install 'interp-core[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout=LAYOUT)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _dressed(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    """Titles, and no frame."""
    axes.set_title(_wrapped(title, 70), fontsize=9, parse_math=False)
    axes.set_xlabel(xlabel, fontsize=8, parse_math=False)
    axes.set_ylabel(ylabel, fontsize=8, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)


def _wrapped(title: str, width: int) -> str:
    """A title whose lines are so long at most."""
    return "\n".join(textwrap.fill(line, width) for line in title.split("\n"))


def _text(label: str) -> str:
    """A label that matplotlib takes as it stands."""
    return label.replace("$", r"\$")


def _saved(figure: Any, path: str | Path) -> Path:
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def _named(count: int, size: float) -> range:
    """Which of so many rows or columns, of a size in inches, can be named without running into each other."""
    return range(0, count, math.ceil(0.14 / size))
