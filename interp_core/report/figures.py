"""What the charts of lines, bars, tokens and pictures are made of: data that is checked once; `charts` draws it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from ..errors import PlanError, wrong
from .colors import limits_of
from .pictures import pixels_of

if TYPE_CHECKING:
    from ..stats import Band, Interval

Ends = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


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
        intervals = list(numbers)
        return Line(name, [i.value for i in intervals], [(i.low, i.high) for i in intervals], base)


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


class Frame(NamedTuple):
    """What a figure must have for a chart: inches, and axes below and beside each other."""

    width: float
    height: float
    down: int = 1
    across: int = 1


@runtime_checkable
class Drawn(Protocol):
    """What a figure is made of; charts are such."""

    def frame(self, width: float | None = None) -> Frame:
        """See `Chart`."""

    def draw(self, axes: Sequence[Any]) -> None:
        """See `Chart`."""


@dataclass(frozen=True, eq=False)
class HeatmapData:
    """The matrix of `Heatmap`."""

    values: Any
    rows: Sequence[str]
    columns: Sequence[str]
    _: KW_ONLY
    texts: Sequence[Sequence[str | None]] | None = None
    tips: Sequence[Sequence[str]] | None = None
    diverging: bool = False
    limits: Ends | None = None
    title: str = ""
    caption: str = ""
    xlabel: str = ""
    ylabel: str = ""
    colorbar: str = ""
    percent: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", plain_values("Heatmap", self.values))
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


@dataclass(frozen=True, eq=False)
class CurvesData:
    """The lines of `Curves`."""

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
            Line(
                line.name,
                plain_values("Curves", line.values),
                None if line.bands is None else plain_values("Curves", line.bands),
                line.base,
            )
            for line in self.lines
        ]
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


@dataclass(frozen=True, eq=False)
class BarsData:
    """The bars of `Bars`."""

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

    @property
    def span(self) -> Ends:
        """Ends of the axis."""
        if self.limits is not None:
            return self.limits
        ends = [end for bar in self.bars for end in bar.ends or ()]
        return _span([0.0, self.base or 0.0, *(bar.value for bar in self.bars), *ends], self.percent)


@dataclass(frozen=True, eq=False)
class TokenStripData:
    """The tokens of `TokenStrip`."""

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
        several = self.values if isinstance(self.values, Mapping) else {"": self.values}
        layers = {str(name): plain_values("TokenStrip", values) for name, values in several.items()}
        object.__setattr__(self, "values", layers if isinstance(self.values, Mapping) else layers[""])
        if not layers:
            raise PlanError("TokenStrip: there are no values; give one per token")
        for name, values in layers.items():
            if not self.tokens or len(self.tokens) != len(values):
                of = f" of {name!r}" if name else ""
                raise PlanError(
                    f"TokenStrip: {len(values)} values{of} for {len(self.tokens)} tokens; give one per token"
                )
        for name, (start, stop) in (self.spans or {}).items():
            if not 0 <= start < stop <= len(self.tokens):
                raise PlanError(
                    f"TokenStrip: span {name!r} is {start} to {stop}, the text has tokens 0 to {len(self.tokens)} "
                    "(the end is not part of a span)"
                )

    @property
    def layers(self) -> Mapping[str, Any]:
        """The numbers by name; one without a name where there is one layer."""
        return self.values if isinstance(self.values, Mapping) else {"": self.values}


@dataclass(frozen=True, eq=False)
class OverlayData:
    """The parts of `Overlay`."""

    boxes: Sequence[Box]
    values: Any
    _: KW_ONLY
    picture: Any = None
    size: tuple[float, float] | None = None
    opacity: float = 0.6
    diverging: bool = False
    limits: Ends | Mapping[str, Ends] | None = None
    title: str = ""
    caption: str = ""
    colorbar: str = ""

    def __post_init__(self) -> None:
        several = self.values if isinstance(self.values, Mapping) else {"": self.values}
        layers = {str(name): plain_values("Overlay", values) for name, values in several.items()}
        object.__setattr__(self, "values", layers if isinstance(self.values, Mapping) else layers[""])
        if not layers or not self.boxes:
            raise PlanError("Overlay: there is nothing to draw; give boxes, and a number for each")
        for name, values in layers.items():
            if len(values) != len(self.boxes):
                of = f" of {name!r}" if name else ""
                raise PlanError(f"Overlay: {len(values)} values{of} for {len(self.boxes)} boxes; give one per box")
        if self.picture is not None:
            object.__setattr__(self, "picture", pixels_of(self.picture))
        if self.size is None:  # without a picture the boxes alone say how far it reaches
            far = (max(box[2] for box in self.boxes), max(box[3] for box in self.boxes))
            object.__setattr__(self, "size", far)

    @property
    def layers(self) -> Mapping[str, Any]:
        """The numbers by name; one without a name where there is one layer."""
        return self.values if isinstance(self.values, Mapping) else {"": self.values}

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height in the units of the boxes."""
        assert self.size is not None
        return self.size

    def ends(self, layer: str) -> Ends:
        """Ends of a layer's scale."""
        known = self.limits.get(layer) if isinstance(self.limits, Mapping) else self.limits
        return known or limits_of([self.layers[layer]], self.diverging)


def plain_values(owner: str, values: Any) -> Any:
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
    return [plain_values(owner, item) if hasattr(item, "__len__") else float(item) for item in values]


def _span(values: Iterable[float], percent: bool) -> Ends:
    """Limits that hold all finite values, with a little room; of shares, all shares."""
    known = [value for value in values if math.isfinite(value)]
    if not any(known):
        return 0.0, 1.0
    low, high = min(known), max(known)
    if percent and low >= 0 and high <= 1:
        return 0.0, 1.0
    room = 0.05 * (high - low) or abs(high) or 1.0
    return (low if low == 0 else low - room), (high if high == 0 else high + room)
