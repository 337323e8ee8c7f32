"""From a site's units and positions to one index into the tensor that passes.

A `Selection` belongs to a plan; binding it to the rows of a batch (and, while generating, to the columns that this step
computes) gives a `BoundSelection`, which takes that part out of a tensor or puts it back.

Attention values `[batch head query key]` are indexed as `[batch query key head]`, so that in every value the axes
that positions select come right after the batch and the unit axis after them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PositionError
from ..indexing import indices
from ..positions import ALL, VISION, Patches, Position, Rows, is_single, resolve, selects_newest
from ..sites import Site

Columns = list[list[int]]


class Window(NamedTuple):
    """The columns that one forward pass computes (`start` to `stop`), and the first that its keys still cover."""

    start: int
    stop: int
    keys: int = 0


class Selection:
    """Selection of a site, units checked against the model.

    Raises:
        SiteError: a unit that does not exist.
    """

    __slots__ = ("_step", "attention", "key", "pos", "site", "tower", "units", "whole")

    def __init__(self, site: Site, n_units: int | None) -> None:
        self.site = site
        self.attention = "query" in site.info.axes
        self.pos, self.key, self.tower = site.pos, site.key, site.info.tower
        if site.info.visual:
            self.pos = (site.pos or ALL) if self.tower else VISION
        self.units: int | tuple[int, ...] | None = None
        if site.units is not None:
            assert n_units is not None
            numbers = indices(site.units, n_units, site.info.unit or "unit", site)
            self.units = numbers[0] if isinstance(site.units, int) else tuple(numbers)
        self.whole = self.pos is None and self.key is None and self.units is None
        self._step: tuple[int, BoundSelection] | None = None

    def give_units(self) -> tuple[int, ...] | None:
        """Leave the selection of units to whoever computes the value; what it then gives is selected here."""
        if self.units is None:
            return None
        units = (self.units,) if isinstance(self.units, int) else self.units
        self.units = 0 if isinstance(self.units, int) else None
        self.whole = self.pos is None and self.key is None and self.units is None
        return units

    def bind(self, rows: Rows, window: Window | None = None) -> BoundSelection | None:
        """The index into this batch, or None if nothing of it lies in the window.

        Raises:
            PositionError: positions that the text does not have, or a selection that is empty.
        """
        if self.tower and ((rows.growing and rows.patches is None) or (window is not None and window.start)):
            return None  # a tower runs with the prompt
        # A step after the prompt, with one new token in each row.
        if window is not None and rows.growing and window.stop - window.start == 1 <= window.start and self.key is None:
            return self._bind_newest(rows, window)
        queries = keys = None
        if self.pos is not None:
            queries = self.columns(rows, self.pos, window)
            if not any(queries):
                return None
        if self.key is not None:
            keys = self.columns(rows, self.key)
            if window is not None:
                keys = [[column for column in row if window.keys <= column < window.stop] for row in keys]
                if not any(keys):
                    return None
        return BoundSelection(self, rows, queries, keys, window)

    def laid(self, rows: Rows) -> BoundSelection:
        """The index into a value that is laid out in rows of patches `[batch patch …]`, as runs give it."""
        patches = self._counted(rows)
        return BoundSelection(self, patches, resolve(self.pos or ALL, patches), None, None)

    def _bind_newest(self, rows: Rows, window: Window) -> BoundSelection | None:
        """The index of a step that computes one token of each row. It does not depend on the step, so that steps cost
        the same however long the text is."""
        start, real = window.start, rows.real
        if self.pos is not None:
            hit = [row[-1] == start and selects_newest(self.pos, rows, i) for i, row in enumerate(real)]
            if not any(hit):
                return None
            if not all(hit):
                return BoundSelection(self, rows, [[start] if on else [] for on in hit], None, window)
        if self._step is None or self._step[0] != len(real):
            newest = None if self.pos is None else [[start]] * len(real)
            self._step = len(real), BoundSelection(self, rows, newest, None, window)
        elif self.pos is not None:
            self._step[1].columns = [[start]] * len(real)
        return self._step[1]

    def columns(self, rows: Rows, value: Position, window: Window | None = None) -> Columns:
        """Columns per row of one of the site's positions (`pos` or `key`), those outside the window left out.

        Raises:
            PositionError: positions that the text does not have, or none at all.
        """
        columns = resolve(value, self._counted(rows))
        if not rows.growing and not any(columns):
            raise PositionError(f"{self.site} selects no position in any row")
        if window is not None and not self.tower:
            columns = [[column for column in row if window.start <= column < window.stop] for row in columns]
        return columns

    def _counted(self, rows: Rows) -> Rows:
        """The rows as this site's positions count them.

        Raises:
            PositionError: patches, and the text has no images whose patches are known.
        """
        if not self.tower:
            return rows
        if rows.patches is None:
            raise PositionError(
                f"{self.site}: the text comes without images, or with some whose patches are not known (videos; towers "
                "that no family file describes); give images, as in model.tokens(text, images=…)"
            )
        return rows.patches.rows


class BoundSelection:
    """A selection in the rows of one batch, as an index.

    Attributes:
        axes: names and sizes of the position axes that it leaves.
        basic: whether what it takes is a view.
        fills: it takes the whole value, if without the axis of a single position.
        ragged: rows select different numbers of positions, so they are strung together along one axis `selected`.
        columns: columns selected per row (None: all), counted over the whole sequence.
    """

    __slots__ = (
        "_index", "_moved", "_parts", "_patches", "axes", "basic", "columns", "fills", "ragged", "rows", "selection",
    )  # fmt: skip

    def __init__(
        self, selection: Selection, rows: Rows, queries: Columns | None, keys: Columns | None, window: Window | None
    ) -> None:
        self.selection, self.columns, self.rows = selection, queries, len(rows.real)
        start, stop, first = (0, rows.width, 0) if window is None or selection.tower else window
        self._patches: Patches | None = rows.patches if selection.tower else None
        parts = [_Axis.of(queries, selection.pos, start, stop - start)]
        if selection.attention:
            parts.append(_Axis.of(keys, selection.key, first, stop - first))
        self._point(parts)
        self.fills = (
            self.basic and selection.units is None and not selection.attention and parts[0].count == stop - start
        )

    def _point(self, parts: list[_Axis]) -> None:
        """Make the index that selects these columns."""
        self._parts = parts
        self.ragged = any(part.ragged for part in parts)
        self._index = self._build(parts, self.rows)
        names = self.selection.site.info.positions or ("visual",)
        counts = [(name, part.count) for name, part in zip(names, parts, strict=False) if not part.single]
        self.axes = [("selected", self._index[0].shape[0])] if self.ragged else counts
        self.basic = not any(isinstance(part, (Tensor, list)) for part in self._index)
        self._moved: dict[torch.device, tuple[Any, ...]] = {}

    def among(self, queries: Sequence[int]) -> BoundSelection:
        """This selection of a tensor that has these queries alone (counted as in `columns`), all of its own among them.

        Raises:
            KeyError: one is not.
        """
        at = {column: i for i, column in enumerate(queries)}
        local = [[at[column] for column in row] for row in self.columns or ()]
        narrowed = copy.copy(self)
        narrowed._point([_Axis.of(local, self.selection.pos, 0, len(at)), *self._parts[1:]])
        return narrowed

    def _build(self, parts: list[_Axis], n_rows: int) -> tuple[Any, ...]:
        units = self.selection.units
        tail: tuple[Any, ...] = () if units is None else (units if isinstance(units, int) else list(units),)
        if not self.ragged and self._patches is None and all(part.key is not None for part in parts):
            # basic indexing: every row selects the same stretch
            return (slice(None), *(part.key for part in parts), *tail)
        arrays = _ragged(parts, n_rows) if self.ragged else _uniform(parts, n_rows)
        if self._patches is not None:
            arrays = _strung(arrays, self._patches)
        if units is not None and not isinstance(units, int):
            arrays = [array[..., None] for array in arrays]
            tail = (torch.tensor(units),)
        return (*arrays, *tail)

    @property
    def stretch(self) -> Any:
        """The one index of positions that every row has (a number or a slice); None if there is none."""
        return None if self.selection.attention or not self.basic else self._index[1]

    @property
    def unit(self) -> int | None:
        """The one unit that it takes, if it takes one."""
        units = self.selection.units
        return units if isinstance(units, int) else None

    def index(self, device: torch.device) -> tuple[Any, ...]:
        """The index with its arrays on `device`."""
        if self.basic:
            return self._index
        if device not in self._moved:
            self._moved[device] = tuple(part.to(device) if isinstance(part, Tensor) else part for part in self._index)
        return self._moved[device]

    def take(self, x: Tensor) -> Tensor:
        """The selected part, its axes in the value's order (a view where that is possible)."""
        if self.selection.attention:
            part = x.permute(0, 2, 3, 1)[self.index(x.device)]
            return part if isinstance(self.selection.units, int) or self.ragged else part.movedim(-1, 1)
        return x[self._index if self.basic else self.index(x.device)]

    def put(self, x: Tensor, new: Tensor) -> None:
        """Write the selected part of `x` in place."""
        if self.selection.attention:
            if not (isinstance(self.selection.units, int) or self.ragged):
                new = new.movedim(1, -1)
            x.permute(0, 2, 3, 1)[self.index(x.device)] = new
        else:
            x[self._index if self.basic else self.index(x.device)] = new


