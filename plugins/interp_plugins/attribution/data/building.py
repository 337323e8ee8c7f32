r"""Caches built with a model: it answers, right answers are kept, and the spans are where the answer stands.

    boxed      "<reasoning> \boxed{<answer>}" with nothing after the box; the target is the reasoning, a line break, and
               what was in the box
    contains   any finished answer in which the reference answer stands, and after it no other number; the target is
               what was written

In both forms the sink is every token that shares a character with the last occurrence of the answer's text, and
reasoning is what comes before. Answers are greedy, to the very tokens that the evaluation will show: what the model is
told to do (`instruction`) is part of the cached prompt, whereas the published code put it into a system message that
its evaluation leaves out.

Source: `exp/exp2/sample_and_filter.py` of FlashTrace at 075e7e4, whose judge is a model; here it is a comparison, or a
function of yours. Cost: one generation per example. Must equal: in form `contains`, the target's tokens are those
generated (an example whose text has other tokens is left out).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import interp_core as ic

from .examples import Example, boxes, with_spans
from .tokens import Profile, example_tokens

Form = Literal["contains", "boxed"]
"""What an answer must look like; see the module."""
Judge = Callable[[str, Example], bool]
"""Whether an answer is that of the example."""
REASONS = {
    "no_reference": "the source has no answer to compare with",
    "too_long": "prompt and answer do not fit the model's context",
    "unfinished": "the answer did not end within max_new_tokens",
    "format": "it is not reasoning and one box at the end",
    "wrong": "the answer is another",
    "no_span": "no token holds the answer",
    "other_tokens": "the text's tokens are not those that were generated",
}
"""Why an example is left out, and what that means."""


class Built(NamedTuple):
    """What became of an example.

    Attributes:
        example: with target and spans; None where it is left out.
        reason: why it is (one of `REASONS`), or "".
        answer: what the model wrote.
    """

    example: Example | None
    reason: str
    answer: str


def answers_of(example: Example) -> list[str]:
    """The texts that a right answer holds."""
    outputs = example.metadata.get("outputs")
    texts = outputs if isinstance(outputs, list) and outputs else [example.metadata.get("reference_answer") or ""]
    return [str(answer).strip() for answer in texts if str(answer).strip()]


def same(answer: str, example: Example) -> bool:
    """Whether an answer has each of the reference's texts, as a word of its own, and no other number after a number."""
    said = _plain(answer)
    for wanted in map(_plain, answers_of(example)):
        place = _last(said, wanted)
        if place is None:
            return False
        if len(answers_of(example)) == 1 and _is_number(wanted) and re.search(r"\d", said[place[1] :]):
            return False
    return True


def _plain(content: str) -> str:
    """Without case, thousands' commas, dollar signs and runs of white space."""
    return re.sub(r"\s+", " ", re.sub(r"(?<=\d),(?=\d{3}\b)|[$\\]", "", content)).strip().rstrip(".").casefold()


def _is_number(content: str) -> bool:
    return re.fullmatch(r"-?[\d.]+", content) is not None


def _last(content: str, wanted: str) -> tuple[int, int] | None:
    """Where a text stands last as a word of its own."""
    matches = list(re.finditer(rf"(?<![\w]){re.escape(wanted)}(?![\w]|[.,]\d)", content))
    return matches[-1].span() if matches else None


def build(
    model: ic.Model,
    examples: Sequence[Example],
    *,
    form: Form = "contains",
    judge: Judge = same,
    instruction: str = "",
    max_new_tokens: int = 128,
    keep_unfinished: bool = False,
    profile: Profile = "sound",
    batch_size: int = 8,
) -> Iterator[Built]:
    """What becomes of each example, in their order.

    Args:
        form: see the module.
        judge: is given the answer (what is in the box) and the example.
        instruction: put on a line of its own after every prompt.
        max_new_tokens: for an answer.
        keep_unfinished: also take answers that did not come to an end (models that were not taught to end).
        profile: of the prompt, as in `example_tokens`.
        batch_size: prompts in a pass.

    Raises:
        TextError: no tokenizer, or a prompt that its template does not show.
    """
    prompts = [
        replace(example, prompt=f"{example.prompt}\n{instruction}" if instruction else example.prompt, target=None)
        for example in examples
    ]
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        yield from _built_batch(model, batch, form, judge, max_new_tokens, keep_unfinished, profile)


