"""Module hooks: all that a plan does at one side of one module, as one hook.

    what passes: a module's input (before it runs) or output (after)
       │   the tensor itself, the first of a tuple, or an argument by its name
       │   layout.enter: as sites have it, where the block has it flat, scaled, or as patches of images
       ▼
    reads of sites that are edited elsewhere    what is edited here is only a use of them (see `_through`)
       ▼
    edits                                       by the hook points' rank, then in the plan's order
       ▼
    reads of sites that are edited here         so a read sees what the model goes on with
       ▼
    captured                                    for a hook further on that computes its value from this tensor too
       ▼
    state.after                                 hands a layer over, or ends the pass where nobody needs the rest
       │   layout.leave, and back into the tuple or the argument
       ▼
    what goes on; None where it is the tensor that came, so that the module's own tuple stays what it is

Values that are no view of a passing tensor (one head's or one expert's output, a router's logits) are computed from the
module's whole `Call` by the hook point, in the same order (`_derive`). Inside attention there is no module to hook: the
attention hook calls `stage` with its tensors there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.hook_points import KEYED, Call, HookPoint, first_argument
from ..errors import CapabilityError
from .pass_state import PassState
from .protocol import Change
from .router_edits import close
from .selection import Window
from .site_access import SiteEdit, SiteRead


class ModuleHook:
    """Everything that a plan does at one side of one module, or at one part of its attention.

    Attributes:
        changes: the plan's edits here, in the order in which they act.
        acting: what acts in a pass: `changes`, or in a sweep the `RowEdits` that are made of them.
        needs: hooks whose tensors a hook point here computes its value from.
        capture: another hook needs this one's tensor.
        captured: that tensor, until the pass ends.
        edited: while generating, keys or values so far as edits have left them. (The model's cache holds them
            unedited: it was filled before attention was called.)
    """

    __slots__ = (
        "_name", "acting", "capture", "captured", "changes", "edited", "module", "needs", "point", "reads", "state",
    )  # fmt: skip

    def __init__(self, state: PassState, module: nn.Module, point: HookPoint) -> None:
        self.state, self.module, self.point = state, module, point
        self.reads: list[SiteRead] = []
        self.changes: list[SiteEdit] = []
        self.acting: Sequence[Change] = self.changes
        self.needs: Sequence[ModuleHook] = ()
        self.capture = False
        self.captured: Tensor | None = None
        self.edited: Tensor | None = None
        self._name = ""

    @property
    def plain(self) -> bool:
        """Whether all that is done here is to keep the tensor that passes."""
        bare = not (self.changes or self.capture or self.point.layout)
        return bare and all(read.late and not read.entry.overwritten for read in self.reads)

    @property
    def derived(self) -> bool:
        """Whether a value here is computed from the module's whole call, not only from the first tensor."""
        return any([access.point.get for access in (*self.changes, *self.reads)])  # noqa: C419 (faster)

    def hook(self) -> tuple[dict[Any, Any], dict[Any, Any] | None, Any]:
        """The module's own hook table, its table of hooks that take keyword arguments if this is one, and the hook.

        Installing is writing it there with this object as the key, removing is deleting it. `register_forward_hook`
        does the same and makes a handle with a weak reference each time, which is most of what a short-lived hook
        costs. Hooks that others have registered are in the same tables, and run in the order in which they came.
        """
        module = self.module
        if self.point.side == "in":
            hook = self._keep_input() if self.plain else self.on_input()
            return module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook
        return module._forward_hooks, None, self._keep_output() if self.plain else self.on_output()

    def _keep_input(self) -> Callable[[Any, Any, Any], Any]:
        """The leanest hook for an input, for plans that only read: one list entry for each read, no call of ours.

        Gradients, and ending a pass, are known only when it runs; then the full hook does it.
        """
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
        """The leanest hook for an output; see `_keep_input`."""
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
        """The full hook for an output: `(module, args, output)` to the new output, None if it stays."""
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
            if new is first and (layout is None or not state.keep_graph):  # what a layout made is another tensor
                return None
            new = new if layout is None else layout.leave(new, passing)
            if single:
                return new
            return [new, *output[1:]] if output.__class__ is list else (new, *output[1:])

        return hook

    @property
    def name(self) -> str:
        """The argument that passes, for models that pass it by name: the hook point's, or the module's first."""
        if not self._name:
            self._name = self.point.part or first_argument(self.module)
        return self._name

    def _handed(self, kwargs: dict[str, Any]) -> Tensor:
        """The tensor that passes, of a module that is called with it by name.

        Raises:
            CapabilityError: nothing of that name.
        """
        handed = kwargs.get(self.name)
        if handed is None:
            site = (*self.reads, *self.changes)[0].site.name
            raise CapabilityError(f"{site}: {type(self.module).__name__} is not handed {self.name} by this model")
        return handed

    def on_input(self) -> Callable[[Any, Any, Any], Any]:
        """The full hook for an input: `(module, args, kwargs)` to new ones, None if they stay."""
        derived, layout, state = self.derived, self.point.layout, self.state

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if derived and self.point.in_block is not None:
                call = self._derive(Call(module, args, None, args[0], kwargs))
                return None if call.output is call.unedited else (self.point.in_block.handed(args, call.output), kwargs)
            passing = args[0] if args and not self.point.part else self._handed(kwargs)
            if derived:
                call = self._derive(Call(module, args, None, passing, kwargs))
                if args and not self.point.part:
                    return (call.first, *args[1:]), kwargs
                return args, {**call.kwargs, self.name: call.first}
            first = passing if layout is None else layout.enter(passing, state.shaped(layout))
            new = self._through(first)
            if new is first and (layout is None or not state.keep_graph):  # what a layout made is another tensor
                return None
            new = new if layout is None else layout.leave(new, passing)
            return ((new, *args[1:]), kwargs) if args and not self.point.part else (args, {**kwargs, self.name: new})

        return hook

    def stage(self) -> Callable[[Tensor, int], Tensor]:
        """What the attention hook calls with its tensor and the number of keys: gives the tensor's new value."""
        state, keyed, layout = self.state, self.point.part in KEYED, self.point.layout
        numbers = [read.number for read in self.reads] if self.plain else None

        def whole(x: Tensor, n_keys: int) -> Tensor:
            # What a layout makes of it is another tensor, so that it goes on only where something was changed.
            assert layout is not None
            first = layout.enter(x, state.shape)
            new = stage(first, n_keys)
            return x if new is first and not state.keep_graph else layout.leave(new, x)

        def stage(x: Tensor, n_keys: int) -> Tensor:
            window = state.window
            if window is None or not keyed:
                if numbers is not None and not state.keep_graph and self not in state.after:
                    for number in numbers:
                        state.record.values[number] = x
                    return x
                if window is not None and n_keys < window.stop:
                    # The layer's sliding window has dropped the first keys from its cache, which nobody knows before
                    # attention is called: in this layer the text's columns lie that much further to the left.
                    self._bind([*self.acting, *self.reads], Window(window.start, window.stop, window.stop - n_keys))
                return self._through(x)
            return self._keyed(x, n_keys, window)

        return stage if layout is None else whole

    def _bind(self, accesses: Sequence[Change | SiteRead], window: Window) -> None:
        for access in accesses:
            access.bind(self.state.rows, window)

    def _keyed(self, x: Tensor, n_keys: int, window: Window) -> Tensor:
        """Keys or values of a step `[batch head key d_head]`, which reach back to the first. Edits act on the step's
        own columns, and stay: what earlier steps edited takes the place of what the cache holds. Reads see all."""
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
        """Edits, then reads, of the tensor that passes."""
        state, reads = self.state, self.reads
        if reads and self.changes:
            # Several sites may be read at one place and edited at others: one norm's output is `attn_in` and `mlp_in`
            # where both follow it. An edit here is of one use; the sites of the other uses keep what came.
            for read in [read for read in reads if read.entry.write is not read.point]:
                x = read.keep(x, state)
            reads = [read for read in reads if read.entry.write is read.point]
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
        """Edits, then reads, where some are of values that the hook point computes from the module's whole call."""
        state = self.state
        call.shape = state.shape
        call.needs = tuple(module_hook.captured for module_hook in self.needs)  # type: ignore[misc]
        if self.point.in_block is not None:
            call.output = call.unedited = self.point.in_block.gathered(call.needs[0], call.args)
        for change in self.acting:
            if change.point.get is None:
                call.first = change.apply(call.first)
            else:
                change.derive(call)
        if call.proofs:  # what edits of a router have done is counted once all of them are there
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
