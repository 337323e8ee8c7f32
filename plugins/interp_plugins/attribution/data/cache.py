"""Files of examples: read whole, or so many of them drawn as the published loader draws them.

What an example is, and how it becomes tokens, is in `examples` and `tokens`, whose names are handed on here.

Source: the loader of FlashTrace at 075e7e4. Must equal: its draws.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import interp_core as ic
from interp_core import runs

from ..._json_files import Bad, json_rows
from .examples import FIELDS, Example, boxed, boxes, closed, example_of, migrated, sha1, with_spans
from .tokens import Profile, example_tokens

__all__ = [
    "FIELDS", "Example", "Profile", "boxed", "boxes", "cache_text", "closed", "example_of", "example_tokens",
    "json_rows", "load_examples", "migrated", "read_examples", "sha1", "with_spans",
]  # fmt: skip


def read_examples(path: str | Path, bad: Bad | None = None) -> list[Example]:
    """All examples of a file.

    Args:
        bad: called with the line and error of every row that cannot be used, which is left out; without it the first
            one is raised.

    Raises:
        LoadError: a file that cannot be read, that holds no example, or whose rows have a field of the wrong form,
            with line and field.
    """
    examples, dropped = [], 0

    def left_out(number: int, error: ic.InterpError) -> None:
        nonlocal dropped
        dropped += 1
        if bad is None:
            raise error
        bad(number, error)

    for number, row in json_rows(path, left_out):
        try:
            examples.append(example_of(row, f"{path}, line {number}"))
        except ic.LoadError as error:
            left_out(number, error)
    if not examples and not dropped:
        raise ic.LoadError(f"{path} holds no example; give a file with a JSON object per line")
    return examples


def load_examples(
    path: str | Path,
    num_examples: int | None = None,
    *,
    sample: int | None = None,
    seed: int = 42,
    bad: Bad | None = None,
) -> list[Example]:
    """Examples of a file, in its order; with `sample` fewer than there are, that many of them, shuffled.

    Args:
        num_examples: at most so many of these.
        sample: so many by `random.Random(seed).shuffle`, as the published loader draws them.
        bad: as in `read_examples`.

    Raises:
        LoadError: as `read_examples`.
        PlanError: a number of examples that is not positive.
    """
    for name, number in (("num_examples", num_examples), ("sample", sample)):
        if number is not None and number < 1:
            raise ic.PlanError(f"{name} is {number}: give at least 1, or leave it out for all")
    examples = read_examples(path, bad)
    if sample is not None and sample < len(examples):
        random.Random(seed).shuffle(examples)
        examples = examples[:sample]
    return examples[:num_examples]


def cache_text(examples: Iterable[Example]) -> str:
    """The file of examples."""
    return runs.json_lines(example.row() for example in examples)
