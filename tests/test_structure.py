"""What a model is made of: sizes, modules by component and weights by site say what its forward pass computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import nth, sampled, tiny_model
from torch import Tensor, nn

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])
WITH_LATENT = ("deepseek_v3",)
"""Families whose queries, keys and values come out of a latent (MLA)."""
NO_NORM_BEFORE = ("olmo2",)
"""Families that norm what attention and MLP give, and nothing that they read."""


def close(a: Tensor, b: Tensor, size: Tensor | None = None) -> None:
    """Equal but for the rounding of sums, in float64, whose terms together have these sizes."""
    size = torch.maximum(a.abs(), b.abs()) if size is None else size
    assert a.shape == b.shape
    assert bool(((a - b).abs() <= 64 * torch.finfo(torch.float64).eps * a.shape[-1] ** 0.5 * size).all())


def said(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What weights make of values `[batch pos in]`, and the size of the terms; `weight` is `[(head) in out]`."""
    weight = weight.movedim(0, 1).flatten(1) if weight.ndim == 3 else weight
    return x @ weight + bias.flatten(), x.abs() @ weight.abs() + bias.abs().flatten()


def normed(x: Tensor, module: nn.Module, model: ic.Model, site: S.Site) -> Tensor:
    """What gains and bias of a norm make of a stream, by its definition."""
    centred = "LayerNorm" in type(module).__name__
    x = x - x.mean(-1, keepdim=True) if centred else x
    names = ("eps", "variance_epsilon")
    eps = next(getattr(module, name) for name in names if hasattr(module, name))
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * model.weights(site) + model.bias(site)


@pytest.mark.parametrize("family", sampled())
def test_weights_say_what_the_sites_give(family: str) -> None:
    """In float64: q, k, v out of what attention reads, head by head; z to head_out and to the projection's own output;
    neurons to the MLP's; the stream to logits; ids to embeddings; norms by their definition."""
    model = tiny_model(family, torch.float64)
    layer = nth(model, "z", 1)
    named = [name for name in ("attn_in", "q", "k", "v", "z", "head_out") if layer in model.layers(name)]
    heads = [S.named(name)[layer] for name in named]
    neurons = [S.mlp_act[at] for at in model.layers("mlp_act")[:1]]
    run = model.run(IDS, read=[*heads, *neurons, S.embed, S.final_norm, S.logits])

    for site in (S.q[layer], S.k[layer], S.v[layer]):
        if family in WITH_LATENT:
            with pytest.raises(ic.CapabilityError, match="latent|does not come out of one linear map|put together"):
                model.weights(site)
        elif site in run:
            weight, bias = model.weights(site), model.bias(site)
            n, d = model.sizes(site)["head"], model.sizes(site)["d_head"]
            assert weight.shape == (n, model.d_model, d) and bias.shape == (n, d)
            ours, size = said(run[S.attn_in[layer]].plain, weight, bias)
            close(ours.unflatten(-1, (n, d)), run[site].plain, size.unflatten(-1, (n, d)))

    weight, z = model.weights(S.z[layer]), run[S.z[layer]].plain
    assert weight.shape == (model.n_heads, model.d_head, model.d_model)
    close(torch.einsum("bphe,hed->bphd", z, weight), run[S.head_out[layer]].plain)
    ours, size = said(z.flatten(2), weight.flatten(0, 1), model.bias(S.z[layer]))
    close(ours, model.project(z, layer), size)
    for act in neurons:
        ours, size = said(run[act].plain, model.weights(act), model.bias(act))
        close(ours, model.module("mlp.out", act.layers)(run[act].plain), size)  # type: ignore[arg-type]
    close(model.weights(S.embed)[IDS], run[S.embed].plain)
    ours, size = said(run[S.final_norm].plain, model.weights(S.logits), model.bias(S.logits))
    cap = getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)
    close(torch.tanh(ours / cap) * cap if cap else ours, run.logits.plain, size)


