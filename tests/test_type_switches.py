"""Other models of a type: what its config switches (biases, norms, factors, shared keys, blocks side by side) is turned, as
much of it at once as transformers builds, and every site is as true as by default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
from matrix import row
from parity import IDS
from test_types import MEASURED

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.compatibility import ENGINES, matrix, sites_of
from interp_core.testing.types import types

SAMPLE = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "granitemoehybrid", "opt", "qwen2_moe", "stablelm")
MODELS = [name for name in types() if matrix()["types"][name]["torch"]["word"] in ("verified", "partial")]
MODELS.remove("dbrx")  # which has nothing to turn: its switches are in the config's configs
NO_KIND = re.compile(
    "use_cache|output_|return_dict|is_decoder|is_encoder_decoder|add_cross_attention|tie_encoder|gradient|.*dropout|"
    ".*kernel|.*_init|add_pooling|.*fp32|.*float32|.*fused|summary_|mask_|chunk_size_feed_forward|scale_parametrization"
)
"""Words that say how a model is run, trained or built, not what it computes."""
FACTOR = re.compile(r".*(scale|scaling|multipl|factor)")
NUMBERS = {"num_key_value_heads": 1, "floor_scale": 4, "log_scaling_n_floor": 4}
"""Heads that share one key, and attention that is tempered from the fifth token on."""

LEFT = {
    "axk2": "attention_bias",  # of so small a model: an edit of v changes nothing, as the indexer shows that key to nobody
    "doge": "is_moe",
    "gemma4": "enable_moe_block",
    "jetmoe": "num_key_value_heads",  # which its number of heads follows from
}
"""Switches that are left as they are: they make another type of it, or nothing that would be checked."""
LOST = {
    "falcon": "rot_q rot_k",  # positions are a bias: nothing rotates
    "opt": "final_norm",  # as in OPT-350m
    "stablelm": "resid_mid",  # blocks are parallel
    "roformer": "v",  # rotated before it is mixed
    "zamba2": "q k v",  # adapters add to them
}
"""Sites that a switch takes away."""


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=4)
RELEASED: dict[str, tuple[str, dict[str, Any], str]] = {
    "OPT-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, "embed final_norm"),
    "Falcon-RW": (
        "falcon",
        {"multi_query": False, "num_kv_heads": 4, "alibi": True, "parallel_attn": False, "bias": True},
        "rot_q rot_k",
    ),
    "Falcon-40B": ("falcon", {"new_decoder_architecture": True, "bias": False}, ""),
    "Falcon2-11B": ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, ""),
    "BigCode's first model": ("gpt_bigcode", {"multi_query": False}, ""),
    "Stanford's GPT-2": ("gpt2", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}, ""),
    "OLMo-7B": ("olmo", {"clip_qkv": 0.5}, ""),
    "OLMoE": ("olmoe", {"clip_qkv": 0.5}, ""),
    "MPT-7B": ("mpt", {"attn_config": {"clip_qkv": 0.5}}, ""),
    "MPT without ALiBi": ("mpt", {"attn_config": {"alibi": False}, "logit_scale": "inv_sqrt_d_model"}, ""),
    "DBRX": (
        "dbrx",
        {"attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0}},
        "",
    ),
    "StableLM-2-12B": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}, "resid_mid"),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {"topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1},
        "",
    ),
    "Moonlight": ("deepseek_v3", {"q_lora_rank": None}, ""),
    "DeepSeek-V3": ("deepseek_v3", rope("yarn", factor=4.0, original_max_position_embeddings=4, mscale=1.0), ""),
    "gpt-oss": ("gpt_oss", YARN, ""),
    "Qwen2 with long texts": ("qwen2", YARN, ""),
    "Llama 3.1": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        "",
    ),
    "Llama with dynamic positions": ("llama", rope("dynamic", factor=2.0), ""),
    "Phi-3 with long texts": (
        "phi3",
        rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=4),
        "",
    ),
    "EmbeddingGemma": ("gemma3_text", {"use_bidirectional_attention": True}, ""),
    "Granite 4 with positions": ("granitemoehybrid", {"position_embedding_type": "rope"}, ""),
    "Command R+": ("cohere", {"use_qk_norm": True}, ""),
    "Zamba2-1.2B": ("zamba2", {"use_shared_attention_adapter": True, "use_mem_rope": True}, "q k v"),
    "Nemotron 3 Super": ("nemotron_h", {"moe_latent_size": 32}, "expert_out"),
    "ELECTRA-small": ("electra", {"embedding_size": 32}, "embed"),
    "RemBERT": ("rembert", {"input_embedding_size": 32}, "embed"),
    "Mamba-2 in groups": ("mamba2", {"n_groups": 1, "rms_norm": False}, ""),
}
"""Models whose configs are not the default of their type: the type, how they differ, and which sites they lack."""
FAST = ("OPT-350m", "Falcon-RW", "OLMo-7B", "StableLM-2-12B", "DeepSeek-V2-Lite", "Zamba2-1.2B")


def switches(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What another model of the type may have otherwise."""
    for word, now in config.items():
        if NO_KIND.match(word):
            continue
        if isinstance(now, bool):
            yield word, not now
        elif isinstance(now, float) and now == 1.0 and FACTOR.match(word):
            yield word, 0.6
        elif isinstance(now, list) and now and all(isinstance(x, float) and x == 1.0 for x in now):
            yield word, [0.6 + 0.3 * i for i in range(len(now))]
        elif now is not None and word in NUMBERS:
            yield word, NUMBERS[word]


