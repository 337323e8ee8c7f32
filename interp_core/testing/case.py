"""One method on one model: its first run with the state before and after, and what holds runs against each other."""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import InterpError, PluginError, first_line
from ..inputs import undivided
from ..methods import Method
from ..model import Model
from ..result import Result, same
from ..text import Tokens
from .report import Failed, NotReached, Refused
from .state import State

CLOSE = 1e-4
"""How far, absolutely and relatively, a batch may lie from its rows alone."""
TEXT_AXES = ("pos", "query", "key")


class Midway(RuntimeError):
    """Raised by the kit inside the model."""


@dataclass(frozen=True)
class Outcome:
    """The first run: result or error, and the state before and after."""

    result: Any
    error: str
    before: State
    after: State
    changed: str


@dataclass
class MethodCase:
    """One method on one model, with what several checks need."""

    method: type[Method]
    model: Model
    settings: Mapping[str, Any]
    rows: list[Tokens]
    limit: float

    def run(self, tokens: Tokens, **options: Any) -> Any:
        """One run from the same random state."""
        _seed()
        return self.method()(self.model, tokens, **self.settings, **options)

    @cached_property
    def whole(self) -> Tokens:
        """Rows of one length as a batch; the first alone if no two are."""
        lengths = [row.lengths[0] for row in self.rows]
        common = max(lengths, key=lambda n: (lengths.count(n), n == lengths[0]))
        alike = [row for row, n in zip(self.rows, lengths, strict=True) if n == common]
        return alike[0] if len(alike) == 1 or undivided(alike[0]) else Tokens.stack(alike)

    @cached_property
    def outcome(self) -> Outcome:
        """The first run."""
        tokens, ids, mask = self.whole, self.whole.ids.clone(), self.whole.mask.clone()
        _seed()
        before, result, error = State.of(self.model.hf), None, ""
        try:
            result = self.run(tokens)
        except PluginError as refusal:  # what `Method.__call__` says of a result says all there is to do
            error = str(refusal)
        except (Exception, SystemExit):  # a plugin may raise anything
            error = traceback.format_exc()
        after = State.of(self.model.hf)
        kept = torch.equal(tokens.ids, ids) and torch.equal(tokens.mask, mask)
        # Further checks run on the same tokens, whatever this run did to them.
        tokens.ids.copy_(ids)
        tokens.mask.copy_(mask)
        return Outcome(result, error, before, after, "" if kept else "it writes into the tokens that it was given")

    @property
    def result(self) -> Result:
        """What the first run gave.

        Raises:
            NotReached: none, or something else.
        """
        if not isinstance(self.outcome.result, Result):
            raise NotReached("needs a result")
        return self.outcome.result


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def unequal(a: Any, b: Any) -> list[str]:
    """Names of the fields in which two results differ."""
    if type(a) is not type(b):
        return [f"kind ({type(a).__name__}, {type(b).__name__})"]
    return [f.name for f in fields(a) if not same(getattr(a, f.name), getattr(b, f.name))]


def apart(a: Result, b: Result) -> list[str]:
    """Names of the tensors without the axis `batch` in which two results differ by more than rounding."""
    differing = []
    for name, axes in a.AXES.items():
        mine, other = getattr(a, name), getattr(b, name)
        if "batch" in axes or mine is None or other is None:
            continue
        x, y = mine.double().nan_to_num(), other.double().nan_to_num()
        limit = CLOSE * max(1.0, float(x.abs().max()) if x.numel() else 1.0)
        if x.shape != y.shape or not torch.allclose(x, y, rtol=CLOSE, atol=limit):
            differing.append(name)
    return differing


@contextmanager
def failing(model: nn.Module, at: int) -> Iterator[list[None]]:
    """Raise `Midway` at the n-th call of a module (0: never); yields what grows by one with every call."""
    mine = {id(module) for module in model.modules()}
    calls: list[None] = []

    def step(module: nn.Module, _: Any) -> None:
        if id(module) in mine:
            calls.append(None)
            if len(calls) == at:
                raise Midway("raised by the conformance kit")

    handle = register_module_forward_pre_hook(step)
    try:
        yield calls
    finally:
        handle.remove()


def stacked(case: MethodCase) -> Tokens:
    """All rows, padded on the left.

    Raises:
        NotReached: there is nothing to pad.
    """
    if any(undivided(row) for row in case.rows):
        raise NotReached("rows with such inputs cannot be stacked")
    stacked = Tokens.stack(case.rows)
    if not stacked.padded:
        raise NotReached("all rows are equally long")
    return stacked


def as_singles(case: MethodCase, tokens: Tokens, rows: list[Tokens], **options: Any) -> str:
    """Hold a batch against its rows alone.

    Args:
        options: of the method's call on the batch.

    Raises:
        Failed: a row differs from what it is alone, or an error that is none of interp_core's.
        NotReached: the first run gave no result.
        Refused: by an error of interp_core's own.
    """
    if not isinstance(case.outcome.result, Result):
        raise NotReached("needs a result")
    try:
        together = case.run(tokens, **options)
    except InterpError as error:
        raise Refused(first_line(error)) from error
    except Exception as error:  # the plugin's own
        raise Failed(f"{type(error).__name__}: {error}") from error
    worst = 0.0
    for i, row in enumerate(rows):
        alone = case.run(row)
        columns = torch.nonzero(tokens.mask[i]).flatten()
        for name, axes in together.AXES.items():
            if "batch" in axes:
                worst = max(
                    worst, _apart(name, axes, getattr(together, name), getattr(alone, name), i, columns, tokens)
                )
    return f"{worst:.1g} apart at most"


def _apart(
    name: str, axes: tuple[str, ...], batch: Any, alone: Any, row: int, columns: Tensor, tokens: Tokens
) -> float:
    """How far one array of a row in a batch lies from the row's own."""
    if batch is None or alone is None:
        if (batch is None) != (alone is None):
            raise Failed(f"{name} of row {row} is there only {'alone' if batch is None else 'in the batch'}")
        return 0.0
    for dim, axis in enumerate(axes):
        if axis == "batch":
            batch = batch.narrow(dim, row, 1)
        elif axis in TEXT_AXES and batch.shape[dim] == tokens.ids.shape[1]:
            batch = batch.index_select(dim, columns.to(batch.device))
    if batch.shape != alone.shape:
        raise Failed(
            f"{name} [{' '.join(axes)}] of row {row} is {list(batch.shape)} in the batch, alone {list(alone.shape)}"
        )
    a, b = batch.double().nan_to_num(), alone.double().nan_to_num()
    far = float((a - b).abs().max()) if a.numel() else 0.0
    if not torch.allclose(a, b, rtol=CLOSE, atol=CLOSE):
        raise Failed(
            f"{name} of row {row} differs by up to {far:.3g} from what it is alone ({float(b.abs().max()):.3g})"
        )
    return far
