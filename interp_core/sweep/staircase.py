"""Many variants of a text, or of some texts, in one pass, each row joining at the layer where it first differs.

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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.atlas import Atlas, Entry
from ..architectures.hook_points import Call, HookPoint
from ..engines.attention import AttentionHook
from ..engines.attention_prefix import RowTexts, SharedPrefix
from ..engines.attention_steps import sinks_in, softmax
from ..engines.operations import apply_edit
from ..engines.program import LocalEngine, Stop
from ..engines.protocol import PassRecord
from ..engines.replace import replaced_forwards
from ..engines.router_edits import reroute
from ..engines.selection import BoundSelection, Window
from ..engines.site_access import SiteEdit, SiteRead
from ..engines.torch import TorchProgram
from ..plan import Plan
from ..positions import Rows
from ..receipts import demand_proof
from ..sites import ROUTING, Edit, Site
from .clean import CleanPass, modules_of, narrowed, seen, tapped


class RowRead(SiteRead):
    """A read of all rows of a pass, however many there are of the one text."""

    __slots__ = ("n_rows",)
    n_rows: int

    def bind(self, rows: Rows, window: Window | None) -> None:
        """Point the selection at all of them."""
        super().bind(Rows(list(rows.real) * self.n_rows, {}, rows.width), window)


class RowEdit(SiteEdit):
    """An edit of one row of the batch."""

    __slots__ = ("program",)

    def __init__(self, program: Staircase, number: int, edit: Edit, entry: Entry, point: HookPoint) -> None:
        super().__init__(program.state, number, edit, entry, point)
        self.program = program

    def bind(self, rows: Rows, window: Window | None) -> None:
        """Point the selection at the columns of the row's own text; many rows have the same one."""
        program, selection = self.program, self.selection
        assert window is not None
        rows, shift = program.placed_of(self.number)
        columns = Window(*(column + shift for column in window))
        key = self.site.name, selection.pos, selection.key, selection.units, columns
        if key not in program.bounds:
            program.bounds[key] = None if selection.whole else selection.bind(rows, columns)
        self.bound = program.bounds[key]

    def check(self, rows: Rows) -> None:
        """Hold the edit's value against its own text."""
        super().check(self.program.placed_of(self.number)[0])


