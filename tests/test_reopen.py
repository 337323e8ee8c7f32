"""What is asked of a model at load and changes later: noticed at the next run, and served or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

PLAN = {"read": [S.q[1], S.z[1], S.pattern[1]], "edits": [S.q[1, 0].at(-1).scale(0.5), S.z[0, 1].at(-1).zero()]}


class LowRank(nn.Module):
    """A linear layer with a low-rank term beside it, as adapters put one in its place."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        kind = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        torch.manual_seed(3)
        self.down, self.up = nn.Linear(base.in_features, 2, **kind), nn.Linear(2, base.out_features, **kind)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def adapt(*names: str) -> Callable[[Any], None]:
    def change(hf: Any) -> None:
        for layer in hf.model.layers:
            for name in names:
                setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name)).eval())

    return change


def renewed_weight(hf: Any) -> None:
    hf.model.layers[1].mlp.down_proj.weight = nn.Parameter(hf.model.layers[1].mlp.down_proj.weight * 2)


def loaded_weights(hf: Any) -> None:
    hf.load_state_dict({name: value * 1.1 for name, value in hf.state_dict().items()})


def data(hf: Any) -> None:
    hf.model.layers[1].self_attn.q_proj.weight.data = hf.model.layers[1].self_attn.k_proj.weight.repeat(2, 1)


def another_block(hf: Any) -> None:
    hf.model.layers[1] = copy.deepcopy(hf.model.layers[2])
    hf.model.layers[1].self_attn.layer_idx = 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "adapter at q": adapt("q_proj"),
    "adapter at all": adapt("q_proj", "k_proj", "v_proj"),
    "another block": another_block,
    "eager": lambda hf: hf.set_attn_implementation("eager"),
    "float64": lambda hf: hf.double(),
    "bfloat16": lambda hf: hf.bfloat16(),
    "weights loaded": loaded_weights,
    "weight's data": data,
    "another weight": renewed_weight,
    "another embedding": lambda hf: hf.set_input_embeddings(nn.Embedding.from_pretrained(torch.randn(96, 64))),
    "more tokens": lambda hf: hf.resize_token_embeddings(120, mean_resizing=False),
    "unembedding tied": lambda hf: setattr(hf.lm_head, "weight", hf.model.embed_tokens.weight),
    "shorter context": lambda hf: setattr(hf.config, "max_position_embeddings", 64),
}


def outcome(model: ic.Model, ids: Tensor) -> list[Tensor]:
    run = model.run(ids, **PLAN)
    made = model.generate(ids, edits=PLAN["edits"], max_new_tokens=2, stop_at_eos=False, allow_noop=True)
    swept = model.sweep(ids, [S.q[1, h].at(-1).zero() for h in range(2)], ic.score.logprob(5))
    stream = run[S.q[1]].as_subclass(Tensor)[..., 0, :1].expand(-1, -1, 64)
    values = [run.logits, run[S.q[1]], run[S.z[1]], run[S.pattern[1]], swept.values, model.readout(stream)]
    return [value.detach().as_subclass(Tensor) for value in (*values, made.ids.double())]


