"""Tiny settings of further families with experts: what their routers do is tested, not every site."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import LoadError

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""Of all tiny language models, in the words of most families."""
MLA = {"kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
_HYBRID = ["linear_attention", "full_attention", "full_attention"]
LINEAR = {
    "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_conv_kernel_dim": 3, "layer_types": _HYBRID,
}  # fmt: skip
"""Of Qwen's families in which most layers' attention is linear."""
_MHA = {**SIZES, "num_key_value_heads": 4}
_GQA = {**_MHA, "num_key_value_heads": 2, "head_dim": 16}
_LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_ROUTED = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 48,
    "n_shared_experts": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True,
}  # fmt: skip
_DENSE_FIRST = {"first_k_dense_replace": 1}
_SPARSE_LAST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_SCALED = {"shared_intermediate_size": 40, "residual_multiplier": 0.4}
_ONE_SHARED = {**_MOE, "shared_expert_intermediate_size": 40, "norm_topk_prob": True}
_KDA = {"layer_types": _HYBRID, "linear_head_dim": 8, "linear_num_heads": 4, "linear_conv_kernel_dim": 3}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TOWER = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64, "intermediate_size": 48,
    "spatial_merge_size": 2, "temporal_patch_size": 1,
}  # fmt: skip
_IMAGES = {"image_token_id": 90, "video_token_id": 91}
_INDEX = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_conv": 3}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("PhimoeForCausalLM", {**_GQA, **_LOCAL}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {**_MHA, **MLA, **_ROUTED, **_DENSE_FIRST, "topk_method": "group_limited_greedy"},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {**_GQA, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 1},
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        {
            **_GQA, **_LOCAL, "block_size": 4, "layer_types": _HYBRID, "mlp_alpha_factor": 1.5, "mlp_beta_factor": 0.5,
            "full_attn_alpha_factor": 2.0, "full_attn_beta_factor": 0.7, "linear_attn_alpha_factor": 1.4,
            "linear_attn_beta_factor": 0.9,
        },
    ),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {**_GQA, **_LOCAL}),
    "gemma4": (
        "Gemma4ForCausalLM",
        {
            **_GQA, **_MOE, "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
            "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "global_head_dim": 16,
        },
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {**_GQA, "num_experts": 6, "moe_topk": 2}),
    "jamba": (
        "JambaForCausalLM",
        {
            **_GQA, "num_experts": 6, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 0,
            "attn_layer_period": 3, "attn_layer_offset": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_d_conv": 3,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {**_GQA, **_LOCAL, **_MAMBA, **_SCALED, "layer_types": _HYBRID},
    ),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM", {**_GQA, **_LOCAL, **_SCALED},
    ),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", {**_MHA, **MLA, **_ROUTED, **_SPARSE_LAST}),
    "dots1": ("Dots1ForCausalLM", {**_GQA, **_ROUTED, **_DENSE_FIRST}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            **_GQA, **_ROUTED, "layers_block_type": ["moe", "mamba", "attention", "moe", "mlp"], "ssm_state_size": 8,
            "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1, "conv_kernel": 3, "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 40,
        },
    ),
    "exaone_moe": (
        "ExaoneMoeForCausalLM",
        {
            **_GQA, **_ROUTED, **_SPARSE_LAST, "num_experts": 8, "num_shared_experts": 1, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {**_GQA, **_MOE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "full_attention"]},
    ),
    "afmoe": (
        "AfmoeForCausalLM",
        {**_GQA, **_MOE, "num_dense_layers": 1, "num_shared_experts": 1, "route_scale": 1.5, "sliding_window": 4},
    ),
    "flex_olmo": ("FlexOlmoForCausalLM", {**_GQA, "num_experts": 6, "num_experts_per_tok": 2}),
    "mistral4": ("Mistral4ForCausalLM", {**_MHA, **MLA, **_ROUTED, **_DENSE_FIRST}),
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        {
            **_MHA, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 32, "num_experts_per_tok": 2,
            "n_routed_experts": 6,
            "moe_intermediate_size": 48, "hc_mult": 2, "sliding_window": 4, "o_groups": 2, "o_lora_rank": 16,
            "index_n_heads": 16, "index_head_dim": 8, "index_topk": 4,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "compress_rate_csa": 4, "compress_rate_hca": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"],
        },
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        {
            **_MHA, **MLA, "num_hidden_layers": 6, "ffn_hidden_size": 96, "moe_topk": 3, "n_routed_experts": 6,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 48, "head_dim": 8, "routed_scaling_factor": 1.5,
        },
    ),
    "jetmoe": ("JetMoeForCausalLM", {**_GQA, **_LOCAL, "kv_channels": 16}),
    "aria": (
        "AriaTextForCausalLM", {**_GQA, "moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "axk1": ("AXK1ForCausalLM", {**_MHA, **MLA, **_ROUTED, **_SPARSE_LAST}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", {**_MHA, **MLA, **_ROUTED, **_SPARSE_LAST, **_INDEX}),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", {**_MHA, **MLA, **_ROUTED, **_SPARSE_LAST, **_INDEX}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {**_GQA, **_ROUTED, "v_head_dim": 12, "swa_head_dim": 16}),
    "solar_open": ("SolarOpenForCausalLM", {**_GQA, **_ROUTED}),
    "mellum": ("MellumForCausalLM", {**_GQA, **_MOE, "norm_topk_prob": True}),
    "lara_mini": ("LaraMiniForCausalLM", {**_GQA, **_ONE_SHARED}),
    "flint": ("FlintForCausalLM", {**_GQA, **_ONE_SHARED}),
    "hy_v3": ("HYV3ForCausalLM", {**_GQA, **_MOE, "num_local_experts": 6, "router_scaling_factor": 1.5}),
    "cohere2_moe": (
        "Cohere2MoeForCausalLM",
        {
            **_GQA, **_MOE, "num_shared_experts": 1, "expert_selection_fn": "sigmoid", "norm_topk_prob": True,
            "shared_expert_combination_strategy": "sum",
        },
    ),
    "kolibri1": ("Kolibri1ForCausalLM", {**_GQA, **_MOE, "norm_topk_prob": True}),
    "laguna": (
        "LagunaForCausalLM",
        {**_GQA, **_MOE, "shared_expert_intermediate_size": 40, "moe_routed_scaling_factor": 1.7},
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        {**_MHA, **MLA, **_ROUTED, **_SPARSE_LAST, **_KDA, "num_experts": 8, "head_dim": 8},
    ),
    "bailing_hybrid": (
        "BailingHybridForCausalLM",
        {**_MHA, **MLA, **_ROUTED, **_SPARSE_LAST, **_KDA, "num_experts": 8, "head_dim": 8},
    ),
    "glm4v_moe": (
        "Glm4vMoeForConditionalGeneration",
        {
            "text_config": {
                **_GQA, **_ROUTED, **_DENSE_FIRST, "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {**_TOWER, "image_size": 16}, **_IMAGES,
        },
    ),
    "qwen3_omni_moe_thinker": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": {**_GQA, **_MOE, "rope_parameters": {**_MROPE, "mrope_section": [4, 2, 2]}},
            "vision_config": {**_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
            "audio_config": {
                "encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
                "num_mel_bins": 16, "output_dim": 64, "downsample_hidden_size": 16,
            }, **_IMAGES,
        },
    ),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", {**_GQA, **_LOCAL, "residual_multiplier": 0.4}),
}  # fmt: skip
"""Class and settings of a tiny model by family."""


def build(family: str, config: dict[str, Any]) -> Any:
    """The model, without weights that matter.

    Raises:
        LoadError: it came with a later release of transformers.
    """
    import transformers

    name, settings = MIXTURES[family]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise LoadError(
            f"transformers {transformers.__version__} has no {name}, of which a tiny {family!r} is made: "
            "pip install --upgrade transformers"
        )
    model = kind(kind.config_class(**{**settings, **config}))
    for module in model.modules():
        if hasattr(module, "tid2eid"):  # experts by token id: some for each
            by_id = torch.rand(module.tid2eid.shape[0], module.num_experts).argsort(-1)
            module.tid2eid = by_id[:, : module.top_k]
    return model
