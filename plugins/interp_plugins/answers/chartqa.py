"""ChartQA's relaxed accuracy: numbers within 5 %, other answers the same.

    official   both parse and gold ≠ 0: |prediction - gold| / |gold| ≤ 0.05; else the same letters, case aside
               parse: float(text), or float(text without %) / 100
    lenient    the same with numbers as people write them (`numerals`), 0 within 1e-9, white space and a final full stop
               aside, years equal (`exact_years`)

Source: Masry et al. (2022), arXiv:2203.10244, as the function of pix2struct has it, which most evaluations copied: a
gold "0" is met by "0" alone, and "5 " is 5 while "red " is not "red" (extraction strips both; `extraction=False` does
not).
Must equal: official, on every pair of texts, that function. Lenient never scores less, but for years.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .numerals import is_year, numeral
from .scoring import Scorer

TOLERANCE = 0.05
ZERO = 1e-9
"""How far from a gold 0 a lenient answer may be."""


@dataclass(frozen=True, kw_only=True)
class ChartQA(Scorer):
    """Relaxed accuracy.

    Attributes:
        convention: which numbers are understood.
        exact_years: gold answers of four digits from 1000 to 2100 need the very number; None: lenient does, official
            does not.
    """

    name: ClassVar[str] = "chartqa"
    convention: Literal["official", "lenient"] = "official"
    exact_years: bool | None = None

    def _value(self, read: str, gold: str) -> float:
        lenient = self.convention == "lenient"
        if (lenient if self.exact_years is None else self.exact_years) and is_year(gold):
            number = _number(read, lenient)
            return float(number == float(gold) if number is not None else read.strip() == gold.strip())
        return float(_lenient(read, gold) if lenient else _official(read, gold))


def _number(text: str, lenient: bool) -> float | None:
    if not lenient:
        return _parsed(text)
    number = numeral(text)
    return None if number is None else number.value


def _parsed(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _official(prediction: str, gold: str) -> bool:
    value, wanted = _parsed(prediction), _parsed(gold)
    # as published, a gold 0 counts as none, and is compared as text
    if value is not None and wanted:
        return abs(value - wanted) / abs(wanted) <= TOLERANCE
    return prediction.lower() == gold.lower()


def _lenient(prediction: str, gold: str) -> bool:
    value, wanted = numeral(prediction), numeral(gold)
    if value is None or wanted is None:
        return _plain(prediction) == _plain(gold)
    return any(_near(a, b) for a in value.readings(wanted) for b in wanted.readings(value))


def _near(value: float, wanted: float) -> bool:
    return abs(value) <= ZERO if wanted == 0 else abs(value - wanted) / abs(wanted) <= TOLERANCE


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
