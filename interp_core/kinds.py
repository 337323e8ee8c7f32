"""What a plugin of each kind must be, once it is imported."""

from __future__ import annotations

import inspect
from typing import Any

from .plugins import API


def verdict(kind: str, name: str, value: Any) -> tuple[str, str]:
    """The status of an imported value as a plugin of this kind and name ("ok", "broken", "incompatible"), and why."""
    api = getattr(value, "api", API)
    if api != API:
        older = "interp_core" if isinstance(api, int) and api > API else "the package that brings it"
        return "incompatible", f"it was written for interface {api!r}, this is {API}: update {older}"
    wrong = _FAULTS[kind](name, value)
    return ("broken", wrong) if wrong else ("ok", "")


def _method(name: str, value: Any) -> str:
    from .methods import Method
    from .settings import Config

    if not (isinstance(value, type) and issubclass(value, Method)):
        return f"is {value!r:.60}, not a subclass of interp_core.Method"
    if inspect.isabstract(value):
        return f"leaves {', '.join(sorted(value.__abstractmethods__))} to be written"
    if not (isinstance(value.Config, type) and issubclass(value.Config, Config)):
        return f"has the Config {value.Config!r:.60}, not a subclass of interp_core.Config"
    if isinstance(value.requires, str):
        return f"has requires = {value.requires!r}, not a set of names: write frozenset({{{value.requires!r}}})"
    return _named(name, value)


def _recipe(name: str, value: Any) -> str:
    return "" if inspect.isfunction(value) else f"is {value!r:.60}, not a function"


def _engine(name: str, value: Any) -> str:
    if not (isinstance(value, type) and callable(getattr(value, "compile", None))):
        return f"is {value!r:.60}, not an engine: a class with `compile` (interp_core.engines.protocol.Engine)"
    return _named(name, value)


def _architecture(name: str, value: Any) -> str:
    from .architectures.family import Family

    return "" if isinstance(value, Family) else f"is a {type(value).__name__}, not a Family"


def _launcher(name: str, value: Any) -> str:
    if not (isinstance(value, type) and callable(getattr(value, "run", None))):
        return f"is {value!r:.60}, not a launcher: a class with `run` (interp_core.launch.Launcher)"
    return _named(name, value)


def _named(name: str, value: Any) -> str:
    """A plugin goes by one name (an empty `name`: any)."""
    own = getattr(value, "name", None)
    return "" if own == name or not name else f"has name = {own!r} but is registered as {name!r}: make the two equal"


_FAULTS = {
    "methods": _method,
    "recipes": _recipe,
    "engines": _engine,
    "architectures": _architecture,
    "launchers": _launcher,
}
