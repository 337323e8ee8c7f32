"""Sites of a model whose modules are shared out between processes, as transformers' tensor parallelism does it.

Every process runs the same program. Most tensors are whole in each; between a projection whose outputs are shared out
and the one that takes them back (queries to z, gate to the MLP's output projection) a process has its heads or neurons
alone, as a plain tensor that says nothing of it. There a hook point gets `Shards` in its layout: what passes is
gathered before plans see it, and of what they leave each process goes on with its own part. All processes do that
together, so all have to run the same plans.

What is shared out otherwise is refused by name: never is a part taken for the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import CapabilityError, LoadError
from .atlas import Atlas, Entry
from .hook_points import HookPoint, Layout
from .parameters import Sharing, is_shared, sharing

WHOLE = ("EmbeddingParallel", "MoeExpertsParallel", "EpDispatchExpertsParallel", "LocalParamsParallel")
"""Styles of modules that take and give whole tensors, and share out what they do between."""
OUTPUTS, INPUTS = "ColwiseParallel", "RowwiseParallel"
"""Styles of projections that share out their outputs, and their inputs."""
WHY = "under tp_plan each process has only a part of it, and how the parts make the whole is not known here"


@dataclass(frozen=True, eq=False)
class Shards:
    """How an axis is shared out between processes.

    Attributes:
        axis: which one.
        sizes: how much of it each process has, in their order.
        rank: which of them this process is.
        group: of processes.
    """

    axis: int
    sizes: tuple[int, ...]
    rank: int
    group: Any

    def gather(self, x: Tensor) -> Tensor:
        """The whole tensor, of what each process has.

        Raises:
            CapabilityError: this process has another part than it should have.
        """
        if x.shape[self.axis] != self.sizes[self.rank]:
            raise CapabilityError(
                f"under tp_plan process {self.rank} has {x.shape[self.axis]} of {sum(self.sizes)} heads or neurons, "
                f"not {self.sizes[self.rank]}: they cannot be gathered; load the model without tp_plan for these sites"
            )
        return _Gathered.apply(x, self)  # type: ignore[no-untyped-call]

    def own(self, x: Tensor) -> Tensor:
        """This process's part of a whole tensor."""
        return _Own.apply(x, self)  # type: ignore[no-untyped-call]

    def parts(self, x: Tensor) -> Tensor:
        """What the processes have, beside each other; all of them call it."""
        widest, missing = max(self.sizes), max(self.sizes) - x.shape[self.axis]
        if missing:
            shape = list(x.shape)
            shape[self.axis] = missing
            x = torch.cat([x, x.new_zeros(shape)], self.axis)
        gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in self.sizes]
        dist.all_gather(gathered, x.contiguous(), group=self.group)
        if min(self.sizes) < widest:
            gathered = [part.narrow(self.axis, 0, n) for part, n in zip(gathered, self.sizes, strict=True)]
        return torch.cat(gathered, self.axis)

    def part(self, x: Tensor) -> Tensor:
        """A view of this process's part."""
        return x.narrow(self.axis, sum(self.sizes[: self.rank]), self.sizes[self.rank])


class _Gathered(torch.autograd.Function):
    """All parts of a tensor. What follows is the same in every process, and so is its gradient, of which each takes its
    part back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        """Gather."""
        ctx.shards = shards
        return shards.parts(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Take one's part."""
        return ctx.shards.part(grads[0]), None


