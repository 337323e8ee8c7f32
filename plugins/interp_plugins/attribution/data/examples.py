"""Examples: prompts with the target that a model wrote and the spans of it that are explained.

    {"prompt": …, "target": …, "indices_to_explain": [35, 47], "attr_mask_indices": null, "sink_span": [35, 47],
     "thinking_span": [0, 34], "metadata": {"needle_spans": [{"span": [124, 184], "snippet": …}], …}}

Source: the caches of FlashTrace at 075e7e4 (`exp/exp2/data/<name>.jsonl`). Spans count the target's tokens, as a
tokenizer gives them for the target alone, and are closed intervals in the file; here they are half-open. Needle spans
are half-open characters of the prompt. Must equal: a row that is read and written is the same, byte for byte.

Spans mean something only with the tokenizer that they were made with: `interp run remap_spans` moves them to another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import interp_core as ic
from interp_core import errors, text

FIELDS = (
    "prompt", "target", "indices_to_explain", "attr_mask_indices", "sink_span", "thinking_span", "metadata",
)  # fmt: skip
"""Of a row, in the order in which they are written."""
Chars = tuple[int, int]
"""Half-open character range."""
_BOX = re.compile(r"\\box(?:ed)?\s*(?=[{｛])")


@dataclass(frozen=True)
class Example:
    """A prompt, what was answered, and which part of the answer is explained.

    Attributes:
        prompt: the user's text.
        target: the answer, or None where there is none yet.
        indices_to_explain: tokens of the target that are explained.
        sink_span: tokens of the target that the explanation starts at (mostly the same).
        thinking_span: tokens of the target that are reasoning; before the sink.
        sentences: indices of sentences, which caches of an older form have in place of `indices_to_explain`.
        attr_mask_indices: sentences of the prompt that matter, of that older form.
        metadata: plain data.
        where: file and line, for messages.
        keys: the row's keys in the order in which the file has them.
        more: the row's further fields.
    """

    prompt: str
    target: str | None = None
    indices_to_explain: ic.Span | None = None
    sink_span: ic.Span | None = None
    thinking_span: ic.Span | None = None
    sentences: tuple[int, ...] | None = None
    attr_mask_indices: tuple[int, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="the example", compare=False)
    keys: tuple[str, ...] = field(default=FIELDS, compare=False)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_sha1(self) -> str:
        """By which traces know the example."""
        return sha1(self.prompt)

    @property
    def target_sha1(self) -> str:
        """By which traces know the target; that of nothing where there is none."""
        return sha1(self.target or "")

    @property
    def needles(self) -> tuple[Chars, ...]:
        """Characters of the prompt that the answer is in."""
        return tuple((needle["span"][0], needle["span"][1]) for needle in self.metadata.get("needle_spans") or ())

    @property
    def answer(self) -> str:
        """The text that the sink is to be found by: what was in the box, or else a box that the target still has."""
        return str(self.metadata.get("boxed_answer") or "").strip() or boxed(self.target or "") or ""

    def row(self) -> dict[str, Any]:
        """As the file has it."""
        explained = list(self.sentences) if self.sentences is not None else closed(self.indices_to_explain)
        masks = None if self.attr_mask_indices is None else list(self.attr_mask_indices)
        values = {
            "prompt": self.prompt, "target": self.target, "indices_to_explain": explained, "attr_mask_indices": masks,
            "sink_span": closed(self.sink_span), "thinking_span": closed(self.thinking_span), "metadata": self.metadata,
        } | dict(self.more)  # fmt: skip
        added = [key for key, value in values.items() if key not in self.keys and value not in (None, {})]
        return {key: values[key] for key in (*self.keys, *added)}


def sha1(content: str) -> str:
    """Digest of a text, by which manifests of traces name it."""
    return hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()


def closed(span: ic.Span | None) -> list[int] | None:
    """A span as files have it: first and last token."""
    return None if span is None else [span.start, span.stop - 1]


# Rows


def example_of(row: Mapping[str, Any], where: str = "the example") -> Example:
    """An example of a row, with everything looked at that can be without a tokenizer.

    Raises:
        LoadError: a field of the wrong form, or spans that contradict each other, naming field and fix.
    """
    prompt, target, metadata = row.get("prompt"), row.get("target"), row.get("metadata", {})
    if not isinstance(prompt, str) or not prompt:
        raise ic.LoadError(f"{where}: {errors.wrong('prompt', 'the text of the prompt', prompt)}")
    if target is not None and (not isinstance(target, str) or not target):
        raise ic.LoadError(f"{where}: {errors.wrong('target', 'the text of the answer, or null', target)}")
    if not isinstance(metadata, Mapping):
        raise ic.LoadError(f"{where}: {errors.wrong('metadata', 'a JSON object', metadata)}")
    explained, masks = row.get("indices_to_explain"), _numbers(row, "attr_mask_indices", where)
    legacy = isinstance(explained, list) and (len(explained) != 2 or any(_is_index(i) and i < 0 for i in explained))
    example = Example(
        prompt, target, None if legacy else _span(row, "indices_to_explain", where), _span(row, "sink_span", where),
        _span(row, "thinking_span", where), _numbers(row, "indices_to_explain", where) if legacy else None, masks,
        metadata, where, tuple(row), {key: value for key, value in row.items() if key not in FIELDS},
    )  # fmt: skip
    _check_order(example)
    _check_needles(example)
    return example


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _numbers(row: Mapping[str, Any], name: str, where: str) -> tuple[int, ...] | None:
    value = row.get(name)
    if value is not None and not (isinstance(value, list) and all(map(_is_index, value))):
        raise ic.LoadError(f"{where}: {errors.wrong(name, 'a list of integers, or null', value)}")
    return None if value is None else tuple(value)


def _span(row: Mapping[str, Any], name: str, where: str) -> ic.Span | None:
    """A closed interval as a half-open span."""
    numbers = _numbers(row, name, where)
    if numbers is None:
        return None
    if len(numbers) != 2 or numbers[0] < 0:
        takes = "[first, last], two token numbers from 0 (both belong to it), or null"
        raise ic.LoadError(f"{where}: {errors.wrong(name, takes, list(numbers))}")
    if numbers[1] < numbers[0]:
        raise ic.LoadError(
            f"{where}: {name} is {list(numbers)}, which is empty: the last token is before the first. Give [first, "
            "last], both of which belong to it, or null"
        )
    return ic.Span(numbers[0], numbers[1] + 1)


def _check_order(example: Example) -> None:
    sink, thinking = example.sink_span or example.indices_to_explain, example.thinking_span
    if example.target is None and (sink or thinking):
        raise ic.LoadError(
            f"{example.where} has spans of a target, but no target; give the target, or null for the spans"
        )
    if sink and thinking and thinking.stop > sink.start:
        fix = closed(ic.Span(0, sink.start)) if sink.start else None
        raise ic.LoadError(
            f"{example.where}: thinking_span {closed(thinking)} reaches into the sink {closed(sink)}; reasoning ends "
            f"before it: give {json.dumps(fix)}"
        )


def _check_needles(example: Example) -> None:
    needles = example.metadata.get("needle_spans")
    if needles is None:
        return
    if not isinstance(needles, list):
        takes = 'a list of {"span": [start, stop]}'
        raise ic.LoadError(f"{example.where}: {errors.wrong('metadata.needle_spans', takes, needles)}")
    for i, needle in enumerate(needles):
        what = f"{example.where}: metadata.needle_spans[{i}]"
        span = needle.get("span") if isinstance(needle, Mapping) else None
        if not (isinstance(span, list) and len(span) == 2 and all(map(_is_index, span))):
            raise ic.LoadError(errors.wrong(what, '{"span": [start, stop]} in characters of the prompt', needle))
        if not 0 <= span[0] < span[1] <= len(example.prompt):
            raise ic.LoadError(
                f"{what} is characters {span[0]}:{span[1]}, the prompt has {len(example.prompt)}; give 0 ≤ start < "
                f"stop ≤ {len(example.prompt)}, without a space put in front of the prompt"
            )
        snippet, there = needle.get("snippet"), example.prompt[slice(*span)]
        if isinstance(snippet, str) and snippet.strip() != there.strip():
            at = example.prompt.find(snippet.strip())
            fix = f"it stands at {at}:{at + len(snippet.strip())}" if at >= 0 else "it stands nowhere in the prompt"
            raise ic.LoadError(f"{what}: characters {span[0]}:{span[1]} are {there!r:.60}, not {snippet!r:.60}; {fix}")


# Answers


def boxes(content: str) -> list[tuple[int, int, str]]:
    r"""Every `\box{…}` or `\boxed{…}` of a text with balanced braces: start, stop, and what is in it, without white
    space around. (The published code ends a box at its first closing brace, within `\frac{1}{2}` too.)"""
    out = []
    for match in _BOX.finditer(content):
        depth, start = 0, match.end()
        for i, char in enumerate(content[start:], start):
            depth += (char in "{｛") - (char in "}｝")
            if not depth:
                out.append((match.start(), i + 1, content[start + 1 : i].strip()))
                break
    return out


def boxed(content: str) -> str | None:
    """What is in the last box of a text."""
    return next((inner for _, _, inner in reversed(boxes(content))), None)


def overlapping(tokens: ic.Tokens, chars: Chars) -> ic.Span | None:
    """The tokens of a single row that share a character with a range; None if there are none."""
    assert tokens.offsets is not None
    hit = [i for i, (a, b) in enumerate(tokens.offsets[0]) if a < b and a < chars[1] and b > chars[0]]
    return ic.Span(hit[0], hit[-1] + 1) if hit else None


def with_spans(example: Example, tokenizer: Any, answer: str | None = None) -> Example | None:
    """The example with its spans where the answer's text stands last in the target: the sink is every token that
    shares a character with it, reasoning is what comes before. None if the text is not there.

    Args:
        answer: its text (default: what was in the box).
    """
    answer = (answer or "").strip() or example.answer
    at = example.target.rfind(answer) if example.target and answer else -1
    if at < 0:
        return None
    assert example.target is not None
    sink = overlapping(text.encode(tokenizer, example.target, bos=False), (at, at + len(answer)))
    thinking = ic.Span(0, sink.start) if sink and sink.start else None
    metadata = {**example.metadata, "boxed_answer": example.metadata.get("boxed_answer") or answer}
    spans = replace(example, sink_span=sink, thinking_span=thinking, indices_to_explain=sink, sentences=None)
    return replace(spans, metadata=metadata) if sink else None


def migrated(example: Example, tokenizer: Any) -> Example:
    """An example of the older form, which numbers sentences, with spans of tokens: the sink's, or else where the answer
    stands.

    Raises:
        TextError: neither a sink nor an answer.
    """
    if example.sentences is None:
        return example
    if example.sink_span is not None:
        return replace(example, indices_to_explain=example.sink_span, sentences=None)
    marked = with_spans(example, tokenizer)
    if marked is None:
        raise ic.TextError(
            f"{example.where}: indices_to_explain {list(example.sentences)} counts sentences, which says nothing of "
            f"tokens; give sink_span, or metadata.boxed_answer with a text of the target {example.target!r:.60}"
        )
    return marked
