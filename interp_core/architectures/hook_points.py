"""Hook points: where in a model the value of a site can be had and replaced.

A hook point names a module, a side of it, and how the site's value lies in what passes there. Engines carry hook points
out; a hook point knows nothing of hooks.

Most hook points are views: the value is the first tensor that passes, seen in other axes. Derived hook points compute
the value (`get`) and put a change of it back (`put`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import CapabilityError
from .family import Arrangement, View
from .parameters import matrix
from .rerouting import Proof, Routed, Taken
from .routing import Router, RouterInBlock

Side = Literal["in", "out", "attention", "own"]
INSIDE = ("attention", "own")
"""Sides that are inside attention: of transformers' attention interface, or of a module that computes it by itself."""


class Call:
    """What passes a hook point, as one object that changes follow each other on.

    Attributes:
        module: the module.
        args: its positional inputs.
        output: its whole output (None before the call).
        first: the first tensor that passes; assigning it changes what the model goes on with.
        shape: batch and pos of the pass, for modules that see them flattened.
        needs: first tensors of the hook points that this one needs.
        kwargs: inputs passed by name, for hook points at a module's input.
        unedited: the output as the module gave it.
        taken: what edits of a router have forced so far.
        proofs: of edits of a router, to be closed when all of them are done.
    """

    __slots__ = (
        "_changes", "args", "first", "kwargs", "module", "needs", "output", "proofs", "shape", "taken", "unedited",
    )  # fmt: skip

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        output: Any,
        first: Tensor,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.module, self.args, self.output, self.first = module, args, output, first
        self.kwargs: Mapping[str, Any] = kwargs or {}
        self.shape: tuple[int, int] = (0, 0)
        self.needs: tuple[Tensor, ...] = ()
        self.unedited, self.taken, self.proofs = output, list[Taken](), list[Proof]()
        self._changes: list[tuple[HookPoint, tuple[int, ...] | None, Tensor]] = []

    def value(self, point: HookPoint, units: tuple[int, ...] | None) -> Tensor:
        """A derived value as earlier edits of this call left it.

        A partial one (some heads' outputs, of z) is computed from tensors that its edits never touch, so what these
        changed is added to it: `[batch pos unit d]`.
        """
        assert point.get is not None
        x = point.get(self, units)
        for changed, those, change in self._changes:
            if changed is point:
                wanted = range(x.shape[-2]) if units is None else units
                changed_units = range(change.shape[-2]) if those is None else those
                both = [(i, list(changed_units).index(unit)) for i, unit in enumerate(wanted) if unit in changed_units]
                x = x.index_add(-2, *_indexed(both, change, x.device))
        return x

    def change(self, point: HookPoint, units: tuple[int, ...] | None, old: Tensor, new: Tensor) -> None:
        """Put an edited derived value back into what the model goes on with."""
        assert point.put is not None
        point.put(self, old, new)
        if point.partial:
            self._changes.append((point, units, new - old))


