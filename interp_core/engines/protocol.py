"""What an engine is: it compiles plans for one model and runs them.

`Engine`, `Program` and `Slot` are protocols, so an engine of another package needs none of our classes. What a program
gives back is a `PassRecord`, which everything above the engines reads: runs, receipts, gradients, sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..architectures.atlas import Atlas, Entry
from ..architectures.family import View
from ..architectures.hook_points import Call, HookPoint
from ..architectures.rerouting import Proof
from ..plan import Plan
from ..plugins import name_fault
from ..positions import Rows
from ..sites import Edit, Site
from .attention_rows import AttentionRows
from .selection import BoundSelection, Window


@runtime_checkable
class Slot(Protocol):
    """One value that a program keeps: a read in one layer.

    Attributes:
        entry: the site in its layer.
        site: the read, for its units and positions.
        late: the kept tensor is the one that passed, still without the hook point's view.
    """

    entry: Entry
    site: Site
    late: bool

    @property
    def view(self) -> View | None:
        """How a late value is seen in the site's axes; None where it has them."""


def viewed(slot: Slot, value: Tensor) -> Tensor:
    """What a slot keeps, in its site's axes: a late value is seen so only now, when somebody asks for it."""
    return slot.view(value) if slot.late and slot.view is not None else value


class PassRecord:
    """What one forward pass of a program left behind.

    Attributes:
        values: kept tensors, one per slot (None if the pass did not reach it, or computed none of its positions).
        versions: per kept tensor that is the very one that passed, how often it had been written to by then.
        bases: with gradients, the tensors of the pass that `values` are views or parts of, and which parts.
        fires: what edits changed: `(number in the plan, layer, selected columns per row or None for all, norm)`.
        routed: proofs of edits of routers, closed.
        output: the model's output, None after an early stop.
        attention: by layer, what its attention was called with, until the layer is handed over.
    """

    __slots__ = ("attention", "bases", "fires", "output", "routed", "values", "versions")

    def __init__(self, n_slots: int) -> None:
        self.values: list[Tensor | None] = [None] * n_slots
        self.versions = [0] * n_slots
        self.bases: list[tuple[Tensor, BoundSelection | None] | None] = [None] * n_slots
        self.fires: list[tuple[int, int, list[list[int]] | None, Tensor]] = []
        self.routed: list[Proof] = []
        self.output: Any = None
        self.attention: dict[int, AttentionRows] = {}


@runtime_checkable
class Change(Protocol):
    """What acts on the tensor that passes a hook: a `SiteEdit`, or the edits of many rows of a sweep.

    Attributes:
        point: where the value is.
    """

    point: HookPoint

    def bind(self, rows: Rows, window: Window | None) -> None:
        """Turn its positions into an index of a pass' rows (and of the columns in the window)."""

    def apply(self, x: Tensor) -> Tensor:
        """The tensor that the model goes on with, in the place of `x`."""

    def derive(self, call: Call) -> None:
        """Change a value that the hook point computes from a module's whole call."""


HandOver = Callable[[int, list[int], PassRecord], None]
"""What is called with a layer, the numbers of its slots and the record of the pass."""


@runtime_checkable
class Ending(Protocol):
    """What a generation tells its program.

    Attributes:
        follow: called with the number of columns so far, after every new token.
    """

    follow: Callable[[int], None] | None

    def now(self) -> Sequence[bool]:
        """Which rows have ended and are only filled up; empty before the first new token."""


@runtime_checkable
class Program(Protocol):
    """A plan compiled for one model: its reads, and its edits without their values, which every run brings along.

    Reusable; not for two threads at once.
    """

    @property
    def slots(self) -> Sequence[Slot]:
        """One for each read and layer of the plan, in the plan's order; a record's values are numbered as they are."""

    def forward(
        self, inputs: Mapping[str, Any], rows: Rows, edits: tuple[Edit, ...], *, keep_graph: bool, stop: bool,
        each: HandOver | None = None, attention: bool = False,
    ) -> PassRecord:  # fmt: skip
        """One forward pass.

        Args:
            inputs: what the model is called with.
            edits: those that the program was compiled for, or the same with other values.
            keep_graph: keep what gradients need.
            stop: end the pass after the last slot; the output is then None.
            each: called for a layer as soon as all its slots have passed; what they kept is let go when it returns.
            attention: keep for `each` what each layer's attention was called with; only engines that say so
                (`attends`) are asked.

        Raises:
            CapabilityError: `each` on an engine that cannot.
            PositionError, PlanError: edits that do not fit the rows, before the model runs.
        """

    def check(self, rows: Rows, edits: tuple[Edit, ...]) -> None:
        """Hold the edits' positions and values against rows, without a pass.

        Raises:
            PositionError, PlanError: edits that do not fit them.
        """

    def check_reach(self, edits: tuple[Edit, ...]) -> None:
        """Refuse edits that lie above the last slot, for passes that end there.

        Raises:
            PlanError: naming the first of them.
        """

    def generate(
        self, inputs: Mapping[str, Any], rows: Rows, final: Rows, edits: tuple[Edit, ...], ends: Ending
    ) -> tuple[Any, list[PassRecord]]:
        """Many forward passes, made by the model's own `generate`, over a sequence that grows from `rows` to at most
        `final`. Returns its result and one record per pass.

        Args:
            ends: says when rows end, and that a token came.

        Raises:
            PositionError, PlanError: edits that do not fit the final rows, before the model runs.
        """


@runtime_checkable
class Engine(Protocol):
    """Carries out plans on one model.

    Attributes:
        name: as registered.
        model: the model that it runs: the user's own, or a copy with the same weights.
        modules: its modules by path.
    """

    name: str
    model: Any
    modules: dict[str, nn.Module]

    def adapt(self, atlas: Atlas) -> None:
        """Fit the atlas to the engine, once, before the self-check: other hook points, refusals with their reasons."""

    def compile(self, plan: Plan, atlas: Atlas) -> Program:
        """Check a plan against the model and make it ready.

        Raises:
            SiteError, PlanError, CapabilityError: the plan does not fit.
        """


def fault(name: str, value: Any) -> str:
    """What is wrong with an imported value as an engine of this name."""
    if not (isinstance(value, type) and callable(getattr(value, "compile", None))):
        return f"is {value!r:.60}, not an engine: a class with `compile` (interp_core.engines.protocol.Engine)"
    return name_fault(name, value)