class _Own(torch.autograd.Function):
    """This process's part of a tensor that all have. Each finds the gradient of its part, and together all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        """Take one's part."""
        ctx.shards = shards
        return shards.part(x).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gather."""
        return ctx.shards.parts(grads[0]), None


def called(module: nn.Module, x: Tensor) -> Tensor:
    """What a module gives for an input, both of them whole, also where they are shared out."""
    shared = sharing(module)
    if shared is None:
        return module(x)
    into, out = (_at(module, shared, side) for side in ("in", "out"))
    passed = module(x if into is None else into.own(x))
    return passed if out is None else out.gather(passed)


def on_all_heads(rule: Callable[..., Any], heads: Sequence[Any]) -> Callable[..., Any]:
    """A rule for attention as it is where processes share the heads out: handed all of them, and a kernel that takes
    all of them.

    Args:
        heads: how those of queries, and of keys and values, are shared out; None where they are not.
    """
    queries, keys = heads
    if queries is None:
        return rule
    mixed = replace(queries, axis=2)

    def whole(module: nn.Module, kernel: Any, *called: Any, **more: Any) -> Any:
        def on_whole(module: nn.Module, *all_heads: Any, **more: Any) -> Any:
            out, weights = kernel(module, *_each(all_heads, queries.own, keys.own), **more)
            return mixed.gather(out), None if weights is None else queries.gather(weights)

        out, weights = rule(module, on_whole, *_each(called, queries.gather, keys.gather), **more)
        return mixed.own(out), None if weights is None else queries.own(weights)

    return whole


def _each(called: Sequence[Any], queries: Any, keys: Any) -> tuple[Any, ...]:
    """What attention is called with, query, key and value each put through a function."""
    return queries(called[0]), keys(called[1]), keys(called[2]), *called[3:]


def sees_part(atlas: Atlas, model: nn.Module, module: nn.Module) -> bool:
    """Whether a module of a model takes or gives a part of its tensor in each process."""
    if atlas.processes is None:
        return False
    modules = dict(model.named_modules())
    path = next(path for path, other in modules.items() if other is module)
    try:
        return any(_Sharer(atlas, modules).at(path, side) is not None for side in ("in", "out"))
    except CapabilityError:
        return True


def share_out(atlas: Atlas, model: nn.Module) -> None:
    """Have the hook points of a model that is shared out give whole tensors, and refuse those that cannot.

    Raises:
        LoadError: it is shared out in another way than by transformers' tensor parallelism.
    """
    modules = dict(model.named_modules())
    _demand_known(modules)
    if not any(is_shared(module) for module in modules.values()):
        return
    _demand_tensor_parallel(model)
    first = next(shared for module in modules.values() if (shared := sharing(module)) is not None)
    atlas.processes = first.mesh.get_group()
    sharer = _Sharer(atlas, modules)
    for (name, layer), entry in list(atlas.entries.items()):
        try:
            entry.read, entry.write = (point and sharer.point(entry, point) for point in (entry.read, entry.write))
        except CapabilityError as error:
            atlas.drop(name, f"{name}: {error}", [layer])
        layout = entry.read.layout if entry.read is not None else None
        if name == "pattern" and layout is not None and layout.shards is not None:
            entry.why |= {"rows": "under tp_plan attention is called with the heads of one process"}


def _demand_known(modules: Mapping[str, nn.Module]) -> None:
    """Refuse weights of which a process has a part, in a module of which nobody says how it comes by the whole.

    Raises:
        LoadError: naming the first of them.
    """
    for path, module in modules.items():
        for name, weight in module._parameters.items():
            if hasattr(weight, "full_tensor") and not is_shared(module):
                raise LoadError(
                    f"{path}.{name} is a {type(weight).__name__}, of which each process has a part, and nothing says "
                    "what the module makes of it; load the model with ic.load(…, tp_plan=…), or whole"
                )


def _demand_tensor_parallel(model: Any) -> None:
    config = getattr(model.config, "distributed_config", None)
    for axis, what in (("pp_size", "pipeline"), ("fsdp_size", "data (FSDP)"), ("dp_replicate_size", "data (FSDP)")):
        if (getattr(config, axis, None) or 1) > 1:
            raise LoadError(
                f"{type(model).__name__} is distributed with {axis}={getattr(config, axis)}, {what} parallelism, in "
                "which a process does not run all of the model; load it with tp_plan alone, or with device_map"
            )


class _Sharer:
    """Hook points with their shards, each made once, so that sites at one place share it."""

    def __init__(self, atlas: Atlas, modules: dict[str, nn.Module]) -> None:
        self.atlas, self.modules = atlas, modules
        self.known: dict[int, tuple[HookPoint, HookPoint]] = {}
        components = atlas.components
        layers = [None, *range(atlas.shape.n_layers)]
        # Components with a dot are parts of attention or the MLP; the others take and give whole tensors, and so do
        # the modules that hold the blocks.
        whole = [components.get(name, layer) for layer in layers for name in components.names(layer) if "." not in name]
        block = components.get("block", 0)
        self.whole = {id(module) for module in (*whole, *(m for m in modules.values() if block in m.modules()))}

    def point(self, entry: Entry, point: HookPoint) -> HookPoint:
        """A hook point at which the whole passes.

        Raises:
            CapabilityError: there is none.
        """
        if id(point) not in self.known:
            module = self.modules[point.module]
            if entry.name == "shared_expert_gate":  # a number for each token, beside the experts
                self.whole.add(id(module))
            shards = self._heads(entry, module) if point.inside else self.at(point.module, point.side)
            layout = point.layout if shards is None else replace(point.layout or Layout(), shards=shards)
            needs = tuple(self.point(entry, needed) for needed in point.needs)
            same = layout is point.layout and all(a is b for a, b in zip(needs, point.needs, strict=True))
            self.known[id(point)] = point, point if same else replace(point, layout=layout, needs=needs)
        return self.known[id(point)][1]

    def at(self, path: str, side: str) -> Shards | None:
        """How what passes at a side of a module is shared out, None where it is whole.

        Raises:
            CapabilityError: in a way that is not known here.
        """
        module = self.modules[path]
        if (shared := sharing(module)) is not None:
            return _at(module, shared, side)
        if not is_shared(module) and (id(module) in self.whole or not self._beside_shared(path)):
            return None
        raise CapabilityError(WHY)

    def _beside_shared(self, path: str) -> bool:
        """Whether some module beside this one is shared out."""
        beside = self.modules[path.rpartition(".")[0]] if path else None
        return beside is not None and any(is_shared(module) for module in beside.modules())

    def _heads(self, entry: Entry, attention: nn.Module) -> Shards | None:
        """How the heads are shared out inside attention: as the projections around it."""
        around = list(_around(attention))
        if not around:
            return None
        n, ways = entry.sizes["head"], len(around[0].sizes)
        if n % ways:
            raise CapabilityError(f"{n} heads are not shared out evenly between {ways} processes")
        return replace(around[0], axis=1, sizes=(n // ways,) * ways)


def _around(attention: nn.Module) -> Iterator[Shards]:
    """How projections in a module are shared out on the side where heads are."""
    for module in attention.modules():
        if (shared := sharing(module)) is not None:
            for side in ("in", "out"):
                if (shards := _at(module, shared, side)) is not None:
                    yield shards


def _at(module: nn.Module, shared: Sharing, side: str) -> Shards | None:
    """How what passes at a side of a module is shared out, None where it is whole.

    Raises:
        CapabilityError: in a way that is not known here.
    """
    style, mesh = shared
    kind = type(style).__name__
    if kind in WHOLE:
        return None
    if kind not in (OUTPUTS, INPUTS):
        raise CapabilityError(WHY)
    outer, layouts = ("out", style.output_layouts) if kind == OUTPUTS else ("in", style.input_layouts)
    if kind == INPUTS and side == "out" and hasattr(style.output_layouts, "dim"):
        raise CapabilityError(WHY)
    if side != outer or not hasattr(layouts, "dim"):  # those of tensors that all have name no axis
        return None
    ways = mesh.size()
    n: int = module.out_features if kind == OUTPUTS else module.in_features  # type: ignore[assignment]
    chunk = -(-n // ways)
    sizes = tuple(max(0, min(chunk, n - i * chunk)) for i in range(ways))
    return Shards(-1, sizes, mesh.get_local_rank(), mesh.get_group())
