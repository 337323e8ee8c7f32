"""What the hooks of a program know of the forward pass that is running.

A compiled program serves many runs. What belongs to the present one (its edits, its rows, what it has kept so far)
stands here, in one object that the program writes before a pass and its hooks read during it; between runs it holds
nothing of any run. So hooks know this, and not the program that installs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
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
        dtype: gives the dtype of the weights.
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

    __slots__ = (
        "after", "dtype", "edits", "keep_graph", "live", "modules", "real", "record", "rows", "shape", "window",
    )  # fmt: skip

    def __init__(self, modules: Mapping[str, nn.Module], dtype: Callable[[], torch.dtype]) -> None:
        self.modules, self.dtype = modules, dtype
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
        """Batch and pos of what passes in a layout; a vision tower has one row, with the patches of all images."""
        if not layout.images:
            return self.shape
        return 1, 0 if self.rows.patches is None else self.rows.patches.total


def text_columns(rows: Rows, window: Window | None) -> Tensor | None:
    """Which columns of a pass are text `[batch pos]`, neither padding nor what fills up a row that has ended; None if
    all are, so that passes without padding cost nothing."""
    start, stop = (0, rows.width) if window is None else window[:2]
    if start and rows.growing:  # a step after the prompt: a token of each row, or what fills it up
        live = rows.live
        return None if live is None else torch.tensor(live)[:, None].expand(-1, stop - start)
    rows = rows if rows.stops is None else rows.text
    if all(len(row) == rows.width for row in rows.real):
        return None
    text = torch.zeros(len(rows.real), rows.width, dtype=torch.bool)
    for i, row in enumerate(rows.real):
        text[i, list(row)] = True
    return text[:, start:stop]
