"""A tiny model of every model type that transformers can build: sizes by the words of its config, every kind of layer.

Most types need nothing of their own: a config says which sizes it has, its defaults say which kinds of layers.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import LoadError

WIDTHS = {
    2: "index_kpool num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_query_groups "
    "linear_num_key_heads type_vocab_size depth num_global_layers topk_group hc_mult "
    "hc_count o_groups encoder_layers",
    3: "num_hidden_layers num_layers n_layer n_layers decoder_layers num_decoder_layers num_encoder_layers "
    "num_blocks layers num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts "
    "linear_conv_kernel_dim short_conv_kernel_size mamba_d_conv conv_kernel conv_L_cache conv_kernel_size "
    "conv1d_width",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
    "linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads n_mamba_heads n_group "
    "num_expert_group mamba_dt_rank time_step_rank index_topk block_size sliding_window "
    "sliding_window_size local_attention attention_window_size window_size attention_chunk_size "
    "keep_window_size local_attention_window_len patch_size mm_tokens_per_image",
    8: "num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim rotary_dim "
    "linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state ssm_state_size state_size "
    "laurel_rank loop_gate_rank d_rel hc_lowrank adapter_rank gated_norm_rank ffn_round_up_to_multiple_of "
    "block_multiple_of",
    12: "v_head_dim hidden_size_per_layer_input",
    16: "head_dim swa_head_dim d_kv dim_head kv_channels attention_head_dim d_head attention_head_size "
    "qk_nope_head_dim index_n_heads index_head_dim query_pre_attn_scalar o_lora_rank mamba_chunk_size chunk_size "
    "rel_extent shape_embed_dim pronunciation_embed_dim prompt_mid_dim router_hidden_size "
    "position_bias_num_buckets image_size image_seq_length output_channels max_image_size max_img_size",
    20: "num_embeddings shape_vocab_size pronunciation_vocab_size",
    24: "kv_lora_rank qk_head_dim global_head_dim",
    32: "q_lora_rank mamba_d_head mamba_head_dim mamba_headdim ple_embed_dim "
    "moe_latent_size moe_hidden_size base_channels latent_channels codebook_size",
    40: "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size",
    48: "moe_intermediate_size expert_ffn_hidden_size",
    50: "encoder_hash_byte_group_vocab",
    64: "embed_dim projector_input_dim projector_output_dim vision_output_dim projection_dim "
    "projector_hidden_size num_position_embeddings hidden_size d_model n_embd emb_dim embedding_dim "
    "embedding_size dim word_embed_proj_dim input_embedding_size output_embedding_size input_size "
    "lru_width hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size text_hidden_size "
    "codebook_dim encoder_hidden_size attention_hidden_size out_hidden_size ngram_vocab_size_base "
    "original_max_position_embeddings",
    90: "image_token_id image_token_index",
    91: "video_token_id video_token_index audio_token_id",
    92: "boi_token_id boi_token_index vision_start_token_id boa_token_id",
    93: "eoi_token_id eoi_token_index vision_end_token_id eoa_token_index",
    96: "alignment_intermediate_size vocab_size vocab_size_per_layer_input unpadded_vocab_size "
    "decoder_vocab_size intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim dff dim_ff "
    "ffn_hidden_size feed_forward_size d_inner intermediate_size_mlp dense_intermediate_size mlp_dim",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers "
    "moe_layer_start_index mamba_n_groups mamba_ngroups n_groups max_window_layers",
    0: "num_kv_shared_layers num_nextn_predict_layers",
}
"""Sizes of tiny models, with the words that configs have for them."""
SIZES = {word: size for size, words in WIDTHS.items() for word in words.split()}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers", "num_blocks",
    "layers",
)  # fmt: skip
"""Words for the number of layers."""
MOST = 8_000_000
"""Parameters that a tiny model may have."""

_BY_AXIS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
_EQUAL = {"num_key_value_heads": 4}
_LATENT = {**_EQUAL, "head_dim": 8}
_D_HEAD = {"head_dim": 16}
_GLOBAL = {"global_head_dim": 24, "num_global_key_value_heads": 1}
_ENCODED = {"encoder_layers": 3}
_HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, **_EQUAL}
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1}
_BY_KIND = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
_PLACES = {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91}}
_DOUBLED = {"attention_hidden_size": 128, "attention_head_dim": 32}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bailing_hybrid", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "minicpm3",
            "nemotron", "mistral_large4_text", "unlimited_ocr_text",
        ),
        _EQUAL,
    ),
    **dict.fromkeys(("axk1", "deepseek_v3", "sarvam_mla", "youtu"), _LATENT),
    **dict.fromkeys(
        (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
            "whisper",
        ),
        _ENCODED,
    ),
    "axk2": {**_EQUAL, "n_group": 4, "topk_group": 2},
    "big_bird": {"attention_type": "original_full"},
    **dict.fromkeys(
        ("glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text"),
        _BY_AXIS,
    ),
    "glm4v_moe_text": {
        **_ROUTED,
        "rope_parameters": {
            **_BY_AXIS["rope_parameters"], "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5,
        },
    },
    "apertus1p5": {"image_token_offset": 32, "audio_token_offset": 64},
    "bamba": {"attn_layer_indices": [1]},
    **dict.fromkeys(("chameleon", "emu3"), _PLACES),
    "cosmos3_edge_text": _BY_AXIS,
    "deepseek_ocr2_text": {**_ROUTED, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "diffusion_gemma_text": {**_GLOBAL, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 48},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [48, 40],
        "rope_parameters": {**_BY_AXIS["rope_parameters"], "mrope_section": [3, 3, 2]},
    },
    "florence_vision": {
        "patch_size": [7, 3, 3, 3], "embed_dim": [16, 32, 48, 64], "num_heads": [1, 2, 3, 4],
        "num_groups": [1, 2, 3, 4],
    },
    "glm5_next_text": {**_EQUAL, "qk_rope_head_dim": 0, "head_dim": 0},
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 0], [-1, 1]], "spatial_target_layers": [1, 2], "downsample_rate": "1/2",
    },
    "hunyuan_vl_text": {**_D_HEAD, **_BY_AXIS},
    "hy_v4_vl_text": {
        **_EQUAL, "rope_parameters": {**_BY_AXIS["rope_parameters"], "mrope_section": [2, 1, 1]},
    },
    "molmo2_adapter": {"vision_feature_layer": [2, 1]},
    "molmo2_vision": {"image_size": [16, 16]},
    "mistral4": {**_LATENT, "rope_parameters": None},
    "muse_spark_audio": {"hidden_sizes": [8, 16, 24, 32]},
    "wavtokenizer_encoder": {"num_filters": 8},
    "radio": {"video_temporal_patch_size": 2},
    "cohere_compass_text": {
        "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": _BY_KIND,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 3},
    },
    "deepseek_v2": {**_EQUAL, **_ROUTED, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "doge": {"keep_window_size": 64},  # keys of so small a model tie: rounding decides which are kept
    "dots1": _ROUTED,
    "dots3_note_text": {
        **_EQUAL, "index_n_heads": 12, "index_head_dim": 16, "head_dim": 24, "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 8, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    },
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GLOBAL),
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "granite4_vision_text": {"residual_multiplier": 0.4, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _D_HEAD),
    "inkling_text": {"mlp_layer_types": ["dense", "sparse", "sparse"], "n_shared_experts": 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2,
    },
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 0},
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"], "full_attn_idxs": None},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]},
    "longcat_flash": {**_LATENT, "num_hidden_layers": 6},
    "hy_v4": {"index_topk": 6},  # of seven tokens, so that a token sees itself
    "falcon_h1": {
        "mamba_d_ssm": 128, "attention_out_multiplier": 0.6, "ssm_out_multiplier": 1.7, "attention_in_multiplier": 1.2,
        "key_multiplier": 0.7,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 24, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh", "local"], "axial_pos_embds": False, "num_buckets": 4,
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4,
    },
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "rope_parameters": _BY_KIND,
        "sliding_window": 4, "num_sliding_attention_heads": 6, "share_expert_dim": 40,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_HYBRID, **_DOUBLED},
    "zamba2": {**_HYBRID, **_DOUBLED, "kv_channels": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a type needs beside the sizes, by the `model_type` of the config that its class takes."""


