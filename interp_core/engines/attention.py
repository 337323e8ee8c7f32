"""The attention hook: attention done in the open, for the layers that a plan looks into.

transformers lets anyone register an attention function, and a layer's config names the one that it calls. Ours makes
the same attention step by step, so that what lies between can be read and edited. The family's own module has done the
projections and rotations by then, so this is right for every family whose attention is called this way:

    query            key             value           as the layer's module hands them over
      │               │                │
    [rot_q]         [rot_k]           [v]            stages: what the plan does there, if it does anything
      └───────┬───────┘                │
    scores = shaped(scaling * query @ key) + mask    [batch head query key], capped or with a bias by position
              │                        │
          [scores]                     │             an edit here acts before the softmax: knockouts do
              │                        │
    pattern = softmax(scores, and a sink)            [batch head query key]
              │                        │
          [pattern]                    │             an edit here is taken as it is, whatever its rows sum to
              └───────────┬────────────┘
    z       = pattern @ value                        [batch query head d_head], back in the layer's module

Scores and patterns are what costs: `batch * heads * query * key` numbers each, per layer, and no fused kernel. So the
layer's own kernel does as much as it can, by the first of these that fits:

1. nothing is done with scores or patterns: the kernel goes on with the query, key and value that were read or edited;
2. all that is done is to hide keys (knockouts): the kernel is told so by its mask (`_hidden`);
3. few queries are asked for: the kernel does all, and those few again in the open (`_few`), which take the place of
   the kernel's only where something was changed: a read alone leaves the model's numbers as they are, to the bit;
4. all of it in the open.

Rows of a sweep that share keys are `attention_prefix.py`'s.

Only the layers of a plan are opened, and only while it runs: such a layer is lent a copy of its config that names our
function, by a name that compares as the layer's own: modules ask it which kernel they have, to make that kernel's mask
(DeepSeek-V3.2). All others keep their config, and so their kernel.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..errors import CapabilityError
from .attention_prefix import SharedPrefix, joined_scores, merged
from .attention_steps import demand_a_key, mixed, products, scale_of, shaped, sinks_of, softmax
from .masks import at_queries, by_query, hiding, is_causal, masked, rows_of

NAME = "interp_core"
RULED = "interp_core_rule"
"""The attention function of layers that a rule has taken over for a while (`replace.py`)."""
OPEN = ("eager", "sdpa")
"""Attention implementations whose masks the hook understands: none, true where a query may look, or added to the
scores. Flash attention is handed which columns are padding instead, flex attention a block mask."""
Stage = Callable[[Tensor, int], Tensor]
"""What a plan does with one tensor inside attention: takes the tensor and the number of keys, gives its new value."""
_IN_ONE = {"scores", "pattern", "position_bias"}
"""What needs scores of shared keys and a row's own in one tensor."""


class LentName(str):
    """The name of an attention function of ours, which is found under it, and compares as the layer's own name too."""

    own: str

    def __new__(cls, name: str, own: str) -> LentName:
        """A name that stands for another."""
        lent = super().__new__(cls, f"{name}:{own}")
        lent.own = own
        return lent

    # Each is one call of Python's per layer: modules ask for their kernel in every pass.
    def __eq__(self, other: object) -> bool:
        return self.own == other or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return self.own != other and str.__ne__(self, other)

    __hash__ = str.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return lent, (self.partition(":")[0], self.own)


OURS: dict[str, Callable[..., Any]] = {}
"""Attention functions of ours by name."""
_LENT: dict[tuple[str, str], LentName] = {}
"""The names under which they are registered: the very objects, which a lookup compares first."""


def lent(name: str, own: str) -> LentName:
    """The name of an attention function of ours, for a layer that has another of its own."""
    if (name, own) not in _LENT:
        _LENT[name, own] = LentName(name, own)
        AttentionInterface.register(_LENT[name, own], OURS[name])
    return _LENT[name, own]


class OnceOfSeveral:
    """A stage of a layer that calls attention several times with the same queries and keys: it is done the first time,
    and what it made is what goes on the other times."""

    __slots__ = ("calls", "kept", "left", "stage")

    def __init__(self, stage: Stage, calls: int) -> None:
        self.stage, self.calls, self.left = stage, calls, 0
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor, n_keys: int) -> Tensor:
        """See `Stage`."""
        if not self.left:
            new = self.stage(x, n_keys)
            self.left, self.kept = self.calls, None if new is x else new
        else:
            new = x if self.kept is None else self.kept
        self.left -= 1
        self.kept = self.kept if self.left else None
        return new

    def begin(self) -> None:
        """Forget a layer that did not come to its end."""
        self.left, self.kept = 0, None


