"""What is particular to single families, beyond the battery that holds every site against hand-written hooks."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, tiny_model

import interp_core as ic
from interp_core import sites as S


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor), atol=tolerance, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_project_to_what_attention_adds(family: str, ids: torch.Tensor) -> None:
    """Through post-norms (Gemma 2), multipliers (Granite) and biases (GPT-2), and back from what heads give."""
    model = tiny_model(family, torch.float64)
    layer = model.atlas.layers("z")[-1]
    run = model.run(ids, read=[S.z[layer], S.head_out[layer], S.attn_out[layer]])
    z, heads = (run[site[layer]].as_subclass(torch.Tensor) for site in (S.z, S.head_out))
    with torch.no_grad():
        close(model.project(z, layer, added=True), run[S.attn_out[layer]], 1e-6)
        close(model.project(z, layer) - model.project(torch.zeros_like(z), layer), heads.sum(2))


def test_latent_attention(ids: torch.Tensor) -> None:
    """DeepSeek-V3: queries are wider than values, z has a value's width per head, keys are there after rotation."""
    model = tiny_model("deepseek_v3", torch.float64)
    sizes = {name: tuple(model.atlas.entries[name, 1].sizes.values()) for name in ("q", "rot_k", "v", "z")}
    assert sizes == {"q": (4, 24), "rot_k": (4, 24), "v": (4, 12), "z": (4, 12)}
    run = model.run(ids, read=[S.pattern[1], S.v[1], S.z[1], S.rot_q[1], S.rot_k[1], S.scores[1]])
    close(torch.einsum("bhqk,bkhd->bqhd", run[S.pattern[1]], run[S.v[1]]), run[S.z[1]])
    products = torch.einsum("bqhd,bkhd->bhqk", run[S.rot_q[1]], run[S.rot_k[1]])
    scaling = model.hf.model.layers[1].self_attn.scaling
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    close((products * scaling)[:, :, visible], run[S.scores[1]][:, :, visible])
    with pytest.raises(ic.CapabilityError, match="keys are put together inside latent attention.*rot_k has them"):
        model.run(ids, read=S.k[1])
    plain = ic.load(ic.testing.tiny("deepseek_v3", q_lora_rank=None))
    assert plain.check is not None and plain.check.ok and plain.atlas.entries["q", 0].read.module.endswith("q_proj")


def test_sinks_take_what_rows_lack(ids: torch.Tensor) -> None:
    model = tiny_model("gpt_oss", torch.float64)
    run = model.run(ids, read=[S.pattern[1], S.scores[1]])
    sums = run[S.pattern[1]].sum(-1)
    assert (sums < 1).all() and (sums > 0).all()
    sinks = model.hf.model.layers[1].self_attn.sinks[None, :, None, None].detach().expand(2, 4, 7, 1)
    whole = torch.cat([run[S.scores[1]].as_subclass(torch.Tensor), sinks], -1).softmax(-1)
    close(whole[..., :-1], run[S.pattern[1]])
    assert "sums to less than one, the rest is the sink's" in str(model.check)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_hybrid_layers(family: str, ids: torch.Tensor) -> None:
    """Linear attention adds to the stream like any other, but has no heads; z lies after the gate."""
    model = tiny_model(family, torch.float64)
    for name in ("attn_in", "attn_out", "resid_mid"):
        assert model.atlas.layers(name) == [0, 1, 2]
    for name in ("q", "k", "v", "rot_q", "rot_k", "scores", "pattern", "z", "head_out"):
        assert model.atlas.layers(name) == [1, 2]
    run = model.run(ids, read=[S.pattern[1], S.v[1], S.z[1], S.attn_in[1], S.q[1]])
    attention = model.hf.model.layers[1].self_attn
    with torch.no_grad():
        query, gate = attention.q_proj(run[S.attn_in[1]].as_subclass(torch.Tensor)).view(2, 7, 4, 2, 16).unbind(3)
    close(query, run[S.q[1]])
    mixed = torch.einsum("bhqk,bkhd->bqhd", run[S.pattern[1]], run[S.v[1]].repeat_interleave(2, 2))
    close(mixed * torch.sigmoid(gate), run[S.z[1]])
    with pytest.raises(ic.SiteError, match="layer 0 has no z; layers 1, 2 have"):
        model.run(ids, read=S.z[0])


def test_what_granite_adds_is_scaled(ids: torch.Tensor) -> None:
    model = tiny_model("granitemoe", torch.float64)
    run = model.run(ids, read=[S.resid_pre[1], S.attn_out[1], S.resid_mid[1], S.mlp_out[1], S.resid_post[1]])
    close(run[S.resid_pre[1]] + run[S.attn_out[1]], run[S.resid_mid[1]])
    close(run[S.resid_mid[1]] + run[S.mlp_out[1]], run[S.resid_post[1]])
    vector = torch.linspace(-1, 1, 64, dtype=torch.float64)
    moved = model.run(ids, read=S.resid_post[1], edits=S.mlp_out[1].add(vector))
    close(moved[S.resid_post[1]], run[S.resid_post[1]] + vector)
    moved = model.run(ids, read=[S.resid_mid[1], S.attn_out[1]], edits=S.resid_mid[1].add(vector))
    close(moved[S.resid_mid[1]], run[S.resid_mid[1]] + vector)
    close(moved[S.attn_out[1]], run[S.attn_out[1]] + vector)
    assert not model.atlas.notes and model.check is not None and model.check.ok


