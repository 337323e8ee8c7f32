"""What is particular to single families, beyond the battery that holds every site against hand-written hooks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import test_streams
import torch
import towers
from conftest import FAMILIES, tiny_model
from layouts import LAYOUT, VISUAL
from mixtures import MIXTURES

import interp_core as ic
from interp_core import sites as S
from interp_core.architectures.family import Family, Place
from interp_core.architectures.routing import Router, TopKOfLogits
from interp_core.testing.types import types

ROOT = Path(__file__).parent.parent
DECLARED: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
    "interp_core.architectures"
]


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
    with pytest.raises(ic.CapabilityError, match="the last block norms the stream itself"):
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
    run = model.run(ids, read=S.resid_post[-1])
    close(model.readout(run[S.resid_post[-1]]), run.logits, 1e-5)


@pytest.mark.parametrize("before", [True, False])
def test_opt_with_narrow_embeddings(before: bool, ids: torch.Tensor) -> None:
    """As OPT-350m has them: what is as wide as the stream is served, and no site dies of another."""
    model = ic.load(ic.testing.tiny("opt", do_layer_norm_before=before, word_embed_proj_dim=32))
    run = model.run(ids, read=S.resid_pre[0], edits=S.z[1].zero())
    assert run[S.resid_pre[0]].shape[-1] == 64 and run.logits.shape[-1] == 96
    with pytest.raises(
        ic.CapabilityError, match="token embeddings have 32 dimensions, and the stream, .* 64; read resid_pre"
    ):
        model.run(ids, read=S.embed)
    with pytest.raises(ic.CapabilityError, match="reads a narrower stream, which project_out makes of it"):
        model.readout(torch.zeros(1, 64))


def test_a_readout_that_cannot_be_computed_is_withdrawn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is any other equation: a load does not die of it."""
    monkeypatch.setattr("interp_core.architectures.opt._NARROW", {})
    model = ic.load(ic.testing.tiny("opt", word_embed_proj_dim=32))
    assert {"embed", "readout"} <= model.atlas.lacking.keys() and {"z", "pattern", "resid_post"} <= {*model.sites}


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
    scores = tiny_model("gpt_neo").run(ids, read=S.scores)[S.scores]
    assert (scores[1][..., 6, :3] < -1e30).all() and (scores[0][..., 6, :3].abs() < 1e3).all()


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


def lacking(name: str, file: str) -> list[str]:
    """What a family that is declared, or that has a tiny model, still lacks: one sentence for each place."""
    page = (ROOT / "docs/families.md").read_text()
    small = {*FAMILIES, *ic.testing.mixtures(), *test_streams.MODELS, *types()}
    small |= {name.removesuffix("_text") for name in types()}
    tried = {target.partition(":")[0] for other, target in DECLARED.items() if other in small}
    sentences = []
    if file and f"`{name}`" not in page:
        sentences.append(f"docs/families.md: no row names `{name}`; write what is particular to it")
    if name not in FAMILIES and name not in ic.testing.mixtures():
        if file not in tried:  # kin of a family that has one are described by the same lines
            sentences.append(
                f"interp_core/testing: no tiny model; give {name!r} a line in models.py, visual.py or routed.py"
            )
        return sentences
    if name in FAMILIES and name not in LAYOUT:
        sentences.append("tests/layouts.py: no layout; write out where hand-written hooks find its sites")
    if name in VISUAL and name not in towers.LAYOUT:
        sentences.append("tests/towers.py: no layout of its vision tower")
    if name not in FAMILIES and name not in MIXTURES:
        sentences.append("tests/mixtures.py: no line says where its router is, to be held against selection by hand")
    return sentences


@pytest.mark.parametrize("name", list(dict.fromkeys([*DECLARED, *FAMILIES, *ic.testing.mixtures()])))
def test_nothing_is_missing_where_a_family_is_added(name: str) -> None:
    assert not lacking(name, DECLARED.get(name, "").partition(":")[0]), name


def test_what_is_missing_for_a_family_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "\n".join(lacking("mamba9", "interp_core.architectures.mamba9"))
    assert (
        "docs/families.md: no row names `mamba9`" in said and "no tiny model; give 'mamba9' a line in models.py" in said
    )
    for table, name, says in (
        (LAYOUT, "llama", "tests/layouts.py"), (towers.LAYOUT, "llava", "tests/towers.py"), (MIXTURES, "jamba", "tests/mixtures.py"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.delitem(table, name)
            assert [sentence for sentence in lacking(name, DECLARED.get(name, "")) if says in sentence], says


@pytest.mark.parametrize(
    ("family", "says"),
    [
        (Family("llama", paths={"blocks.mlp.out": "dwon_proj"}), "blocks.mlp.out is at 'dwon_proj'.* 'down_proj'"),
        (Family("llama", paths={"blocks.attn.q": "q_porj|q"}), r"blocks.attn.q is at 'q_porj\|q'.*'q_proj'"),
        (Family("llama", paths={"blocks.mlp": "mpl"}), "blocks.mlp is at 'mpl'.* 'mlp'"),
        (Family("llama", paths={"blocks": "model.layer"}), "blocks is at 'model.layer'.* 'model.layers'"),
        (Family("llama", paths={"ln_final": "model.nrom"}), "ln_final is at 'model.nrom'.* 'model.norm'"),
        (Family("llama", places={"mlp_act": Place("mlp.down", "in")}), "mlp_act is at 'mlp.down'.* 'mlp.down_proj'"),
        (Family("qwen3_moe", router=Router("mlp.gat", "mlp.experts", TopKOfLogits())), "the router is at 'mlp.gat'.* 'mlp.gate'"),
        (Family("qwen3_moe", router=Router("mlp.rout", "mlp.expert", TopKOfLogits())), "the router is at 'mlp.rout'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.name,
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_told_by_name(family: Family, says: str, of_others: Any) -> None:
    """Before anything runs: the family, the path, and what is there."""
    of_others(family)
    hf = ic.testing.tiny(family.name)
    hf.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ic.PluginError, match=f"the family file of '{family.name}' says that {says}"):
        ic.load(hf)


def test_paths_that_not_all_models_have_are_no_slip(of_others: Any) -> None:
    """A path that ends with `|`, the names of Llama's MLP in a model of experts alone, a router in a dense model."""
    of_others(
        Family(
            "llama", paths={"blocks.attn.qkv": "qkv_proj|"}, router=Router("mlp.gate", "mlp.experts", TopKOfLogits())
        )
    )
    assert ic.load(ic.testing.tiny("llama")).atlas.layers("mlp_act") == [0, 1, 2]
    assert not ic.load(ic.testing.tiny("aria")).atlas.layers("mlp_act")
