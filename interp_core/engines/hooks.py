"""Hooks: what a plan does at one side of one module, as one hook.

A hook carries out the plan's changes there in order, then keeps what the plan reads: a read sees the value that the
model goes on with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.atlas import Entry
from ..architectures.family import View
from ..architectures.hook_points import KEYED, Call, HookPoint
from ..errors import CapabilityError
from ..positions import Rows, Slice, settled
from ..sites import ROUTING, SITES, TENSOR_OPS, Edit, Site
from .attention import softmax
from .knockout import Hidden, renormalised
from .operations import apply_edit, edit_value
from .pass_state import PassState
from .protocol import Change
from .rerouting import check_experts, close, reroute
from .selection import BoundSelection, Selection, Window
from .values import check_value


class SiteAccess:
    """What reads and changes share: the part of an entry's value that a site selects, bound to the rows of a pass.

    Attributes:
        whole: no units or positions are selected.
        bound: the index into the present pass; None if whole, or if the pass has none of it.
    """

    __slots__ = ("_selection", "bound", "bound_to", "entry", "point", "site", "units", "whole")

    def __init__(self, entry: Entry, point: HookPoint, site: Site) -> None:
        self.entry, self.point, self.site = entry, point, site
        self.whole = site.units is None and site.pos is None and site.key is None and not entry.visual
        self._selection: Selection | None = None
        self.units: tuple[int, ...] | None = None
        self.bound: BoundSelection | None = None
        self.bound_to: Rows | None = None

    @property
    def selection(self) -> Selection:
        """The selection; made when first needed, so that plans of many reads compile fast."""
        if self._selection is None:
            self._selection = Selection(self.site, self.entry.n_units)
            if self.point.partial:
                self.units = self._selection.give_units()
        return self._selection

    def bind(self, rows: Rows, window: Window | None) -> None:
        """Point the selection at the rows of a pass."""
        if window is not None or self.bound_to is not rows:  # the same tokens again need no new index
            selection = self.selection
            self.bound = None if selection.whole else selection.bind(rows, window)
            self.bound_to = rows if window is None else None

    def settled(self, rows: Rows) -> bool:
        """Whether all further steps of a generation select of their tokens what this step does."""
        pos, bound = None if self.selection.tower else self.selection.pos, self.bound
        same = bound is None or not bound.ragged  # in all rows or in none
        return same and (pos is None or all(settled(pos, rows, row) for row in range(len(rows.real))))

    def take(self, value: Tensor) -> Tensor:
        """The selected part of the site's value."""
        return value if self.bound is None else self.bound.take(value)

    @property
    def idle(self) -> bool:
        """Whether this pass has none of it."""
        return self.bound is None and not self.selection.whole


class SiteRead(SiteAccess):
    """One slot of a program, at its hook.

    Attributes:
        late: the passing tensor itself is kept, and seen in the site's axes only when asked for.
    """

    __slots__ = ("late", "number")

    def __init__(self, number: int, entry: Entry, point: HookPoint, site: Site) -> None:
        super().__init__(entry, point, site)
        self.number = number
        self.late = self.whole and point.get is None

    @property
    def view(self) -> View | None:
        """The hook point's view."""
        return self.point.view

    def keep(self, x: Tensor, state: PassState) -> Tensor:
        """Keep this read's part of the tensor that passes; returns what the model goes on with."""
        if self.bound is None and not self.whole:
            return x
        if state.keep_graph:
            x = self._branch(x)
            state.record.bases[self.number] = x, self.bound
        record = state.record
        if self.late:
            kept = x
            if self.entry.overwritten and state.keep_graph:
                x = x.clone()  # gradients are those of the tensor that is kept, so the model goes on with the copy
            elif self.entry.overwritten:
                kept = x.clone()
            record.values[self.number], record.versions[self.number] = kept, kept._version
            return x
        kept = self.take(x if self.point.view is None else self.point.view(x))
        if kept._base is not None and (self.entry.overwritten or not state.keep_graph):
            kept = kept.clone()  # a view would keep the whole tensor alive
        record.values[self.number] = kept
        return x

    def _branch(self, x: Tensor) -> Tensor:
        """The tensor to differentiate by. Where an edit would act at this very hook, only what follows the hook
        counts, not other uses of the same tensor (one norm may feed attention and MLP): so it gets an own node."""
        if self.entry.write is self.point:
            x = x.view_as(x)
        return x if x.requires_grad else x.requires_grad_()

    def bind(self, rows: Rows, window: Window | None) -> None:
        """Point the selection at the text in the rows of a pass: a change may act on what fills up a row that has
        ended, so that its value keeps its shape, but nothing is read there."""
        super().bind(rows.text, window)

    def derive(self, call: Call, state: PassState) -> None:
        """The same for a value that the hook point computes."""
        if not self.idle:
            x = self.take(call.value(self.point, self.units))
            state.record.values[self.number] = x if x._base is None else x.clone()


