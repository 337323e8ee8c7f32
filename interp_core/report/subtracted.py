"""What two charts of the same names differ in: their numbers beside each other, and the chart of the differences.

A chart is subtracted as it is drawn: where a lens draws probabilities, the picture of two lenses minus each other shows
by how much probabilities differ, also if the lens holds their logarithms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .charts import Bars, Chart, Curves, Heatmap, Overlay, TokenStrip
from .figures import Bar, Line
from .html import cell_texts, number, short, visible

BARS = 20
"""Rows that bars show."""
WIDEST = 32
"""Columns up to which the cells of a map of differences say something."""
NOTE = "blue where the first is lower, red where it is higher"


class Pair(NamedTuple):
    """A number of both things.

    Attributes:
        where: what it is of, in words.
        first, second: the numbers.
        what: they count; "" if nobody says.
    """

    where: str
    first: float
    second: float
    what: str

    @property
    def difference(self) -> float:
        """The first minus the second."""
        return self.first - self.second

    def __str__(self) -> str:
        return f"{self.difference:+.4g}: {self.where} ({self.first:.4g} against {self.second:.4g})"


def largest(pairs: Sequence[Pair]) -> Pair | None:
    """The pair that lies furthest apart; None where there are no two numbers."""
    known = [pair for pair in pairs if math.isfinite(pair.difference)]
    return max(known, key=lambda pair: abs(pair.difference), default=None)


def drawn(first: Sequence[Chart], second: Sequence[Chart], rows: Sequence[Pair]) -> list[Chart]:
    """The charts of two things, subtracted; where some do not show the same names, in their place the rows that lie
    furthest apart."""
    pairs = _together(first, second)
    charts = [chart for pair in pairs if (chart := minus(*pair)) is not None]
    if len(charts) < max(len(first), len(second)) and (strongest := _strongest(rows)) is not None:
        charts.append(strongest)
    return charts


def by_scale(first: Sequence[Chart], second: Sequence[Chart]) -> list[list[Pair]]:
    """The numbers of two things' charts, those of one scale together."""
    scales: dict[str, list[Pair]] = {}
    for charts in _together(first, second):
        for pair in beside(*charts) or ():
            scales.setdefault(pair.what, []).append(pair)
    return list(scales.values())


def _strongest(rows: Sequence[Pair]) -> Chart | None:
    """The rows that lie furthest apart, as bars; None where none has two numbers."""
    known = sorted((row for row in rows if math.isfinite(row.difference)), key=lambda row: -abs(row.difference))
    if not known:
        return None
    few = f", the {BARS} largest of {len(known):,}" if len(known) > BARS else ""
    bars = [Bar(row.where, row.difference) for row in known[:BARS]]
    return Bars(bars, xlabel=f"difference of {known[0].what}", title=f"The first minus the second{few}")


def _together(first: Sequence[Chart], second: Sequence[Chart]) -> list[tuple[Chart, Chart]]:
    """Charts of two things that show the same: one after the other where there are as many, else those of one title."""
    if len(first) == len(second):
        return list(zip(first, second, strict=True))
    titled = {getattr(chart, "title", ""): chart for chart in second}
    return [(chart, titled[title]) for chart in first if (title := getattr(chart, "title", "")) in titled]


def beside(first: Chart, second: Chart) -> list[Pair] | None:
    """The numbers of two charts beside each other; None where they do not show the same names on the same scale."""
    first, second = _layers_alike(first, second)
    here, there = _numbers(first), _numbers(second)
    if not here or not there or type(first) is not type(second) or scale(first) != scale(second):
        return None
    if [where for where, _ in here] != [where for where, _ in there]:
        return None
    what = scale(first)
    return [Pair(where, a, b, what) for (where, a), (_, b) in zip(here, there, strict=True)]


def scale(chart: Any) -> str:
    """What the numbers of a chart are."""
    if isinstance(chart, Bars):
        return chart.xlabel
    return str(getattr(chart, "ylabel" if isinstance(chart, Curves) else "colorbar", ""))


def minus(first: Chart, second: Chart) -> Chart | None:
    """The chart of the differences, about zero; None where the two do not show the same names on the same scale."""
    pairs = beside(first, second)
    if pairs is None:
        return None
    first, second = _layers_alike(first, second)
    apart = [pair.difference for pair in pairs]
    if isinstance(first, Heatmap) and isinstance(second, Heatmap):
        return _map(first, second, pairs)
    title = _title(first, second)
    how: dict[str, Any] = {"title": title, "limits": None}
    if isinstance(first, Curves):
        lines, width = list[Line](), len(first.places)
        for place, line in enumerate(first.lines):
            lines.append(Line(line.name, apart[place * width : (place + 1) * width], base=0.0 if place == 0 else None))
        return replace(first, lines=lines, base="no difference", caption=title, **how)
    if isinstance(first, Bars):
        bars = [Bar(bar.name, far) for bar, far in zip(first.bars, apart, strict=True)]
        return replace(first, bars=bars, base=None, caption=title, **how)
    assert isinstance(first, (TokenStrip, Overlay))
    names, width = list(first.layers), len(apart) // len(first.layers)
    layers = {name: apart[place * width : (place + 1) * width] for place, name in enumerate(names)}
    numbers = layers if isinstance(first.values, Mapping) else layers[names[0]]
    return replace(first, values=numbers, diverging=True, caption=f"{title} ({NOTE})", **how)


