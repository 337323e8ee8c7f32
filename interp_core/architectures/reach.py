"""How far the queries of a layer look.

A query sees the real keys up to its own column; in a layer with a sliding window w only the last w of them, itself
included; in one with chunks of c those of its own chunk, counted from the row's first real token; in an encoder all, or
those that are nearer than w on either side. In some families the tokens of an image also see the later ones of the same
image (Gemma 3).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn


class Reach(NamedTuple):
    """How far one layer's queries look: back only, in a sliding window, in chunks, to the end of their image."""

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    images: bool = False

    @staticmethod
    def of(attention: nn.Module, config: Any, layer: int, *, images: bool = False) -> Reach:
        """What an attention module says of itself, or the model's text config of this layer.

        Args:
            images: the family's images see themselves whole.
        """
        kinds = getattr(config, "layer_types", None)
        kind = kinds[layer] if kinds else ""
        window = getattr(attention, "sliding_window", None)
        if window is None and (
            kind == "sliding_attention" or (not kinds and getattr(config, "use_sliding_window", True))
        ):
            window = getattr(config, "sliding_window", None)
        if getattr(attention, "attention_type", None) == "local":  # GPT-Neo
            window = config.window_size
        chunk = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None
        return Reach(bool(getattr(attention, "is_causal", True)), window or None, chunk, images)

    def visible(self, real: Sequence[int], query: int, last: int | None = None) -> range:
        """Which of a row's real columns a query at such a column sees, as places in `real`.

        Args:
            last: the last column of the query's image, if it is of one.
        """
        if not self.causal:
            far = len(real) + real[-1] if self.window is None else self.window
            return range(bisect_left(real, query - far + 1), bisect_right(real, query + far - 1))
        first = real[0]
        if self.window is not None:
            first = max(first, query - self.window + 1)
        if self.chunk is not None:
            first = max(first, real[0] + (query - real[0]) // self.chunk * self.chunk)
        return range(bisect_left(real, first), bisect_right(real, query if last is None else last))

    def __str__(self) -> str:
        if self.window is not None:
            return f", where a query sees {self.window} tokens{'' if self.causal else ' on either side'}"
        return "" if self.chunk is None else f", where a query sees its chunk of {self.chunk} tokens"
