"""Engine `torch`: a plan compiled to the fewest hooks on the model's own modules.

Every place that a plan touches (a module's input or output) gets one hook, every attention layer whose inside it
touches gets the attention tap. They are installed for a run and removed after it, whatever happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..architectures.atlas import Atlas
from ..plan import Plan
from .program import HookProgram, LocalEngine


class TorchProgram(HookProgram):
    """Ports as hooks in the modules' own hook tables."""

    def __init__(self, engine: LocalEngine, plan: Plan, atlas: Atlas) -> None:
        super().__init__(engine, plan, atlas)
        self.listen()

    def listen(self) -> None:
        """See `HookProgram.listen`."""
        self._hooks = [(port, port.hook()) for port in self.ports]
        self._recorded: list[Any] = [
            hooks[0]
            for port, hooks in self._hooks
            if port.tap.layout and port.tap.layout.images and port.tap.side == "out"
        ]

    def execute(self, method: str, inputs: Mapping[str, Any]) -> Any:
        """See `HookProgram.carry`."""
        model = self.engine.model
        orders = [(table, [*table]) for table in self._recorded] if self._recorded else []
        try:
            for port, (table, with_kwargs, hook) in self._hooks:
                table[port] = hook
                if with_kwargs is not None:
                    with_kwargs[port] = True
            for table in self._recorded:
                _record_last(table)
            for tap in self.taps:
                tap.install()
            return model(**inputs) if method == "forward" else model.generate(**inputs)
        finally:
            for tap in self.taps:
                tap.remove()
            for port, (table, with_kwargs, _) in self._hooks:
                table.pop(port, None)
                if with_kwargs is not None:
                    with_kwargs.pop(port, None)
            for table, order in orders:
                for key in order:
                    if key in table:
                        table.move_to_end(key)


def _record_last(table: Any) -> None:
    """Of a module's hooks, those come last by which transformers records what the module gives: LLaVA's projector is
    handed such a record of its tower's layers, which must be of the edited one."""
    for key in [key for key, hook in table.items() if getattr(hook, "__name__", "") == "output_capturing_hook"]:
        table.move_to_end(key)


class TorchEngine(LocalEngine):
    """The default engine.

    Args:
        model: a Hugging Face model; it is left as it is between runs.
    """

    name = "torch"
    program = TorchProgram
