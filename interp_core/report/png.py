"""Pictures through matplotlib (extra `plot`): each chart says what size it needs, and draws on axes."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CapabilityError, PlanError, nearest
from .colors import _AMOUNT, _MISSING, _SIGNED, SERIES, below_zero, css, limits_of
from .figures import Frame
from .fonts import columns_of, drawable, legible
from .html import MARKS, number, share, short, visible
from .svg import ticks, written

if TYPE_CHECKING:
    from .figures import BarsData, CurvesData, Drawn, HeatmapData, OverlayData, TokenStripData

COLUMNS = 90
"""Letters in a line of a coloured text."""
LETTER = 0.062
"""Inches that a letter takes of a coloured text: 0.6 of its height, which is in points of 1/72 inch."""
DPI = 150
LAYOUT: Any = "constrained"
"""How the parts of a picture are moved so that they do not overlap."""
SIDE, WIDEST = 24.0, 12.0
"""Inches that the cells of a picture take at most along either side; and a picture whose cells hold texts."""
NAME, NAMED = 0.058, 0.14
"""Inches that a letter of a name takes; and the room that a column needs to be named."""
NEEDED = "pictures need matplotlib: pip install 'interp-core[plot]'"


def save(path: str | Path, charts: Sequence[Drawn], width: float | None = None) -> Path:
    """Charts below each other as one file, of the kind that its ending says.

    Raises:
        CapabilityError: matplotlib is not installed.
        PlanError: an ending that matplotlib does not know.
    """
    out = Path(path) if Path(path).suffix else Path(f"{path}.png")
    frames = [chart.frame(width) for chart in charts]
    figure = _canvas(max(frame.width for frame in frames), sum(frame.height for frame in frames))
    known = figure.canvas.get_supported_filetypes()
    if out.suffix[1:].lower() not in known:
        raise PlanError(f"{out.name}: no picture is written as {out.suffix}. {nearest(out.suffix[1:], list(known))}")
    heights = [frame.height for frame in frames]
    for part, frame, chart in zip(_parts(figure, heights), frames, charts, strict=True):
        chart.draw(part.subplots(frame.down, frame.across, squeeze=False).flatten().tolist())
    out.parent.mkdir(parents=True, exist_ok=True)
    legible(figure)
    figure.savefig(out)
    return out


def plot(chart: Drawn, axes: Any, title: str | None, size: tuple[float, float] | None) -> Any:
    """See `Chart.plot`."""
    if title is not None:
        chart = replace(chart, title=title)  # type: ignore[type-var]
    frame = chart.frame(None if size is None else size[0])
    if axes is not None:
        if frame.across > 1:
            raise PlanError(f"{type(chart).__name__} takes {frame.across} axes beside each other; leave ax= out")
        chart.draw([axes])
        legible(axes)
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise CapabilityError(NEEDED) from error
    figure = pyplot.figure(figsize=size or (frame.width, frame.height), layout=LAYOUT)
    places = figure.subplots(frame.down, frame.across, squeeze=False).flatten().tolist()
    chart.draw(places)
    legible(figure)
    return places[0]


def heatmap_frame(chart: HeatmapData, width: float | None) -> Frame:
    """Cells as wide as their texts; those beyond the width go on below."""
    margin = 0.9 + NAME * max(map(len, chart.rows))
    texts = [_token(text) for line in chart.texts or () for text in line if text is not None]
    if texts:
        cell, room = max(0.3, min(0.64, NAME * max(map(columns_of, texts)) + 0.12)), (width or WIDEST) - margin
    elif width:
        room = width - margin
        cell = max(NAMED, min(0.42, room / len(chart.columns)))
    else:  # cells that say nothing may be small
        cell, room = min(0.42, SIDE / len(chart.columns)), SIDE + 1
    most = max(2, int(room / cell + 1e-9))
    down = math.ceil(len(chart.columns) / most)
    across = math.ceil(len(chart.columns) / down)
    names = 0.2 + 0.87 * NAME * min(40, max(columns_of(_token(name)) for name in chart.columns))
    tall = min(0.36, SIDE / len(chart.rows)) * len(chart.rows)
    head = 0.25 + 0.17 * len(_wrapped(chart.title, int(11 * (width or margin + cell * across))).split("\n"))
    return Frame(width or margin + cell * across, head + down * (tall + names + 0.2 * bool(chart.xlabel)), down)


def heatmap(places: Sequence[Any], chart: HeatmapData) -> None:
    """A matrix on axes, so many columns on each. Of many rows or columns, only some are named."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    low, high = chart.limits or limits_of(chart.values, chart.diverging)
    stops = [tuple(channel / 255 for channel in stop) for stop in (_SIGNED if chart.diverging else _AMOUNT)]
    scale = LinearSegmentedColormap.from_list("ic", stops).with_extremes(bad=_MISSING)
    across, marked = math.ceil(len(chart.columns) / len(places)), False
    with matplotlib.rc_context({"font.size": 8}):
        for number_of, axes in enumerate(places):
            some = range(number_of * across, min((number_of + 1) * across, len(chart.columns)))
            part = [line[some.start : some.stop] for line in chart.values]
            image = axes.imshow(part, cmap=scale, vmin=low, vmax=high, aspect="auto")
            axes.set_xlim(-0.5, across - 0.5)
            _named_cells(axes, chart, some)
            marked |= _minuses(
                axes,
                [
                    (j - 0.2, j + 0.2, i, line[j])
                    for i, line in enumerate(part)
                    for j in range(len(line))
                    if not (chart.texts and chart.texts[i][some.start + j])
                ],
                (low, high),
                chart.diverging,
            )
            for i, line in enumerate(chart.texts or ()):
                for j, text in enumerate(line[some.start : some.stop]):
                    ink = css(chart.values[i][some.start + j], low, high, chart.diverging)[1]
                    how = {"ha": "center", "va": "center", "fontsize": 6, "color": ink, "parse_math": False}
                    axes.text(j, i, "" if text is None else short(_token(text), 9), **how)
        first, last = places[0], places[-1]
        first.set_title(_wrapped(chart.title, max(20, int(11 * _inches(first)[0]))), fontsize=10)
        last.set_xlabel(chart.xlabel, fontsize=8)
        bar = first.figure.colorbar(image, ax=list(places), fraction=0.03, pad=0.015)
        bar.set_label(f"{chart.colorbar}{MARKS * marked}".removeprefix("; "), fontsize=7)
        if chart.percent:
            bar.ax.yaxis.set_major_formatter(lambda tick, _: share(round(tick, 6)))
        bar.ax.tick_params(labelsize=6, length=0)
        bar.outline.set_visible(False)


