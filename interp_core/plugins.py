"""Plugins: found by entry points, imported only when used, never able to break a listing.

Methods, recipes, engines, architectures and launchers are entry points of the groups `interp_core.<kind>`; those of
this package register the same way as anyone's. A plugin that cannot be imported is a row with its error.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

from .errors import PluginError, nearest

KINDS = ("methods", "recipes", "engines", "architectures", "launchers")
OWN = "interp-core"


@dataclass
class Plugin:
    """One registered plugin.

    Attributes:
        kind: one of `KINDS`.
        name: what users call it.
        target: `module:attribute`.
        dist, version: the distribution that brings it (`session` for those registered by hand).
        status: "unloaded", "ok", "broken", or "shadowed" by another of the same name.
        error: the traceback, when broken.
    """

    kind: str
    name: str
    target: str
    dist: str
    version: str
    status: str = "unloaded"
    error: str = ""
    value: Any = field(default=None, repr=False)
    point: Any = field(default=None, repr=False)

    def load(self) -> Any:
        """Import it.

        Raises:
            PluginError: it cannot be imported; carries the traceback.
        """
        if self.status == "unloaded":
            try:
                self.value = self.point.load()
                self.status = "ok"
            except Exception:  # whatever a plugin raises must not escape as itself
                self.status, self.error = "broken", traceback.format_exc()
        if self.status == "broken":
            last = self.error.strip().splitlines()[-1]
            raise PluginError(
                f"{self.kind[:-1]} {self.name!r} of {self.dist} {self.version} cannot be imported: {last}\n"
                f"{self.error}Update or remove it: pip install -U {self.dist}, pip uninstall {self.dist}"
            )
        return self.value


class Registry:
    """The plugins of one kind, by name."""

    def __init__(self, kind: str) -> None:
        if kind not in KINDS:
            raise PluginError(f"no kind of plugin is called {kind!r}. {nearest(kind, KINDS)}")
        self.kind = kind
        self.rows: list[Plugin] = []
        for point in sorted(metadata.entry_points(group=f"interp_core.{kind}"), key=_own_first):
            dist = point.dist
            name, version = (dist.name, dist.version) if dist else ("?", "?")
            self._add(Plugin(kind, point.name, point.value, name, version, point=point))

    def _add(self, plugin: Plugin) -> None:
        if any((row.name, row.target, row.dist) == (plugin.name, plugin.target, plugin.dist) for row in self.rows):
            return
        if plugin.name in self:
            plugin.status = "shadowed"
        self.rows.append(plugin)

    def register(self, name: str, value: Any) -> None:
        """Add a plugin by hand, for this process; it comes before installed ones."""
        for row in self.rows:
            if row.name == name and row.status != "shadowed":
                row.status = "shadowed"
        target = f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', type(value).__name__)}"
        self.rows.append(Plugin(self.kind, name, target, "session", "", status="ok", value=value))

    def names(self) -> list[str]:
        """All names."""
        return [row.name for row in self.rows if row.status != "shadowed"]

    def __contains__(self, name: object) -> bool:
        return any(row.name == name and row.status != "shadowed" for row in self.rows)

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self.rows)

    def get(self, name: str, kind: type | None = None) -> Any:
        """The plugin of that name, imported; `dist:name` reaches a shadowed one.

        Raises:
            PluginError: unknown, broken, or not a `kind`.
        """
        dist, _, bare = name.rpartition(":")
        for row in self.rows:
            if row.name == bare and (row.dist == dist if dist else row.status != "shadowed"):
                if row.status == "shadowed":
                    row.status = "unloaded"
                    value = row.load()
                    row.status = "shadowed"
                else:
                    value = row.load()
                if kind is not None and not isinstance(value, kind):
                    raise PluginError(
                        f"{self.kind[:-1]} {name!r} of {row.dist}: {row.target} is a {type(value).__name__}, "
                        f"not a {kind.__name__}"
                    )
                return value
        raise PluginError(f"no {self.kind[:-1]} is called {name!r}. {nearest(name, self.names())}")


def _own_first(point: metadata.EntryPoint) -> tuple[bool, str]:
    dist = point.dist.name if point.dist else ""
    return dist != OWN, dist


@cache
def registry(kind: str) -> Registry:
    """The plugins of a kind.

    Raises:
        PluginError: no such kind.
    """
    return Registry(kind)
