"""Rules of layer-wise relevance propagation: other backward passes through the same forward pass.

Relevance is value times gradient, R(x) = x · ∂objective/∂x, where the gradient follows rules. A rule changes what is
passed back, never what is computed:

    norm                x / deviation(x)        the deviation is a constant; a mean that is taken away stays linear
    activation          y = f(x)                y = x · [f(x) / s(x)], [·] constant; s(x) = x + ε sign(x), sign(0) = 1
    product halved      a · b                   half of the gradient to each factor
    product gated       f(g) · u                f(g) is a constant; other products halved
    attention halved    A(q, k) v               half to v, half to A; softmax as it is; half of what is left to q and k
    attention detached  A(q, k) v               A is a constant
    router halved       w(x) · expert(x)        half to the expert, half to the weight and through the router as it is
    router frozen       w(x) · expert(x)        w is a constant
    gates               σ(g) · y, f(0) ≠ 0      a gate that is open at 0 carries nothing: it is a constant
    positions           x · cos + rotate(x) · sin   half to the table of each layer, half to x
    everything else     linear layers, sums     the gradient; biases keep what goes to them

    name        norm  activation  product  attention  positions
    gradient    -     -           -        -          -           input × gradient
    attnlrp     yes   yes         halved   halved     -           Achtibat et al. (2024)
    cp_lrp      yes   yes         gated    detached   -           Ali et al. (2022)
    pa_lrp      yes   yes         halved   halved     yes         Bakish et al. (2025)
    relp(…)     ln    identity    half     ah: detached           Jafari et al. (2025)

Source: arXiv:2402.05602 (AttnLRP), arXiv:2202.07304 (constant patterns and deviations), arXiv:2506.02138 (positions);
RelP is named after Jafari et al. (2025). Gates as in Arras et al. (2019), arXiv:1909.12114.

Cost: a pass with rules is one forward and one backward pass.
Must equal: logits are the model's bit for bit. Without biases, constant patterns and routers make a model homogeneous,
so relevance adds up to the logit at every layer (`conserving`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import interp_core as ic

PUBLISHED = 1e-10
"""ε of the published AttnLRP, there without a sign."""
RELP = 1e-6
"""ε of the published RelP."""


class Scaled(torch.autograd.Function):
    """What passes, with a part of its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, share: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.share = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.share, None


