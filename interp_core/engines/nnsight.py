"""Engine `nnsight`: the same plan through nnsight's envoys.

nnsight runs intervention code in a greenlet that waits for one value after the other, in the order in which the model
computes them. A plan has no such order, so the engine learns the model's: one forward pass per kind of input (text,
images) notes when each module begins and ends. The code is one loop over the plan's ports in that order.

The user's own model is left alone: nnsight changes the `forward` of every module of what it wraps, which is a copy here
that shares the weights. `model.engine.nnsight` is nnsight's object, for traces written by hand.

What is inside attention crosses no module boundary, and so no envoy; the attention tap opens it up as for `torch`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .ports import Port
from .program import LocalEngine, PortProgram, with_same_weights

Place = tuple[str, str]
"""A module's path, and "in" or "out"."""
Visit = Callable[[], None]


class NNsightProgram(PortProgram):
    """Ports as one loop in a trace."""

    engine: NNsightEngine

    def carry(self, method: str, inputs: Mapping[str, Any]) -> Any:
        """See `PortProgram.carry`."""
        engine = self.engine
        steps = [self._visits(engine.order(inputs))] if self.ports else []
        if self.ports and method == "generate":  # the steps after the prompt are text
            steps.append(self._visits(engine.order({name: inputs[name] for name in ("input_ids",)})))
        result: list[Any] = []

        def call(**arguments: Any) -> None:
            result.append(getattr(engine.model, method)(**arguments))

        try:
            for tap in self.taps:
                tap.install()
            if not self.ports:
                call(**inputs)
            else:
                with engine.nnsight.trace(fn=call, **inputs) as tracer:
                    self._serve(tracer, steps)
        finally:
            for tap in self.taps:
                tap.remove()
        return result[0]

    def _serve(self, tracer: Any, steps: list[list[Visit]]) -> None:
        """What the greenlet does: every visit of every step. It ends when the model does."""
        from nnsight.intervention.interleaver import OutOfOrderError

        try:
            for step in tracer.iter[:] if len(steps) > 1 else (0,):
                for visit in steps[min(step, len(steps) - 1)]:
                    visit()
        except OutOfOrderError:  # the model is done, or never came by: what was not kept stays empty
            pass

    def _visits(self, order: Mapping[Place, int]) -> list[Visit]:
        """What is done in one forward pass, in the order of the model."""
        found: list[tuple[int, int, Visit]] = []
        for port in self.ports:
            path, side = port.tap.module, port.tap.side
            if (path, side) not in order:
                continue
            envoy, given = self.engine.envoys[path], _Given()
            own = self.engine.own[path]
            visit = _at_input(envoy, port) if side == "in" else _at_output(envoy, port, given, own)
            found.append((order[path, side], 0, visit))
            if side == "out" and port.derived:
                found.append((order[path, "in"], 1, _take_input(envoy, given)))
        return [visit for _, _, visit in sorted(found, key=lambda item: item[:2])]


class _Given:
    """Positional inputs of a module, from when they passed to when its output does."""

    args: tuple[Any, ...] = ()


def _take_input(envoy: Any, given: _Given) -> Visit:
    def visit() -> None:
        given.args = envoy.inputs[0]

    return visit


def _at_input(envoy: Any, port: Port) -> Visit:
    hook = port.on_input()

    def visit() -> None:
        new = hook(port.module, *envoy.inputs)
        if new is not None:
            envoy.inputs = new

    return visit


def _at_output(envoy: Any, port: Port, given: _Given, own: nn.Module) -> Visit:
    hook = port.on_output()

    def visit() -> None:
        new = hook(own, given.args, envoy.output)
        given.args = ()
        if new is not None:
            envoy.output = new

    return visit


class NNsightEngine(LocalEngine):
    """Plans through nnsight.

    Args:
        model: a Hugging Face model; its weights are shared, its modules are not touched.

    Attributes:
        nnsight: nnsight's own object for the copy.
        envoys: its envoys by module path.
        own: the user's modules by path, for calling one from within a trace, where an envoy's would wait for itself.
    """

    name = "nnsight"
    program = NNsightProgram

    def __init__(self, model: Any) -> None:
        super().__init__(with_same_weights(model))
        self.own: dict[str, nn.Module] = dict(model.named_modules())
        self.nnsight = library().NNsight(self.model)
        self.envoys: dict[str, Any] = {"": self.nnsight}
        self.envoys |= {path: self.nnsight.get(path) for path in self.modules if path}
        self._orders: dict[frozenset[str], dict[Place, int]] = {}
        self._takes = set(inspect.signature(type(self.model).forward).parameters) - {"use_cache"}

    def order(self, inputs: Mapping[str, Any]) -> dict[Place, int]:
        """When a forward pass on such inputs begins and ends each module; learnt once per kind of input."""
        kind = frozenset(inputs) & {"input_ids", "pixel_values", "pixel_values_videos", "inputs_embeds"}
        if kind not in self._orders:
            with _noted(self.modules) as order, torch.no_grad():
                self.model(**{name: inputs[name] for name in inputs if name in self._takes}, use_cache=False)
            self._orders[kind] = order
        return self._orders[kind]


@contextmanager
def _noted(modules: Mapping[str, nn.Module]) -> Iterator[dict[Place, int]]:
    """Hooks that number the first begin and end of every module."""
    order: dict[Place, int] = {}
    handles = []
    for path, module in modules.items():
        for side, register in (("in", module.register_forward_pre_hook), ("out", module.register_forward_hook)):

            def note(*_: Any, place: Place = (path, side)) -> None:
                order.setdefault(place, len(order))

            handles.append(register(note))
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def library() -> ModuleType:
    """nnsight, without its side effect on code that has no Python source file.

    Importing nnsight puts a `Tensor.backward` in place that parses its caller's source, to see whether it stands in a
    `with` line; where that source is no Python (a documentation page, a template, a cell of another kernel) a plain
    `loss.backward()` ended in its `SyntaxError`. Such a call is no trace.
    """
    import nnsight
    from nnsight.intervention.backward import BackwardTracer

    if "parse" not in vars(BackwardTracer):
        inherited = BackwardTracer.parse

        def parse(self: BackwardTracer, source: str, lineno: int) -> object:
            try:
                return inherited(self, source, lineno)
            except SyntaxError:
                return None

        BackwardTracer.parse = parse
    return nnsight
