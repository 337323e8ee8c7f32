"""Random-weight models of real families, made from config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import LoadError, nearest
from .routed import LINEAR, MIXTURES, MLA, SIZES, VOCAB
from .routed import build as build_mixture
from .types import build as build_type
from .types import encoders, types, visual
from .visual import VISUAL

_COMMON = {**SIZES, "num_key_value_heads": 2}
_GPT = {
    "vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 4}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
_SHARED = {**_MOE, "shared_expert_intermediate_size": 40}
_LOCAL_MOE = {"num_local_experts": 6, "num_experts_per_tok": 2}
_GROUPS = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 48,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True,
}  # fmt: skip
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_LOCAL = {
    "num_layers": 3, "num_heads": 4, "window_size": 4, "attention_types": [[["global", "local"], 1], [["global"], 1]],
}  # fmt: skip
_SCALED = {
    "residual_multiplier": 0.4, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
}  # fmt: skip
_CHUNKED = {
    "head_dim": 16, "intermediate_size_mlp": 80, "moe_layers": [0, 2], "no_rope_layers": [1, 0, 1],
    "attention_chunk_size": 4, "attn_temperature_tuning": True, "floor_scale": 64,
    "layer_types": ["chunked_attention", "full_attention", "full_attention"],
}  # fmt: skip
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT),
    "gpt_neox": ("GPTNeoX", {**SIZES, "rotary_pct": 0.5}),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 8}),
    "llama": ("Llama", {**_COMMON, "head_dim": 24, "attention_bias": True}),
    "mistral": ("Mistral", {**_COMMON, "sliding_window": 4}),
    "qwen2": ("Qwen2", _COMMON),
    "qwen3": ("Qwen3", {**_COMMON, "head_dim": 24}),
    "gemma2": ("Gemma2", {**_COMMON, **_GEMMA}),
    "gemma3": ("Gemma3Text", {**_COMMON, **_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "phi3": ("Phi3", _COMMON),
    "olmo2": ("Olmo2", _COMMON),
    "gpt_neo": ("GPTNeo", {**SIZES, **_LOCAL}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "qwen2_moe": ("Qwen2Moe", {**_COMMON, **_SHARED, "norm_topk_prob": False, "mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3Moe", {**_COMMON, **_MOE, "head_dim": 16, "mlp_only_layers": [1]}),
    "mixtral": ("Mixtral", {**_COMMON, **_LOCAL_MOE, "sliding_window": 4}),
    "olmoe": ("Olmoe", {**_COMMON, **_MOE, "norm_topk_prob": False}),
    "gpt_oss": ("GptOss", {**_COMMON, **_LOCAL_MOE, "head_dim": 16, "sliding_window": 4, "layer_types": _ALTERNATING}),
    "granitemoe": ("GraniteMoe", {**_COMMON, **_LOCAL_MOE, **_SCALED}),
    "deepseek_v3": ("DeepseekV3", {**SIZES, **_GROUPS, **MLA, "num_key_value_heads": 4}),
    "glm4_moe": ("Glm4Moe", {**_COMMON, **_GROUPS, "head_dim": 16, "use_qk_norm": True, "n_group": 2, "topk_group": 1}),
    "llama4": ("Llama4Text", {**_COMMON, **_LOCAL_MOE, **_CHUNKED}),
    "qwen3_next": ("Qwen3Next", {**_COMMON, **_SHARED, **LINEAR, "mlp_only_layers": [1]}),
    "qwen3_5": ("Qwen3_5Text", {**_COMMON, **LINEAR}),
    "qwen3_5_moe": ("Qwen3_5MoeText", {**_COMMON, **_SHARED, **LINEAR}),
}


def families() -> list[str]:
    """Families whose every site is held against hooks written by hand."""
    return [*_FAMILIES, *VISUAL]


def mixtures() -> list[str]:
    """Further families, whose routers are held against selection written by hand. `tiny` takes them too."""
    return list(MIXTURES)


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random-weight model of a family, or of a masked language model's class by its name: 3 layers, d_model 64, in
    eval mode.

    Args:
        config: settings over the tiny ones, in Hugging Face's words.

    Raises:
        LoadError: no such family here.
    """
    known = [*families(), *mixtures(), *types(), *encoders(), *visual()]
    if family not in known:
        raise LoadError(f"no tiny model of {family!r}. {nearest(family, known)}")
    norms = ("norm",) if family in _FAMILIES else ("norm", ".ln")  # pages have numbers of the first as they are
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build(family, config)
        for name, parameter in model.named_parameters():
            if name.endswith("embed_positions.weight") and not parameter.requires_grad:  # sines and cosines
                continue
            nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else 2.0 * parameter.shape[-1] ** -0.5)
            gain = "weight" in name and any(word in name.lower() for word in norms)
            if (gain or name.endswith("scale")) and parameter.ndim == 1:
                parameter.data += 1
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias", "balancing_biases")):
                nn.init.normal_(buffer, std=0.5)
    if dtype == torch.float64 and "experts" in str(model):  # the grouped kernel has no float64
        model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def _build(family: str, config: dict[str, Any]) -> Any:
    import transformers

    if family in MIXTURES:
        return build_mixture(family, config)
    if family in VISUAL:
        return VISUAL[family]({**_COMMON, **config})
    if family not in _FAMILIES:
        return build_type(family, config)
    name, settings = _FAMILIES[family]
    settings = {**settings, **config}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    head = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    full_config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, name.removesuffix("Text") + head)(full_config)