@pytest.mark.parametrize("family", sampled())
def test_gains_say_what_the_norms_give(family: str) -> None:
    """In float32, in which many norms compute whatever the model's dtype."""
    model = tiny_model(family)
    last = model.n_layers - 1
    sources = {"attn_in": S.resid_pre, "mlp_in": S.resid_mid if model.layers("resid_mid") else S.resid_pre}
    sites = [(S.named(name)[last], source[last]) for name, source in sources.items() if last in model.layers(name)]
    run = model.run(IDS, read=[*(site for pair in sites for site in pair), S.resid_post[last], S.final_norm])
    for site, source in [*sites, (S.final_norm, S.resid_post[last])]:
        if family in NO_NORM_BEFORE and site is not S.final_norm:
            with pytest.raises(ic.CapabilityError, match="is not what a norm makes"):
                model.weights(site)
            continue
        component = {"attn_in": "ln1", "mlp_in": "ln2", "final_norm": "ln_final"}[site.name]
        component = "ln1" if component == "ln2" and source.name == "resid_pre" and family != "gpt_neox" else component
        module = model.module(component, *([last] if component != "ln_final" else []))
        ours = normed(run[source].plain.double(), module, model, site)
        torch.testing.assert_close(ours, run[site].plain.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_gains_of_post_norms(family: str, dtype: torch.dtype) -> None:
    """What is added, from what the norm behind attention or the MLP is given; also where it computes in float32."""
    model = tiny_model(family, dtype)
    for site, component in ((S.attn_out[1], "ln1_post"), (S.mlp_out[1], "ln2_post")):
        module = model.module(component, 1)
        stored = module.weight.detach().double() + (family == "gemma2")
        slack = 8 * max(torch.finfo(kind).eps for kind in (dtype, torch.float32))
        torch.testing.assert_close(model.weights(site).double(), stored, rtol=slack, atol=0)
        assert not model.bias(site).any()
    assert model.weights(S.attn_out).shape == (3, model.d_model)
    with pytest.raises(ic.CapabilityError, match=r"attn_out of this llama in layer 0 .*no ln1_post"):
        tiny_model("llama").weights(S.attn_out[0])


def test_axes_of_weights() -> None:
    """Heads and neurons drop their axis, lists keep it, layers are stacked; a TransformerLens reader finds its own."""
    model = tiny_model("llama")
    hf = model.hf.model.layers[2].self_attn
    heads, kv, d_head, d_model = model.n_heads, model.n_kv_heads, model.d_head, model.d_model
    assert (heads, kv, d_head, d_model, model.d_mlp, model.d_vocab) == (4, 2, 24, 64, 96, 96)
    assert torch.equal(model.weights(S.z[2, 3]), hf.o_proj.weight.T[3 * d_head :])
    assert torch.equal(model.weights("q[-1,0]"), hf.q_proj.weight[:d_head].T)
    assert torch.equal(model.bias(S.k[2, 1]), hf.k_proj.bias[d_head:])
    assert model.weights(S.z[2, [0, 3]]).shape == (2, d_head, d_model)
    assert model.weights(S.k[[0, 2]]).shape == (2, kv, d_model, d_head)
    assert model.weights(S.v).shape == (3, kv, d_model, d_head) and model.bias(S.v).shape == (3, kv, d_head)
    assert torch.equal(model.weights(S.mlp_act[0, 5]), model.hf.model.layers[0].mlp.down_proj.weight[:, 5])
    assert torch.equal(model.weights(S.logits), model.hf.lm_head.weight.T)
    assert torch.equal(model.bias(S.logits), torch.zeros(model.d_vocab))
    assert torch.equal(model.weights(S.embed), model.hf.model.embed_tokens.weight)
    assert model.weights(S.attn_in).shape == (3, d_model) and not model.bias(S.attn_in[1]).any()
    assert not model.weights(S.z[0]).requires_grad


def test_gains_of_gemma_are_what_it_multiplies_by() -> None:
    model = tiny_model("gemma2")
    stored = model.hf.model.layers[1].input_layernorm.weight
    torch.testing.assert_close(model.weights(S.attn_in[1]), 1 + stored.detach(), rtol=0, atol=1e-6)


def test_bad_questions_about_weights() -> None:
    model = tiny_model("llama")
    for site, says in (
        (S.pattern[0], "no weights belong to pattern. There are: 'q'"),
        (S.z[0].at(-1), "the same at all positions"),
        (S.z[0, 7], "no head 7, there are 4"),
        (S.z[9], "no layer 9"),
    ):
        with pytest.raises(ic.SiteError, match=says):
            model.weights(site)
    for site, says in ((S.z[0, 1], "of no head by itself"), (S.mlp_act[0, 1], "of no d_mlp"), (S.embed, "no bias")):
        with pytest.raises(ic.SiteError, match=says):
            model.bias(site)
    with pytest.raises(ic.CapabilityError, match="every MLP of this mixtral is a mixture of experts"):
        tiny_model("mixtral").weights(S.mlp_act)
    with pytest.raises(ic.CapabilityError, match="mixture of experts"):
        _ = tiny_model("mixtral").d_mlp


class Adapted(nn.Module):
    """A linear layer with a low-rank change beside it, as adapters have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Bent(Adapted):
    """What looks like a linear layer and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def with_queries(kind: Any) -> ic.Model:
    hf = testing.tiny("llama")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        hf.model.layers[1].self_attn.q_proj = kind(hf.model.layers[1].self_attn.q_proj)
    return ic.load(hf.eval())


def test_weights_of_what_is_no_plain_matrix() -> None:
    """An adapter's change is in them; what is not linear has none; the model and its random state are as before."""
    model = with_queries(Adapted)
    layer = model.hf.model.layers[1].self_attn.q_proj
    state, before = torch.get_rng_state(), copy.deepcopy(model.hf.state_dict())
    whole = layer.base.weight + layer.up.weight @ layer.down.weight
    torch.testing.assert_close(model.weights(S.q[1]).transpose(0, 1).flatten(1), whole.detach().T)
    run = model.run(IDS, read=[S.attn_in[1], S.q[1]], logits=False)
    ours = torch.einsum("bpd,hde->bphe", run[S.attn_in[1]].plain, model.weights(S.q[1])) + model.bias(S.q[1])
    torch.testing.assert_close(ours, run[S.q[1]].plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(ic.CapabilityError, match=r"q of this llama in layer 1 .* not linear"):
        with_queries(Bent).weights(S.q[1])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())


def test_weights_of_changed_modules_are_the_new_ones() -> None:
    """As runs: a module that was put in the place of another counts from the next call on."""
    model = ic.load(testing.tiny("llama"))
    old = model.weights(S.logits)
    model.hf.lm_head.weight = nn.Parameter(old.T.flip(0).clone())
    assert torch.equal(model.weights(S.logits), old.flip(1))


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
def test_weights_on_other_engines(engine: str) -> None:
    model = tiny_model("gpt2")
    other = model.on(engine)
    for site in (S.q[1, 2], S.z[1, 2], S.mlp_act[1], S.attn_in[1], S.final_norm, S.logits, S.embed):
        assert torch.equal(other.weights(site), model.weights(site)), site
    assert other.module("ln1", 1) is model.module("ln1", 1) and other.engine_name == engine


def test_folded_weights_are_refused_where_they_are_not_those_of_the_runs() -> None:
    folded = tiny_model("gpt2").on("transformer_lens", fold=True)
    for site in (S.q[1], S.logits, S.final_norm):
        with pytest.raises(ic.CapabilityError, match="weights of its own|self-check: is the norm of the last stream"):
            folded.weights(site)


@pytest.mark.parametrize("family", sampled())
def test_components_are_where_the_forward_pass_has_them(family: str) -> None:
    """Modules by name are those whose inputs and outputs the sites are."""
    model = tiny_model(family)
    layer = nth(model, "z", 1)
    at: dict[str, tuple[str, Any]] = {
        "block": ("resid_post", 0), "attn": ("attn_in", 1), "mlp": ("mlp_in", 1), "attn.o": ("z", 1),
        "mlp.out": ("mlp_act", 1), "embed": ("embed", 0), "ln_final": ("final_norm", 0), "unembed": ("final_norm", 1),
    }  # fmt: skip
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles, reads = [], []
    for component, (name, _) in at.items():
        once = component in ("embed", "ln_final", "unembed")
        site = S.named(name) if once else S.named(name)[layer]
        try:
            module = model.module(component) if once else model.module(component, layer)
            model.sizes(site)
        except ic.InterpError:
            continue

        def keep(_: nn.Module, args: Any, kwargs: Any, out: Any, component: str = component) -> None:
            first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            seen[component] = out if isinstance(out, Tensor) else out[0], first

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
        reads.append((component, site))
    try:
        run = model.run(IDS, read=[site for _, site in reads])
    finally:
        for handle in handles:
            handle.remove()
    assert {"block", "embed", "ln_final", "unembed", "attn.o"} <= {component for component, _ in reads}
    for component, site in reads:
        value = run[site].plain
        assert torch.equal(seen[component][at[component][1]].reshape(value.shape), value), component


def test_components_that_are_not_there() -> None:
    model = tiny_model("olmo2")
    with pytest.raises(ic.CapabilityError, match="no module for ln1 .*; it has block, attn, attn.q, .*ln1_post"):
        model.module("ln1", 0)
    for asked, says in (
        (("ln3", 0), "Did you mean 'ln"),
        (("self_attn", 0), "no component is called 'self_attn'"),
        (("embed", 0), "embed is in no layer"),
        (("attn",), r"module\('attn', layer\) takes a layer, 0 to 2, not NoneType"),
        (("attn", 3), "takes a layer, 0 to 2"),
        (("attn", True), "takes a layer"),
        ((None,), "no component is called None"),
    ):
        with pytest.raises(ic.SiteError, match=says):
            model.module(*asked)  # type: ignore[arg-type]
    with pytest.raises(ic.SiteError, match="layer 1 of this qwen3_moe has no router; layers 0, 2 have"):
        tiny_model("qwen3_moe").module("router", 1)
    assert model.module("block", -1) is model.hf.model.layers[2]


def test_layers_and_sizes() -> None:
    model = tiny_model("qwen3_moe")
    assert model.layers(S.z) == [0, 1, 2] == model.layers("z") and model.layers(S.z[[-1, 0]]) == [2, 0]
    assert model.layers("router_logits") == [0, 2] and model.layers("mlp_act") == [1]
    assert model.layers("deepstack") == [] and "DeepStack" in model.can("deepstack", "read")
    assert model.sizes("k") == {"head": 2, "d_head": 16} and model.sizes(S.resid_post[0]) == {"d_model": 64}
    with pytest.raises(ic.SiteError, match="layer 1 has no router_logits; layers 0, 2 have"):
        model.layers(S.router_logits[1])
    with pytest.raises(ic.SiteError, match="no site is called 'zz'"):
        model.layers("zz")


def test_sizes_that_differ_between_layers() -> None:
    hf = testing.tiny("llama4")
    model = ic.load(hf)
    model.atlas.entries["z", 2].sizes = {"head": 2, "d_head": 32}
    with pytest.raises(ic.CapabilityError, match=r"z differs between layers .*in layer 2\); ask for one layer"):
        _ = model.n_heads
    assert model.sizes(S.z[2])["head"] == 2
