"""The attention tap: attention done in the open, for the layers that a plan looks into.

transformers lets anyone register an attention function. Ours computes the same attention step by step, so that
rotated queries and keys, scores and probabilities can be read and edited, right for grouped queries, fused
projections, soft caps, sinks and sliding windows, because the family's own module has done all that before it calls.

Only the layers of a plan take it, and only while it runs: such a layer is lent a copy of its config that names our
function. All other layers keep their config, and so their kernel.

    scores  = cap(scaling * rot_q @ rot_k) + mask        [batch head query key]
    pattern = softmax(scores, with the sink if the family has one)
    output  = pattern @ v                                [batch query head d_head]

Memory: one `[batch head query key]` tensor for scores and one for the pattern, per tapped layer, while it runs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..errors import CapabilityError

NAME = "interp_core"
OPEN = ("eager", "sdpa")
"""Attention implementations whose masks the tap understands."""
Stage = Callable[[Tensor, int], Tensor]
"""What a plan does with one tensor inside attention: takes the tensor and the number of keys, gives its new value."""


class LayerTap:
    """What a plan does inside one layer's attention.

    Attributes:
        prefix: keys and values `[1 head key d_head]` of earlier positions, which every row of the batch shares.
        kept: with `keep`, the keys and values of the last call, and the layer's sliding window.
        stages: by part (`rot_q`, `rot_k`, `v`, `scores`, `pattern`), what is done there.
        lent: the config that names our function, shared by all layers of a plan.
    """

    __slots__ = ("keep", "kept", "lent", "module", "original", "prefix", "softmax_dtype", "stages")

    def __init__(self, module: Any, stages: dict[str, Stage], lent: dict[int, Any], *, keep: bool = False) -> None:
        self.module, self.stages, self.keep = module, stages, keep
        self.prefix: tuple[Tensor, Tensor] | None = None
        self.kept: tuple[Tensor, Tensor, int | None] | None = None
        self.original = module.config
        implementation = self.original._attn_implementation
        if implementation not in OPEN:
            raise CapabilityError(
                f"attention sites need attn_implementation 'eager' or 'sdpa', the model runs {implementation!r}; "
                "load it with ic.load(..., attn_implementation='sdpa')"
            )
        self.softmax_dtype = torch.float32 if implementation == "eager" and _eager_in_float32(module) else None
        if id(self.original) not in lent:
            lent[id(self.original)] = copy.copy(self.original)
            lent[id(self.original)].__dict__["_attn_implementation_internal"] = NAME
        self.lent = lent[id(self.original)]

    def install(self) -> None:
        """Lend the layer the config, and hang this on the layer."""
        self.module.__dict__.update(config=self.lent, interp_tap=self)

    def remove(self) -> None:
        """Give the layer its own config back."""
        self.module.__dict__["config"] = self.original
        self.module.__dict__.pop("interp_tap", None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention `[batch head query d_head]` by steps, with the layer's tap called on the way."""
    tap: LayerTap = module.__dict__["interp_tap"]
    stages, n_keys = tap.stages, key.shape[2]
    if "rot_q" in stages:
        query = stages["rot_q"](query, n_keys)
    if "rot_k" in stages:
        key = stages["rot_k"](key, n_keys)
    if "v" in stages:
        value = stages["v"](value, n_keys)
    if tap.keep:
        tap.kept = key, value, kwargs.get("sliding_window")
        if not stages and tap.original._attn_implementation == "sdpa":
            kernel = AttentionInterface()["sdpa"]  # nothing to do inside: the layer's own
            return kernel(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    narrowed = tap.softmax_dtype is not None and query.dtype == torch.float64  # rounds, so only the same order agrees
    if tap.prefix is not None and not (dropout or narrowed or _OPENED & {*stages, *kwargs}):
        return _merged(query, key, value, attention_mask, scale, kwargs, module).transpose(1, 2).contiguous(), None
    scores = _products(query, key) * scale
    if tap.prefix is None:
        scores = _masked(_shaped(scores, kwargs), attention_mask, kwargs, module)
    else:
        n_keys += tap.prefix[0].shape[2]
        own = _masked(_shaped(scores, kwargs), attention_mask, kwargs, module)
        before = _shaped(_products(query * scale, tap.prefix[0]), kwargs)
        scores = torch.cat([_windowed(before, kwargs.get("sliding_window")), own], -1)
    if "scores" in stages:
        scores = stages["scores"](scores, n_keys)
    pattern = softmax(scores, kwargs.get("s_aux"), tap.softmax_dtype)
    if "pattern" in stages:
        pattern = stages["pattern"](pattern, n_keys)
    if dropout:
        pattern = nn.functional.dropout(pattern, dropout, module.training)
    if tap.prefix is None:
        out = _mixed(pattern, value)
    else:
        split = n_keys - key.shape[2]
        out = _mixed(pattern[..., :split], tap.prefix[1]) + _mixed(pattern[..., split:], value)
    return out.transpose(1, 2).contiguous(), pattern


_OPENED = {"scores", "pattern", "position_bias"}
"""What needs scores of earlier and own keys in one tensor."""


def _merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    kwargs: dict[str, Any],
    module: nn.Module,
) -> Tensor:
    """Attention over earlier keys that all rows share and a row's own ones, without a tensor of both:

        top    = max(before, own)           weights = exp(before - top)           mine = exp(own - top)
        output = (weights @ earlier values + mine @ values) / (sum of weights + sum of mine)

    The large one, `[kv_head key (batch group query)]`, is written over in place; keys come before rows in it, which
    makes its products and its maximum twice as fast for narrow heads.
    """
    tap: LayerTap = module.__dict__["interp_tap"]
    assert tap.prefix is not None
    (batch, heads, n, _), kv = query.shape, key.shape[1]
    (earlier,), (values,) = tap.prefix

    def joined(x: Tensor) -> Tensor:
        """`[batch head query x]` as `[kv_head x (batch group query)]`."""
        return x.reshape(batch, kv, -1, x.shape[-1]).transpose(0, 1).reshape(kv, -1, x.shape[-1]).mT

    def parted(x: Tensor) -> Tensor:
        return x.mT.reshape(kv, batch, -1, x.shape[1]).transpose(0, 1).reshape(batch, heads, n, x.shape[1])

    own = _masked(_shaped(_products(query, key) * scale, kwargs), mask, kwargs, module)
    before = _shaped(torch.matmul(earlier, joined(query) * scale), kwargs)
    if (window := kwargs.get("sliding_window")) is not None:
        before = _windowed(before.unflatten(-1, (-1, n)).movedim(1, -1), window).movedim(-1, 1).flatten(-2)
    if (wide := tap.softmax_dtype or (torch.float32 if own.dtype in _HALF else None)) is not None:
        own, before = own.to(wide), before.to(wide)
    top = torch.maximum(before.amax(1, keepdim=True), joined(own.amax(-1, keepdim=True)))
    if (sinks := kwargs.get("s_aux")) is not None:
        sinks = sinks.reshape(1, -1, 1, 1).to(own.dtype).expand(batch, -1, n, 1)
        top = torch.maximum(top, joined(sinks))
    weights = before.sub_(top).exp_()
    highest = parted(top)
    mine = (own - highest).exp_()
    total = parted(weights.sum(1, keepdim=True)) + mine.sum(-1, keepdim=True)
    if sinks is not None:
        total += (sinks - highest).exp_()
    kind = value.dtype
    out = parted(torch.matmul(values.mT, weights.to(kind))) + _mixed(mine.to(kind), value)
    return (out / total).to(kind)


