"""The attention hook: attention done in the open, for the layers that a plan looks into.

transformers lets anyone register an attention function. Ours computes the same attention step by step, so that
rotated queries and keys, scores and probabilities can be read and edited, right for grouped queries, fused
projections, soft caps, sinks and sliding windows, because the family's own module has done all that before it calls.

Only the layers of a plan take it, and only while it runs: such a layer is lent a copy of its config that names our
function. All other layers keep their config, and so their kernel.

    scores  = cap(scaling * rot_q @ rot_k) + mask        [batch head query key]
    pattern = softmax(scores, with the sink if the family has one)
    output  = pattern @ v                                [batch query head d_head]

Memory: one `[batch head query key]` tensor for scores and one for the pattern, per tapped layer, while it runs. Where a
plan asks for few queries, the layer's own kernel does all of them, and only those few are done again in the open: they
take the place of the kernel's where something was changed.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..errors import CapabilityError, PlanError
from .knockout import NOTHING_LEFT
from .masks import LOWEST, at_queries, hiding, is_causal, masked, rows_of

NAME = "interp_core"
RULED = "interp_core_rule"
"""The attention function of layers that a rule has taken over for a while (`replace.py`)."""
OPEN = ("eager", "sdpa")
"""Attention implementations whose masks the attention hook understands."""
Stage = Callable[[Tensor, int], Tensor]
"""What a plan does with one tensor inside attention: takes the tensor and the number of keys, gives its new value."""


class RowTexts:
    """The texts whose rows go through a pass together.

    Attributes:
        starts: per text, how many columns lie before those of the pass.
        rows: the text of each row that takes part, in the order of the rows.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self.starts, self.rows = list(starts), list[int]()
        self._known: dict[Any, Any] = {}

    def join(self, rows: Sequence[int]) -> None:
        """More rows take part from here on."""
        self.rows += rows
        self._known.pop("order", None)

    def order(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The rows text by text, each text's filled up to the most that one has, and where each row stands there; None
        for one text."""
        if len(self.starts) == 1:
            return None
        if "order" not in self._known:
            members: list[list[int]] = [[] for _ in self.starts]
            places = []
            for row, text in enumerate(self.rows):
                places.append((text, len(members[text])))
                members[text].append(row)
            most = max(map(len, members))
            table = torch.tensor([row for own in members for row in (*own, *[0] * (most - len(own)))], device=device)
            self._known["order"] = table, torch.tensor([text * most + at for text, at in places], device=device)
        return self._known["order"]

    def hidden(self, n: int, window: int | None, device: torch.device) -> Tensor | None:
        """Which earlier keys a text's `n` queries do not see `[text key query]`: they lie behind the text's first own
        column, or a sliding window has passed them. None if they see all."""
        if (n, window) not in self._known:
            starts = torch.tensor(self.starts, device=device).view(-1, 1, 1)
            keys = torch.arange(max(self.starts), device=device).view(1, -1, 1)
            hidden = (keys >= starts).expand(-1, -1, n)
            if window is not None:
                hidden = hidden | (starts + torch.arange(n, device=device) - keys >= window)
            self._known[n, window] = hidden if bool(hidden.any()) else None
        return self._known[n, window]


_ONE = RowTexts([0])


class AttentionHook:
    """What a plan does inside one layer's attention.

    Attributes:
        prefix: keys and values `[text head key d_head]` of earlier positions, which all rows of a text share.
        texts: which row is of which text, and where their own columns begin.
        kept: with `keep`, the keys and values of the last call, and the layer's sliding window.
        stages: by part (`rot_q`, `rot_k`, `v`, `scores`, `pattern`), what is done there.
        filled: while generating, how many columns there are; a static cache hands over its empty places too.
        asked: the queries whose scores and patterns are asked for, as columns of this pass; None for all.
        kernel: the layer's own attention function, if it can be found.
        hides: all that the plan does with scores and patterns is to hide keys, which the layer's own kernel can be told
            by a mask.
        softmax_dtype: in which the family's eager attention takes its softmax even for wider types.
        lent: the config that names our function, shared by all layers of a plan.
        note: is handed what the layer's attention is called with: `(query, key, mask, the rest)`.
    """

    __slots__ = (
        "asked",
        "config_copies",
        "filled",
        "hides",
        "keep",
        "kept",
        "kernel",
        "module",
        "note",
        "original",
        "prefix",
        "softmax_dtype",
        "stages",
        "texts",
    )  # fmt: skip

    def __init__(
        self, module: Any, stages: dict[str, Stage], config_copies: dict[int, Any], *, keep: bool = False
    ) -> None:
        self.module, self.stages, self.keep = module, stages, keep
        self.prefix: tuple[Tensor, Tensor] | None = None
        self.texts = _ONE
        self.filled: int | None = None
        self.asked: Sequence[int] | None = None
        self.hides = False
        self.note: Callable[[Tensor, Tensor, Tensor | None, dict[str, Any]], None] | None = None
        self.kept: tuple[Tensor, Tensor, int | None] | None = None
        self.original = own_config(module)
        implementation = demand_open(module, "attention sites need")
        self.kernel = kernel_of(module)
        narrow = implementation == "eager" and self.kernel is not None and "float32" in self.kernel.__code__.co_names
        self.softmax_dtype = torch.float32 if narrow else None
        if id(self.original) not in config_copies:
            config_copies[id(self.original)] = with_attention(self.original, NAME)
        self.config_copies = config_copies[id(self.original)]

    def install(self) -> None:
        """Hang this on the layer, and lend it the config. A rule that has taken the layer's attention over keeps its
        own, and calls us as the kernel."""
        self.module.__dict__["interp_hook"] = self
        if "interp_rule" not in self.module.__dict__:
            self.module.__dict__["config"] = self.config_copies

    @property
    def has_kernel(self) -> bool:
        """Whether the layer's own kernel can do what is not asked for."""
        return self.kernel is not None and self.prefix is None and not self.keep

    def look(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, called: dict[str, Any]) -> None:
        """Keep, and hand on, what attention is called with."""
        if self.keep:
            self.kept = key, value, called.get("sliding_window")
        if self.note is not None:
            self.note(query, key, mask, called)

    def remove(self) -> None:
        """Give the layer its own config back."""
        self.module.__dict__.pop("interp_hook", None)
        if "interp_rule" not in self.module.__dict__:
            self.module.__dict__["config"] = self.original


def own_config(module: Any) -> Any:
    """A layer's config as it is between runs."""
    return module.__dict__["interp_rule"][0] if "interp_rule" in module.__dict__ else module.config


def demand_open(module: Any, what: str) -> str:
    """A layer's attention implementation, if the attention hook understands its masks.

    Raises:
        CapabilityError: it does not.
    """
    implementation = str(own_config(module)._attn_implementation)
    if implementation not in OPEN:
        raise CapabilityError(
            f"{what} attn_implementation 'eager' or 'sdpa', the model runs {implementation!r}; "
            "load it with ic.load(..., attn_implementation='sdpa')"
        )
    return implementation


def with_attention(config: Any, name: str) -> Any:
    """A copy of a config that names another attention function."""
    other = copy.copy(config)
    other.__dict__["_attn_implementation_internal"] = name
    return other


def kernel_of(module: Any) -> Any:
    """A layer's own attention function; None if it cannot be found."""
    implementation = own_config(module)._attn_implementation
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return eager if implementation == "eager" else AttentionInterface()[implementation]


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
    """Attention `[batch head query d_head]` by steps, with the layer's hook called on the way."""
    hook: AttentionHook = module.__dict__["interp_hook"]
    stages, filled = hook.stages, hook.filled
    if filled is not None and key.shape[2] > filled:
        key, value = key[:, :, :filled], value[:, :, :filled]
    n_keys = key.shape[2]
    if "rot_q" in stages:
        query = stages["rot_q"](query, n_keys)
    if "rot_k" in stages:
        key = stages["rot_k"](key, n_keys)
    if "v" in stages:
        value = stages["v"](value, n_keys)
    if hook.keep or hook.note is not None:
        hook.look(query, key, value, attention_mask, {"scaling": scaling, **kwargs})
    if hook.kernel is not None and hook.prefix is None and not {"scores", "pattern"} & stages.keys():
        # Nothing looks inside, so the layer's own kernel goes on with what was read or edited.
        mask = None if attention_mask is None else attention_mask[..., :n_keys]
        return hook.kernel(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = scale_of(query, scaling)
    called = {"scaling": scale, "dropout": dropout, **kwargs}
    if hook.hides and hook.has_kernel:
        return _hidden(hook, (query, key, value), attention_mask, called), None
    few: _Few | None = None
    if hook.asked is not None and filled in (None, n_keys):
        few = _few(hook.asked, module, (query, key, value), attention_mask, called)
        query, attention_mask, kwargs = few.query, few.mask, few.kwargs
    narrowed = hook.softmax_dtype is not None and query.dtype == torch.float64  # rounds, so only the same order agrees
    if hook.prefix is not None and not (dropout or narrowed or _OPENED & {*stages, *kwargs}):
        return _merged(query, key, value, attention_mask, scale, kwargs, module).transpose(1, 2).contiguous(), None
    scores = masked(shaped(_products(query, key) * scale, kwargs), attention_mask, kwargs, module)
    if hook.prefix is not None:
        scores, values = _with_earlier(hook, query * scale, scores, kwargs)
        n_keys = scores.shape[-1]
    unedited = scores
    if "scores" in stages:
        scores = stages["scores"](unedited, n_keys)
        _demand_a_key(unedited, scores)
    pattern = computed = softmax(scores, kwargs.get("s_aux"), hook.softmax_dtype)
    if "pattern" in stages:
        pattern = stages["pattern"](computed, n_keys)
    if few is not None and scores is unedited and pattern is computed and not pattern.requires_grad:
        return few.closed, None
    if dropout:
        pattern = nn.functional.dropout(pattern, dropout, module.training)
    split = 0 if hook.prefix is None else n_keys - key.shape[2]
    out = _mixed(pattern[..., split:], value)
    if split:
        out = _mixed(pattern[..., :split], values) + out
    out = out.transpose(1, 2).contiguous()
    return (out, pattern) if few is None else (few.closed.index_copy(1, few.asked, out), None)


def _hidden(
    hook: AttentionHook, called: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """What the layer's own kernel gives when a mask tells it what the plan's knockouts hide: all queries at once, or
    the few that they act on after all others. These queries' rows of the pattern are made beside it, for the receipt:
    how much probability was taken away."""
    query, key, value = called
    n, n_keys = query.shape[2], key.shape[2]
    mask = None if mask is None else mask[..., :n_keys]  # without the empty places of a static cache

    def kernel(query: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
        assert hook.kernel is not None
        return hook.kernel(hook.module, query, key, value, mask, **{**kwargs, **more})[0]

    if hook.asked is not None and not hook.asked:
        return kernel(query, mask)
    queries = (
        torch.arange(n, device=query.device) if hook.asked is None else torch.tensor(hook.asked, device=query.device)
    )
    few, bias = 2 * len(queries) <= n, at_queries(queries, kwargs.get("position_bias"))
    told = queries if few or len(queries) == n else torch.arange(n, device=query.device)  # whom the mask is for
    at = None if len(told) == len(queries) else queries
    with torch.no_grad():
        rows = rows_of(mask, told, n_keys, implied=n > 1 and is_causal(kwargs, hook.module), dtype=query.dtype)
        unedited = shaped(_products(query[:, :, queries], key) * kwargs["scaling"], {**kwargs, "position_bias": bias})
        unedited = masked(unedited, rows if at is None else rows[:, :, at], kwargs, hook.module)
        scores = hook.stages["scores"](unedited, n_keys)
        _demand_a_key(unedited, scores)
        rows = hiding(rows, scores != unedited, at)
    if few:
        return kernel(query, mask).index_copy(1, queries, kernel(query[:, :, queries], rows, position_bias=bias))
    return kernel(query, rows)


class _Few(NamedTuple):
    """Attention of which few queries are opened.

    Attributes:
        closed: what the layer's own kernel makes of all queries `[batch query head d_head]`.
        asked: the few, as columns of the pass.
        query, mask, kwargs: what attention was called with, for these alone.
    """

    closed: Tensor
    asked: Tensor
    query: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]


def _few(
    columns: Sequence[int],
    module: nn.Module,
    called: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> _Few:
    """Call the layer's own kernel, and leave the queries at these columns to be opened."""
    query, key, _ = called
    mask = mask if mask is None else mask[..., : key.shape[2]]  # without the empty places of a static cache
    closed = module.__dict__["interp_hook"].kernel(module, *called, mask, **kwargs)[0]
    queries = torch.tensor(columns, device=query.device)
    if mask is not None or (query.shape[2] > 1 and is_causal(kwargs, module)):
        own = (
            torch.arange(key.shape[2], device=queries.device) <= queries[:, None]
            if mask is None
            else at_queries(queries, mask)
        )
    else:
        own = None
    return _Few(
        closed,
        queries,
        query[:, :, queries],
        own,
        {**kwargs, "position_bias": at_queries(queries, kwargs.get("position_bias"))},
    )


def _with_earlier(hook: AttentionHook, query: Tensor, scores: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Scores of earlier keys and own ones, and the earlier values; the query is scaled."""
    assert hook.prefix is not None
    earlier, values = (x if len(x) == 1 else x[hook.texts.rows] for x in hook.prefix)
    before = shaped(_products(query, earlier), kwargs)
    hidden = hook.texts.hidden(query.shape[2], kwargs.get("sliding_window"), query.device)
    if hidden is not None:
        before = before.masked_fill(hidden[hook.texts.rows].mT[:, None], LOWEST[before.dtype])
    return torch.cat([before, scores], -1), values


_BITS = math.log2(math.e)
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
    """Attention over earlier keys that a text's rows share and a row's own ones, without a tensor of both:

        top    = max(before, own)           weights = 2 ** (before - top)         mine = 2 ** (own - top)
        output = (weights @ earlier values + mine @ values) / (sum of weights + sum of mine)

    Scores are in bits here, times log2 e: powers of two take a third of the time of exponentials. The large one,
    `[(text kv_head) key (row group query)]`, is written over in place; keys come before rows in it, which makes its
    products and its maximum twice as fast for narrow heads.
    """
    hook: AttentionHook = module.__dict__["interp_hook"]
    assert hook.prefix is not None
    (_, heads, n, _), kv, texts = query.shape, key.shape[1], len(hook.texts.starts)
    order = hook.texts.order(query.device)
    earlier, values = (x.flatten(0, 1) for x in hook.prefix)

    def joined(x: Tensor) -> Tensor:
        """`[row head query x]` as `[(text kv_head) x (row group query)]`."""
        x = x if order is None else x[order[0]]
        return x.reshape(texts, -1, kv, heads // kv * n, x.shape[-1]).transpose(1, 2).flatten(2, 3).flatten(0, 1).mT

    def parted(x: Tensor) -> Tensor:
        x = x.mT.reshape(texts, kv, -1, heads // kv * n, x.shape[1]).transpose(1, 2).reshape(-1, heads, n, x.shape[1])
        return x if order is None else x[order[1]]

    own = masked(shaped(_products(query, key) * scale, kwargs), mask, kwargs, module)
    before = shaped(torch.matmul(earlier, joined(query * scale)), kwargs)
    if (hidden := hook.texts.hidden(n, kwargs.get("sliding_window"), before.device)) is not None:
        each = before.view(texts, kv, before.shape[1], -1, n)
        before = each.masked_fill_(hidden[:, None, :, None], LOWEST[before.dtype]).view(before.shape)
    if (wide := hook.softmax_dtype or (torch.float32 if own.dtype in _HALF else None)) is not None:
        own, before = own.to(wide), before.to(wide)
    own, before = own * _BITS, before.mul_(_BITS)
    highest = own.amax(-1, keepdim=True)
    if (sinks := kwargs.get("s_aux")) is not None:
        sinks = sinks.reshape(1, -1, 1, 1).to(own.dtype) * _BITS
        highest = torch.maximum(highest, sinks)
    top = torch.maximum(before.amax(1, keepdim=True), joined(highest))
    weights = before.sub_(top).exp2_()
    kind = value.dtype
    summary = torch.cat([torch.matmul(values.mT, weights.to(kind)), weights.sum(1, keepdim=True), top], 1)
    out, total, top = parted(summary).split([value.shape[-1], 1, 1], -1)
    mine = (own - top).exp2_()
    total = total + mine.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp2_()
    return ((out + _mixed(mine.to(kind), value)) / total).to(kind)


def scale_of(query: Tensor, scaling: float | None) -> float:
    """What products of queries and keys are multiplied by."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def shaped(scores: Tensor, kwargs: dict[str, Any]) -> Tensor:
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
    products = torch.matmul(joined, key[0].mT)
    return products.reshape(kv, batch, -1, key.shape[2]).transpose(0, 1).reshape(batch, heads, n, -1)


def _mixed(pattern: Tensor, value: Tensor) -> Tensor:
    """Values `[batch or 1, kv_head, key, d]` mixed by patterns `[batch head query key]`: `[batch head query d]`."""
    batch, heads, n, keys = pattern.shape
    kv = value.shape[1]
    if value.shape[0] == batch:
        value = _repeated(value, heads // kv)
        return pattern * value if keys == 1 else torch.matmul(pattern, value)
    joined = pattern.reshape(batch, kv, -1, keys).transpose(0, 1).reshape(kv, -1, keys)
    mixed = torch.matmul(joined, value[0])
    return mixed.reshape(kv, batch, -1, value.shape[-1]).transpose(0, 1).reshape(batch, heads, n, -1)


def _repeated(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _demand_a_key(before: Tensor, scores: Tensor) -> None:
    """Refuse edits of scores that hide every key of a query which saw some.

    Raises:
        PlanError: there is such a query.
    """
    lowest = LOWEST[scores.dtype]
    if scores is not before and bool(((scores.amax(-1) <= lowest) & (before.amax(-1) > lowest)).any()):
        raise PlanError(NOTHING_LEFT)


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


AttentionInterface.register(NAME, attention)
