"""Engine `torch`: a plan compiled to the fewest hooks on the model's own modules.

Every place that a plan touches (a module's input or output) gets one hook, every attention layer whose inside it
touches gets the attention hook. They are installed for a run and removed after it, whatever happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..architectures.atlas import Atlas
from ..plan import Plan
from .program import HookProgram, LocalEngine


class TorchProgram(HookProgram):
    """Hooks as hooks in the modules' own hook tables."""

    def __init__(self, engine: LocalEngine, plan: Plan, atlas: Atlas) -> None:
        super().__init__(engine, plan, atlas)
        self.listen()

    def listen(self) -> None:
        """See `HookProgram.listen`."""
        self._hooks = [(module_hook, module_hook.hook()) for module_hook in self.hooks]
        outputs = [(hook.point.layout, table) for hook, (table, *_) in self._hooks if hook.point.side == "out"]
        self._recorded: list[Any] = [table for layout, table in outputs if layout and layout.images]

    def execute(self, method: str, inputs: Mapping[str, Any]) -> Any:
        """See `HookProgram.execute`."""
        model = self.engine.model
        orders = [(table, [*table]) for table in self._recorded] if self._recorded else []
        try:
            for module_hook, (table, with_kwargs, hook) in self._hooks:
                table[module_hook] = hook
                if with_kwargs is not None:
                    with_kwargs[module_hook] = True
            for table in self._recorded:
                _record_last(table)
            for attn_hook in self.attn_hooks:
                attn_hook.install()
            return model(**inputs) if method == "forward" else model.generate(**inputs)
        finally:
            for attn_hook in self.attn_hooks:
                attn_hook.remove()
            for module_hook, (table, with_kwargs, _) in self._hooks:
                table.pop(module_hook, None)
                if with_kwargs is not None:
                    with_kwargs.pop(module_hook, None)
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
    runs_rows = True
