"""Plans in this process: hooks as one loop in a trace of nnsight's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...architectures.atlas import Atlas
from ...plan import Plan
from ..hooks import ModuleHook
from ..program import HookProgram
from .base import Passage, Place, TracedEngine

Visit = Callable[[], None]


class NNsightProgram(HookProgram):
    """Hooks as one loop in a trace."""

    engine: TracedEngine

    def __init__(self, engine: TracedEngine, plan: Plan, atlas: Atlas) -> None:
        super().__init__(engine, plan, atlas)
        self._made: dict[tuple[int, bool], list[Visit]] = {}

    def execute(self, method: str, inputs: Mapping[str, Any]) -> Any:
        """See `HookProgram.execute`."""
        engine = self.engine
        steps = [self._visits(engine.order(inputs), first=method == "generate")]
        if method == "generate":  # the steps after the prompt are text
            steps.append(self._visits(engine.order({"input_ids": inputs["input_ids"]})))
        result: list[Any] = []

        def call(**arguments: Any) -> None:
            result.append(getattr(engine.model, method)(**arguments))

        try:
            for attn_hook in self.attn_hooks:
                attn_hook.install()
            if not self.hooks:
                call(**inputs)
            else:
                with engine.nnsight.trace(fn=call, **inputs) as tracer:
                    self._serve(tracer, steps)
        finally:
            for attn_hook in self.attn_hooks:
                attn_hook.remove()
        return result[0]

    def prepare(self, inputs: Mapping[str, Any]) -> None:
        """Learn the order in which the model computes on such inputs."""
        self.engine.order(inputs)
        self.engine.order({"input_ids": inputs["input_ids"]})

    def _serve(self, tracer: Any, steps: list[list[Visit]]) -> None:
        """What the greenlet does: every visit of every step. It ends when the model does."""
        from nnsight.intervention.interleaver import OutOfOrderError

        try:
            for step in tracer.iter[:] if len(steps) > 1 else (0,):
                for visit in steps[min(step, len(steps) - 1)]:
                    visit()
        except OutOfOrderError:  # the model is done, or never came by: what was not kept stays empty
            pass

    def _visits(self, order: Mapping[Place, Passage], *, first: bool = False) -> list[Visit]:
        """What is done in one forward pass, in the order of the model; made once for each order.

        Args:
            first: the vision tower runs before all else, as when generating.
        """
        if (id(order), first) in self._made:
            return self._made[id(order), first]
        ranked: list[tuple[int, int, Visit]] = []
        for module_hook in self.hooks:
            path, side = module_hook.point.module, module_hook.point.side
            if (path, side) not in order:
                continue
            envoy, inputs = self.engine.envoys[path], _Inputs()
            module = self.engine.own[path]
            visit = _at_input(envoy, module_hook) if side == "in" else _at_output(envoy, module_hook, inputs, module)
            layout = module_hook.point.layout
            early = len(order) if first and layout and layout.images else 0
            ranked.append((order[path, side].rank - early, 0, visit))
            # At the same place as edits of the input, and behind them: it takes what these leave.
            if side == "out" and module_hook.derived:
                ranked.append((order[path, "in"].rank - early, 1, _take_input(envoy, inputs)))
        visits = self._made[id(order), first] = [visit for _, _, visit in sorted(ranked, key=lambda item: item[:2])]
        return visits


class _Inputs:
    """Positional inputs of a module, from when they passed to when its output does."""

    args: tuple[Any, ...] = ()


def _take_input(envoy: Any, inputs: _Inputs) -> Visit:
    def visit() -> None:
        inputs.args = envoy.inputs[0]

    return visit


def _at_input(envoy: Any, module_hook: ModuleHook) -> Visit:
    hook = module_hook.on_input()

    def visit() -> None:
        new = hook(module_hook.module, *envoy.inputs)
        if new is not None:
            envoy.inputs = new

    return visit


def _at_output(envoy: Any, module_hook: ModuleHook, inputs: _Inputs, module: nn.Module) -> Visit:
    hook = module_hook.on_output()

    def visit() -> None:
        new = hook(module, inputs.args, envoy.output)
        inputs.args = ()
        if new is not None:
            envoy.output = new

    return visit