def _shaped(scores: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Scores as the family shapes them before the mask: capped, or with a bias by position."""
    if "softcap" in kwargs and (cap := kwargs["softcap"]) is not None:
        scores = torch.tanh(scores / cap) * cap
    if "position_bias" in kwargs and (bias := kwargs["position_bias"]) is not None:
        scores = scores + bias
    return scores


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Queries `[batch head query d]` with keys `[batch or 1, kv_head, key, d]`: `[batch head query key]`. Keys that all
    rows share are not copied for each: their queries are strung together."""
    batch, heads, n, d = query.shape
    kv = key.shape[1]
    if key.shape[0] == batch:
        return torch.matmul(query, _repeated(key, heads // kv).mT)
    joined = query.reshape(batch, kv, -1, d).transpose(0, 1).reshape(kv, -1, d)
    found = torch.matmul(joined, key[0].mT)
    return found.reshape(kv, batch, -1, key.shape[2]).transpose(0, 1).reshape(batch, heads, n, -1)


def _mixed(pattern: Tensor, value: Tensor) -> Tensor:
    """Values `[batch or 1, kv_head, key, d]` mixed by patterns `[batch head query key]`: `[batch head query d]`."""
    batch, heads, n, keys = pattern.shape
    kv = value.shape[1]
    if value.shape[0] == batch:
        return torch.matmul(pattern, _repeated(value, heads // kv))
    joined = pattern.reshape(batch, kv, -1, keys).transpose(0, 1).reshape(kv, -1, keys)
    found = torch.matmul(joined, value[0])
    return found.reshape(kv, batch, -1, value.shape[-1]).transpose(0, 1).reshape(batch, heads, n, -1)


def _repeated(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _windowed(scores: Tensor, window: int | None) -> Tensor:
    """Scores of the keys right before the first query, without those that a sliding window has passed."""
    queries, keys = scores.shape[-2:]
    if window is None or queries + keys <= window:
        return scores
    distance = torch.arange(queries, device=scores.device)[:, None] + keys - torch.arange(keys, device=scores.device)
    return scores.masked_fill(distance >= window, _LOWEST[scores.dtype])


def _masked(scores: Tensor, mask: Tensor | None, kwargs: dict[str, Any], module: nn.Module) -> Tensor:
    """Scores with the layer's mask: additive, boolean, or implied (causal unless decoding)."""
    queries, keys = scores.shape[-2:]
    if mask is None:
        causal = kwargs.get("is_causal")
        if queries == 1 or not (getattr(module, "is_causal", True) if causal is None else causal):
            return scores
        return scores + _causal(queries, keys, scores.device, scores.dtype)
    if mask.dtype == torch.bool:
        mask = _additive(mask, scores.dtype)
    return scores + (mask if mask.shape[-1] == keys else mask[..., :keys])


@lru_cache(maxsize=4)
def _causal(queries: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What causal attention adds, the same for every layer of a pass."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return _additive(seen, dtype)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added, from one that is true where a query may look; kept with it, for the layers that share it.

    Half of the lowest number hides as well as the lowest, and a row that is hidden whole (padding) stays finite.
    """
    kept: dict[torch.dtype, Tensor] = seen.__dict__.setdefault("interp_additive", {})
    if dtype not in kept:
        kept[dtype] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, _LOWEST[dtype])
    return kept[dtype]


def softmax(scores: Tensor, sinks: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Probabilities; half precision is summed in float32, as the kernels do."""
    kind = scores.dtype
    wide = dtype or (torch.float32 if kind in _HALF else None)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(kind)
        scores = torch.cat([scores, column], -1)
    pattern = torch.softmax(scores, -1, dtype=wide)
    if sinks is not None:
        pattern = pattern[..., :-1]
    return pattern if wide is None else pattern.to(kind)


_HALF = (torch.float16, torch.bfloat16)
_LOWEST = {kind: torch.finfo(kind).min / 2 for kind in (*_HALF, torch.float32, torch.float64)}


def _eager_in_float32(module: nn.Module) -> bool:
    """Whether the family's eager attention takes its softmax in float32 even for wider types."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return eager is not None and "float32" in eager.__code__.co_names


AttentionInterface.register(NAME, attention)