def _indexed(pairs: list[tuple[int, int]], change: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """For pairs (place among the wanted units, place in `change`): the places where changes go, and these changes."""
    to = torch.tensor([i for i, _ in pairs], dtype=torch.long, device=device)
    return to, change[..., [j for _, j in pairs], :]


@runtime_checkable
class Sharded(Protocol):
    """An axis that processes share between them."""

    def gather(self, x: Tensor) -> Tensor:
        """The whole tensor, of what each process has."""

    def own(self, x: Tensor) -> Tensor:
        """This process's part of a whole tensor."""


@dataclass(frozen=True)
class Layout:
    """How a site's tensor passes a module, where it is not `[batch pos …]` as the site has it.

    Attributes:
        flat: batch and pos are one axis.
        factor: the block multiplies by it after the module; a number, or one for each feature.
        bias: the block adds it after that.
        images: it passes a vision tower, in which the patches of all images follow each other, as `[patch d]` or
            `[tile patch d]`.
        shards: how an axis is shared out between processes, see `shards.py`.
        arranged: the order of the features.
    """

    flat: bool = False
    factor: float | Tensor = 1.0
    bias: float | Tensor = 0.0
    images: bool = False
    shards: Sharded | None = None
    arranged: Arrangement | None = None

    @property
    def scaled(self) -> bool:
        """Whether there is a factor, or a bias."""
        return isinstance(self.factor, Tensor) or self.factor != 1 or isinstance(self.bias, Tensor)

    def enter(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """What passes, as the site has it.

        Raises:
            CapabilityError: a tower gives another number of patches than the images have.
        """
        x = x if self.shards is None else self.shards.gather(x)
        if self.images:
            if x.numel() != shape[1] * x.shape[-1]:
                patches = x.numel() // x.shape[-1]
                raise CapabilityError(
                    f"the vision tower has {patches} patches, and the images {shape[1]}, as the family file counts "
                    "them: pass what this model's processor returned, whole"
                )
            x = x.reshape(1, -1, x.shape[-1])
        x = x.reshape(*shape, *x.shape[1:]) if self.flat else x
        x = x if self.arranged is None else self.arranged.into(x)
        return x * self.factor + self.bias if self.scaled else x

    def leave(self, x: Tensor, like: Tensor) -> Tensor:
        """The site's tensor as the module has to pass it on, in the place of `like`."""
        x = x if self.arranged is None else self.arranged.back(x)
        x = x if self.shards is None else self.shards.own(x)
        x = x.reshape(like.shape)
        if not self.scaled:
            return x
        entered = like * self.factor + self.bias
        return unrounded(entered, x, like, (x - self.bias) / self.factor, self.factor)


def unrounded(old: Tensor, new: Tensor, before: Tensor, after: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """What lies under a value that was worked out of `before` and changed from `old` to `new`: `after`, but exactly
    what was there where nothing changed, so that setting a site to its own value changes no bit. (The difference is
    zero there, and carries the gradient.)"""
    return torch.where(new == old, before + (new - old) / factor, after)


Get = Callable[[Call, "tuple[int, ...] | None"], Tensor]


@dataclass(frozen=True, eq=False)
class HookPoint:
    """Where a value is, for one site and layer.

    Attributes:
        module: dotted path in the model ("" is the model).
        side: its input (the first, or that named `part`), its output, or inside its attention, at `part`: the attention
            function that it calls, or its own.
        view: the first tensor in the site's axes (None: as it is). Views can be read, edited and differentiated.
        get: a derived value instead, of the call and, where `partial`, the wanted units (None: all).
        put: `(call, old, new)`: make the derived value's change act.
        partial: `get` computes only the units asked for, and `put` takes their change.
        needs: hook points whose first tensors `get` and `put` use; they lie before this one.
        rank: order among hook points at the same place.
        routed: how experts are banned, forced and weighed there, for sites of a router.
        calls: inside attention, how often a layer comes by with the same tensor.
        in_block: of a router that lies in its block, how to find it where the experts' module is called.
        layout: how the tensor passes, where that is not as the site has it; one for all hook points of a module's side.
    """

    module: str
    side: Side
    part: str = ""
    view: View | None = None
    get: Get | None = None
    put: Callable[[Call, Tensor, Tensor], None] | None = None
    partial: bool = False
    needs: tuple[HookPoint, ...] = ()
    rank: int = 0
    routed: Routed | None = None
    in_block: RouterInBlock | None = None
    layout: Layout | None = None
    calls: int = 1

    @property
    def inside(self) -> bool:
        """Whether it lies inside attention, where there is no module to hook."""
        return self.side in INSIDE

    @property
    def shares_keys(self) -> bool:
        """Whether attention there can take keys and values of columns that a pass does not compute."""
        return self.side == "attention" and self.calls == 1


KEYED = ("rot_k", "v")
"""Parts inside attention that reach back to the first key, also in a step that computes one token."""


def transposed(x: Tensor) -> Tensor:
    """`[batch head pos d_head]` as `[batch pos head d_head]`."""
    return x.transpose(1, 2)


def resid_mid(
    block: HookPoint, attn_out: HookPoint, join: Callable[[Tensor, Tensor], Tensor] | None = None
) -> HookPoint:
    """The stream after attention. The block adds it up in a local variable, so a change goes in by `attn_out`.

    Args:
        attn_out: what attention or another mixer adds; derived (`both`) where it is a sum.
        join: what the stream before and `attn_out` make, where that is not their sum (but moves as `attn_out` does).
    """
    added = attn_out.get or (lambda call, _units: call.first)
    plain = join is None and attn_out.get is None

    def get(call: Call, units: tuple[int, ...] | None) -> Tensor:
        return (join or torch.add)(call.needs[0], added(call, units))

    def put(call: Call, old: Tensor, new: Tensor) -> None:
        back = new - call.needs[0] if plain else call.first + (new - old)
        call.first = unrounded(old, new, call.first, back)

    needs = attn_out.needs or (block,)
    return replace(attn_out, get=get, put=put, needs=needs, rank=1)  # after edits of `attn_out`, of which it is made


def both(block: HookPoint, beside: HookPoint, attn_out: HookPoint) -> HookPoint:
    """What two mixers of a block add together: that beside attention, and attention after it. A change goes in by
    attention's part. (It needs the block's input only for `resid_mid`, which shares its place.)"""

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        return call.needs[1] + call.first

    def put(call: Call, old: Tensor, new: Tensor) -> None:
        call.first = unrounded(old, new, call.first, call.first + (new - old))

    return replace(attn_out, get=get, put=put, needs=(block, beside))


def head_out(z: HookPoint, projected: HookPoint, module: nn.Module, n_heads: int, d_head: int) -> HookPoint:
    """Contribution of each head: z times its slice of W_O. A change is added to the projection's output."""

    def get(call: Call, units: tuple[int, ...] | None) -> Tensor:
        (z,) = call.needs
        z = z.view(*z.shape[:2], n_heads, d_head)
        z = z if units is None else z[..., list(units), :]
        rows = None if units is None else rows_of(units, d_head)
        weight = matrix(module, z, rows).weight.unflatten(0, (-1, d_head))
        return torch.einsum("bphe,hed->bphd", z, weight)

    def put(call: Call, old: Tensor, new: Tensor) -> None:
        call.first = call.first + (new - old).sum(-2)

    return replace(projected, get=get, put=put, partial=True, needs=(z,))


def rows_of(heads: Sequence[int], d_head: int) -> Tensor:
    """Which inputs of an output projection are those of some heads."""
    return (torch.tensor(heads)[:, None] * d_head + torch.arange(d_head)).flatten()


def at_router(module: str, experts: str, router: Router) -> HookPoint:
    """Where all of a router passes: what its module returns, or what its block hands the experts."""
    out = HookPoint(module, "out")
    return HookPoint(experts, "in", needs=(out,), in_block=router) if isinstance(router, RouterInBlock) else out


def router_logits(at: HookPoint, router: Router, n_experts: int, k: int) -> HookPoint:
    """Router logits; a change selects experts again, as the family does."""
    routed = Routed(router, n_experts, k)

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        return router.logits(call.output).view(*call.shape, -1)

    def put(call: Call, _old: Tensor, new: Tensor) -> None:
        routed.select_again(call, new.reshape(-1, n_experts))

    return replace(at, get=get, put=put, routed=routed)


def router_weights(at: HookPoint, router: Router, n_experts: int, k: int) -> HookPoint:
    """Executed weights, dense. A change may move weight to other experts, but to no more than k per token."""

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        return router.weights(call.output, n_experts).view(*call.shape, n_experts)

    def put(call: Call, _old: Tensor, new: Tensor) -> None:
        call.output = router.reweighted(call.output, new.reshape(-1, n_experts))

    # After edits of the logits, which select again and so write the weights anew.
    return replace(at, get=get, put=put, rank=1, routed=Routed(router, n_experts, k))


def router_probs(at: HookPoint, router: Router) -> HookPoint:
    """The family's scores as probabilities, of the logits that were selected by; read only."""

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        rule = router.rule(call.module, call.args)
        return router.selection.probs(rule, router.logits(call.output)).view(*call.shape, -1)

    return replace(at, get=get)


def router_indices(at: HookPoint, router: Router, k: int) -> HookPoint:
    """Executed experts, as the router orders them; read only."""

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        return router.chosen(call.output, k).view(*call.shape, k)

    return replace(at, get=get)


def shared_expert_gate(module: str) -> HookPoint:
    """What a shared expert's output is multiplied by: the sigmoid of what the module gives; read only."""

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        return call.first.sigmoid().view(*call.shape, 1)

    return HookPoint(module, "out", get=get)


def shared_weights(at: HookPoint, router: Router) -> HookPoint:
    """What shared experts' outputs are multiplied by, where the router says so; read only."""

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        return router.shared(call.output).view(*call.shape, -1)

    return replace(at, get=get)


def expert_out(module: str, router: Router, n_experts: int) -> HookPoint:
    """Weighted contribution of single experts."""

    def wanted(units: tuple[int, ...] | None) -> tuple[int, ...]:
        return tuple(range(n_experts)) if units is None else units

    def get(call: Call, units: tuple[int, ...] | None) -> Tensor:
        contributions = router.contributions(call.module, call.args, call.output, wanted(units))
        return contributions.view(*call.shape, *contributions.shape[1:])

    def put(call: Call, old: Tensor, new: Tensor) -> None:
        call.first = router.contributed(call.first, (new - old).flatten(0, 1))

    return HookPoint(module, "out", get=get, put=put, partial=True)


EMBEDDINGS, DEEPSTACK = "inputs_embeds", "deepstack_visual_embeds"
"""Names by which language models are handed embeddings, and features to add between the first blocks."""


def deepstack(module: str, layer: int) -> HookPoint:
    """Visual features that the language model adds after a block, laid over all positions (zero at text)."""

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        features = call.kwargs[DEEPSTACK][layer]
        everywhere = features.new_zeros(*call.shape, features.shape[-1])
        everywhere[call.kwargs["visual_pos_masks"]] = features
        return everywhere

    def put(call: Call, _old: Tensor, new: Tensor) -> None:
        features = list(call.kwargs[DEEPSTACK])
        features[layer] = new[call.kwargs["visual_pos_masks"]]
        call.kwargs = {**call.kwargs, DEEPSTACK: features}

    return HookPoint(module, "in", EMBEDDINGS, get=get, put=put)


def logits() -> HookPoint:
    """The model's own output."""

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        return call.output.logits

    def put(call: Call, _old: Tensor, new: Tensor) -> None:
        call.output.logits = new

    return HookPoint("", "out", get=get, put=put)


def uses_interface(attention: nn.Module) -> bool:
    """Whether an attention module goes through transformers' attention interface."""
    # No attribute says so; but a forward that goes through the interface has to name its table.
    code = inspect.unwrap(type(attention).forward).__code__
    config: Any = getattr(attention, "config", None)
    # GPT-2's kin has eager attention of its own, which multiplies in float32
    past = getattr(attention, "reorder_and_upcast_attn", False) and config._attn_implementation == "eager"
    return "ALL_ATTENTION_FUNCTIONS" in code.co_names and config is not None and not past


def attending(path: str, attention: nn.Module) -> str:
    """Path of the module that goes through the interface: attention itself, or the only one inside it that does (BERT's
    `self`); "" where there is none."""
    inside = [name for name, module in attention.named_modules(prefix=path) if uses_interface(module)]
    return inside[0] if inside[:1] == [path] or len(inside) == 1 else ""


def first_argument(module: nn.Module) -> str:
    """What a module's forward calls its first argument."""
    return list(inspect.signature(type(module).forward).parameters)[1]


def own_code(kind: type) -> Iterator[CodeType]:
    """The code of a module class's own methods, and those that it inherits from other models' classes."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            for member in vars(base).values():
                function = inspect.unwrap(member) if inspect.isfunction(member) else getattr(member, "__func__", None)
                if (code := getattr(function, "__code__", None)) is not None:
                    yield code


def computing(path: str, attention: nn.Module) -> str:
    """Path of the module whose own code computes attention's softmax: attention itself, or the only one inside it that
    does; "" where there is none."""
    names = {"softmax", "scaled_dot_product_attention"}
    inside = [
        name
        for name, module in attention.named_modules(prefix=path)
        if any(names & {*code.co_names} for code in own_code(type(module)))
    ]
    return inside[0] if len(inside) == 1 else ""
