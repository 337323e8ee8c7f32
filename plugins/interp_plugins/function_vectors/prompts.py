r"""Prompts with a label and a slot for every token.

Labels follow the reference: the prompt is built piece by piece, and a piece's label goes to as many tokens as the
tokenized text grew by (a piece that the last token swallowed takes that token's label). Slots are the tokens of a dummy
prompt whose every word is "a": a prompt's tokens go to them in order, all tokens of a word to the slot of its first.

The labels say what a token was when its piece was appended. GPT-2's "\n\n" is one token at the end of a text and two
before further text, so the second counts to the prefix that follows; means over slots do not depend on that.

What must hold, and is checked: as many labels as tokens; after the further tokens of words are left out, as many tokens
as slots, with the same labels; the last one is `query_predictive_token`. The reference cuts off silently instead, and
counts the slots of a dummy whose "a" is two tokens twice; here a word has one slot in the dummy too. Where the
reference's own invariants hold, the two are the same. They cannot hold where a word merges with the text that follows
it (an empty output separator before a prefix that begins with a letter): that is an error.

Source: Todd et al. (2024), arXiv:2310.15213, and `ericwtodd/function_vectors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import interp_core as ic

from .tasks import Pair
from .template import Boundary, Front, Part, Template, name_of

LAST = "query_predictive_token"
_BARE = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
_RULES: dict[str, tuple[bool, bool]] = {  # boundary: (move a blank to the answer, the prompt must stay as it is)
    "strict": (False, True), "recompute": (True, False), "recompute-strict": (True, True), "reference": (False, False),
}  # fmt: skip


@dataclass(frozen=True)
class Slots:
    """The slots of a template, a number of demonstrations and a tokenizer.

    Attributes:
        labels: one per slot.
        template: whose they are.
        n_shots: number of demonstrations.
        front: what stands before the prompt.
        text: the dummy prompt.
        tokenizer: its name.
    """

    labels: tuple[str, ...]
    template: Template
    n_shots: int
    front: Front
    text: str
    tokenizer: str

    def __len__(self) -> int:
        return len(self.labels)

    def json(self) -> dict[str, list[list[int | str]]]:
        """The form of the reference's `dummy_labels.json`."""
        return {"labels": [[slot, label] for slot, label in enumerate(self.labels)]}


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens.

    Attributes:
        text: the whole prompt, without what the tokenizer adds.
        ids: token ids, with what the tokenizer adds.
        labels: role of every token; empty where the prompt was built without slots.
        slots: slot of every token; all tokens of a word have that of its first.
        target: the answer as it would follow, its space included.
        target_ids: tokens of the answer.
    """

    text: str
    ids: tuple[int, ...]
    labels: tuple[str, ...]
    slots: tuple[int, ...]
    target: str | None = None
    target_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def idx_map(self) -> dict[int, int]:
        """Token → slot, for the first token of every word and all others outside of words."""
        return {token: self.slots[token] for token in _kept(self.labels)}

    @cached_property
    def idx_avg(self) -> dict[str, tuple[int, int]]:
        """Label → first and last token (inclusive), for words of several tokens."""
        where: dict[str, list[int]] = {}
        for token, label in enumerate(self.labels):
            if "demo" in label:
                where.setdefault(label, []).append(token)
        return {label: (tokens[0], tokens[-1]) for label, tokens in where.items() if len(tokens) > 1}


def dummy(tokenizer: Any, template: Template, n_shots: int) -> Slots:
    """The slots of a template, from a prompt whose every word is "a".

    Raises:
        TextError: labels and tokens do not fit, or nothing stands between the query and its answer.
    """
    if n_shots < 0:
        raise ic.PlanError(f"a prompt has 0 or more demonstrations, not {n_shots}")
    front = template.front(tokenizer)
    parts = template.parts([Pair("a", "a")] * n_shots, "a", front.text)
    text = "".join(part.text for part in parts)
    ids = _ids(tokenizer, text, front.added)
    labels = _labels(tokenizer, parts, front, ids, "dummy prompt")
    if labels[-1] != LAST:
        raise ic.TextError(
            f"template {str(template)!r}: the last token of the prompt is labelled {labels[-1]}, not {LAST}: nothing "
            "stands between the query and its answer. Give an input separator or an output prefix"
        )
    return Slots(tuple(labels[i] for i in _kept(labels)), template, n_shots, front, text, name_of(tokenizer))


def build(
    tokenizer: Any,
    template: Template,
    demos: Sequence[Pair],
    query: Pair | str,
    slots: Slots | None,
    *,
    where: str = "prompt",
) -> Prompt:
    """A prompt with its labels, slots and answer.

    Args:
        query: a pair, or an input without an answer.
        slots: of this template and number of demonstrations; None leaves labels and slots out, which any template
            allows and which is faster.
        where: how messages call the prompt (`trial 3, clean prompt`).

    Raises:
        PlanError: slots of another template or number of demonstrations.
        TextError: an invariant of the module does not hold, the prompt is too long, or the answer does not continue it.
    """
    query_word = query if isinstance(query, str) else query.input
    front = template.front(tokenizer) if slots is None else slots.front
    parts = template.parts(demos, query_word, front.text)
    text = "".join(part.text for part in parts)
    ids = _ids(tokenizer, text, front.added)
    labels: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    if slots is not None:
        theirs = (slots.template, slots.n_shots, slots.tokenizer)
        ours = (template, len(demos), name_of(tokenizer))
        if theirs != ours:
            named = [f"template {str(t)!r}, {n} demonstrations and tokenizer {name}" for t, n, name in (theirs, ours)]
            raise ic.PlanError(
                f"{where}: the slots are of {named[0]}; the prompt is of {named[1]}. Make them with "
                "dummy(tokenizer, template, n_shots)"
            )
        labels = _labels(tokenizer, parts, front, ids, where)
        places = _places(tokenizer, template, labels, slots, ids, where)
    target = None if isinstance(query, str) else template.spaced(query.output)
    answer = () if target is None else target_ids(
        tokenizer, text, target, special=front.added, boundary=template.boundary, where=where
    )  # fmt: skip
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is not None and len(ids) + len(answer) > limit:
        raise ic.TextError(
            f"{where}: {len(ids)} tokens and {len(answer)} of the answer do not fit the {limit} of "
            f"{name_of(tokenizer)}; take fewer demonstrations"
        )
    return Prompt(text, ids, labels, places, target, answer)


def target_ids(
    tokenizer: Any,
    prompt: str,
    target: str,
    *,
    special: bool = True,
    boundary: Boundary = "strict",
    where: str = "prompt",
) -> tuple[int, ...]:
    """Tokens of an answer after a prompt: ids(prompt + target) without the first len(ids(prompt)).

    Args:
        special: let the tokenizer add its special tokens.
        boundary: "reference" does just that; "strict" also asks that ids(prompt) begin the whole. "recompute" and
            "recompute-strict" do the same after a blank at the prompt's end moved to an answer that has none.

    Raises:
        TextError: the answer has no tokens, or does not continue the prompt.
    """
    move, strict = _RULES[boundary]
    if move and prompt.endswith(" ") and not target.startswith(" "):
        prompt, target = prompt[:-1], f" {target}"
    before, whole = _ids(tokenizer, prompt, special), _ids(tokenizer, prompt + target, special)
    start = len(before)
    if not target or len(whole) <= start:
        raise ic.TextError(
            f"{where}: the answer {target!r} adds no tokens to the prompt ({start} tokens, {len(whole)} with it). Give "
            "an answer, and let a space stand before the answer, not at the prompt's end"
        )
    if strict and whole[:start] != before:
        at = next(i for i in range(start) if whole[i] != before[i])
        was, now = tokenizer.convert_ids_to_tokens([before[at], whole[at]])
        raise ic.TextError(
            f"{where}: the answer {target!r} is no continuation of the prompt: token {at} is {was!r} without it, "
            f"{now!r} with it. Move spaces from the prompt's end to the answer's start, or pass "
            "Template(boundary='reference')"
        )
    return whole[start:]


def _ids(tokenizer: Any, text: str, special: bool) -> tuple[int, ...]:
    if not text and not special:
        return ()
    return tuple(tokenizer(text, add_special_tokens=special, **_BARE)["input_ids"])


def _labels(tokenizer: Any, parts: Sequence[Part], front: Front, ids: Sequence[int], where: str) -> tuple[str, ...]:
    """A label per token, by how far each piece makes the tokenized text grow."""
    texts = list(accumulate(part.text for part in parts))
    counts = [len(row) for row in tokenizer(texts, add_special_tokens=False, **_BARE)["input_ids"]]
    labels = ["bos_token"] * front.added
    before = 0
    for part, count in zip(parts, counts, strict=True):
        grown = count - before
        # a piece may merge into the last token, as a second line break does: the token is then that piece's
        if grown == 0 and labels:
            labels[-1] = part.label
        labels += [part.label] * grown
        if part.last and labels:
            labels[-1] = part.last
        if part.first and grown > 0:
            labels[-grown] = part.first
        before = count
    if len(labels) != len(ids):
        raise ic.TextError(
            f"{where}: {len(labels)} labels for {len(ids)} tokens: appending a piece changes the tokens before it, so "
            "that no token can be named. Give separators that end in a line break"
        )
    return tuple(labels)


def _kept(labels: Sequence[str]) -> list[int]:
    """Tokens without the further tokens of words."""
    seen: set[str] = set()
    kept = []
    for token, label in enumerate(labels):
        if "demo" not in label or label not in seen:
            kept.append(token)
        seen.add(label)
    return kept


def _places(
    tokenizer: Any, template: Template, labels: Sequence[str], slots: Slots, ids: Sequence[int], where: str
) -> tuple[int, ...]:
    """Slot of every token; an error where tokens and slots do not fit."""
    kept = _kept(labels)
    named = [labels[token] for token in kept]
    if tuple(named) != slots.labels:
        at = next((i for i, pair in enumerate(zip(named, slots.labels, strict=False)) if len({*pair}) == 2), len(named))
        token = kept[min(at, len(kept) - 1)]
        has = f"token {token} ({tokenizer.convert_ids_to_tokens(ids[token])!r}) is labelled {labels[token]}"
        wants = f"slot {at} is {slots.labels[at]}" if at < len(slots) else f"there are {len(slots)} slots"
        raise ic.TextError(
            f"{where}: {len(named)} tokens for {len(slots)} slots: {has}, {wants}. The slots of template "
            f"{str(template)!r} do not align with {name_of(tokenizer)}. {_advice(template)}"
        )
    first = {labels[token]: slot for slot, token in enumerate(kept)}
    place = dict(zip(kept, range(len(kept)), strict=True))
    return tuple(place[token] if token in place else first[labels[token]] for token in range(len(labels)))


def _advice(template: Template) -> str:
    """What to change in a template whose slots do not align."""
    if not template.separators["output"]:
        return "Its output separator is empty, so that words merge with the prefix that follows: give one"
    if not template.prepend_space and any(text.endswith(" ") for text in template.prefixes.values()):
        return "A prefix ends in a blank, which words take along: leave it out, and let prepend_space put it"
    return "Words merge with the text around them: give prefixes and separators that keep apart, such as line breaks"
