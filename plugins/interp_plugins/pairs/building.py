"""Pairs from texts or chat transcripts: the tokens of a text that stands in both, found by characters.

    1. each context is tokenized as a whole (through the chat template, if it is a transcript)
    2. the target text is located in each, by its last occurrence
    3. a token counts if all its characters lie inside, and one of them is not blank
    4. a target is a token that covers the same characters of the text in both contexts, by the same id

Every token of the agentic context that touches the target text is a target or is counted under the reason why not.

Source: this package; Geuan666/XAI4Agent aligns tokens by segments that are tokenized apart, and does not compare ids.
Must equal: what both contexts' ids say at the positions, by any tokenizer. Cost: two tokenizations a pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import interp_core as ic
from interp_core import errors, text

from .files import FIRST
from .pair import SIDES, Pair, Side

Context = str | Sequence[Mapping[str, Any]]
"""A text, or a transcript of messages with role and content."""
EDGE, BLANK = "across an end of the target text", "blank"
CUT, OTHER = "cut into other tokens in the assisted context", "another id in the assisted context"
FIELDS = (*SIDES, "target")


def build_pair(source: Any, name: str, agentic: Context, assisted: Context, target: str, **template: Any) -> Pair:
    """The pair of two contexts that share a text.

    Args:
        source: a model or a tokenizer.
        name: of the sample.
        agentic, assisted: the contexts; transcripts go through the chat template.
        target: the text that stands in both. Of several occurrences the last one counts.
        template: passed on to the chat template.

    Raises:
        TextError: no tokenizer, a context without the target, or no token of it that is the same in both.
    """
    tokenizer = source.tokenizer if isinstance(source, ic.Model) else source
    if tokenizer is None:
        raise ic.TextError(f"sample {name!r}: the model has no tokenizer; load it with one, or give a tokenizer")
    if not isinstance(target, str) or not target.strip():
        raise ic.TextError(f"sample {name!r}: {errors.wrong('target', 'a text that is not blank', target)}")
    contexts = {
        side: _tokens(tokenizer, name, side, context, template)
        for side, context in zip(SIDES, (agentic, assisted), strict=True)
    }
    cells = {side: _inside(tokens, _located(tokens, name, side, target)) for side, tokens in contexts.items()}
    here, there = (contexts[side] for side in SIDES)
    kept, dropped = _matched(here, there, cells["agentic"], cells["assisted"], len(target))
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise ic.TextError(
            f"sample {name!r}: no token of the target is the same in both contexts ({why or 'it has no tokens'}); "
            "give a longer target, with the same line break or space before it in both"
        )
    return Pair(name, here, there, tuple(a for a, _ in kept), tuple(b for _, b in kept), dropped, {"target": target})


def build_pairs(source: Any, rows: Iterable[Mapping[str, Any]], bad: Any = None, **template: Any) -> Iterator[Pair]:
    """Pairs of rows with `name`, `agentic`, `assisted` and `target`, as `build_pair` takes them.

    Args:
        source: a model or a tokenizer.
        rows: one per sample; without `name`, samples are numbered.
        bad: called with name and error of every sample of which no pair can be made; without it the first is raised.
        template: passed on to the chat template.

    Raises:
        TextError: a field that is missing, or as `build_pair`, naming the sample.
    """
    for number, row in enumerate(rows):
        name = str(row.get("name", f"sample_{number}"))
        try:
            if missing := [key for key in FIELDS if key not in row]:
                raise ic.TextError(f"sample {name!r} has no {missing[0]}. {errors.nearest(missing[0], map(str, row))}")
            yield build_pair(source, name, *(row[key] for key in FIELDS), **template)
        except ic.TextError as error:
            if bad is None:
                raise
            bad(name, error)


def _tokens(tokenizer: Any, name: str, side: Side, context: Context, template: Mapping[str, Any]) -> ic.Tokens:
    try:
        if isinstance(context, str):
            return text.encode(tokenizer, context)
        return text.encode_chat(tokenizer, context, **{"add_generation_prompt": False, **template})
    except ic.TextError as error:
        raise ic.TextError(f"sample {name!r}, {side}: {error}") from error


def _located(tokens: ic.Tokens, name: str, side: Side, target: str) -> tuple[int, int]:
    """Characters of the target in a context."""
    assert tokens.texts
    start = tokens.texts[0].rfind(target)
    if start < 0:
        raise ic.TextError(
            f"sample {name!r}: the target {target!r:.60} does not stand in {side}; it is looked for letter by letter, "
            "as the chat template shows it"
        )
    return start, start + len(target)


Cell = tuple[int, int, int]
"""Characters of a token, counted from the target's start, and which of the tokens with these characters it is."""


def _inside(tokens: ic.Tokens, chars: tuple[int, int]) -> dict[Cell, int]:
    """Tokens that touch the target, by what they cover; those across an end reach out of it."""
    assert tokens.offsets
    start, stop = chars
    seen: Counter[tuple[int, int]] = Counter()
    cells: dict[Cell, int] = {}
    for position, (a, b) in enumerate(tokens.offsets[0]):
        if a < b and a < stop and start < b:
            # tokens of bytes share the characters of one letter: which of them it is tells them apart
            cells[a - start, b - start, seen[a, b]] = position
            seen[a, b] += 1
    return cells


def _matched(
    here: ic.Tokens, there: ic.Tokens, ours: Mapping[Cell, int], theirs: Mapping[Cell, int], length: int
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Positions of the targets in both contexts, and how many tokens of the first are none, by reason."""
    assert here.texts and here.offsets
    dropped: Counter[str] = Counter()
    kept: list[tuple[int, int]] = []
    for (a, b, copy), position in ours.items():
        first, last = here.offsets[0][position]
        other = theirs.get((a, b, copy))
        if a < 0 or b > length:
            dropped[EDGE] += 1
        elif not here.texts[0][first:last].strip():
            dropped[BLANK] += 1
        elif other is None:
            dropped[CUT] += 1
        elif int(here.ids[0, position]) != int(there.ids[0, other]):
            dropped[OTHER] += 1
        elif position == 0 or other == 0:
            dropped[FIRST] += 1
        else:
            kept.append((position, other))
    return kept, dict(dropped)
