"""Granite: what attention and MLP add to the stream is scaled by the config's `residual_multiplier`, in the block.

Granite-MoE's router takes the top-k of the logits and a softmax over these.
"""

from __future__ import annotations

from typing import Any

from .family import Family
from .routing import Router, top_k_softmax


def added(config: Any) -> float:
    """The factor on what a block adds to the stream."""
    return float(config.residual_multiplier)


FAMILY = Family("granite", added=added)
MOE = Family(
    "granitemoe", added=added, router=Router("block_sparse_moe.router", "block_sparse_moe.experts", top_k_softmax)
)
