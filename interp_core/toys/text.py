"""Tasks of `toy:text`, with their ground truth, and its tokenizer.

Three kinds of document, each an `Example` that says which characters are answers and which characters decide the
last one, so that a method can be tested on whether it finds them:

* relation   `Q: big\\nA: small\\n\\nQ: hot\\nA: cold`: which relation holds is only said by the shots
* needle     `VAR V3 84.\\nVAR V7 V3.\\n? V7 84`: key-value retrieval; an alias costs one hop
* induction  ` moon tree dog moon tree dog …`: a random sequence that repeats

Nothing here imports torch.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from ..chat import Chars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "END", "NAMES", "NUMBERS", "Example", "build_tokenizer", "induction_example", "needle_example", "relation_example",
    "relations", "words",
]  # fmt: skip

NAMES = tuple(f"V{i}" for i in range(40))
NUMBERS = tuple(str(i) for i in range(100))
END = "<|endoftext|>"
_TABLES = {  # file: relations that its columns give, from the column `english`
    "adjectives": ("antonym", "comparative", "french", "spanish", "german"),
    "nouns": ("plural", "french", "spanish", "german"),
    "verbs": ("past", "gerund", "french", "spanish", "german"),
    "countries": ("capital", "language", "continent"),
}


@dataclass(frozen=True)
class Example:
    """A document with its answers.

    Attributes:
        text: the whole document, the last answer included.
        answers: character ranges of the answers (each one token, leading space included), in order.
        evidence: named character ranges in the prompt that decide the last answer; see each generator.
    """

    text: str
    answers: tuple[Chars, ...]
    evidence: dict[str, Chars] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text before the last answer."""
        return self.text[: self.answers[-1][0]]

    @property
    def answer(self) -> str:
        """The last answer, with its leading space."""
        return self.text[slice(*self.answers[-1])]


class _Writer:
    """Text that remembers where the pieces written with a name went."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, piece: str) -> Chars:
        start = len(self.text)
        self.text += piece
        return start, len(self.text)


@cache
def relations() -> dict[str, dict[str, str]]:
    """Word relations of the toy: `{"antonym": {"big": "small", ...}, ...}`; `capitalize` is derived."""
    out: dict[str, dict[str, str]] = {}
    for table, columns in _TABLES.items():
        text = resources.files(__package__).joinpath(f"data/{table}.tsv").read_text(encoding="utf-8")
        for row in csv.DictReader(text.splitlines(), delimiter="\t"):
            word = row["english"]
            for column in columns:
                out.setdefault(column, {})[word] = row[column]
            if table != "countries":
                out.setdefault("capitalize", {})[word] = word.capitalize()
    return dict(sorted(out.items()))


@cache
def words() -> tuple[str, ...]:
    """Every word that occurs in a relation, sorted."""
    pairs = [pair for table in relations().values() for pair in table.items()]
    return tuple(sorted({word for pair in pairs for word in pair}))


def relation_example(
    rng: random.Random, relation: str | None = None, shots: int = 8, query: str | None = None
) -> Example:
    """A few-shot document; `evidence` has `query` and `shot_{i}` (the answers of the shots)."""
    tables = relations()
    relation = relation or rng.choice(list(tables))
    table = tables[relation]
    query = query or rng.choice(list(table))
    shown = rng.sample([word for word in table if word != query], shots)
    out = _Writer()
    answers: list[Chars] = []
    evidence: dict[str, Chars] = {}
    for i, word in enumerate([*shown, query]):
        out.write("\n\nQ:" if i else "Q:")
        queried = out.write(f" {word}")
        out.write("\nA:")
        answers.append(out.write(f" {table[word]}"))
        evidence["query" if i == shots else f"shot_{i}"] = queried if i == shots else answers[-1]
    return Example(out.text, tuple(answers), evidence)


def needle_example(rng: random.Random, chains: int = 3, hops: int = 1, questions: int = 1) -> Example:
    """Statements of `chains` values, each with `hops` aliases, then questions about different names.

    Statements stand in random order, a name always after the one it points at. The last question is over `hops` hops,
    those before it over any number. `evidence` has, for the last question, `value` (the number where it is stated),
    `hop_{i}` (the alias names on the way, nearest to the value first) and `query`.
    """
    names = rng.sample(NAMES, chains * (hops + 1))
    values = rng.sample(NUMBERS, chains)
    name = {(i, hop): names[i * (hops + 1) + hop] for i in range(chains) for hop in range(hops + 1)}
    order = [i for i in range(chains) for _ in range(hops + 1)]
    rng.shuffle(order)
    out = _Writer()
    stated: dict[tuple[int, int], Chars] = {}
    for n, i in enumerate(order):
        hop = order[:n].count(i)
        out.write(f"VAR {name[i, hop]}")
        stated[i, hop] = out.write(f" {name[i, hop - 1] if hop else values[i]}")
        out.write(".\n")
    last = (rng.randrange(chains), hops)
    targets = [*rng.sample(sorted(set(name) - {last}), questions - 1), last]
    answers: list[Chars] = []
    for i, hop in targets:
        query = out.write(f"\n? {name[i, hop]}" if answers else f"? {name[i, hop]}")
        answers.append(out.write(f" {values[i]}"))
    i = last[0]
    query = (query[1] - len(name[last]) - 1, query[1])
    evidence = {"value": stated[i, 0], "query": query} | {f"hop_{j}": stated[i, j] for j in range(1, hops + 1)}
    return Example(out.text, tuple(answers), evidence)


def induction_example(
    rng: random.Random, period: int = 8, length: int = 24, pool: Sequence[str] | None = None
) -> Example:
    """A random sequence of `period` different words, repeated up to `length` words.

    `evidence` has `source`: the word that the last answer copies, one period before.
    """
    sequence = rng.sample(list(pool or NUMBERS), period)
    out = _Writer()
    spans = [out.write(f" {sequence[i % period]}") for i in range(length)]
    return Example(out.text, tuple(spans[period:]), {"source": spans[length - 1 - period]})


def build_tokenizer(
    pieces: Sequence[str] | None = None, special: Sequence[str] = (END,), eos: str = END
) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of a toy: `pieces` are one token each, other text falls back to bytes.

    Args:
        pieces: with their leading spaces; None: every word of the tasks of `toy:text`.
        special: tokens that text does not fall into; the first one pads.
        eos: which of them ends a text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    if pieces is None:
        pieces = ["Q:", "A:", "VAR", "?", ".", ".\n", "\n", "\n\n"]
        pieces += [f" {word}" for word in (*NUMBERS, *NAMES, *words())]
    encoded = ["".join(text for text, _ in byte_level.pre_tokenize_str(piece)) for piece in pieces]
    vocab: dict[str, int] = {}
    for token in [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *encoded]:
        vocab.setdefault(token, len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    split = Regex(r" ?\p{L}[\p{L}\p{N}]*:?| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, behavior="isolated"), byte_level])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=special[0], model_max_length=256,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
