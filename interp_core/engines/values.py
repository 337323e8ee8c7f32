"""Whether an edit's value fits what it meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import PlanError
from ..sites import Edit


def check_value(edit: Edit, axes: Sequence[tuple[str, int]], dtype: torch.dtype, *, wide: bool) -> None:
    """Hold an edit's value against the part that it meets.

    Args:
        axes: names and sizes of that part's axes.
        dtype: of the model.
        wide: the family may compute it in float32 all the same.

    Raises:
        PlanError: shape or dtype that do not fit.
    """
    value: Tensor = edit.value
    if value.dtype != dtype and not (wide and value.dtype == torch.float32):
        raise PlanError(f"{edit}: the value is {value.dtype}, the model {dtype}; write value.to({dtype})")
    sizes, last = [size for _, size in axes], edit.site.info.axes[-1]
    if edit.op == "project" and axes[-1][0] != last:
        raise PlanError(f"{edit}: directions lie along {last}, of which this selects a single one; leave it whole")
    wanted = sizes[-1:] if edit.op == "project" else sizes
    shape = list(value.shape)[-1:] if edit.op == "project" else list(value.shape)
    if len(shape) > len(wanted) or shape != wanted[len(wanted) - len(shape) :]:
        named = ", ".join(f"{axis} {size}" for axis, size in axes)
        takes = "[d] or [k d]" if edit.op == "project" else "that shape or a suffix of it; nothing is broadcast"
        more = "" if edit.op == "project" else _likely(edit, shape, axes)
        raise PlanError(f"{edit}: the value is {list(value.shape)}, the site has [{named}]. It takes {takes}.{more}")
    if 1 < len(sizes) == len(shape) + 1 and sizes[0] == sizes[1] and edit.op != "project":
        _check_one_meaning(edit, shape, axes)


def _check_one_meaning(edit: Edit, shape: list[int], axes: Sequence[tuple[str, int]]) -> None:
    """Refuse a suffix that is, by its shape, as well the value at one position: with as many rows as positions.

    Raises:
        PlanError: with both ways to write it.
    """
    sizes, along = [size for _, size in axes], _positions(axes)
    if not along or sizes[along] == 1 or shape != sizes[:along] + sizes[along + 1 :]:
        return
    named = ", ".join(f"{axis} {size}" for axis, size in axes)
    last = f"{replace(edit.site, pos=None, key=None)}.at({'query=' if axes[along][0] == 'query' else ''}-1)"
    raise PlanError(
        f"{edit}: the value is {shape}, the site has [{named}]: its first axis may be {axes[0][0]} or {axes[1][0]}. "
        f"For one position of each row write {last}, or which one is meant, before .{edit.op}; for the same in every "
        f"row, value.expand({', '.join([str(sizes[0]), *['-1'] * len(shape)])})."
    )


def _positions(axes: Sequence[tuple[str, int]]) -> int | None:
    """Which axis positions lie along."""
    return next((i for i, (axis, _) in enumerate(axes) if axis in ("pos", "query", "patch")), None)


def _likely(edit: Edit, shape: list[int], axes: Sequence[tuple[str, int]]) -> str:
    """What a shape that does not fit would fit, as the end of a message: other positions, or axes in another order."""
    sizes, site = [size for _, size in axes], edit.site
    along = _positions(axes)
    if along is not None and shape == sizes[:along] + sizes[along + 1 :]:
        return f" That is the value at one position: write {site}.at(-1), or which one is meant, before .{edit.op}."
    if along is None and site.pos is not None and len(shape) == len(sizes) + 1:
        return " That is the value at all positions: take one of it, such as run[site].at(-1)."
    for i in range(len(sizes)):
        for j in range(i + 1, len(sizes)):
            swapped = list(shape)
            if len(shape) == len(sizes):
                swapped[i], swapped[j] = swapped[j], swapped[i]
                if swapped == sizes:
                    return f" Its axes {axes[i][0]} and {axes[j][0]} are swapped: write value.transpose({i}, {j})."
    return ""
