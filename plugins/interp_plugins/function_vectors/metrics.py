"""String metrics of generated answers: F1, exact match and first word, on normalised text.

Normalised: lower case, without punctuation and the articles a, an, the, white space as single spaces.

Source: Rajpurkar et al. (2016), SQuAD, arXiv:1606.05250; an answer is read from a text as in Todd et al. (2024).
"""

from __future__ import annotations

import re
import string
from collections import Counter

PUNCTUATION = frozenset(string.punctuation)


def normalised(text: str) -> str:
    """Text as the metrics compare it."""
    kept = "".join(char for char in text.lower() if char not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def answer_in(text: str) -> str:
    """The answer that a generated text begins with: its first run of letters, digits, spaces and full stops; empty if
    there is none."""
    match = re.search(r"[\w. ]+", text)
    return match[0] if match else ""


def f1(text: str, target: str) -> float:
    """Harmonic mean of the shares of words that one has of the other; 0 without a common word."""
    words, wanted = normalised(text).split(), normalised(target).split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def exact_match(text: str, target: str) -> float:
    """1 if nothing differs after normalising."""
    return float(normalised(text) == normalised(target))


def first_word(text: str, target: str) -> float:
    """1 if the first words are the same, or both have none."""
    return float(normalised(text).split()[:1] == normalised(target).split()[:1])


METRICS = {"f1": f1, "exact_match": exact_match, "first_word": first_word}
"""By name."""