def test_granite_without_experts() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = GraniteConfig(vocab_size=96, intermediate_size=96, residual_multiplier=0.3, logits_scaling=2.0, **sizes)
    model = ic.load(GraniteForCausalLM(config).eval())
    assert model.check is not None and model.check.ok and not model.atlas.notes


def test_opt_that_norms_the_stream_itself(ids: torch.Tensor) -> None:
    """OPT-350m: the stream goes on normed after attention and after the MLP."""
    model = ic.load(ic.testing.tiny("opt", do_layer_norm_before=False))
    with pytest.raises(ic.CapabilityError, match="does not know where opt keeps final_norm"):
        model.run(ids, read=S.final_norm)
    read = [S.resid_pre[1], S.attn_out[1], S.resid_mid[1], S.mlp_in[1], S.mlp_act[1], S.mlp_out[1], S.resid_post[1]]
    run = model.run(ids, read=read)
    block = model.hf.model.decoder.layers[1]
    with torch.no_grad():
        between = block.self_attn_layer_norm((run[S.resid_pre[1]] + run[S.attn_out[1]]).as_subclass(torch.Tensor))
        close(between, run[S.resid_mid[1]], 1e-5)
        assert torch.equal(run[S.resid_mid[1]], run[S.mlp_in[1]])
        close(block.fc2(run[S.mlp_act[1]].as_subclass(torch.Tensor)), run[S.mlp_out[1]], 1e-5)
        summed = (run[S.mlp_in[1]] + run[S.mlp_out[1]]).as_subclass(torch.Tensor)
        close(block.final_layer_norm(summed), run[S.resid_post[1]], 1e-5)
    with pytest.raises(ic.CapabilityError, match="this opt has no final norm that the atlas knows"):
        model.readout(torch.zeros(1, 64))


def test_flattened_modules_keep_rows_apart(ids: torch.Tensor) -> None:
    """OPT's MLP sees batch and pos as one axis: an edit in one row stays there."""
    model = tiny_model("opt", torch.float64)
    edit = S.mlp_act[1].at([[2], [4, 5]]).zero()
    run, plain = model.run(ids, read=S.resid_post[1], edits=edit), model.run(ids, read=S.resid_post[1])
    changed = (run[S.resid_post[1]] != plain[S.resid_post[1]]).any(-1)
    assert changed.nonzero().tolist() == [[0, 2], [1, 4], [1, 5]]
    with pytest.raises(ic.CapabilityError, match=r"resid_mid\[0\] has no gradient"):
        model.run(ids, read=S.resid_mid[0], grad=lambda logits: logits.sum())


def test_llama4_with_tuned_temperature(ids: torch.Tensor) -> None:
    """Layers without rotary embedding scale queries by position, which rot_q shows."""
    model = ic.load(ic.testing.tiny("llama4", dtype=torch.float64, floor_scale=2))
    run = model.run(ids, read=[S.q[1], S.rot_q[1]])
    scale = torch.log1p(torch.floor((torch.arange(7) + 1.0) / 2)) * 0.1 + 1
    close(run[S.q[1]] * scale[:, None, None], run[S.rot_q[1]], 1e-6)


def test_gpt_neo_looks_back_a_short_way(ids: torch.Tensor) -> None:
    pattern = tiny_model("gpt_neo").run(ids, read=S.pattern)[S.pattern]
    assert not pattern[1][..., 6, :3].any() and pattern[0][..., 6, :3].all()
    with pytest.raises(ic.CapabilityError, match="scores cross no module boundary"):
        tiny_model("gpt_neo").run(ids, read=S.scores)


def test_a_wrapped_model_is_read_like_its_language_model(ids: torch.Tensor) -> None:
    """A tower around a family with a file of its own: LLaVA around Qwen3-MoE has its router."""
    import transformers as t

    text = ic.testing.tiny("qwen3_moe").config
    tower = t.CLIPVisionConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    config = t.LlavaConfig(text_config=text, vision_config=tower, image_token_index=90)
    model = ic.load(t.LlavaForConditionalGeneration(config).eval())
    assert model.atlas.layers("router_logits") == [0, 2] and model.atlas.family.name == "llava"
    assert model.atlas.layers("vision_embed") == [0]


def test_every_family_that_is_declared_is_there() -> None:
    """A misspelt attribute in an entry point would leave a family to its module names, silently."""
    registry = ic.registry("architectures")
    families = [registry.get(name) for name in registry.names()]
    assert len(families) > 80 and all(family.name for family in families)
