"""VQAv2's accuracy: how many of ten people gave the answer, after cleaning.

    accuracy    the mean over people i of min(1, answers of the others that are the same / 3)
                ten people: 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, ≥ 4 of them

Three cleanings have been published, and differ in numbers; a result says which:

    official_2021   white space of all texts; where the golds differ, punctuation and words of golds and prediction
    official_2017   the prediction always; the golds' punctuation alone, where they differ
    always          golds and prediction, always

"The others" are the other nine by their place in the list. (The published script compares records, and drops equal ones
together: ten bare "red" against "red" score 0 there.) Of fewer than ten the sets are those without one of them, and a
single gold is to be met exactly.

Source: Goyal et al. (2017), arXiv:1612.00837, and the published evaluation as it stood in 2017 and stands since 2021.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from .contractions import CONTRACTIONS
from .scoring import Score, Scorer

MARKS = ';/[]"{}()=+\\_->@<`,?!'
"""What counts as punctuation; neither the apostrophe nor the colon does."""
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PERIODS = 32
"""How many full stops of an answer go at most (a flag that the published script passes as a count)."""
_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


@dataclass(frozen=True, kw_only=True)
class VQAv2(Scorer):
    """Accuracy over people's answers.

    Attributes:
        convention: which texts are cleaned, and when.
    """

    name: ClassVar[str] = "vqav2"
    convention: Literal["official_2021", "official_2017", "always"] = "official_2021"

    def scored(self, prediction: str, golds: tuple[str, ...]) -> Score:
        answer = self._extracted(prediction)
        if answer.problem:
            return Score(0.0, "", "", golds[0], answer.problem)
        read, cleaned = self._cleaned(answer.answer, golds)
        same = [gold == read for gold in cleaned]
        gold = golds[same.index(True)] if any(same) else golds[0]
        return Score(agreement(same), answer.answer, read, gold, cut=answer.cut)

    def _cleaned(self, answer: str, golds: Sequence[str]) -> tuple[str, list[str]]:
        """Prediction and golds as they are compared."""
        if self.convention == "always":
            return words(punctuation(spaced(answer))), [words(punctuation(spaced(gold))) for gold in golds]
        if self.convention == "official_2017":
            differ = len(set(golds)) > 1
            return words(punctuation(spaced(answer))), [punctuation(gold) if differ else gold for gold in golds]
        answer, several = spaced(answer), [spaced(gold) for gold in golds]
        if len(set(several)) == 1:
            return answer, several
        return words(punctuation(answer)), [words(punctuation(gold)) for gold in several]


def agreement(same: Sequence[bool]) -> float:
    """Accuracy of an answer that is the same as some of the people's."""
    matches = sum(same)
    if len(same) == 1:
        return float(matches)
    # of the sets without one, `matches` lack a match
    without = matches * min(3, matches - 1) + (len(same) - matches) * min(3, matches)
    return without / (3 * len(same))


def spaced(text: str) -> str:
    """A text without line breaks and tabs, and without white space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation(text: str) -> str:
    """A text without its punctuation: deleted where the mark stands beside a space, or a comma between digits anywhere;
    else a space in its place."""
    between, cleaned = _BETWEEN_DIGITS.search(text), text
    for mark in MARKS:
        # as published, the text as it came is asked, not what the marks before have left of it
        gone = between or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if gone else " ")
    return _PERIOD.sub("", cleaned, count=PERIODS)


def words(text: str) -> str:
    """A text in lower case with digits for number words, without articles, with apostrophes in contractions."""
    kept = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept if word not in ARTICLES)