class _Axis:
    """Columns of one position axis, per row or once for all: a basic key if all rows agree, and the columns."""

    __slots__ = ("columns", "key", "ragged", "single")

    def __init__(self, columns: Sequence[Sequence[int]], key: Any, single: bool, ragged: bool) -> None:
        self.columns, self.key, self.single, self.ragged = columns, key, single, ragged

    @staticmethod
    def of(columns: Columns | None, chosen: Position | None, start: int, width: int) -> _Axis:
        if columns is None or chosen is None:
            return _Axis([range(width)], slice(None), False, False)
        single = is_single(chosen)
        local = [[column - start for column in row] for row in columns]
        first = local[0]
        if any(len(row) != len(first) for row in local) or not first:
            return _Axis(local, None, single, True)
        if all(row == first for row in local):
            step = first[1] - first[0] if len(first) > 1 else 1
            if single:
                return _Axis(local, first[0], True, False)
            if step > 0 and first == list(range(first[0], first[-1] + 1, step)):
                return _Axis(local, slice(first[0], first[-1] + 1, step), False, False)
        return _Axis(local, None, single, False)

    @property
    def count(self) -> int:
        """Positions per row (of the first, where rows differ)."""
        return len(self.columns[0])

    def rows(self, n: int) -> list[Sequence[int]]:
        """The columns of each of `n` rows."""
        return [*self.columns] * n if len(self.columns) == 1 else [*self.columns]


