"""A run's price: its passes, the model's sizes and the machine's numbers, put together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..cost import Cost, Passes, Work
from ..errors import PlanError
from .devices import Rate
from .formulas import activations, cache, flops, weights_read
from .outline import Outline

HOUR = 3600.0
MOST = 1 << 22
"""Batches and contexts are looked for up to here."""


@dataclass(frozen=True)
class Memory:
    """Bytes that the fullest device of a copy needs.

    Attributes:
        weights: of its layers, and of the embeddings or the unembedding.
        activations: at the widest moment, the gradients' graph among them.
        cache: keys and values.
        kept: what is read from the passes of a batch.
    """

    weights: int
    activations: int
    cache: int
    kept: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.cache + self.kept


@dataclass(frozen=True)
class RunPlan:
    """What a run costs, and where it fits.

    Attributes:
        name: of the method or recipe.
        declared: whether it says its cost; else one forward pass per prompt was priced.
        outline, work: the model and the prompts.
        cost: what is run.
        gpus: devices that there are.
        gpu_memory: bytes of each (None: not said).
        rate: what each reaches (None: not said).
        again: the cost of other work.
    """

    name: str
    declared: bool
    outline: Outline
    work: Work
    cost: Cost
    gpus: int
    gpu_memory: float | None
    rate: Rate | None
    again: Callable[[Work], Cost]

    @cached_property
    def forward(self) -> int:
        """Operations of forward passes."""
        return sum(flops(self.outline, each).forward for each in self.cost.passes)

    @cached_property
    def backward(self) -> int:
        """Operations of backward passes."""
        return sum(flops(self.outline, each).backward for each in self.cost.passes)

    @cached_property
    def weights_read(self) -> int:
        """Bytes of weights that are read."""
        return sum(weights_read(self.outline, each) for each in self.cost.passes)

    @cached_property
    def cache_read(self) -> int:
        """Bytes of keys and values that generation reads: half of the last cache per token, on average, and the rest
        of the prompt's."""
        return sum(
            each.columns * each.calls // max(each.columns, 1) * cache(self.outline, _halfway(each))
            for each in self.cost.passes
            if each.generated
        )

    @cached_property
    def per_copy(self) -> int:
        """Devices of a copy of the model: those of the processes that share it; else the fewest on which it fits, all
        where none do or memory is not said."""
        if self.outline.tp > 1:
            return self.outline.tp
        if self.gpu_memory is None:
            return 1
        return next((count for count in range(1, self.gpus + 1) if self._fits(self.work, self.cost, count)), self.gpus)

    @property
    def fits(self) -> bool | None:
        """Whether a copy fits on the devices; None where their memory is not said."""
        return None if self.gpu_memory is None else self._fits(self.work, self.cost, self.per_copy)

    @cached_property
    def needed(self) -> int | None:
        """Devices of this memory that a copy would take; None: it does not fit on any number of them."""
        most = len(self.outline.layers)
        if self.outline.tp > 1:
            return self.per_copy if self.fits else None
        return next((count for count in range(1, most + 1) if self._fits(self.work, self.cost, count)), None)

    @property
    def copies(self) -> int:
        """Copies of the model that run at a time."""
        return max(self.gpus // self.per_copy, 1)

    @property
    def memory(self) -> Memory:
        """Of the fullest device of a copy."""
        return self._memory(self.work, self.cost, self.per_copy)

    def _memory(self, work: Work, cost: Cost, count: int) -> Memory:
        if self.outline.part is not None:
            return memory(self.outline.part, work, cost, 1)
        return memory(self.outline, work, cost, count)

    @property
    def seconds(self) -> float | None:
        """Wall time of all copies together; None without a rate."""
        if self.rate is None:
            return None
        computing = (self.forward + self.backward + self.cost.beside) / self.rate.flops
        reading = (self.weights_read + self.cache_read) / self.rate.bandwidth if self.rate.bandwidth else 0.0
        return max(computing, reading) / (self.copies * self.outline.tp)  # processes that share a model work together

    @property
    def shards(self) -> int:
        """Proposed: as many as there are copies, or so many times more that a shard takes an hour at most; no more than
        prompts."""
        times = 1 if self.seconds is None else math.ceil(self.seconds / HOUR)
        return min(self.copies * max(times, 1), self.work.prompts)

    @cached_property
    def largest_batch(self) -> int | None:
        """Prompts that fit together; 0: not even one."""
        return self._largest(lambda size: replace(self.work, batch=size, prompts=max(size, self.work.prompts)))

    @cached_property
    def longest_context(self) -> int | None:
        """Tokens of a prompt that fit, with the batch as it is, up to what the model takes; 0: none do."""
        longest = (self.outline.n_ctx or MOST) - max(self.work.new_tokens - 1, 0)

        def of(size: int) -> Work:
            target = min(self.work.target, size - 1)
            return replace(self.work, tokens=size, target=target, visual=min(self.work.visual, size - target - 1))

        return self._largest(of, longest)

    def _largest(self, changed: Callable[[int], Work], most: int = MOST) -> int | None:
        if self.gpu_memory is None:
            return None
        low, high = 0, 1
        while high <= most and self._fits_at(changed(high)):
            low, high = high, 2 * high
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits_at(changed(middle)) else (low, middle)
        return low

    def _fits_at(self, work: Work) -> bool:
        return self._fits(work, self.again(work), self.per_copy)

    def _fits(self, work: Work, cost: Cost, count: int) -> bool:
        return self.gpu_memory is not None and self._memory(work, cost, count).total <= self.gpu_memory

    def to_dict(self) -> dict[str, Any]:
        """As plain data; bytes, operations and seconds as they are."""
        taken, rate = self.memory, self.rate
        return {
            "name": self.name, "declares_its_cost": self.declared, "model": self.outline.source,
            "family": self.outline.family, "parameters": self.outline.held, "dtype": self.outline.dtype,
            "tp": self.outline.tp,
            "prompts": self.work.prompts, "tokens": self.work.tokens, "target": self.work.target,
            "new_tokens": self.work.new_tokens, "batch": self.work.batch, "calls": self.cost.calls,
            "token_layers": {"forward": self.cost.forward, "backward": self.cost.backward},
            "generated": self.cost.generated, "read_out": self.cost.read_out,
            "flops": {"forward": self.forward, "backward": self.backward, "beside": self.cost.beside},
            "bytes": {"weights_read": self.weights_read, "cache_read": self.cache_read, "kept": self.cost.kept},
            "memory_per_device": {**vars(taken), "total": taken.total},
            "devices": {"there": self.gpus, "memory": self.gpu_memory, "per_copy": self.per_copy,
                        "copies": self.copies, "fits": self.fits, "needed": self.needed if self.gpu_memory else None},
            "rate": None if rate is None else {"said": rate.said, "flops": rate.flops, "bandwidth": rate.bandwidth},
            "seconds": self.seconds, "shards": self.shards, "largest_batch": self.largest_batch,
            "longest_context": self.longest_context, "not_counted": list(self.outline.notes),
            "assumes": list(self.cost.assumes),
        }  # fmt: skip


def plan(
    name: str,
    outline: Outline,
    work: Work,
    cost: Callable[[Work], Cost | None],
    *,
    gpus: int = 1,
    gpu_memory: float | None = None,
    rate: Rate | None = None,
) -> RunPlan:
    """The price of a run.

    Args:
        name: what is run.
        cost: what it runs, of work; None: it does not say, and one forward pass per prompt is priced.
        gpus, gpu_memory: devices, and bytes of each.

    Raises:
        PlanError: no devices, texts longer than the model takes, or memory that does not hold one layer.
    """
    if gpus < 1:
        raise PlanError(f"gpus is {gpus}: give 1 at least")
    if gpus < outline.tp:
        raise PlanError(
            f"{outline.tp} processes share the model, each on a device, and gpus is {gpus}: give {outline.tp}"
        )
    if outline.n_ctx is not None and work.tokens + max(work.new_tokens - 1, 0) > outline.n_ctx:
        raise PlanError(
            f"{work.tokens} tokens and {work.new_tokens} new ones do not fit {outline.source}, which takes "
            f"{outline.n_ctx}; give fewer --tokens"
        )
    if gpu_memory is not None:
        _demand_layer(outline.part or outline, gpu_memory)
    said = cost(work)

    def again(other: Work) -> Cost:
        return cost(other) or other.forward()

    declared = said is not None
    return RunPlan(name, declared, outline, work, said or work.forward(), gpus, gpu_memory, rate, again)


def _demand_layer(outline: Outline, gpu_memory: float) -> None:
    layer = max(range(len(outline.layers)), key=lambda number: outline.layers[number].held)
    least = outline.layers[layer].held * outline.itemsize
    if gpu_memory < least:
        raise PlanError(
            f"a device of {gpu_memory / 1e9:.3g} GB does not hold the weights of layer {layer} of {outline.source} "
            f"alone ({least / 1e9:.3g} GB in {outline.dtype}), and layers are not cut: give more --gpu-memory, or a "
            "smaller --dtype"
        )


def memory(outline: Outline, work: Work, cost: Cost, count: int) -> Memory:
    """What the fullest of so many devices needs, with layers laid over them in order."""
    n_layers = len(outline.layers)
    count = min(count, n_layers)
    edges = [round(n_layers * number / count) for number in range(count + 1)]
    together = max((each.rows_at_once for each in cost.passes if each.calls and each.rows), default=1)
    share = cost.kept * min(together, work.prompts) // work.prompts
    return max(
        (_on_device(outline, cost, edges[i], edges[i + 1], share // count) for i in range(count)),
        key=lambda taken: taken.total,
    )


def _on_device(outline: Outline, cost: Cost, start: int, stop: int, kept: int) -> Memory:
    """Bytes of a device that has layers `start` to `stop`."""
    ends = start == 0, stop == len(outline.layers)
    # tied weights stand with the embeddings, and are copied to the device of the logits
    last = outline.last or (0 if ends[0] else outline.unembedding)
    held = sum(layer.held for layer in outline.layers[start:stop]) + ends[0] * outline.first + ends[1] * last
    widest = [(0, 0)]
    for each in cost.passes:
        here = replace(each, start=max(each.start, start), stop=min(each.stop, stop))
        if not ends[1]:
            here = replace(here, read_out=0, at_once=0)
        joins = not each.calls
        here = replace(here, rows=1, at_once=1, read_out=min(1, here.read_out)) if joins else here
        if here.start < here.stop or ends[1]:
            again = each.generated or joins
            widest.append((activations(outline, here), cache(outline, here) if again else 0))
    acts, cached = max(widest, key=sum)
    return Memory(held * outline.itemsize, acts, cached, kept)


def _halfway(each: Passes) -> Passes:
    return replace(each, columns=max(each.columns // 2, 1))
