"""Domains of `toy:moe`, and its tokenizer: six kinds of document, each with knowledge of its own.

A document is a list of lines of one domain; what stands after ` =` follows from what stands before it. The tokens ` =`
and ` ;` are common to all domains, words to translation and grammar, numbers to arithmetic and chemistry; so which
expert a token needs is said by its context.

* geography    `capital France = Paris`           three facts of each of 48 countries
* translation  `german dog = Hund`                three languages, 151 words
* grammar      `plural dog = dogs`                five forms of the same words
* arithmetic   `7 * 8 = 56`, `17 + 5 = 22`        products up to 9 * 9, sums up to 12 + 12
* brackets     `( [ < = > ] )`                    a row of opening brackets, closed in reverse
* chemistry    `number iron = 26`, `symbol …`     forty elements

Nothing here imports torch.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from . import text as words
from .text import Example, relations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["DOMAINS", "build_tokenizer", "document", "facts", "pieces"]

RELATIONS = {
    "geography": ("capital", "continent", "language"),
    "translation": ("french", "german", "spanish"),
    "grammar": ("antonym", "comparative", "gerund", "past", "plural"),
}
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">", "«": "»", "“": "”"}
DOMAINS = ("geography", "translation", "grammar", "arithmetic", "brackets", "chemistry")


@cache
def facts(domain: str) -> Mapping[str, str]:
    """What a domain knows: `{"capital France =": " Paris", ...}`; brackets have rules instead, and give none."""
    if domain in RELATIONS:
        tables = {name: relations()[name] for name in RELATIONS[domain]}
        return {f"{name} {key} =": f" {value}" for name, table in tables.items() for key, value in table.items()}
    if domain == "arithmetic":
        products = {f"{a} * {b} =": f" {a * b}" for a in range(10) for b in range(10)}
        return products | {f"{a} + {b} =": f" {a + b}" for a in range(13) for b in range(13)}
    if domain == "chemistry":
        text = resources.files(__package__).joinpath("data/elements.tsv").read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
        return {f"{name} {row['english']} =": f" {row[name]}" for name in ("number", "symbol") for row in rows}
    return {}


def _brackets(rng: random.Random) -> tuple[str, list[str]]:
    opened = [rng.choice(list(BRACKETS)) for _ in range(rng.randint(2, 5))]
    return f"{' '.join(opened)} =", [f" {BRACKETS[each]}" for each in reversed(opened)]


def document(rng: random.Random, domain: str, lines: int | None = None) -> Example:
    """A document of one domain.

    Args:
        lines: how many (None: 8, of brackets 5, which makes about 45 tokens).
    """
    known = list(facts(domain).items())
    text, answers = "", []
    for _ in range(lines or (8 if known else 5)):
        if known:
            question, answer = rng.choice(known)
            parts = [answer]
        else:
            question, parts = _brackets(rng)
        text += question
        for part in parts:
            answers.append((len(text), len(text) + len(part)))
            text += part
        text += " ;\n"
    return Example(text, tuple(answers))


@cache
def pieces() -> tuple[str, ...]:
    """What is one token, beside single bytes."""
    lines = [f"{question}{answer}" for domain in DOMAINS for question, answer in facts(domain).items()]
    split = {f" {word}" for line in lines for word in line.split(" ")[1:]} | {line.split(" ")[0] for line in lines}
    marks = [mark for pair in BRACKETS.items() for each in pair for mark in (each, f" {each}")]
    return tuple(dict.fromkeys([" ;\n", " =", *marks, *sorted(split)]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of the toy: every word of its documents is one token, other text falls back to bytes."""
    return words.build_tokenizer(pieces())
