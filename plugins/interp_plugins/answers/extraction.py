r"""The answer within what a model wrote.

    1  thinking   what stands before the last `</think>` goes; a block that is opened and never closed leaves nothing
    2  marker     of "Final answer:" and `\boxed{…}`, what follows (or is in) the one that comes last
    3  line       the first line that is not empty, without white space and emphasis (`**…**`) around it
    4  words      with `max_words`, so many first words of it

A text is unparsable where nothing is left: an empty text, a thinking block that never ends, a box that is not closed,
a marker with nothing after it. It says which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import interp_core as ic

from ..attribution.data.examples import boxes

_THINKING = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)
_FINAL = re.compile(r"final\s+answer\s*(?:\*\*|__)?\s*:", re.IGNORECASE)
_BOX = re.compile(r"\\box(?:ed)?\s*\{")
_SAID = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
_EMPHASIS = re.compile(r"(\*\*|__|`)(.+)\1")


@dataclass(frozen=True)
class Extraction:
    """An answer, and where it was found.

    Attributes:
        answer: the text that is scored; empty where there is none.
        found: "final answer", "box" or "first line".
        problem: why there is no answer; empty if there is one.
        cut: words were left off for `max_words`.
    """

    answer: str
    found: str
    problem: str = ""
    cut: bool = False


def extract(text: str, max_words: int | None = None) -> Extraction:
    """The answer in a text.

    Args:
        text: what a model wrote.
        max_words: how many words of it count; None: all.

    Raises:
        PlanError: something else than a text, or a number of words that is none.
    """
    if not isinstance(text, str):
        raise ic.PlanError(ic.errors.wrong("extract", "a text", text))
    if max_words is not None and (isinstance(max_words, bool) or not isinstance(max_words, int) or max_words < 1):
        raise ic.PlanError(ic.errors.wrong("max_words", "a whole number from 1 on, or None for all words", max_words))
    said, problem = _after_thinking(text)
    if problem:
        return Extraction("", "first line", problem)
    content, origin, problem = _marked(said)
    line = next((line.strip() for line in content.splitlines() if line.strip()), "")
    line = line.strip("*").strip() if origin == "final answer" else line
    line = match[2].strip() if (match := _EMPHASIS.fullmatch(line)) else line
    if problem or not line:
        return Extraction(
            "", origin, problem or ("the text is empty" if origin == "first line" else f"the {origin} is empty")
        )
    words = line.split()
    if max_words is not None and len(words) > max_words:
        return Extraction(" ".join(words[:max_words]), origin, cut=True)
    return Extraction(line, origin)


def _after_thinking(text: str) -> tuple[str, str]:
    """A text without its thinking, and what is wrong with it; a block may have been opened by the chat template."""
    tags = list(_THINKING.finditer(text))
    if tags and not tags[-1].group().startswith("</"):
        return "", "the thinking never ends"
    return (text[tags[-1].end() :] if tags else text), ""


def _marked(text: str) -> tuple[str, str, str]:
    """What the last marker marks, which one it is, and what is wrong with it."""
    finals, opened = list(_FINAL.finditer(text)), list(_BOX.finditer(text))
    after = finals[-1].end() if finals else -1
    if opened and opened[-1].start() >= after:
        closed = {start: inner for start, _, inner in boxes(text)}
        if opened[-1].start() not in closed:
            return "", "box", "the box is never closed"
        return _plain(closed[opened[-1].start()]), "box", ""
    return (text[after:], "final answer", "") if finals else (text, "first line", "")


def _plain(content: str) -> str:
    r"""What is in a box without the TeX around it: `\text{…}`, `\%`, `\$`."""
    return re.sub(r"\\([%$#&_])", r"\1", _SAID.sub(r"\1", content))