class AttentionHook:
    """What a plan does inside one layer's attention.

    Attributes:
        prefix: in a sweep, keys and values of earlier columns, which all rows of a text share.
        kept: with `keep`, the keys and values of the last call, and the layer's sliding window.
        stages: by part (`rot_q`, `rot_k`, `v`, `scores`, `pattern`), what is done there.
        filled: while generating, how many columns there are; a static cache hands over its empty places too.
        several: stages of a layer that calls attention several times.
        queries: those whose scores and patterns are asked for, as columns of this pass; None for all. (All are opened
            where a sliding window has dropped keys: the plan's positions are then bound anew, see `ModuleHook.stage`.)
        kernel: the layer's own attention function, if it can be found.
        hides: all that the plan does with scores and patterns is to hide keys, which the layer's own kernel can be told
            by a mask.
        sinks: of the last call, see `sinks_of`, while scores are edited.
        softmax_dtype: in which the family's eager attention takes its softmax even for wider types.
        config_copy: the layer's config, but for the attention function that it names: ours. Layers of a plan that
            share a config share its copy.
        note: is handed what the layer's attention is called with: `(query, key, mask, the rest)`.
    """

    __slots__ = (
        "config_copy", "filled", "hides", "keep", "kept", "kernel", "module", "note", "original", "prefix", "queries",
        "several", "sinks", "softmax_dtype", "stages",
    )  # fmt: skip

    def __init__(
        self, module: Any, stages: dict[str, Stage], config_copies: dict[int, Any], *, keep: bool = False
    ) -> None:
        self.module, self.stages, self.keep = module, stages, keep
        self.several = [stage for stage in stages.values() if isinstance(stage, OnceOfSeveral)]
        self.prefix: SharedPrefix | None = None
        self.filled: int | None = None
        self.queries: Sequence[int] | None = None
        self.hides = False
        self.sinks: Tensor | None = None
        self.note: Callable[[Tensor, Tensor, Tensor | None, dict[str, Any]], None] | None = None
        self.kept: tuple[Tensor, Tensor, int | None] | None = None
        self.original = own_config(module)
        implementation = demand_open(module, "attention sites need")
        self.kernel = kernel_of(module)
        # Most families' eager attention has a line `softmax(scores, dim=-1, dtype=torch.float32)`, which rounds float64
        # scores, too; that line is the only place that says so.
        narrow = implementation == "eager" and self.kernel is not None and "float32" in self.kernel.__code__.co_names
        self.softmax_dtype = torch.float32 if narrow else None
        if id(self.original) not in config_copies:
            config_copies[id(self.original)] = with_attention(self.original, NAME)
        self.config_copy = config_copies[id(self.original)]

    def install(self) -> None:
        """Hang this on the layer, and lend it the config. A rule that has taken the layer's attention over keeps its
        own, and calls us as the kernel."""
        for stage in self.several:
            stage.begin()
        # Written past `nn.Module.__setattr__`, which is slow and would register what it knows as a submodule.
        self.module.__dict__["interp_hook"] = self
        if "interp_rule" not in self.module.__dict__:
            self.module.__dict__["config"] = self.config_copy

    @property
    def has_kernel(self) -> bool:
        """Whether the layer's own kernel can do what is not asked for."""
        return self.kernel is not None and self.prefix is None and not self.keep

    def record(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, called: dict[str, Any]) -> None:
        """Keep, and hand on, what attention is called with."""
        if self.keep:
            self.kept = key, value, called.get("sliding_window")
        if self.note is not None:
            self.note(query, key, mask, called)

    def remove(self) -> None:
        """Give the layer its own config back."""
        self.module.__dict__.pop("interp_hook", None)
        self.sinks = None
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
    """A copy of a config that finds another attention function, and says that it has its own."""
    # A copy, since a config is shared by all layers and by the model itself. Past the setter of
    # `_attn_implementation`, which would set the configs of parts (text, vision) as well: those are shared still.
    other = copy.copy(config)
    other.__dict__["_attn_implementation_internal"] = lent(name, config._attn_implementation)
    return other


