"""Tiny vision-language models: a tower of two layers for 16x16-pixel pictures, around a tiny language model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .routed import LINEAR

IMAGE = 90
"""Token id of a visual token in all of them."""
_TOWER = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
_MERGER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
    "temporal_patch_size": 1, "spatial_merge_size": 2, "out_hidden_size": 64,
}  # fmt: skip
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_DEEPSTACK = {**_MERGER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}


def _qwen_vl(name: str, vision: dict[str, Any], own: dict[str, Any], text: dict[str, Any]) -> Any:
    """M-RoPE: rotary positions by time, row and column."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    language = {**own, **text, "rope_parameters": rope}
    config = getattr(transformers, f"{name}Config")(text_config=language, vision_config=vision, **_QWEN_IDS)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _around(kinds: str, more: dict[str, Any], own: dict[str, Any], text: dict[str, Any]) -> Any:
    """A tower around the language model of another family; `kinds` are the whole, the tower and the language model."""
    import transformers

    name, vision, language = kinds.split()
    tower = getattr(transformers, f"{vision}VisionConfig")(**_TOWER)
    inner = getattr(transformers, f"{language}Config")(**{**own, **text})
    config = getattr(transformers, f"{name}Config")(text_config=inner, vision_config=tower, **more)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


_MOE = {
    "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1],
}  # fmt: skip
_WINDOWS = {**_MERGER, "window_size": 16, "fullatt_block_indexes": [1]}
_PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
_GEMMA_IDS = {"image_token_index": IMAGE, "mm_tokens_per_image": 4, "boi_token_index": 92, "eoi_token_index": 93}
_GEMMA = {
    "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
VISUAL: dict[str, Callable[[dict[str, Any]], Any]] = {
    "qwen2_5_vl": partial(_qwen_vl, "Qwen2_5_VL", _WINDOWS, {}),
    "qwen3_vl": partial(_qwen_vl, "Qwen3VL", _DEEPSTACK, {"head_dim": 16}),
    "qwen3_vl_moe": partial(_qwen_vl, "Qwen3VLMoe", _DEEPSTACK, _MOE),
    "qwen3_5_vision": partial(_qwen_vl, "Qwen3_5", {**_MERGER, "num_position_embeddings": 64}, LINEAR),
    "llava": partial(_around, "Llava CLIP Llama", {"image_token_index": IMAGE, "image_seq_length": 16}, {}),
    "llava_onevision": partial(
        _around, "LlavaOnevision Siglip Qwen2", {"image_token_index": IMAGE, "video_token_index": 91, **_PINPOINTS}, {}
    ),
    "internvl": partial(_around, "InternVL InternVL Qwen2", {"image_token_id": IMAGE, "image_seq_length": 4}, {}),
    "gemma3_vision": partial(_around, "Gemma3 Siglip Gemma3Text", _GEMMA_IDS, _GEMMA),
    "smolvlm": partial(_around, "SmolVLM SmolVLM Llama", {"image_token_id": IMAGE, "scale_factor": 2}, {}),
}
"""By name: from settings of the language model to a model."""
