"""Carries a sweep's plan out: clean passes over texts, passes over their variants, forward passes of one variant."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import one_row, padded_on
from ..engines.replace import replaced_forwards
from ..engines.torch import TorchEngine
from ..engines.tower import Tower
from ..model_inputs import model_inputs
from ..positions import Rows
from ..progress import Progress
from ..readout import is_plain
from ..run import forward
from ..sites import Edit
from ..text import Tokens
from .clean import CleanPass, clean_pass
from .plan import EACH, Group, Pass, Planner, SweepPlan
from .staircase import Staircase
from .store import SweepStore

SAVE_SECONDS = 10.0
"""How often what is done is written to the folder."""


class Runner(Planner):
    """Carries a plan out.

    Attributes:
        kept: the tokens whose logits are computed, ascending; None: all.
        tower: the vision tower, where texts have images and no edit lies inside of it.
        standing: what modules compute instead while a pass runs.
    """

    kept: Tensor | None = None
    tower: Tower | None = None
    standing: Mapping[nn.Module, Callable[..., Any]] = {}

    def run(self, plan: SweepPlan, store: SweepStore, progress: Progress) -> Tensor:
        """All passes, group by group; gives scores without edits `[batch score]`. What is done is kept in the store,
        also when this is stopped."""
        clean = torch.zeros(len(self.tokens), len(self.scores), dtype=store.values.dtype)
        try:
            for group in plan.groups:
                self._group(group, plan, store, progress, clean)
        finally:
            store.save()
        return clean

    def _group(self, group: Group, plan: SweepPlan, store: SweepStore, progress: Progress, clean: Tensor) -> None:
        """All variants on some texts; their scores without edits go to `clean`."""
        with self.model.turn:
            self._only_targets(group.texts)
        parts = []
        try:
            shared = self._clean(group) if group.passes else None
        except torch.OutOfMemoryError:
            if len(group.texts) == 1:
                raise
            half = len(group.texts) // 2
            parts = [_part(group, texts) for texts in (group.texts[:half], group.texts[half:])]
        for part in parts:  # outside of the handler, which holds what the failed pass held
            self._group(part, plan, store, progress, clean)
        if not parts:
            self._variants(group, shared, plan, store, progress, clean)

    def _variants(
        self,
        group: Group,
        shared: CleanPass | None,
        plan: SweepPlan,
        store: SweepStore,
        progress: Progress,
        clean: Tensor,
    ) -> None:
        saved, references = time.monotonic(), {}
        for place, row in enumerate(group.texts):
            if shared is None:
                value = self._alone(one_row(self.tokens, row), row, ())[0]
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
                alone, norm = self._alone(one_row(self.tokens, row), row, self.single(number, row))
                values = self._score(alone.to(clean.dtype), row, references[row])
                store.put([number], row, values, torch.tensor([norm]))
                progress.add(1)

    def _together(self, texts: Sequence[int]) -> Tokens:
        """Some texts with their images, filled up on the right, where causal attention does not see it."""
        rows = [one_row(self.tokens, text) for text in texts]
        return rows[0] if len(rows) == 1 else padded_on(Tokens.stack(rows), "right")[0]

    def _alone(self, text: Tokens, row: int, edits: Sequence[Edit]) -> tuple[Tensor, float]:
        """One forward pass: what is scored, and the norm of what the edits changed."""
        read = self.site(row)
        reads, kept = ((), self.scored[row]) if read is None else ((read,), False)
        with self._turn():
            run = forward(self.model, text, read=reads, edits=edits, logits=kept, allow_noop=True)
        moved = sum(receipt.norm**2 for receipt in run.receipts) ** 0.5
        if read is not None:
            return run[read].as_subclass(Tensor), moved
        logits = run.logits.as_subclass(Tensor)
        return logits if self.score.span else logits[:, 0], moved

    def _only_targets(self, texts: Sequence[int]) -> None:
        """While narrow scores judge some texts, only their targets' logits are computed."""
        self.kept, head = None, self.model.hf.get_output_embeddings()
        self.standing = standing = {} if self.tower is None else dict(self.tower.forwards())
        everything = any(edit.site.name == "logits" for edits in self.variants for edit in edits)
        plain = is_plain(head) and type(self.model.engine) is TorchEngine
        if not all(score.narrow for score in self.scores) or everything or not plain:
            return
        self.kept = torch.cat([score.ids(row) for score in self.scores for row in texts]).unique()
        rows = self.kept.to(head.weight.device)
        weight, bias = head.weight[rows].detach(), None if head.bias is None else head.bias[rows].detach()
        standing[head] = lambda x: nn.functional.linear(x, weight, bias)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """For one pass: alone with the model, only what is scored computed. Scores are worked out outside of it."""
        with self.model.turn, replaced_forwards(self.standing):
            yield

    def _engine(self) -> TorchEngine:
        engine = self.model.engine
        assert isinstance(engine, TorchEngine)
        return engine

    def _clean(self, group: Group) -> CleanPass:
        """One pass over the texts, with what the passes over their variants need of it."""
        starts, columns = [0] * len(group.texts), [self.scored[text] for text in group.texts]
        keep = any(one.columns < self.widths[step.text] for one in group.passes for step in one.steps)
        rows = Rows([range(group.width)] * len(group.texts), {}, group.width)
        read = self.site(group.texts[0])
        with self._turn(), self.model.fresh(), self._only_scored(columns) as scored:
            if self.tokens.inputs:
                inputs = {**model_inputs(self.model, self._together(group.texts)), "use_cache": False}
            else:
                inputs = self._inputs(group.texts, starts, group.width)
            wanted = scored if read is None else None
            images = bool(self.tokens.inputs)
            return clean_pass(
                self._engine(), self.model.atlas, inputs, rows, read, keep=keep, scored=wanted, images=images
            )

    def _climb(
        self, one: Pass, group: Group, clean: CleanPass, references: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, list[int], Tensor, Tensor]]:
        """Text by text its number and those of its variants, their scores `[variant score]` in a pass, and norms of
        what they changed."""
        steps, own = one.steps, sorted({step.text for step in one.steps})
        place = {text: number for number, text in enumerate(own)}
        try:
            edits, start_layers, texts = zip(
                *((step.edits, step.layer, place[step.text]) for step in steps), strict=True
            )
            read, each = self.site(group.texts[0]), EACH in self.model.tried
            starts, within = [self.widths[text] - one.columns for text in own], [*map(group.texts.index, own)]
            columns = [[column - starts[place[step.text]] for column in self.scored[step.text]] for step in steps]
            with self._turn(), self.model.fresh(), self._only_scored(columns) as scored:
                program = Staircase(self._engine(), self.model.atlas, edits, start_layers, texts, read, each=each)
                inputs = self._inputs(own, starts, one.columns)
                last = scored if self.tokens.inputs and read is None and self._leaves_last else None
                value, moved = program.run(inputs, starts, one.columns, clean, within, last)
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
        ids = torch.zeros(len(texts), columns, dtype=torch.long)
        for own, text, start in zip(ids, texts, starts, strict=True):
            found = self.tokens.ids[text][self.tokens.mask[text]][start : min(start + columns, self.widths[text])]
            own[: len(found)] = found
            for run in self._images(text):  # what the tower handed over is in the clean pass' streams
                own[max(run.start - start, 0) : max(run.stop - start, 0)] = 0
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
        if any(starts) and not self.tokens.inputs:
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


def _part(group: Group, texts: tuple[int, ...]) -> Group:
    """Some texts of a group, with their part of its passes."""
    passes = [Pass(tuple(step for step in one.steps if step.text in texts), one.columns) for one in group.passes]
    return Group(texts, group.width, [one for one in passes if one.steps])
