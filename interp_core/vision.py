"""Where the visual tokens are.

Processors put one placeholder id per visual token into the text, so the ids themselves say where: the positions named
`"vision"` are those of the config's image and video token ids, `"text"` all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .positions import Span
from .text import Tokens


def placeholder_ids(config: Any) -> set[int]:
    """Token ids that stand for visual tokens; empty for text models."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    return {value for name in names if isinstance(value := getattr(config, name, None), int)}


def with_visual_names(tokens: Tokens, config: Any) -> Tokens:
    """The tokens with the positions `vision` and `text`, if there are visual ones."""
    placeholders = placeholder_ids(config)
    visual = [
        [i in placeholders for i in row[keep].tolist()] for row, keep in zip(tokens.ids, tokens.mask, strict=True)
    ]
    if not any(any(row) for row in visual):
        return tokens
    spans = {
        name: tuple(tuple(_runs(i for i, seen in enumerate(row) if seen == wanted)) for row in visual)
        for name, wanted in (("vision", True), ("text", False))
    }
    return replace(tokens, spans={**tokens.spans, **spans})


def _runs(places: Iterable[int]) -> list[Span]:
    """Increasing integers as spans."""
    runs: list[Span] = []
    for i in places:
        if runs and runs[-1].stop == i:
            runs[-1] = Span(runs[-1].start, i + 1)
        else:
            runs.append(Span(i, i + 1))
    return runs
