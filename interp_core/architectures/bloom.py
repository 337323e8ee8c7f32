"""BLOOM and MPT add the residual stream inside attention and MLP, so what they add is what the last projection in these
gives. Query, key and value lie side by side per head in BLOOM, one block after the other in MPT.

BLOOM with `apply_residual_connection_post_layernorm` adds to the normed stream.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .family import Family, Place, fused_blocks, fused_per_head

NO_ROTARY = dict.fromkeys(
    ("rot_q", "rot_k"), "its positions are a bias on the scores, no rotary embedding; read q and k"
)


def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """The stream, or its norm, and what is added."""
    if block.apply_residual_connection_post_layernorm:
        before = (block.input_layernorm if site == "resid_mid" else block.post_attention_layernorm)(before)
    return before + added


FAMILY = Family(
    "bloom",
    fused=fused_per_head,
    places={"attn_out": Place("self_attention.dense", "out"), "mlp_out": Place("mlp.dense_4h_to_h", "out")},
    join=join,
    refuse=NO_ROTARY,
)
MPT = Family(
    "mpt",
    fused=fused_blocks,
    places={"mlp_out": Place("ffn.down_proj", "out")},
    refuse=NO_ROTARY,
)
