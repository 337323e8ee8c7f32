"""Attention that a module computes by itself, opened where it calls torch: for layers that go past transformers'
attention interface (Falcon, BLOOM, MPT, GPT-Neo, BigBird and others).

While a plan looks into such a layer, its `forward` runs under a `TorchFunctionMode`, which sees the operations that the
module's own code calls, in this order:

    product of two activations   query, keyᵀ      [rot_q], [rot_k]     the first one
    softmax over keys            scores           [scores]             what goes in: scaled, with bias and mask
                                 pattern          [pattern]            what comes out, before a dropout
    product behind it            pattern, value   [v]
    scaled_dot_product_attention query, key, …                         all of these at once: `attention.py`'s steps

Everything else passes untouched, and so does what other modules, hooks and functions of a plan compute meanwhile: an
operation counts only where a method of the module's own class calls it. So what the model computes is what it computed,
operation by operation, and only an edit puts another tensor in the place of an operand or a result.

Models have their heads as `[batch head query d_head]` or as `[(batch head) query d_head]`; sites have the former. Keys
that a model copies for each query head (Falcon-40B) are those of its key-value heads again.

That it is the attention that the model does is held by the self-check: that the logits stay, that rows of the pattern
sum to one and mix `v` to `z`, that `rot_q` and `rot_k` give the scores. A layer whose code differs is withdrawn there.

It costs a Python call for each operation of an opened layer, and nothing in others. The mode is a context around
`forward`, so it is gone however that ends; `forward` is put back with the other hooks of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..architectures.hook_points import first_argument, own_code
from .attention import AttentionHook, Stage, attention
from .attention_steps import demand_a_key
from .replace import FUNCTIONS

_KINDS = {function: kind for kind in ("matmul", "sdpa", "softmax") for function in FUNCTIONS[kind]}
_ADDED = "baddbmm"
"""The product whose first operand is what it is added to."""
_NOT_REPLACED = object()


class OwnAttention(AttentionHook):
    """What a plan does inside one layer's attention, of a module that computes it by itself.

    Attributes:
        code: of the methods of the module's class.
        batch: rows of the call that is going on.
        reads: name of the module's first argument.
        products, softmaxes: how many of each it has come by.
    """

    __slots__ = ("batch", "code", "former", "kv_heads", "products", "reads", "softmaxes")

    def __init__(self, module: nn.Module, stages: Mapping[str, Stage], kv_heads: int) -> None:
        self.module, self.keep, self.kv_heads = module, False, kv_heads
        self.stages = {part: self._once_each(stage) if part == "rot_k" else stage for part, stage in stages.items()}
        self.prefix = self.filled = self.queries = self.note = self.kept = self.softmax_dtype = None
        self.hides = False
        self.original = self.config_copy = getattr(module, "config", None)
        implementation = getattr(self.original, "_attn_implementation", None)
        self.code = {*own_code(type(module))}
        named = any("scaled_dot_product_attention" in code.co_names for code in self.code)
        self.kernel = _kernel if named and implementation == "sdpa" else None
        self.batch = self.products = self.softmaxes = 0
        self.former: Any = _NOT_REPLACED
        self.reads = first_argument(module)

    def install(self) -> None:
        """See `AttentionHook.install`."""
        own = self.module.__dict__
        forward, self.former = self.module.forward, own.get("forward")
        own["forward"] = partial(self._call, forward)

    def remove(self) -> None:
        """See `AttentionHook.remove`."""
        if self.former is not _NOT_REPLACED:
            self.module.__dict__.pop("forward", None)
            if self.former is not None:
                self.module.__dict__["forward"] = self.former
            self.former = _NOT_REPLACED

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.batch = len(args[0] if args else kwargs[self.reads])
        self.products = self.softmaxes = 0
        with _Watch(self):
            return forward(*args, **kwargs)

    def _once_each(self, stage: Stage) -> Stage:
        """The same for keys of which each query head may have a copy."""

        def shared(x: Tensor, n_keys: int) -> Tensor:
            copies = x.shape[1] // self.kv_heads
            if copies < 2 or copies * self.kv_heads != x.shape[1]:
                return stage(x, n_keys)
            own = x[:, ::copies]
            new = stage(own, n_keys)
            return x if new is own else new.repeat_interleave(copies, 1)

        return shared

    # What the module calls

    def matmul(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product of activations: of queries and keys, or of the pattern and values."""
        first = self.products == 0 and self.softmaxes == 0
        mixes = self.softmaxes > 0 and self.products == 1
        self.products += first or mixes
        shift = func.__name__ == _ADDED
        names = ("batch1", "batch2") if shift else ("input", "mat2" if func.__name__ in ("mm", "bmm") else "other")
        parts = {0: "rot_q", 1: "rot_k"} if first else {1: "v"} if mixes else {}
        if not parts.values() & self.stages.keys():
            return func(*args, **kwargs)
        positional, named = list(args), dict(kwargs)
        places: list[tuple[Any, Any]] = [
            (positional, which + shift) if len(args) > which + shift else (named, names[which]) for which in (0, 1)
        ]
        holder, at = places[1]
        n_keys = holder[at].shape[-1 if first else -2]
        n_keys = n_keys if self.filled is None else min(n_keys, self.filled)
        for which, part in parts.items():
            holder, at = places[which]
            if part in self.stages and holder[at].ndim in (3, 4):
                holder[at] = self._operand(part, holder[at], n_keys)
        return func(*positional, **named)

    def _operand(self, part: str, x: Tensor, n_keys: int) -> Tensor:
        """What the plan does with queries, keys (which lie transposed in their product) or values."""
        heads = self._heads(x)
        heads = heads.mT if part == "rot_k" else heads
        empty = part != "rot_q" and n_keys < heads.shape[2]  # places of a static cache
        passing = heads[:, :, :n_keys] if empty else heads
        new = self.stages[part](passing, n_keys)
        if new is passing:
            return x
        new = torch.cat([new, heads[:, :, n_keys:]], 2) if empty else new
        return (new.mT if part == "rot_k" else new).reshape(x.shape)

    def _heads(self, x: Tensor) -> Tensor:
        return x if x.ndim == 4 else x.reshape(self.batch, -1, *x.shape[1:])

    def softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The softmax over keys, of scores that the module has made."""
        x = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if x.ndim not in (3, 4) or dim not in (-1, x.ndim - 1):
            return func(*args, **kwargs)
        self.softmaxes += 1
        scores = self._heads(x)
        edited = self._stage("scores", scores)
        if edited is not scores:
            demand_a_key(scores, edited)
            x = edited.reshape(x.shape)
            args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})
        pattern = func(*args, **kwargs)
        heads = self._heads(pattern)
        edited = self._stage("pattern", heads)
        return pattern if edited is heads else edited.reshape(pattern.shape)

    def _stage(self, part: str, x: Tensor) -> Tensor:
        """What the plan does with scores or patterns `[batch head query key]`, of the queries that it asks for and the
        keys that there are."""
        if part not in self.stages:
            return x
        n_keys = x.shape[-1] if self.filled is None else min(self.filled, x.shape[-1])
        queries = None if self.queries is None else torch.tensor(self.queries, dtype=torch.long, device=x.device)
        part_of = x if n_keys == x.shape[-1] else x[..., :n_keys]
        passing = part_of if queries is None else part_of[:, :, queries]
        new = self.stages[part](passing, n_keys)
        if new is passing:
            return x
        if passing is x:
            return new
        into = x.clone()
        into[:, :, slice(None) if queries is None else queries, :n_keys] = new
        return into

    def sdpa(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All of attention in one call, by steps that the plan can look between."""
        self.softmaxes += 1
        said = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        query, key, v, mask = (said.pop(name, None) for name in ("query", "key", "value", "attn_mask"))
        dropout, scaling = said.pop("dropout_p", 0.0), said.pop("scale", None)
        out, _ = attention(self.module, query, key, v, mask, scaling, dropout, self, **said)
        return out.transpose(1, 2)


def _kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    **_more: Any,
) -> tuple[Tensor, None]:
    """The kernel of such modules, as one of transformers' attention functions."""
    out = nn.functional.scaled_dot_product_attention(
        query, key, v, mask, dropout, is_causal and mask is None, scale=scaling, enable_gqa=enable_gqa
    )
    return out.transpose(1, 2), None


class _Watch(TorchFunctionMode):
    """Sees the operations of a module's forward pass, and hands those of its own attention to the hook."""

    def __init__(self, hook: OwnAttention) -> None:
        super().__init__()
        self.hook = hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func)
        if kind is None or not _called_by(self.hook.code):
            return func(*args, **kwargs)
        return getattr(self.hook, kind)(func, args, kwargs)


def _called_by(code: set[CodeType]) -> bool:
    """Whether one of these functions calls the operation, and not a module or a hook that it comes by."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code in code
