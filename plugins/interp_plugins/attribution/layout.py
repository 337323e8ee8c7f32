"""Where prompt, target, sink and thinking stand in a row of tokens; what is explained, and from where.

Tokens carry the places as named spans: `prompt` (the user's own words and images, without a chat template's), `target`
(the continuation), `sink` (the part of it that is explained), `thinking` (its reasoning), `explained` (the part whose
rows are summed in evaluations). The token at position p is predicted at position p - 1.

Source: Pan et al. (2026), arXiv:2602.01914, for sink and thinking spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import interp_core as ic

Part = str | tuple[int, int]
"""A part of the target: text that occurs in it, or tokens of it by a half-open range."""


@dataclass(frozen=True)
class Layout:
    """One row, without padding; positions are absolute in it.

    Attributes:
        tokens: the row.
        prompt: positions of the user's prompt.
        target: positions of the target; empty if the next token is explained.
        sink: the part of the target that is explained.
        thinking: the part of the target that is reasoning (the sink, where nobody said).
        explained: the part of the target whose rows evaluations sum (the sink, where nobody said).
        against: id of the token whose logit is taken away from the answer's, if any.
    """

    tokens: ic.Tokens
    prompt: tuple[int, ...]
    target: range
    sink: range
    thinking: range
    explained: range
    against: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens of the row."""
        return self.tokens.lengths[0]

    @property
    def answer(self) -> tuple[int, ...]:
        """Ids of the sink's tokens; empty where the next token, whatever it is, is explained."""
        return tuple(self.tokens.ids[0, self.sink.start : self.sink.stop].tolist())

    @property
    def predictors(self) -> tuple[int, ...]:
        """The positions that predict the answer, one per token of it."""
        return tuple(p - 1 for p in self.sink) or (self.length - 1,)

    @property
    def projected(self) -> tuple[int, ...]:
        """The user's prompt, then the target: all that evaluations look at."""
        return (*self.prompt, *self.target)

    def objective(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum of the answer's logits (of the largest, where the next token is explained), less those of `against`.

        Args:
            logits: of this row at `predictors` `[1 predictor d_vocab]`.
            weights: one per token of the answer (default: 1).
        """
        ids = torch.tensor(self.answer, device=logits.device) if self.answer else logits[0].argmax(-1)
        chosen = logits[0, torch.arange(len(ids), device=ids.device), ids]
        if self.against is not None:
            chosen = chosen - logits[0, :, self.against]
        return (chosen if weights is None else chosen * weights.to(chosen)).sum()

    def spans(self) -> dict[str, list[list[int]]]:
        """The places as half-open ranges, for records."""
        ranges = {"target": self.target, "sink": self.sink, "thinking": self.thinking, "explained": self.explained}
        listed = {name: [[r.start, r.stop]] for name, r in ranges.items() if len(r)}
        return {"prompt": [[span.start, span.stop] for span in stretches(self.prompt)], **listed}


def layout_of(
    model: ic.Model, tokens: ic.Tokens, *, sink: Part | None = None, thinking: Part | None = None,
    against: int | str | None = None,
) -> Layout:  # fmt: skip
    """The layout of a row; without a target that of the token which the model gives next.

    Args:
        tokens: one row without padding.
        sink, thinking: in the place of the spans of that name.
        against: a token, by id or as a word.

    Raises:
        PositionError: a part that the target does not have, or an empty one.
        PlanError: parts of a target that is not there; `against` beside several tokens.
    """
    named = {name: _span(tokens, name) for name in ("target", "sink", "thinking", "explained")}
    target = named["target"]
    if not len(target):
        wanted = [name for name, part in (("sink", sink), ("thinking", thinking)) if part is not None]
        wanted += [name for name in ("sink", "thinking", "explained") if len(named[name])]
        if wanted:
            raise ic.PlanError(f"{wanted[0]} is a part of the target, and there is none; give target=…")
        sink_span = reasoning = explained = target
    else:
        sink_span = _part(tokens, "sink", sink, target) or named["sink"] or target
        reasoning = _part(tokens, "thinking", thinking, target) or named["thinking"] or sink_span
        explained = named["explained"] or sink_span
        for name, part in (("sink", sink_span), ("thinking", reasoning), ("explained", explained)):
            if part.start < target.start or part.stop > target.stop:
                raise ic.PositionError(
                    f"{name} is tokens {part.start} to {part.stop}, the target {target.start} to {target.stop}: give a "
                    "part of the target"
                )
        if target.start == 0:
            raise ic.PlanError(
                "the target begins with the first token, which nothing predicts; give a prompt before it"
            )
    if against is not None and len(sink_span) > 1:
        raise ic.PlanError(f"against= is held against one token, the sink has {len(sink_span)}; choose one by sink=")
    other = None if against is None else int(ic.score.token_ids(model, against, 1, "attribution"))
    return Layout(tokens, _prompt(tokens, target), target, sink_span, reasoning, explained, other)


def is_stop(label: str) -> bool:
    """Whether a token is a stop word: a comma, a full stop, or nothing but blanks."""
    return label.strip() in ("", ",", ".")


def with_target(model: ic.Model, tokens: ic.Tokens, target: str | Sequence[str]) -> ic.Tokens:
    """The same texts followed by a target, as span `target`.

    Raises:
        PlanError: tokens that have a target already, or another number of targets.
        TextError: the tokenizer changes the prompt when the target follows; tokens that carry no text.
    """
    if "target" in tokens.spans:
        raise ic.PlanError("these tokens have a target already; leave target= out")
    targets = [target] * len(tokens) if isinstance(target, str) else list(target)
    if len(targets) != len(tokens):
        raise ic.PlanError(f"{len(targets)} targets for {len(tokens)} prompts; give one, or one per prompt")
    return ic.Tokens.stack([_continued(model, row, goal) for row, goal in zip(tokens, targets, strict=True)])


def _continued(model: ic.Model, row: ic.Tokens, target: str) -> ic.Tokens:
    if row.texts is None:
        raise ic.TextError(
            "these tokens carry no text for target= to follow; make them with model.tokens(prompt, target)"
        )
    whole = model.tokens(row.texts[0], target)
    own = row.ids[0].tolist()
    if whole.ids[0, : len(own)].tolist() != own:
        whole = model.tokens(row.texts[0], target, bos=False)
        if whole.ids[0, : len(own)].tolist() != own:
            raise ic.TextError(
                f"the prompt's tokens are others when {target!r:.40} follows them; make tokens of both at once: "
                "model.tokens(prompt, target), or model.chat(messages, target=…)"
            )
    return replace(whole, spans={**row.spans, **whole.spans})


def _prompt(tokens: ic.Tokens, target: range) -> tuple[int, ...]:
    """The prompt's positions: of the span; what the user said and showed in a chat; else all before the target."""
    for name in ("prompt", "user"):
        positions = sorted({i for span in tokens.spans.get(name, ((),))[0] for i in span})
        if name == "prompt" and "user" in tokens.spans and positions == list(range(target.start)):
            continue  # a chat's template stands between its messages
        if positions:
            shown = tokens.spans.get("vision", ((),))[0] if name == "user" else ()
            return tuple(sorted({*positions, *(i for span in shown for i in span)}))
    return tuple(range(target.start if len(target) else tokens.lengths[0]))


def _span(tokens: ic.Tokens, name: str) -> range:
    """A named span of the row as a range; empty if there is none.

    Raises:
        PositionError: several pieces.
    """
    spans: Any = tokens.spans.get(name, ((),))[0]
    if len(spans) > 1:
        raise ic.PositionError(f"span {name!r} is {len(spans)} pieces of the text; give one")
    return range(spans[0].start, spans[0].stop) if spans else range(0)


def _part(tokens: ic.Tokens, name: str, part: Part | None, target: range) -> range | None:
    """A part of the target that settings name; None where they do not.

    Raises:
        PositionError: text that the target does not have, or tokens outside it.
    """
    if part is None:
        return None
    if isinstance(part, str):
        start, _ = tokens.chars(ic.Span(target.start, target.stop))
        text = (tokens.texts or ("",))[0]
        at = text.rfind(part, start) if part else -1
        if at < 0:
            raise ic.PositionError(f"{name} {part!r} does not occur in the target {text[start:]!r:.80}")
        span = tokens.find((at, at + len(part)))
        return range(max(span.start, target.start), span.stop)
    start, stop = part
    if not 0 <= start < stop <= len(target):
        raise ic.PositionError(
            f"{name} is tokens {start} to {stop} of a target that has {len(target)}: give a half-open range within it"
        )
    return range(target.start + start, target.start + stop)


def stretches(positions: Iterable[int]) -> tuple[ic.Span, ...]:
    """Positions as spans, neighbours joined."""
    out: list[ic.Span] = []
    for i in sorted(positions):
        out = [*out[:-1], ic.Span(out[-1].start, i + 1)] if out and out[-1].stop == i else [*out, ic.Span(i, i + 1)]
    return tuple(out)
