"""Engines carry out plans on a model. They are found by entry points, like every plugin.

`README.md` beside this file says what they patch, lend, keep and lock, and for how long.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import CapabilityError, nearest, wrong
from ..plugins import registry
from .protocol import Engine


def make_engine(name: str, model: Any, options: Mapping[str, Any]) -> Engine:
    """An engine of that name for a model.

    Raises:
        CapabilityError: no such engine is installed, it has no such option, or it cannot run the model.
        PluginError: it is installed but broken.
    """
    if not isinstance(options, Mapping):
        raise CapabilityError(wrong("engine_options=", "a dictionary of settings", options))
    engines = registry("engines")
    if name not in engines:
        raise CapabilityError(f"no engine is called {name!r}. {nearest(name, engines.names())}")
    kind = engines.get(name)
    known = list(inspect.signature(kind).parameters)[1:]
    for option in options:
        if option not in known:
            has = nearest(option, known) if known else "It has none."
            raise CapabilityError(f"engine {name!r} has no option {option!r}. {has}")
    return kind(model, **options)