def turned(model_type: str) -> dict[str, Any]:
    """As many switches at once as a model can be built with."""
    settings: dict[str, Any] = {}
    for word, value in switches(testing.tiny(model_type).config.to_dict()):
        if word in LEFT.get(model_type, "").split():
            continue
        try:
            built = testing.tiny(model_type, **settings, **{word: value})
            built(input_ids=IDS)
        except Exception:  # whatever the library says: its models do not have all that their configs can say
            continue
        settings[word] = value
    return settings


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in MODELS]
)
def test_other_models_of_a_type_are_served_as_truly(model_type: str) -> None:
    known = matrix()["types"][model_type]["torch"]
    settings = turned(model_type)
    assert settings
    cell = row(model_type, "torch", **settings)
    assert not {"false", "unheld"} & cell.keys() and cell["word"] != "refused", (settings, cell)
    lost = set(sites_of(known)) - set(sites_of(cell)) - set(LOST.get(model_type, "").split())
    assert not lost or version("transformers") != MEASURED, (settings, cell)  # rows are those of one version


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # as bridges call modules
@pytest.mark.parametrize(
    ("released", "engine"),
    [
        pytest.param(name, engine, marks=() if name in FAST and engine == "torch" else pytest.mark.slow)
        for name in RELEASED
        for engine in ENGINES
    ],
)
def test_models_whose_configs_are_not_their_types_default(released: str, engine: str) -> None:
    model_type, settings, lacks = RELEASED[released]
    cell = row(model_type, engine, **settings)
    if engine == "transformer_lens":  # which does not know all of these
        assert "false" not in cell and (cell["word"] == "refused" or cell["held"]), cell
        return
    assert not {"false", "unheld"} & cell.keys() and cell["word"] != "refused", cell
    known = matrix()["types"][model_type][engine]
    lost = set(sites_of(known)) - set(sites_of(cell))
    assert lost == set(lacks.split()) or version("transformers") != MEASURED, cell
    assert not [why for why in cell.get("missing", {}) if "self-check" in why], cell


@pytest.mark.parametrize(
    ("model_type", "settings"), [("olmo", {"clip_qkv": 0.5}), ("mpt", {"attn_config": {"clip_qkv": 0.5}})]
)
def test_clipped_heads_have_the_projections_weights_and_true_gradients(
    model_type: str, settings: dict[str, Any]
) -> None:
    model, plain = (ic.load(testing.tiny(model_type, dtype=torch.float64, **more)) for more in (settings, {}))
    assert torch.equal(model.weights(S.v[1]), plain.weights(S.v[1]))
    run = model.run(IDS, read=S.v[1], grad=lambda logits: logits[0, -1, 5])
    value = run[S.v[1]].plain
    assert value.abs().max() == 0.5
    step = torch.where(value.abs() < 0.4, 1e-4 * run.grad[S.v[1]].plain.sign(), 0)
    ends = [model.run(IDS, edits=S.v[1].set(value + sign * step)).logits[0, -1, 5] for sign in (1, -1)]
    assert float(ends[0] - ends[1]) == pytest.approx(2 * float((run.grad[S.v[1]].plain * step).sum()), rel=1e-2)


def test_a_factor_that_the_models_code_does_not_know_is_none() -> None:
    for scale in (0.5, "inv_sqrt_d_model"):
        model = ic.load(testing.tiny("mpt", logit_scale=scale))
        assert "readout" not in model.atlas.lacking
        assert torch.equal(model.weights(S.logits), model.hf.lm_head.weight.T)
