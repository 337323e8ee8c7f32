"""`Model.replacing`: rules in the place of modules, attention and operations, for the runs of a block and no longer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import sampled, tiny_model
from layouts import OWN_ATTENTION
from sweeping import JUDGED, tokens
from tolerances import rounding
from torch import Tensor
from torch.nn import functional as F

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.engines.replace import FUNCTIONS
from interp_core.testing.state import State

GRAD = {"read": S.resid_pre, "grad": lambda logits: logits[:, -1].square().sum()}


def as_it_is(calls: Counter[str], what: str) -> Callable[..., Any]:
    """A rule that calls what it replaces: the last thing that it is bound to, which comes first or second."""

    def rule(*bound: Any, **kwargs: Any) -> Any:
        calls[what] += 1
        module, rest = (bound[0], bound[1:]) if isinstance(bound[0], torch.nn.Module) else (None, bound)
        own, *args = rest
        return own(module, *args, **kwargs) if what == "attention" else own(*args, **kwargs)

    return rule


@pytest.mark.parametrize("family", sampled())
def test_rules_that_call_what_they_replace_change_no_bit(family: str) -> None:
    """Logits and gradients of every family, with rules for all its norms and MLPs, attention and all operations."""
    model, calls = tiny_model(family), Counter[str]()
    batch = tokens() if "left padding" not in model.atlas.lacking else tokens().row(0)
    kinds = {type(m) for m in model.hf.modules() if "Norm" in type(m).__name__ or type(m).__name__.endswith("MLP")}
    plain = model.run(batch, **GRAD)
    before = State.of(model.hf)
    own = family in OWN_ATTENTION
    with model.replacing(
        {kind: as_it_is(calls, "module") for kind in kinds},
        attention=None if own else as_it_is(calls, "attention"),
        operations={name: as_it_is(calls, name) for name in FUNCTIONS},
    ):
        ruled = model.run(batch, **GRAD)
    after = State.of(model.hf)
    assert not [before.changes(part, after) for part in vars(before) if before.changes(part, after)]
    assert torch.equal(ruled.logits, plain.logits)
    for layer in range(model.n_layers):
        assert torch.equal(ruled.grad[S.resid_pre[layer]], plain.grad[S.resid_pre[layer]])
    assert calls["module"] and (own or calls["attention"] >= len(model.atlas.layers("scores")))
    assert sum(calls[name] for name in FUNCTIONS) > 0
    if own:
        with pytest.raises(ic.CapabilityError, match="computes attention by itself"):  # noqa: SIM117
            with model.replacing(attention=as_it_is(calls, "attention")):
                raise AssertionError


class Half(torch.autograd.Function):
    """A product whose gradient is shared by its factors."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return grad * b / 2, grad * a / 2


