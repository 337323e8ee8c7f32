"""A line chart with bands, as inline SVG: accuracies by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, TOP = 640, 220, 44, 14
INK = ("#2f6fb0", "#c2571a", "#3d8f5a", "#7b4fa3")


class Line(NamedTuple):
    """One line of the chart.

    Attributes:
        name: for the legend.
        values: shares, between 0 and 1, one per place.
        bands: low and high around each.
        base: the share without a vector, drawn dashed.
    """

    name: str
    values: Sequence[float]
    bands: Sequence[tuple[float, float]]
    base: float


def curves(lines: Sequence[Line], places: Sequence[str], caption: str) -> str:
    """The chart as HTML: shares against places, bands around them, what there is without a vector dashed."""
    from interp_core.report.html import escape

    step = (WIDTH - LEFT - 12) / max(len(places) - 1, 1)

    def at(place: int, share: float) -> str:
        return f"{LEFT + place * step:.1f},{TOP + (1 - share) * HEIGHT:.1f}"

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = TOP + (1 - share) * HEIGHT
        parts.append(f"<path d='M{LEFT} {height:.1f}H{WIDTH - 12}' stroke='#e4e7ec'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{height + 4:.1f}' text-anchor='end'>{share:.0%}</text>")
    every = max(1, len(places) // 16)
    for place in range(0, len(places), every):
        left = LEFT + place * step
        parts.append(
            f"<text x='{left:.1f}' y='{TOP + HEIGHT + 16}' text-anchor='middle'>{escape(places[place])}</text>"
        )
    for number, line in enumerate(lines):
        ink = INK[number % len(INK)]
        low = " ".join(at(i, band[0]) for i, band in enumerate(line.bands))
        high = " ".join(at(i, band[1]) for i, band in reversed(list(enumerate(line.bands))))
        points = " ".join(at(i, value) for i, value in enumerate(line.values))
        base = TOP + (1 - line.base) * HEIGHT
        parts.append(f"<polygon points='{low} {high}' fill='{ink}' opacity='.15'/>")
        parts.append(f"<polyline points='{points}' fill='none' stroke='{ink}' stroke-width='2'/>")
        parts.append(f"<path d='M{LEFT} {base:.1f}H{WIDTH - 12}' stroke='{ink}' stroke-dasharray='4 4'/>")
        for place, value in enumerate(line.values):
            x, y = at(place, value).split(",")
            tip = escape(f"{line.name}, {places[place]}: {value:.1%} (without {line.base:.1%})")
            parts.append(f"<circle cx='{x}' cy='{y}' r='3.5' fill='{ink}' data-tip=\"{tip}\"/>")
    legend = " · ".join(
        f"<span style='color:{INK[i % len(INK)]}'>{escape(line.name)}</span>" for i, line in enumerate(lines)
    )
    box = f"viewBox='0 0 {WIDTH} {TOP + HEIGHT + 24}' style='max-width:{WIDTH}px;font-size:11px;fill:#667085'"
    return f"<figure><svg {box}>{''.join(parts)}</svg><figcaption>{legend}<br>{escape(caption)}</figcaption></figure>"
