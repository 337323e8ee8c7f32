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
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..architectures.atlas import Atlas
from ..errors import CapabilityError
from ..plan import Plan
from . import remote
from .ports import Port
from .program import LocalEngine, PortProgram, with_same_weights

Place = tuple[str, str]
"""A module's path, and "in" or "out"."""
Visit = Callable[[], None]
_PROCESS = nn.Module()
"""Stands for nnsight's state, which is one for all models of the process."""


class Passage(NamedTuple):
    """When a forward pass comes to a place, and the last size of the first tensor that passes there (0: none)."""

    rank: int
    width: int


class NNsightProgram(PortProgram):
    """Ports as one loop in a trace."""

    engine: NNsightEngine

    def __init__(self, engine: NNsightEngine, plan: Plan, atlas: Atlas) -> None:
        super().__init__(engine, plan, atlas)
        self._made: dict[tuple[int, bool], list[Visit]] = {}

    def carry(self, method: str, inputs: Mapping[str, Any]) -> Any:
        """See `PortProgram.carry`."""
        engine = self.engine
        steps = [self._visits(engine.order(inputs), first=method == "generate")]
        if method == "generate":  # the steps after the prompt are text
            steps.append(self._visits(engine.order({"input_ids": inputs["input_ids"]})))
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
        found: list[tuple[int, int, Visit]] = []
        for port in self.ports:
            path, side = port.tap.module, port.tap.side
            if (path, side) not in order:
                continue
            envoy, given = self.engine.envoys[path], _Given()
            own = self.engine.own[path]
            visit = _at_input(envoy, port) if side == "in" else _at_output(envoy, port, given, own)
            early = len(order) if first and port.tap.lens is not None and port.tap.lens.images else 0
            found.append((order[path, side].rank - early, 0, visit))
            if side == "out" and port.derived:
                found.append((order[path, "in"].rank - early, 1, _take_input(envoy, given)))
        visits = self._made[id(order), first] = [visit for _, _, visit in sorted(found, key=lambda item: item[:2])]
        return visits


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
        remote: True to carry plans out on NDIF (a model with a hub id, and a key in `NDIF_API_KEY`), the address of
            another server, or "local" for nnsight's simulation of one in this process.

    Attributes:
        nnsight: nnsight's own object for the copy.
        envoys: its envoys by module path.
        own: the user's modules by path, for calling one from within a trace, where an envoy's would wait for itself.
    """

    name = "nnsight"
    program = NNsightProgram

    def __init__(self, model: Any, *, remote: bool | str = False) -> None:
        super().__init__(with_same_weights(model), model, _PROCESS)
        self.own: dict[str, nn.Module] = dict(model.named_modules())
        self.remote, self.attends = remote, not remote
        with warnings.catch_warnings():  # it says which modules it calls by other names, which nobody here does
            warnings.filterwarnings("ignore", message=".*nnsight already serves on every module")
            self.nnsight = _elsewhere(self.model, remote) if remote else library().NNsight(self.model)
        self.envoys: dict[str, Any] = {"": self.nnsight}
        # by module, not by name: nnsight calls some otherwise (BERT's `output` is a property of envoys)
        found = {id(envoy._module): envoy for envoy in self.nnsight.modules()}
        self.envoys |= {path: found[id(module)] for path, module in self.modules.items() if path}
        self._orders: dict[frozenset[str], dict[Place, Passage]] = {}
        self._takes = set(inspect.signature(type(self.model).forward).parameters) - {"use_cache"}

    @property
    def host(self) -> str:
        """The server that a plan travels to."""
        return self.remote if isinstance(self.remote, str) else str(library().CONFIG.API.HOST)

    def order(self, inputs: Mapping[str, Any]) -> dict[Place, Passage]:
        """When a forward pass on such inputs begins and ends each module; learnt once per kind of input."""
        if "past_key_values" in inputs or "cache" in inputs:  # a pass would add to it
            inputs = {"input_ids": inputs["input_ids"]}
        kind = frozenset(inputs) & {"input_ids", "pixel_values", "pixel_values_videos", "inputs_embeds"}
        if kind not in self._orders:
            with _noted(self.modules) as order, torch.no_grad():
                self.model(**{name: inputs[name] for name in inputs if name in self._takes}, use_cache=False)
            self._orders[kind] = order
        return self._orders[kind]

    def adapt(self, atlas: Atlas) -> None:
        """See `Engine.adapt`."""
        if self.remote:
            remote.adapt(atlas)

    def compile(self, plan: Plan, atlas: Atlas) -> PortProgram:
        """See `Engine.compile`."""
        return remote.RemoteProgram(self, plan, atlas) if self.remote else NNsightProgram(self, plan, atlas)


def _elsewhere(model: Any, remote: bool | str) -> Any:
    """nnsight's object for a model that runs on a server, which knows it by its hub id.

    Raises:
        CapabilityError: no id, or no key.
    """
    nnsight = library()
    from nnsight.modeling.mixins.remotable import Remotable

    name = str(getattr(model.config, "_name_or_path", ""))
    if remote != "local":
        if not name or Path(name).exists():
            raise CapabilityError(
                f"a server knows models by their hub id, and this one has none ({name or 'a model in memory'}); load "
                "it by its id, or use remote='local' to try a plan here"
            )
        if not nnsight.CONFIG.API.APIKEY:
            raise CapabilityError("NDIF wants a key: set NDIF_API_KEY, or use remote='local' to try a plan here")

    class Elsewhere(Remotable):  # type: ignore[misc]
        def _remoteable_class(self) -> type:
            return nnsight.TransformersModel

        def _remoteable_model_key(self) -> str:
            return json.dumps({"repo_id": name, "revision": getattr(model.config, "_commit_hash", None)})

    return Elsewhere(model)


@contextmanager
def _noted(modules: Mapping[str, nn.Module]) -> Iterator[dict[Place, Passage]]:
    """Hooks that number the first begin and end of every module."""
    order: dict[Place, Passage] = {}
    handles = []
    for path, module in modules.items():
        for side, register in (("in", module.register_forward_pre_hook), ("out", module.register_forward_hook)):

            def note(_: nn.Module, *passing: Any, place: Place = (path, side)) -> None:
                seen = passing[-1:] if place[1] == "out" else passing
                first = next((x for x in _flat(seen) if isinstance(x, torch.Tensor) and x.ndim), None)
                order.setdefault(place, Passage(len(order), 0 if first is None else first.shape[-1]))

            handles.append(register(note, with_kwargs=True))
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _flat(passing: Iterable[Any]) -> Iterator[Any]:
    for x in passing:
        yield from _flat(x) if isinstance(x, (tuple, list)) else _flat(x.values()) if isinstance(x, dict) else (x,)


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
