"""Into what a prompt is taken apart for ablations: tokens, words, sentences, spans, blocks of an image.

Words and sentences are found in the text, so that they have characters; a token belongs to the one in which its last
visible character lies, and white space to the one that follows, with which it goes. Special tokens, a chat template and
the target stay as they are: only the user's prompt is taken apart.

Sentences end at a line's end, or at `.`, `!`, `?` (quotes and brackets behind included) before white space and anything
but a small letter; initials and a few abbreviations end none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import interp_core as ic

from ..layout import Layout, stretches

Kind = Literal["token", "word", "sentence", "span", "visual"]
Chars = tuple[int, int]
_WORD = re.compile(r"\S+")
_LINE = re.compile(r"[^\n]+")
_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s+[^\sa-z])")
_SHORT = re.compile(r"(?:\b[A-Z]|\b(?:Dr|Mr|Mrs|Ms|Prof|St|Fig|Eq|No|vs|e\.g|i\.e|cf|al))\.$")
CELLS = 4
"""Rows and columns of blocks that an image is taken apart into."""


class Unit(NamedTuple):
    """What an ablation takes away as one.

    Attributes:
        name: to show.
        positions: its tokens in the row, ascending.
        chars: its characters in the row's text, where it has some.
        cell: image, tile, row and column of a block of an image.
    """

    name: str
    positions: tuple[int, ...]
    chars: Chars | None = None
    cell: tuple[int, int, int, int] | None = None


def units_of(
    owner: str, model: ic.Model, layout: Layout, kind: Kind, spans: Sequence[str | Chars] = (), within: str = ""
) -> list[Unit]:
    """A prompt's units, in the order of the text.

    Args:
        owner: whose they are, for messages.
        spans: names of spans, or ranges of characters of the row's text, for kind "span".
        within: a named span; units outside of it are left out.

    Raises:
        PositionError: nothing to take apart, or a span that is no part of the prompt.
        TextError: words or sentences of tokens that carry no text.
        PlanError: spans without the kind, or the kind without spans.
    """
    if bool(spans) != (kind == "span"):
        raise ic.PlanError(f"{owner}: spans= and units='span' go together; give both, or neither")
    if kind == "visual":
        units = _visual(owner, model, layout)
    elif kind == "span":
        units = [_span(owner, layout, span) for span in spans]
    else:
        units = _text_units(owner, layout, kind)
    if within:
        kept = set(_named(owner, layout, within).positions)
        units = [unit for unit in units if kept.issuperset(unit.positions)]
    if not units:
        raise ic.PositionError(f"{owner}: the prompt has no {kind} to take away")
    return units


def sentences(text: str) -> list[Chars]:
    """Sentences of a text as half-open ranges of characters, white space around them left out."""
    spans = []
    for line in _LINE.finditer(text):
        start = line.start()
        for end in _END.finditer(text, line.start(), line.end()):
            if not _SHORT.search(text, start, end.end()):
                spans.append((start, end.end()))
                start = end.end()
        spans.append((start, line.end()))
    return [trimmed for span in spans if (trimmed := _trimmed(text, span))[0] < trimmed[1]]


def words(text: str) -> list[Chars]:
    """Words of a text: what stands between white space."""
    return [match.span() for match in _WORD.finditer(text)]


def _text_units(owner: str, layout: Layout, kind: Kind) -> list[Unit]:
    tokens = layout.tokens
    offsets = tokens.offsets[0] if tokens.offsets else None
    unseen = {p for span in tokens.spans.get("vision", ((),))[0] for p in span}
    places = [p for p in layout.prompt if p not in unseen and (offsets is None or offsets[p][0] < offsets[p][1])]
    if kind == "token":
        return [Unit(tokens.labels[0][p], (p,), offsets[p] if offsets else None) for p in places]
    if offsets is None or tokens.texts is None:
        raise ic.TextError(f"{owner}: {kind}s are found in a text, and these tokens carry none; use model.tokens(text)")
    text, units = tokens.texts[0], []
    for run in stretches(places):
        first, last = offsets[run.start][0], offsets[run.stop - 1][1]
        ranges = (sentences if kind == "sentence" else words)(text[first:last])
        units += _owned(text, [(first + a, first + b) for a, b in ranges], run, offsets)
    return units


def _owned(text: str, ranges: Sequence[Chars], run: ic.Span, offsets: Sequence[Chars]) -> list[Unit]:
    """Units of ranges of characters with the tokens of a run that belong to them; those without a token left out."""
    owned: list[list[int]] = [[] for _ in ranges]
    for position in run:
        a, b = offsets[position]
        # its last letter decides: a token often begins with the space before its word
        seen = len(text[a:b].rstrip())
        last = a + seen - 1 if seen else a
        number = next((n for n, (_, stop) in enumerate(ranges) if last < stop), None)
        if number is not None:
            owned[number].append(position)
    return [
        Unit(text[a:b], tuple(places), (a, b)) for (a, b), places in zip(ranges, owned, strict=True) if places
    ]  # fmt: skip


def _span(owner: str, layout: Layout, span: str | Chars) -> Unit:
    if isinstance(span, str):
        return _named(owner, layout, span)
    start, stop = span
    places = tuple(layout.tokens.find((start, stop)))
    return _inside(owner, layout, Unit((layout.tokens.texts or ("",))[0][start:stop], places, (start, stop)))


def _named(owner: str, layout: Layout, name: str) -> Unit:
    tokens = layout.tokens
    if name not in tokens.spans:
        raise ic.PositionError(f"{owner}: the text has no span {name!r}. {ic.errors.nearest(name, list(tokens.spans))}")
    pieces = tokens.spans[name][0]
    chars = tokens.chars(pieces[0]) if len(pieces) == 1 and tokens.texts and tokens.offsets else None
    return _inside(owner, layout, Unit(name, tuple(sorted({p for piece in pieces for p in piece})), chars))


def _inside(owner: str, layout: Layout, unit: Unit) -> Unit:
    outside = sorted({*unit.positions} - {*layout.prompt})
    if outside:
        raise ic.PositionError(
            f"{owner}: {unit.name!r:.40} has token {outside[0]}, which is none of the user's prompt: template and "
            "target are never taken away"
        )
    return unit


def _visual(owner: str, model: ic.Model, layout: Layout) -> list[Unit]:
    if not any(layout.tokens.spans.get("vision", ((),))[0]):
        raise ic.PositionError(f"{owner}: these tokens have no image to take apart")
    grid = model.visual_grid(layout.tokens)[0]
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for token in grid:
        rows, cols = sizes.get((token.image, token.tile), (0, 0))
        sizes[token.image, token.tile] = max(rows, token.row + 1), max(cols, (token.col or 0) + 1)
    cells: dict[tuple[int, int, int, int], list[int]] = {}
    for token in grid:
        rows, cols = sizes[token.image, token.tile]
        # a token that only ends a row of the grid goes with the row's last block
        col = cols - 1 if token.col is None else token.col
        cell = token.image, token.tile, token.row * CELLS // rows, col * CELLS // cols
        cells.setdefault(cell, []).append(token.position)
    return [
        Unit(f"image {cell[0]}.{cell[1]}, block {cell[2]},{cell[3]}", tuple(sorted(places)), None, cell)
        for cell, places in sorted(cells.items())
    ]


def _trimmed(text: str, span: Chars) -> Chars:
    part = text[slice(*span)]
    return span[0] + len(part) - len(part.lstrip()), span[1] - len(part) + len(part.rstrip())
