"""Layer by layer: what a pass has read of a layer is handed over as soon as it is whole, and let go.

Reading a site in all layers holds as many values as there are layers; handed over one layer at a time, it holds one
layer's. Sites without layers stay with the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from ..sites import SITES
from .pass_state import PassState
from .protocol import HandOver, PassRecord

LET_GO = torch.empty(0)
"""Stands in a pass' record for a value that was handed over."""


@runtime_checkable
class Passing(Protocol):
    """What layers are handed over by: a program's reads, the hook of each, and what the present pass has kept."""

    slots: list[Any]
    state: PassState

    def hook_of(self, read: Any) -> Any:
        """See `HookProgram`."""

    def written(self, passes: Sequence[PassRecord]) -> list[int]:
        """See `HookProgram`."""

    def break_off(self) -> None:
        """See `HookProgram`."""

    def end_pass(self) -> None:
        """See `HookProgram`."""


class Layers:
    """The layers of one run, each handed over once, also where a pass has to be made again.

    Args:
        each: called with a layer, the numbers of its slots, and the record of the pass.
        stop: end the pass when all slots have passed.

    Attributes:
        after: what the program does after its hooks.
    """

    def __init__(self, program: Passing, each: HandOver, *, stop: bool) -> None:
        self.program, self.each, self.stop = program, each, stop
        self.slots: dict[int, list[int]] = {}
        self.handed: set[int] = set()
        layers: dict[Any, set[int]] = {}
        for slot in program.slots:
            of_hook = layers.setdefault(program.hook_of(slot), set())
            if SITES[slot.entry.name].layered:
                self.slots.setdefault(slot.entry.layer, []).append(slot.number)
                of_hook.add(slot.entry.layer)
        self.after = {hook: partial(self._passed, sorted(of_hook)) for hook, of_hook in layers.items()}

    def _passed(self, layers: list[int]) -> None:
        """A hook is done, at which sites of these layers are read; hand over those that are whole by now."""
        values = self.program.state.record.values
        for layer in layers:
            if not any([values[number] is None for number in self.slots[layer]]):  # noqa: C419 (faster)
                self._hand_over(layer)
        if self.stop:
            self.program.end_pass()

    def _hand_over(self, layer: int) -> None:
        record, numbers = self.program.state.record, self.slots[layer]
        if self.program.written((record,)):
            # The model has written into a kept tensor. The pass is made again with copies, as it would be at its end;
            # only this layer and those above are still to be handed over then.
            self.program.break_off()
        if layer not in self.handed:
            self.handed.add(layer)
            self.each(layer, numbers, record)
        record.attention.pop(layer, None)
        for number in numbers:
            record.values[number], record.versions[number] = LET_GO, LET_GO._version

    def finish(self) -> None:
        """At the end of a pass, hand over what is left: layers where some read selected none of its positions."""
        values = self.program.state.record.values
        for layer, numbers in self.slots.items():
            if any(values[number] is not None and values[number] is not LET_GO for number in numbers):
                self._hand_over(layer)
