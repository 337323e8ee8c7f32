"""Lines, bars and overlays as inline SVG, in the colours of the page (`html.STYLE`), or the light ones without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from .colors import SERIES, at_night, below_zero, css
from .html import MARKS, TAB, escape, number, scale_bar, short, switched
from .pictures import data_uri

if TYPE_CHECKING:
    from .figures import BarsData, CurvesData, Line, OverlayData

WIDTH, HEIGHT, LEFT, TOP, RIGHT = 640, 220, 44, 14, 12
BAR = 26
LETTER = 6.2
"""Pixels that a letter takes at most, of 11 pixels' height."""
GRID, SOFT = "var(--line,#e4e7ec)", "var(--soft,#667085)"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two ends, in steps of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * part for part in (1, 2, 2.5, 5, 10) if power * part >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def written(value: float, percent: bool, digits: int = 0) -> str:
    """A number on an axis or in a tip."""
    if not percent:
        return number(0.0 if abs(value) < 1e-12 else float(value))
    return f"{value:.{digits}%}"


def curves(chart: CurvesData) -> str:
    """Lines against places, bands around them, levels dashed."""
    low, high = chart.span
    step = (WIDTH - LEFT - RIGHT) / max(len(chart.places) - 1, 1)

    def height(value: float) -> float:
        return TOP + (high - min(max(value, low), high)) / (high - low) * HEIGHT

    parts = [_level(height(tick), written(tick, chart.percent)) for tick in ticks(low, high, 5)]
    names = [short(str(place), 24) for place in chart.places]
    parts += _names(names, step)
    for series, line in enumerate(chart.lines):
        parts += _line(line, _ink(series), lambda place: LEFT + place * step, height, chart, series == 0)
    legend = " · ".join(
        f"<span style='color:{_ink(i)}'>{escape(line.name)}</span>" for i, line in enumerate(chart.lines)
    )
    below = 24
    if chart.xlabel:
        parts.append(
            f"<text x='{WIDTH / 2}' y='{TOP + HEIGHT + 34}' text-anchor='middle'>{escape(chart.xlabel)}</text>"
        )
        below = 42
    axis = f"{escape(chart.ylabel)}<br>" if chart.ylabel else ""
    return _figure(parts, TOP + HEIGHT + below, f"{axis}{legend}<br>{escape(chart.caption or chart.title)}")


