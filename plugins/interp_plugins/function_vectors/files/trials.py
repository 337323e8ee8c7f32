"""Trials, as data and as the file of fixed trials that they are written to and read from.

How they are drawn is `trials`; the fields of the file are `trials_json`, its checks `checks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import interp_core as ic
from interp_core.runs import write

from ..prompts import Prompt, Slots, build, dummy
from ..tasks import Pair
from ..template import Boundary, Template, name_of
from .checks import KINDS, prompt_parity, verify_answers
from .trials_json import prompt_data, read_json, short_name, spaced, template_of, unspaced


@dataclass(frozen=True)
class Trial:
    """One draw.

    Attributes:
        number: its place among the trials.
        demos, query: what was drawn.
        clean, corrupted: the prompts; the second has the answers of the demonstrations in another order.
        demo_indices, query_index: rows within the splits (of relation trials: rows of the task).
        corrupted_demos: demonstrations of the corrupted prompt.
    """

    number: int
    demos: tuple[Pair, ...]
    query: Pair
    clean: Prompt
    corrupted: Prompt
    demo_indices: tuple[int, ...]
    query_index: int
    corrupted_demos: tuple[Pair, ...]


@dataclass(frozen=True)
class Trials(Sequence[Trial]):
    """Trials with what they were made from.

    Attributes:
        items: the trials.
        slots: of their prompts; None where they were built without.
        meta: settings, as the file has them; `query_split` where queries are not validation rows.
        splits: row numbers of the task: `train_indices`, `valid_indices`, `test_indices`.
    """

    items: tuple[Trial, ...]
    slots: Slots | None
    meta: Mapping[str, Any]
    splits: Mapping[str, tuple[int, ...]]

    @overload
    def __getitem__(self, index: int) -> Trial: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Trial]: ...
    def __getitem__(self, index: int | slice) -> Trial | Sequence[Trial]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def save(self, path: str | Path) -> Path:
        """Write the file of fixed trials, whole or not at all."""
        write(Path(path), trials_text(self))
        return Path(path)

    @staticmethod
    def load(path: str | Path, tokenizer: Any, *, model: str | None = None, boundary: Boundary = "strict") -> Trials:
        """Read a file of fixed trials and build its prompts with a tokenizer; see `read_trials`."""
        return read_trials(path, tokenizer, model=model, boundary=boundary)


def trial_of(
    number: int,
    tokenizer: Any,
    template: Template,
    slots: Slots | None,
    demos: Sequence[Pair],
    corrupted_demos: Sequence[Pair],
    query: Pair,
    demo_indices: Sequence[int],
    query_index: int,
) -> Trial:
    """A trial with its two prompts."""

    def prompt(kind: str, shown: Sequence[Pair]) -> Prompt:
        return build(tokenizer, template, shown, query, slots, where=f"trial {number}, {kind} prompt")

    shown, shuffled = tuple(demos), tuple(corrupted_demos)
    # a permutation may change nothing: one prompt then stands for both, and is built once
    clean = prompt("clean", shown)
    corrupted = clean if shuffled == shown else prompt("corrupted", shuffled)
    return Trial(number, shown, query, clean, corrupted, tuple(demo_indices), query_index, shuffled)


def to_json(trials: Trials) -> dict[str, Any]:
    """Trials as the file holds them.

    Raises:
        PlanError: queries that are not validation rows, or no slots: the file has no place for that.
    """
    if trials.slots is None or "query_split" in trials.meta:
        rows = trials.meta.get("query_split", "valid")
        raise ic.PlanError(
            "the file of fixed trials holds prompts with slots whose queries are validation rows; these queries are "
            f"{rows} rows, built with{'' if trials.slots else 'out'} slots"
        )
    template, front = trials.slots.template, trials.slots.front
    return {
        "meta": dict(trials.meta),
        "splits": {key: list(rows) for key, rows in trials.splits.items()},
        "trials": [_row(trial, template, front.text) for trial in trials],
    }


def trials_text(trials: Trials) -> str:
    """What the file holds."""
    return json.dumps(to_json(trials), indent=1, ensure_ascii=False)


def _row(trial: Trial, template: Template, front: str) -> dict[str, Any]:
    clean, corrupted = ([spaced(template, p) for p in demos] for demos in (trial.demos, trial.corrupted_demos))
    query, first = spaced(template, trial.query), trial.clean.target_ids[0]
    return {
        "trial_id": trial.number,
        "demo_indices_in_train": list(trial.demo_indices),
        "query_index_in_valid": trial.query_index,
        "demos_clean": clean,
        "demos_corrupted": corrupted,
        "query": query,
        "prompt_data_clean": prompt_data(template, front, clean, query),
        "prompt_data_corrupted": prompt_data(template, front, corrupted, query),
        "clean_prompt_str": trial.clean.text,
        "corrupted_prompt_str": trial.corrupted.text,
        "target_str": trial.clean.target,
        "answer_ids": list(trial.clean.target_ids),
        "first_token_id": first,
        "target_first_token_id": first,
    }


def read_trials(path: str | Path, tokenizer: Any, *, model: str | None = None, boundary: Boundary = "strict") -> Trials:
    """Fixed trials of a file, with prompts of a tokenizer that must be the file's.

    Args:
        model: name of the model to run; its last part must be that of the file's (None: any model of this tokenizer).
        boundary: how answers are found; see `prompts.target_ids`.

    Raises:
        LoadError: no such file, or one whose fields are not those of fixed trials.
        TextError: prompts or answers are not what this tokenizer makes of the file's pairs, or the file is of another
            model; names trial and field.
    """
    data = read_json(path)
    theirs = data["meta"]["model_name_for_tokenizer"]
    if model is not None and short_name(model) != short_name(theirs):
        raise ic.TextError(
            f"{path}: meta.model_name_for_tokenizer is {theirs}, the model is {model}: make a file for this one with "
            "`interp run fv_fixed_trials`"
        )
    for check in (prompt_parity(data, tokenizer), verify_answers(data, tokenizer)):
        if check.mismatches:
            more = f" (and {check.mismatch_count - 1} more)" if check.mismatch_count > 1 else ""
            raise ic.TextError(
                f"{path}: {check.mismatches[0]}{more}. The file was made for {theirs}, this tokenizer is "
                f"{name_of(tokenizer)}: load that one, or make a file for this one with `interp run fv_fixed_trials`"
            )
    template = template_of(data, tokenizer, boundary)
    slots = dummy(tokenizer, template, data["meta"]["n_shots"])
    splits = {key: tuple(rows) for key, rows in data["splits"].items()}
    items = tuple(_from_row(row, tokenizer, template, slots) for row in data["trials"])
    return Trials(items, slots, data["meta"], splits)


def _from_row(row: Mapping[str, Any], tokenizer: Any, template: Template, slots: Slots) -> Trial:
    clean, corrupted = ([unspaced(template, pair) for pair in row[f"demos_{kind}"]] for kind in KINDS)
    query = unspaced(template, row["query"])
    rows = row["demo_indices_in_train"], row["query_index_in_valid"]
    return trial_of(row["trial_id"], tokenizer, template, slots, clean, corrupted, query, *rows)
