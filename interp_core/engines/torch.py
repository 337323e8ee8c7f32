"""Engine `torch`: a plan compiled to the fewest hooks on the model's own modules.

Every place that a plan touches (a module's input or output) gets one hook, every attention layer whose inside it
touches gets the attention tap. They are installed for a run and removed after it, whatever happens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..architectures.atlas import Atlas, Entry
from ..architectures.taps import Tap
from ..edits import Edit
from ..errors import CapabilityError, PlanError
from ..plan import Plan
from ..positions import Rows
from ..regions import Window
from ..sites import SITES, Site, indices
from .attention import LayerTap
from .ports import Change, Part, Port, Read
from .protocol import Passed

ORDER = {name: number for number, name in enumerate(SITES)}
FIRST = ("embed", "vision_embed", "deepstack")
"""What is there before the first block, in whatever layer it acts."""


class _Stop(BaseException):
    """Ends a forward pass whose remaining layers nobody needs."""


class TorchEngine:
    """The default engine. One per model; runs of the same model take turns.

    Args:
        model: a Hugging Face model; it is left as it is between runs.
    """

    name = "torch"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._embedding = model.get_input_embeddings()
        self.lock = threading.RLock()
        self.busy = False

    def compile(self, plan: Plan, atlas: Atlas) -> TorchProgram:
        """See `Engine.compile`."""
        return TorchProgram(self, plan, atlas)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._embedding.weight.dtype

    def begin(self) -> None:
        """One run at a time: another thread waits here, a run inside a run is refused."""
        self.lock.acquire()
        if self.busy:
            self.lock.release()
            raise PlanError("the model is running: a run inside another run's edit would see its hooks")
        self.busy = True

    def end(self) -> None:
        """Let the next run begin."""
        self.busy = False
        self.lock.release()


_NOTHING = Passed(0, 0)


class TorchProgram:
    """See `Program`."""

    def __init__(self, engine: TorchEngine, plan: Plan, atlas: Atlas) -> None:
        self.engine, self.atlas = engine, atlas
        self.edits: tuple[Edit, ...] = ()
        self.slots: list[Read] = []
        self.passed = _NOTHING
        self.rows: Rows = Rows((), {}, 0)
        self.window: Window | None = None
        self.shape = (0, 0)
        self.keep_graph = False
        self.stop_at: Port | None = None
        self._n_edits = len(plan.edits)
        self._ports: dict[tuple[str, str, str], Port] = {}
        self._by_tap: dict[Tap, Port] = {}
        self._add_reads(plan.reads)
        self._changes = self._add_edits(plan.edits)
        ports = list(self._ports.values())
        self._needed = [port for port in ports if port.capture]
        self._hooks = [(port, port.hook()) for port in ports if port.tap.side != "attention"]
        self._taps = self._layer_taps([port for port in ports if port.tap.side == "attention"])
        self._bound: list[Part] = [part for part in (*self._changes, *self.slots) if not part.whole]

    # Compiling

    def _port(self, tap: Tap) -> Port:
        key = (tap.module, tap.side, tap.part)
        port = self._ports.get(key)
        if port is None:
            port = self._ports[key] = Port(self, self.engine.modules[tap.module], tap)
        if tap.needs and not port.needs:
            port.needs = [self._port(need) for need in tap.needs]
            for need in port.needs:
                need.capture = True
        self._by_tap[tap] = port
        return port

    def _add_reads(self, reads: tuple[Site, ...]) -> None:
        """One slot per site and layer; kept lean, since plans may have thousands."""
        slots, entries, by_tap = self.slots, self.atlas.entries, self._by_tap
        for site in reads:
            one = entries.get((site.name, site.layers))  # type: ignore[arg-type]
            for entry in self.atlas.select(site) if one is None else (one,):
                units = site.units
                if units is not None and not (units.__class__ is int and 0 <= units < entry.n_units):  # type: ignore[operator]
                    indices(units, entry.n_units or 0, site.info.unit or "unit", str(site))
                tap = entry.read
                if tap is None:
                    raise CapabilityError(f"{site} cannot be read: {entry.why['read']}")
                read = Read(len(slots), entry, tap, site)
                slots.append(read)
                (by_tap.get(tap) or self._port(tap)).reads.append(read)

    def _last(self) -> Port | None:
        """The port that a forward pass reaches last, of those with reads."""
        last = max(self.slots, key=lambda read: self._place(read.entry), default=None)
        return None if last is None else self._by_tap[last.tap]

    def _place(self, entry: Entry) -> tuple[int, int]:
        """When a forward pass reaches a site, for comparison."""
        if entry.name in FIRST:
            return -1, ORDER[entry.name]
        layer = entry.layer if SITES[entry.name].layered else self.atlas.shape.n_layers
        return layer, ORDER[entry.name]

    def _add_edits(self, edits: tuple[Edit, ...]) -> list[Change]:
        changes = []
        for number, edit in enumerate(edits):
            for entry in self.atlas.select(edit.site):
                tap = entry.write
                if tap is None:
                    raise CapabilityError(f"{edit}: {entry.name} cannot be changed: {entry.why['write']}")
                if edit.op == "knockout" and tap.side == "attention":
                    tap = Tap(tap.module, "attention", "scores", rank=1)
                changes.append(Change(self, number, edit, entry, tap))
                self._port(tap).changes.append(changes[-1])
        for port in self._ports.values():
            port.changes.sort(key=lambda change: change.tap.rank)
            # a read of the whole stream must see the tensor before one that only follows this port branches it off
            port.reads.sort(key=lambda read: read.entry.write is read.tap)
        return changes

    def _layer_taps(self, ports: list[Port]) -> list[LayerTap]:
        stages: dict[str, dict[str, Any]] = {}
        for port in ports:
            stages.setdefault(port.tap.module, {})[port.tap.part] = port.stage()
        lent: dict[int, Any] = {}
        return [LayerTap(self.engine.modules[path], found, lent) for path, found in stages.items()]

    # Running

    def forward(
        self, call: Callable[[], Any], rows: Rows, edits: tuple[Edit, ...], *, keep_graph: bool, stop: bool
    ) -> Passed:
        """See `Program.forward`."""
        self.engine.begin()
        try:
            self.window, self.edits = None, edits
            passed = self._begin(rows, rows.width, keep_graph)
            for change in self._changes:
                change.check(rows)
            self.stop_at = self._last() if stop else None
            self._install()
            passed.output = call()
        except _Stop:
            pass
        finally:
            self._end()
        return passed

    def generate(
        self, call: Callable[[], Any], rows: Rows, final: Rows, edits: tuple[Edit, ...]
    ) -> tuple[Any, list[Passed]]:
        """See `Program.generate`."""
        steps: list[Passed] = []
        real = [list(row) for row in rows.real]
        prompt = [len(row) for row in real]
        columns = 0

        def step(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal columns
            ids = kwargs.get("input_ids")
            width = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
            start, columns = columns, columns + width
            for row in real:
                row.extend(range(max(start, rows.width), columns))
            self.window = Window(start, columns)
            steps.append(self._begin(Rows(real, rows.names, columns, prompt, growing=True), width, False))

        self.engine.begin()
        handle = None
        try:
            self.window, self.stop_at, self.edits = None, None, edits
            self._check(final)
            handle = self.engine.model.register_forward_pre_hook(step, with_kwargs=True)
            self._install()
            result = call()
        finally:
            if handle is not None:
                handle.remove()
            self._end()
        return result, steps

    def _check(self, rows: Rows) -> None:
        """Hold every edit's positions and value against the rows that it will meet."""
        for part in self._bound:
            part.bind(rows, None)
        for change in self._changes:
            change.check(rows)

    def check_reach(self, edits: tuple[Edit, ...]) -> None:
        """See `Program.check_reach`."""
        top = max(self._place(slot.entry) for slot in self.slots)
        for change in self._changes:
            if self._place(change.entry) > top:
                raise PlanError(
                    f"{edits[change.number]} lies above the last site read, so with logits=False it never acts"
                )

    def _begin(self, rows: Rows, width: int, keep_graph: bool) -> Passed:
        """Make ready for one pass over `width` columns."""
        self.rows, self.keep_graph = rows, keep_graph
        self.shape = (len(rows.real), width)
        for part in self._bound:
            part.bind(rows, self.window)
        self.passed = Passed(len(self.slots), self._n_edits)
        return self.passed

    def _install(self) -> None:
        for port, (table, with_kwargs, hook) in self._hooks:
            table[port] = hook
            if with_kwargs is not None:
                with_kwargs[port] = True
        for tap in self._taps:
            tap.install()

    def _end(self) -> None:
        """Take everything away, and let go of the run's tensors."""
        for tap in self._taps:
            tap.remove()
        for port, (table, with_kwargs, _) in self._hooks:
            if port in table:
                del table[port]
            if with_kwargs is not None and port in with_kwargs:
                del with_kwargs[port]
        self.edits, self.passed = (), _NOTHING
        for port in self._needed:
            port.captured = None
        self.engine.end()

    def end_pass(self) -> None:
        """End the forward pass here: nobody waits for what lies above. (Unless a family computes its parts in another
        order than usual, and something is still to come: then the pass goes on.)"""
        if not any(value is None for value in self.passed.values):
            raise _Stop