class RowEdits:
    """Edits of one value, each in a row of its own, carried out in one copy of the batch.

    A thousand variants have a thousand edits at a hook. Most are the same operation at the same place of their rows and
    become one indexed operation; the others follow one by one.

    Attributes:
        point: where the value is.
        by_itself: edits that are carried out one by one.
        together: edits that are one operation on equal places of their rows, and so take one index.
    """

    __slots__ = ("by_itself", "members", "point", "program", "together", "units")

    def __init__(self, program: Staircase, members: Sequence[SiteEdit]) -> None:
        self.program, self.members = program, members
        self.point, self.units = members[0].point, members[0].units
        self.by_itself: list[SiteEdit] = []
        self.together: list[list[SiteEdit]] = []

    def bind(self, rows: Rows, window: Window | None) -> None:
        """Point the selections at the rows of a pass."""
        for member in self.members:
            member.bind(rows, window)
        self.arrange()

    def arrange(self) -> None:
        """Find out which edits go together; for selections that point at the rows of a pass."""
        alike: dict[Any, list[SiteEdit]] = {}
        for member in self.members:
            alike.setdefault(self._kind(member), []).append(member)
        self.by_itself = alike.pop(None, [])
        self.together = list(alike.values())

    def _kind(self, member: SiteEdit) -> Any:
        """Equal for edits that take one index; None for those that are carried out by themselves."""
        edit, bound = self._edit(member), member.bound
        if member.knockout and bound is not None and bound.basic:
            return edit.op, str(bound.index(torch.device("cpu")))
        if edit.op not in ("set", "add", "zero", "scale") or (bound is not None and bound.stretch is None):
            return None
        place = None if bound is None else (str(bound.stretch), bound.unit is None)
        return None if member.idle else (edit.op, place)

    def _edit(self, member: SiteEdit) -> Edit:
        return self.program.state.edits[member.number]

    def _rows(self, members: Sequence[SiteEdit]) -> list[int]:
        return [self.program.row_of[member.number] for member in members]

    def apply(self, x: Tensor) -> Tensor:
        """Carry the edits out on the tensor that passes."""
        into, view = x.clone(), self.point.view
        self._write(x if view is None else view(x), into if view is None else view(into), x)
        return into

    def derive(self, call: Call) -> None:
        """The same for a value that the hook point computes, and knows how to put back."""
        routing = [member for member in self.by_itself if self._edit(member).op in ROUTING]
        for member, row in zip(routing, self._rows(routing), strict=True):
            if not member.idle:
                reroute(member, call, row)
        if len(routing) == len(self.members):
            return
        value = call.value(self.point, self.units)
        into = value.clone()
        self._write(value, into, value)
        call.change(self.point, self.units, value, into)

    def _write(self, value: Tensor, into: Tensor, x: Tensor) -> None:
        for member, number in zip(self.by_itself, self._rows(self.by_itself), strict=True):
            edit, row = self._edit(member), slice(number, number + 1)
            if not member.idle and edit.op not in ROUTING:
                member.write(edit, value[row], into[row], x[row])
        for members in self.together:
            (self._hide_together if members[0].knockout else self._write_together)(members, value, into)

    def _hide_together(self, members: list[SiteEdit], scores: Tensor, into: Tensor) -> None:
        """Knockouts at the same place of their rows. What they change is the probability that the place had, so its
        norm needs the softmax of these rows' scores as they were."""
        rows, bound = self._rows(members), members[0].bound
        assert bound is not None
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))  # a slice copies nothing
        index = slice(rows[0], rows[0] + len(rows)) if adjacent else torch.tensor(rows, device=scores.device)
        place, before = bound.index(scores.device)[1:], scores[index]
        # scores are [row head query key], places are [query key head]
        old = before.permute(0, 2, 3, 1)[(slice(None), *place)]
        into.permute(0, 2, 3, 1)[(index, *place)] = apply_edit(self._edit(members[0]), old, None)
        taken = softmax(before, sinks_in(self.program.engine.modules, self.point.module), None)
        taken = taken.permute(0, 2, 3, 1)[(slice(None), *place)]
        norms = torch.linalg.vector_norm(taken.reshape(len(rows), -1), dim=-1)
        self.program.note(torch.tensor(rows, device=norms.device), norms)

    def _write_together(self, members: list[SiteEdit], value: Tensor, into: Tensor) -> None:
        """One operation at the same positions of their rows, each with its own value and unit."""
        edits = [self._edit(member) for member in members]
        device, bounds = value.device, [member.bound for member in members]
        rows = torch.tensor(self._rows(members), device=device)
        index: tuple[Any, ...] = (rows,)
        if bounds[0] is not None:
            index = (rows, bounds[0].stretch)
            if bounds[0].unit is not None:
                index = (*index, torch.tensor([bound.unit for bound in bounds if bound is not None], device=device))
        old, op = value[index], edits[0].op
        operand: Any = None
        if op == "scale":
            operand = torch.tensor([edit.value for edit in edits], dtype=old.dtype, device=device)
            operand = operand.view(-1, *[1] * (old.ndim - 1))
        elif op != "zero":
            # rows often share a tensor (one mean for all heads): it is moved once, and looked up by row
            numbers: dict[int, int] = {}
            which = [numbers.setdefault(id(edit.value), len(numbers)) for edit in edits]
            distinct = {id(edit.value): edit.value for edit in edits}
            operand = torch.cat([tensor.to(device).expand(1, *old.shape[1:]) for tensor in distinct.values()])
            operand = operand if len(operand) == len(which) else operand[which]
        new = apply_edit(edits[0], old, operand)
        into[index] = new
        self.program.note(rows, torch.linalg.vector_norm((new - old).reshape(len(new), -1), dim=-1))