def types() -> list[str]:
    """Model types of transformers' mapping of causal language models."""
    return sorted(_classes())


def encoders() -> list[str]:
    """Classes of transformers' mapping of masked language models, but for encoder-decoders."""
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return sorted({name for name in names if not name.endswith("ForConditionalGeneration")})


def visual() -> list[str]:
    """Classes of transformers' mapping of models that take images and text, but for encoder-decoders."""
    from transformers.models.auto import modeling_auto

    encoded = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted({name for model_type, name in names.items() if model_type not in encoded})


def _classes() -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    return dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str, config: dict[str, Any]) -> Any:
    """The model of a type, or of a class by its name, without weights that matter.

    Raises:
        LoadError: transformers cannot build it, with its reason.
    """
    import transformers

    kind = getattr(transformers, _classes().get(model_type, model_type))
    try:
        own = OWN.get(kind.config_class.model_type, {}) | ({"is_decoder": False} if model_type in encoders() else {})
        known = {name: inner for name, inner in own.items() if isinstance(inner, dict) and "model_type" in inner}
        settings = _settings(kind.config_class(**known), {**own, **config})
        full_config = kind.config_class(**settings)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(full_config).parameters())
        if size > MOST:
            raise LoadError(f"a tiny {model_type} would have {size:,} parameters; say its sizes in testing/types.py")
        return kind(full_config)
    except LoadError:
        raise
    except Exception as error:  # whatever the library says of its own class
        raise LoadError(f"transformers cannot build a tiny {model_type}: {type(error).__name__}: {error}") from error


