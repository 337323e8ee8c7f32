"""Carries a sweep's plan out: clean passes over texts, passes over their variants, forward passes of one variant.

Of texts with images the vision tower computes each image once, unless an edit lies inside of it; and of the unembedding
only the rows of the scores' targets are computed, where nothing else is looked at. Both stand in for the model's own
modules while a pass runs, and no longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import one_row, padded_on
from ..engines.program import LocalEngine
from ..engines.replace import replaced_forwards
from ..engines.tower import Tower
from ..errors import PlanError
from ..model_inputs import model_inputs
from ..positions import Rows
from ..progress import Progress
from ..readout import few_logits, is_plain
from ..run import forward
from ..score import Score
from ..session import Session
from ..sites import Edit
from ..text import Tokens
from .clean import CleanPass, clean_pass, runs_rows
from .plan import Group, Pass, Step, SweepPlan, described, image_spans
from .staircase import Staircase
from .store import SweepStore

SAVE_SECONDS = 10.0
"""How often what is done is written to the folder."""


class Runner:
    """Carries a plan out.

    Args:
        tokens, plan, scores: as they were planned; the scores with ids for targets (`SweepWork`).
        store: where scores go.
        tower: the vision tower, if it has computed images of these texts before.

    Raises:
        PlanError: the plan is for a model of other sizes, or in another dtype.

    Attributes:
        kept: the tokens whose logits are computed, ascending; None: all.
        standing: what modules compute instead while a pass runs.
    """

    def __init__(
        self,
        session: Session,
        tokens: Tokens,
        plan: SweepPlan,
        scores: Sequence[Score],
        store: SweepStore,
        tower: Tower | None = None,
    ) -> None:
        if plan.model != (this := described(session)):
            raise PlanError(f"this plan of a sweep is for {plan.model}, and the model is {this}: load that one")
        self.session, self.tokens, self.plan, self.scores, self.store = session, tokens, plan, scores, store
        shared = bool(tokens.inputs) and not plan.inside_tower
        self.tower = (tower or Tower(session.hf)) if shared else None
        self.kept: Tensor | None = None
        self.standing: Mapping[nn.Module, Callable[..., Any]] = {}

    def run(self, progress: Progress) -> None:
        """All passes, group by group. What is done is kept in the store, also when this is stopped."""
        try:
            for group in self.plan.groups:
                self._group(group, progress)
        finally:
            self.store.save()

    def _group(self, group: Group, progress: Progress) -> None:
        """All variants on some texts."""
        with self.session.turn:
            self._only_targets(group.texts)
        halves = []
        try:
            clean = self._clean(group) if group.passes else None
        except torch.OutOfMemoryError:
            if len(group.texts) == 1 or self.session.atlas.processes is not None:  # others have memory left
                raise
            half = len(group.texts) // 2
            halves = [_part(group, texts) for texts in (group.texts[:half], group.texts[half:])]
        for part in halves:  # outside of the handler, which holds what the failed pass held
            self._group(part, progress)
        if not halves:
            self._variants(group, clean, progress)

    def _variants(self, group: Group, clean: CleanPass | None, progress: Progress) -> None:
        saved = time.monotonic()
        references = self._references(group, clean)
        if clean is not None:
            for sweep_pass in group.passes:
                for row, numbers, values, norms in self._pass(sweep_pass, group, clean, references):
                    self.store.put(numbers, row, values, norms)
                progress.add(len(sweep_pass.steps))
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.store.save()
                    saved = time.monotonic()
        for row in group.texts:
            for single in self.plan.alone[row]:
                value, norm = self._alone(row, single.edits)
                scores = self._score(value.to(self.store.values.dtype), row, references[row])
                self.store.put([single.number], row, scores, torch.tensor([norm]))
                progress.add(1)

    def _references(self, group: Group, clean: CleanPass | None) -> dict[int, Tensor]:
        """What is scored of each text without edits; the scores of it go to the store."""
        references = {}
        for place, row in enumerate(group.texts):
            value = self._alone(row, ())[0] if clean is None else self._seen(clean.value[place : place + 1], row)
            references[row] = value.to(self.store.values.dtype)
            self.store.put_clean(row, self._score(references[row], row, references[row])[0])
        return references

    def _together(self, texts: Sequence[int]) -> Tokens:
        """Some texts with their images, filled up on the right, where causal attention does not see it."""
        rows = [one_row(self.tokens, text) for text in texts]
        return rows[0] if len(rows) == 1 else padded_on(Tokens.stack(rows), "right")[0]

    def _alone(self, row: int, edits: Sequence[Edit]) -> tuple[Tensor, float]:
        """One forward pass of a text: what is scored, and the norm of what the edits changed."""
        read, scored = self.plan.sites[row], self.plan.scored[row]
        reads, kept = ((), scored) if read is None else ((read,), False)
        text = one_row(self.tokens, row)
        with self._turn():
            run = forward(self.session, text, read=reads, edits=edits, logits=kept, allow_noop=True)
        moved = sum(receipt.norm**2 for receipt in run.receipts) ** 0.5
        return self._seen((run.logits if read is None else run[read]).as_subclass(Tensor), row), moved

    def _only_targets(self, texts: Sequence[int]) -> None:
        """While scores that look at their targets alone judge some texts, only these logits are computed."""
        self.kept, head = None, self.session.hf.get_output_embeddings()
        self.standing = standing = {} if self.tower is None else dict(self.tower.forwards())
        if not (self.plan.targets_only and is_plain(head) and runs_rows(self.session.engine)):
            return
        self.kept = torch.cat([score.ids(row) for score in self.scores for row in texts]).unique()
        standing[head] = few_logits(head, self.kept)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """For one pass: alone with the model, only what is scored computed. Scores are worked out outside of it."""
        with self.session.turn, replaced_forwards(self.standing):
            yield

    def _engine(self) -> LocalEngine:
        engine = self.session.engine
        assert runs_rows(engine), "a plan with passes of many rows is for engines that run them"
        return engine

    def _clean(self, group: Group) -> CleanPass:
        """One pass over the texts, with what the passes over their variants need of it."""
        starts, columns = [0] * len(group.texts), [self.plan.scored[text] for text in group.texts]
        steps = [(step, sweep_pass.columns) for sweep_pass in group.passes for step in sweep_pass.steps]
        keep = any(count < self.plan.lengths[step.text] for step, count in steps)
        rows = Rows([range(group.width)] * len(group.texts), {}, group.width)
        read, images = self.plan.sites[group.texts[0]], bool(self.tokens.inputs)
        with self._turn(), self.session.fresh(), self._only_scored(columns) as scored:
            if images:
                inputs = {**model_inputs(self.session, self._together(group.texts)), **self.session.without_cache}
            else:
                inputs = self._inputs(group.texts, starts, group.width)
            wanted = scored if read is None else None
            engine, atlas = self._engine(), self.session.atlas
            return clean_pass(engine, atlas, inputs, rows, read, keep=keep, scored=wanted, images=images)

    def _pass(
        self, sweep_pass: Pass, group: Group, clean: CleanPass, references: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, list[int], Tensor, Tensor]]:
        """Text by text its number and those of its variants, their scores `[variant score]` in a pass, and norms of
        what they changed."""
        steps, texts = sweep_pass.steps, sorted({step.text for step in sweep_pass.steps})
        try:
            value, moved = self._stairs(steps, texts, sweep_pass.columns, group, clean)
        except torch.OutOfMemoryError:
            if len(steps) == 1 or self.session.atlas.processes is not None:
                raise
            half = len(steps) // 2
            for part in (steps[:half], steps[half:]):
                yield from self._pass(Pass(part, sweep_pass.columns), group, clean, references)
            return
        for text in texts:
            rows = [row for row, step in enumerate(steps) if step.text == text]
            scored = self._seen(value if len(texts) == 1 else value[rows], text).to(references[text].dtype)
            yield text, [steps[row].number for row in rows], self._score(scored, text, references[text]), moved[rows]

    def _stairs(
        self, steps: Sequence[Step], texts: list[int], columns: int, group: Group, clean: CleanPass
    ) -> tuple[Tensor, Tensor]:
        """One pass over many variants: what is scored of each row, and the norm of what its edits changed."""
        plan, row_texts = self.plan, [texts.index(step.text) for step in steps]
        edits, start_layers = [step.edits for step in steps], [step.layer for step in steps]
        read, each = plan.sites[group.texts[0]], plan.row_of_inputs_for_each
        starts, within = [plan.lengths[text] - columns for text in texts], [*map(group.texts.index, texts)]
        scored_columns = [
            [column - starts[place] for column in plan.scored[step.text]]
            for step, place in zip(steps, row_texts, strict=True)
        ]
        with self._turn(), self.session.fresh(), self._only_scored(scored_columns) as scored:
            engine, atlas = self._engine(), self.session.atlas
            program = Staircase(engine, atlas, edits, start_layers, row_texts, read, each=each)
            last = scored if self.tokens.inputs and read is None and plan.leaves_last else None
            return program.run(self._inputs(texts, starts, columns), starts, columns, clean, within, last)

    def _score(self, value: Tensor, row: int, reference: Tensor) -> Tensor:
        """All scores `[row score]`."""
        clean = reference.expand_as(value)
        columns = [score.rows(value, row, clean if score.needs_clean else None, self.kept) for score in self.scores]
        return torch.stack([column.detach().cpu().to(reference.dtype) for column in columns], -1)

    def _inputs(self, texts: Sequence[int], starts: Sequence[int], columns: int) -> dict[str, Any]:
        """Inputs of so many columns of each text from its start on, filled up on the right where a text has fewer."""
        device = self.session.device
        ids = torch.zeros(len(texts), columns, dtype=torch.long)
        for row, text, start in zip(ids, texts, starts, strict=True):
            stop = min(start + columns, self.plan.lengths[text])
            real = self.tokens.ids[text][self.tokens.mask[text]][start:stop]
            row[: len(real)] = real
            for span in image_spans(self.tokens, text):  # what the tower handed over is in the clean pass' streams
                row[max(span.start - start, 0) : max(span.stop - start, 0)] = 0
        inputs: dict[str, Any] = {"input_ids": ids.to(device), **self.session.without_cache}
        if any(starts) and not self.tokens.inputs:
            first = torch.tensor(starts) + self.session.first_position
            inputs["position_ids"] = (first[:, None] + torch.arange(columns)).to(device)
        return inputs

    @contextmanager
    def _only_scored(self, columns: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Of each row only the scored columns reach the unembedding, the last one again where a row has fewer: gives
        them `[row scored]`."""
        most = max(map(len, columns))
        table = torch.tensor([[*row, *[row[-1]] * (most - len(row))] for row in columns])
        rows = torch.arange(len(table))[:, None]
        head = self.session.hf.get_output_embeddings()
        # At its input, so that the head computes no other logits at all.
        handle = head.register_forward_pre_hook(lambda _, args: (args[0][rows, table], *args[1:]))
        try:
            yield table
        finally:
            handle.remove()

    def _seen(self, value: Tensor, text: int) -> Tensor:
        """What a pass gives of a text, as the scores take it."""
        return self.scores[0].seen(value, len(self.plan.scored[text]))


def _part(group: Group, texts: tuple[int, ...]) -> Group:
    """Some texts of a group, with their part of its passes."""
    passes = [
        Pass(tuple(step for step in sweep_pass.steps if step.text in texts), sweep_pass.columns)
        for sweep_pass in group.passes
    ]
    return Group(texts, group.width, [sweep_pass for sweep_pass in passes if sweep_pass.steps])
