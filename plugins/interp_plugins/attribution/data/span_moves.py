"""Spans of cached examples moved from one tokenizer to another: tokens → characters of the target → tokens.

    chars    from the first to the last character that the old tokenizer's tokens of the span cover
    sink     the new tokenizer's tokens that share a character with them
    thinking what comes before the sink

Source: `exp/exp5/map_exp2_cache_token_spans.py` of FlashTrace at 075e7e4. Must equal: its files, byte for byte, and its
reasons. A span moved there and back covers the one that it was. (Published too, and left out as it cannot happen: a new
span that lies beyond the target with its end token.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import interp_core as ic
from interp_core import text

from .examples import Example, closed, overlapping, with_spans

REASONS = {
    "missing_target": "it has no target",
    "missing_old_span": "it has neither indices_to_explain nor sink_span as [first, last]",
    "old_span_to_char_failed": "its span lies outside the target, or covers no character of it",
    "char_to_new_span_failed": "the new tokenizer has no token there",
    "fallback_answer_failed": "its answer is not a text of the target either",
}
"""Why an example is dropped, and what that means."""
METHOD = "exp5_span_map_method"
"""Where metadata says how the span was found."""


def moved(
    row: Mapping[str, Any], old: Any, new: Any, *, allow_fallback_answer: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """A row of a cache with spans of another tokenizer, or None and why (one of `REASONS`).

    Args:
        old, new: the tokenizer that the spans were made with, and the one that they are to be of.
        allow_fallback_answer: where the span cannot be moved, take the tokens of the answer that metadata has.
    """
    target = row.get("target")
    if not isinstance(target, str) or not target:
        return None, "missing_target"
    spans: list[Any] = [row.get(name) for name in ("indices_to_explain", "sink_span")]
    span = next((ic.Span(closed[0], closed[1] + 1) for closed in spans if _is_closed(closed)), None)
    if span is None:
        return None, "missing_old_span"
    before, after = (text.encode(tokenizer, target, bos=False) for tokenizer in (old, new))
    chars = _covered(before, span)
    there = overlapping(after, chars) if chars is not None else None
    if there is not None:
        return _with(row, there, after, "token_span_char_align"), ""
    if not allow_fallback_answer:
        return None, "old_span_to_char_failed" if chars is None else "char_to_new_span_failed"
    marked = with_spans(Example("-", target), new, _answer(row, target))
    if marked is None or marked.sink_span is None:
        return None, "fallback_answer_failed"
    # where the span was known, the published code notes the answer's as if it were that one
    return _with(row, marked.sink_span, after, "answer_text" if chars is None else "token_span_char_align"), ""


def _is_closed(span: Any) -> bool:
    numbers = isinstance(span, list) and len(span) == 2 and all(isinstance(i, int) for i in span)
    return numbers and 0 <= span[0] <= span[1]


def _covered(tokens: ic.Tokens, span: ic.Span) -> tuple[int, int] | None:
    """The characters from the first to the last of a span of tokens."""
    assert tokens.offsets is not None
    offsets = tokens.offsets[0]
    covered = [chars for chars in offsets[span.start : span.stop] if chars[0] < chars[1]]
    if span.stop > len(offsets) or not covered:
        return None
    return min(a for a, _ in covered), max(b for _, b in covered)


def _answer(row: Mapping[str, Any], target: str) -> str:
    """The answer's text: what was in the box, else the reference answer, else the last line."""
    metadata = row.get("metadata")
    known = metadata if isinstance(metadata, Mapping) else {}
    named = [str(known.get(name) or "").strip() for name in ("boxed_answer", "reference_answer")]
    return next(
        (answer for answer in named if answer), target.strip().splitlines()[-1].strip() if target.strip() else ""
    )


def _with(row: Mapping[str, Any], sink: ic.Span, target: ic.Tokens, method: str) -> dict[str, Any]:
    metadata = row.get("metadata")
    noted = dict(metadata) if isinstance(metadata, Mapping) else {}
    if "target_tokens" in noted:
        noted["target_tokens"] = len(target.labels[0])
    thinking = [0, sink.start - 1] if sink.start else None
    spans = {"indices_to_explain": closed(sink), "sink_span": closed(sink), "thinking_span": thinking}
    return {**row, **spans, "metadata": noted | {METHOD: method}}
