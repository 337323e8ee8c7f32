"""Checks of a file of fixed trials.

* prompt parity   prompts, answers and `prompt_data` built again from the file's pairs, and their ids, equal the file's
* slot parity     dummy labels, labels, idx_map and idx_avg of this package equal those of the reference's procedure,
                  which is written down here a second time, word by word as it is specified: pieces tokenized one after
                  the other, labels zipped with tokens, tokens zipped with slots; for clean and corrupted prompts
* verify          answer_ids, first_token_id and target_first_token_id equal what the tokenizer gives

Every check says how many trials it looked at and what did not agree: all of the file, if not told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import interp_core as ic

from ..prompts import Prompt, Slots, build, dummy, target_ids
from ..tasks import Pair
from ..template import Template
from .trials_json import prompt_data, spaced, template_of, unspaced

KINDS = ("clean", "corrupted")


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        name: "prompt parity", "slot parity" or "verify".
        checked_trials: how many were looked at.
        mismatches: one line each, with trial and field.
    """

    name: str
    checked_trials: int
    mismatches: tuple[str, ...]

    @property
    def mismatch_count(self) -> int:
        """How many things did not agree."""
        return len(self.mismatches)

    def __str__(self) -> str:
        return f"{self.name}: checked_trials={self.checked_trials} mismatch_count={self.mismatch_count}"


def prompt_parity(data: Mapping[str, Any], tokenizer: Any, kinds: Sequence[str] = KINDS) -> Check:
    """Prompts of these kinds built from the file's pairs against the file's prompts."""
    template = template_of(data, tokenizer)
    front = template.front(tokenizer)
    mismatches = []
    for number, trial in enumerate(data["trials"]):
        for kind in kinds:
            demos, query = trial[f"demos_{kind}"], trial["query"]
            pairs = [unspaced(template, pair) for pair in demos]
            prompt = build(tokenizer, template, pairs, unspaced(template, query).input, None)
            field = f"trial {number}, {kind}_prompt_str"
            mismatches += _differ(field, trial[f"{kind}_prompt_str"], prompt.text)
            stored = tuple(tokenizer(trial[f"{kind}_prompt_str"], add_special_tokens=front.added)["input_ids"])
            mismatches += _differ(f"{field}, ids", stored, prompt.ids)
            field = f"trial {number}, prompt_data_{kind}"
            mismatches += _differ(field, trial[f"prompt_data_{kind}"], prompt_data(template, front.text, demos, query))
        mismatches += _differ(f"trial {number}, target_str", trial["target_str"], trial["query"]["output"])
    return Check("prompt parity", len(data["trials"]), tuple(mismatches))


def slot_parity(data: Mapping[str, Any], tokenizer: Any, kinds: Sequence[str] = KINDS) -> Check:
    """Slots of this package, in prompts of these kinds, against those of the reference's procedure."""
    template = template_of(data, tokenizer, "reference")
    slots = dummy(tokenizer, template, data["meta"]["n_shots"])
    wanted = _reference_dummy(tokenizer, template, slots)
    mismatches = _differ("dummy labels", list(slots.labels), wanted)
    for number, trial in enumerate(data["trials"]):
        for kind in kinds:
            where = f"trial {number}, {kind} prompt"
            pairs = [unspaced(template, pair) for pair in trial[f"demos_{kind}"]]
            try:
                prompt = build(tokenizer, template, pairs, unspaced(template, trial["query"]), slots, where=where)
            except ic.TextError as error:
                mismatches.append(str(error))
                continue
            labels = reference_labels(tokenizer, trial[f"prompt_data_{kind}"], slots.front.added)
            mismatches += _slots_differ(where, prompt, labels, wanted)
    return Check("slot parity", len(data["trials"]), tuple(mismatches))


