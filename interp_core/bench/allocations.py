"""Bytes that tensors take while a function runs, counted at every operation: the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still there; weights are none of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(torch.Tensor, self.given, (args, kwargs))
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out

    def given(self, tensor: torch.Tensor) -> None:
        self.note(tensor, 0)

    def add(self, tensor: torch.Tensor) -> None:
        self.note(tensor, tensor.untyped_storage().nbytes())

    def note(self, tensor: torch.Tensor, size: int) -> None:
        """Once for as long as it is there: its address may be another's afterwards."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, storage._cdata, size)

    def gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that tensors made by a function took at a time."""
    with _Allocations() as counted:
        function()
    return counted.most
