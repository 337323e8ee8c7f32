"""Numbers as people write them: separators, currencies, units, percents, negatives in parentheses.

    1,234.5   1 234   $5   US$ 5   5 €   −5   (5)   5k   5 mn   5 bn   1.2 trillion   12 %   12 percent   12 pct

A percent has two readings, 12 and 0.12, of which a number without a percent sign may be either; two percents are
compared as percents (so 1 % is not 100 %). A unit counts: "5 million" is 5,000,000, and not "5", since the unit of an
axis is not known here.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

UNITS = {
    "k": 1e3, "thousand": 1e3, "thousands": 1e3, "m": 1e6, "mn": 1e6, "mln": 1e6, "million": 1e6, "millions": 1e6,
    "b": 1e9, "bn": 1e9, "billion": 1e9, "billions": 1e9, "t": 1e12, "tn": 1e12, "trn": 1e12, "trillion": 1e12,
    "trillions": 1e12,
}  # fmt: skip
"""What a unit multiplies by."""
_PERCENT = re.compile(r"\s*(?:%|percents?|per\s+cent|pct\.?)$")
_UNIT = re.compile(rf"(?<=[\d.])\s*({'|'.join(sorted(UNITS, key=len, reverse=True))})\.?$")
_CURRENCY = re.compile(r"(?:\b(?:us|ca|c|au|a|nz|hk|s|r)?[$€£¥₹₩₽₺₫₪฿¢]|[$€£¥₹₩₽₺₫₪฿¢])")
_SPACES = "\u00a0\u2009\u202f"
_GROUPS = re.compile(r"(\d{1,3})((?:,\d{3})+|(?: \d{3})+)(?!\d)")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:_\d+)*\.?(?:\d+(?:_\d+)*)?|\.\d+)(?:e[+-]?\d+)?")
_YEAR = re.compile(r"1\d{3}|20\d{2}|2100")


class Numeral(NamedTuple):
    """A number as it was written.

    Attributes:
        value: with its unit; of a percent, the 0 to 100 reading.
        percent: it had a percent sign or word.
    """

    value: float
    percent: bool

    def readings(self, other: Numeral) -> tuple[float, ...]:
        """What it may stand for beside another."""
        return (self.value, self.value / 100) if self.percent and not other.percent else (self.value,)


def numeral(text: str) -> Numeral | None:
    """The number that a text is, all of it; None if it is none (also for nan and inf)."""
    number = text.strip().lower().translate({ord(space): " " for space in _SPACES}).replace("−", "-").replace("–", "-")
    # accounts write a loss in parentheses
    within = number[1:-1].strip() if number.startswith("(") and number.endswith(")") else None
    sign, number = (-1.0, within) if within is not None else (1.0, number)
    percent = _PERCENT.search(number)
    number = number[: percent.start()] if percent else number
    number = _CURRENCY.sub("", number, count=1).strip()
    unit = _UNIT.search(number)
    number = number[: unit.start()] if unit else number
    number = re.sub(r"^([+-])\s+", r"\1", number)
    number = _GROUPS.sub(lambda match: match[1] + re.sub(r"[ ,]", "", match[2]), number, count=1)
    if not _NUMBER.fullmatch(number):
        return None
    value = sign * float(number) * (UNITS[unit[1]] if unit else 1.0)
    return Numeral(value, percent is not None) if math.isfinite(value) else None


def is_year(text: str) -> bool:
    """Whether a text is four digits from 1000 to 2100, and nothing else."""
    return _YEAR.fullmatch(text.strip()) is not None
