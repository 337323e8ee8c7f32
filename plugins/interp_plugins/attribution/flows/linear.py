"""Mixing of layers of linear attention, which have no pattern: what each head takes from each token's value.

A gated delta rule is linear in its values, with queries, keys, decay and learning rates held as they are, and it treats
all of a head's dimensions alike; the norm and gate behind it are held as they are, too:

    core[t, h]  =  sum over s of A[h, t, s] * v[s, h]              A: of either sign; its rows do not add up to 1
    z[t, h]     =  gate[t, h] * core[t, h]                         gate: by dimension, z / core
    part(h, s)  =  sum over sinks t of w_t * A[h, t, s] * (gate[t, h] * v[s, h]) @ W_O[h]

So parts add up to what the layer adds. `sum of w_t * gate[t] * A[t, s]` is a vector–Jacobian product of the layer's
own rule, `w_t * gate[t]` going back to the values. Values are those that the rule is handed: a short convolution in
front of it has already mixed a few tokens into each, the value's own and those before it.

Cost: as the layer's forward once for what is kept (linear in the length), and its rule forward and backward per span.
Must equal: the rule called on one token's value at a time (the tests).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

import interp_core as ic

RULE = "chunk_gated_delta_rule"
"""How transformers' modeling files call, at the end of its name, what mixes all tokens of a text."""

ROUNDED = 1e-4
"""How well parts add up at best: rules take float32 for all that they do, in models of wider types, too."""


def rule_name(module: nn.Module) -> str | None:
    """What a layer's forward calls its rule; None where it calls none that is known."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return next((name for name in getattr(code, "co_names", ()) if name.endswith(RULE)), None)


def projection(module: nn.Module) -> nn.Linear:
    """The output projection of a layer: the linear map that is called last, `out_proj` or `o_proj`."""
    return next(child for name, child in module.named_children() if name in ("out_proj", "o_proj"))  # type: ignore


def head_size(module: nn.Module) -> int:
    """How long the values of a layer's heads are."""
    return next(int(getattr(module, name)) for name in ("head_v_dim", "head_dim") if hasattr(module, name))


class LinearMixing(NamedTuple):
    """What is kept of one layer.

    Attributes:
        rule: the layer's own.
        called: what it was called with, values aside.
        values: of all tokens, as the rule was handed them.
        gate: what z is of the rule's output, at the rows.
        rows: their positions.
        out: what the layer gives there.
    """

    rule: Callable[..., Any]
    called: dict[str, Any]
    values: Float[Tensor, "key head d_head"]
    gate: Float[Tensor, "row head d_head"]
    rows: tuple[int, ...]
    out: Float[Tensor, "row d_model"]

    @classmethod
    def of(cls, module: nn.Module, hidden: Float[Tensor, "pos d_model"], rows: Sequence[int]) -> LinearMixing:
        """What a layer does with the tokens of a row; the layer is called once more, by itself."""
        forward = inspect.unwrap(type(module).forward)
        name, seen = rule_name(module), dict[str, Any]()
        assert name is not None
        rule = forward.__globals__[name]
        signature = list(inspect.signature(inspect.unwrap(rule)).parameters)

        def noting(*args: Any, **kwargs: Any) -> Any:
            seen["called"] = dict(zip(signature, args, strict=False)) | kwargs
            seen["made"] = rule(*args, **kwargs)
            return seen["made"]

        # a copy of the forward whose globals have the noting rule; the module's file, which models share, is untouched
        noted = types.FunctionType(
            forward.__code__, {**forward.__globals__, name: noting}, name, forward.__defaults__, forward.__closure__
        )
        noted.__kwdefaults__ = forward.__kwdefaults__
        at = projection(module).register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
        try:
            with torch.no_grad():
                out = noted(module, hidden[None])
        finally:
            at.remove()
        out, core = (x[0] if isinstance(x, tuple) else x for x in (out, seen["made"]))
        called, places = seen["called"], list(rows)
        values = called.pop("value")
        core = core[0, places]
        gate = (seen["z"][0, places].view(core.shape) / core).nan_to_num(0.0, 0.0, 0.0)
        return cls(rule, called, values[0], gate, tuple(rows), out[0, places])

    def mix(self, places: Sequence[int], weight: Float[Tensor, " row"]) -> Float[Tensor, "head key d_head"]:
        """What values are multiplied by in the sum of some rows, each times its weight.

        Args:
            places: of these rows among all.
        """
        with torch.enable_grad():
            values = self.values[None].detach().requires_grad_()
            outputs = self.rule(value=values, **self.called)
            core = outputs[0] if isinstance(outputs, tuple) else outputs
            # the rule is linear in its values: one backward pass gives the coefficients of a weighted sum of rows
            back = torch.zeros_like(core)
            back[0, [self.rows[place] for place in places]] = weight.to(core)[:, None, None] * self.gate[list(places)]
            (mixed,) = torch.autograd.grad(core, values, back)
        return mixed[0].transpose(0, 1)

    def demand(self, added: Float[Tensor, "row d_model"], w_o: Tensor, bias: Tensor, most: float, what: str) -> None:
        """Refuse a layer whose parts are not what it adds, at the last row.

        Args:
            added: what the layer added in the pass.
            w_o: `[d_model head d_head]`.
            most: how far off it may be, in parts of its norm.

        Raises:
            CapabilityError: it is off by more.
        """
        z = (self.mix([len(self.rows) - 1], torch.ones(1)).transpose(0, 1) * self.values).sum(0)
        projected = w_o.flatten(1) @ z.flatten().to(w_o) + bias
        off = max(float((x - added[-1]).norm() / added[-1].norm().clamp_min(1e-30)) for x in (projected, self.out[-1]))
        if not off <= most:
            raise ic.CapabilityError(
                f"{what} does not add the values of its tokens, mixed by its rule (off by {off:.1e} of its norm), so "
                "its flow has no parts by tokens"
            )
