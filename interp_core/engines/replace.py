"""Something else in the place of modules, of attention and of operations, for a while.

A *rule* is a function that is handed what it replaces and what that was called with:

    modules      rule(module, forward, *args, **kwargs)                                 -> what the module returns
    attention    rule(module, kernel, query, key, value, attention_mask, **kwargs)      -> output, weights (or None)
    operations   rule(operation, *args, **kwargs)                                       -> what the operation returns

`forward`, `kernel` and `operation` are the model's own, so a rule that only calls them changes nothing. It may return
the result of a `torch.autograd.Function`, which is how a backward pass is replaced: the forward pass stays the model's,
and gradients follow the rule. What a rule computes itself is met by no rule; a `forward` or `kernel` that it calls is
the model's code, where all rules hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import CapabilityError
from .attention import OURS, RULED, attention, kernel_of, with_attention

Rule = Callable[..., Any]

FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "activation": (
        F.silu, F.gelu, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.mish, F.softplus, F.hardswish, F.hardsigmoid,
        F.logsigmoid, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh, Tensor.relu, Tensor.sigmoid,
        Tensor.tanh,
    ),
    "layer_norm": (F.layer_norm,),
    "matmul": (
        torch.matmul, torch.bmm, torch.mm, torch.baddbmm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__,
        Tensor.__rmatmul__, Tensor.baddbmm,
    ),
    "mul": (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__),
    "rms_norm": (F.rms_norm,),
    "rsqrt": (torch.rsqrt, Tensor.rsqrt),
    "sdpa": (F.scaled_dot_product_attention,),
    "softmax": (F.softmax, torch.softmax, Tensor.softmax),
}  # fmt: skip
"""What is one operation by what it does, however it is written."""
PRODUCTS = ("mul", "matmul")
"""Operations that a rule is asked for only where two differentiable tensors meet; a product with a weight is linear."""
IN_PLACE = (Tensor.mul_, Tensor.__imul__, Tensor.multiply_)
_NAMES = {function: name for name, functions in FUNCTIONS.items() for function in functions}
_NAMES |= dict.fromkeys(IN_PLACE, "mul")
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Have these modules compute something else until the context ends.

    It is the instance's `forward` that is replaced, so hooks on the module still run around it; one that somebody else
    has replaced before (nnsight, accelerate) is put back.
    """
    former_of = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, former in former_of.items():
            module.__dict__.pop("forward", None)
            if former is not None:
                module.__dict__["forward"] = former


class Operations(TorchFunctionMode):
    """Rules for operations, wherever a forward pass meets them.

    Attributes:
        off: a rule is being carried out, whose own operations are met by none.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.rules, self.off = rules, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Ask the rule for this operation, if there is one."""
        kwargs = kwargs or {}
        name = None if self.off else _NAMES.get(func)
        rule = self.rules.get(name) if name else None
        if rule is None or (name in PRODUCTS and sum(_differentiable(x) for x in (*args, *kwargs.values())) < 2):
            return func(*args, **kwargs)
        if func in IN_PLACE:
            raise CapabilityError(
                f"the model multiplies two tensors in place ({func.__name__}), where a rule's result cannot take over; "
                "replace the module that does it instead"
            )
        return rule(func, *args, **kwargs)

    def applied(self, rule: Rule, *bound: Any) -> Callable[..., Any]:
        """A rule with its first arguments, during which no rule holds: what it computes itself is its own business."""
        return self._switched(functools.partial(rule, *bound), off=True)

    def model_code(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's own code as a rule is handed it: while that runs, all rules hold again."""
        return self._switched(forward, off=False)

    def _switched(self, function: Callable[..., Any], *, off: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, self.off = self.off, off
            try:
                return function(*args, **kwargs)
            finally:
                self.off = before

        return call

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward pass during which these rules hold; for the model as a whole."""

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        return call


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def activations(model: nn.Module) -> list[nn.Module]:
    """Modules that are an activation, of several operations maybe."""
    apart = (nn.Softmax, nn.LogSoftmax, nn.MultiheadAttention)
    return [
        module
        for module in model.modules()
        if type(module).__module__ in _ACTIVATIONS and not isinstance(module, apart)
    ]


@contextmanager
def replaced_attention(rules: Mapping[nn.Module, Rule], operations: Operations) -> Iterator[None]:
    """For a while, the attention of layers is that of their rules, handed the layer's own kernel: where a plan
    looks into the layer, attention in the open."""
    configs: dict[int, Any] = {}
    try:
        for module, rule in rules.items():
            config, kernel = module.config, kernel_of(module)
            configs.setdefault(id(config), with_attention(config, RULED))  # one copy for layers that share a config
            inner = operations.model_code(functools.partial(_inner, kernel))
            module.__dict__["interp_rule"] = config, operations.applied(rule, module, inner)
            module.__dict__["config"] = configs[id(config)]
        yield
    finally:
        for module in rules:
            if "interp_rule" in module.__dict__:
                module.__dict__["config"] = module.__dict__.pop("interp_rule")[0]


def _inner(kernel: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a rule for attention is handed to call."""
    # Decided at every call: hooks come and go with runs, while the rule stays.
    return (attention if "interp_hook" in module.__dict__ else kernel)(module, *args, **kwargs)


def _ruled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The attention function of layers that a rule has."""
    return module.__dict__["interp_rule"][1](*args, **kwargs)


OURS[RULED] = _ruled