def _uniform(parts: Sequence[_Axis], n_rows: int) -> list[Tensor]:
    """Index arrays `[batch, …]` with one axis per part, dropped where the part selects one position."""
    kept = [part for part in parts if not part.single]
    arrays = [torch.arange(n_rows).reshape(-1, *[1] * len(kept))]
    for part in parts:
        table = torch.tensor(part.rows(n_rows))
        shape = [n_rows] + [table.shape[1] if other is part else 1 for other in kept]
        arrays.append(table.reshape(shape))
    return arrays


def _ragged(parts: Sequence[_Axis], n_rows: int) -> list[Tensor]:
    """Flat index arrays `[selected]` over rows and all combinations of the parts."""
    entries: list[tuple[int, ...]] = []
    tables = [part.rows(n_rows) for part in parts]
    for row in range(n_rows):
        combos: list[tuple[int, ...]] = [(row,)]
        for table in tables:
            combos = [(*combo, column) for combo in combos for column in table[row]]
        entries += combos
    return list(torch.tensor(entries).reshape(-1, len(parts) + 1).unbind(-1))


def _strung(arrays: Sequence[Tensor], patches: Patches) -> list[Tensor]:
    """An index of rows and their patches as one into the tower's tensor, which strings the images of all rows together
    `[1 patch …]`."""
    table = torch.zeros(len(patches.places), max(1, patches.rows.width), dtype=torch.long)
    for row, places in enumerate(patches.places):
        table[row, : len(places)] = torch.tensor(places, dtype=torch.long)
    at = table[arrays[0], arrays[1]]
    return [torch.zeros_like(at), at]
