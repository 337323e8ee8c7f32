"""Text as a model sees it: `Tokens` with a mask, character offsets and named spans.

One module owns special tokens, chat templates, the boundary between prompt and target, and the map between
characters and tokens. That map goes by overlap, not containment: byte-level tokens may share a character.

Batches are padded on the left, so that the last column is the last token of every row; positions count real tokens
(see `positions`), so the side never shows. A mask may have holes, columns between a row's tokens that nothing attends
to: they stay where they are, since a model counts its own positions by columns there, as transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .chat import Chars, rendered
from .errors import PlanError, PositionError, TextError, nearest, wrong
from .inputs import Shares, filler, in_row, is_visual, some, spans_of, stacked, stacked_patches
from .offsets import ids_with_offsets
from .positions import Images, Patches, PositionLike, Rows, Span, format_position, is_single, position, resolve
from .token_views import TokensView

__all__ = ["Tokens", "encode", "encode_chat"]

CACHE = "past_key_values"
"""What a cache that is handed in is called here; `cache`, as transformers has it since 5.24, is taken for it."""
Where = Span | Chars | str | re.Pattern[str]
"""What `Tokens.find` takes: a token span, a character range, a string or a regular expression."""


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(TokensView):
    """A batch of token sequences.

    Attributes:
        ids: token ids; padding holds any valid id.
        mask: which of them are real tokens.
        texts: the text of each row, if known.
        offsets: per row and real token, its characters in the row's text, if known (special tokens: empty ranges).
        spans: per name, per row, the token spans of that name; usable as positions.
        labels: per row and real token, the text to show (ids where it is not given).
        inputs: further tensors that the model takes (`pixel_values`, …).
        shares: which part of such an input is whose; see `inputs`.
        patches: per row and image, where its patches pass in the vision tower; see `Patches` (None: not known).
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    texts: tuple[str, ...] | None = None
    offsets: tuple[tuple[Chars, ...], ...] | None = None
    spans: Mapping[str, tuple[tuple[Span, ...], ...]] = field(default_factory=dict)
    labels: tuple[tuple[str, ...], ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    shares: Shares = field(default_factory=dict)
    patches: Images | None = None
    placed: dict[Any, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)
    """What models are called with, by shape limits and device; filled by their first run."""

    def __post_init__(self) -> None:
        for name, value in (("ids", self.ids), ("mask", self.mask)):
            if not isinstance(value, Tensor):
                raise TextError(wrong(f"Tokens({name}=…)", "a tensor [batch, pos]", value))
        if self.ids.ndim != 2 or self.ids.is_floating_point() or self.ids.dtype == torch.bool:
            raise TextError(f"token ids are integers [batch, pos], not {self.ids.dtype} {list(self.ids.shape)}")
        if self.mask.shape != self.ids.shape:
            raise TextError(f"the mask is {list(self.mask.shape)}, the ids are {list(self.ids.shape)}")
        if not self.labels:
            rows = zip(self.ids, self.mask, strict=True)
            object.__setattr__(self, "labels", tuple(tuple(map(str, row[keep].tolist())) for row, keep in rows))
        if 0 in self.ids.shape or not bool(self.mask.any(-1).all()):
            raise TextError("the text is empty: a model needs at least one token per row")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @cached_property
    def padded(self) -> bool:
        """Whether any row has padding."""
        return not bool(self.mask.all())

    @cached_property
    def rows(self) -> Rows:
        """What positions resolve against."""
        width = self.ids.shape[1]
        real = (
            [torch.nonzero(row).flatten().tolist() for row in self.mask]
            if self.padded
            else [range(width) for _ in range(len(self))]
        )
        names = {
            name: [sorted({i for span in spans for i in span}) for spans in rows] for name, rows in self.spans.items()
        }
        patches = None if self.patches is None else Patches(self.patches)
        return Rows(real, names, width, patches=patches)

    @cached_property
    def lengths(self) -> list[int]:
        """Number of real tokens of each row."""
        return [len(row) for row in self.rows.real]

    @cached_property
    def widths(self) -> list[int]:
        """Number of columns from each row's first real token to its last: more than its length where the mask has holes
        between them."""
        return [row[-1] - row[0] + 1 for row in self.rows.real]

    @cached_property
    def within(self) -> Bool[Tensor, "batch pos"]:
        """Which columns lie between a row's first and last real token: the row, without padding around it."""
        real = self.mask.long()
        return (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)

    def columns(self, at: PositionLike) -> list[list[int]]:
        """Columns of `ids` that a position selects, row by row, as `Site.at` takes it (None: all real tokens).

        Raises:
            PositionError: not a position, or the text does not have it.
        """
        return resolve(position(at), self.rows)

    def take(self, values: Shaped[Tensor, "batch pos ..."], at: PositionLike) -> Shaped[Tensor, "batch ..."]:
        """A tensor of your own at positions, as a run gives a site's value there: `[batch pos …]` to `[batch n …]`, or
        to `[batch …]` where the position is a single one.

        Raises:
            PositionError: not a position, the text does not have it, or rows have different numbers of it.
            PlanError: a tensor that is not laid out like `ids`.
        """
        if not isinstance(values, Tensor) or values.shape[:2] != self.ids.shape:
            takes = f"a tensor [{', '.join(map(str, self.ids.shape))}, …] of these tokens"
            raise PlanError(wrong("take", takes, values if not isinstance(values, Tensor) else list(values.shape)))
        pos = position(at)
        columns = self.columns(pos)
        if len({len(row) for row in columns}) > 1:
            raise PositionError(
                f"{format_position(pos)} selects {[len(row) for row in columns]} positions of the rows; take them "
                "row by row (for row in tokens: …), or positions of which all rows have as many"
            )
        index = torch.tensor(columns, dtype=torch.long, device=values.device)
        taken = values[torch.arange(len(index), device=index.device)[:, None], index]
        return taken[:, 0] if is_single(pos) else taken

    def labels_at(self, at: PositionLike) -> tuple[tuple[str, ...], ...]:
        """The tokens at positions as text to show, row by row.

        Raises:
            PositionError: as `columns`.
        """
        rows = []
        for labels, real, columns in zip(self.labels, self.rows.real, self.columns(at), strict=True):
            by_column = dict(zip(real, labels, strict=True))
            rows.append(tuple(by_column.get(column, "") for column in columns))
        return tuple(rows)

    def row(self, index: int) -> Tokens:
        """One row without the padding around it, with its own pixels.

        Raises:
            PositionError: there is no such row.
            TextError: a further input of which it is not known what is whose.
        """
        if isinstance(index, bool) or not isinstance(index, int) or not -len(self) <= index < len(self):
            raise PositionError(wrong("row", f"a row of the batch, 0 to {len(self) - 1}", index))
        keep = self.within[index]
        inputs, shares = some(self, [index % len(self)], keep) if self.inputs else ({}, {})
        pick = slice(index, index + 1) if index >= 0 else slice(index, index + 1 or None)
        return replace(
            self,
            ids=self.ids[index][keep][None],
            mask=self.mask[index][keep][None],
            texts=self.texts and self.texts[pick],
            offsets=self.offsets and self.offsets[pick],
            spans={name: rows[pick] for name, rows in self.spans.items() if in_row(self, name, index)},
            labels=self.labels[pick],
            inputs=inputs,
            shares=shares,
            patches=self.patches and self.patches[pick],
        )

    def __iter__(self) -> Iterator[Tokens]:
        return (self.row(i) for i in range(len(self)))

    def find(self, what: Where, row: int = 0, nth: int = 0) -> Span:
        """The tokens of a part of the text: a string, a regular expression, a character range or a token span.

        Args:
            what: strings and expressions are searched in the row's text; `nth` picks the match (negative from the end).

        Raises:
            PositionError: not found, or outside the text.
            TextError: the row's text or offsets are not known.
        """
        for name, number in (("row", row), ("nth", nth)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise PositionError(wrong(f"find({name}=…)", "an integer", number))
        if not -len(self) <= row < len(self):
            raise PositionError(f"no row {row} in a batch of {len(self)}")
        length = self.lengths[row]
        if isinstance(what, Span):
            if not 0 <= what.start < what.stop <= length:
                raise PositionError(f"{what} lies outside row {row}, which has {length} tokens")
            return what
        if not isinstance(what, (str, re.Pattern)) and not _is_pair(what):
            raise PositionError(wrong("find", "a string, a regular expression, (start, stop) or a Span", what))
        text = self._text(row)
        if isinstance(what, (str, re.Pattern)):
            pattern = re.escape(what) if isinstance(what, str) else what
            matches = [match.span() for match in re.finditer(pattern, text)]
            if not -len(matches) <= nth < len(matches):
                shown = what if isinstance(what, str) else what.pattern
                times = f"{len(matches)} times" if matches else "not at all"
                hint = "" if matches else f" {nearest(shown.strip(), text.split())}"
                raise PositionError(f"{shown!r} occurs {times} in row {row} (asked for match {nth}).{hint}")
            what = matches[nth]
        start, stop = what
        if not 0 <= start < stop <= len(text):
            raise PositionError(f"characters {start}:{stop} lie outside row {row}, whose text has {len(text)}")
        span = self._covering(start, stop, row)
        if span is None:
            raise PositionError(f"no token covers characters {start}:{stop} ({text[start:stop]!r}) of row {row}")
        return span

    def chars(self, span: Span, row: int = 0) -> Chars:
        """The characters that a token span covers."""
        if not isinstance(span, Span):
            raise PositionError(wrong("chars", "a Span", span))
        span = self.find(span, row)
        self._text(row)
        assert self.offsets is not None
        covered = [chars for chars in self.offsets[row][span.start : span.stop] if chars[0] < chars[1]]
        if not covered:
            raise PositionError(f"{span} of row {row} holds special tokens only, which cover no characters")
        return min(a for a, _ in covered), max(b for _, b in covered)

    def name(self, **what: Where | Sequence[Where]) -> Tokens:
        """The same tokens with further named spans, usable as positions: `tokens.name(subject="Eiffel Tower")`.

        A list gives one item per row; anything else is looked up in every row.
        """
        spans = dict(self.spans)
        for name, where in what.items():
            items: list[Any] = list(where) if isinstance(where, list) else [where] * len(self)
            if len(items) != len(self):
                raise PositionError(f"{name}: {len(items)} places for {len(self)} rows")
            spans[name] = tuple((self.find(item, row),) for row, item in enumerate(items))
        return replace(self, spans=spans)

    def _covering(self, start: int, stop: int, row: int) -> Span | None:
        """The tokens of a row that cover a part of its text; None if none does."""
        assert self.offsets is not None
        hit = [i for i, (a, b) in enumerate(self.offsets[row]) if a < stop and start < b]
        return Span(hit[0], hit[-1] + 1) if hit else None

    def _text(self, row: int) -> str:
        if self.texts is None or self.offsets is None:
            raise TextError("these tokens carry no text or offsets; make them with model.tokens(text)")
        return self.texts[row]

    @staticmethod
    def stack(rows: Sequence[Tokens]) -> Tokens:
        """Rows of several batches as one, padded on the left, each with its own pixels.

        Raises:
            TextError: none, something else than tokens, or further inputs that cannot be put together.
        """
        if isinstance(rows, str) or not isinstance(rows, Sequence) or not all(isinstance(x, Tokens) for x in rows):
            raise TextError(wrong("Tokens.stack", "a list of Tokens", rows))
        if not rows:
            raise TextError("Tokens.stack of an empty list; give at least one Tokens")
        singles = [single for tokens in rows for single in tokens]
        width = max(single.ids.shape[1] for single in singles)
        ids = torch.stack([_pad(single.ids[0], width, filler(single)) for single in singles])
        mask = torch.stack([_pad(single.mask[0], width, 0) for single in singles])
        inputs, shares = stacked(singles, width)
        names = set.intersection(*(set(single.spans) for single in singles))
        if shares:
            names |= {name for single in singles for name in single.spans if is_visual(name)}
        texts = [single.texts[0] for single in singles if single.texts]
        offsets = [single.offsets[0] for single in singles if single.offsets]
        return Tokens(
            ids,
            mask,
            tuple(texts) if len(texts) == len(singles) else None,
            tuple(offsets) if len(offsets) == len(singles) else None,
            {name: tuple(spans_of(single, name) for single in singles) for name in sorted(names)},
            tuple(single.labels[0] for single in singles),
            inputs,
            shares,
            stacked_patches(singles),
        )


def encode(
    tokenizer: Any,
    texts: str | Sequence[str],
    target: str | Sequence[str] | None = None,
    *,
    bos: bool | None = None,
    boundary: str = "strict",
) -> Tokens:
    """Tokens of one or several texts, with the spans `prompt` and `target` where a target is given.

    Args:
        target: continuation of each text (one for all, or one per text), its leading space included.
        bos: True puts the tokenizer's BOS in front, False leaves all special tokens out, None does what the
            tokenizer does by itself.
        boundary: "strict" tokenizes prompt and target together and refuses a token that crosses the boundary or a
            prompt whose tokens the target changes; "concat" tokenizes the two apart.

    Raises:
        TextError: empty text or target, no BOS to put, or a boundary that is not between two tokens.
    """
    if isinstance(bos, Tensor) or bos not in (None, True, False):
        raise TextError(wrong("bos=", "True, False or None", bos))
    pairs = enumerate(with_targets(texts, target))
    return Tokens.stack([encode_row(tokenizer, text, goal, bos, boundary, row) for row, (text, goal) in pairs])


def with_targets(texts: str | Sequence[str], target: str | Sequence[str] | None) -> list[tuple[str, str | None]]:
    """Texts, each with its target.

    Raises:
        TextError: something else than strings, no text, or another number of targets.
    """
    rows = _strings("a text", "a string or a list of strings", texts)
    targets = [None] * len(rows) if target is None else _strings("target=", "a string, or one per text", target)
    targets = targets * len(rows) if isinstance(target, str) else targets
    if not rows:
        raise TextError("no text given")
    if len(targets) != len(rows):
        raise TextError(f"{len(targets)} targets for {len(rows)} texts")
    return list(zip(rows, targets, strict=True))


def _strings(what: str, takes: str, value: Any) -> list[Any]:
    """A string as a list of one, or a list of strings."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or isinstance(items, bytes) or not all(isinstance(x, str) for x in items):
        raise TextError(wrong(what, takes, value))
    return list(items)


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], target: str | None = None, **template: Any
) -> Tokens:
    """Tokens of a conversation through the tokenizer's chat template, ready for the assistant's answer.

    The text of every message that has one is the span `message_{i}` (more than one, where the template keeps parts of
    it), and all messages of a role are spans of that role's name. White space at its ends is left out.

    Args:
        messages: `{"role": …, "content": …}` each; the content is text or a list of `{"type": "text", "text": …}`.
        target: the beginning of the answer; gets the span `target`.
        template: passed on to `apply_chat_template` (`enable_thinking=False`, …). With `continue_final_message=True`
            the last message stays open; otherwise a new answer is opened, unless `add_generation_prompt=False`.

    Raises:
        TextError: no chat template, one that cannot render these messages, or a message that it does not show.
    """
    if target is not None and not isinstance(target, str):
        raise TextError(wrong("target=", "the beginning of the answer, a string", target))
    text, places = rendered(tokenizer, messages, **template)
    return with_messages(encode_row(tokenizer, text, target, False, "strict", 0), messages, places)


def with_messages(tokens: Tokens, messages: Sequence[Mapping[str, Any]], places: Sequence[Sequence[Chars]]) -> Tokens:
    """Tokens of a conversation with the spans of its messages, given the characters of each one's text."""
    spans = dict(tokens.spans)
    for i, (message, ranges) in enumerate(zip(messages, places, strict=True)):
        if shown := tuple(span for chars in ranges if (span := tokens._covering(*chars, 0))):
            spans[f"message_{i}"] = (shown,)
            spans[message["role"]] = (spans.get(message["role"], ((),))[0] + shown,)
    return replace(tokens, spans=spans)


def from_inputs(inputs: Mapping[str, Any], tokenizer: Any = None) -> Tokens:
    """Tokens of what a tokenizer or processor returned (`input_ids`, `attention_mask`, `pixel_values`, …).

    Where positions or a cache come with them, a mask reaches the model as it is: it decides whether transformers takes
    the row for several packed texts, and it covers the tokens of the cache too.

    Raises:
        TextError: no ids, or a mask of another shape than ids, or than cache and ids together.
    """
    rest = {CACHE if name == "cache" else name: value for name, value in inputs.items()}
    if "input_ids" not in rest:
        raise TextError(f"the inputs lack input_ids; they have {', '.join(map(repr, rest)) or 'nothing'}")
    ids = torch.as_tensor(rest.pop("input_ids"))
    attention_mask = rest.pop("attention_mask", None)
    mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask)
    if attention_mask is not None and {"position_ids", CACHE} & set(rest):
        rest["attention_mask"] = mask.long()
    if attention_mask is not None and (cache := rest.get(CACHE)) is not None:
        known, width = cache.get_seq_length(), ids.shape[-1]
        if mask.shape[-1] != known + width:
            raise TextError(
                f"the mask is {list(mask.shape)}, the cache holds {known} tokens and the ids are {list(ids.shape)}: a "
                f"mask covers both, [batch, {known + width}]"
            )
        mask = mask[..., -width:]
    mask = mask.bool()
    tokens = Tokens(ids, mask, inputs=rest)
    return tokens if tokenizer is None else replace(tokens, labels=_decoded(tokenizer, ids, mask))


def encode_row(tokenizer: Any, text: str, target: str | None, bos: bool | None, boundary: str, row: int) -> Tokens:
    """Tokens of one text, as `encode` makes them; `row` is its number, for messages."""
    if not text or target == "":
        raise TextError(f"row {row}: {'the text' if not text else 'the target'} is empty")
    if boundary not in ("strict", "concat"):
        raise TextError(f"boundary is 'strict' or 'concat', not {boundary!r}")
    ids, offsets = ids_with_offsets(tokenizer, text, bos)
    if target is None:
        return _single(tokenizer, text, ids, offsets, {})
    if boundary == "concat":
        more, shifts = ids_with_offsets(tokenizer, target, False)
        start = len(ids)
        ids, offsets = ids + more, offsets + [(a + len(text), b + len(text)) for a, b in shifts]
    else:
        prompt = ids
        ids, offsets = ids_with_offsets(tokenizer, text + target, bos)
        # The first token that reaches into the target: where it begins in the prompt, the ids before it differ.
        start = next((i for i, (a, b) in enumerate(offsets) if b > len(text)), len(ids))
        if ids[:start] != prompt:
            at = text[-12:] + "|" + target[:12]
            raise TextError(
                f"row {row}: the tokens of the prompt change when the target follows ({at!r}). Move spaces from the "
                "prompt's end to the target's start, or pass boundary='concat' to tokenize the two apart."
            )
    if start == len(ids):
        raise TextError(f"row {row}: the target {target!r} has no tokens")
    spans = {"prompt": Span(0, start), "target": Span(start, len(ids))}
    return _single(tokenizer, text + target, ids, offsets, spans)


def _single(tokenizer: Any, text: str, ids: list[int], offsets: list[Chars], spans: dict[str, Span]) -> Tokens:
    table = torch.tensor([ids], dtype=torch.long)
    # Special tokens cover no characters of the text, and show what they are.
    labels = tuple(text[a:b] or token_text(tokenizer, i) for i, (a, b) in zip(ids, offsets, strict=True))
    named = {name: ((span,),) for name, span in spans.items()}
    return Tokens(table, torch.ones_like(table, dtype=torch.bool), (text,), (tuple(offsets),), named, (labels,))


def token_text(tokenizer: Any, token: int) -> str:
    """Text of one token, with the leading space that SentencePiece's decoder drops."""
    piece = tokenizer.convert_ids_to_tokens(token)
    text: str = tokenizer.decode([token])
    return f" {text}" if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text


def _decoded(tokenizer: Any, ids: Tensor, mask: Tensor) -> tuple[tuple[str, ...], ...]:
    known = {i: token_text(tokenizer, i) for i in set(ids[mask].tolist())}
    return tuple(tuple(known[i] for i in row[keep].tolist()) for row, keep in zip(ids, mask, strict=True))


def _is_pair(value: Any) -> bool:
    whole = isinstance(value, (tuple, list)) and len(value) == 2
    return whole and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _pad(row: Tensor, width: int, fill: int) -> Tensor:
    return torch.cat([row.new_full((width - len(row),), fill), row])