def verify_answers(data: Mapping[str, Any], tokenizer: Any) -> Check:
    """Answers' first tokens against the tokenizer."""
    template = template_of(data, tokenizer)
    special = template.front(tokenizer).added
    mismatches = []
    for number, trial in enumerate(data["trials"]):
        try:
            ids = list(
                target_ids(
                    tokenizer, trial["clean_prompt_str"], trial["target_str"], special=special, boundary="reference"
                )
            )
        except ic.TextError as error:
            mismatches.append(f"trial {number}, answer_ids: {error}")
            continue
        mismatches += _differ(f"trial {number}, answer_ids", trial["answer_ids"], ids)
        for field in ("first_token_id", "target_first_token_id"):
            mismatches += _differ(f"trial {number}, {field}", trial[field], ids[0])
    return Check("verify", len(data["trials"]), tuple(mismatches))


def reference_labels(tokenizer: Any, data: Mapping[str, Any], bos: bool) -> list[str]:
    """Labels by the reference's procedure, one per token that the growing text gains.

    Args:
        data: `prompt_data`.
        bos: the tokenizer adds a BOS.
    """
    before, after = data["prefixes"], data["separators"]
    groups = [[(before["instructions"], "bos_token")], [(data["instructions"], "instructions_token")]]
    groups += [[(after["instructions"], "separator_token")]]
    examples = [(pair["input"], pair["output"], f"demonstration_{i}", "") for i, pair in enumerate(data["examples"], 1)]
    for x, y, name, kind in [*examples, (data["query_target"]["input"], None, "query_demonstration", "query_")]:
        group = [(before["input"], f"{kind}structural_token"), (x, f"{name}_token")]
        group += [(after["input"], f"{kind}separator_token"), (before["output"], f"{kind}structural_token")]
        answered = [] if y is None else [(y, f"{name}_label_token"), (after["output"], "separator_token")]
        groups.append(group + answered)
    labels, text = ["bos_token"] * bos, ""
    for group in groups:
        for place, (piece, label) in enumerate(group):
            if not piece:
                continue
            length = len(tokenizer.tokenize(text))
            text += piece
            new = len(tokenizer.tokenize(text)) - length
            labels = labels + [label] * new if new else [*labels[:-1], label]
            # the last token before an answer: of the output's prefix, or of the separator where there is none
            if place == 3 or (place == 2 and not group[3][0]):
                labels[-1] = labels[-1].replace("structural", "predictive").replace("separator", "predictive")
            if place == 5 and new:
                labels[-new] = "end_of_example_token"
    return labels


def _reference_dummy(tokenizer: Any, template: Template, slots: Slots) -> list[str]:
    word = spaced(template, Pair("a", "a"))
    data = prompt_data(template, slots.front.text, [word] * slots.n_shots, word)
    labels = reference_labels(tokenizer, data, slots.front.added)
    return [x for i, x in enumerate(labels) if "demo" not in x or x not in labels[:i]]  # one slot a word


def _slots_differ(where: str, prompt: Prompt, labels: Sequence[str], slots: Sequence[str]) -> list[str]:
    """What differs between a prompt and the reference's labels zipped with its tokens and the slots."""
    words: dict[str, list[int]] = {}
    for token, label in zip(range(len(prompt.ids)), labels, strict=False):
        if "demo" in label:
            words.setdefault(label, []).append(token)
    further = {token for tokens in words.values() for token in tokens[1:]}
    kept = (token for token in range(len(prompt.ids)) if token not in further)
    idx_map = dict(zip(kept, range(len(slots)), strict=False))
    idx_avg = {label: (tokens[0], tokens[-1]) for label, tokens in words.items() if len(tokens) > 1}
    return [
        *_differ(f"{where}, labels", list(prompt.labels), list(labels)),
        *_differ(f"{where}, idx_map", prompt.idx_map, idx_map),
        *_differ(f"{where}, idx_avg", prompt.idx_avg, idx_avg),
    ]


def _differ(field: str, actual: Any, wanted: Any) -> list[str]:
    """A line if two things differ."""
    if actual == wanted:
        return []
    if isinstance(actual, (list, tuple)) and isinstance(wanted, (list, tuple)) and len(actual) == len(wanted):
        at = next(i for i, pair in enumerate(zip(actual, wanted, strict=True)) if pair[0] != pair[1])
        return [f"{field}[{at}] is {actual[at]!r}, should be {wanted[at]!r}"]
    return [f"{field} is {_short(actual)}, should be {_short(wanted)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]} … {text[-50:]}"