def _names(names: Sequence[str], step: float) -> list[str]:
    """Names below the places: as many as fit, those at the ends turned inwards where they would leave the picture."""
    every = max(1, len(names) // 16, math.ceil((max(map(len, names)) * LETTER + 8) / step))
    parts = []
    for place in range(0, len(names), every):
        left, half = LEFT + place * step, len(names[place]) * LETTER / 2
        anchor = "start" if half > left else "end" if left + half > WIDTH else "middle"
        text = escape(names[place])
        parts.append(f"<text x='{left:.1f}' y='{TOP + HEIGHT + 16}' text-anchor='{anchor}'>{text}</text>")
    return parts


def _line(
    line: Line, ink: str, across: Callable[[int], float], height: Callable[[float], float], chart: CurvesData,
    first: bool,
) -> list[str]:  # fmt: skip
    """A line in its runs of known values, its band, its level, and a tip at every point; the keyboard comes in at the
    first line's first point."""
    parts = []
    known = [i for i, value in enumerate(line.values) if math.isfinite(value)]
    runs = [[i for _, i in run] for _, run in groupby(enumerate(known), lambda pair: pair[1] - pair[0])]

    def points(values: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{across(i):.1f},{height(value):.1f}" for i, value in values)

    for run in runs:
        if line.bands is not None:
            low, high = ([(i, line.bands[i][end]) for i in run] for end in (0, 1))
            parts.append(f"<polygon points='{points(low)} {points(high[::-1])}' style='fill:{ink}' opacity='.15'/>")
        middle = points([(i, line.values[i]) for i in run])
        parts.append(f"<polyline points='{middle}' fill='none' style='stroke:{ink}' stroke-width='2'/>")
    if line.base is not None:
        at = height(line.base)
        parts.append(f"<path d='M{LEFT} {at:.1f}H{WIDTH - RIGHT}' style='stroke:{ink}' stroke-dasharray='4 4'/>")
    base = "" if line.base is None else f" ({chart.base} {written(line.base, chart.percent, 1)})"
    for i in known:
        ends = "" if line.bands is None else f"\n{' to '.join(written(e, chart.percent, 1) for e in line.bands[i])}"
        tip = escape(f"{line.name}, {chart.places[i]}: {written(line.values[i], chart.percent, 1)}{base}{ends}")
        x, y = f"{across(i):.1f}", f"{height(line.values[i]):.1f}"
        parts.append(
            f"<circle{TAB * (first and i == known[0])} cx='{x}' cy='{y}' r='3.5' style='fill:{ink}' "
            f'data-tip="{tip}"/>'
        )
    return parts


def bars(chart: BarsData) -> str:
    """Bars below each other, whiskers for intervals, a level dashed."""
    low, high = chart.span
    names = [short(bar.name, 40) for bar in chart.bars]
    left = max(LEFT, max(map(len, names)) * LETTER + 14)
    values = [f"{written(bar.value, chart.percent, 1)}" for bar in chart.bars]
    right = max(map(len, values)) * LETTER + 14
    bottom = TOP + BAR * len(names)

    def across(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (WIDTH - left - right)

    parts = []
    for tick in ticks(low, high):
        x = across(tick)
        parts.append(f"<path d='M{x:.1f} {TOP}V{bottom}' style='stroke:{GRID}'/>")
        parts.append(f"<text x='{x:.1f}' y='{bottom + 16}' text-anchor='middle'>{written(tick, chart.percent)}</text>")
    for row, (bar, name, value) in enumerate(zip(chart.bars, names, values, strict=True)):
        y = TOP + BAR * row + BAR / 2
        parts.append(f"<text x='{left - 8:.1f}' y='{y + 4:.1f}' text-anchor='end'>{escape(name)}</text>")
        if math.isfinite(bar.value):
            start, stop = sorted((across(0.0), across(bar.value)))
            ends = "" if bar.ends is None else f"\n{' to '.join(written(end, chart.percent, 1) for end in bar.ends)}"
            parts.append(
                f"<rect{TAB * (row == 0)} x='{start:.1f}' y='{y - 8:.1f}' width='{max(stop - start, 0.5):.1f}' "
                f"height='16' rx='2' style='fill:{_ink(0)}' opacity='.75' "
                f'data-tip="{escape(f"{bar.name}: {value}{ends}")}"/>'
            )
        if bar.ends is not None:
            a, b = (across(end) for end in bar.ends)
            whisker = f"M{a:.1f} {y - 4:.1f}v8M{a:.1f} {y:.1f}H{b:.1f}M{b:.1f} {y - 4:.1f}v8"
            parts.append(f"<path d='{whisker}' style='stroke:var(--ink,#1b1f24)' stroke-width='1.5' fill='none'/>")
        parts.append(f"<text x='{WIDTH - 4}' y='{y + 4:.1f}' text-anchor='end'>{value}</text>")
    if chart.base is not None:
        x = across(chart.base)
        parts.append(f"<path d='M{x:.1f} {TOP}V{bottom}' style='stroke:{_ink(1)}' stroke-dasharray='4 4'/>")
    axis = f"{escape(chart.xlabel)}<br>" if chart.xlabel else ""
    return _figure(parts, bottom + 24, f"{axis}{escape(chart.caption or chart.title)}")


def overlay(chart: OverlayData) -> str:
    """Coloured boxes over a picture; of several layers the reader switches between, the first shows."""
    width, height = chart.extent
    shown = min(WIDTH, max(240, round(420 * width / height)))
    frame = f"viewBox='0 0 {width:g} {height:g}' style='max-width:{shown}px;display:block'"
    behind, opacity = "", 1.0
    if chart.picture is not None:
        opacity = chart.opacity
        behind = (
            f"<image width='{width:g}' height='{height:g}' preserveAspectRatio='none' image-rendering='pixelated' "
            f"href='{data_uri(chart.picture)}'/>"
        )
    drawn = []
    for layer, values in chart.layers.items():
        low, high = chart.ends(layer)
        boxes = [
            f"<rect{TAB * (i == 0)} x='{left:g}' y='{top:g}' width='{right - left:g}' height='{bottom - top:g}' "
            f"style='{_fill(chart, value, low, high)}' opacity='{opacity:g}' "
            f'data-tip="{escape(number(float(value)))}"/>'
            for i, ((left, top, right, bottom), value) in enumerate(zip(chart.boxes, values, strict=True))
        ]
        night = "" if chart.picture is not None else ";--d:none"
        shared = "vector-effect='non-scaling-stroke' pointer-events='none'"
        marks = [
            f"<path d='M{(left + right) / 2 - (right - left) / 5:g} {(top + bottom) / 2:g}h{(right - left) / 2.5:g}' "
            f"stroke='currentColor' style='color:{css(value, low, high, True)[1]}{night}' {shared}/>"
            for (left, top, right, bottom), value in zip(chart.boxes, values, strict=True)
            if below_zero(value, high, chart.diverging)
        ]
        said = f"{escape(chart.colorbar)} {scale_bar(low, high, chart.diverging)}{MARKS * bool(marks)}"
        drawn.append(f"<svg {frame}>{behind}{''.join(boxes + marks)}</svg><figcaption>{said}</figcaption>")
    body = drawn[0] if len(drawn) == 1 else switched(list(chart.layers), drawn)
    words = chart.caption or chart.title
    return f"<figure>{body}{f'<figcaption>{escape(words)}</figcaption>' if words else ''}</figure>"


def _fill(chart: OverlayData, value: float, low: float, high: float) -> str:
    """The style of a box; over a picture it is the same on light and dark pages."""
    day = f"fill:{css(value, low, high, chart.diverging)[0]}"
    return day if chart.picture is not None else f"{day};--d:{at_night(value, low, high, chart.diverging)}"


def _level(at: float, label: str) -> str:
    """A line of the grid, and its number."""
    return (
        f"<path d='M{LEFT} {at:.1f}H{WIDTH - RIGHT}' style='stroke:{GRID}'/>"
        f"<text x='{LEFT - 6}' y='{at + 4:.1f}' text-anchor='end'>{label}</text>"
    )


def _figure(parts: Sequence[str], height: int, caption: str) -> str:
    box = f"viewBox='0 0 {WIDTH} {height}' style='max-width:{WIDTH}px;font-size:11px;fill:{SOFT}'"
    drawn = f"<div class='scroll'><svg {box}>{''.join(parts)}</svg></div>"
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _ink(series: int) -> str:
    number = series % len(SERIES)
    return f"var(--s{number},{SERIES[number]})"