def identity(activation: Callable[[Tensor], Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    """An activation as a factor of its input."""
    y = activation(x, **kwargs)
    return x * (y / x).detach() + (y - x * (y / x)).detach()


LRP: dict[str, Any] = {
    "attention": lambda module, kernel, q, k, *rest, **named: kernel(module, q.detach(), k.detach(), *rest, **named),
    "operations": {
        "mul": lambda multiply, a, b: Half.apply(a, b),
        "rsqrt": lambda rsqrt, x: rsqrt(x).detach(),
        "activation": identity,
    },
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "olmo2", "gemma3"])
def test_relevance_is_conserved(family: str) -> None:
    """Rules that make a model without biases homogeneous (Ali et al. 2022, Achtibat et al. 2024): the relevance x · grad
    of any layer's stream adds up to the logit, up to the float32 of the norms, and the logits stay the model's."""
    hf = testing.tiny(family, dtype=torch.float64)
    for name, weight in hf.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    model, text = ic.load(hf), tokens().row(0)
    chosen: dict[str, Any] = {"read": S.resid_pre, "grad": lambda logits: logits[0, -1, 7]}
    plain = model.run(text, **chosen)
    with model.replacing(**LRP):
        run = model.run(text, **chosen)
    assert torch.allclose(run.logits, plain.logits, atol=1e-12, rtol=1e-12)
    logit = float(plain.logits[0, -1, 7])
    for layer in range(model.n_layers):
        relevance = float((run[S.resid_pre[layer]] * run.grad[S.resid_pre[layer]]).sum())
        assert abs(relevance - logit) <= rounding(model) * max(1.0, abs(logit))
    gradients = float((plain[S.resid_pre[0]] * plain.grad[S.resid_pre[0]]).sum())
    assert abs(gradients - logit) > 1e-2  # without the rules it does not


def test_a_rule_for_attention_meets_what_a_plan_opens() -> None:
    """Its kernel is then attention in the open: patterns are read, and a rule that hides values changes the output."""
    model = tiny_model("llama")
    plain = model.run(tokens(), read=S.pattern)
    with model.replacing(attention=lambda m, kernel, q, k, v, *rest, **named: kernel(m, q, k, v * 2, *rest, **named)):
        ruled = model.run(tokens(), read=S.pattern)
        again = model.run(tokens(), read=S.pattern)
    assert torch.equal(ruled[S.pattern[0]], plain[S.pattern[0]])
    assert not torch.equal(ruled.logits, plain.logits) and torch.equal(ruled.logits, again.logits)
    assert torch.equal(model.run(tokens(), read=S.pattern).logits, plain.logits)


def test_modules_by_class_and_by_themselves() -> None:
    model = tiny_model("llama")
    layer = model.hf.model.layers[1].mlp
    with model.replacing({layer: lambda module, forward, x: torch.zeros_like(forward(x))}):
        ruled = model.run(tokens(), read=S.mlp_out)
    assert not ruled[S.mlp_out[1]].any() and ruled[S.mlp_out[0]].any()
    with model.replacing({type(layer): lambda module, forward, x: torch.zeros_like(x)}):
        made = model.generate(tokens().row(0), read=S.mlp_out, max_new_tokens=2)
    assert not any(step[S.mlp_out[at]].any() for step in made.steps for at in range(3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "phi3"])
def test_components_are_those_of_every_layer(family: str) -> None:
    """By TransformerLens' names, whatever a family calls its modules."""
    model, calls = tiny_model(family), Counter[str]()
    plain = model.run(tokens()).logits
    with model.replacing({name: as_it_is(calls, name) for name in ("ln1", "mlp", "ln_final")}):
        assert torch.equal(model.run(tokens()).logits, plain)
    assert calls == {"ln1": model.n_layers, "mlp": model.n_layers, "ln_final": 1}


def test_inner_rules_call_outer_ones() -> None:
    model = tiny_model("llama")
    layer = model.hf.model.layers[1].mlp
    double = {layer: lambda module, forward, x: 2 * forward(x)}
    plain = model.run(tokens().row(0), read=S.mlp_out[1])[S.mlp_out[1]]
    with model.replacing(double):
        with model.replacing(double):
            assert torch.equal(model.run(tokens().row(0), read=S.mlp_out[1])[S.mlp_out[1]], 4 * plain)
        assert torch.equal(model.run(tokens().row(0), read=S.mlp_out[1])[S.mlp_out[1]], 2 * plain)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_errors_leave_the_model_as_it_was(error: type[BaseException]) -> None:
    model = tiny_model("qwen3")
    plain, before, known = model.run(tokens()).logits, State.of(model.hf), model.fingerprint()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    for rules in ({"attention": fails}, {"operations": {"rsqrt": fails}}, {"modules": {type(model.hf.lm_head): fails}}):
        with pytest.raises(error), model.replacing(**rules):  # type: ignore[arg-type]
            model.run(tokens(), read=S.pattern)
        after = State.of(model.hf)
        assert not [before.changes(part, after) for part in vars(before) if before.changes(part, after)]
    with pytest.raises(error), model.replacing(**LRP):
        raise error
    assert torch.equal(model.run(tokens()).logits, plain) and model.fingerprint() == known


def test_a_model_with_rules_is_another_model() -> None:
    """What is kept in a folder under its fingerprint is not taken for the model's own, nor for that of other rules."""
    model = tiny_model("llama")

    def doubled(own: Any, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    def halved(own: Any, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "half": True})

    known = {model.fingerprint()}
    ways: list[dict[str, Any]] = [
        way for rule in (doubled, halved)
        for way in ({"modules": {"mlp": rule}}, {"attention": rule}, {"operations": {"mul": rule}}, {"operations": {"activation": rule}})
    ]  # fmt: skip
    for way in ways:
        with model.replacing(**way):
            known.add(model.fingerprint())
    assert len(known) == 1 + len(ways)


def test_other_threads_wait_for_their_own_model() -> None:
    model, numbers = tiny_model("llama"), list[Tensor]()
    plain = model.run(tokens()).logits
    thread = threading.Thread(target=lambda: numbers.append(model.run(tokens()).logits))
    with model.replacing({type(model.hf.model.layers[0].mlp): lambda module, forward, x: -forward(x)}):
        thread.start()
        ruled = model.run(tokens()).logits
    thread.join()
    assert torch.equal(numbers[0], plain) and not torch.equal(ruled, plain)


def test_what_cannot_be_replaced_is_refused_before_anything_runs() -> None:
    model, other = tiny_model("llama"), tiny_model("qwen3")
    rule = as_it_is(Counter(), "module")
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"modules": {other.hf.lm_head: rule}}, ic.PlanError, "no such module: Linear"),
        ({"modules": {torch.nn.LayerNorm: rule}}, ic.PlanError, "no such module: LayerNorm. .*LlamaRMSNorm"),
        ({"modules": {3: rule}}, ic.PlanError, "what is replaced takes a module"),
        ({"modules": {"mpl": rule}}, ic.SiteError, "no component is called 'mpl'. .*mlp"),
        ({"modules": {"ln1_post": rule}}, ic.CapabilityError, "no module for ln1_post"),
        ({"modules": {model.hf.lm_head: 3}}, ic.PlanError, "a rule takes a function"),
        ({"modules": [model.hf.lm_head]}, ic.PlanError, "modules takes a dictionary"),
        ({"operations": {"rsqr": rule}}, ic.PlanError, "no operation 'rsqr'. .*rsqrt"),
        ({}, ic.PlanError, "nothing is replaced"),
    ]
    for arguments, kind, message in wrong:
        with pytest.raises(kind, match=message), model.replacing(**arguments):
            raise AssertionError
    with pytest.raises(ic.CapabilityError, match="own copy of the modules.*on\\('torch'\\)"):  # noqa: SIM117
        with ic.load(testing.tiny("llama"), engine="nnsight").replacing(operations={"mul": rule}):
            raise AssertionError
    with model.replacing(attention=as_it_is(Counter(), "attention")):
        with pytest.raises(ic.PlanError, match="attention is replaced already"):  # noqa: SIM117
            with model.replacing(attention=as_it_is(Counter(), "attention")):
                raise AssertionError
        with pytest.raises(ic.PlanError, match="a sweep inside model.replacing"):
            model.sweep(tokens(), [S.z[0, 0].at(-1).zero()], JUDGED)
    assert model.sweep(tokens(), [S.z[0, 0].at(-1).zero()], JUDGED).values.isfinite().all()


def test_rules_inside_a_run_are_refused() -> None:
    model = tiny_model("llama")

    def inside(x: Tensor) -> Tensor:
        with model.replacing(**LRP):
            return x

    with pytest.raises(ic.PlanError, match="inside another run"):
        model.run(tokens(), edits=S.resid_post[0].apply(inside))


def test_products_in_place_are_refused_by_name() -> None:
    hf = testing.tiny("llama")

    class Gated(type(hf.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            gate = F.silu(self.gate_proj(x))
            gate *= self.up_proj(x)
            return self.down_proj(gate)

    hf.model.layers[0].mlp.__class__ = Gated
    model = ic.load(hf)
    with model.replacing(**LRP), pytest.raises(ic.CapabilityError, match="multiplies two tensors in place"):
        model.run(tokens(), **GRAD)