class Followed(torch.autograd.Function):
    """A value whose gradient is that of slope · x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(slope.dtype), None, None


class Normed(torch.autograd.Function):
    """A normed value whose deviation is a constant; with `centred`, the mean stays linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, scale: Tensor, weight: Tensor | None, axes: int, centred: bool) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, scale, weight, ctx.axes, ctx.centred = inputs
        ctx.save_for_backward(scale, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        scale, weight = ctx.saved_tensors
        grad = (grad if weight is None else grad * weight) * scale
        if ctx.centred:
            grad = grad - grad.mean(tuple(range(-ctx.axes, 0)), keepdim=True)
        return grad, None, None, None, None, None


TABLES = "position_embeddings"
"""Name by which blocks are handed the cosines and sines of rotary positions."""


@dataclass(frozen=True)
class Rules:
    """Which rules hold.

    Attributes:
        name: of the set.
        norms: deviations are constants.
        activations: ε of the activation's rule; None leaves the gradient.
        signed: ε has the sign of the input.
        products: "gradient", "halved" (factors share the gradient) or "gated" (an activated factor is a constant).
        attention: "gradient", "halved" or "detached".
        router: of mixtures of experts: "gradient", "halved" or "frozen".
        positions: tables of positions are inputs of their own.
    """

    name: str
    norms: bool = True
    activations: float | None = PUBLISHED
    signed: bool = True
    products: Literal["gradient", "halved", "gated"] = "halved"
    attention: Literal["gradient", "halved", "detached"] = "halved"
    router: Literal["gradient", "halved", "frozen"] = "frozen"
    positions: bool = False

    @property
    def conserving(self) -> bool:
        """Whether relevance adds up to the logit in a model without biases."""
        on = self.norms and self.activations is not None and self.products != "gradient"
        return on and self.attention == "detached" and self.router == "frozen"

    @property
    def empty(self) -> bool:
        """Whether nothing is replaced."""
        # a name replaces nothing, nor does the sign of an ε that no rule takes
        return replace(self, name="gradient", signed=True) == GRADIENT

    def __str__(self) -> str:
        parts = {
            "norm": self.norms, "activation": self.activations is not None,
            f"product {self.products}": self.products != "gradient",
            f"attention {self.attention}": self.attention != "gradient",
            f"router {self.router}": self.router != "gradient", "positions": self.positions,
        }  # fmt: skip
        return f"{self.name} ({', '.join(part for part, on in parts.items() if on) or 'the gradient alone'})"

    def demand_reach(self, model: ic.Model) -> None:
        """Refuse a model whose attention function or tables of positions the rules do not reach.

        Raises:
            CapabilityError: naming what it runs.
        """
        runs = getattr(model.hf.config.get_text_config(), "_attn_implementation", "eager")
        if self.attention != "gradient" and runs not in ("eager", "sdpa"):
            raise ic.CapabilityError(
                f"rules {self.name!r} need attn_implementation 'eager' or 'sdpa', the model runs {runs!r}; load it "
                "with ic.load(..., attn_implementation='sdpa')"
            )
        takes = inspect.signature(type(model.module("block", 0)).forward).parameters
        if self.positions and "pos_embed" not in model.components() and TABLES not in takes:
            raise ic.CapabilityError(_no_tables(self.name))

    @contextmanager
    def on(self, model: ic.Model) -> Iterator[Places]:
        """The rules hold for the runs of the block; gives where the tables of positions are kept.

        Raises:
            CapabilityError: the model computes something that the rules do not reach.
        """
        state = Places()
        if self.empty:
            yield state
            return
        self.demand_reach(model)
        with model.replacing(modules=_modules(self, model, state), operations=_operations(self, state)):
            yield state


GRADIENT = Rules("gradient", False, None, True, "gradient", "gradient", "gradient")
SETS = {
    "attnlrp": Rules("attnlrp"),
    "cp_lrp": Rules("cp_lrp", products="gated", attention="detached"),
    "pa_lrp": Rules("pa_lrp", positions=True),
    "gradient": GRADIENT,
}
"""Rule sets by name."""


def rules(name: str, *, router: str = "frozen", profile: str = "sound") -> Rules:
    """A rule set by name.

    Args:
        router: "frozen" or "halved", for mixtures of experts.
        profile: "reference" takes the published stabiliser, which has no sign.

    Raises:
        PlanError: no set is called so, or another router.
    """
    if name not in SETS:
        raise ic.PlanError(f"no set of rules is called {name!r}. {ic.errors.nearest(name, SETS)}")
    if router not in ("frozen", "halved"):
        raise ic.PlanError(f"router={router!r}: 'frozen' or 'halved'")
    chosen = SETS[name]
    return chosen if chosen is GRADIENT else replace(chosen, router=router, signed=profile == "sound")  # type: ignore[arg-type]


RELP_RULES = ("ln", "identity", "half", "ah")
"""Rules of RelP by their published names."""
RELP_SETS: dict[str, tuple[str, ...]] = {"paper": ("ln", "identity", "half"), "published_demo": ("ln", "half")}
"""Sets of RelP by name: what the paper defines; what its demo switches on, where the activation's rule stays off."""


def relp(chosen: Sequence[str] | str = "paper") -> Rules:
    """A rule set of RelP.

    Args:
        chosen: names of `RELP_RULES`, or a name of `RELP_SETS`.

    Raises:
        PlanError: another name.
    """
    known = [*RELP_SETS, *RELP_RULES]
    names = (RELP_SETS.get(chosen) or (chosen,)) if isinstance(chosen, str) else tuple(chosen)
    for name in names:
        if name not in RELP_RULES:
            raise ic.PlanError(f"RelP has no rule {name!r}. {ic.errors.nearest(name, known)}")
    return Rules(
        "relp:" + "+".join(name for name in RELP_RULES if name in names),
        norms="ln" in names,
        activations=RELP if "identity" in names else None,
        products="halved" if "half" in names else "gradient",
        attention="detached" if "ah" in names else "gradient",
        router="frozen" if "ah" in names else "gradient",
    )


@dataclass
class Places:
    """Where a pass is, and what it left.

    Attributes:
        plain: inside a module that keeps its own gradient.
        routing: inside a mixture of experts, outside its experts.
        activated: what the last activation gave.
        tables: per layer, the cosines and sines that were taken as inputs `[… pos d_head]`; under -1 the learnt
            embedding of positions `[… pos d_model]`.
    """

    plain: bool = False
    routing: bool = False
    activated: Tensor | None = None
    tables: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @contextmanager
    def inside(self, **places: bool) -> Iterator[None]:
        """For a while."""
        before = {name: getattr(self, name) for name in places}
        try:
            vars(self).update(places)
            yield
        finally:
            vars(self).update(before)


def _no_tables(name: str) -> str:
    return (
        f"rules {name!r}: this model's blocks are not handed cosines and sines of positions, so these cannot be "
        "inputs; take rules 'attnlrp'"
    )


def unruled(model: ic.Model) -> list[int]:
    """Layers that mix by a recurrence, which keep their own gradient: they are products all through."""
    parts = ({name: model.module(name, layer) for name in model.components(layer)} for layer in range(model.n_layers))
    return [layer for layer, of_layer in enumerate(parts) if _recurrence(of_layer)]


def _recurrence(parts: Mapping[str, nn.Module]) -> nn.Module | None:
    """Of a layer's components what mixes tokens, if it is something else than attention with a softmax."""
    mixer = parts.get("mixer")
    return None if mixer is parts.get("attn") else mixer


def _operations(chosen: Rules, state: Places) -> dict[str, Callable[..., Any]]:
    """What replaces operations."""

    def kept(rule: Callable[..., Any]) -> Callable[..., Any]:
        def call(operation: Callable[..., Any], *args: Any, **named: Any) -> Any:
            # on masks and constant tables there is no gradient to change: a rule there would only cost time
            moves = any(isinstance(x, Tensor) and x.requires_grad for x in args)
            return rule(operation, *args, **named) if moves and not state.plain else operation(*args, **named)

        return call

    by_operation: dict[str, Callable[..., Any]] = {}
    if chosen.norms:
        by_operation |= {"rsqrt": _constant, "layer_norm": _layer_norm, "rms_norm": _rms_norm}
    # also without a rule of its own: an activation that is written as x · σ(x) would get the rule for products
    by_operation["activation"] = _plain if chosen.activations is None else _activation(chosen, state)
    if chosen.products != "gradient":
        by_operation["mul"] = _halved if chosen.products == "halved" else _gated(state)
    if chosen.attention == "detached":
        by_operation |= {"softmax": _softmax(state), "sdpa": _detached_attention}
    elif chosen.attention == "halved":
        by_operation |= {"matmul": _halved, "sdpa": _halved_attention}
    # attention's own softmax keeps its gradient under these rules; that of routers is held
    if chosen.router == "frozen" and "softmax" not in by_operation:
        by_operation["softmax"] = _softmax(state, everywhere=False)
    return {name: kept(rule) for name, rule in by_operation.items()}


def _modules(chosen: Rules, model: ic.Model, state: Places) -> dict[Any, Callable[..., Any]]:
    """What replaces modules: the parts in which other rules hold."""
    by_module: dict[Any, Callable[..., Any]] = {}

    def within(**places: bool) -> Callable[..., Any]:
        def rule(module: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
            with state.inside(**places):
                return forward(*args, **named)

        return rule

    def frozen(module: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        with state.inside(plain=True):
            return _detached(forward(*args, **named))

    def with_tables(layer: int) -> Callable[..., Any]:
        def rule(module: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
            if not isinstance(named.get(TABLES), tuple):  # one table of complex numbers, say
                raise ic.CapabilityError(_no_tables(chosen.name))
            leaves = tuple(table.detach().requires_grad_() for table in named[TABLES])
            state.tables[layer] = leaves
            return forward(*args, **{**named, TABLES: leaves})

        return rule

    def with_embedding(module: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        leaf = forward(*args, **named).detach().requires_grad_()
        state.tables[-1] = (leaf,)
        return leaf

    if chosen.positions and "pos_embed" in model.components():
        by_module["pos_embed"] = with_embedding
    elif chosen.positions:
        by_module |= {model.module("block", layer): with_tables(layer) for layer in range(model.n_layers)}
    for layer in range(model.n_layers):
        parts = {name: model.module(name, layer) for name in model.components(layer)}
        # a gated delta rule is products all through; half of each would leave next to nothing of long texts
        if (recurrence := _recurrence(parts)) is not None:
            by_module[recurrence] = within(plain=True)
        # in the block gates and softmax are the router's; inside an expert an activation is one like any other
        if "experts" in parts:
            by_module[parts["mlp"]], by_module[parts["experts"]] = within(routing=True), within(routing=False)
            by_module[parts["router"]] = frozen if chosen.router == "frozen" else within(plain=True)
    return by_module


def _detached(output: Any) -> Any:
    """The tensors of an output as constants."""
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(map(_detached, output)) if isinstance(output, tuple) else output


def _plain(operation: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    """One operation, however it is composed: no rule for products goes into it."""
    return operation(*args, **named)


def _constant(operation: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    return operation(*args, **named).detach()


def _halved(operation: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    return _scaled(operation(*args, **named), 0.5)


def _scaled(x: Tensor, share: float) -> Tensor:
    return Scaled.apply(x, share)  # type: ignore[no-untyped-call]


def _softmax(state: Places, everywhere: bool = True) -> Callable[..., Tensor]:
    """Patterns are constants, and so are weights of experts."""

    def rule(operation: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        pattern = operation(*args, **named)
        return pattern.detach() if everywhere or state.routing else pattern

    return rule


def _detached_attention(
    operation: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any
) -> Tensor:
    return operation(query.detach(), key.detach(), value, *args, **named)


def _halved_attention(
    operation: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any
) -> Tensor:
    # one kernel for pattern and values, so that gradients are scaled where they leave: half to v, and of the half that
    # is the pattern's, half to q and half to k
    return operation(_scaled(query, 0.25), _scaled(key, 0.25), _scaled(value, 0.5), *args, **named)


def _activation(chosen: Rules, state: Places) -> Callable[..., Tensor]:
    """An activation is a factor of its input; one that is open at 0 is a gate."""
    assert chosen.activations is not None
    epsilon = chosen.activations

    def rule(operation: Callable[..., Tensor], x: Tensor, *args: Any, **named: Any) -> Tensor:
        with torch.no_grad():
            # told by value, since families write the same gate in many ways: SiLU and GELU are 0 at 0, a sigmoid is not
            is_gate = bool(operation(x.new_zeros(1), *args, **named).any())
        if is_gate:
            keeps = state.routing and chosen.router != "frozen"
            gate = operation(x, *args, **named)
            return gate if keeps else gate.detach()
        with torch.no_grad():
            value = operation(x, *args, **named)
            # in half precision x + 1e-10 is x, and 1e-10 itself is 0 in float16: f(x) / s(x) would be 0 / 0 at x = 0
            wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            # not sign(x), which is 0 at 0 and would leave nothing to divide by
            shift = torch.copysign(torch.full_like(wide, epsilon), wide) if chosen.signed else epsilon
            slope = (value.to(wide.dtype) / (wide + shift)).to(x.dtype)
        state.activated = Followed.apply(x, value, slope)  # type: ignore[no-untyped-call]
        return state.activated

    return rule


def _gated(state: Places) -> Callable[..., Tensor]:
    """An activated factor is a constant; factors of other products share."""

    def rule(operation: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
        # a gated MLP multiplies right after its activation; forgotten at the first product, it gates no later one
        gate, state.activated = state.activated, None
        if a is gate or b is gate:
            return operation(*(x.detach() if x is gate else x for x in (a, b)))
        return _halved(operation, a, b)

    return rule


def _layer_norm(
    operation: Callable[..., Tensor], x: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        value = operation(x, normalized_shape, weight, bias, eps)
        axes = tuple(range(-len(normalized_shape), 0))
        scale = (x.var(axes, correction=0, keepdim=True) + eps).rsqrt()
    return Normed.apply(x, value, scale, weight, len(axes), True)  # type: ignore[no-untyped-call]


def _rms_norm(
    operation: Callable[..., Tensor], x: Tensor, normalized_shape: Sequence[int], weight: Any = None,
    eps: float | None = None,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        value = operation(x, normalized_shape, weight, eps)
        axes = tuple(range(-len(normalized_shape), 0))
        scale = (x.square().mean(axes, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return Normed.apply(x, value, scale, weight, len(axes), False)  # type: ignore[no-untyped-call]
