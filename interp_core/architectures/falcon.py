"""Falcon: blocks are parallel unless the config says no. Parallel ones add attention's output to the MLP's in place.

One projection has, for each key-value head, its queries, its key and its value, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .bloom import NO_ROTARY
from .family import Family, Heads, View, split_heads


def parallel(config: Any) -> bool:
    """Whether attention and MLP read the same stream."""
    return bool(config.new_decoder_architecture or config.parallel_attn)


def fused_groups(heads: Heads, part: str) -> View:
    """The queries of a key-value head, then its key, then its value."""
    n = heads.n_heads // heads.n_kv_heads
    if heads.n_kv_heads == 1:
        split, at = split_heads(n + 2, heads.d_head), {"q": slice(n), "k": slice(n, n + 1), "v": slice(n + 1, n + 2)}
        return lambda x: split(x)[:, :, at[part]]
    split, start = split_heads(heads.n_kv_heads, (n + 2) * heads.d_head), n + "qkv".index(part) - 1
    return lambda x: split(x)[..., start * heads.d_head : (start + 1) * heads.d_head]


def refused(config: Any) -> Mapping[str, str]:
    """Queries of several groups cannot be seen as heads without a copy; where positions are a bias, nothing rotates."""
    no_rotary = NO_ROTARY if config.alibi else {}
    if config.new_decoder_architecture and 1 < config.num_kv_heads < config.num_attention_heads:
        return no_rotary | {"q": "queries of a key-value head lie between keys and values, so heads are no view of the projection"}
    return no_rotary


FAMILY = Family(
    "falcon",
    paths={"blocks.ln2": "post_attention_layernorm"},
    parallel=parallel,
    fused=fused_groups,
    refuse_if=refused,
)
