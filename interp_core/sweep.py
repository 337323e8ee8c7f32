"""Sweeps: many variants of a text, each with something else changed, for the price of what they change.

For a text of n tokens and L layers, one full forward pass costs n × L token-layers. A variant whose edits first touch
layer l and column c differs from the clean pass only in layers from l on and columns from c on, so it costs
(n - c) × (L - l), and the clean pass is paid once:

    cost = n × L + sum over variants of (n - c) × (L - l)         against        variants × n × L

Variants that run equally many columns go together in passes of many rows, also those of several texts of about one
length, each row joining at its layer (`engines/staircase.py`). Numbers equal those of one full forward pass per
variant, up to rounding: this is tried on the model itself before the first sweep, and where it does not hold a coarser
strategy takes over and says why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .compiled import model_inputs
from .edits import TENSOR_OPS, Edit
from .engines.staircase import Clean, Staircase, clean_pass, standing_in
from .engines.torch import TorchEngine
from .errors import PlanError, nearest, several, wrong
from .plan import Plan
from .positions import Rows
from .score import Score
from .sites import Site
from .sweep_plan import EACH, STRATEGIES, Group, Pass, Planner, SweepPlan, named_edits
from .sweep_store import Store, key_of
from .sweep_trial import choose
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


def checked(
    variants: Any, score: Any, memory_budget: Any, out: Any, d_vocab: int
) -> tuple[tuple[Variant, ...], tuple[Score, ...]]:
    """Variants and scores as they were given to `Model.sweep`, if all its arguments are of their kinds.

    Raises:
        PlanError: naming the first that is not.
    """
    listed = several("variants", "edits, or lists of edits", variants, PlanError)
    for item in listed:
        if isinstance(item, Tensor) or not isinstance(item, (Edit, Site, Iterable)):
            raise PlanError(wrong("a variant", "edits", item))
    if memory_budget is not None and (isinstance(memory_budget, bool) or not isinstance(memory_budget, int)):
        raise PlanError(wrong("memory_budget=", "a number of bytes", memory_budget))
    if out is not None and not isinstance(out, (str, Path)):
        raise PlanError(wrong("out=", "a folder", out))
    scores = (score,) if isinstance(score, Score) else several("score=", "a score, or several", score, PlanError)
    for item in scores:
        if not isinstance(item, Score):
            raise PlanError(wrong("score=", "a score such as ic.score.logprob(target), or several", item))
        item.fits(d_vocab)
    return listed, scores


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
    with model.turn:  # a wrong one is found before anything runs
        model.engine.compile(Plan((), tuple(edit for edits in listed for edit in edits)), model.atlas)
        for edits in {tuple(map(_kind, edits)): edits for edits in listed}.values():
            model.engine.compile(Plan((), edits), model.atlas).check(tokens.rows, edits)
    runner = _Runner(model, tokens, listed, scores, budget)
    kind = torch.float64 if model.dtype == torch.float64 else torch.float32
    key = key_of(model, tokens, listed, scores) if out is not None else {}
    store = Store(None if out is None else Path(out), key, (len(listed), len(tokens), len(scores)), kind)
    chosen, why, trial = choose(model, tokens, strategy)
    plan = runner.plan(chosen, why, store.done)
    plan.trial = trial
    return runner.run(plan, store, _Progress(progress, int((~store.done).sum())))


def _kind(edit: Edit) -> tuple[Any, ...]:
    """Equal for edits of which one fits a batch if the other does."""
    site, units = edit.site, edit.site.units
    shape = (edit.value.shape, edit.value.dtype) if edit.op in TENSOR_OPS else edit.value if edit.op == "mask" else None
    return site.name, site.layers, "one" if isinstance(units, int) else units, site.pos, site.key, edit.op, shape


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
        standing: what modules compute instead while a pass runs.
    """

    kept: Tensor | None = None
    standing: Mapping[nn.Module, Callable[..., Any]] = {}

    def run(self, plan: SweepPlan, store: Store, progress: _Progress) -> tuple[Sweep, ...]:
        """All passes, group by group. What is done is kept, also when this is stopped."""
        clean = torch.zeros(len(self.tokens), len(self.scores), dtype=store.values.dtype)
        try:
            for group in plan.groups:
                self._group(group, plan, store, progress, clean)
        finally:
            store.save()
        parts = zip(store.values.unbind(-1), clean.unbind(-1), self.scores, strict=True)
        return tuple(Sweep(x, base, store.moved, self.variants, one.name, plan) for x, base, one in parts)

    def _group(self, group: Group, plan: SweepPlan, store: Store, progress: _Progress, clean: Tensor) -> None:
        """All variants on some texts; their scores without edits go to `clean`."""
        try:
            with self.model.turn:
                self._only_targets(group.texts)
            shared = self._clean(group) if group.passes else None
            self._variants(group, shared, plan, store, progress, clean)
        except _TooMany:
            half = len(group.texts) // 2
            for texts in (group.texts[:half], group.texts[half:]):
                self._group(_part(group, texts), plan, store, progress, clean)

    def _variants(
        self, group: Group, shared: Clean | None, plan: SweepPlan, store: Store, progress: _Progress, clean: Tensor
    ) -> None:
        saved, references = time.monotonic(), {}
        for place, row in enumerate(group.texts):
            if shared is None:
                value = self._alone(self._row(row), row, ())[0]
            else:
                value = self._seen(shared.value[place : place + 1], row)
            references[row] = value.to(clean.dtype)
            clean[row] = self._score(references[row], row, references[row])[0]
        for one in group.passes:
            assert shared is not None
            for row, numbers, values, norms in self._climb(one, group, shared, references):
                store.put(numbers, row, values, norms)
            progress.add(len(one.steps))
            if time.monotonic() - saved > SAVE_SECONDS:
                store.save()
                saved = time.monotonic()
        for row in group.texts:
            for number in plan.singles[row]:
                alone, norm = self._alone(self._row(row), row, self.single(number, row))
                values = self._score(alone.to(clean.dtype), row, references[row])
                store.put([number], row, values, torch.tensor([norm]))
                progress.add(1)

    def _row(self, row: int) -> Tokens:
        """One text."""
        return self.tokens if len(self.tokens) == 1 and not self.tokens.padded else self.tokens.row(row)

    def _alone(self, text: Tokens, row: int, edits: Sequence[Edit]) -> tuple[Tensor, float]:
        """One forward pass: what is scored, and the norm of what the edits changed."""
        read = self.site(row)
        reads, kept = ((), self.scored[row]) if read is None else ((read,), False)
        with self._turn():
            run = self.model.run(text, read=reads, edits=edits, logits=kept, allow_noop=True)
        moved = sum(receipt.norm**2 for receipt in run.receipts) ** 0.5
        if read is not None:
            return run[read].as_subclass(Tensor), moved
        logits = run.logits.as_subclass(Tensor)
        return logits if self.score.span else logits[:, 0], moved

    def _only_targets(self, texts: Sequence[int]) -> None:
        """While narrow scores judge some texts, only their targets' logits are computed."""
        self.kept, self.standing, head = None, {}, self.model.hf.get_output_embeddings()
        everything = any(edit.site.name == "logits" for edits in self.variants for edit in edits)
        plain = type(head) is nn.Linear and "forward" not in head.__dict__ and type(self.model.engine) is TorchEngine
        if not all(score.narrow for score in self.scores) or everything or not plain:
            return
        self.kept = torch.cat([score.ids(row) for score in self.scores for row in texts]).unique()
        rows = self.kept.to(head.weight.device)
        weight, bias = head.weight[rows].detach(), None if head.bias is None else head.bias[rows].detach()
        self.standing = {head: lambda x: nn.functional.linear(x, weight, bias)}

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """For one pass: alone with the model, only what is scored computed. Scores are worked out outside of it."""
        with self.model.turn, standing_in(self.standing):
            yield

    def _engine(self) -> TorchEngine:
        engine = self.model.engine
        assert isinstance(engine, TorchEngine)
        return engine

    def _clean(self, group: Group) -> Clean:
        """One pass over the texts, with what the passes over their variants need of it."""
        starts, columns = [0] * len(group.texts), [self.scored[text] for text in group.texts]
        keep = any(one.columns < self.widths[step.text] for one in group.passes for step in one.steps)
        rows = Rows([range(group.width)] * len(group.texts), {}, group.width)
        read = self.site(group.texts[0])
        with self._turn(), self.model.fresh(), self._only_scored(columns) as scored:
            inputs = self._inputs(group.texts, starts, group.width)
            wanted = scored if read is None else None
            try:
                return clean_pass(self._engine(), self.model.atlas, inputs, rows, read, keep=keep, scored=wanted)
            except torch.OutOfMemoryError:
                if len(group.texts) == 1:
                    raise
                raise _TooMany from None

    def _climb(
        self, one: Pass, group: Group, clean: Clean, references: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, list[int], Tensor, Tensor]]:
        """Text by text its number and those of its variants, their scores `[variant score]` in a pass, and norms of
        what they changed."""
        steps, own = one.steps, sorted({step.text for step in one.steps})
        place = {text: number for number, text in enumerate(own)}
        try:
            edits, joins, texts = zip(*((step.edits, step.layer, place[step.text]) for step in steps), strict=True)
            read, each = self.site(group.texts[0]), EACH in self.model.tried
            starts, within = [self.widths[text] - one.columns for text in own], [*map(group.texts.index, own)]
            columns = [[column - starts[place[step.text]] for column in self.scored[step.text]] for step in steps]
            with self._turn(), self.model.fresh(), self._only_scored(columns):
                program = Staircase(self._engine(), self.model.atlas, edits, joins, texts, read, each=each)
                inputs = self._inputs(own, starts, one.columns)
                value, moved = program.climb(inputs, starts, one.columns, clean, within)
        except torch.OutOfMemoryError:
            if len(steps) == 1:
                raise
            half = len(steps) // 2
            for part in (steps[:half], steps[half:]):
                yield from self._climb(Pass(part, one.columns), group, clean, references)
            return
        for text in own:
            rows = [row for row, step in enumerate(steps) if step.text == text]
            scored = self._seen(value if len(own) == 1 else value[rows], text).to(references[text].dtype)
            yield text, [steps[row].number for row in rows], self._score(scored, text, references[text]), moved[rows]

    def _score(self, value: Tensor, row: int, reference: Tensor) -> Tensor:
        """All scores `[row score]`."""
        clean = reference.expand_as(value)
        found = [one.rows(value, row, clean if one.clean else None, self.kept) for one in self.scores]
        return torch.stack([one.detach().cpu().to(reference.dtype) for one in found], -1)

    def _inputs(self, texts: Sequence[int], starts: Sequence[int], columns: int) -> dict[str, Any]:
        """Inputs of so many columns of each text from its start on, filled up on the right where a text has fewer."""
        device = self.model.device
        if self.tokens.inputs:
            return {**model_inputs(self.model, self.tokens), "use_cache": False}
        ids = torch.zeros(len(texts), columns, dtype=torch.long)
        for own, text, start in zip(ids, texts, starts, strict=True):
            found = self.tokens.ids[text][self.tokens.mask[text]][start : min(start + columns, self.widths[text])]
            own[: len(found)] = found
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
        if any(starts):
            inputs["position_ids"] = (torch.tensor(starts)[:, None] + torch.arange(columns)).to(device)
        return inputs

    @contextmanager
    def _only_scored(self, columns: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Of each row only the scored columns reach the unembedding, the last one again where a row has fewer: gives
        them `[row scored]`."""
        most = max(map(len, columns))
        table = torch.tensor([[*row, *[row[-1]] * (most - len(row))] for row in columns])
        rows = torch.arange(len(table))[:, None]
        head = self.model.hf.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: (args[0][rows, table], *args[1:]))
        try:
            yield table
        finally:
            handle.remove()

    def _seen(self, value: Tensor, text: int) -> Tensor:
        """What a pass gives of a text, as the score takes it: an inner site's value, or logits `[row (pos) d_vocab]` at
        the scored positions."""
        if self.score.of is not None:
            return value
        return value[:, : len(self.scored[text])] if self.score.span else value[:, 0]


class _TooMany(Exception):
    """Memory ran out for the texts of a group together."""


def _part(group: Group, texts: tuple[int, ...]) -> Group:
    """Some texts of a group, with their part of its passes."""
    passes = [Pass(tuple(step for step in one.steps if step.text in texts), one.columns) for one in group.passes]
    return Group(texts, group.width, [one for one in passes if one.steps])