def _map(first: Heatmap, second: Heatmap, pairs: Sequence[Pair]) -> Heatmap:
    """A matrix of differences. Cells say words where the two maps do, those that differ beside each other; else the
    difference. Tips say all three numbers, and the words in full."""
    width = len(first.columns)
    lines = [pairs[start : start + width] for start in range(0, len(pairs), width)]
    apart = [[pair.difference for pair in line] for line in lines]
    said = _words(first, second)
    texts: Sequence[Sequence[str | None]] | None = cell_texts(apart, first.percent) if width <= WIDEST else None
    if said:
        texts = [[a if a == b else f"{_cut(a)}|{_cut(b)}" for a, b in line] for line in said]

    def tip(pair: Pair, words: tuple[str, str]) -> str:
        a, b, far = (f"{x:.1%}" if first.percent else number(x) for x in (pair.first, pair.second, pair.difference))
        beside_each_other = " | ".join(map(visible, dict.fromkeys(words)))
        return f"{pair.where}: {far}\n{a} minus {b}" + (f"\n{beside_each_other}" if said else "")

    rows = said or [[("", "")] * width] * len(lines)
    tips = [[tip(*cell) for cell in zip(line, row, strict=True)] for line, row in zip(lines, rows, strict=True)]
    title = _title(first, second)
    return replace(
        first, values=apart, texts=texts, tips=tips, diverging=True, limits=None, title=title,
        caption=f"{title} ({NOTE})", colorbar=f"difference of {first.colorbar}" if first.colorbar else "difference",
    )  # fmt: skip


def _words(first: Heatmap, second: Heatmap) -> list[list[tuple[str, str]]]:
    """What cells of both say, where these are words."""
    if first.texts is None or second.texts is None or (_counted(first) and _counted(second)):
        return []
    rows = zip(first.texts, second.texts, strict=True)
    return [[(a or "", b or "") for a, b in zip(here, there, strict=True)] for here, there in rows]


def _cut(word: str) -> str:
    """A word short enough that two stand in a cell."""
    return short(visible(word.strip() or word), 4)


def _layers_alike(first: Chart, second: Chart) -> tuple[Chart, Chart]:
    """Layers of both under the same names, in their order: some say their own mass (`hop 0 (passes on 46 %)`)."""
    if not isinstance(first, (TokenStrip, Overlay)) or not isinstance(second, (TokenStrip, Overlay)):
        return first, second
    if len(first.layers) != len(second.layers) or [*first.layers] == [*second.layers]:
        return first, second
    names = [a if a == b else f"{a} | {b}" for a, b in zip(first.layers, second.layers, strict=True)]
    here, there = (dict(zip(names, chart.layers.values(), strict=True)) for chart in (first, second))
    return replace(first, values=here), replace(second, values=there)


def _counted(chart: Heatmap) -> bool:
    """Whether what cells say are numbers alone."""
    said = [text for line in chart.texts or () for text in line if text]
    return all(text.rstrip("%").replace("–", "0").lstrip("+-").replace(".", "", 1).isdecimal() for text in said)


def _title(first: Any, second: Any) -> str:
    """Of the difference; both titles where they differ."""
    return f"Difference: {first.title}" if first.title == second.title else f"{first.title} − {second.title}"


def _numbers(chart: Chart) -> list[tuple[str, float]]:
    """All numbers of a chart, each with what it is of, in words; none of a kind of chart that is not known here."""
    if isinstance(chart, Heatmap):
        down = f"{chart.ylabel} " if chart.ylabel else ""
        columns = _told_apart(chart.columns)
        if chart.xlabel and all(column.isdecimal() for column in columns):
            columns = [f"{chart.xlabel} {column}" for column in columns]
        return [
            (f"{down}{row}, {column}", float(entry))
            for row, line in zip(chart.rows, chart.values, strict=True)
            for column, entry in zip(columns, line, strict=True)
        ]
    if isinstance(chart, Curves):
        return [
            (f"{line.name}, {chart.xlabel or 'at'} {place}", float(entry))
            for line in chart.lines
            for place, entry in zip(chart.places, line.values, strict=True)
        ]
    if isinstance(chart, Bars):
        return [(bar.name, bar.value) for bar in chart.bars]
    if isinstance(chart, (TokenStrip, Overlay)):
        names = _told_apart(chart.tokens) if isinstance(chart, TokenStrip) else [f"box {box}" for box in chart.boxes]
        return [
            (f"{layer}, {name}" if layer else name, float(entry))
            for layer, entries in chart.layers.items()
            for name, entry in zip(names, entries, strict=True)
        ]
    return []


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names as they show; of those that stand several times, which."""
    shown = [" | ".join(map(visible, name.split(" | "))) for name in names]
    counts = Counter(shown)
    return [f"{name} at {place}" if counts[name] > 1 else name for place, name in enumerate(shown)]