def _minuses(
    axes: Any, spots: Sequence[tuple[float, float, float, float]], ends: tuple[float, float], diverging: bool
) -> bool:
    """A minus on each spot (left, right, height, value) that is below zero, where two colours are one grey in print;
    whether there is one."""
    from matplotlib.collections import LineCollection

    below = [spot for spot in spots if below_zero(spot[3], ends[1], diverging)]
    inks = [css(spot[3], *ends, diverging)[1] for spot in below]
    lines = [((left, height), (right, height)) for left, right, height, _ in below]
    axes.add_collection(LineCollection(lines, colors=inks, linewidths=0.6), autolim=False)
    return bool(below)


def _marked(values: Sequence[float], ends: tuple[float, float], chart: TokenStripData | OverlayData) -> str:
    """What the marks mean, where a value bears one."""
    return MARKS * any(below_zero(each, ends[1], chart.diverging) for each in values)


def _named_cells(axes: Any, chart: HeatmapData, some: range) -> None:
    """Names of rows and of some columns, as many as have room, and no frame."""
    wide, tall = _inches(axes)
    columns, rows = _named(len(some), wide / len(some)), _named(len(chart.rows), tall / len(chart.rows))
    axes.set_xticks(
        columns, [_text(_token(chart.columns[some[i]])) for i in columns], rotation=60, ha="right", fontsize=7,
        rotation_mode="anchor",
    )  # fmt: skip
    axes.set_yticks(rows, [_text(chart.rows[i]) for i in rows], fontsize=7)
    axes.set_ylabel(chart.ylabel, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def curves_frame(chart: CurvesData, width: float | None) -> Frame:
    """Twice as wide as high."""
    return Frame(width or 6.4, 3.2 if width is None else max(2.2, width / 2))


def curves(places: Sequence[Any], chart: CurvesData) -> None:
    """Lines with bands on axes."""
    (axes,), names, (low, high) = places, [str(place) for place in chart.places], chart.span
    across = range(len(names))
    for series, line in enumerate(chart.lines):
        ink = SERIES[series % len(SERIES)]
        axes.plot(across, line.values, color=ink, marker="o", markersize=3.5, linewidth=1.6, label=_text(line.name))
        if line.bands is not None:
            axes.fill_between(across, *zip(*line.bands, strict=True), color=ink, alpha=0.15, linewidth=0)
        if line.base is not None:
            axes.axhline(line.base, color=ink, linestyle="--", linewidth=1)
    longest = max(map(len, names)) * 0.07 + 0.1
    some = range(0, len(names), max(1, len(names) // 16, math.ceil(longest * len(names) / _inches(axes)[0])))
    axes.set_xticks(some, [_text(names[i]) for i in some], fontsize=7)
    axes.set_yticks(ticks(low, high, 5), [written(tick, chart.percent) for tick in ticks(low, high, 5)], fontsize=7)
    room = 0.015 * (high - low)  # half a marker
    axes.set_ylim(low - room, high + room)
    axes.margins(x=0.02)
    axes.grid(axis="y", color="#e4e7ec", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False)
    _dressed(axes, chart.title, chart.xlabel, chart.ylabel)


def bars_frame(chart: BarsData, width: float | None) -> Frame:
    """As high as there are bars."""
    return Frame(width or 6.4, 0.9 + 0.3 * len(chart.bars))


def bars(places: Sequence[Any], chart: BarsData) -> None:
    """Bars with intervals on axes."""
    (axes,), (low, high) = places, chart.span
    rows = range(len(chart.bars))
    axes.barh(rows, [bar.value for bar in chart.bars], height=0.62, color=SERIES[0], alpha=0.75)
    for row, bar in enumerate(chart.bars):
        if bar.ends is not None:
            axes.plot(bar.ends, (row, row), color="#1b1f24", linewidth=1.2, marker="|", markersize=6)
        place = {"xy": (1.01, row), "xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
        axes.annotate(written(bar.value, chart.percent, 1), **place)
    if chart.base is not None:
        axes.axvline(chart.base, color=SERIES[1], linestyle="--", linewidth=1)
    axes.set_yticks(rows, [_text(short(drawable(bar.name), 40)) for bar in chart.bars], fontsize=7)
    axes.set_xticks(ticks(low, high), [written(tick, chart.percent) for tick in ticks(low, high)], fontsize=7)
    axes.set_xlim(low, high)
    axes.set_ylim(len(chart.bars) - 0.5, -0.5)
    axes.grid(axis="x", color="#e4e7ec", linewidth=0.8)
    _dressed(axes, chart.title, chart.xlabel, "")


def strip_frame(chart: TokenStripData, width: float | None) -> Frame:
    """Lines of `COLUMNS` letters, or as many as there is room for; layers stand below each other."""
    placed, lines = _laid_out(chart.tokens, COLUMNS if width is None else _letters(width))
    tall = len(chart.layers) * (lines + (len(chart.layers) > 1))
    return Frame(width or 0.1 + _widest(placed) * LETTER, 0.5 + 0.24 * tall + 0.2 * bool(chart.spans))


def strip(places: Sequence[Any], chart: TokenStripData) -> None:
    """A coloured text on axes."""
    (axes,), heads = places, len(chart.layers) > 1
    letters = _letters(_inches(axes)[0])
    placed, lines = _laid_out(chart.tokens, letters)
    tall = len(chart.layers) * (lines + heads)
    inks = {name: SERIES[(i + 1) % len(SERIES)] for i, name in enumerate(chart.spans or {})}
    for i, (layer, values) in enumerate(chart.layers.items()):
        top = i * (lines + heads) + heads
        ends = chart.limits or limits_of([values], chart.diverging)
        if heads:
            said = f"{layer}: {number(ends[0])} to {number(ends[1])}{_marked(values, ends, chart)}"
            axes.text(0, top - 0.4, said, fontsize=7, va="center", parse_math=False)
        _coloured(axes, placed, top, values, ends, chart, inks)
    for i, (name, ink) in enumerate(inks.items()):
        axes.text(i * 20, tall + 0.6, short(name, 18), fontsize=7, color=ink, va="center", parse_math=False)
    axes.set_xlim(0, _widest(placed))
    axes.set_ylim(tall + bool(inks), 0)
    axes.set_xticks([])
    axes.set_yticks([])
    shown = chart.colorbar
    if not heads:
        low, high = ends
        shown = f"{shown + ': ' if shown else ''}{number(low)} to {number(high)}{_marked(values, ends, chart)}"
    _dressed(axes, "\n".join(line for line in (chart.title, shown) if line), "", "")


def _widest(placed: Sequence[tuple[int, int, int, str]]) -> int:
    return max(40, *(column + columns_of(text) for _, _, column, text in placed))


def _letters(width: float) -> int:
    return max(40, min(COLUMNS, int((width - 0.1) / LETTER + 0.01)))


def overlay_frame(chart: OverlayData, width: float | None) -> Frame:
    """Layers beside each other, each as high as the picture asks for."""
    count = len(chart.layers)
    each = 4.2 if width is None else width / count
    tall = min(6.0, max(1.5, (each - 0.2) * chart.extent[1] / chart.extent[0]))
    lines = max(_over(chart, layer, each).count("\n") + 1 for layer in chart.layers)
    return Frame(each * count, tall + 0.3 + 0.2 * lines, across=count)


def overlay(places: Sequence[Any], chart: OverlayData) -> None:
    """Coloured boxes over a picture, a layer on each of the axes."""
    from matplotlib.patches import Rectangle

    width, height = chart.extent
    for axes, (layer, values) in zip(places, chart.layers.items(), strict=True):
        ends = chart.ends(layer)
        if chart.picture is not None:
            axes.imshow(chart.picture, extent=(0, width, height, 0), aspect="equal", interpolation="nearest")
        for (left, top, right, bottom), value in zip(chart.boxes, values, strict=True):
            colour = css(value, *ends, chart.diverging)[0]
            opacity = 1.0 if chart.picture is None else chart.opacity
            box = Rectangle((left, top), right - left, bottom - top, alpha=opacity, facecolor=colour, linewidth=0)
            axes.add_patch(box)
        spots = [
            (
                (left + right) / 2 - (right - left) / 5,
                (left + right) / 2 + (right - left) / 5,
                (top + bottom) / 2,
                value,
            )
            for (left, top, right, bottom), value in zip(chart.boxes, values, strict=True)
        ]
        _minuses(axes, spots, ends, chart.diverging)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_aspect("equal", anchor="N")  # right below its title
        axes.set_xticks([])
        axes.set_yticks([])
        _dressed(axes, _over(chart, layer, _inches(axes)[0]), "", "")


def _over(chart: OverlayData, layer: str, width: float) -> str:
    """What stands above a layer of a width in inches: the title, and what its colours say."""
    named = ": ".join(part for part in (layer, chart.colorbar) if part)
    low, high = (number(float(end)) for end in chart.ends(layer))
    said = f"{named + ': ' if named else ''}{low} to {high}{_marked(chart.layers[layer], chart.ends(layer), chart)}"
    return _wrapped("\n".join(line for line in (chart.title, said) if line), max(20, int(12 * width)))


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
    middles = [(column + columns_of(text) / 2, top + line, values[token]) for token, line, column, text in placed]
    _minuses(axes, [(x - 0.25, x + 0.25, row + 0.86, v) for x, row, v in middles], ends, chart.diverging)
    for number_of, line, column, text in placed:
        row = top + line
        back, ink = css(values[number_of], *ends, chart.diverging)
        axes.broken_barh([(column, columns_of(text))], (row + 0.12, 0.8), facecolor=back)
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
                axes.plot(
                    (column, column + columns_of(text)), (row + 0.96, row + 0.96), color=inks[name], linewidth=1.6
                )


def _laid_out(tokens: Sequence[str], letters: int) -> tuple[list[tuple[int, int, int, str]], int]:
    """Pieces of tokens with their line and column, and how many lines there are; tokens break where a line is full."""
    pieces, row, column = [], 0, 0
    for number_of, token in enumerate(tokens):
        shown = _token(token).replace("·", " ", 1) if token.startswith(" ") else _token(token)
        while shown:
            if column >= letters:
                row, column = row + 1, 0
            piece = shown[: letters - column]
            while columns_of(piece) > letters - column and len(piece) > 1:
                piece = piece[:-1]
            shown = shown[len(piece) :]
            pieces.append((number_of, row, column, piece))
            column += columns_of(piece)
        if token.endswith("\n"):
            row, column = row + 1, 0
    return pieces, row + bool(column)


def _canvas(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        CapabilityError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CapabilityError(NEEDED) from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout=LAYOUT)
    FigureCanvasAgg(figure)
    return figure


def _parts(figure: Any, heights: Sequence[float]) -> list[Any]:
    """Parts of a figure below each other; one is the figure itself."""
    if len(heights) == 1:
        return [figure]
    return list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _inches(axes: Any) -> tuple[float, float]:
    """About how wide and high a chart on these axes may be, with its names: matplotlib's own margins taken off."""
    place, figure = axes.get_position(), axes.get_figure(root=True)
    return place.width * figure.get_figwidth() / 0.775, place.height * figure.get_figheight() / 0.77


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
    kept = re.sub(r"' (?=[^' ]+')", "'\N{NO-BREAK SPACE}", title)  # the space of a quoted token
    return "\n".join(textwrap.fill(line, width) for line in kept.split("\n"))


def _token(token: str) -> str:
    """A token as pictures show it."""
    return drawable(visible(token))


def _text(label: str) -> str:
    """A label that matplotlib takes as it stands."""
    return drawable(label).replace("$", r"\$")


def _named(count: int, size: float) -> range:
    """Which of so many rows or columns, of a size in inches, can be named without running into each other."""
    return range(0, count, math.ceil(0.14 / size))