def _built_batch(
    model: ic.Model, prompts: list[Example], form: Form, judge: Judge, max_new_tokens: int, keep_unfinished: bool,
    profile: Profile,
) -> Iterator[Built]:  # fmt: skip
    """One batch; where it does not fit the context, its rows one by one."""
    rows = [example_tokens(model, example, profile) for example in prompts]
    try:
        written = model.generate(ic.Tokens.stack(rows), max_new_tokens=max_new_tokens)
    except ic.TextError:
        if len(prompts) == 1:
            yield Built(None, "too_long", "")
            return
        for example in prompts:
            yield from _built_batch(model, [example], form, judge, max_new_tokens, keep_unfinished, profile)
        return
    for i, example in enumerate(prompts):
        new = written.tokens.row(i)
        span = new.spans["generated"][0][0]
        ids = new.ids[0, span.start : span.stop].tolist()
        # the end token is no part of the answer
        ids = ids[:-1] if written.ended[i] else ids
        if not written.ended[i] and not keep_unfinished:
            yield Built(None, "unfinished", written.texts[i])
        else:
            yield _judged(model, example, written.texts[i], ids, form, judge, profile)


def _judged(
    model: ic.Model, example: Example, said: str, ids: list[int], form: Form, judge: Judge, profile: Profile
) -> Built:
    """An answer that came to an end: kept, or why not."""
    if not answers_of(example):
        return Built(None, "no_reference", said)
    if form == "boxed":
        parts = split_boxed(said)
        if parts is None:
            return Built(None, "format", said)
        target, answer = f"{parts[0]}\n{parts[1]}", parts[1]
        right = judge(answer, example)
    else:
        target = said.rstrip()
        right = judge(target, example)
        answer = _hull(target, example) if right else ""
    if not right:
        return Built(None, "wrong", said)
    metadata = {**example.metadata, "judge_response": "True", "boxed_answer": answer}
    marked = with_spans(replace(example, target=target, metadata=metadata), model.tokenizer) if answer else None
    if marked is None:
        return Built(None, "no_span", said)
    try:
        tokens = example_tokens(model, marked, profile)
    except ic.TextError:  # the answer's beginning shares a token with the prompt's end, once both are text
        return Built(None, "other_tokens", said)
    at = tokens.spans["target"][0][0]
    # text that was generated may be tokenized otherwise when it is read as a whole: then it is not what the model said
    target_ids = tokens.ids[0, at.start : at.stop].tolist()
    if form == "contains" and target_ids[: len(ids)] != ids[: len(target_ids)]:
        return Built(None, "other_tokens", said)
    count = len(model.tokenizer(target, add_special_tokens=False)["input_ids"])
    return Built(replace(marked, metadata={**marked.metadata, "target_tokens": count}), "", said)


def split_boxed(content: str) -> tuple[str, str] | None:
    """Reasoning and what is in the last box, where nothing follows the box, and neither is empty."""
    boxed = boxes(content)
    if not boxed:
        return None
    start, stop, inner = boxed[-1]
    reasoning = content[:start].strip()
    return (reasoning, inner) if reasoning and inner and not content[stop:].strip() else None


def _hull(target: str, example: Example) -> str:
    """The answer as it was written: from the first to the last of the reference's texts, where each stands last."""
    places = [_last(target.casefold(), wanted.casefold()) for wanted in answers_of(example)]
    known = [place for place in places if place is not None]
    return target[min(a for a, _ in known) : max(b for _, b in known)] if known else ""
