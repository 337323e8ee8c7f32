"""DocVQA's ANLS: how close an answer is to a gold one, letter by letter, and nothing below a half.

    NL      Levenshtein(p, g) / max(|p|, |g|), 0 if both are empty, of texts in lower case with single spaces
    ANLS    the mean over questions of max over golds of 1 - NL where NL < 0.5, else 0

    paper            NL = 0.5 gives 0
    boundary_kept    NL = 0.5 gives 0.5, as the challenge's and several models' scripts do
    reference_lmms   that, with the lengths of the texts as they came: white space makes an answer longer, not further

Source: Biten et al. (2019), arXiv:1907.00490; the boundary of lmms-eval's script (its lengths need
`extraction=False`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .scoring import Scorer

THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class DocVQA(Scorer):
    """ANLS.

    Attributes:
        convention: what happens at NL = 0.5, and which lengths count.
    """

    name: ClassVar[str] = "docvqa"
    convention: Literal["paper", "boundary_kept", "reference_lmms"] = "paper"

    def _value(self, read: str, gold: str) -> float:
        a, b = _spaced(read), _spaced(gold)
        raw = self.convention == "reference_lmms"
        longest = max(len(read), len(gold)) if raw else max(len(a), len(b))
        distance = levenshtein(a, b) / longest if longest else 0.0
        near = distance < THRESHOLD or (distance == THRESHOLD and self.convention != "paper")
        return 1.0 - distance if near else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(a: str, b: str) -> int:
    """How many letters are to be put in, left out or changed to make one text the other."""
    # a row of the table is as long as the shorter text
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]
