"""Families whose blocks scale or norm the stream itself before they add to it: BEAM, Doge, MiniMax, RWKV.

`attn_out` and `mlp_out` are what is added, after the block's multipliers; the stream goes on as `join` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .family import Family, llama_like


def beam_added(block: Any) -> Mapping[str, float]:
    """BEAM: the n-th thing that is added counts as one of n, by variance."""
    places = {"attn_out": block.attn_residual_add_idx, "mlp_out": block.mlp_residual_add_idx}
    return {name: 1 / math.sqrt(n) for name, n in places.items()}


def beam_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """BEAM: the stream before as the other n - 1."""
    n = block.attn_residual_add_idx if site == "resid_mid" else block.mlp_residual_add_idx
    return before * math.sqrt((n - 1) / n) + added


def doge_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """Doge: learnt factors on the stream, one per dimension."""
    return (block.input_residual if site == "resid_mid" else block.post_attention_residual) * before + added


def minimax_added(block: Any) -> Mapping[str, float]:
    """MiniMax: "beta" of attention (by its kind) and of the MLP."""
    return {"attn_out": block.attn_beta_factor, "mlp_out": block.mlp_beta_factor}


def minimax_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """MiniMax: what is carried on is the norm that attention or the MLP reads, times "alpha"."""
    if site == "resid_mid":
        return block.input_layernorm(before) * block.attn_alpha_factor + added
    return block.post_attention_layernorm(before) * block.mlp_alpha_factor + added


def rwkv_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """RWKV: the first block norms the embeddings before anything else."""
    return (block.pre_ln(before) if site == "resid_mid" and block.layer_id == 0 else before) + added


_SANDWICH = {
    "blocks.ln1_post": "post_attention_layernorm", "blocks.ln2": "pre_feedforward_layernorm",
    "blocks.ln2_post": "post_feedforward_layernorm",
}  # fmt: skip
BEAM = Family("beam", paths=llama_like("model") | _SANDWICH, added=beam_added, join=beam_join)
DOGE = Family("doge", paths=llama_like("model"), join=doge_join)
MINIMAX = Family("minimax", paths=llama_like("model"), added=minimax_added, join=minimax_join)
RWKV = Family("rwkv", paths={"blocks.attn": "attention", "blocks.mlp": "feed_forward", "blocks.ln2": "ln2"}, join=rwkv_join)