class Staircase(TorchProgram):
    """One pass over many variants, of one text or of several.

    Args:
        variants: edits per row, each in one layer, with positions counted in the row's text.
        start_layers: per row, the layer at which it joins; ascending. All are -1 for rows that begin before the first
            block.
        texts: per row, which text it is a variant of.
        read: the site that the variants are scored by, with which the pass ends; None: the logits. Of one text only.
        each: call the model with a row of inputs for each variant, also where one would do for all.
    """

    read = RowRead
    closes = False  # rows hold the queries of one text each

    def __init__(
        self,
        engine: LocalEngine,
        atlas: Atlas,
        variants: Sequence[Sequence[Edit]],
        start_layers: Sequence[int],
        texts: Sequence[int],
        read: Site | None = None,
        *,
        each: bool = False,
    ) -> None:
        self.each = each
        self.row_of = [row for row, edits in enumerate(variants) for _ in edits]
        self.start_layers, self.texts = start_layers, texts
        self.flat = tuple(edit for edits in variants for edit in edits)
        self.squares: list[tuple[Tensor, Tensor]] = []
        self.groups: list[RowEdits] = []
        self.placed: list[tuple[Rows, int]] = []
        self.bounds: dict[Any, BoundSelection | None] = {}
        super().__init__(engine, Plan(() if read is None else (read,), self.flat), atlas)
        for slot in self.slots:
            assert isinstance(slot, RowRead)
            slot.n_rows = len(start_layers)

    def _change(self, number: int, edit: Edit, entry: Entry, point: HookPoint) -> SiteEdit:
        return RowEdit(self, number, edit, entry, point)

    def _add_edits(self, edits: tuple[Edit, ...]) -> list[SiteEdit]:
        """The first edits of all rows go together, then the second ones, so that each row keeps its order."""
        changes = super()._add_edits(edits)
        for module_hook in self._hook_at.values():
            turns: dict[int, int] = {}
            groups: dict[Any, list[SiteEdit]] = {}
            for change in module_hook.changes:
                row, point = self.row_of[change.number], change.point
                turns[row] = turn = turns.get(row, -1) + 1
                groups.setdefault((turn, point.rank, point.view, point.get, change.units), []).append(change)
            acting = [RowEdits(self, groups[key]) for key in sorted(groups, key=lambda key: key[0])]
            module_hook.acting = acting
            self.groups += acting
        return changes

    def placed_of(self, number: int) -> tuple[Rows, int]:
        """The text of an edit's row as rows of one, and how far its columns lie from the first text's."""
        return self.placed[self.texts[self.row_of[number]]]

    def note(self, rows: Tensor, norms: Tensor) -> None:
        """Norms of what was changed in some rows."""
        self.squares.append((rows, norms.double().square()))

    def run(
        self, inputs: Mapping[str, Any], starts: Sequence[int], n_columns: int, clean: CleanPass, within: Sequence[int],
        scored: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Run it.

        Args:
            inputs: of the columns that are run, one row per text.
            starts: per text, the first column that any edit touches.
            n_columns: how many are run from there on.
            clean: of these texts, and maybe others.
            within: per text, which one it is there.
            scored: per row, columns that are scored, where the last layer need not compute others.

        Returns:
            What is scored, `[row kept d_vocab]` or an inner site's value of all rows, and per row the norm of what its
            edits changed.
        """
        alike = len(set(starts)) == 1 and not self.each
        texts = RowTexts(starts)  # whose rows are there; grows as rows join
        inputs = self._inputs(inputs, alike)
        self.engine.acquire()
        try:
            self.state.edits, self.squares, self.bounds = self.flat, [], {}
            widths = [start + n_columns for start in starts]
            self.placed = [(Rows([range(width)], {}, width), width - widths[0]) for width in widths]
            # edits are bound as in a step of a generation, to the columns that run; `RowEdit.bind` shifts them by text
            self.state.window = Window(starts[0], widths[0])
            record = self.begin_pass(self.placed[0][0], n_columns, False)
            for change in self._changes:
                change.check(self.state.rows)
            for group in self.groups:
                group.arrange()
            self.state.shape = (len(inputs["input_ids"]), n_columns)
            self.state.after = self.ending()
            narrow = {} if scored is None else narrowed(self.engine, self.atlas, scored)
            stairs = self._stairs(texts, n_columns, clean, within, narrow=not alike)
            with torch.no_grad(), stairs, replaced_forwards(narrow):
                record.output = self.execute("forward", inputs)
        except Stop:
            pass
        finally:
            self._end()
        demand_proof(self.flat, (record,))
        return seen(record, self.slots) if self.slots else record.output.logits, self._moved(record)

    def _inputs(self, inputs: Mapping[str, Any], alike: bool) -> dict[str, Any]:
        """What the model is called with: a row for each that takes part, or one that all are taken for, where none
        begins before the first block and all stand in the same columns."""
        called = dict(inputs)
        each = self.start_layers[0] < 0 or not alike
        called["input_ids"] = inputs["input_ids"][list(self.texts)] if each else inputs["input_ids"][:1]
        if "position_ids" in inputs:
            called["position_ids"] = inputs["position_ids"][:1] if alike else inputs["position_ids"][list(self.texts)]
        return called

    def _moved(self, record: PassRecord) -> Tensor:
        """Per row, the norm of what its edits changed."""
        total = torch.zeros(len(self.start_layers), dtype=torch.float64)
        norms = [(self.row_of[number], norm) for number, _, _, norm in record.fires]
        if norms:
            self.note(torch.tensor([row for row, _ in norms]), torch.stack([norm for _, norm in norms]))
        for rows, squares in self.squares:
            total.index_add_(0, rows.cpu(), squares.cpu())
        return total.sqrt()

    @contextmanager
    def _stairs(
        self, texts: RowTexts, n_columns: int, clean: CleanPass, within: Sequence[int], *, narrow: bool
    ) -> Iterator[None]:
        """Blocks below the first row hand through, rows join, attention sees the columns before."""
        blocks, attentions = modules_of(self.engine, self.atlas)
        first = max(self.start_layers[0], 0)  # rows are sorted by layer
        handles = []
        attn_hooks = self.attn_hooks
        if any(texts.starts):
            self.attn_hooks = self._with_prefix(attentions[first:], texts, clean.prefix[first:], within)
        if self.start_layers[0] < 0:
            texts.join(self.texts)  # the model embeds them itself: no clean stream is put in
        below = {block: _handing_through(rest) for block, rest in zip(blocks[:first], clean.rest, strict=False)}
        told = None if clean.called is None else clean.called.told(within, texts, n_columns)
        try:
            for layer in range(first, len(clean.streams)):  # a pass may end before the last
                joining = [text for text, at in zip(self.texts, self.start_layers, strict=True) if at == layer]
                if joining or narrow or told is not None:
                    new = partial(_columns, clean.streams[layer], within, texts.starts, joining, n_columns)
                    hook = self._joining(texts, joining, new, narrow)
                    hook = hook if told is None else told.around(layer, hook)
                    handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))
            with replaced_forwards(below):
                yield
        finally:
            self.attn_hooks = attn_hooks
            for handle in handles:
                handle.remove()

    def _joining(
        self, texts: RowTexts, joining: Sequence[int], new: Callable[[], Tensor], narrow: bool
    ) -> Callable[..., Any]:
        """A hook that puts new rows under those that are there; the first ones take the place of what came by. Where
        the model was called with all rows, a block is told the positions of those that are there."""
        total = len(self.start_layers)

        # positions and masks come from the model's call, which has all rows: those that have not joined are cut off
        def there(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(there, x))
            return x[: len(texts.rows)] if isinstance(x, Tensor) and x.ndim > 1 and len(x) == total else x

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            if joining:
                x = torch.cat([x, new()]) if texts.rows else new()
                texts.join(joining)
                self.state.shape = (len(x), x.shape[1])
            rest = {name: there(value) for name, value in kwargs.items()} if narrow else kwargs
            return ((x, *there(args[1:])), rest) if args else (args, {**rest, "hidden_states": x})

        return hook

    def _with_prefix(
        self,
        modules: Sequence[nn.Module],
        texts: RowTexts,
        kept: Sequence[tuple[Tensor, Tensor] | None],
        within: Sequence[int],
    ) -> list[AttentionHook]:
        """A hook point on every layer that will run, with what the clean pass had before the pass' columns."""
        attn_hooks, start = tapped(self.attn_hooks, modules), max(texts.starts)
        for attn_hook, pair in zip(attn_hooks, kept, strict=False):
            if pair is None:
                continue  # the pass ended before, or handed through
            key, value = (x[:, :, :start] if len(x) == len(within) else x[list(within), :, :start] for x in pair)
            attn_hook.prefix = SharedPrefix(key, value, texts)
        return attn_hooks


def _columns(
    stream: Tensor, within: Sequence[int], starts: Sequence[int], joining: Sequence[int], count: int
) -> Tensor:
    """So many columns of each joining row's text, from its start on `[row pos d_model]`."""
    columns = torch.tensor([starts[text] for text in joining])[:, None] + torch.arange(count)
    return stream[torch.tensor([within[text] for text in joining])[:, None], columns]


def _handing_through(rest: tuple[Any, ...] | None) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if rest is None else (hidden_states, *rest)

    return forward
