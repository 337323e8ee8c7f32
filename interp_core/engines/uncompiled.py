"""Modules that were compiled in place (`module.compile()`, `module.forward = torch.compile(module.forward)`): hooks do
not fire inside compiled code, so for the length of a run such modules do what they were compiled from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..architectures.parameters import COMPILED

PLACES = ("_compiled_call_impl", "forward")
"""Attributes of a module that torch's compiler is put into."""


class Uncompiled:
    """The compiled ones of some modules, as they are now; between `begin` and `end` they run as written."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [module for module in modules if is_compiled(module)]
        self._put_by: list[tuple[nn.Module, str, object]] = []

    def begin(self) -> None:
        """Take compiled code out."""
        for module in self._modules:
            own = vars(module)
            for name in PLACES:
                compiled = own.get(name)
                if name == "forward" and not hasattr(compiled, COMPILED):
                    continue
                if compiled is not None:
                    self._put_by.append((module, name, compiled))
                    own[name] = getattr(compiled, COMPILED) if name == "forward" else None

    def end(self) -> None:
        """Put it back."""
        for module, name, compiled in self._put_by:
            vars(module)[name] = compiled
        self._put_by.clear()


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs compiled code in the place of its own."""
    return module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), COMPILED)
