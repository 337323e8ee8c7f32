"""An example as the tokens that a model is given, with spans for the user's prompt, the target and its parts.

    sound       the prompt through the tokenizer's chat template, if it has one, as one user message (thinking is
                switched off), else as it is; the user's tokens are found by characters; the target's tokens follow,
                which must not change those of the user
    reference   the published one: a space in front of the prompt, "Context:" and "Query: " around it, always a chat
                template; target and end token are tokenized as one text; the user's tokens are taken to begin where
                the first of their ids first occurs, and to be consecutive

Source: the text handling of FlashTrace at 075e7e4. Must equal: in the profile "reference", every id, position and
string of the published run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

import interp_core as ic
from interp_core import errors, text

from ..layout import stretches
from .examples import Chars, Example, closed, migrated, overlapping

Profile = Literal["sound", "reference"]
"""How text becomes tokens; see the module."""


def example_tokens(source: Any, example: Example, profile: Profile = "sound", *, eos: bool = False) -> ic.Tokens:
    """An example as one row, with the spans `prompt` (the user's tokens), `target`, `sink`, `thinking` and
    `explained`, as far as it has them, and `gold`: the user's tokens that share a character with its needles.

    Args:
        source: a model or a tokenizer.
        profile: see the module.
        eos: end the target with the tokenizer's end token (the reference profile always does).

    Raises:
        TextError: no chat template or end token where one is needed, a prompt that the template does not show or that
            the target changes, or spans that lie outside the target, as those of another tokenizer do.
        PlanError: no such profile.
    """
    tokenizer = source.tokenizer if isinstance(source, ic.Model) else source
    if tokenizer is None:
        raise ic.TextError(f"{example.where}: the model has no tokenizer; load it with one")
    if profile not in ("sound", "reference"):
        raise ic.PlanError(f"there is no profile {profile!r}. {errors.nearest(profile, ('sound', 'reference'))}")
    prompt, user, gold = (_reference_prompt if profile == "reference" else _sound_prompt)(tokenizer, example)
    spans = {"prompt": user} | ({"gold": gold} if gold else {})
    if example.target is None:
        return _named(prompt, spans)
    example = migrated(example, tokenizer)
    assert example.target is not None
    alone = text.encode(tokenizer, example.target, bos=False)
    _check_tokenizer(example, alone)
    if profile == "reference":
        # as published, the end token is written behind the target, and both are read as one text
        end = text.encode(tokenizer, example.target + (tokenizer.eos_token or ""), bos=False)
    else:
        _check_boundary(tokenizer, example, prompt, user[-1].stop - 1)
        end = _ended(tokenizer, example, alone) if eos else alone
    start = len(prompt.labels[0])
    spans["target"] = (ic.Span(start, start + len(end.labels[0])),)
    for name, field in (("sink", "sink_span"), ("thinking", "thinking_span"), ("explained", "indices_to_explain")):
        span = getattr(example, field)
        if span is not None:
            _check_inside(example, field, span, len(end.labels[0]))
            spans[name] = (ic.Span(start + span.start, start + span.stop),)
    return _named(_appended(prompt, end), spans)


def _named(tokens: ic.Tokens, spans: Mapping[str, tuple[ic.Span, ...]]) -> ic.Tokens:
    return replace(tokens, spans={name: (places,) for name, places in spans.items()})


def _appended(first: ic.Tokens, second: ic.Tokens) -> ic.Tokens:
    """Two single rows as one."""
    assert first.texts and second.texts and first.offsets and second.offsets
    shift = len(first.texts[0])
    offsets = (*first.offsets[0], *((a + shift, b + shift) for a, b in second.offsets[0]))
    ids = torch.cat([first.ids, second.ids], 1)
    return ic.Tokens(
        ids, torch.ones_like(ids, dtype=torch.bool), (first.texts[0] + second.texts[0],), (offsets,),
        labels=((*first.labels[0], *second.labels[0]),),
    )  # fmt: skip


def _ended(tokenizer: Any, example: Example, target: ic.Tokens) -> ic.Tokens:
    """The target with the end token, by its id."""
    if tokenizer.eos_token_id is None:
        raise ic.TextError(
            f"{example.where}: the tokenizer has no end token; leave eos out, or set tokenizer.eos_token"
        )
    ids = torch.tensor([[tokenizer.eos_token_id]])
    end = ic.Tokens(ids, ids >= 0, ("",), (((0, 0),),), labels=((str(tokenizer.eos_token),),))
    return _appended(target, end)


def _touching(tokens: ic.Tokens, ranges: Iterable[Chars]) -> set[int]:
    """The tokens of a row that share a character with any of the ranges."""
    assert tokens.offsets is not None
    ranges = list(ranges)
    return {
        i
        for i, (a, b) in enumerate(tokens.offsets[0])
        if a < b and any(a < stop and b > start for start, stop in ranges)
    }


def _sound_prompt(tokenizer: Any, example: Example) -> tuple[ic.Tokens, tuple[ic.Span, ...], tuple[ic.Span, ...]]:
    """Prompt, the user's tokens in it, and those of the needles."""
    if getattr(tokenizer, "chat_template", None):
        message = {"role": "user", "content": example.prompt}
        try:
            tokens = text.encode_chat(tokenizer, [message], enable_thinking=False)
        except ic.TextError as error:
            raise ic.TextError(f"{example.where}: {error}") from error
        user: tuple[ic.Span, ...] = tokens.spans["message_0"][0] if "message_0" in tokens.spans else ()
    else:
        tokens = text.encode(tokenizer, example.prompt)
        user = stretches(_touching(tokens, [(0, len(example.prompt))]))
    if not user:
        raise ic.TextError(
            f"{example.where}: the prompt {example.prompt!r:.40} has no token of its own; give it some text"
        )
    if not example.needles:
        return tokens, user, ()
    assert tokens.texts and tokens.offsets
    inner = example.prompt.strip()
    at = tokens.texts[0].find(inner, tokens.offsets[0][user[0].start][0]) - example.prompt.find(inner)
    if at < -example.prompt.find(inner):
        raise ic.TextError(
            f"{example.where}: the chat template changes the prompt, so that its needles cannot be located; leave "
            "metadata.needle_spans out, or write the prompt as the template shows it"
        )
    ours = {i for span in user for i in span}
    return tokens, user, stretches(ours & _touching(tokens, [(at + a, at + b) for a, b in example.needles]))


def _reference_prompt(tokenizer: Any, example: Example) -> tuple[ic.Tokens, tuple[ic.Span, ...], tuple[ic.Span, ...]]:
    """As `_sound_prompt`, as published."""
    if not getattr(tokenizer, "chat_template", None):
        raise ic.TextError(
            f"{example.where}: the profile 'reference' goes through a chat template, and this tokenizer has none; set "
            "tokenizer.chat_template, or take the profile 'sound'"
        )
    content = f"Context: {example.prompt}\n\n\nQuery: "
    whole: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    tokens, alone = (text.encode(tokenizer, part, bos=False) for part in (whole, f" {example.prompt}"))
    ids, typed = tokens.ids[0].tolist(), alone.ids[0].tolist()
    # as published: by the first id alone, wherever that first occurs
    start = ids.index(typed[0]) if typed[0] in ids else len(ids)
    if ids[start : start + len(typed)] != typed:
        words = (
            f"the user's {len(typed)} tokens are not where their first one is first found, token {start} of {len(ids)}"
        )
        if start + len(typed) > len(ids):
            raise ic.TextError(f"{example.where}: {words}; the profile 'sound' locates them by characters")
        warnings.warn(f"{example.where}: {words}; the profile 'reference' takes that place all the same", stacklevel=3)
    # needles are counted in the prompt, which is tokenized behind a space here
    gold = _touching(alone, [(a + 1, b + 1) for a, b in example.needles])
    return tokens, (ic.Span(start, start + len(typed)),), stretches(start + i for i in gold)


def _check_boundary(tokenizer: Any, example: Example, prompt: ic.Tokens, last: int) -> None:
    """Refuse a target that changes the user's tokens, or shares one with them.

    What a chat template puts between the two may change: a model is given those tokens, and goes on from there.
    """
    assert prompt.texts and prompt.offsets and example.target is not None
    chat = bool(getattr(tokenizer, "chat_template", None))
    # a tokenizer may join the prompt's last characters with the target's first: the user's tokens would be others
    joint = text.encode(tokenizer, prompt.texts[0] + example.target, bos=False if chat else None)
    assert joint.offsets is not None
    same = joint.ids[0, : last + 1].tolist() == prompt.ids[0, : last + 1].tolist()
    if not same or joint.offsets[0][last][1] > prompt.offsets[0][last][1]:
        at = prompt.texts[0][-12:] + "|" + example.target[:12]
        raise ic.TextError(
            f"{example.where}: the tokens of the prompt change when the target follows ({at!r}). Move spaces from the "
            "prompt's end to the target's start; the profile 'reference' tokenizes the two apart, as published"
        )


def _check_inside(example: Example, field: str, span: ic.Span, count: int) -> None:
    if span.stop > count:
        raise ic.TextError(
            f"{example.where}: {field} {closed(span)} ends at token {span.stop - 1}, and this tokenizer makes "
            f"{count} tokens of the target (0 to {count - 1}). If another tokenizer made the spans, move them: interp "
            "run remap_spans"
        )


def _check_tokenizer(example: Example, target: ic.Tokens) -> None:
    """Hold the spans against what else the example says: those of another tokenizer may lie inside the target too."""
    written, count, move = example.metadata.get("target_tokens"), len(target.labels[0]), "interp run remap_spans"
    if isinstance(written, int) and written != count:
        raise ic.TextError(
            f"{example.where}: its spans are of a tokenizer that makes {written} tokens of the target, and this one "
            f"makes {count}; move them: {move}"
        )
    answer, sink = str(example.metadata.get("boxed_answer") or "").strip(), example.sink_span
    at = example.target.rfind(answer) if example.target and answer else -1
    if at < 0 or sink is None or sink.stop > count or sink == overlapping(target, (at, at + len(answer))):
        return
    warnings.warn(
        f"{example.where}: the sink is {''.join(target.labels[0][sink.start : sink.stop])!r:.60}, the answer in "
        f"metadata is {answer!r:.60}. If another tokenizer made the spans, move them: {move}",
        stacklevel=3,
    )
