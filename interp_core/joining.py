"""How the results of batches become one: what a method gives for many prompts, put together from parts.

A result is what each prompt gives, or what all of them give together, and both can be made of parts: what has the axis
`batch` has its rows put in order, the rest is joined as the class says in `JOINS`.

    "sum"     the sum of the parts: counts, totals
    "mean"    their mean, each part weighing as many prompts as it has
    "same"    it does not depend on the prompts: parts must agree, to the bit (plain fields, if nothing is said)
    "rows"    one item per prompt
    "union"   mappings, all together
    "first"   that of the part that has the first prompt: notes on how it was done

A tensor that has no axis `batch` and no rule is of all prompts together in a way that nobody has said: such a result is
refused before anything runs.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .errors import PlanError, PluginError, nearest
from .result import Result, same
from .text import Tokens

RULES = ("sum", "mean", "same", "rows", "union", "first")
TEXT_AXES = ("pos", "query", "key")
"""Axes that may be as wide as the batch; results then have them as wide as all prompts together."""


@dataclass(frozen=True)
class Part:
    """The result of some prompts.

    Attributes:
        numbers: which prompts, in the order of the rows.
        tokens: the batch that they were.
    """

    numbers: Sequence[int]
    tokens: Tokens
    result: Result


def result_kind(run: Callable[..., Any]) -> type[Result] | None:
    """The class of result that a method's `run` says it returns; None if it does not say."""
    try:
        kind = typing.get_type_hints(run).get("return")
    except (NameError, TypeError):
        return None
    return kind if isinstance(kind, type) and issubclass(kind, Result) and kind is not Result else None


def rule_of(kind: type[Result], name: str) -> str:
    """How a field is joined; "batch" along that axis, "" where the class does not say."""
    if "batch" in kind.AXES.get(name, ()):
        return "batch"
    return kind.JOINS.get(name, "" if name in kind.AXES else "same")


def demand_joinable(owner: str, kind: type[Result]) -> None:
    """Refuse results that cannot be put together.

    Raises:
        PlanError: a field of all prompts together without a rule.
        PluginError: a rule that there is not, or of no field.
    """
    names = [field.name for field in fields(kind)]
    for name, rule in kind.JOINS.items():
        if rule not in RULES:
            raise PluginError(f"{kind.__name__}.JOINS: {name} is joined by {rule!r}. {nearest(rule, RULES)}")
        if name not in names:
            raise PluginError(f"{kind.__name__}.JOINS: there is no field {name!r}. {nearest(name, names)}")
    for name, axes in kind.AXES.items():
        if not rule_of(kind, name):
            raise PlanError(
                f"{owner} cannot be split into batches: its {name} [{' '.join(axes)}] is made of all prompts together, "
                f"and {kind.__name__} does not say how parts of it are joined. Run it without batch_size= and out=, or "
                f"let the class declare JOINS = {{{name!r}: …}}, one of {', '.join(RULES)}"
            )


def demand_alike(owner: str, first: Part, part: Part) -> None:
    """Refuse a part that cannot be joined to the first.

    Raises:
        PlanError: naming the field, and in which prompts it is what.
    """
    kind = type(first.result)
    if type(part.result) is not kind:
        raise PluginError(f"{owner} gave a {kind.__name__}, then a {type(part.result).__name__}")
    for field in fields(kind):
        values = [getattr(each.result, field.name) for each in (first, part)]
        rule = rule_of(kind, field.name)
        if why := _unlike(kind, field.name, rule, values, [first, part]):
            raise PlanError(
                f"{owner} cannot be joined from batches: {field.name} {why} (prompts {_some(first.numbers)} and "
                f"{_some(part.numbers)})"
            )


def _unlike(kind: type[Result], name: str, rule: str, values: Sequence[Any], parts: Sequence[Part]) -> str:
    """Why two parts' values cannot be joined; "" if they can."""
    if (values[0] is None) != (values[1] is None):
        return "is there in some prompts only"
    if rule == "same" and not same(*values):
        return f"differs between batches; if that is right, {kind.__name__}.JOINS says how it is joined"
    if rule == "rows" and any(len(value) != len(part.numbers) for value, part in zip(values, parts, strict=True)):
        return "has not one item per prompt"
    if rule != "batch" or values[0] is None:
        return ""
    for dim, axis in enumerate(kind.AXES[name]):
        sizes = [value.shape[dim] for value in values]
        as_wide = axis in TEXT_AXES and sizes == [part.tokens.ids.shape[1] for part in parts]
        if axis != "batch" and sizes[0] != sizes[1] and not as_wide:
            return f"has {axis} {sizes[0]} and {sizes[1]}; choose what all prompts have (at=-1), or run them apart"
    return ""


def joined(parts: Sequence[Part], whole: Tokens) -> Result:
    """The result of all prompts, as that of one batch would be.

    Args:
        parts: alike, of all prompts together.
        whole: all prompts; axes as wide as the batch are laid out as it is, with not a number (or 0) at its padding.
    """
    parts = sorted(parts, key=lambda part: min(part.numbers))  # so that "first" is that of the first prompt
    kind = type(parts[0].result)
    values: dict[str, Any] = {}
    for field in fields(kind):
        of_parts = [getattr(part.result, field.name) for part in parts]
        values[field.name] = None if of_parts[0] is None else _joined(kind, field.name, of_parts, parts, whole)
    return kind(**values)


def _joined(kind: type[Result], name: str, values: Sequence[Any], parts: Sequence[Part], whole: Tokens) -> Any:
    rule = rule_of(kind, name)
    if rule == "batch":
        return _in_order(kind.AXES[name], values, parts, whole)
    if rule == "rows":
        items = {number: item for part, value in zip(parts, values, strict=True)
                 for number, item in zip(part.numbers, value, strict=True)}  # fmt: skip
        return type(values[0])(items[number] for number in range(len(whole)))
    if rule == "union":
        return {key: item for value in values for key, item in value.items()}
    if rule == "sum":
        return sum(values[1:], values[0])
    if rule == "mean":
        return sum(value * (len(part.numbers) / len(whole)) for part, value in zip(parts, values, strict=True))
    return values[0]


def _in_order(axes: tuple[str, ...], values: Sequence[Tensor], parts: Sequence[Part], whole: Tokens) -> Tensor:
    """Rows of all parts in the order of the prompts."""
    batch, width = axes.index("batch"), whole.ids.shape[1]
    rows: dict[int, Tensor] = {}
    wide = [
        dim
        for dim, axis in enumerate(axes)
        if axis in TEXT_AXES
        and all(value.shape[dim] == part.tokens.ids.shape[1] for value, part in zip(values, parts, strict=True))
        and any(value.shape[dim] != width for value in values)
    ]
    for value, part in zip(values, parts, strict=True):
        for place, number in enumerate(part.numbers):
            row = value.narrow(batch, place, 1)
            for dim in wide:
                row = _laid_out(row, dim, part.tokens.rows.real[place], whole.rows.real[number], width)
            rows[number] = row
    return torch.cat([rows[number] for number in range(len(whole))], batch)


def _laid_out(row: Tensor, dim: int, columns: Sequence[int], places: Sequence[int], width: int) -> Tensor:
    """A row's real columns at their places in the whole batch."""
    fill = float("nan") if row.is_floating_point() else 0
    laid = row.new_full((*row.shape[:dim], width, *row.shape[dim + 1 :]), fill)
    real = row.index_select(dim, torch.tensor(list(columns), device=row.device))
    return laid.index_copy_(dim, torch.tensor(list(places), device=row.device), real)


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:4]))
    return f"{shown}, …" if len(numbers) > 4 else shown
