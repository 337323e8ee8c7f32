"""Many variants of one text in one pass, each row joining at the layer where it first differs.

    row 0   ────────────────────┐ joins at layer 0
    row 1           ┌───────────┘ joins at layer 3: below it, its stream is that of the clean pass
    row 2           └──┌────────┘ …

The model's own forward runs on the columns from the first edited one on. Blocks below the first row's layer hand
through; where rows join, the clean pass' stream is put in for them. Keys and values of the columns before come from the
clean pass too, one copy for all rows. Every number equals that of a full forward pass of the variant, up to rounding.

Cost: one clean pass over `n` columns, then for each variant (layers from its first on) × (columns from its first on).
Memory: keys, values and the stream of the clean pass, `layers × n × (2 × kv_heads × d_head + d_model)`, and what a pass
over the rows takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.atlas import Atlas, Entry
from ..architectures.taps import Tap
from ..edits import Edit
from ..plan import Plan
from ..positions import Rows
from ..regions import Window
from .attention import LayerTap
from .ports import Change
from .program import LocalEngine
from .torch import TorchProgram


@dataclass
class Clean:
    """What a clean pass over one text left: everything that variants share with it.

    Attributes:
        logits: at the columns that were asked for `[1 kept d_vocab]`.
        streams: input of every block `[1 pos d_model]`.
        rest: per block, what it returns beside the stream (None: it returns the stream alone).
        prefix: keys and values of every layer `[1 kv_head pos d_head]`; empty if they were not kept.
        windows: per layer, the sliding window that attention was told.
    """

    logits: Tensor
    streams: list[Tensor] = field(default_factory=list)
    rest: list[tuple[Any, ...] | None] = field(default_factory=list)
    prefix: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)


def clean_pass(engine: LocalEngine, atlas: Atlas, inputs: Mapping[str, Any], *, keep: bool) -> Clean:
    """One pass without edits.

    Args:
        keep: also keep keys and values, of models in which every layer attends through the attention interface.
    """
    blocks, attentions = _modules(engine, atlas)
    lent: dict[int, Any] = {}
    taps = [LayerTap(module, {}, lent, keep=True) for module in attentions] if keep else []
    streams: list[Tensor] = []
    rest: list[tuple[Any, ...] | None] = []

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        rest.append(None if isinstance(output, Tensor) else tuple(output[1:]))

    engine.begin()
    handles = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leaving) for block in blocks]
    try:
        for tap in taps:
            tap.install()
        with torch.no_grad():
            logits = engine.model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
        for tap in taps:
            tap.remove()
        engine.end()
    kept = [tap.kept for tap in taps if tap.kept is not None]
    return Clean(logits, streams, rest, [(k, v) for k, v, _ in kept], [window for _, _, window in kept])


def _modules(engine: LocalEngine, atlas: Atlas) -> tuple[list[nn.Module], list[nn.Module]]:
    """Blocks, and the attention of those that have an open one."""
    blocks, attentions = [], []
    for layer in range(atlas.shape.n_layers):
        entry = atlas.entries["resid_pre", layer]
        assert entry.read is not None
        blocks.append(engine.modules[entry.read.module])
        scores = atlas.entries.get(("scores", layer))
        if scores is not None and scores.read is not None and scores.read.side == "attention":
            attentions.append(engine.modules[scores.read.module])
    return blocks, attentions


class RowChange(Change):
    """A change of one row of the batch."""

    __slots__ = ("row",)

    def __init__(self, program: Staircase, number: int, edit: Edit, entry: Entry, tap: Tap) -> None:
        super().__init__(program, number, edit, entry, tap)
        self.row = program.row_of[number]

    def apply(self, x: Tensor) -> Tensor:
        """Carry the edit out on its row, in a copy of the batch that all changes of a place share."""
        program = self.program
        assert isinstance(program, Staircase)
        if program.copied is not x:
            x = program.copied = x.clone()
        row = x[self.row : self.row + 1]
        row.copy_(super().apply(row))
        return x


class Staircase(TorchProgram):
    """One pass over many variants.

    Args:
        variants: edits per row, each in one layer, with positions counted in this one text.
        joins: per row, the layer at which it joins; ascending.
    """

    def __init__(
        self, engine: LocalEngine, atlas: Atlas, variants: Sequence[Sequence[Edit]], joins: Sequence[int]
    ) -> None:
        self.row_of = [row for row, edits in enumerate(variants) for _ in edits]
        self.copied: Tensor | None = None
        self.joins = joins
        self.flat = tuple(edit for edits in variants for edit in edits)
        super().__init__(engine, Plan((), self.flat), atlas)

    def _change(self, number: int, edit: Edit, entry: Entry, tap: Tap) -> Change:
        return RowChange(self, number, edit, entry, tap)

    def climb(self, inputs: Mapping[str, Any], rows: Rows, start: int, clean: Clean) -> tuple[Tensor, list[float]]:
        """Run it.

        Args:
            inputs: of the columns from `start` on, one row.
            rows: the text, one row, whole.
            start: the first column that any edit touches.
            clean: of the same text.

        Returns:
            Logits `[row kept d_vocab]`, and per row the norm of what its edits changed.
        """
        self.engine.begin()
        try:
            self.window, self.edits = None, self.flat
            self._check(rows)
            self.window = Window(start, rows.width)
            passed = self._begin(rows, rows.width - start, False)
            self.shape = (-1, rows.width - start)  # rows join on the way
            with torch.no_grad(), self._stairs(start, clean):
                logits = self.carry("forward", inputs).logits
        finally:
            self.copied = None
            self._end()
        moved = [0.0] * len(self.joins)
        norms = [(self.row_of[number], norm) for number, fires in enumerate(passed.fires) for _, _, norm in fires]
        if norms:
            for (row, _), norm in zip(norms, torch.stack([n for _, n in norms]).double().tolist(), strict=True):
                moved[row] = (moved[row] ** 2 + norm**2) ** 0.5
        return logits, moved

    @contextmanager
    def _stairs(self, start: int, clean: Clean) -> Iterator[None]:
        """Blocks below the first row hand through, rows join, attention sees the columns before."""
        blocks, attentions = _modules(self.engine, self.atlas)
        first = self.joins[0]
        own = [block.__dict__.get("forward") for block in blocks[:first]]
        handles = []
        taps, self.taps = self.taps, self._with_prefix(attentions[first:], start, clean, first) if start else self.taps
        try:
            for block, rest in zip(blocks[:first], clean.rest, strict=False):
                block.__dict__["forward"] = _handing_through(rest)
            for layer in sorted(set(self.joins)):
                stream = clean.streams[layer][:, start:].expand(self.joins.count(layer), -1, -1)
                hook = _joining(stream, first=layer == first)
                handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            self.taps = taps
            for handle in handles:
                handle.remove()
            for block, forward in zip(blocks[:first], own, strict=True):
                block.__dict__.pop("forward")
                if forward is not None:
                    block.__dict__["forward"] = forward

    def _with_prefix(self, modules: Sequence[nn.Module], start: int, clean: Clean, first: int) -> list[LayerTap]:
        """A tap on every layer that will run, with what the clean pass had before `start`."""
        known = {id(tap.module): tap for tap in self.taps}
        lent: dict[int, Any] = {}
        taps = [known.get(id(module)) or LayerTap(module, {}, lent) for module in modules]
        for tap, (key, value) in zip(taps, clean.prefix[first:], strict=True):
            tap.prefix = key[:, :, :start], value[:, :, :start]
        return taps


def _handing_through(rest: tuple[Any, ...] | None) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if rest is None else (hidden_states, *rest)

    return forward


def _joining(stream: Tensor, *, first: bool) -> Callable[..., Any]:
    """A hook that puts new rows under those that are there; the first ones take the place of what came by."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        x = stream if first else torch.cat([x, stream])
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    return hook
