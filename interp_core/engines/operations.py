"""Where each edit acts, and what it does to the tensor that it selects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..architectures.atlas import Atlas, Entry
from ..architectures.hook_points import HookPoint
from ..errors import CapabilityError, PlanError
from ..sites import Edit


def write_point(atlas: Atlas, edit: Edit, entry: Entry) -> HookPoint:
    """Where an edit acts in a layer: a knockout of a pattern on the scores, where these are open.

    Raises:
        CapabilityError: nowhere, and why.
    """
    if entry.write is None:
        raise CapabilityError(f"{edit}: {entry.name} cannot be changed: {entry.why['write']}")
    scores = atlas.entries.get(("scores", entry.layer))
    if edit.op == "knockout" and scores is not None and scores.write is not None:
        return replace(scores.write, rank=1)
    return entry.write


def apply_edit(edit: Edit, x: Tensor, value: Any) -> Tensor:
    """What an edit makes of the tensor it selects; `value` is its value as `edit_value` gives it."""
    op = edit.op
    if op == "set":
        return value.expand_as(x)
    if op == "add":
        return x + value
    if op == "scale":
        return x * value
    if op == "zero":
        return torch.zeros_like(x)
    if op == "project":
        return x - (x @ value.mT) @ value
    if op == "knockout":
        return torch.full_like(x, torch.finfo(x.dtype).min)
    new = edit.value(x.clone())  # a function that works in place does what its result says, and no more
    if not isinstance(new, Tensor) or new.shape != x.shape or new.dtype != x.dtype:
        returned = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise PlanError(
            f"{edit}: the function returned {returned} for {x.dtype} {list(x.shape)}; it returns the new value, of the "
            "same dtype and shape, also where it works in place"
        )
    return new


def edit_value(edit: Edit, x: Tensor) -> Any:
    """An edit's value as `apply_edit` takes it for `x`: on its device, in its dtype (routers may compute in another one
    than the model's), directions made orthonormal."""
    if not isinstance(edit.value, Tensor):
        return edit.value
    if edit.op != "project":
        return edit.value.to(x.device, x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.qr(torch.atleast_2d(edit.value).to(x.device, wide).mT).Q.mT.to(x.dtype)
