"""Plans on another machine, through nnsight: NDIF, or its simulation in this process.

What travels is plain data. Every read and edit of a module's tensor is a strided view of it (sizes, strides, offset)
and an index, worked out here; the code that travels along is the body of one `with` block that knows torch and nothing
else, so the other side needs no interp_core. What is no strided view of one module's tensor (attention inside, routers,
head and expert outputs, writing `resid_mid`), `apply`, gradients and generation are refused before anything is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import CapabilityError
from ...plan import Plan
from ...positions import Rows
from ...sites import SITES, Edit
from ..hooks import ModuleHook
from ..operations import edit_value
from ..program import HookProgram
from ..protocol import HandOver, PassRecord
from ..site_access import SiteAccess
from .base import TracedEngine, library

if TYPE_CHECKING:
    from ...architectures.atlas import Atlas
    from ...architectures.hook_points import HookPoint

OPS = ("set", "add", "scale", "zero", "project")
WHY = "remotely a plan is plain data on module tensors. Load without remote for this"


def adapt(atlas: Atlas) -> None:
    """Take out of an atlas what does not travel."""
    for (name, _), entry in list(atlas.entries.items()):
        why = f"{name} does not travel; {WHY}"
        if "query" in SITES[name].axes or not _plain(entry.read):
            atlas.drop(name, why)
        elif not _plain(entry.write):
            entry.write, entry.why = None, {"write": why} | entry.why
    for entry in atlas.entries.values():
        entry.why |= {"grad": f"gradients do not travel; {WHY}", "generate": f"generation does not travel; {WHY}"}


def _plain(point: HookPoint | None) -> bool:
    """Whether a hook point's value is a strided view of one module's tensor."""
    return point is not None and not point.inside and point.get is None and point.layout is None


class RemoteProgram(HookProgram):
    """Hooks as data, carried out by one block of code elsewhere.

    Of `HookProgram` it has the half that compiles; running is a request.
    """

    engine: TracedEngine

    def __init__(self, engine: TracedEngine, plan: Plan, atlas: Atlas) -> None:
        super().__init__(engine, plan, atlas)
        for edit in plan.edits:
            if edit.op not in OPS:
                raise CapabilityError(f"{edit}: {edit.op} does not travel; {WHY}")

    def execute(self, method: str, inputs: Mapping[str, Any]) -> Any:
        """Never called: `forward` sends the plan off, and the model is called on the other machine."""
        raise NotImplementedError

    def forward(
        self, inputs: Mapping[str, Any], rows: Rows, edits: tuple[Edit, ...], *, keep_graph: bool, stop: bool,
        each: HandOver | None = None, attention: bool = False,
    ) -> PassRecord:  # fmt: skip
        """See `Program.forward`."""
        import httpx  # nnsight's, as this engine is; what only measures plans does not have it

        if keep_graph:
            raise CapabilityError(f"a graph does not travel; {WHY}")
        if each is not None:
            raise CapabilityError(f"the function each= does not travel; {WHY}")
        self.engine.acquire()
        try:
            self.state.window, self.state.edits = None, edits
            record = self.begin_pass(rows, rows.width, False)
            self._check(rows)
            order = self.engine.order(inputs)
            hooks = sorted(self.hooks, key=lambda hook: order[hook.point.module, hook.point.side].rank)
            wire = [(hook.point.module, hook.point.side, self._actions(hook, order)) for hook in hooks]
            kept, norms, logits = self._sent(wire, inputs, stop)
        except (OSError, httpx.HTTPError) as error:
            raise CapabilityError(
                f"{self.engine.host} cannot be reached ({type(error).__name__}: {error}); check the network, or load "
                "with remote='local' to try a plan here"
            ) from error
        finally:
            self._end()
        for slot, value in kept.items():
            record.values[slot] = value
        for change in self._changes:
            if id(change) in norms:
                columns = None if change.bound is None else change.bound.columns
                record.fires.append((change.number, change.entry.layer, columns, norms[id(change)]))
        record.output = SimpleNamespace(logits=logits)
        return record

    def _actions(self, hook: ModuleHook, order: Mapping[Any, Any]) -> list[dict[str, Any]]:
        """What is done at a hook: changes, then reads, each with its place in the tensor."""
        width = order[hook.point.module, hook.point.side].width
        actions = []
        for change in hook.changes:
            if not change.idle:
                edit = self.state.edits[change.number]
                value = edit_value(edit, torch.empty(0, dtype=self.engine.dtype))
                real = change.real(self._seen(change, width).shape, torch.device("cpu"))
                more = {"op": edit.op, "value": value, "number": id(change), "real": real}
                actions.append(self._spot(change, width) | more)
        for read in hook.reads:
            if not read.idle:
                spot = self._spot(read, width)
                if read.late:  # its view is applied here, when asked for
                    spot["view"] = None
                actions.append(spot | {"op": "read", "number": read.number})
        return actions

    def _spot(self, part: SiteAccess, width: int) -> dict[str, Any]:
        """Where a part lies in its module's tensor: sizes, strides and offset of the hook point's view, and an index in
        it."""
        index = None if part.bound is None else part.bound.index(torch.device("cpu"))
        if part.point.view is None:
            return {"view": None, "index": index}
        viewed = self._seen(part, width)
        return {"view": (tuple(viewed.size()), viewed.stride(), viewed.storage_offset()), "index": index}

    def _seen(self, part: SiteAccess, width: int) -> Tensor:
        """What passes where a part is, in its site's axes: sizes and strides without numbers."""
        x = torch.empty(*self.state.shape, width, device="meta")
        return x if part.point.view is None else part.point.view(x)

    def _sent(self, wire: list[Any], inputs: Mapping[str, Any], stop: bool) -> tuple[dict[Any, Any], Any, Any]:
        """Send the plan off; returns kept tensors, norms of changes, logits.

        nnsight sends the source of the `with` block. So it must stand on its own, and spells the edits of
        `operations.py` and the order of `hooks.py` once more.
        """
        nnsight, model, remote = library(), self.engine.nnsight, self.engine.remote
        logits = None
        with model.trace(remote=remote, **inputs) as tracer:
            kept, norms = nnsight.save({}), nnsight.save({})
            for path, side, actions in wire:
                envoy = model.get(path)
                whole = envoy.input if side == "in" else envoy.output
                x = whole if isinstance(whole, torch.Tensor) else whole[0]
                changed = False
                for action in actions:
                    if action["op"] != "read" and not changed:
                        x, changed = x.contiguous().clone(), True
                    x = x.contiguous()
                    part = x
                    if action["view"] is not None:
                        size, stride, offset = action["view"]
                        part = torch.as_strided(x, size, stride, x.storage_offset() + offset)
                    index = ... if action["index"] is None else action["index"]
                    old, value = part[index].clone(), action.get("value")
                    if isinstance(value, torch.Tensor):
                        value = value.to(x.device)
                    if action["op"] == "read":
                        kept[action["number"]] = old
                        continue
                    if action["op"] == "set":
                        new = value.expand_as(old)
                    elif action["op"] == "add":
                        new = old + value
                    elif action["op"] == "scale":
                        new = old * value
                    elif action["op"] == "zero":
                        new = torch.zeros_like(old)
                    else:
                        new = old - (old @ value.mT) @ value
                    part[index] = new
                    gap = new - old
                    if action["real"] is not None:
                        gap = torch.where(action["real"].to(x.device), gap, 0)
                    norms[action["number"]] = torch.linalg.vector_norm(gap)
                if changed:
                    new = x if isinstance(whole, torch.Tensor) else (x, *whole[1:])
                    if side == "in":
                        envoy.input = new
                    else:
                        envoy.output = new
            if stop:
                tracer.stop()
            else:
                logits = model.output.logits.save()
        return kept, norms, logits
