"""Processes that share a model out run the same passes, together: each waits for the others within a pass. So what only
one of them asks for, or raises, must not be left to itself: the others would wait for half an hour, or take a part of
one value for a part of another.
"""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

from ..errors import PlanError, first_line

PATIENCE = 10.0
"""Seconds in which all processes come to an error that all of them raise."""
_RAISED: dict[str, int] = {}
"""Per group, how many errors this process has raised in passes; in step with the other processes."""


@contextmanager
def together(group: Any, words: Sequence[str], device: Any = "cpu") -> Iterator[None]:
    """What is run in this block, all processes of a group run; an error that only this one raises there ends it.

    Args:
        words: what is asked for, in words that are the same in every process.
        device: on which the group's tensors are.

    Raises:
        PlanError: other processes are asked for something else; in all of them.
        SystemExit: an error that no other process raises. No `Exception`, since whoever caught it would go on with
            processes that wait elsewhere.
    """
    _demand_alike(group, words, device)
    try:
        yield
    except Exception as error:
        if "raised_together" not in vars(error) and not _all_raise(group):
            traceback.print_exception(error)
            raise SystemExit(
                f"{_name(group)} alone raised {type(error).__name__}: {first_line(error)}\nThe others, with which it "
                "shares the model (tp_plan), wait for it within a pass, so it ends, and torchrun ends them"
            ) from error
        vars(error)["raised_together"] = True  # a block around this one need not ask again
        raise


def _demand_alike(group: Any, words: Sequence[str], device: Any) -> None:
    mine = int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:7], "big")
    ours = torch.tensor([mine], device=device)
    each = [torch.empty_like(ours) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, ours, group=group)
    if torch.cat(each).unique().numel() == 1:
        return
    said: list[Any] = [None] * len(each)
    dist.all_gather_object(said, list(words), group=group)
    other = next(rank for rank, theirs in enumerate(said) if theirs != said[0])
    apart = [(a, b) for a, b in zip(said[0], said[other], strict=False) if a != b] or [(said[0][0], said[other][0])]
    first, second = ((word if len(word) < 200 else f"{word[:200]}…") or "nothing" for word in apart[0])
    raise PlanError(
        f"under tp_plan all processes run the same, and process 0 is asked for {first}, process {other} for {second}: "
        "take out what depends on the process, or load the model without tp_plan"
    )


def _all_raise(group: Any) -> bool:
    """Whether all processes of a group raise an error at this place, as those do that depend on no process."""
    store = dist.distributed_c10d._get_default_store()
    number = _RAISED[group.group_name] = _RAISED.get(group.group_name, 0) + 1
    key, until = f"interp_core/{group.group_name}/{number}", time.monotonic() + PATIENCE
    try:
        store.add(key, 1)
        while store.add(key, 0) < dist.get_world_size(group):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
    except RuntimeError:  # whoever keeps the store is gone
        return False
    return True


def _name(group: Any) -> str:
    return f"process {dist.get_rank(group)} of {dist.get_world_size(group)}"
