"""Layouts of types whose blocks mix tokens in several ways, or keep and add to the stream in a way of their own.

As in `type_layouts`, nothing comes from the atlas: module names and formulas are from reading transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from layouts import LLAMA, SANDWICH
from torch import Tensor

INKLING2 = ("inkling2_text", "inkling2_loop_text")
LATENT = LLAMA | {"q": "self_attn.q_b_proj", "v": "self_attn.kv_b_proj"}
_SHARED = {
    "embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.final_layernorm",
}  # fmt: skip


def _branch(shared: str) -> dict[str, str]:
    """Zamba: attention lies in a branch that layers share."""
    parts = {part: f"{shared}.self_attn.{part}_proj" for part in "qkvo"}
    mlp = {"mlp": f"{shared}.feed_forward", "down": f"{shared}.feed_forward.down_proj"}
    return _SHARED | parts | mlp | {"attn": f"{shared}.self_attn"}


LAYOUT: dict[str, dict[str, str]] = {
    "bailing_hybrid": LATENT,
    "kimi_linear": LATENT,
    "minimax": LLAMA,
    "olmo_hybrid": LLAMA,
    "falcon_h1": LLAMA | {
        "norm": "model.final_layernorm", "mlp": "feed_forward", "down": "feed_forward.down_proj", "mid": "pre_ff_layernorm",
        "mlp_out": "feed_forward", "mixer_in": "input_layernorm",
    },
    "nemotron_h": {
        "embed": "model.embeddings", "blocks": "model.layers", "norm": "model.norm_f", "attn": "mixer", "q": "mixer.q_proj",
        "k": "mixer.k_proj", "v": "mixer.v_proj", "o": "mixer.o_proj", "attn_out": "mixer", "mlp": "mixer",
        "mlp_out": "mixer", "down": "mixer.down_proj",
    },
    "zamba": _branch("shared_transf"),
    "zamba2": _branch("shared_transformer"),
    "rwkv": {
        "embed": "rwkv.embeddings", "blocks": "rwkv.blocks", "norm": "rwkv.ln_out", "attn": "attention",
        "attn_out": "attention", "mlp": "feed_forward", "down": "feed_forward.value", "mid": "ln2", "mlp_out": "feed_forward",
    },
    "doge": LLAMA,
    "dory": SANDWICH,
    "moshi": LLAMA | {"down": "mlp.fc2", "o": "self_attn.o_proj.linear"},
    "longcat_flash": LLAMA,
    "gemma3n_text": SANDWICH,
    "deepseek_v4": LLAMA
    | {"q": "self_attn.q_b_proj", "k": "self_attn.kv_proj", "o": "self_attn.o_a_proj", "o_last": "self_attn.o_b_proj"},
    "glm5_next_text": LATENT,
    "hy_v4": LATENT,
    "inkling_text": LLAMA | {"attn_out": "attn_sconv", "mlp_out": "mlp_sconv"},
    **dict.fromkeys(INKLING2, LLAMA | {
        **{part: f"self_attn.{part}_proj.linear" for part in "qko"}, "attn_out": "post_attention_convolution",
        "mlp_out": "post_mlp_convolution",
    }),
    "zaya": LLAMA | {"q": "self_attn.qkv_proj", "k": "self_attn.qkv_proj"},
    "jetmoe": LLAMA | {"attn": "self_attention", "attn_out": "self_attention", "slots": "self_attention.experts"},
    **{key: {"embed": "git.embeddings.word_embeddings", "blocks": "git.encoder.layer", "norm": "", "attn": "attention.self", "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "o": "attention.output.dense", "mlp": "intermediate", "down": "output.dense", "mid_out": "attention", "attn_out": "attention.output.dense", "mlp_out": "output.dense", "pattern": "attention.self.dropout"} for key in ("git", "GitForCausalLM")},
    "openai-gpt": {
        "embed": "transformer.tokens_embed", "blocks": "transformer.h", "norm": "", "attn": "attn", "qkv": "attn.c_attn",
        "o": "attn.c_proj", "mlp": "mlp", "down": "mlp.c_proj", "mid_out": "ln_1", "attn_out": "attn.c_proj",
        "mlp_out": "mlp", "pattern": "attn.attn_dropout",
    },
    "GraniteDoclingForConditionalGeneration": LLAMA
    | {"embed": "model.text_model.embed_tokens", "blocks": "model.text_model.layers", "norm": "model.text_model.norm"},
}  # fmt: skip
"""Module names by type."""
WIDE_QUERIES = {"bailing_hybrid", "kimi_linear", "glm5_next_text", "hy_v4"}
DENSE: dict[str, list[int]] = {
    "inkling_text": [0],
    "bailing_hybrid": [0],
    "kimi_linear": [0],
    "nemotron_h": [4],
    "glm5_next_text": [0],
    "hy_v4": [0],
}
_HEADS = {"q", "k", "v", "rot_q", "rot_k", "scores", "pattern", "z", "head_out"}
_STREAM = {"resid_pre", "attn_out", "mixer_out", "resid_mid", "mlp_out", "resid_post"}
_OF_BLOCKS = {*_HEADS, *_STREAM, "attn_in", "mixer_in", "mlp_in", "mlp_act"}
LACKS: dict[str, set[str]] = {
    "bailing_hybrid": {"k"},
    "kimi_linear": {"k"},
    "minimax": {"mlp_act"},
    "falcon_h1": {"attn_out"},
    "nemotron_h": {"resid_mid"},
    **{name: {"attn_out", "resid_mid", "mlp_out"} for name in ("zamba", "zamba2")},
    "rwkv": _HEADS,
    "longcat_flash": {*_HEADS, "attn_in", "attn_out", "mixer_in", "mixer_out", "resid_mid", "mlp_act"},
    "gemma3n_text": _STREAM,
    "deepseek_v4": {*_STREAM, "mlp_act"},
    **{key: {*_STREAM, "k"} for key in ("glm5_next_text", "hy_v4")},
    "zaya": {"mlp_act"},
    **{key: {"mlp_act", "final_norm"} for key in INKLING2},
    "jetmoe": {"k", "head_out", "mlp_act"},
    **{key: {"rot_q", "rot_k", "scores", "final_norm"} for key in ("git", "GitForCausalLM", "openai-gpt")},
}
LINEAR: dict[str, list[int]] = {
    "bailing_hybrid": [0],
    "kimi_linear": [0],
    "minimax": [0],
    "olmo_hybrid": [0, 1],
    "glm5_next_text": [0, 2],
}
"""Layers with linear attention."""
MIXED_VALUES = {*INKLING2, "deepseek_v4", "inkling_text", "jetmoe", "zaya"}
CALLED_ALIKE = {"bailing_hybrid", "glm5_next_text", "kimi_linear", "minimax"}
"""Types whose linear attention has the name of the other."""
SOME: dict[str, dict[str, list[int]]] = {
    "deepseek_v4": {key: [0] for key in ("v", "rot_k", "scores", "pattern")},
    "dory": {key: [0, 3] for key in _OF_BLOCKS},  # others run again
    "inkling2_loop_text": {key: [0, 2] for key in _OF_BLOCKS},
    "nemotron_h": {
        **{key: [1, 2] for key in ("mixer_in", "mixer_out")},
        **{key: [2] for key in ("attn_in", "attn_out", *_HEADS)},
        **{key: [0, 3, 4] for key in ("mlp_in", "mlp_out")},
    },
    **{name: {key: [1, 3] for key in (*_HEADS, "attn_in", "mlp_in", "mlp_act")} for name in ("zamba", "zamba2")},
}
MIXERS: dict[str, dict[int, str]] = {
    "nemotron_h": {1: "mixer"},
    **{
        name: {0: "mamba", 1: "mamba_decoder.mamba", 2: "mamba", 3: "mamba_decoder.mamba"}
        for name in ("zamba", "zamba2")
    },
    "falcon_h1": dict.fromkeys((0, 1, 2), "mamba"),
}
ADDED: dict[str, dict[int, dict[str, str]]] = {
    "olmo_hybrid": {2: {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}},
}
"""Modules that give what is added, in layers that have others than the rest."""
STATES = {"recurrent_gemma": "temporal_block.rg_lru"}
"""The module that gives the recurrent state after each position."""


def _beam(block: Any, site: str) -> float:
    return 1 / math.sqrt(block.attn_residual_add_idx if site == "attn_out" else block.mlp_residual_add_idx)


def _rate(block: Any, site: str) -> Tensor:
    """Dory: how far the stream goes towards what attention or the MLP gives."""
    rate = block.lambda_1 if site == "attn_out" else block.lambda_2
    return (rate * block.lambda_scale).abs().detach()


def _muse(block: Any, site: str) -> Tensor:
    gate = block.post_attention_residual_gate if site == "attn_out" else block.post_feedforward_residual_gate
    return torch.sigmoid(gate.gate / gate.temperature).detach()


def _zaya(block: Any, site: str) -> Tensor:
    scale = block.post_attention_residual_scale if site == "attn_out" else block.post_mlp_residual_scale
    return scale.hidden_states_scale.detach()


FACTORS: dict[str, Callable[[Any, str], float | Tensor]] = {
    "beam": _beam,
    "muse_spark": _muse,
    "zaya": _zaya,
    "dory": _rate,
    "minimax": lambda block, site: block.attn_beta_factor if site == "attn_out" else block.mlp_beta_factor,
    "falcon_h1": lambda block, site: block.attn_out_multiplier if site == "attn_out" else 1.0,
    "GraniteDoclingForConditionalGeneration": lambda block, site: block.residual_multiplier,
}
"""What a block multiplies attention and MLP by before it adds them."""
BIASES: dict[str, Callable[[Any], float | Tensor]] = {
    "gpt_neox_japanese": lambda block: 0.0 if block.attention.dense_bias is None else block.attention.dense_bias,
}
"""What a block adds to what attention gives."""
OTHERWISE: dict[str, Callable[[Any], dict[str, str]]] = {
    "opt": lambda config: {} if config.do_layer_norm_before else {"mid_out": "self_attn_layer_norm"},
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3"), lambda config: {} if config.q_lora_rank else {"q": "self_attn.q_proj"}
    ),
}
"""What lies elsewhere in models with some configs."""
KEPT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bloom": lambda block, x: block.input_layernorm(x) if block.apply_residual_connection_post_layernorm else x,
    "beam": lambda block, x: x * math.sqrt(1 - 1 / block.attn_residual_add_idx),
    "doge": lambda block, x: block.input_residual * x,
    **dict.fromkeys(INKLING2, lambda block, x: x * (not block.is_block_boundary)),
    "dory": lambda block, x: block.input_layernorm(x) * (1 - _rate(block, "attn_out")),
    "minimax": lambda block, x: block.input_layernorm(x) * block.attn_alpha_factor,
    "zaya": lambda block, x: block.post_attention_residual_scale(torch.zeros_like(x), x),
    "rwkv": lambda block, x: block.pre_ln(x) if hasattr(block, "pre_ln") else x,
}
"""What a block makes of the stream before it adds what attention gives."""
BESIDE: dict[str, tuple[str, Callable[[Any], float]]] = {
    "falcon_h1": ("mamba", lambda block: block.ssm_out_multiplier),
}
"""A module whose output is added with attention's, and what the block multiplies it by."""
