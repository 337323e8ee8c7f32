"""One read, or one edit, of a site in one layer: which part of the passing tensor it is about, and what it does there.

A `ModuleHook` (`hooks.py`) has the tensor and calls these one after the other; the run's values, rows and record are in
the `PassState`. A read or an edit is made once, when its plan is compiled, and bound to rows for every pass.

Reading is what a plan does most, so a read of a whole site costs one entry in a list: it keeps the very tensor that
passes, without a copy (`late`), and views it in the site's axes when somebody asks for it. What the model would do to
that tensor afterwards is found by its version, which PyTorch counts up with every write in place: the pass is then made
again with copies (`HookProgram._overwritten`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..architectures.atlas import Entry
from ..architectures.family import View
from ..architectures.hook_points import Call, HookPoint
from ..positions import Rows, Slice, settled
from ..sites import ROUTING, SITES, TENSOR_OPS, Edit, Site
from .attention_steps import sinks_in, softmax
from .knockout import Hidden, renormalised
from .operations import apply_edit, edit_value
from .pass_state import PassState
from .router_edits import check_experts, reroute
from .selection import BoundSelection, Selection, Window
from .values import check_value


class SiteAccess:
    """What reads and edits share: the part of an entry's value that a site selects, bound to the rows of a pass.

    Attributes:
        whole: no units or positions are selected.
        units: those that the hook point computes, where it computes some alone; None for all.
        bound: the index into the present pass; None if whole, or if the pass has none of it.
        bound_to: the rows that `bound` is for; None if it has to be made anew.
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
        """The selected part of the site's value; all of it where nothing is selected."""
        return value if self.bound is None else self.bound.take(value)

    @property
    def idle(self) -> bool:
        """Whether this pass computes nothing of what the site selects, as a step of a generation whose token is another
        one."""
        return self.bound is None and not self.selection.whole


class SiteRead(SiteAccess):
    """One slot of a program, at its hook.

    Attributes:
        number: of the slot, in the order of the plan's reads.
        late: the passing tensor itself is kept, and seen in the site's axes only when somebody asks for the value.
    """

    __slots__ = ("late", "number")

    def __init__(self, number: int, entry: Entry, point: HookPoint, site: Site) -> None:
        super().__init__(entry, point, site)
        self.number = number
        self.late = self.whole and point.get is None

    @property
    def view(self) -> View | None:
        """How the passing tensor is seen in the site's axes; None where it has them."""
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
                kept = x.clone()  # the model is about to write into its own
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
        """Point the selection at the text in the rows of a pass: an edit may act on what fills up a row that has
        ended, so that its value keeps its shape, but nothing is read there."""
        super().bind(rows.text, window)

    def derive(self, call: Call, state: PassState) -> None:
        """Keep this read's part of a value that the hook point computes from a whole call, as `expert_out`."""
        if not self.idle:
            x = self.take(call.value(self.point, self.units))
            state.record.values[self.number] = x if x._base is None else x.clone()


class SiteEdit(SiteAccess):
    """One edit in one layer. The edit itself, with its value, is the run's (`PassState.edits`): a program serves many.

    Attributes:
        number: of the edit in its plan.
        knockout: it hides keys before the softmax, by their scores. (Where a family's scores cannot be written, a
            knockout edits the pattern instead, whose rows are then made to sum to one again.)
        checked: the rows, shape and dtype that the edit's value was last found to fit.
        ready: the edit's value as this run's tensors need it (device, dtype, directions made orthonormal), once it has
            met one.
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
            # The edit takes all that passes, so its result goes on as it is: no copy of the old tensor to write into.
            new = apply_edit(edit, old, self.ready)
            if edit.op in ("set", "apply"):
                # This may be the caller's own tensor, and the model may write into what it goes on with.
                new = torch.empty_like(old).copy_(new)
            self.note(edit, x, old, new, x)
            return new if bound is None else new.view_as(x)
        # The passing tensor is somebody else's (the clean value that a read has kept, another module's input).
        into = x.clone()
        if view is None:
            self.write(edit, x, into, x)
        else:
            self.write(edit, view(x), view(into), x)
        return into

    def derive(self, call: Call) -> None:
        """Carry the edit out on a value that the hook point computes from a whole call, and knows how to put back. A
        router's edits have a way of their own (`router_edits.py`)."""
        if not self.idle:
            (self.derive_value if self.point.routed is None else partial(reroute, self))(call)

    def derive_value(self, call: Call) -> None:
        """Compute the hook point's value, edit it and put the difference back into the call."""
        value = call.value(self.point, self.units)
        into = value.clone()
        self.write(self.state.edits[self.number], value, into, call.first)
        call.change(self.point, self.units, value, into)

    def write(self, edit: Edit, value: Tensor, into: Tensor, x: Tensor) -> None:
        """Write the edited part of `value` into its copy `into`.

        Args:
            x: what the receipt of a knockout measures: the tensor that passes, before the edit.
        """
        bound = self.bound
        old = value if bound is None else bound.take(value)
        self.ready = edit_value(edit, old) if self.ready is None else self.ready
        new = apply_edit(edit, old, self.ready)
        if bound is None:
            into.copy_(new)
        else:
            bound.put(into, new)
        if edit.op == "knockout" and not self.knockout:  # hidden entries of a pattern are negative until here
            hit = (into < 0).any(-1)
            into[hit] = renormalised(into[hit])
            new = self.take(into)
        self.note(edit, value, old, new, x)

    def note(self, edit: Edit, value: Tensor, old: Tensor, new: Tensor, x: Tensor) -> None:
        """Write down that the edit fired, where, and the norm of what it changed: a part `old` of `value` to `new`.

        The norm stays a tensor: to make it a number here would have a GPU wait at every edit.
        """
        state = self.state
        if edit.op == "zero":
            change = old
        elif self.knockout:  # the probability that was taken away
            change = self.take(softmax(x, sinks_in(state.modules, self.point.module), None))
        elif self.entry.name == "scores":  # hidden ones may be infinite, and stay so
            change = torch.where(new == old, 0, new - old)
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
        """Which numbers of the edited part are no padding, and in no row that has ended; None where all are such."""
        text, selection = self.state.real, self.selection
        if selection.pos is not None:  # positions select no padding, so only rows that have ended are left out
            live = self.state.live
            text = None if live is None else torch.tensor(live)[:, None]
        if text is None or self.entry.visual:
            return None
        sizes = [1] * len(shape)
        sizes[0], sizes[2 if selection.attention else 1] = text.shape
        return self.take(text.to(device).view(sizes).expand(*shape))

    def check(self, rows: Rows) -> None:
        """Hold the edit's value against the part that it meets.

        Raises:
            PlanError: shape or dtype that do not fit.
        """
        edit = self.state.edits[self.number]
        if edit.op in TENSOR_OPS:
            key = (rows, edit.value.shape, edit.value.dtype)
            if self.checked is None or self.checked[0] is not rows or self.checked[1:] != key[1:]:
                check_value(edit, self.axes(len(rows.real), rows.width), self.state.dtype(), wide=self.entry.wide)
                self.checked = key
        elif edit.op in ROUTING:
            check_experts(self, edit)

    def hidden(self, rows: Rows, known: dict[Any, Any]) -> Hidden:
        """What a knockout hides in these rows.

        Args:
            known: columns by position, filled as they are worked out: knockouts of many layers and heads share them.
        """
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
