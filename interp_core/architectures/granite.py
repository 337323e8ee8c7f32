"""Granite: the block scales what attention and MLP add to the stream by its `residual_multiplier`. HyperCLOVA X does so
too, after norms of its own.

Granite-MoE's router takes the top-k of the logits and a softmax over these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, Place
from .routing import Router, TopKOfLogits


def added(block: Any) -> Mapping[str, float]:
    """The factor on what a block adds to the stream."""
    return dict.fromkeys(("attn_out", "mlp_out", "beside"), block.residual_multiplier)


_ROUTER = Router("block_sparse_moe.router", "block_sparse_moe.experts", TopKOfLogits())
SHARED: dict[str, Any] = {
    "varied": lambda block: {"blocks.mlp": "shared_mlp" if getattr(block, "shared_mlp", None) else "block_sparse_moe"},
    "places": {
        "resid_mid": Place("post_attention_layernorm", "in"),
        "mlp_in": Place("post_attention_layernorm", "out"),
    },
    "beside": {"mlp_out": "block_sparse_moe"},
    "added": added,
    "router": _ROUTER,
}
"""An MLP that every token passes, beside the experts."""
SHARED_MLP = {"blocks.mlp.out": "shared_mlp.output_linear|"}

FAMILY = Family("granite", added=added)
SWA = Family("granite_swa", added=added)
VISION = Family("granite4_vision", added=added)
MOE = Family("granitemoe", added=added, router=_ROUTER)
MOE_SHARED = Family("granitemoeshared", paths=SHARED_MLP, **SHARED)
MOE_SWA = Family("granitemoe_swa", paths=SHARED_MLP, **SHARED)
DOCLING = Family("granite_docling", added=added)
HYPERCLOVAX = Family(
    "hyperclovax",
    paths={"blocks.ln1_post": "post_norm1", "blocks.ln2_post": "post_norm2"},
    added=added,
)
