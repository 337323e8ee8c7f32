"""Two colour scales, white to deep blue for amounts, blue over white to red for signed values; and colours of lines.

On dark pages nothing is as dark as the page, not white: the scales go from its background to bright colours. What is
below zero on a signed scale also bears a mark, since the two colours are one grey in print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_AMOUNT = ((248, 250, 253), (198, 219, 243), (117, 170, 219), (38, 110, 178), (9, 48, 107))
_SIGNED = ((33, 84, 158), (146, 190, 226), (250, 250, 250), (240, 164, 136), (178, 32, 44))
_MISSING = "#ececec"
_AMOUNT_NIGHT = ((28, 33, 40), (28, 56, 92), (34, 80, 138), (44, 104, 176), (62, 134, 214))
_SIGNED_NIGHT = ((62, 134, 214), (40, 78, 124), (28, 33, 40), (124, 54, 44), (210, 78, 70))
_MISSING_NIGHT = "#3a424d"
MARKED = 0.05
"""Share of the scale from which on a value below zero is marked."""
SERIES = ("#2f6fb0", "#c2571a", "#3d8f5a", "#7b4fa3", "#b0325f", "#5b6b7a")
"""Of lines and bars on white."""
DARK = ("#6fa9e3", "#ee9159", "#6cc38b", "#b595dc", "#e8789d", "#9fb0bf")
"""The same on dark pages."""


def limits_of(values: Iterable[Sequence[float]], diverging: bool) -> tuple[float, float]:
    """Limits of a scale: symmetric about zero if diverging; never of width zero."""
    known = [v for row in values for v in row if math.isfinite(v)]
    if not known:
        return 0.0, 1.0
    if diverging:
        top = max(abs(v) for v in known) or 1.0
        return -top, top
    low, high = min(known), max(known)
    return (low, high) if high > low else (low, low + 1.0)


def below_zero(value: float, high: float, diverging: bool) -> bool:
    """Whether a value bears the mark of what is below zero: where its colour is to be told from white."""
    return diverging and value < -MARKED * high


def rgb(value: float, low: float, high: float, diverging: bool, night: bool = False) -> tuple[int, int, int]:
    """Colour of a finite value, clipped to the limits; `night` on dark pages."""
    signed, amount = (_SIGNED_NIGHT, _AMOUNT_NIGHT) if night else (_SIGNED, _AMOUNT)
    stops = signed if diverging else amount
    place = min(max((value - low) / (high - low), 0.0), 1.0) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    part = place - i
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(stops[i], stops[i + 1], strict=True))
    return red, green, blue


def css(value: float, low: float, high: float, diverging: bool) -> tuple[str, str]:
    """Background and readable ink."""
    if not math.isfinite(value):
        return _MISSING, "#667085"
    red, green, blue = rgb(value, low, high, diverging)
    light = 0.3 * red + 0.59 * green + 0.11 * blue
    return f"#{red:02x}{green:02x}{blue:02x}", "#1b1f24" if light > 140 else "#ffffff"


def at_night(value: float, low: float, high: float, diverging: bool) -> str:
    """Background on dark pages, on which their ink is readable."""
    if not math.isfinite(value):
        return _MISSING_NIGHT
    red, green, blue = rgb(value, low, high, diverging, night=True)
    return f"#{red:02x}{green:02x}{blue:02x}"
