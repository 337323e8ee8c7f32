"""Sweeps: many variants of a text, each with something else changed, for the price of what they change.

For a text of n tokens and L layers, one full forward pass costs n × L token-layers. A variant whose edits first touch
layer l and column c differs from the clean pass only in layers from l on and columns from c on, so it costs
(n - c) × (L - l), and the clean pass is paid once:

    cost = n × L + sum over variants of (n - c) × (L - l)         against        variants × n × L

Variants with the same first column go together in passes of many rows, each row joining at its layer
(`engines/staircase.py`). Numbers equal those of one full forward pass per variant, up to rounding: this is tried on the
model itself before the first sweep, and where it does not hold a coarser strategy takes over and says why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .edits import Edit
from .engines.staircase import Clean, Staircase, clean_pass
from .engines.torch import TorchEngine
from .errors import PlanError, nearest
from .plan import Plan
from .positions import Rows
from .score import Score
from .sites import Site
from .sweep_plan import STRATEGIES, Pass, Planner, Step, SweepPlan, choose, named_edits
from .sweep_store import Store, key_of
from .text import Tokens

if TYPE_CHECKING:
    from .model import Input, Model

Variant = Edit | Sequence[Edit]
SAVE_SECONDS = 10.0
"""How often what is done is written to the folder."""


@dataclass
class Sweep:
    """What a sweep gives back.

    Attributes:
        values: scores per variant and example.
        clean: scores without edits.
        moved: norm of what the edits of a variant changed, per example.
        variants: the edits.
        score: name of the score.
        plan: how it was carried out.
    """

    values: Float[Tensor, "variant batch"]
    clean: Float[Tensor, " batch"]
    moved: Float[Tensor, "variant batch"]
    variants: tuple[tuple[Edit, ...], ...]
    score: str
    plan: SweepPlan

    @property
    def effects(self) -> Float[Tensor, "variant batch"]:
        """Scores minus those without edits."""
        return self.values - self.clean

    @property
    def failed(self) -> list[str]:
        """Variants whose score is not a number in some example."""
        bad = torch.isnan(self.values).any(-1).tolist()
        return [named_edits(edits) for edits, is_bad in zip(self.variants, bad, strict=True) if is_bad]

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The variants that move the score most, averaged over examples: `(edits, effect)`."""
        mean = self.effects.mean(-1)
        order = mean.abs().nan_to_num(0).argsort(descending=True)[:k].tolist()
        return [(named_edits(self.variants[i]), float(mean[i])) for i in order]


def sweep(
    model: Model,
    x: Input,
    variants: Iterable[Variant],
    score: Score,
    strategy: str,
    budget: int | None,
    out: str | Path | None,
    progress: bool,
) -> Sweep:
    """See `Model.sweep`, which has the defaults."""
    tokens = model._fitting(model._input(x))
    listed = _listed(variants)
    if strategy not in STRATEGIES:
        raise PlanError(f"no strategy {strategy!r}. {nearest(strategy, STRATEGIES)}")
    everything = tuple(edit for edits in listed for edit in edits)
    model.engine.compile(Plan((), everything), model.atlas)  # a wrong one is found before anything runs
    runner = _Runner(model, tokens, listed, score, budget)
    kind = torch.float64 if model.dtype == torch.float64 else torch.float32
    key = key_of(model, tokens, listed, score) if out is not None else ""
    store = Store(None if out is None else Path(out), key, len(listed), len(tokens), kind)
    plan = runner.plan(*choose(model, tokens, strategy), store.done)
    return runner.run(plan, store, _Progress(progress, int((~store.done).sum())))


class _Progress:
    """A line on standard error: how much is done, how fast, how long it will take."""

    def __init__(self, shown: bool, total: int) -> None:
        self.shown, self.total, self.count, self.since = shown, total, 0, time.monotonic()

    def add(self, count: int) -> None:
        """So many more are done."""
        self.count += count
        if self.shown:
            rate = self.count / max(time.monotonic() - self.since, 1e-9)
            left = (self.total - self.count) / rate
            end = "\n" if self.count == self.total else ""
            print(
                f"\rsweep {self.count:,} of {self.total:,}, {rate:,.0f} per second, {left:,.0f} s left ",
                end=end, file=sys.stderr, flush=True,
            )  # fmt: skip


