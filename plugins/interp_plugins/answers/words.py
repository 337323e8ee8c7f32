"""Answers of a few words: yes or no, a choice, a count, colours, and the gold answer anywhere.

    yes_no     a first word yes or no, or one of the two among the words
    choice     a letter by itself ("B", "(b)", "B. cat", "the answer is B"), or an option's text, which needs `choices`
    count      the one whole number in the answer, in digits or in words; "none" and "no" are 0
    colour     the colours named, as a set; grey is gray. Shades ("dark blue") count, unless `shades=False`
    contains   legacy: the gold answer stands in the text, as words ("1" is not in "21"); any list of answers wins

What names none of these, or several that differ, is unparsable: it scores 0 and is counted. Ours, no published rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import interp_core as ic

from .scoring import Score, Scorer, Scores

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return [word.lower() for word in _WORD.findall(text)]


def within(words: str, text: str) -> bool:
    """Whether a text has some words in a row, whole ones, case aside."""
    return (
        bool(words.strip()) and re.search(rf"(?<!\w){re.escape(words.strip())}(?!\w)", text, re.IGNORECASE) is not None
    )


def yes_or_no(text: str) -> tuple[str, str]:
    """What a text says, "yes" or "no", and why it says neither."""
    said = words_of(text)
    # "yes or no" repeats the question
    if said and said[0] in ("yes", "no") and said[1:2] != ["or"]:
        return said[0], ""
    both = {"yes", "no"} & set(said)
    if len(both) == 1:
        return both.pop(), ""
    return "", "it says yes and no" if both else "it says neither yes nor no"


class _Read(Scorer):
    """A scorer that reads golds and predictions alike."""

    def _value(self, read: str, gold: str) -> float:
        wanted, problem = self._read(gold)
        if problem:
            raise ic.TextError(f"scorer {self.name!r}: the gold answer {gold!r:.60} cannot be read: {problem}")
        return float(read == wanted)


@dataclass(frozen=True, kw_only=True)
class YesNo(_Read):
    """Yes or no."""

    name: ClassVar[str] = "yes_no"

    def _read(self, answer: str) -> tuple[str, str]:
        return yes_or_no(answer)


_LETTER = (
    r"\(([A-Za-z])\)",
    r"^([A-Za-z])$",
    r"^([A-Za-z])[.):,](?:\s|$)",
    r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)\s*(?:is|:)?\s*:?\s*([A-Z])(?!\w)",
)
"""How a letter is told from a word: in parentheses, by itself, before punctuation, after "answer"."""


@dataclass(frozen=True, kw_only=True)
class Choice(Scorer):
    """Multiple choice, by letter or text."""

    name: ClassVar[str] = "choice"

    def __call__(self, prediction: str, golds: str | Sequence[str], choices: Sequence[str] = ()) -> Score:
        """The score of a prediction.

        Args:
            prediction: what a model wrote.
            golds: the right letter, or the right option's text.
            choices: the options' texts, in the order of their letters.
        """
        answer = self._extracted(prediction)
        several = self.checked_golds(golds)
        wanted = [self._letter(gold, choices) for gold in several]
        for gold, (_, problem) in zip(several, wanted, strict=True):
            if problem:
                raise ic.TextError(f"scorer {self.name!r}: the gold answer {gold!r:.60} cannot be read: {problem}")
        read, problem = ("", answer.problem) if answer.problem else self._letter(answer.answer, choices)
        right = [letter == read for letter, _ in wanted]
        gold = several[right.index(True)] if any(right) else several[0]
        return Score(float(not problem and any(right)), answer.answer, read, gold, problem, answer.cut)

    def all(
        self,
        predictions: Sequence[str],
        golds: Sequence[str | Sequence[str]],
        choices: Sequence[Sequence[str]] | None = None,
    ) -> Scores:
        """The scores of predictions, each with its gold answer and options."""
        options = [()] * len(predictions) if choices is None else choices
        self._aligned(predictions, golds=golds, choices=options)
        return self._together(lambda i: self(predictions[i], golds[i], options[i]), len(predictions))

    def _letter(self, text: str, choices: Sequence[str]) -> tuple[str, str]:
        """The letter that a text means, and why it means none."""
        plain = [" ".join(words_of(choice)) for choice in choices]
        said = " ".join(words_of(text))
        if said and plain.count(said) == 1:
            return _at(plain.index(said)), ""
        letters = {match.upper() for form in _LETTER for match in re.findall(form, text.strip())}
        if not letters:
            named = [i for i, choice in enumerate(plain) if within(choice, said)]
            # "light blue" names "blue", too; the longer option is meant
            longest = [i for i in named if not any(i != j and within(plain[i], plain[j]) for j in named)]
            letters = {_at(i) for i in longest}
        if len(letters) != 1:
            return "", "it names several options" if letters else "it names no option"
        letter = letters.pop()
        if choices and ord(letter) - ord("A") >= len(choices):
            return "", f"there is no option {letter}"
        return letter, ""


def _at(index: int) -> str:
    return chr(ord("A") + index)


_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_COUNTS = {word: number for number, word in enumerate(_SMALL.split())}
_COUNTS |= {
    f"{ten}-{unit}" if unit else ten: 10 * tens + ones
    for tens, ten in enumerate(_TENS.split(), 2)
    for ones, unit in enumerate(["", *_SMALL.split()[1:10]])
}
_COUNTS |= {"hundred": 100, "a hundred": 100, "one hundred": 100}
_NUMBERS = re.compile(
    r"(?<![\w.,])[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\w)|(?<![\w.,])[+-]?\d+(?:\.\d+)?(?!\w)|(?<!\w)(?:"
    + "|".join(word.replace("-", r"[-\s]") for word in sorted(_COUNTS, key=len, reverse=True))
    + r")(?![\w-])",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Count(_Read):
    """How many."""

    name: ClassVar[str] = "count"

    def _read(self, answer: str) -> tuple[str, str]:
        counts = {_count(match) for match in _NUMBERS.findall(answer)}
        if not counts and {"none", "no"} & set(words_of(answer)):
            counts = {0.0}
        if len(counts) != 1:
            return "", "it has several numbers" if counts else "it has no number"
        count = counts.pop()
        return (str(int(count)), "") if count == int(count) else ("", "its number is not whole")


def _count(text: str) -> float:
    word = re.sub(r"\s+", "-", text.lower())
    known = _COUNTS.get(word, _COUNTS.get(word.replace("-", " ")))
    return float(text.replace(",", "")) if known is None else float(known)


SYNONYMS = {
    "grey": "gray", "violet": "purple", "fuchsia": "magenta", "aqua": "cyan", "golden": "gold", "navy blue": "navy",
    "off-white": "white", "off white": "white",
}  # fmt: skip
"""Names of one colour, by the name that it is compared under."""
COLOURS = (
    "black white gray red green blue yellow orange purple pink brown cyan magenta turquoise teal beige tan navy maroon "
    "olive gold silver lime indigo lavender peach salmon coral crimson cream khaki mauve mustard"
)
"""The colours that are known, besides these names."""
SHADES = ("light", "dark", "bright", "deep", "pale")


@dataclass(frozen=True, kw_only=True)
class Colour(_Read):
    """Which colours.

    Attributes:
        shades: "dark blue" is another colour than "blue".
    """

    name: ClassVar[str] = "colour"
    shades: bool = True

    def _read(self, answer: str) -> tuple[str, str]:
        names = "|".join(sorted({*COLOURS.split(), *SYNONYMS}, key=len, reverse=True))
        pattern = rf"(?<!\w)(?:({'|'.join(SHADES)})(?:er)?[-\s]+)?({names})(?!\w)"
        colours = {
            f"{shade} {SYNONYMS.get(name, name)}" if shade and self.shades else SYNONYMS.get(name, name)
            for shade, name in re.findall(pattern, answer.lower())
        }
        return (" and ".join(sorted(colours)), "") if colours else ("", "it names no colour that is known")


@dataclass(frozen=True, kw_only=True)
class Contains(Scorer):
    """Whether the gold answer stands anywhere in the text. Legacy: for comparison with numbers that were made so."""

    name: ClassVar[str] = "contains"
    legacy: ClassVar[bool] = True
    extraction: bool = False

    def _value(self, read: str, gold: str) -> float:
        return float(within(gold, read))
