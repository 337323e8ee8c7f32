"""The steps of attention in the open: products, their shaping, softmax, mixing.

Shapes are those that transformers hands an attention function: queries `[batch head query d_head]`, keys and values
`[batch kv_head key d_head]`. Where heads outnumber kv_heads, each run of `heads / kv_heads` neighbours shares one
(grouped-query attention, Ainslie et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from .knockout import NOTHING_LEFT
from .masks import LOWEST

HALF = (torch.float16, torch.bfloat16)
"""Types whose softmax kernels sum in float32, so that steps in the open do as well."""


def scale_of(query: Tensor, scaling: float | None) -> float:
    """The factor of products of queries and keys: the family's, or one over the root of d_head."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def products(query: Tensor, key: Tensor) -> Tensor:
    """Queries `[batch head query d]` with keys `[batch or 1, kv_head, key, d]`: `[batch head query key]`.

    Keys that all rows share are not copied for each row: the rows' queries are strung together into one product.
    """
    batch, heads, n, d = query.shape
    kv = key.shape[1]
    if key.shape[0] == batch:
        return torch.matmul(query, _repeated(key, heads // kv).mT)
    joined = query.reshape(batch, kv, -1, d).transpose(0, 1).reshape(kv, -1, d)
    scores = torch.matmul(joined, key[0].mT)
    return scores.reshape(kv, batch, -1, key.shape[2]).transpose(0, 1).reshape(batch, heads, n, -1)


def shaped(scores: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Scores as families shape them before the mask: capped (Gemma 2), or with a bias by position (T5, ALiBi)."""
    if "softcap" in kwargs and (cap := kwargs["softcap"]) is not None:
        scores = torch.tanh(scores / cap) * cap
    if "position_bias" in kwargs and (bias := kwargs["position_bias"]) is not None:
        scores = scores + bias
    return scores


def sinks_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Scores that take their part of the sum and stand for no key, `[… head query 1]`, of what attention is called
    with: one per head (gpt-oss), or one per head and query (Inkling 2)."""
    sinks: Tensor | None = kwargs.get("s_aux")
    return kwargs.get("sinks") if sinks is None else sinks.reshape(1, -1, 1, 1)


def sinks_in(modules: Mapping[str, nn.Module], path: str) -> Tensor | None:
    """The same, while scores are edited: of what attention at a path is called with, or where a module inside it shows
    scores (TransformerLens), of its parameters."""
    if (hook := modules[path].__dict__.get("interp_hook")) is not None:
        called: Tensor | None = hook.sinks
        return called
    sinks = getattr(modules.get(path.rpartition(".")[0]), "sinks", None)
    return None if sinks is None else sinks.reshape(1, -1, 1, 1)


def softmax(scores: Tensor, sinks: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Probabilities over keys, in the type of the scores.

    Args:
        sinks: see `sinks_of`.
        dtype: in which the sum is taken; None for the scores' own, or float32 where that is half precision.
    """
    kind = scores.dtype
    wide = dtype or (torch.float32 if kind in HALF else None)
    if sinks is not None:
        column = sinks.expand(scores.shape[0], -1, scores.shape[2], 1).to(kind)
        scores = torch.cat([scores, column], -1)
    pattern = torch.softmax(scores, -1, dtype=wide)
    if sinks is not None:
        pattern = pattern[..., :-1]
    return pattern if wide is None else pattern.to(kind)


def mixed(pattern: Tensor, value: Tensor) -> Tensor:
    """Values `[batch or 1, kv_head, key, d]` mixed by patterns `[batch head query key]`: `[batch head query d]`."""
    batch, heads, n, keys = pattern.shape
    kv = value.shape[1]
    if value.shape[0] == batch:
        value = _repeated(value, heads // kv)
        return pattern * value if keys == 1 else torch.matmul(pattern, value)
    joined = pattern.reshape(batch, kv, -1, keys).transpose(0, 1).reshape(kv, -1, keys)
    mixture = torch.matmul(joined, value[0])
    return mixture.reshape(kv, batch, -1, value.shape[-1]).transpose(0, 1).reshape(batch, heads, n, -1)


def _repeated(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def demand_a_key(before: Tensor, scores: Tensor) -> None:
    """Refuse edits of scores that hide every key of a query which saw some.

    Raises:
        PlanError: there is such a query.
    """
    lowest = LOWEST[scores.dtype]
    if scores is not before and bool(((scores.amax(-1) <= lowest) & (before.amax(-1) > lowest)).any()):
        raise PlanError(NOTHING_LEFT)
