"""Many prompts in batches: which go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from .architectures.atlas import Atlas
from .errors import PlanError, TextError, wrong
from .inputs import some, undivided
from .text import Tokens

T = TypeVar("T")
BATCH = 16
"""Prompts that run together where nobody says how many."""
AHEAD = 16
"""Batches whose prompts are sorted by length together, where prompts come one by one."""


def batch_size_of(value: Any) -> int:
    """How many prompts go together.

    Raises:
        PlanError: not a number from 1 on.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(wrong("batch_size=", "a number of prompts from 1 on", value))
    return value


def bucketed(lengths: Sequence[int], size: int, *, mixed: bool = True) -> list[list[int]]:
    """Numbers of prompts, in batches of prompts of about one length, the longest first: what does not fit into memory
    shows at once.

    Args:
        mixed: lengths may differ within a batch.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    batches: list[list[int]] = []
    for number in order:
        fits = batches and len(batches[-1]) < size
        if fits and (mixed or lengths[batches[-1][0]] == lengths[number]):
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many items at a time."""
    rest = iter(items)
    while window := list(islice(rest, size)):
        yield window


def sides(atlas: Atlas) -> list[str]:
    """On which sides this model can have padding."""
    return [side for side in ("left", "right") if f"{side} padding" not in atlas.lacking]


def laid_out(atlas: Atlas, tokens: Tokens) -> Tokens:
    """A batch with its padding where this model can have it."""
    possible = sides(atlas)
    return padded_on(tokens, possible[0])[0] if possible else tokens


def numbering(tokens: Tokens) -> tuple[Any, ...]:
    """All of tokens that a number may depend on, for folders to tell them apart by."""
    return tokens.ids, tokens.mask, dict(tokens.spans), dict(tokens.inputs)


def one_row(tokens: Tokens, row: int) -> Tokens:
    """A row of a batch without padding; where there is one, as it is, with inputs that could not be split."""
    return tokens if len(tokens) == 1 and not tokens.padded else tokens.row(row)


def some_rows(tokens: Tokens, numbers: Sequence[int]) -> Tokens:
    """Some rows of a batch, laid out as they are in it, without columns that are padding in all of them.

    Raises:
        TextError: a batch with further inputs of which it is not known what is whose.
    """
    if (whole := undivided(tokens)) and list(numbers) != list(range(len(tokens))):
        raise TextError(
            f"prompts with {', '.join(whole)} cannot be split into batches; run them one by one, without batch_size= "
            "and out="
        )
    rows = list(numbers)
    kept = tokens.within[rows].any(0)
    inputs, shares = (tokens.inputs, tokens.shares) if whole or not tokens.inputs else some(tokens, rows, kept)
    return replace(
        tokens,
        ids=tokens.ids[rows][:, kept],
        mask=tokens.mask[rows][:, kept],
        texts=tokens.texts and tuple(tokens.texts[row] for row in rows),
        offsets=tokens.offsets and tuple(tokens.offsets[row] for row in rows),
        spans={name: tuple(spans[row] for row in rows) for name, spans in tokens.spans.items()},
        labels=tuple(tokens.labels[row] for row in rows),
        inputs=inputs,
        shares=shares,
        patches=tokens.patches and tuple(tokens.patches[row] for row in rows),
    )


def padded_on(tokens: Tokens, side: str) -> tuple[Tokens, list[list[int]] | None]:
    """The same rows with all padding on one side, and where each column went to (None: nothing moved). Holes inside a
    row stay between the same tokens. Positions count real tokens, so they mean the same."""
    # A stable sort by "within the row or not" moves the padding, and leaves all other columns in their order.
    order = tokens.within.long().argsort(dim=1, stable=True, descending=side == "right")
    if not tokens.padded or torch.equal(tokens.within.gather(1, order), tokens.within):
        return tokens, None

    def moved(value: Any) -> Any:
        along = isinstance(value, Tensor) and not value.is_floating_point() and value.shape[-2:] == order.shape
        return value.gather(-1, order.to(value.device).expand(value.shape)) if along else value

    inputs = {name: value if name in tokens.shares else moved(value) for name, value in tokens.inputs.items()}
    aligned = replace(tokens, ids=moved(tokens.ids), mask=moved(tokens.mask), inputs=inputs)
    return aligned, order.argsort(dim=1).tolist()
