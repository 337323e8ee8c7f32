"""What plans through nnsight share, here and on a server: its object for the model, and the model's order."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import CapabilityError, first_line
from ..copies import with_same_weights
from ..program import LocalEngine

Place = tuple[str, str]
"""A module's path, and "in" or "out"."""
_PROCESS = nn.Module()
"""Stands for nnsight's state, which is one for all models of the process."""


class Passage(NamedTuple):
    """When a forward pass comes to a place, and the last size of the first tensor that passes there (0: none)."""

    rank: int
    width: int


class TracedEngine(LocalEngine):
    """A model in nnsight's hands, here or on a server; `NNsightEngine` makes plans ready for it.

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

    def __init__(self, model: Any, *, remote: bool | str = False) -> None:
        super().__init__(with_same_weights(model), model, _PROCESS)
        self.own: dict[str, nn.Module] = dict(model.named_modules())
        self.remote, self.attends = remote, not remote
        with warnings.catch_warnings():  # it says which modules it calls by other names, which nobody here does
            warnings.filterwarnings("ignore", message=".*nnsight already serves on every module")
            self.nnsight = _elsewhere(self.model, remote) if remote else library().NNsight(self.model)
        self.envoys: dict[str, Any] = {"": self.nnsight}
        # by module, not by name: nnsight calls some otherwise (BERT's `output` is a property of envoys)
        envoy_of = {id(envoy._module): envoy for envoy in self.nnsight.modules()}
        self.envoys |= {path: envoy_of[id(module)] for path, module in self.modules.items() if path}
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
            taken = {name: inputs[name] for name in inputs if name in self._takes}
            self._orders[kind] = self._learnt(taken)
        return self._orders[kind]

    def _learnt(self, inputs: Mapping[str, Any]) -> dict[Place, Passage]:
        """The order of a pass on these inputs. Without weights it can be learnt too, of sizes alone.

        Raises:
            CapabilityError: the model does something that needs numbers.
        """
        empty = next(self.model.parameters()).is_meta
        if empty:
            batch, width = inputs["input_ids"].shape
            # A whole mask, of which transformers asks nothing: it could not be answered.
            mask = torch.zeros(batch, 1, width, width, dtype=self.dtype, device="meta")
            inputs = {**{name: tensor.to("meta") for name, tensor in inputs.items()}, "attention_mask": mask}
        try:
            with _noted(self.modules) as order, torch.no_grad():
                self.model(**inputs, use_cache=False)
        except (RuntimeError, NotImplementedError) as error:
            if not empty:
                raise
            raise CapabilityError(
                f"{type(self.model).__name__} cannot be gone through without weights ({first_line(error)}); load it "
                "without device='meta'"
            ) from error
        return order


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
                tensors = passing[-1:] if place[1] == "out" else passing
                first = next((x for x in _flat(tensors) if isinstance(x, torch.Tensor) and x.ndim), None)
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
