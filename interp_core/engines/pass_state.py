"""What the hooks of a program know of the forward pass that is running.

A compiled program serves many runs. What belongs to the present one (its edits, its rows, what it has kept so far)
stands here, in one object that the program writes before a pass and its hooks read during it; between runs it holds
nothing of any run. So hooks know this, and not the program that installs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..architectures.hook_points import Layout
from ..positions import Rows
from ..sites import Edit
from .protocol import PassRecord
from .selection import Window

NOTHING = PassRecord(0)
"""What stands between runs in the place of a record."""


class PassState:
    """The present pass.

    Attributes:
        modules: of the model, by path.
        edits: the run's, with their values, in the plan's order.
        record: what this pass has kept and changed so far.
        rows: the batch.
        window: the columns that this step of a generation computes; None where a pass computes all.
        shape: batch and pos of what passes.
        real: which columns are text `[batch pos]`; None if all are.
        live: which rows of a generation have not ended; None if none has.
        keep_graph: gradients are wanted.
        after: what is called when a hook has done its part.
    """

    __slots__ = ("after", "edits", "keep_graph", "live", "modules", "real", "record", "rows", "shape", "window")

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.rows: Rows = Rows((), {}, 0)
        self.window: Window | None = None
        self.shape = (0, 0)
        self.real: Tensor | None = None
        self.live: list[bool] | None = None
        self.keep_graph = False
        self.after: Mapping[Any, Callable[[], None]] = {}
        self.edits: tuple[Edit, ...] = ()
        self.record = NOTHING

    def shaped(self, layout: Layout) -> tuple[int, int]:
        """Batch and pos of what passes; a vision tower has one row, with the patches of all images."""
        if not layout.images:
            return self.shape
        return 1, 0 if self.rows.patches is None else self.rows.patches.total