def kernel_of(module: Any) -> Any:
    """A layer's own attention function; None if it cannot be found."""
    implementation = own_config(module)._attn_implementation
    # Eager attention is not registered: each family has one of its own, in the file of its modules.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return eager if implementation == "eager" else AttentionInterface()[implementation]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, interp_hook: AttentionHook | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention `[batch head query d_head]` by steps, with the layer's hook called on the way, or the one handed in."""
    hook = module.__dict__["interp_hook"] if interp_hook is None else interp_hook
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
        hook.record(query, key, value, attention_mask, {"scaling": scaling, **kwargs})
    if hook.kernel is not None and hook.prefix is None and not {"scores", "pattern"} & stages.keys():
        # Nothing looks inside, so the layer's own kernel goes on with what was read or edited.
        mask = None if attention_mask is None else attention_mask[..., :n_keys]
        return hook.kernel(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = scale_of(query, scaling)
    called = {"scaling": scale, "dropout": dropout, **kwargs}
    if hook.hides and hook.has_kernel:
        return _hidden(hook, (query, key, value), attention_mask, called), None
    few: _Few | None = None
    if hook.queries is not None and filled in (None, n_keys):
        few = _few(hook, hook.queries, (query, key, value), attention_mask, called)
        query, attention_mask, kwargs = few.query, few.mask, few.kwargs
    narrowed = hook.softmax_dtype is not None and query.dtype == torch.float64  # rounds, so only the same order agrees
    if hook.prefix is not None and not (dropout or narrowed or _IN_ONE & {*stages, *kwargs}):
        out = merged(hook.prefix, (query, key, value), attention_mask, called, module, hook.softmax_dtype)
        return out.transpose(1, 2).contiguous(), None
    scores = masked(shaped(products(query, key) * scale, kwargs), attention_mask, kwargs, module)
    if hook.prefix is not None:
        scores, values = joined_scores(hook.prefix, query * scale, scores, kwargs)
        n_keys = scores.shape[-1]
    unedited, hook.sinks = scores, sinks_of(kwargs) if "s_aux" in kwargs or "sinks" in kwargs else None
    if "scores" in stages:
        scores = stages["scores"](unedited, n_keys)
        demand_a_key(unedited, scores)
    pattern = computed = softmax(scores, hook.sinks, hook.softmax_dtype)
    if "pattern" in stages:
        pattern = stages["pattern"](computed, n_keys)
    if few is not None and scores is unedited and pattern is computed and not pattern.requires_grad:
        return few.closed, None  # with a graph the output must hang on the pattern, or it would have no gradient
    if dropout:
        pattern = nn.functional.dropout(pattern, dropout, module.training)
    split = 0 if hook.prefix is None else n_keys - key.shape[2]
    out = mixed(pattern[..., split:], value)
    if split:  # two products, not one: shared values are there once, and a row's own beside them for each row
        out = mixed(pattern[..., :split], values) + out
    out = out.transpose(1, 2).contiguous()
    return (out, pattern) if few is None else (few.closed.index_copy(1, few.columns, out), None)


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

    if hook.queries is not None and not hook.queries:
        return kernel(query, mask)
    queries = torch.tensor(range(n) if hook.queries is None else hook.queries, device=query.device)
    few, of_queries = 2 * len(queries) <= n, by_query(kwargs, queries)
    hook.sinks = sinks_of({**kwargs, **of_queries})
    for_queries = queries if few or len(queries) == n else torch.arange(n, device=query.device)  # whom the mask is for
    at = None if len(for_queries) == len(queries) else queries
    with torch.no_grad():
        rows = rows_of(mask, for_queries, n_keys, implied=n > 1 and is_causal(kwargs, hook.module), dtype=query.dtype)
        unedited = shaped(products(query[:, :, queries], key) * kwargs["scaling"], {**kwargs, **of_queries})
        unedited = masked(unedited, rows if at is None else rows[:, :, at], kwargs, hook.module)
        scores = hook.stages["scores"](unedited, n_keys)
        demand_a_key(unedited, scores)
        rows = hiding(rows, scores != unedited, at)
    if few:
        return kernel(query, mask).index_copy(1, queries, kernel(query[:, :, queries], rows, **of_queries))
    return kernel(query, rows)


class _Few(NamedTuple):
    """Attention of which few queries are opened.

    Attributes:
        closed: what the layer's own kernel makes of all queries `[batch query head d_head]`.
        columns: where the few are among the queries of the pass.
        query, mask, kwargs: what attention was called with, for these alone.
    """

    closed: Tensor
    columns: Tensor
    query: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]


def _few(
    hook: AttentionHook,
    columns: Sequence[int],
    called: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> _Few:
    """Call the layer's own kernel, and leave the queries at these columns to be opened."""
    (query, key, _), module = called, hook.module
    mask = mask if mask is None else mask[..., : key.shape[2]]  # without the empty places of a static cache
    assert hook.kernel is not None
    closed = hook.kernel(module, *called, mask, **kwargs)[0]
    at = torch.tensor(columns, device=query.device)
    few_mask = at_queries(at, mask)
    if mask is None and query.shape[2] > 1 and is_causal(kwargs, module):
        # Causal attention is implied for all queries, and has to be said of some of them.
        few_mask = torch.arange(key.shape[2], device=at.device) <= at[:, None]
    return _Few(closed, at, query[:, :, at], few_mask, {**kwargs, **by_query(kwargs, at)})


OURS[NAME] = attention
