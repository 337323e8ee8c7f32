"""One pass over some texts without edits, and what passes over their variants take of it: see `staircase.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..architectures.atlas import Atlas
from ..engines.attention import AttentionHook
from ..engines.called import Called
from ..engines.program import LocalEngine
from ..engines.protocol import PassRecord, viewed
from ..engines.replace import replaced_forwards
from ..engines.site_access import SiteRead
from ..engines.torch import TorchProgram
from ..plan import Plan
from ..positions import Rows
from ..sites import Site


def runs_rows(engine: object) -> TypeGuard[LocalEngine]:
    """Whether sweeps may run passes of many rows on an engine."""
    return isinstance(engine, LocalEngine) and bool(vars(type(engine)).get("runs_rows"))


@dataclass
class CleanPass:
    """What a clean pass over some texts left: everything that variants share with it.

    Attributes:
        value: what is scored: logits `[text kept d_vocab]`, or an inner site's value.
        streams: input of every block that ran `[text pos d_model]`.
        rest: per block, what it returns beside the stream (None: it returns the stream alone).
        prefix: keys and values of every layer `[text kv_head pos d_head]`, None where the pass did not attend; empty if
            they were not kept.
        windows: per layer, the sliding window that attention was told.
        called: what blocks were called with, of texts with images (None: of pure text, which says it all).
    """

    value: Tensor
    streams: list[Tensor] = field(default_factory=list)
    rest: list[tuple[Any, ...] | None] = field(default_factory=list)
    prefix: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    called: Called | None = None


def clean_pass(
    engine: LocalEngine,
    atlas: Atlas,
    inputs: Mapping[str, Any],
    rows: Rows,
    read: Site | None,
    *,
    keep: bool,
    scored: Tensor | None = None,
    images: bool = False,
) -> CleanPass:
    """One pass without edits.

    Args:
        rows: the texts; shorter ones are filled up on the right, where causal attention does not see it.
        read: the site that is scored, with which the pass ends; None: the logits.
        keep: also keep keys and values, of models in which every layer attends through the attention interface.
        scored: columns whose logits are asked for `[text scored]`; of the others the last layer computes no more than
            keys and values need.
        images: also keep what blocks are called with, which ids alone do not say.
    """
    program = TorchProgram(engine, Plan(() if read is None else (read,), ()), atlas)
    blocks, attentions = modules_of(engine, atlas)
    if keep:
        program.attn_hooks = tapped(program.attn_hooks, attentions)
        for attn_hook in program.attn_hooks:
            attn_hook.keep = True
    streams: list[Tensor] = []
    rest: list[tuple[Any, ...] | None] = []
    called = Called(rows.width) if images else None

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])
        if called is not None:
            called.blocks.append((args[1:], {key: x for key, x in kwargs.items() if key != "hidden_states"}))

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        rest.append(None if isinstance(output, Tensor) else tuple(output[1:]))

    handles = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leaving) for block in blocks]
    if called is not None and (stack := atlas.entries.get(("deepstack", 0))) is not None and stack.read is not None:
        handles.append(engine.modules[stack.read.module].register_forward_pre_hook(called.laid, with_kwargs=True))
    narrow = {} if scored is None else narrowed(engine, atlas, scored)
    try:
        with torch.no_grad(), replaced_forwards(narrow):
            record = program.forward(inputs, rows, (), keep_graph=False, stop=read is not None)
    finally:
        for handle in handles:
            handle.remove()
    kept = [attn_hook.kept for attn_hook in program.attn_hooks if attn_hook.keep]
    value = record.output.logits if read is None else seen(record, program.slots)
    return CleanPass(
        value, streams, rest, [layer and layer[:2] for layer in kept], [layer and layer[2] for layer in kept], called
    )


def narrowed(engine: LocalEngine, atlas: Atlas, columns: Tensor) -> dict[nn.Module, Callable[..., Any]]:
    """The last layer's output projection and MLP, in some columns alone."""
    last = [atlas.entries.get((name, atlas.shape.n_layers - 1)) for name in ("z", "mlp_in")]
    modules = [engine.modules[entry.read.module] for entry in last if entry is not None and entry.read is not None]
    return {module: _only(module.forward, columns) for module in modules}


def _only(forward: Callable[..., Any], columns: Tensor) -> Callable[..., Any]:
    """What a module does that treats every position by itself, in these columns `[text column]`; zero in the others."""

    def some(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A module that sees tokens flattened, or other rows, computes all of them.
        if x.shape[:1] != columns.shape[:1] or x.ndim != 3:
            return forward(x, *args, **kwargs)
        rows = torch.arange(len(x))[:, None]
        narrow = forward(x[rows, columns], *args, **kwargs)
        if not isinstance(narrow, Tensor) or narrow.shape[:2] != columns.shape:
            return forward(x, *args, **kwargs)
        wide = narrow.new_zeros(*x.shape[:2], narrow.shape[-1])
        wide[rows, columns] = narrow
        return wide

    return some


def seen(record: PassRecord, slots: Sequence[SiteRead]) -> Tensor:
    """The value of the one site that a pass read, in the site's axes."""
    (value,), (slot,) = record.values, slots
    assert value is not None
    return viewed(slot, value)


def tapped(attn_hooks: Sequence[AttentionHook], modules: Sequence[nn.Module]) -> list[AttentionHook]:
    """A hook on every attention module, those that a plan has among them."""
    known = {id(attn_hook.module): attn_hook for attn_hook in attn_hooks}
    lent: dict[int, Any] = {}
    return [known.get(id(module)) or AttentionHook(module, {}, lent) for module in modules]


def modules_of(engine: LocalEngine, atlas: Atlas) -> tuple[list[nn.Module], list[nn.Module]]:
    """Blocks, and the attention of those that have an open one."""
    blocks, attentions = [], []
    for layer in range(atlas.shape.n_layers):
        entry = atlas.entries["resid_pre", layer]
        assert entry.read is not None
        blocks.append(engine.modules[entry.read.module])
        scores = atlas.entries.get(("scores", layer))
        if scores is not None and scores.read is not None and scores.read.shares_keys:
            attentions.append(engine.modules[scores.read.module])
    return blocks, attentions
