"""One function vector from fixed trials, in one of two ways.

    replay   one full forward pass per prompt, and per trial, layer and head, as the published code: what two such runs
             give on one machine is equal to the bit
    sweep    only what an edit changes is run again

*By hand* is replay by the hooks of `plain` instead of this package's means, effects, vectors and injections: the same
bits from code that shares nothing with them, for the parity suite to hold them against.

Discrete results are the same, numbers within the tolerances of `parity`. What prompts answer with it: `answers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import runs

from ..effects import CLASSES, Head, average, gap, indirect_effects, top_heads
from ..means import BATCH, mean_head_activations
from ..prompts import Prompt
from ..rows import batches, digest
from ..vectors import FunctionVector, function_vector
from .fixed_run import FixedRun
from .plain import plain_effects, plain_means, plain_vector

By = Literal["replay", "sweep"]
Measure = Literal["probability", "logprob"]
MEASURES: tuple[Measure, ...] = ("probability", "logprob")
AT_ONCE: Mapping[By, int] = {"replay": 1, "sweep": 4}
"""Trials that are worked at together, by one of the processes at work on the run."""


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@dataclass(frozen=True)
class Extraction:
    """A function vector and what it was effects_of of.

    Attributes:
        mean: mean activations of heads on clean prompts.
        effects: indirect effects on corrupted prompts, in probability and in log-probability (nats).
        measure: which of them heads are ranked by.
        token_class: number of the class of tokens that they are ranked by.
        heads: those of largest AIE.
        vector: their sum.
        gap: AIE of the last of them minus that of the next head.
        by: how it was worked out.
    """

    mean: Float[Tensor, "layer head slot d_head"]
    effects: Mapping[Measure, Float[Tensor, "trial layer head *token_class"]]
    measure: Measure
    token_class: int
    heads: tuple[Head, ...]
    vector: FunctionVector
    gap: float
    by: By

    @property
    def known_gap(self) -> float | None:
        """`gap` as JSON has it; None if there is no next head."""
        return self.gap if self.gap != float("inf") else None

    def aie(self, measure: Measure | None = None) -> Float[Tensor, "layer head"]:
        """Mean effects over trials (None: in the measure that heads are ranked by)."""
        return average(self.effects[measure or self.measure], self.token_class)


def extract(
    model: ic.Model,
    run: FixedRun,
    *,
    by: By = "sweep",
    by_hand: bool = False,
    n_top_heads: int = 10,
    token_class_idx: int = -1,
    last_token_only: bool = True,
    measure: Measure = "probability",
    clock: Clock | None = None,
    record: runs.RunFolder | None = None,
) -> Extraction:
    """Means, effects, heads and vector.

    Args:
        by_hand: by the hooks of `plain`; for replay only.
        token_class_idx: class of tokens that heads are chosen by; all but the last one need all classes.
        last_token_only: effects of the last token alone, `[trial layer head]`; else of every class.
        measure: what heads are ranked by.
        record: an open run, whose processes share the trials if there are several.

    Raises:
        PlanError: a class that there is not, or that the last token alone does not have; more heads than there are.
        InterpError: means or effects that are not numbers.
    """
    clock = clock or Clock()
    if not -len(CLASSES) <= token_class_idx < len(CLASSES):
        raise ic.PlanError(f"token_class_idx is {token_class_idx}; classes are -1 and 0 to 9: {', '.join(CLASSES)}")
    if last_token_only and token_class_idx % len(CLASSES) != len(CLASSES) - 1:
        raise ic.PlanError(
            f"token_class_idx {token_class_idx} ({CLASSES[token_class_idx]}) needs effects of all classes: "
            "last_token_only=false"
        )
    if not 1 <= n_top_heads <= len(model.heads):
        raise ic.PlanError(f"n_top_heads is {n_top_heads}, this model has {len(model.heads)} heads")
    with clock("mean"):
        batch = 1 if by == "replay" else BATCH
        mean = plain_means(model, run.clean) if by_hand else mean_head_activations(model, run.clean, batch=batch)
    with clock("effects"):
        effects = _effects(model, run.corrupted, mean, by, by_hand, not last_token_only, record)
    for name, values in (("mean", mean.permute(2, 0, 1, 3)), *effects.items()):
        _demand_finite_heads(model, name, values)
    with clock("vector"):
        aie = average(effects[measure], token_class_idx)
        heads = top_heads(aie, n_top_heads)
        if by_hand:
            alone = plain_vector(model, mean, heads)
            vector = FunctionVector(alone, "resid", run.dataset_name, model.source, heads)
        else:
            vector = function_vector(model, mean, heads, task=run.dataset_name)
    return Extraction(mean, effects, measure, token_class_idx, heads, vector, gap(aie, n_top_heads), by)


def _effects(
    model: ic.Model, prompts: Sequence[Prompt], mean: Tensor, by: By, by_hand: bool, classes: bool,
    record: runs.RunFolder | None,
) -> dict[Measure, Tensor]:  # fmt: skip
    """Effects in both measures, some trials at a time."""

    def effects_of(numbers: Sequence[int]) -> Mapping[Any, Tensor]:
        part = [prompts[number] for number in numbers]
        if by_hand:
            return plain_effects(model, part, mean, classes=classes)
        effects = indirect_effects(model, part, mean, MEASURES, classes=classes, by=by)
        return {measure: effects[measure].effects for measure in MEASURES}

    if record is not None and record.shards is not None:
        kind = torch.float64 if model.dtype == torch.float64 else torch.float32
        return _shared_effects(record, effects_of, prompts, AT_ONCE[by], [by, by_hand, classes, digest(mean)], kind)
    parts = []
    with ic.Progress(f"{by}, trials", len(prompts), shown=record is not None) as told:
        for numbers in batches(range(len(prompts)), AT_ONCE[by]):
            parts.append(effects_of(numbers))
            told.add(len(numbers))
    return {measure: torch.cat([part[measure] for part in parts]) for measure in MEASURES}


def _shared_effects(
    record: runs.RunFolder, effects_of: Callable[[Sequence[int]], Mapping[Any, Tensor]], prompts: Sequence[Prompt],
    at_once: int, how: list[Any], kind: torch.dtype,
) -> dict[Measure, Tensor]:  # fmt: skip
    """The same in a run of several processes, of which each takes trials."""

    def rows(numbers: Sequence[int]) -> list[dict[str, Any]]:
        effects = effects_of(numbers)
        return [{measure: effects[measure][place].tolist() for measure in MEASURES} for place in range(len(numbers))]

    of_prompts = runs.digest([[prompt.ids, prompt.labels, prompt.target_ids] for prompt in prompts])
    listed = record.map(
        "effects", rows, range(len(prompts)), by=lambda number: number, inputs={"prompts": of_prompts, "how": how},
        batch=at_once, strict=True, file=False,
    )  # fmt: skip
    return {measure: torch.tensor([row[measure] for row in listed], dtype=kind) for measure in MEASURES}


def _demand_finite_heads(model: ic.Model, name: str, values: Tensor) -> None:
    """Values `[any layer head …]` are numbers in every head."""
    # only heads that there are: layers without are not a number by design
    for layer, head in model.heads:
        if not bool(values[:, layer, head].isfinite().all()):
            dtype = str(model.dtype).removeprefix("torch.")
            raise ic.InterpError(f"{name} of layer {layer}, head {head} is no number in {dtype}; load a wider dtype")