def _listed(variants: Iterable[Variant]) -> tuple[tuple[Edit, ...], ...]:
    given = [[variant] if isinstance(variant, (Edit, Site)) else variant for variant in variants]
    listed = tuple(tuple(edits) for edits in given)
    if not listed:
        raise PlanError("a sweep needs variants: a list of edits, or of lists of edits")
    for edits in listed:
        for edit in edits:
            if not isinstance(edit, Edit):
                raise PlanError(f"a variant is edits, not {type(edit).__name__} {edit!r:.60}")
    return listed


class _Runner(Planner):
    """Carries a plan out."""

    def run(self, plan: SweepPlan, store: Store, progress: _Progress) -> Sweep:
        """All passes, text by text. What is done is kept, also when this is stopped."""
        clean = torch.zeros(len(self.tokens), dtype=store.values.dtype)
        try:
            for row in range(len(self.tokens)):
                clean[row] = self._text(row, plan, store, progress)
        finally:
            store.save()
        return Sweep(store.values, clean, store.moved, self.variants, self.score.name, plan)

    def _text(self, row: int, plan: SweepPlan, store: Store, progress: _Progress) -> Tensor:
        """All variants on one text; returns its score without edits."""
        text = self.tokens if len(self.tokens) == 1 and not self.tokens.padded else self.tokens.row(row)
        kind, passes, saved = store.values.dtype, plan.passes[row], time.monotonic()
        if passes:
            keep = any(one.start for one in passes)
            shared = clean_pass(self._engine(), self.model.atlas, self._inputs(text, 0, row), keep=keep)
            reference = self._seen(shared.logits[:, self._kept(0, row)]).to(kind)
        else:
            reference = self._seen(self.model.run(text, logits=self.scored[row]).logits.as_subclass(Tensor)).to(kind)
        for one in passes:
            for step, value, norm in self._climb(one, text, shared, row, reference):
                store.put(step.number, row, value, norm)
            progress.add(len(one.steps))
            if time.monotonic() - saved > SAVE_SECONDS:
                store.save()
                saved = time.monotonic()
        for number in plan.singles[row]:
            run = self.model.run(text, edits=self.single(number, row), logits=self.scored[row], allow_noop=True)
            logits = self._seen(run.logits.as_subclass(Tensor)).to(kind)
            store.put(
                number,
                row,
                float(self._score(logits, row, reference)[0]),
                sum(receipt.norm**2 for receipt in run.receipts) ** 0.5,
            )
            progress.add(1)
        return self._score(reference, row, reference)[0]

    def _engine(self) -> TorchEngine:
        engine = self.model.engine
        assert isinstance(engine, TorchEngine)
        return engine

    def _climb(
        self, one: Pass, text: Tokens, clean: Clean, row: int, reference: Tensor
    ) -> Iterable[tuple[Step, float, float]]:
        steps = one.steps
        try:
            program = Staircase(
                self._engine(), self.model.atlas, [step.edits for step in steps], [step.layer for step in steps]
            )
            rows = Rows([range(self.widths[row])], {}, self.widths[row])
            logits, moved = program.climb(self._inputs(text, one.start, row), rows, one.start, clean)
        except torch.OutOfMemoryError:
            if len(steps) == 1:
                raise
            half = len(steps) // 2
            for part in (steps[:half], steps[half:]):
                yield from self._climb(Pass(part, one.start), text, clean, row, reference)
            return
        scored = self._seen(logits[:, self._kept(one.start, row)]).to(reference.dtype)
        yield from zip(steps, self._score(scored, row, reference).tolist(), moved, strict=True)

    def _score(self, logits: Tensor, row: int, reference: Tensor) -> Tensor:
        clean = reference.expand_as(logits) if self.score.clean else None
        return self.score.rows(logits, row, clean).detach().cpu()

    def _inputs(self, text: Tokens, start: int, row: int) -> dict[str, Any]:
        """Inputs of the columns from `start` on."""
        device, width = self.model.device, self.widths[row]
        inputs: dict[str, Any] = {"input_ids": text.ids[:, start:width].to(device), "use_cache": False}
        if start:
            inputs["position_ids"] = torch.arange(start, width, device=device)[None]
        if self.model.keeps_logits:
            inputs["logits_to_keep"] = torch.tensor(self.scored[row], device=device) - start
        return inputs

    def _kept(self, start: int, row: int) -> slice | list[int]:
        """Where the scored logits are in what a pass returns."""
        return slice(None) if self.model.keeps_logits else [column - start for column in self.scored[row]]

    def _seen(self, logits: Tensor) -> Tensor:
        """Logits `[row pos d_vocab]` as the score takes them: one position has no axis."""
        return logits if self.score.span else logits[:, 0]