def _settings(default: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Settings for a tiny model, of the config that a class has by default."""
    known = default.to_dict()
    settings: dict[str, Any] = {word: SIZES[word] for word, now in known.items() if word in SIZES and now is not None}
    settings |= IDS
    if "is_decoder" in known:
        settings["is_decoder"] = True
    if word := next((word for word in LAYERS if known.get(word)), None):
        chosen = _every_kind(known, known[word])
        by_layer = {name: per for name, per in known.items() if _per_layer(per, known[word])}
        settings |= {name: [SIZES.get(name, per[i]) for i in chosen] for name, per in by_layer.items()}
        settings |= {name: [*range(len(chosen))] for name, per in known.items() if per == [*range(known[word])]}
        settings |= {word: len(chosen) for word in LAYERS if word in settings}
    for name, inner in vars(default).items():
        if hasattr(inner, "model_type"):
            more = OWN.get(inner.model_type, {}) | own.get(name, {})
            own = {**own, name: type(inner)(**_settings(inner, more))}
    return {**settings, **own}


def _per_layer(setting: Any, n_layers: int) -> bool:
    if not isinstance(setting, (list, tuple)) or len(setting) != n_layers or isinstance(setting[0], (list, dict)):
        return False
    return list(setting) != list(range(n_layers))  # or it lists layers by number


def _every_kind(known: dict[str, Any], n_layers: int) -> list[int]:
    """A few layers, of every kind that a config tells apart."""
    kinds: dict[tuple[Any, ...], int] = {}
    per_layer = [per for per in known.values() if _per_layer(per, n_layers)]
    for layer in range(n_layers):
        kinds.setdefault(tuple(str(per[layer]) for per in per_layer), layer)
    first = [*kinds.values(), *(layer for layer in range(n_layers) if layer not in kinds.values())]
    return sorted(first[: max(3, len(kinds))])
