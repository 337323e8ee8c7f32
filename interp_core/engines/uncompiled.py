"""Modules that were compiled in place (`module.compile()`, `module.forward = torch.compile(module.forward)`): hooks do
not fire inside compiled code, so for the length of a run such modules do what they were compiled from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..architectures.parameters import COMPILED


class Uncompiled:
    """The compiled ones of some modules, as they are now; between `begin` and `end` they run as written."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = [module for module in modules if is_compiled(module)]
        self._put_by: list[tuple[dict[str, Any], str, Any]] = []

    def begin(self) -> None:
        """Take compiled code out."""
        for own in map(vars, self.modules):
            if (compiled := own.get("_compiled_call_impl")) is not None:
                self._put_by.append((own, "_compiled_call_impl", compiled))
                own["_compiled_call_impl"] = None
            if hasattr(compiled := own.get("forward"), COMPILED):
                self._put_by.append((own, "forward", compiled))
                own["forward"] = getattr(compiled, COMPILED)

    def end(self) -> None:
        """Put it back."""
        for own, name, compiled in self._put_by:
            own[name] = compiled
        self._put_by.clear()


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs compiled code in the place of its own."""
    return module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), COMPILED)
