"""What a model family file says: only what module paths do not.

Module paths come from TransformerLens' adapters (`paths.json`). A family file adds how a fused projection splits,
where a router sits and how it selects, which blocks are parallel, and what the family cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

View = Callable[[Tensor], Tensor]
"""A strided view of a module's tensor in the axes of a site: writing to the view writes to the tensor."""


@dataclass(frozen=True)
class Heads:
    """Head counts of one attention layer."""

    n_heads: int
    n_kv_heads: int
    d_head: int


Fused = Callable[[Heads, str], View]
"""How a fused query-key-value projection splits: heads and one of "q", "k", "v" to a view `[batch pos head d_head]`."""


def split_heads(n_heads: int, d_head: int) -> View:
    """`[batch pos (head d_head)]` as `[batch pos head d_head]`."""
    return lambda x: x.view(x.shape[0], x.shape[1], n_heads, d_head)


def fused_blocks(heads: Heads, part: str) -> View:
    """All queries, then all keys, then all values (GPT-2, Phi-3)."""
    q, kv = heads.n_heads * heads.d_head, heads.n_kv_heads * heads.d_head
    start = {"q": 0, "k": q, "v": q + kv}[part]
    n = heads.n_heads if part == "q" else heads.n_kv_heads
    split = split_heads(n, heads.d_head)
    return lambda x: split(x[..., start : start + n * heads.d_head])


def fused_per_head(heads: Heads, part: str) -> View:
    """Query, key and value of each head side by side (GPT-NeoX)."""
    d = heads.d_head
    start = {"q": 0, "k": d, "v": 2 * d}[part]
    split = split_heads(heads.n_heads, 3 * d)
    return lambda x: split(x)[..., start : start + d]


@dataclass(frozen=True)
class Router:
    """A mixture-of-experts router whose module returns `(logits, weights, indices)`, flattened over batch and pos.

    Attributes:
        module: its path in the block.
        experts: path of the module that is called with `(hidden, indices, weights)`.
        select: `(router module, logits [n expert])` to `(weights [n k], indices [n k])`, as the family selects.
    """

    module: str
    experts: str
    select: Callable[[Any, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """What the atlas must know of a family beyond module paths.

    Attributes:
        name: for tables and messages.
        paths: canonical component to module path, over TransformerLens' table (`blocks.mlp.out`, …).
        fused: how `blocks.attn.qkv` splits.
        parallel: whether attention and MLP read the same residual, given the config.
        router: where blocks have one.
        pattern: module in the block whose output is the attention pattern, for families that do not go through
            transformers' attention interface.
        refuse: sites that the family cannot give, with the reason.
        carried: attributes in which a forward pass leaves state for the next one; runs start without and restore it.
    """

    name: str
    paths: Mapping[str, str] = field(default_factory=dict)
    fused: Fused | None = None
    parallel: Callable[[Any], bool] | None = None
    router: Router | None = None
    pattern: str | None = None
    refuse: Mapping[str, str] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
