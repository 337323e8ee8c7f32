"""Engines carry out plans. Found by entry points, like every plugin."""

from __future__ import annotations

from typing import Any

from ..errors import CapabilityError, nearest
from ..plugins import registry
from .protocol import Engine


def make_engine(name: str, model: Any) -> Engine:
    """An engine of that name for a model.

    Raises:
        CapabilityError: no such engine is installed.
        PluginError: it is installed but broken.
    """
    engines = registry("engines")
    if name not in engines:
        raise CapabilityError(f"no engine is called {name!r}. {nearest(name, engines.names())}")
    return engines.get(name)(model)