class SiteEdit(SiteAccess):
    """One edit in one layer. The edit itself, with its value, is the run's: a state serves many.

    Attributes:
        ready: the edit's value as this run's tensors need it, once it has met one.
    """

    __slots__ = ("checked", "knockout", "number", "ready", "state")

    def __init__(self, state: PassState, number: int, edit: Edit, entry: Entry, point: HookPoint) -> None:
        super().__init__(entry, point, edit.site)
        assert self.selection is not None  # units are checked now
        self.state, self.number = state, number
        self.knockout = edit.op == "knockout" and point is not entry.write
        self.checked: Any = None
        self.ready: Any = None

    def apply(self, x: Tensor) -> Tensor:
        """Carry the edit out on the tensor that passes, and note what it did."""
        if self.bound is None and not self.whole:
            return x
        edit, view, bound = self.state.edits[self.number], self.point.view, self.bound
        if view is None and (bound is None or bound.fills):
            old = x if bound is None else bound.take(x)
            self.ready = edit_value(edit, old) if self.ready is None else self.ready
            new = apply_edit(edit, old, self.ready)
            if edit.op in ("set", "apply"):
                # This may be the caller's own tensor, and the model may write into what it goes on with.
                new = torch.empty_like(old).copy_(new)
            self.note(edit, x, old, new, x)
            return new if bound is None else new.view_as(x)
        into = x.clone()
        if view is None:
            self.write(edit, x, into, x)
        else:
            self.write(edit, view(x), view(into), x)
        return into

    def derive(self, call: Call) -> None:
        """The same for a value that the hook point computes, and knows how to put back; a router's edits have a way of
        their own."""
        if not self.idle:
            (self.derive_value if self.point.routed is None else partial(reroute, self))(call)

    def derive_value(self, call: Call) -> None:
        """Compute the value, change it and put it back."""
        value = call.value(self.point, self.units)
        into = value.clone()
        self.write(self.state.edits[self.number], value, into, call.first)
        call.change(self.point, self.units, value, into)

    def write(self, edit: Edit, value: Tensor, into: Tensor, x: Tensor) -> None:
        """Write the edited part of `value` into its copy `into`."""
        bound = self.bound
        old = value if bound is None else bound.take(value)
        self.ready = edit_value(edit, old) if self.ready is None else self.ready
        new = apply_edit(edit, old, self.ready)
        if bound is None:
            into.copy_(new)
        else:
            bound.put(into, new)
        if edit.op == "knockout" and not self.knockout:
            hit = (into < 0).any(-1)
            into[hit] = renormalised(into[hit])
            new = self.take(into)
        self.note(edit, value, old, new, x)

    def note(self, edit: Edit, value: Tensor, old: Tensor, new: Tensor, x: Tensor) -> None:
        """Write down that the edit fired, where, and the norm of what it changed: a part `old` of `value` to `new`."""
        state = self.state
        if edit.op == "zero":
            change = old
        elif self.knockout:  # the probability that was taken away
            sinks = getattr(state.modules[self.point.module], "sinks", None)
            change = self.take(softmax(x, sinks, None))
        else:
            change = new - old
        columns = None if self.bound is None else self.bound.columns
        if columns is not None and state.live is not None:
            columns = [row if on else [] for row, on in zip(columns, state.live, strict=True)]
            if not any(columns):
                return
        if state.real is not None or state.live is not None:
            real = self.real(value.shape, value.device)
            change = change if real is None else torch.where(real, change, 0)
        norm = torch.linalg.vector_norm(change.detach() if change.requires_grad else change)
        state.record.fires.append((self.number, self.entry.layer, columns, norm))

    def real(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Which numbers of the changed part are no padding, and in no row that has ended; None where all are such."""
        seen, selection = self.state.real, self.selection
        if selection.pos is not None:
            live = self.state.live
            seen = None if live is None else torch.tensor(live)[:, None]
        if seen is None or self.entry.visual:
            return None
        sizes = [1] * len(shape)
        sizes[0], sizes[2 if selection.attention else 1] = seen.shape
        return self.take(seen.to(device).view(sizes).expand(*shape))

    def check(self, rows: Rows, dtype: torch.dtype) -> None:
        """Hold the edit's value against the part that it meets.

        Raises:
            PlanError: shape or dtype that do not fit.
        """
        edit = self.state.edits[self.number]
        if edit.op in TENSOR_OPS:
            value = edit.value
            seen = (rows, value.shape, value.dtype)
            if self.checked is None or self.checked[0] is not rows or self.checked[1:] != seen[1:]:
                axes = self.axes(len(rows.real), rows.width)
                check_value(edit, axes, dtype, wide=self.entry.wide)
                self.checked = seen
        elif edit.op in ROUTING:
            check_experts(self, edit)

    def hidden(self, rows: Rows, known: dict[Any, Any]) -> Hidden:
        """What a knockout hides in these rows; the same columns again are taken from those that are known."""
        selection, units, every = self.selection, self.selection.units, Slice()
        heads = range(self.entry.n_units or 0) if units is None else (units,) if isinstance(units, int) else units
        for at in (selection.pos, selection.key):
            if at not in known:
                known[at] = selection.columns(rows, every if at is None else at)
        return Hidden(
            self.state.edits[self.number], self.entry.layer, heads, known[selection.pos], known[selection.key]
        )

    def axes(self, batch: int, width: int) -> list[tuple[str, int]]:
        """Names and sizes of the axes of the part that this edit meets."""
        selection, info = self.selection, SITES[self.entry.name]
        places = self.bound.axes if self.bound else [(axis, width) for axis in info.positions]
        ragged = self.bound is not None and self.bound.ragged
        units: list[tuple[str, int]] = []
        if info.unit and not isinstance(selection.units, int):
            n = len(selection.units) if selection.units else len(self.units or ()) or self.entry.n_units
            units = [(info.unit, int(n or 0))]
        rows = [] if ragged else [("batch", batch)]
        if selection.attention:
            return [*rows, *places, *units] if ragged else [*rows, *units, *places]
        features = [(a, self.entry.sizes[a]) for a in info.axes if a in self.entry.sizes and a != info.unit]
        return [*rows, *places, *units, *features]


class ModuleHook:
    """Everything that a plan does at one side of one module, or at one part of its attention."""

    __slots__ = (
        "_name", "acting", "capture", "captured", "changes", "edited", "module", "needs", "point", "reads", "state",
    )  # fmt: skip

    def __init__(self, state: PassState, module: nn.Module, point: HookPoint) -> None:
        self.state, self.module, self.point = state, module, point
        self.reads: list[SiteRead] = []
        self.changes: list[SiteEdit] = []
        self.acting: Sequence[Change] = self.changes  # a sweep puts `RowEdits` in their place
        self.needs: Sequence[ModuleHook] = ()
        self.capture = False
        self.captured: Tensor | None = None
        self.edited: Tensor | None = None  # while generating: keys or values so far, with what was edited
        self._name = ""

    @property
    def plain(self) -> bool:
        """Whether all that is done here is to keep the tensor that passes."""
        bare = not (self.changes or self.capture or self.point.layout)
        return bare and all(read.late and not read.entry.overwritten for read in self.reads)

    @property
    def derived(self) -> bool:
        """Whether something here needs the whole call, not only the first tensor that passes."""
        return any([access.point.get for access in (*self.changes, *self.reads)])  # noqa: C419 (faster)

    def hook(self) -> tuple[dict[Any, Any], dict[Any, Any] | None, Any]:
        """The module's own hook table, its table of hooks that take keyword arguments if this is one, and the hook.

        Installing is writing it there under this hook, removing is deleting it. `register_forward_hook` does the same
        and makes a handle with a weak reference each time, which is most of what a short-lived hook costs.
        """
        module = self.module
        if self.point.side == "in":
            hook = self._keep_input() if self.plain else self.on_input()
            return module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook
        return module._forward_hooks, None, self._keep_output() if self.plain else self.on_output()

    def _keep_input(self) -> Callable[[Any, Any, Any], Any]:
        """The leanest hook for an input: called once per layer and pass by plans that only read."""
        state, full = self.state, self.on_input()
        numbers = [read.number for read in self.reads]

        def keep(module: Any, args: Any, kwargs: Any) -> Any:
            if state.keep_graph or self in state.after:
                return full(module, args, kwargs)
            record, x = state.record, args[0] if args else kwargs[self.name]
            for number in numbers:
                record.values[number], record.versions[number] = x, x._version
            return None

        return keep

    def _keep_output(self) -> Callable[[Any, Any, Any], Any]:
        """The same for an output."""
        state = self.state
        numbers = [read.number for read in self.reads]
        many, full = (tuple, list), self.on_output()

        def keep(module: Any, args: Any, output: Any) -> Any:
            if state.keep_graph or self in state.after:
                return full(module, args, output)
            record, x = state.record, output[0] if output.__class__ in many else output
            for number in numbers:
                record.values[number], record.versions[number] = x, x._version
            return None

        return keep

    def on_output(self) -> Callable[[Any, Any, Any], Any]:
        """What is done to a module's output: `(module, args, output)` to the new output, None if it stays."""
        derived, layout, state = self.derived, self.point.layout, self.state

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            single = isinstance(output, Tensor)
            passing = output if single else output[0]
            first = passing if layout is None else layout.enter(passing, state.shaped(layout))
            if derived:
                call = self._derive(Call(module, args, output, first))
                if call.output is not output:
                    return call.output
                new = call.first
            else:
                new = self._through(first)
            if new is first and (layout is None or not state.keep_graph):  # what a lens made is another tensor
                return None
            new = new if layout is None else layout.leave(new, passing)
            return new if single else (new, *output[1:])

        return hook

    @property
    def name(self) -> str:
        """The argument that passes, for models that pass it by name: the hook point's, or the module's first."""
        if not self._name:
            self._name = self.point.part or list(inspect.signature(type(self.module).forward).parameters)[1]
        return self._name

    def _handed(self, kwargs: dict[str, Any]) -> Tensor:
        """What the module is handed by name.

        Raises:
            CapabilityError: nothing of that name.
        """
        handed = kwargs.get(self.name)
        if handed is None:
            site = (*self.reads, *self.changes)[0].site.name
            raise CapabilityError(f"{site}: {type(self.module).__name__} is not handed {self.name} by this model")
        return handed

    def on_input(self) -> Callable[[Any, Any, Any], Any]:
        """What is done to a module's input: `(module, args, kwargs)` to new ones, None if they stay."""
        derived, layout, state = self.derived, self.point.layout, self.state

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if derived:
                call = self._derive(Call(module, args, None, self._handed(kwargs), kwargs))
                return args, {**call.kwargs, self.name: call.first}
            passing = args[0] if args and not self.point.part else self._handed(kwargs)
            first = passing if layout is None else layout.enter(passing, state.shaped(layout))
            new = self._through(first)
            if new is first and (layout is None or not state.keep_graph):  # what a lens made is another tensor
                return None
            new = new if layout is None else layout.leave(new, passing)
            return ((new, *args[1:]), kwargs) if args and not self.point.part else (args, {**kwargs, self.name: new})

        return hook

    def stage(self) -> Callable[[Tensor, int], Tensor]:
        """What the attention hook calls with its tensor and the number of keys: gives the tensor's new value."""
        state, keyed = self.state, self.point.part in KEYED
        numbers = [read.number for read in self.reads] if self.plain else None

        def stage(x: Tensor, n_keys: int) -> Tensor:
            window = state.window
            if window is None or not keyed:
                if numbers is not None and not state.keep_graph and self not in state.after:
                    for number in numbers:
                        state.record.values[number] = x
                    return x
                if window is not None and n_keys < window.stop:  # a sliding window has dropped the first keys
                    self._bind([*self.acting, *self.reads], Window(window.start, window.stop, window.stop - n_keys))
                return self._through(x)
            return self._keyed(x, n_keys, window)

        return stage

    def _bind(self, accesses: Sequence[Change | SiteRead], window: Window) -> None:
        for access in accesses:
            access.bind(self.state.rows, window)

    def _keyed(self, x: Tensor, n_keys: int, window: Window) -> Tensor:
        """Keys or values of a step `[batch head key d_head]`, which reach back to the first. Edits act on its own,
        and stay: what earlier steps edited takes the place of what the cache holds. Reads see all."""
        state, first = self.state, window.stop - n_keys
        before = window.start - first
        own = changed = x[:, :, before:]
        for change in self.acting:
            changed = change.apply(changed)
        if changed is not own or self.edited is not None:
            earlier = x[:, :, :before] if self.edited is None else self.edited[:, :, self.edited.shape[2] - before :]
            x = self.edited = torch.cat([earlier, changed], 2)
        if self.reads and x._version:  # a buffer, which the next step writes to
            x = x.clone()
        self._bind(self.reads, Window(first, window.stop, first))
        for read in self.reads:
            x = read.keep(x, state)
        return x

    def _through(self, x: Tensor) -> Tensor:
        """Changes, then reads, of the tensor that passes."""
        state, reads = self.state, self.reads
        if reads and self.changes:  # what is changed here is only a use of sites that are changed elsewhere
            for read in [one for one in reads if one.entry.write is not one.point]:
                x = read.keep(x, state)
            reads = [one for one in reads if one.entry.write is one.point]
        for change in self.acting:
            x = change.apply(x)
        for read in reads:
            x = read.keep(x, state)
        if self.capture:
            self.captured = x
        if self in state.after:
            state.after[self]()
        return x

    def _derive(self, call: Call) -> Call:
        """The same where some of them are of values that the hook point computes from the whole call."""
        state = self.state
        call.shape = state.shape
        call.needs = tuple(module_hook.captured for module_hook in self.needs)  # type: ignore[misc]
        for change in self.acting:
            if change.point.get is None:
                call.first = change.apply(call.first)
            else:
                change.derive(call)
        if call.proofs:
            close(state, call)
        for read in self.reads:
            if read.point.get is None:
                call.first = read.keep(call.first, state)
            else:
                read.derive(call, state)
        if self.capture:
            self.captured = call.first
        if self in state.after:
            state.after[self]()
        return call
