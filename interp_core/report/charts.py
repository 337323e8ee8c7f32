"""The charts: data that is checked once, and drawn as HTML or as PNG.

Heatmap       a matrix: layers against heads, tokens, experts
Curves        lines over places (layers, lengths), with bands
Bars          one number per name, with its interval: methods beside each other
TokenStrip    a text whose tokens are coloured by a number each
Overlay       a picture whose parts are coloured by a number each
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figures import Bar, BarsData, CurvesData, Frame, HeatmapData, OverlayData, TokenStripData
from .html import escape

if TYPE_CHECKING:
    from ..stats import Interval


class Chart(ABC):
    """Something that can be drawn. `html` is a piece of a page, `png` writes a file, `plot` draws for matplotlib."""

    @abstractmethod
    def html(self) -> str:
        """The chart as HTML, for a `Section` of a `page`."""

    @abstractmethod
    def frame(self, width: float | None = None) -> Frame:
        """Its size in inches and how many axes it takes, for a figure of a width (None: as wide as it needs)."""

    @abstractmethod
    def draw(self, axes: Sequence[Any]) -> None:
        """Draw on as many axes of matplotlib as `frame` says, one after the other."""

    def png(self, path: str | Path, *, width: float | None = None) -> Path:
        """The chart as a file, whose kind the end of its name says: `.png` (also if there is none), `.pdf`, `.svg`.

        Args:
            width: of the figure in inches, such as 3.3 for a column of a paper; letters keep their size, and a matrix
                that is too wide goes on below.

        Returns:
            the path of the file.

        Raises:
            CapabilityError: matplotlib is not installed.
        """
        from .png import save

        return save(path, [self], width)

    def plot(self, ax: Any = None, *, title: str | None = None, figsize: tuple[float, float] | None = None) -> Any:
        """Draw with matplotlib, to be changed further.

        Args:
            ax: axes to draw on; None: those of a new figure of pyplot.
            title: in place of its own.
            figsize: width and height of a new figure in inches.

        Returns:
            the axes.

        Raises:
            PlanError: a chart that takes several axes, on one.
            CapabilityError: matplotlib is not installed.
        """
        from .png import plot

        return plot(self, ax, title, figsize)

    def _repr_html_(self) -> str:
        from .html import fragment

        return fragment(self.html())


@dataclass(frozen=True, eq=False)
class Heatmap(HeatmapData, Chart):
    """A matrix as coloured cells.

    Attributes:
        values: rows of numbers (lists, an array, a tensor); NaN is drawn grey.
        rows, columns: their names.
        texts: what the cells say (None: nothing, of all or of one); long ones are cut, an empty token is `∅`.
        tips: what a cell says when pointed at, in HTML (None: names and number).
        diverging: blue over white to red, symmetric about 0; else white to blue.
        limits: ends of the scale; None: those of the values.
        title: above the PNG.
        caption: below the HTML; the title if empty.
        xlabel, colorbar: names of columns and scale.
        ylabel: name of the rows, in the PNG.
        percent: values are shares: tips and scale say them in per cent.

    Raises:
        PlanError: names, texts or tips that do not match the values.
    """

    def html(self) -> str:
        """The matrix as a table with tips."""
        from .html import heatmap

        return heatmap(
            self.values, self.rows, self.columns, texts=self.texts, tips=self.tips, diverging=self.diverging,
            limits=self.limits, caption=self.caption or self.title, percent=self.percent, across=self.xlabel,
            scale=self.colorbar,
        )  # fmt: skip

    def frame(self, width: float | None = None) -> Frame:
        """Cells of one size; of many rows or columns, only some are named."""
        from .png import heatmap_frame

        return heatmap_frame(self, width)

    def draw(self, axes: Sequence[Any]) -> None:
        """The matrix, as many columns on each of the axes."""
        from .png import heatmap

        heatmap(axes, self)


@dataclass(frozen=True, eq=False)
class Curves(CurvesData, Chart):
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

    def html(self) -> str:
        """The lines as inline SVG, with a tip at every point."""
        from .svg import curves

        return curves(self)

    def frame(self, width: float | None = None) -> Frame:
        """See `Chart.frame`."""
        from .png import curves_frame

        return curves_frame(self, width)

    def draw(self, axes: Sequence[Any]) -> None:
        """The lines."""
        from .png import curves

        curves(axes, self)


@dataclass(frozen=True, eq=False)
class Bars(BarsData, Chart):
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

    @staticmethod
    def of(intervals: Mapping[str, Interval], **how: Any) -> Bars:
        """The bars of intervals by name; `how` are further fields."""
        return Bars([Bar.of(name, interval) for name, interval in intervals.items()], **how)

    def html(self) -> str:
        """The bars as inline SVG, with tips."""
        from .svg import bars

        return bars(self)

    def frame(self, width: float | None = None) -> Frame:
        """See `Chart.frame`."""
        from .png import bars_frame

        return bars_frame(self, width)

    def draw(self, axes: Sequence[Any]) -> None:
        """The bars."""
        from .png import bars

        bars(axes, self)


@dataclass(frozen=True, eq=False)
class TokenStrip(TokenStripData, Chart):
    """A text whose tokens are coloured by a number each.

    Attributes:
        tokens: as text, with their white space.
        values: one number per token, NaN drawn grey; or several such by name, layers that the reader of the HTML
            switches between, below each other in the PNG.
        diverging: blue over white to red, symmetric about 0; else white to blue.
        limits: ends of the scale; None: those of each layer's values.
        spans: named ranges of tokens, half-open, underlined.
        title: above the PNG.
        caption: below the HTML; the title if empty.
        colorbar: what the numbers are.

    Raises:
        PlanError: no tokens, another number of values, a span outside the text.
    """

    def html(self) -> str:
        """The text, with a tip at every token."""
        from .html import tokens

        return tokens(
            self.tokens, self.layers, diverging=self.diverging, limits=self.limits, spans=self.spans or {},
            caption=self.caption or self.title, scale=self.colorbar,
        )  # fmt: skip

    def frame(self, width: float | None = None) -> Frame:
        """See `Chart.frame`."""
        from .png import strip_frame

        return strip_frame(self, width)

    def draw(self, axes: Sequence[Any]) -> None:
        """The text, in lines of equal width."""
        from .png import strip

        strip(axes, self)


@dataclass(frozen=True, eq=False)
class Overlay(OverlayData, Chart):
    """A picture whose parts are coloured by a number each.

    Attributes:
        boxes: of the parts: left, top, right and bottom in the picture's pixels.
        values: one number per box, NaN drawn grey; or several such by name, as in `TokenStrip`.
        picture: what lies behind (an image of PIL, an array or tensor `[height width 3]` or `[3 height width]`),
            stretched to `size`; None: nothing.
        size: width and height that the boxes lie in; None: as far as they reach.
        opacity: of the colours, where there is a picture.
        diverging: blue over white to red, symmetric about 0; else white to blue.
        limits: ends of the scale, or of each layer's by its name; None: those of the values.
        title: above the PNG.
        caption: below the HTML; the title if empty.
        colorbar: what the numbers are.

    Raises:
        PlanError: no boxes, another number of values, or something that is no picture.
    """

    def html(self) -> str:
        """The picture as inline SVG, with a tip at every box."""
        from .svg import overlay

        return overlay(self)

    def frame(self, width: float | None = None) -> Frame:
        """See `Chart.frame`."""
        from .png import overlay_frame

        return overlay_frame(self, width)

    def draw(self, axes: Sequence[Any]) -> None:
        """The picture, the layers beside each other."""
        from .png import overlay

        overlay(axes, self)


def titled(charts: Iterable[Chart]) -> str:
    """Several charts for a section, each below its title; without a caption the title is below it already."""
    pieces = []
    for chart in charts:
        title = getattr(chart, "title", "") if getattr(chart, "caption", "") else ""
        pieces.append((f"<h3>{escape(title)}</h3>" if title else "") + chart.html())
    return "".join(pieces)
