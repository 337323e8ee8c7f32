"""Prompts as a setting: other prompts that belong to those of a method, one each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import interp_core as ic


def prompts_of(what: str, model: ic.Model, value: Any, count: int) -> list[ic.Tokens]:
    """One row of tokens per prompt.

    Args:
        what: the setting, for messages.
        model: whose tokens they are.
        value: `Tokens` of as many rows, or a list of texts, `Tokens` of one row and what a processor returned.
        count: how many prompts there are.

    Raises:
        PlanError: something else, or another number.
        TextError: a prompt that is no text of this model.
    """
    items = list(value) if isinstance(value, (list, tuple, ic.Tokens)) else None
    if items is None:
        raise ic.PlanError(ic.errors.wrong(what, "a list of prompts, one per prompt of the method", value))
    if len(items) != count:
        raise ic.PlanError(f"{what} has {len(items)} prompts for {count}; give one per prompt")
    tokens = [
        item if isinstance(item, ic.Tokens) else model.tokens(dict(item) if isinstance(item, Mapping) else item)
        for item in items
    ]
    for number, each in enumerate(tokens):
        if len(each) != 1:
            raise ic.PlanError(f"{what}: item {number} has {len(each)} rows; give each prompt by itself")
    return tokens


def beside(prompts: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows of prompts with what belongs to each: of every column the prompt's own, where there is one."""
    return [
        {**row, **{name: column[i] for name, column in columns.items() if i < len(column) and column[i] is not None}}
        for i, row in enumerate(prompts)
    ]
