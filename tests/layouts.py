"""Where hand-written hooks find things in each family: module names, written out.

Nothing here comes from the atlas. `LAYOUT` has the paths, the other tables what a family does not have or does in its
own way in the tiny models of `interp_core.testing`.
"""

from __future__ import annotations

from transformers.models.gptj import modeling_gptj

LLAMA = {
    "embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "attn": "self_attn",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "mlp": "mlp", "down": "mlp.down_proj", "mid": "post_attention_layernorm",
    "attn_out": "self_attn", "mlp_out": "mlp",
}  # fmt: skip
SANDWICH = LLAMA | {
    "mid": "pre_feedforward_layernorm", "attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm",
}  # fmt: skip
_GPT = {
    "embed": "transformer.wte", "blocks": "transformer.h", "norm": "transformer.ln_f", "attn": "attn", "mlp": "mlp",
    "attn_out": "attn", "mlp_out": "mlp",
}  # fmt: skip
_MOE = LLAMA | {"router": "mlp.gate", "experts": "mlp.experts"}


def _inside(layout: dict[str, str], model: str) -> dict[str, str]:
    """The same blocks, deeper in a model with a vision tower."""
    return layout | {"embed": f"{model}.embed_tokens", "blocks": f"{model}.layers", "norm": f"{model}.norm"}


LAYOUT: dict[str, dict[str, str]] = {
    "gpt2": _GPT | {"qkv": "attn.c_attn", "o": "attn.c_proj", "down": "mlp.c_proj", "mid": "ln_2"},
    "gptj": _GPT | {
        "q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.out_proj", "down": "mlp.fc_out",
    },
    "gpt_neo": _GPT | {
        "q": "attn.attention.q_proj", "k": "attn.attention.k_proj", "v": "attn.attention.v_proj",
        "o": "attn.attention.out_proj", "down": "mlp.c_proj", "mid": "ln_2",
    },
    "gpt_neox": {
        "embed": "gpt_neox.embed_in", "blocks": "gpt_neox.layers", "norm": "gpt_neox.final_layer_norm",
        "attn": "attention", "qkv": "attention.query_key_value", "o": "attention.dense", "mlp": "mlp",
        "down": "mlp.dense_4h_to_h", "attn_out": "attention", "mlp_out": "mlp",
    },
    "opt": {
        "embed": "model.decoder.embed_tokens", "blocks": "model.decoder.layers",
        "norm": "model.decoder.final_layer_norm", "attn": "self_attn", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj", "mlp": "fc1", "down": "fc2",
        "mid": "final_layer_norm", "attn_out": "self_attn", "mlp_out": "fc2",
    },
    "phi3": {k: v for k, v in LLAMA.items() if k not in "qkv"} | {"qkv": "self_attn.qkv_proj"},
    "gemma2": SANDWICH, "gemma3": SANDWICH,
    "olmo2": LLAMA | {"mid": "mlp", "attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    "gpt_oss": _MOE | {"router": "mlp.router"},
    "granitemoe": _MOE | {
        "mlp": "block_sparse_moe", "mlp_out": "block_sparse_moe", "router": "block_sparse_moe.router",
        "experts": "block_sparse_moe.experts",
    },
    "deepseek_v3": _MOE | {"q": "self_attn.q_b_proj", "v": "self_attn.kv_b_proj"},
    "llama4": _MOE | {
        "mlp": "feed_forward", "mlp_out": "feed_forward", "down": "feed_forward.down_proj",
        "router": "feed_forward.router", "experts": "feed_forward.experts",
    },
    "qwen3_vl_moe": _inside(_MOE, "model.language_model"),
    "gemma3_vision": _inside(SANDWICH, "model.language_model"),
    "smolvlm": _inside(LLAMA, "model.text_model"),
} | dict.fromkeys(
    ("qwen2_5_vl", "qwen3_vl", "qwen3_5_vision", "llava", "llava_onevision", "internvl"), _inside(LLAMA, "model.language_model")
) | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_5"), LLAMA) | dict.fromkeys(
    ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe", "qwen3_next", "qwen3_5_moe"), _MOE
)  # fmt: skip

LACKS: dict[str, set[str]] = {
    "gpt2": {"rot_q", "rot_k"},
    "gptj": {"resid_mid"},
    "gpt_neo": {"rot_q", "rot_k"},
    "gpt_neox": {"resid_mid"},
    "opt": {"rot_q", "rot_k"},
    "deepseek_v3": {"k"},
} | {family: {"mlp_act"} for family in ("mixtral", "olmoe", "gpt_oss", "granitemoe", "qwen3_5_moe")}
"""What a family does not have, beside routers in dense families."""
OWN_ATTENTION = {"gpt_neo"} if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS") else {"gpt_neo", "gptj"}
"""Families that compute attention by themselves, GPT-J until transformers 5.24."""
DENSE = {
    "qwen2_moe": [0], "qwen3_moe": [1], "deepseek_v3": [0], "glm4_moe": [0], "llama4": [1], "qwen3_next": [1],
    "qwen3_vl_moe": [1], "mixtral": [], "olmoe": [], "gpt_oss": [], "granitemoe": [], "qwen3_5_moe": [],
}  # fmt: skip
"""Dense layers of the families with experts."""
VISUAL = (
    "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5_vision", "llava", "llava_onevision", "internvl", "gemma3_vision", "smolvlm",
)  # fmt: skip
DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
LINEAR: dict[str, list[int]] = {"qwen3_next": [0], "qwen3_5": [0], "qwen3_5_moe": [0], "qwen3_5_vision": [0]}
"""Layers with linear attention, which is called `linear_attn`."""
SHARED = {
    "qwen2_moe": ("mlp.shared_expert", "mlp.shared_expert_gate"),
    "qwen3_next": ("mlp.shared_expert", "mlp.shared_expert_gate"),
    "qwen3_5_moe": ("mlp.shared_expert", "mlp.shared_expert_gate"),
    "deepseek_v3": ("mlp.shared_experts", None),
    "glm4_moe": ("mlp.shared_experts", None),
    "llama4": ("feed_forward.shared_expert", None),
}
"""The expert that every token passes, and its gate."""