@pytest.mark.parametrize("engine", ["torch", "nnsight"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_the_one_loaded_now(change: str, engine: str, ids: Tensor) -> None:
    hf = testing.tiny("llama", tie_word_embeddings=False)
    model = ic.load(hf, engine=engine)
    compiled, before = model.compile(**PLAN), outcome(model, ids)
    CHANGES[change](hf)
    now = ic.load(hf, engine=engine)
    found, wanted = outcome(model, ids), outcome(now, ids)
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, right, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(compiled.run(ids).logits, now.run(ids, **PLAN).logits, atol=1e-6, rtol=1e-6)
    assert model.atlas.shape == now.atlas.shape and model.dtype == now.dtype
    if change not in ("eager", "shorter context"):
        assert found[0].shape != before[0].shape or not torch.allclose(found[0].double(), before[0].double(), atol=1e-6)


def test_readout_and_projection_are_those_of_the_model_now(ids: Tensor) -> None:
    hf = testing.tiny("llama")
    model = ic.load(hf)
    z = model.run(ids, read=S.z[1])[S.z[1]].as_subclass(Tensor)
    adapt("o_proj")(hf)
    hf.model.norm = nn.LayerNorm(64)
    torch.testing.assert_close(model.project(z, 1), hf.model.layers[1].self_attn.o_proj(z.flatten(-2)))
    torch.testing.assert_close(
        model.readout(z[:, :, 0, :1].expand(-1, -1, 64)), ic.load(hf).readout(z[:, :, 0, :1].expand(-1, -1, 64))
    )
    run = model.run(ids, read=[S.head_out[1], S.attn_out[1]])  # its weight is not all that the projection does
    heads = run[S.head_out[1]].plain.sum(2) + model.bias(S.z[1])
    torch.testing.assert_close(heads, run[S.attn_out[1]].plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["torch", "nnsight"])
def test_training_mode_is_refused_where_runs_would_differ(engine: str, ids: Tensor) -> None:
    hf = testing.tiny("gpt2", resid_pdrop=0.1)
    model = ic.load(hf, engine=engine)
    wanted = model.run(ids).logits
    heads = [S.z[0, 0].at(-1).zero()] * 2
    for part in (hf, hf.transformer.h[1], hf.transformer.h[2].mlp.dropout):
        part.train()
        for call in (
            lambda: model.run(ids),
            lambda: model.compile(S.z).run(ids),
            lambda: model.generate(ids, max_new_tokens=1),
            lambda: model.sweep(ids, heads, ic.score.logprob(3)),
            lambda: model.readout(wanted.new_zeros(1, 64)),
            lambda: ic.load(hf),
        ):
            with pytest.raises(ic.InterpError, match=r"training mode.*eval\(\)"):
                call()
        if part is not hf:
            with pytest.raises(ic.CapabilityError, match=r"p=0\.1 of transformer\.h\.\d\.\S+ \(Dropout\)"):
                model.run(ids)
        hf.eval()
        assert torch.equal(model.run(ids).logits, wanted)


def test_training_mode_without_anything_random_is_served(ids: Tensor) -> None:
    hf = testing.tiny("llama")
    model = ic.load(hf)
    wanted = model.run(ids).logits
    hf.train()
    assert torch.equal(model.run(ids).logits, wanted) and hf.training
    (getattr(hf, "activation_checkpointing_enable", None) or hf.gradient_checkpointing_enable)()
    assert torch.equal(model.run(ids).logits, wanted)
    for call in (
        lambda: model.run(ids, read=S.z, grad=lambda logits: logits.sum()),
        lambda: model.generate(ids, max_new_tokens=2),
    ):
        with pytest.raises(ic.CapabilityError, match="in training mode with activation checkpoints"):
            call()


def test_what_cannot_be_served_is_refused_by_name_until_it_can(ids: Tensor) -> None:
    hf = testing.tiny("llama")
    model = ic.load(hf)
    wanted, plain = model.run(ids, read=S.pattern[1]), model.run(ids).logits
    AttentionInterface.register("another", AttentionInterface()["sdpa"])
    hf.set_attn_implementation("another")
    with pytest.raises(ic.CapabilityError, match="attention sites need attn_implementation 'eager' or 'sdpa'.*another"):
        model.run(ids, read=S.pattern[1])
    hf.set_attn_implementation("sdpa")
    assert torch.equal(model.run(ids, read=S.pattern[1])[S.pattern[1]], wanted[S.pattern[1]])
    hf.config.return_dict = False
    with pytest.raises(ic.CapabilityError, match="return_dict is False.*set it to True"):
        model.run(ids)
    hf.config.return_dict = True
    assert torch.equal(model.run(ids).logits, plain)
    hf.config.max_position_embeddings = 6
    with pytest.raises(ic.TextError, match="7 tokens do not fit the model's context of 6"):
        model.run(ids)
    hf.config.max_position_embeddings = 128
    hf.resize_token_embeddings(120, mean_resizing=False)
    assert model.run(ids + 20).logits.shape == (2, 7, 120)  # ids that load did not know
    hf.to("meta")
    with pytest.raises(ic.CapabilityError, match="embed_tokens.weight is on the meta device"):
        model.run(ids)
    with pytest.raises(ic.CapabilityError, match="on the meta device"):
        ic.load(hf)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe", "qwen3_vl"])
def test_a_model_that_did_not_change_is_not_opened_again(family: str, ids: Tensor) -> None:
    model = ic.load(testing.tiny(family))
    at_load = model.snapshot
    model.run(ids, read=[S.resid_post, S.z], grad=lambda logits: logits.sum())
    model.generate(ids, edits=S.resid_post[1].at(-1).scale(2.0), max_new_tokens=3, do_sample=True, seed=1)
    model.sweep(ids, [S.z[0, 0].at(-1).zero()], ic.score.logprob(3))
    model.on("nnsight").run(ids)
    model.run(ids)
    assert model.snapshot is at_load


# Gradients


def test_weights_get_no_gradient_from_your_own_backward(ids: Tensor) -> None:
    model = ic.load(testing.tiny("llama"))
    vector = torch.zeros(64, requires_grad=True)
    model.run(ids, edits=S.resid_post[0].add(vector), allow_noop=True).logits.pow(2).sum().backward()
    run = model.run(ids, read=S.resid_post[1], edits=S.resid_post[0].add(vector), grad=True, allow_noop=True)
    run[S.resid_post[1]].pow(2).sum().backward()
    assert vector.grad is not None and vector.grad.abs().sum() > 0
    assert all(weight.grad is None and weight.requires_grad for weight in model.hf.parameters())
    with pytest.raises(ic.PlanError, match="nothing in this plan has a gradient, since weights get none"):
        model.run(ids, grad=True)
    own = nn.Linear(64, 64)
    model.run(ids, edits=S.resid_post[1].apply(own), grad=True).logits.sum().backward()
    assert own.weight.grad is not None


def test_what_an_edit_cuts_off_has_zero_gradient(ids: Tensor) -> None:
    run = ic.load(testing.tiny("llama")).run(
        ids, read=S.z[0], edits=S.resid_post[1].zero(), grad=lambda logits: logits.sum()
    )
    assert not run.grad[S.z[0]].any()


def test_second_derivatives(ids: Tensor) -> None:
    """Of a site too, by zeros that are added there: against differences of first ones."""
    model = ic.load(testing.tiny("gpt2", dtype=torch.float64))

    def slope(shift: float, *, graph: bool) -> tuple[Tensor, Tensor]:
        zeros = torch.full((64,), shift, dtype=torch.float64, requires_grad=True)
        edit = S.resid_post[0].at(2).add(zeros)
        with sdpa_kernel(SDPBackend.MATH):  # faster kernels have no second derivative
            run = model.run(ids, edits=edit, read=S.resid_post[1], grad=True, allow_noop=True)
        loss = run.logits[0, -1, 5] + run[S.resid_post[1]].as_subclass(Tensor)[0, -1].pow(2).sum()
        (gradient,) = torch.autograd.grad(loss, zeros, create_graph=graph)
        return gradient.sum(), zeros

    first, zeros = slope(0.0, graph=True)
    (second,) = torch.autograd.grad(first, zeros)
    step = 1e-5
    wanted = (slope(step, graph=False)[0] - slope(-step, graph=False)[0]) / (2 * step)
    torch.testing.assert_close(second.sum(), wanted, atol=1e-6, rtol=1e-5)


def test_inference_mode(ids: Tensor) -> None:
    """Numbers come as ever, gradients are refused, and nothing made under it is in the way later."""
    model = ic.load(testing.tiny("llama"))
    value = torch.ones(64, requires_grad=True)
    reads = [S.z[1].at([0, 2]), S.pattern[0], S.resid_post[1]]
    wanted = model.run(ids, read=reads).logits
    with torch.inference_mode():
        tokens = ic.Tokens(ids.clone(), torch.tensor([[False] + [True] * 6, [True] * 7]))
        assert torch.equal(model.run(ids, read=reads).logits, wanted)
        model.run(tokens, read=reads)
        model.generate(tokens, edits=S.z[0].zero(), max_new_tokens=2)
        model.sweep(tokens, [S.z[0, 0].at(-1).zero()], ic.score.logprob(3))
        for call in (
            lambda: model.run(ids, read=reads, grad=lambda logits: logits.sum()),
            lambda: model.run(ids, read=reads, grad=True),
            lambda: model.run(ids, edits=S.resid_post[1].add(value)),
        ):
            with pytest.raises(ic.PlanError, match=r"gradients are asked for \(.*under torch.inference_mode"):
                call()
        hf = testing.tiny("llama")
    assert model.run(tokens, read=reads, grad=lambda logits: logits.pow(2).sum()).grad[S.z[1].at([0, 2])].any()
    made_there = ic.load(hf)
    made_there.run(ids)
    with pytest.raises(ic.CapabilityError, match="weights were made under torch.inference_mode"):
        made_there.run(ids, read=reads, grad=lambda logits: logits.sum())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what compile() imports says so
@pytest.mark.parametrize("engine", ["torch", "nnsight", "transformer_lens"])
@pytest.mark.parametrize("where", ["", "model.layers.1", "model.layers.1.mlp"])
def test_a_model_compiled_after_load(where: str, engine: str, ids: Tensor) -> None:
    """Hooks do not fire inside compiled code, so it is taken out for each run; an engine's own copy has none."""
    model = ic.load(testing.tiny("llama"), engine=engine)
    before = model.run(ids, read=S.mlp_out[1])[S.mlp_out[1]]
    model.hf.get_submodule(where).compile()
    assert torch.equal(model.run(ids, read=S.mlp_out[1])[S.mlp_out[1]], before)
    assert model.hf.get_submodule(where)._compiled_call_impl is not None
