"""The charts: data that is checked once, and drawn as HTML or as PNG.

Heatmap       a matrix: layers against heads, tokens, experts
Curves        lines over places (layers, lengths), with bands
Bars          one number per name, with its interval: methods beside each other
TokenStrip    a text whose tokens are coloured by a number each
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError, wrong

if TYPE_CHECKING:
    from ..stats import Band, Interval

Ends = tuple[float, float]


class Chart(ABC):
    """Something that can be drawn. `html` is a piece of a page, `png` writes a file."""

    @abstractmethod
    def html(self) -> str:
        """The chart as HTML, for a `Section` of a `page`."""

    @abstractmethod
    def png(self, path: str | Path) -> Path:
        """The chart as a file; returns its path.

        Raises:
            CapabilityError: matplotlib is not installed.
        """

    def _repr_html_(self) -> str:
        from .html import fragment

        return fragment(self.html())


@dataclass(frozen=True, eq=False)
class Heatmap(Chart):
    """A matrix as coloured cells.

    Attributes:
        values: rows of numbers (lists, an array, a tensor); NaN is drawn grey.
        rows, columns: their names.
        texts: what the cells say (None: nothing); long ones are cut.
        tips: what a cell says when pointed at, in HTML (None: names and number).
        diverging: blue over white to red, symmetric about 0; else white to blue.
        limits: ends of the scale; None: those of the values.
        title: above the PNG.
        caption: below the HTML; the title if empty.
        xlabel, ylabel, colorbar: names of columns, rows and scale in the PNG.

    Raises:
        PlanError: names, texts or tips that do not match the values.
    """

    values: Any
    rows: Sequence[str]
    columns: Sequence[str]
    _: KW_ONLY
    texts: Sequence[Sequence[str]] | None = None
    tips: Sequence[Sequence[str]] | None = None
    diverging: bool = False
    limits: Ends | None = None
    title: str = ""
    caption: str = ""
    xlabel: str = ""
    ylabel: str = ""
    colorbar: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _plain("Heatmap", self.values))
        for what in ("values", "texts", "tips"):
            lines = getattr(self, what)
            if lines is None:
                continue
            shape = {len(line) for line in lines} or {0}
            if len(lines) != len(self.rows) or shape != {len(self.columns)} or not self.rows or not self.columns:
                raise PlanError(
                    f"Heatmap: {what} are {len(lines)} rows of {sorted(shape)}, the names {len(self.rows)} rows of "
                    f"{len(self.columns)}; a heat map has a value for every name, and one at least"
                )

    def html(self) -> str:
        """The matrix as a table with tips."""
        from .html import heatmap

        return heatmap(
            self.values, self.rows, self.columns, texts=self.texts, tips=self.tips, diverging=self.diverging,
            limits=self.limits, caption=self.caption or self.title,
        )  # fmt: skip

    def png(self, path: str | Path) -> Path:
        """The matrix as a file. Of many rows or columns, only some are named."""
        from .png import heatmap

        return heatmap(
            path, self.values, self.rows, self.columns, texts=self.texts, diverging=self.diverging, limits=self.limits,
            title=self.title, xlabel=self.xlabel, ylabel=self.ylabel, colorbar=self.colorbar,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Line:
    """One line of `Curves`.

    Attributes:
        name: for the legend.
        values: one number per place; NaN leaves a gap.
        bands: low and high around each `[place 2]`; None: no band.
        base: a level to compare with, drawn dashed in the same colour; None: none.
    """

    name: str
    values: Any
    bands: Any = None
    base: float | None = None

    @staticmethod
    def of(name: str, numbers: Band | Iterable[Interval], base: float | None = None) -> Line:
        """The line of a band along one axis, or of an interval per place."""
        each = list(numbers)
        return Line(name, [one.value for one in each], [(one.low, one.high) for one in each], base)


@dataclass(frozen=True, eq=False)
class Curves(Chart):
    """Lines over places, with bands.

    Attributes:
        lines: each with as many values as there are places.
        places: names along the horizontal axis; of many, some are written.
        limits: of the vertical axis, at which lines are cut off; None: what the lines need.
        percent: values are shares, written in percent; from 0 to 100 % if that is where they lie.
        base: what the lines' dashed levels are, for tips and legend.
        title: above the PNG.
        caption: below the HTML; the title if empty.
        xlabel, ylabel: of the axes.

    Raises:
        PlanError: no places, no lines, or lines of another length.
    """

    lines: Sequence[Line]
    places: Sequence[str]
    _: KW_ONLY
    limits: Ends | None = None
    percent: bool = False
    base: str = "base"
    title: str = ""
    caption: str = ""
    xlabel: str = ""
    ylabel: str = ""

    def __post_init__(self) -> None:
        if not self.lines or not self.places:
            raise PlanError(
                f"Curves: {len(self.lines)} lines over {len(self.places)} places; give one of both at least"
            )
        lines = [
            Line(line.name, _plain("Curves", line.values), None if line.bands is None else _plain("Curves", line.bands),
                 line.base)
            for line in self.lines
        ]  # fmt: skip
        for line in lines:
            if {len(line.values), len(self.places if line.bands is None else line.bands)} != {len(self.places)}:
                raise PlanError(
                    f"Curves: line {line.name!r} has {len(line.values)} values"
                    + (f" and {len(line.bands)} bands" if line.bands is not None else "")
                    + f", there are {len(self.places)} places"
                )
        object.__setattr__(self, "lines", lines)

    @property
    def span(self) -> Ends:
        """Ends of the vertical axis."""
        if self.limits is not None:
            return self.limits
        known = [
            *(v for line in self.lines for v in line.values),
            *(line.base for line in self.lines if line.base is not None),
        ]
        return _span([*known, *(v for line in self.lines for band in line.bands or () for v in band)], self.percent)

    def html(self) -> str:
        """The lines as inline SVG, with a tip at every point."""
        from .svg import curves

        return curves(self)

    def png(self, path: str | Path) -> Path:
        """The lines as a file."""
        from .png import curves

        return curves(path, self)


@dataclass(frozen=True, eq=False)
class Bar:
    """One bar of `Bars`.

    Attributes:
        name: beside it.
        value: its length; NaN draws none.
        ends: of its interval; None: none.
    """

    name: str
    value: float
    ends: Ends | None = None

    @staticmethod
    def of(name: str, interval: Interval) -> Bar:
        """The bar of an interval."""
        return Bar(name, interval.value, (interval.low, interval.high))


@dataclass(frozen=True, eq=False)
class Bars(Chart):
    """One number per name, below each other, with intervals.

    Attributes:
        bars: in their order, from above.
        limits: of the axis; None: from 0 to what the bars need.
        percent: values are shares, written in percent.
        base: a level to compare with (chance), drawn dashed; None: none.
        title: above the PNG.
        caption: below the HTML; the title if empty.
        xlabel: what the numbers are.

    Raises:
        PlanError: no bars.
    """

    bars: Sequence[Bar]
    _: KW_ONLY
    limits: Ends | None = None
    percent: bool = False
    base: float | None = None
    title: str = ""
    caption: str = ""
    xlabel: str = ""

    def __post_init__(self) -> None:
        if not self.bars:
            raise PlanError("Bars: there are none; give one at least")

    @staticmethod
    def of(intervals: Mapping[str, Interval], **how: Any) -> Bars:
        """The bars of intervals by name; `how` are further fields."""
        return Bars([Bar.of(name, interval) for name, interval in intervals.items()], **how)

    @property
    def span(self) -> Ends:
        """Ends of the axis."""
        if self.limits is not None:
            return self.limits
        ends = [end for bar in self.bars for end in bar.ends or ()]
        return _span([0.0, self.base or 0.0, *(bar.value for bar in self.bars), *ends], self.percent)

    def html(self) -> str:
        """The bars as inline SVG, with tips."""
        from .svg import bars

        return bars(self)

    def png(self, path: str | Path) -> Path:
        """The bars as a file."""
        from .png import bars

        return bars(path, self)


@dataclass(frozen=True, eq=False)
class TokenStrip(Chart):
    """A text whose tokens are coloured by a number each.

    Attributes:
        tokens: as text, with their white space.
        values: one number per token; NaN is drawn grey.
        diverging: blue over white to red, symmetric about 0; else white to blue.
        limits: ends of the scale; None: those of the values.
        spans: named ranges of tokens, half-open, underlined.
        title: above the PNG.
        caption: below the HTML; the title if empty.
        colorbar: what the numbers are.

    Raises:
        PlanError: no tokens, another number of values, a span outside the text.
    """

    tokens: Sequence[str]
    values: Any
    _: KW_ONLY
    diverging: bool = False
    limits: Ends | None = None
    spans: Mapping[str, tuple[int, int]] | None = None
    title: str = ""
    caption: str = ""
    colorbar: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _plain("TokenStrip", self.values))
        if not self.tokens or len(self.tokens) != len(self.values):
            raise PlanError(f"TokenStrip: {len(self.values)} values for {len(self.tokens)} tokens; give one per token")
        for name, (start, stop) in (self.spans or {}).items():
            if not 0 <= start < stop <= len(self.tokens):
                raise PlanError(
                    f"TokenStrip: span {name!r} is {start} to {stop}, the text has tokens 0 to {len(self.tokens)} "
                    "(the end is not part of a span)"
                )

    def html(self) -> str:
        """The text, with a tip at every token."""
        from .html import tokens

        return tokens(
            self.tokens, self.values, diverging=self.diverging, limits=self.limits, spans=self.spans or {},
            caption=self.caption or self.title, scale=self.colorbar,
        )  # fmt: skip

    def png(self, path: str | Path) -> Path:
        """The text as a file, in lines of equal width."""
        from .png import strip

        return strip(path, self)


def _plain(owner: str, values: Any) -> Any:
    """Arrays and tensors as lists.

    Raises:
        PlanError: something without items.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise PlanError(wrong(owner, "lists of numbers", values))
    return [_plain(owner, item) if hasattr(item, "__len__") else float(item) for item in values]


def _span(values: Iterable[float], percent: bool) -> Ends:
    """Limits that hold all finite values, with a little room; of shares, all shares."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    if percent and low >= 0 and high <= 1:
        return 0.0, 1.0
    room = 0.05 * (high - low) or abs(high) or 1.0
    return (low if low == 0 else low - room), (high if high == 0 else high + room)
