"""Texts from which units are deleted: by characters, and tokenized again, or by tokens, whose ids go.

A shorter text ends with the last position that predicts the answer. Where that position itself is taken away, the last
kept one before it predicts; a text of which nothing is left is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import interp_core as ic

from ..layout import Layout, stretches
from .units import Unit


class Shortened(NamedTuple):
    """A text without some of its units, up to the last position that predicts.

    Attributes:
        ids: its tokens.
        position_ids: those that they had in the whole text; empty where they are counted anew.
        predictors: the positions that predict the answer.
    """

    ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    predictors: tuple[int, ...]

    @property
    def width(self) -> int:
        """Number of tokens."""
        return len(self.ids)


def shortened(
    owner: str, model: ic.Model, layout: Layout, units: Sequence[Unit], removals: Sequence[Sequence[int]],
    gone: Sequence[Sequence[int]], convention: str,
) -> list[Shortened]:  # fmt: skip
    """One text per variant.

    Raises:
        PositionError: nothing is left before the answer.
        TextError: a text that cannot be tokenised again as it was.
    """
    if convention == "delete_text":
        return _by_characters(owner, model, layout, units, removals)
    ids, width = layout.tokens.ids[0].tolist(), max(layout.predictors) + 1
    texts = []
    for places in gone:
        removed = set(places)
        kept = [p for p in range(width) if p not in removed]
        index = {p: n for n, p in enumerate(kept)}
        before = [index[p] for p in predictors(owner, layout.predictors, places)]
        position_ids = tuple(kept) if convention == "delete_keep_positions" else ()
        texts.append(Shortened(tuple(ids[p] for p in kept), position_ids, tuple(before)))
    return texts


def predictors(owner: str, positions: Sequence[int], gone: Sequence[int]) -> tuple[int, ...]:
    """The last kept positions at or before those that predict.

    Raises:
        PositionError: none is kept.
    """
    removed = set(gone)
    kept = tuple(next((q for q in range(p, -1, -1) if q not in removed), -1) for p in positions)
    if min(kept) < 0:
        raise _nothing_left(owner)
    return kept


def _by_characters(
    owner: str, model: ic.Model, layout: Layout, units: Sequence[Unit], removals: Sequence[Sequence[int]]
) -> list[Shortened]:
    text, tokenise = _retokeniser(owner, model, layout)
    width = max(layout.predictors) + 1
    start = layout.target.start if len(layout.target) else width
    tail = tuple(layout.tokens.ids[0, start:width].tolist())
    texts = []
    for removed in removals:
        left = _without(layout, text, units, set(removed))
        if not left:
            raise _nothing_left(owner)
        ids = (*tokenise(left), *tail)
        shift = len(ids) - width
        texts.append(Shortened(ids, (), tuple(p + shift for p in layout.predictors)))
    return texts


def _nothing_left(owner: str) -> ic.PositionError:
    return ic.PositionError(
        f"{owner}: a variant takes away every token before the answer, and nothing is left to predict it from: keep "
        "some out of it (a chat template, a span by within=), or take convention 'replace'"
    )


def _without(layout: Layout, text: str, units: Sequence[Unit], removed: set[int]) -> str:
    """A text without some units and the white space before them, and without that before the first which is kept in a
    stretch of the prompt."""
    stretch = {p: n for n, run in enumerate(stretches(layout.prompt)) for p in run}
    order = sorted(range(len(units)), key=lambda n: units[n].chars or (0, 0))
    cut: list[tuple[int, int]] = []
    last: tuple[int, int] | None = None  # stretch and end of the unit before
    none_kept = True
    for number in order:
        chars = units[number].chars
        assert chars is not None
        place = stretch[units[number].positions[0]]
        follows = last is not None and last[0] == place
        none_kept = none_kept if follows else True
        between = (last[1], chars[0]) if follows and last is not None else (chars[0], chars[0])
        blank = between[0] < between[1] and not text[slice(*between)].strip()
        if number in removed:
            cut.append((between[0] if blank else chars[0], chars[1]))
        else:
            if blank and none_kept and follows:
                cut.append(between)
            none_kept = False
        last = place, chars[1]
    keep = [True] * len(text)
    for a, b in cut:
        keep[a:b] = [False] * (b - a)
    return "".join(char for char, kept in zip(text, keep, strict=True) if kept)


def _retokeniser(owner: str, model: ic.Model, layout: Layout) -> tuple[str, Callable[[str], tuple[int, ...]]]:
    """The text before the target, and a function that gives ids of such a text as they were made.

    Raises:
        TextError: no text, or one whose ids are others.
    """
    tokens = layout.tokens
    if tokens.texts is None or tokens.offsets is None:
        raise ic.TextError(f"{owner}: delete_text needs the tokens' text; use model.tokens(text), or delete_tokens")
    whole, offsets, start = tokens.texts[0], tokens.offsets[0], layout.target.start
    ends = [len(whole)]
    if len(layout.target):
        ends = [max((b for _, b in offsets[:start]), default=0), offsets[start][0]]
    original_ids = tuple(tokens.ids[0, : start if len(layout.target) else layout.length].tolist())
    for end in dict.fromkeys(ends):
        # a chat template already has the token for the beginning, which a tokenizer would put there once more
        for bos in (None, False):

            def tokenise(text: str, bos: bool | None = bos) -> tuple[int, ...]:
                return tuple(model.tokens(text, bos=bos).ids[0].tolist())

            if end and tokenise(whole[:end]) == original_ids:
                return whole[:end], tokenise
    raise ic.TextError(
        f"{owner}: the text before the target does not tokenise to the tokens that are there; use delete_tokens"
    )
