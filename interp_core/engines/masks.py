"""Attention masks in the forms that layers are handed them: none (causal, or nothing hidden), true where a query may
look, or added to the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

LOWEST = {kind: torch.finfo(kind).min / 2 for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
"""What is added to the score of a hidden key: half of the lowest number hides as well as the lowest, and a row that is
hidden whole (padding) stays finite under the scores that it is added to."""


def at_queries(queries: Tensor, x: Tensor | None) -> Tensor | None:
    """Of a mask or a bias `[… query key]`, the rows of some queries; one for all queries `[… 1 key]` stays as it is."""
    return x if x is None or x.shape[-2] == 1 else x[..., queries, :]


def by_query(kwargs: Mapping[str, Any], queries: Tensor) -> dict[str, Tensor | None]:
    """What attention is called with that has rows by query (a bias, sinks), if it is: those of some queries."""
    return {name: at_queries(queries, kwargs[name]) for name in ("position_bias", "sinks") if name in kwargs}


def is_causal(kwargs: dict[str, Any], module: nn.Module) -> bool:
    """Whether a layer that is handed no mask hides later keys."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def masked(scores: Tensor, mask: Tensor | None, kwargs: dict[str, Any], module: nn.Module) -> Tensor:
    """Scores with the layer's mask: additive, boolean, or implied (causal unless decoding)."""
    queries, keys = scores.shape[-2:]
    if mask is None:
        if queries == 1 or not is_causal(kwargs, module):
            return scores
        return scores + no_later(queries, keys, scores.device, scores.dtype)
    if mask.dtype == torch.bool:
        mask = additive(mask, scores.dtype)
    return scores + (mask if mask.shape[-1] == keys else mask[..., :keys])


@lru_cache(maxsize=4)
def no_later(queries: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What causal attention adds `[query key]`; kept, since every layer of a pass asks for it.

    More keys than queries, and no mask: the rest are empty places of a cache that is filled for the first time, as
    kernels take it, which align to the first key.
    """
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    return additive(visible, dtype)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores, from one that is true where a query may look.

    It is kept on that mask itself: transformers makes one mask for all layers of a pass, and lets it go after it.
    """
    kept: dict[torch.dtype, Tensor] = visible.__dict__.setdefault("interp_additive", {})
    if dtype not in kept:
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        kept[dtype] = mask.masked_fill_(~visible, LOWEST[dtype])
    return kept[dtype]


def rows_of(mask: Tensor | None, queries: Tensor, keys: int, *, implied: bool, dtype: torch.dtype) -> Tensor:
    """The mask of some queries `[batch or 1, head or 1, asked, key]`, also where the layer is handed none.

    Args:
        implied: the layer that is handed none hides later keys.
        dtype: of the scores.
    """
    if mask is not None:
        rows = at_queries(queries, mask)
        assert rows is not None
        return rows.expand(-1, -1, len(queries), -1)
    visible = torch.ones(len(queries), keys, dtype=torch.bool, device=queries.device)
    if implied:
        visible = torch.arange(keys, device=queries.device) <= queries[:, None]
    return additive(visible, dtype)[None, None]


def hiding(mask: Tensor, hidden: Tensor, queries: Tensor | None = None) -> Tensor:
    """A mask with more keys hidden, in its own form: true where a query may look, or added to the scores.

    Args:
        mask: `[batch or 1, head or 1, query, key]`.
        hidden: `[batch head asked key]`, true where a key is hidden.
        asked: the queries of `hidden`, as rows of the mask; None for all.
    """
    if bool((hidden == hidden[:, :1]).all()):
        hidden = hidden[:, :1]
    at = slice(None) if queries is None else queries
    narrower = mask.expand(*torch.broadcast_shapes(mask.shape[:2], hidden.shape[:2]), -1, -1).clone()
    if narrower.dtype == torch.bool:
        narrower[:, :, at] &= ~hidden
    else:
        narrower[:, :, at] = narrower[:, :, at].masked_fill(hidden, LOWEST[narrower.dtype])
    return narrower
