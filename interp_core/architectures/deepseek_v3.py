"""DeepSeek-V3: latent attention (MLA), and experts in groups chosen with a correction bias; the first layers are dense.

Queries come out of one projection, per head a part without and a part with rotary embedding. Keys are put together
inside attention from two projections, and values come out of the latent that the cache holds, for all tokens anew at
every step; so `v` is read inside attention, where it is what the pattern mixes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .family import Family, Heads
from .routing import Router
from .scored import SIGMOID_IN_GROUPS


def latent_heads(attention: Any, heads: Heads) -> Heads:
    """Every head has its own keys and values, and keys are wider than values."""
    return replace(heads, n_kv_heads=heads.n_heads, d_key=attention.qk_head_dim)


FAMILY = Family(
    "deepseek_v3",
    paths={"blocks.attn.q": "q_b_proj|q_proj"},
    heads=latent_heads,
    inside=("v",),
    router=Router("mlp.gate", "mlp.experts", SIGMOID_IN_GROUPS),
    refuse={"k": "keys are put together inside latent attention, from two projections; rot_k has them"},
)
