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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .compiled import model_inputs
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
    scores: tuple[Score, ...],
    strategy: str,
    budget: int | None,
    out: str | Path | None,
    progress: bool,
) -> tuple[Sweep, ...]:
    """See `Model.sweep`, which has the defaults; one sweep per score, of the same passes."""
    tokens = model._fitting(model._input(x))
    listed = _listed(variants)
    if not scores:
        raise PlanError("a sweep needs a score: score.logprob(target), say")
    if strategy not in STRATEGIES:
        raise PlanError(f"no strategy {strategy!r}. {nearest(strategy, STRATEGIES)}")
    everything = tuple(edit for edits in listed for edit in edits)
    model.engine.compile(Plan((), everything), model.atlas)  # a wrong one is found before anything runs
    runner = _Runner(model, tokens, listed, scores, budget)
    kind = torch.float64 if model.dtype == torch.float64 else torch.float32
    key = key_of(model, tokens, listed, scores) if out is not None else ""
    store = Store(None if out is None else Path(out), key, (len(listed), len(tokens), len(scores)), kind)
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
    """Carries a plan out.

    Attributes:
        kept: the tokens whose logits are computed, ascending; None: all.
    """

    kept: Tensor | None = None

    def run(self, plan: SweepPlan, store: Store, progress: _Progress) -> tuple[Sweep, ...]:
        """All passes, text by text. What is done is kept, also when this is stopped."""
        clean = torch.zeros(len(self.tokens), len(self.scores), dtype=store.values.dtype)
        try:
            for row in range(len(self.tokens)):
                clean[row] = self._text(row, plan, store, progress)
        finally:
            store.save()
        parts = zip(store.values.unbind(-1), clean.unbind(-1), self.scores, strict=True)
        return tuple(Sweep(x, base, store.moved, self.variants, one.name, plan) for x, base, one in parts)

    def _text(self, row: int, plan: SweepPlan, store: Store, progress: _Progress) -> Tensor:
        """All variants on one text; returns its score without edits."""
        text = self.tokens if len(self.tokens) == 1 and not self.tokens.padded else self.tokens.row(row)
        kind, passes, saved = store.values.dtype, plan.passes[row], time.monotonic()
        with self._only_targets(row):
            if passes:
                keep = any(one.start for one in passes)
                shared = self._clean(text, row, keep=keep)
                reference = self._seen(shared.value, 0, row).to(kind)
            else:
                reference = self._alone(text, row, ())[0].to(kind)
            for one in passes:
                for step, value, norm in self._climb(one, text, shared, row, reference):
                    store.put(step.number, row, value, norm)
                progress.add(len(one.steps))
                if time.monotonic() - saved > SAVE_SECONDS:
                    store.save()
                    saved = time.monotonic()
            for number in plan.singles[row]:
                alone, norm = self._alone(text, row, self.single(number, row))
                store.put(number, row, self._score(alone.to(kind), row, reference)[0], norm)
                progress.add(1)
        return self._score(reference, row, reference)[0]

    def _alone(self, text: Tokens, row: int, edits: Sequence[Edit]) -> tuple[Tensor, float]:
        """One forward pass: what is scored, and the norm of what the edits changed."""
        read = self.site(row)
        reads, kept = ((), self.scored[row]) if read is None else ((read,), False)
        run = self.model.run(text, read=reads, edits=edits, logits=kept, allow_noop=True)
        moved = sum(receipt.norm**2 for receipt in run.receipts) ** 0.5
        if read is not None:
            return run[read].as_subclass(Tensor), moved
        logits = run.logits.as_subclass(Tensor)
        return logits if self.score.span else logits[:, 0], moved

    @contextmanager
    def _only_targets(self, row: int) -> Iterator[None]:
        """While a narrow score judges a text, only its targets' logits are computed."""
        self.kept, head = None, self.model.hf.get_output_embeddings()
        everything = any(edit.site.name == "logits" for edits in self.variants for edit in edits)
        plain = type(head) is nn.Linear and "forward" not in head.__dict__ and type(self.model.engine) is TorchEngine
        if not all(score.narrow for score in self.scores) or everything or not plain:
            yield
            return
        self.kept = torch.cat([score.ids(row) for score in self.scores]).unique()
        rows = self.kept.to(head.weight.device)
        weight, bias = head.weight[rows].detach(), None if head.bias is None else head.bias[rows].detach()
        head.__dict__["forward"] = lambda x: nn.functional.linear(x, weight, bias)
        try:
            yield
        finally:
            del head.__dict__["forward"]

    def _engine(self) -> TorchEngine:
        engine = self.model.engine
        assert isinstance(engine, TorchEngine)
        return engine

    def _clean(self, text: Tokens, row: int, *, keep: bool) -> Clean:
        with self.model.fresh():
            inputs, width = self._inputs(text, 0, row), self.widths[row]
            rows = Rows([range(width)], {}, width)
            return clean_pass(self._engine(), self.model.atlas, inputs, rows, self.site(row), keep=keep)

    def _climb(
        self, one: Pass, text: Tokens, clean: Clean, row: int, reference: Tensor
    ) -> Iterable[tuple[Step, Tensor, float]]:
        steps = one.steps
        try:
            edits, joins = [step.edits for step in steps], [step.layer for step in steps]
            program = Staircase(self._engine(), self.model.atlas, edits, joins, self.site(row))
            rows = Rows([range(self.widths[row])], {}, self.widths[row])
            with self.model.fresh():
                value, moved = program.climb(self._inputs(text, one.start, row), rows, one.start, clean)
        except torch.OutOfMemoryError:
            if len(steps) == 1:
                raise
            half = len(steps) // 2
            for part in (steps[:half], steps[half:]):
                yield from self._climb(Pass(part, one.start), text, clean, row, reference)
            return
        scored = self._seen(value, one.start, row).to(reference.dtype)
        yield from zip(steps, self._score(scored, row, reference), moved.tolist(), strict=True)

    def _score(self, value: Tensor, row: int, reference: Tensor) -> Tensor:
        """All scores `[row score]`."""
        clean = reference.expand_as(value)
        found = [one.rows(value, row, clean if one.clean else None, self.kept) for one in self.scores]
        return torch.stack([one.detach().cpu().to(reference.dtype) for one in found], -1)

    def _inputs(self, text: Tokens, start: int, row: int) -> dict[str, Any]:
        """Inputs of the columns from `start` on."""
        device, width = self.model.device, self.widths[row]
        inputs: dict[str, Any] = {"input_ids": text.ids[:, start:width].to(device)}
        if text.inputs:
            inputs = dict(model_inputs(self.model, text))
        inputs["use_cache"] = False
        if start:
            inputs["position_ids"] = torch.arange(start, width, device=device)[None]
        if self.model.keeps_logits:
            inputs["logits_to_keep"] = torch.tensor(self.scored[row], device=device) - start
        return inputs

    def _seen(self, value: Tensor, start: int, row: int) -> Tensor:
        """What a pass from `start` on gives, as the score takes it: an inner site's value, or logits
        `[row (pos) d_vocab]` at the scored positions."""
        if self.score.of is not None:
            return value
        if not self.model.keeps_logits:
            value = value[:, [column - start for column in self.scored[row]]]
        return value if self.score.span else value[:, 0]
