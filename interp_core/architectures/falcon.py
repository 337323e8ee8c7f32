"""Falcon: blocks are parallel unless the config says no. Parallel ones add attention's output to the MLP's in place.

One projection has, for each key-value head, its queries, its key and its value, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .bloom import NO_ROTARY
from .family import Arrangement, Family, Heads, fused_per_head_or_shared


def parallel(config: Any) -> bool:
    """Whether attention and MLP read the same stream."""
    return bool(config.new_decoder_architecture or config.parallel_attn)


def arranged(heads: Heads) -> Arrangement | None:
    """All queries, then all keys, then all values; where several key-value heads have several queries each."""
    kv, n, d = heads.n_kv_heads, heads.n_heads // heads.n_kv_heads, heads.d_head
    if 1 in (kv, n):
        return None

    def into(x: Tensor) -> Tensor:
        queries, keys, values = x.unflatten(-1, (kv, n + 2, d)).split([n, 1, 1], -2)
        return torch.cat([queries.flatten(-3), keys.flatten(-3), values.flatten(-3)], -1)

    def back(x: Tensor) -> Tensor:
        queries, rest = x.split([kv * n * d, 2 * kv * d], -1)
        keys, values = rest.unflatten(-1, (2, kv, 1, d)).unbind(-4)
        return torch.cat([queries.unflatten(-1, (kv, n, d)), keys, values], -2).flatten(-3)

    return Arrangement(into, back)


def refused(config: Any) -> Mapping[str, str]:
    """Where positions are a bias, nothing rotates."""
    return NO_ROTARY if config.alibi else {}


FAMILY = Family(
    "falcon",
    paths={"blocks.ln2": "post_attention_layernorm"},
    parallel=parallel,
    fused=fused_per_head_or_shared,
    arranged=arranged,
    refuse_if=refused,
)
