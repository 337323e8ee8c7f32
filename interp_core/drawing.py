"""Draws of a seed that belong to one thread, and leave the process' generators alone.

Sampling ends in `torch.multinomial`, which draws from the device's one generator: seeding that for a while, as
`torch.random.fork_rng` does, mixes the draws of all threads. Here it is handed a generator of its own, seeded alike, so
the tokens are those of `torch.manual_seed(seed)` before transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def drawing(seed: int | None) -> AbstractContextManager[Any]:
    """A while in which this thread samples by a seed; None: as ever."""
    return nullcontext() if seed is None else _Drawing(seed)


class _Drawing(TorchFunctionMode):
    """Hands every `torch.multinomial` the generator of its device."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _SAMPLERS and kwargs.get("generator") is None:
            device = args[0].device
            if device not in self._generators:
                self._generators[device] = torch.Generator(device).manual_seed(self._seed)
            kwargs["generator"] = self._generators[device]
        return func(*args, **kwargs)


_SAMPLERS: tuple[Callable[..., Any], ...] = (torch.multinomial, torch.Tensor.multinomial)
