"""A plan compiled to hooks, which the engines of this package share, and how a compiled plan runs.

`HookProgram` has two halves. Compiling turns sites into hook points (by the atlas), and these into one `ModuleHook` for
every side of a module that the plan touches and one `AttentionHook` for every layer that it looks into; what the plan
asks for and the model lacks is refused there. Running binds positions to the rows of a batch, checks the edits'
values against them, calls the model and gives back a `PassRecord`:

    begin_pass   rows and columns of this pass; the record is empty
    execute      the engine calls the model with the hooks in their places, and takes them out again
    PassState    what the hooks read and write meanwhile
    _end         lets go of the run's tensors, so that a compiled plan holds none between runs

How the model's values come to the hooks is the engine's: `execute` is all that it must write. `LocalEngine` is the half
of an engine that does not depend on this: the modules, their turn, and that a run inside a run is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..architectures.atlas import Atlas, Entry
from ..architectures.hook_points import INSIDE, HookPoint
from ..errors import CapabilityError, InterpError, PlanError
from ..indexing import indices
from ..plan import Plan
from ..positions import Rows
from ..sites import ROUTING, SITES, Edit, Site
from ..snapshot import Place
from .attention import AttentionHook, OnceOfSeveral
from .attention_own import OwnAttention
from .attention_rows import AttentionRows
from .hooks import ModuleHook
from .knockout import check_knockouts
from .layers import Layers
from .operations import write_point
from .pass_state import NOTHING, PassState, text_columns
from .protocol import Ending, HandOver, PassRecord
from .router_edits import TURN, check_together
from .selection import BoundSelection
from .site_access import SiteAccess, SiteEdit, SiteRead
from .steps import Steps
from .turns import turn_of
from .uncompiled import Uncompiled

FIRST = ("embed", "vision_embed", "deepstack")
"""What is there before the first block, in whatever layer it acts."""
TOWER = 1 << 20
"""More layers than any vision tower has; all of them run before the first block."""


def forward_order(entry: Entry, n_layers: int) -> tuple[int, float]:
    """When a forward pass reaches a site, for comparison."""
    info = SITES[entry.name]
    if info.tower:
        return (entry.layer if info.layered else TOWER) - TOWER - 2, entry.order
    if entry.name in FIRST:
        return -1, entry.order
    return entry.layer if info.layered else n_layers, entry.order


class Stop(BaseException):
    """Ends a forward pass whose remaining layers nobody needs. No `Exception`: a model may catch those."""


class LocalEngine:
    """An engine that runs a model in this process, for whoever holds the turn.

    Args:
        model: the model that it runs: the user's own, or a copy with the same weights.
        beside: what else nothing may run on meanwhile: the user's own model, a mark of a library that has one state for
            the whole process.

    Attributes:
        name: as registered.
        modules: the model's modules by path.
        turn: the right to run on them, and on what is beside.
    """

    name: str
    program: ClassVar[type[HookProgram]]
    attends = True
    """Whether `forward` can keep what attention was called with."""
    runs_rows: ClassVar[bool] = False
    """Whether sweeps may run passes of their own on it: `TorchProgram`s on the user's own modules, in which rows join
    late and only some columns are there. A class says so of itself; a subclass may run otherwise, and says it again."""

    def __init__(self, model: Any, *beside: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._embedding = model.get_input_embeddings()
        self.turn = turn_of(model, *beside)
        self._uncompiled = Uncompiled(self.modules.values())

    def adapt(self, atlas: Atlas) -> None:
        """See `Engine.adapt`."""

    def compile(self, plan: Plan, atlas: Atlas) -> HookProgram:
        """See `Engine.compile`."""
        return self.program(self, plan, atlas)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._embedding.weight.dtype

    def places(self, paths: Iterable[str]) -> tuple[Place, ...]:
        """Where modules hang that lie on the way from the model to those at these paths: a plan is compiled again when
        one of them has been exchanged (`snapshot.py`)."""
        places: dict[str, Place] = {}
        for path in paths:
            while path and path not in places:
                outer, _, name = path.rpartition(".")
                places[path] = self.modules[outer]._modules, name, self.modules[path]
                path = outer
        return tuple(places.values())

    def acquire(self) -> None:
        """Begin a run, for whoever holds the turn; `release` ends it.

        Raises:
            PlanError: it would be a run inside another run of some of these modules, and meet that one's hooks.
        """
        running = self.turn.running
        if running:
            self.turn.demand_idle(self.modules)
        running += (self.modules,)
        if self._uncompiled.modules:
            self._uncompiled.begin()

    def release(self) -> None:
        """End the run that `acquire` began."""
        if self._uncompiled.modules:
            self._uncompiled.end()
        del self.turn.running[-1]


class HookProgram(ABC):
    """A plan as hooks: what is done at each place that it touches. See `Program`.

    Attributes:
        slots: the plan's reads, one for each layer.
        hooks: those on modules, in no order.
        attn_hooks: those inside attention, one for each layer that is looked into.
        places: where the modules with hooks hang in the model.
        in_tower: some edit or read at chosen positions is in a vision tower, which runs before the model's first layer.
    """

    read: ClassVar[type[SiteRead]] = SiteRead
    closes: ClassVar[bool] = True
    """Whether attention is opened for the queries that are asked for alone, where these are few."""

    def __init__(self, engine: LocalEngine, plan: Plan, atlas: Atlas) -> None:
        self.engine, self.atlas = engine, atlas
        self.state = PassState(engine.modules, lambda: engine.dtype)
        self.slots: list[SiteRead] = []
        # For what knockouts, and edits of routers together, were found right last: the same again need no new look.
        self._left_for: Rows | None = None
        self._routed_for: tuple[Rows, tuple[Edit, ...]] | None = None
        self._hook_at: dict[tuple[str, str, str], ModuleHook] = {}
        self._by_point: dict[HookPoint, ModuleHook] = {}  # by identity, to find a hook without making its key
        self._add_reads(plan.reads)
        self.n_slots = len(self.slots)
        self._changes = self._add_edits(plan.edits)
        hooks = list(self._hook_at.values())
        self._needed = [hook for hook in hooks if hook.capture]
        self.hooks = [hook for hook in hooks if hook.point.side not in INSIDE]
        self._inside = [hook for hook in hooks if hook.point.side in INSIDE]
        self.attn_hooks = self._attn_hooks(self._inside)
        self._knockouts = [change for change in self._changes if plan.edits[change.number].op == "knockout"]
        self._rerouting = [change for change in self._changes if plan.edits[change.number].op in ROUTING]
        self._late = [slot.number for slot in self.slots if slot.late and slot.point.side not in INSIDE]
        self.places = engine.places(hook.point.module for hook in hooks)
        self._bound: list[SiteAccess] = [access for access in (*self._changes, *self.slots) if not access.whole]
        self.in_tower = any([access.entry.tower for access in self._bound])  # noqa: C419 (faster)
        self._few = [
            (attn_hook, accesses)
            for attn_hook in self.attn_hooks
            if self.closes and (accesses := self._few_queries(attn_hook))
        ]

    # Compiling

    def _hook(self, point: HookPoint) -> ModuleHook:
        key = (point.module, point.side, point.part)
        hook = self._hook_at.get(key)
        if hook is None:
            hook = self._hook_at[key] = ModuleHook(self.state, self.engine.modules[point.module], point)
        if point.needs and not hook.needs:
            hook.needs = [self._hook(need) for need in point.needs]
            for need in hook.needs:
                need.capture = True
        self._by_point[point] = hook
        return hook

    def _add_reads(self, reads: tuple[Site, ...]) -> None:
        """One slot per site and layer; kept lean, since plans may have thousands."""
        slots, entries, by_point, make = self.slots, self.atlas.entries, self._by_point, self.read
        for site in reads:
            exact = entries.get((site.name, site.layers))  # type: ignore[arg-type]
            for entry in self.atlas.select(site) if exact is None else (exact,):
                units = site.units
                if units is not None and not (units.__class__ is int and 0 <= units < entry.n_units):  # type: ignore[operator]
                    indices(units, entry.n_units or 0, site.info.unit or "unit", site)
                point = entry.read
                if point is None:
                    raise CapabilityError(f"{site} cannot be read: {entry.why['read']}")
                read = make(len(slots), entry, point, site)
                slots.append(read)
                (by_point.get(point) or self._hook(point)).reads.append(read)

    def ending(self) -> dict[ModuleHook, Callable[[], None]]:
        """What ends a pass: the hook that a forward pass reaches last, of those with reads."""
        last = max(self.slots, key=lambda read: forward_order(read.entry, self.atlas.shape.n_layers), default=None)
        return {} if last is None else {self._by_point[last.point]: self.end_pass}

    def hook_of(self, read: SiteRead) -> ModuleHook:
        """Where a read's value passes."""
        return self._by_point[read.point]

    def _add_edits(self, edits: tuple[Edit, ...]) -> list[SiteEdit]:
        changes = []
        for number, edit in enumerate(edits):
            for entry in self.atlas.select(edit.site):
                point = write_point(self.atlas, edit, entry)
                changes.append(self._change(number, edit, entry, point))
                self._hook(point).changes.append(changes[-1])
        for hook in self._hook_at.values():
            hook.changes.sort(key=lambda change: (change.point.rank, TURN.get(edits[change.number].op, 0)))
            # a read of the whole stream must see the tensor before one that only follows this hook branches it off
            hook.reads.sort(key=lambda read: read.entry.write is read.point)
        return changes

    def _change(self, number: int, edit: Edit, entry: Entry, point: HookPoint) -> SiteEdit:
        return SiteEdit(self.state, number, edit, entry, point)

    def _attn_hooks(self, hooks: list[ModuleHook]) -> list[AttentionHook]:
        stages: dict[tuple[str, str], dict[str, Any]] = {}
        kv_heads: dict[str, int] = {}
        for hook in hooks:
            stage = hook.stage() if hook.point.calls == 1 else OnceOfSeveral(hook.stage(), hook.point.calls)
            stages.setdefault((hook.point.module, hook.point.side), {})[hook.point.part] = stage
            if hook.point.part == "rot_k":
                kv_heads[hook.point.module] = (*hook.reads, *hook.changes)[0].entry.sizes["head"]
        config_copies: dict[int, Any] = {}
        modules = self.engine.modules
        attn_hooks = [
            AttentionHook(modules[path], by_part, config_copies)
            if side == "attention"
            else OwnAttention(modules[path], by_part, kv_heads.get(path, 0))
            for (path, side), by_part in stages.items()
        ]
        for attn_hook in attn_hooks:
            attn_hook.hides = self.closes and self._only_hides(attn_hook)
        return attn_hooks

    def _only_hides(self, layer: AttentionHook) -> bool:
        """Whether all that is done with a layer's scores and patterns is to hide keys."""
        inside = [p for p in self._inside if p.module is layer.module and p.point.part in ("scores", "pattern")]
        changes = [change for hook in inside for change in hook.changes]
        return all(change.knockout for change in changes) and not any(p.reads or p.capture for p in inside)

    def _few_queries(self, layer: AttentionHook) -> list[SiteAccess]:
        """What selects queries of a layer's scores and patterns; nothing if something asks for all of them."""
        hooks = [p for p in self._inside if p.module is layer.module and p.point.part in ("scores", "pattern")]
        accesses = [access for hook in hooks for access in (*hook.changes, *hook.reads)]
        few = all(access.selection.attention and access.selection.pos is not None for access in accesses)
        return accesses if few else []

    # Running

    @abstractmethod
    def execute(self, method: str, inputs: Mapping[str, Any]) -> Any:
        """Call a method of the model (`forward` or `generate`) with every hook in its place, and leave the model as it
        was, whatever happens."""

    def prepare(self, inputs: Mapping[str, Any]) -> None:  # noqa: B027 (most have nothing to prepare)
        """What an engine has to do once before the model runs on inputs of a kind, while no hook is in its place."""

    def forward(
        self, inputs: Mapping[str, Any], rows: Rows, edits: tuple[Edit, ...], *, keep_graph: bool, stop: bool,
        each: HandOver | None = None, attention: bool = False,
    ) -> PassRecord:  # fmt: skip
        """See `Program.forward`."""
        self.engine.acquire()
        attn_hooks = self.attn_hooks
        try:
            self.prepare(inputs)
            self.state.window, self.state.edits = None, edits
            noting = self._noting() if attention else {}
            record: PassRecord | None = None
            layers = None if each is None else Layers(self, each, stop=stop)
            # A second round where the model wrote into a kept tensor: now that the site is known to be overwritten,
            # its reads make copies.
            while record is None or (self._late and self._overwritten((record,))):
                record = self.begin_pass(rows, rows.width, keep_graph)
                self._check(rows)
                for layer, attn_hook in noting.items():
                    attn_hook.note = partial(self._noted, layer, attn_hook)
                self.state.after = layers.after if layers else self.ending() if stop else {}
                try:
                    record.output = self.execute("forward", inputs)
                except Stop:
                    pass
            if layers:
                layers.finish()
            return record
        finally:
            for attn_hook in self.attn_hooks:
                attn_hook.note = None
            self.attn_hooks = attn_hooks
            self._end()

    def _noting(self) -> dict[int, AttentionHook]:
        """A hook on the attention of every layer that has an open one; those of the plan are among them."""
        scores = {entry.layer: entry.read for (name, _), entry in self.atlas.entries.items() if name == "scores"}
        modules = {layer: self.engine.modules[point.module] for layer, point in scores.items() if point is not None}
        known = {id(attn_hook.module): attn_hook for attn_hook in self.attn_hooks}
        config_copies: dict[int, Any] = {}
        noting = {i: known.get(id(module)) or AttentionHook(module, {}, config_copies) for i, module in modules.items()}
        self.attn_hooks = [*self.attn_hooks, *(hook for hook in noting.values() if id(hook.module) not in known)]
        return noting

    def _noted(
        self,
        layer: int,
        attn_hook: AttentionHook,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        called: dict[str, Any],
    ) -> None:
        """Keep what a layer's attention was called with."""
        self.state.record.attention[layer] = AttentionRows(
            query, key, mask, called, attn_hook.module, attn_hook.softmax_dtype
        )

    def generate(
        self, inputs: Mapping[str, Any], rows: Rows, final: Rows, edits: tuple[Edit, ...], ends: Ending
    ) -> tuple[Any, list[PassRecord]]:
        """See `Program.generate`."""
        self.engine.acquire()
        steps: Steps | None = None
        try:
            self.state.window, self.state.after, self.state.edits = None, {}, edits
            self._fit(final)
            self.prepare(inputs)
            steps = Steps(self, self.engine.model, rows, ends)
            result = self.execute("generate", inputs)
            if self._overwritten(steps.passes):
                raise CapabilityError(
                    "the model wrote into a tensor after it was kept, which the self-check at load finds out; load "
                    "with check=True, or generate again: from now on such tensors are copied"
                )
        except (ValueError, TypeError, ImportError) as error:
            if (steps and steps.passes) or isinstance(error, InterpError):
                raise
            raise PlanError(f"transformers does not take these options: {error}") from error
        finally:
            if steps is not None:
                steps.close()
            self._end()
        return result, steps.passes

    def _overwritten(self, passes: Sequence[PassRecord]) -> bool:
        """Whether the model wrote into a tensor after it was kept. Such sites are marked, and copied in further passes;
        the self-check at load, which reads every site, leaves hardly any to be found here.

        Raises:
            CapabilityError: the model wrote into a copy.
        """
        written = [self.slots[number].entry for number in self.written(passes)]
        if not written:
            return False
        if known := [entry for entry in written if entry.overwritten]:
            raise CapabilityError(
                f"{known[0].name}[{known[0].layer}]: the model writes into this tensor in a way that reads cannot keep "
                "apart; read it at positions, or without grad"
            )
        for entry in written:
            entry.overwritten = True
        self.listen()
        return True

    def written(self, passes: Sequence[PassRecord]) -> list[int]:
        """Slots that hold a tensor into which the model wrote after it was kept."""
        return [
            number
            for record in passes
            for number in self._late
            if (x := record.values[number]) is not None and x._version != record.versions[number]
        ]

    def break_off(self) -> None:
        """End this pass before its end, from within a hook."""
        raise Stop

    def listen(self) -> None:  # noqa: B027 (most make their hooks for each pass)
        """Make the hooks anew, where sites turned out to be overwritten: their lean hooks keep no copies."""

    def _fit(self, rows: Rows) -> None:
        """Hold every edit's positions and value against the rows that it will meet."""
        known: dict[Any, SiteAccess] = {}
        for access in self._bound:  # an index is the same in every layer, so it is made once
            selection = access.selection
            alike = known.setdefault(
                (type(access), selection.site.name, selection.pos, selection.key, selection.units), access
            )
            if alike is access:
                access.bind(rows, None)
            else:
                access.bound, access.bound_to = alike.bound, alike.bound_to
        self._check(rows)

    def _check(self, rows: Rows) -> None:
        """Hold every edit's value, and what knockouts leave, against the rows that the edits are bound to."""
        for change in self._changes:
            change.check(rows)
        if len(self._rerouting) > 1 and (self._routed_for is None or self._routed_for != (rows, self.state.edits)):
            check_together(self._rerouting, rows)
            self._routed_for = rows, self.state.edits
        if self._knockouts and self._left_for is not rows:  # the same tokens again need no new look
            known: dict[Any, Any] = {}
            check_knockouts([change.hidden(rows, known) for change in self._knockouts], self.atlas.reaches, rows)
            self._left_for = rows

    def check(self, rows: Rows, edits: tuple[Edit, ...]) -> None:
        """See `Program.check`."""
        self.engine.acquire()
        try:
            self.state.edits = edits
            self._fit(rows)
        finally:
            self._end()

    def check_reach(self, edits: tuple[Edit, ...]) -> None:
        """See `Program.check_reach`."""
        n_layers = self.atlas.shape.n_layers
        top = max(forward_order(slot.entry, n_layers) for slot in self.slots)
        for change in self._changes:
            if forward_order(change.entry, n_layers) > top:
                raise PlanError(
                    f"{edits[change.number]} lies above the last site read, so with logits=False it never acts"
                )

    def begin_pass(self, rows: Rows, width: int, keep_graph: bool) -> PassRecord:
        """Make ready for one pass over `width` columns; its record, still empty."""
        self.state.rows, self.state.keep_graph = rows, keep_graph
        self.state.shape = (len(rows.real), width)
        self.state.real, self.state.live = text_columns(rows, self.state.window), rows.live
        for access in self._bound:
            access.bind(rows, self.state.window)
        for attn_hook in self.attn_hooks:
            attn_hook.filled = None if self.state.window is None else self.state.window.stop
        for attn_hook, accesses in self._few:
            self._ask(attn_hook, accesses, width)
        self.state.record = PassRecord(self.n_slots)
        return self.state.record

    def _ask(self, layer: AttentionHook, accesses: Sequence[SiteAccess], width: int) -> None:
        """Let a layer open its attention for the selected queries alone, where these are at most half of the columns:
        the kernel does all of them beside, so more would cost more than opening all."""
        bounds = [access.bound for access in accesses if access.bound is not None]
        columns = sorted({column for bound in bounds for row in bound.columns or () for column in row})
        layer.queries = [] if layer.hides and layer.has_kernel and not bounds else None
        if bounds and layer.has_kernel and (layer.hides or 2 * len(columns) <= width):
            start = 0 if self.state.window is None else self.state.window.start
            layer.queries = [column - start for column in columns]
            for access in accesses:  # of scores and patterns that have these queries alone
                access.bound = None if access.bound is None else access.bound.among(columns)
                access.bound_to = None  # the next pass may ask for others

    def steady(self, rows: Rows) -> list[BoundSelection] | None:
        """What this step selects, if all further steps select the same of their tokens; else None."""
        if self.attn_hooks or not all(access.settled(rows) for access in self._bound):
            return None
        return [access.bound for access in self._bound if access.bound is not None and access.bound.columns is not None]

    def _end(self) -> None:
        """Let go of the run's tensors, and of the engine."""
        self.state.edits, self.state.record = (), NOTHING
        for change in self._changes:
            change.ready = None
        for hook in self._needed:
            hook.captured = None
        for hook in self._inside:
            hook.edited = None
        self.engine.release()

    def end_pass(self) -> None:
        """End the forward pass here: nobody waits for what lies above. (Unless a family computes its parts in another
        order than usual, and something is still to come: then the pass goes on.)"""
        if not any(value is None for value in self.state.record.values):
            raise Stop
