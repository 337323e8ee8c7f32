"""Tensors as data: without importing torch for those who hold none."""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor


def is_tensor(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a torch tensor. Where nobody has imported torch, nothing is one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and content, in hexadecimal digits."""
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1)
    state = hashlib.sha256(f"{data.dtype}{list(tensor.shape)}".encode())
    state.update(data.view(torch.uint8).numpy().data)
    return state.hexdigest()
