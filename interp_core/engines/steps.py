"""The passes of one generation, and what positions mean at each.

transformers' `generate` calls the model once for the prompt, then once for each new token. Nobody tells a program that
a pass begins: a hook on the model sees the first one, and the stopping criterion (`Ending`), which is asked after every
token, announces each further one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ..positions import Rows
from .pass_state import PassState
from .protocol import Ending, PassRecord
from .selection import BoundSelection, Window


@runtime_checkable
class Stepping(Protocol):
    """What is asked of a program that generates: see `HookProgram`."""

    state: PassState
    n_slots: int
    in_tower: bool

    def begin_pass(self, rows: Rows, width: int, keep_graph: bool) -> PassRecord:
        """See `HookProgram`."""

    def steady(self, rows: Rows) -> list[BoundSelection] | None:
        """See `HookProgram`."""


class Steps:
    """Binds a program to the text of each pass, and holds what each left behind.

    Positions are looked up at every step only as long as what they select still changes. A step after that costs the
    program nothing beside its hooks (`_steady`), until a row ends.

    Attributes:
        passes: what each pass left; after the last new token one stands here that no pass has filled.
    """

    def __init__(self, program: Stepping, model: nn.Module, rows: Rows, ends: Ending) -> None:
        self.passes: list[PassRecord] = []
        self._program, self._rows, self._ends = program, rows, ends
        self._real = [list(row) for row in rows.real]
        self._prompt = [len(row) for row in rows.real]
        self._stops: list[int | None] = [None] * len(rows.real)
        self._n_rows = len(rows.real)
        self._known = rows.width
        self._steady: list[BoundSelection] | None = None
        self._handle = model.register_forward_pre_hook(self._first, with_kwargs=True)
        ends.follow = self._follow
        if program.in_tower:  # it runs before the model is called
            self._handle.remove()
            self._begin(Window(0, rows.width), ())

    def close(self) -> None:
        """Take the hook off the model, where it is still there, and let go of the generation."""
        self._handle.remove()
        self._ends.follow = None

    def _first(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook on the model: its first pass begins, with as many columns as `generate` made of the prompt."""
        self._handle.remove()
        ids = kwargs.get("input_ids")
        self._begin(Window(0, (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]), ())

    def _follow(self, columns: int) -> None:
        """Every row has a token more, and the next pass computes it: column `columns` - 1."""
        over = self._ends.now() if self._n_rows > 1 else ()  # one row alone ends with the passes
        if self._steady is None or (over and any(over)):
            return self._begin(Window(columns - 1, columns), over)
        newest = [[columns - 1]] * self._n_rows
        for bound in self._steady:
            bound.columns = newest
        self._program.state.record = record = PassRecord(self._program.n_slots)
        self.passes.append(record)
        return None

    def _begin(self, window: Window, over: Sequence[bool]) -> None:
        """Bind the program to the columns that the next pass computes."""
        self._grow(window.start)
        for i, has_ended in enumerate(over):
            self._stops[i] = len(self._real[i]) if has_ended and self._stops[i] is None else self._stops[i]
        self._grow(window.stop)
        real, stops = self._real, None
        if any(self._stops):
            stops = [len(row) if n is None else n for row, n in zip(real, self._stops, strict=True)]
        rows = self._rows._replace(real=real, width=window.stop, prompt=self._prompt, growing=True, stops=stops)
        self._program.state.window = window
        self.passes.append(self._program.begin_pass(rows, window.stop - window.start, False))
        self._steady = self._program.steady(rows) if window.start and stops is None else None

    def _grow(self, columns: int) -> None:
        """Let every row reach to this column; what fills up a row that has ended counts as its own here."""
        for row in self._real:
            row.extend(range(self._known, columns))
        self._known = max(self._known, columns)
