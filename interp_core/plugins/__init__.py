"""Plugins: found by entry points, imported only when used, never able to break a listing.

Methods, recipes, engines, architectures and launchers are entry points of the groups `interp_core.<kind>`; those of
this package register the same way as anyone's. What cannot be read, imported or used is a row with its error.

    unloaded      known by name; nothing of it has been imported
    ok            imported, and what its kind must be
    broken        cannot be imported, or is something else
    incompatible  needs another interp_core, or was written for another version of the interface
    shadowed      another plugin has its name; `dist:name` reaches it
"""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import PluginError, nearest, wrong

API = 1
"""Version of the interface between interp_core and its plugins."""
KINDS = {
    "methods": "interp_core.methods:fault",
    "recipes": "interp_core.plugins:function_fault",
    "engines": "interp_core.engines.protocol:fault",
    "architectures": "interp_core.architectures.family:fault",
    "launchers": "interp_core.launch:fault",
}
"""Of each kind, the function of a name and an imported value that says what is wrong with it as such a plugin ("": it
is one). By address, so that the registry knows nothing of what it holds, and imports it when a plugin is loaded."""
OWN = "interp-core"
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
"""Where a clone declares the entry points of this package, installed or not, and as they are now."""
SESSION = "session"


@dataclass
class Plugin:
    """One registered plugin.

    Attributes:
        kind: one of `KINDS`.
        name: what users call it.
        target: `module:attribute`.
        dist, version: the distribution that brings it (`session` for those registered by hand).
        needs: what the distribution requires of interp_core (`interp-core>=0.1`), if it says.
        state: "unloaded", "ok", "broken" or "incompatible".
        error: why it cannot be used, with the traceback if there is one.
        hidden: whether another plugin has its name.
    """

    kind: str
    name: str
    target: str
    dist: str
    version: str
    needs: str = ""
    state: str = "unloaded"
    error: str = ""
    hidden: bool = False
    value: Any = field(default=None, repr=False)

    @property
    def status(self) -> str:
        """`state`, or "shadowed" for a usable one whose name another has."""
        return "shadowed" if self.hidden and self.state in ("unloaded", "ok") else self.state

    @property
    def label(self) -> str:
        """Kind, name and origin, for messages."""
        return f"{self.kind[:-1]} {self.name!r} of {self.dist} {self.version}".rstrip()

    def load(self) -> Any:
        """Import it.

        Raises:
            PluginError: broken or incompatible; carries the traceback and the fix.
        """
        if self.state == "unloaded":
            self._import()
        if self.state == "broken":
            last = self.error.strip().splitlines()[-1]
            fix = f"Update or remove it: pip install -U {self.dist}, pip uninstall {self.dist}"
            raise PluginError(f"{self.label} cannot be imported: {last}\n{self.error}\n{fix}")
        if self.state == "incompatible":
            raise PluginError(f"{self.label} is incompatible: {self.error}")
        return self.value

    def _import(self) -> None:
        uncover(self.target)
        try:
            value = metadata.EntryPoint(self.name, self.target, f"interp_core.{self.kind}").load()
        except (Exception, SystemExit):  # whatever a plugin raises must not escape as itself
            self.state, self.error = "broken", traceback.format_exc()
        else:
            self._judge(value)

    def _judge(self, value: Any) -> None:
        """Take a value that is what this kind must be, and note what is wrong with any other."""
        self.state, why = status_of(self.kind, self.name, value)
        if self.state == "ok":
            self.value = value
        else:
            self.error = f"{self.target} {why}" if self.state == "broken" else why


def uncover(target: str) -> None:
    """Let a package be found whose project lies here in a folder of the same name, as `pip install -e NAME` is run
    beside it: Python takes that folder for the package, before it asks for installed ones."""
    top = re.split("[.:]", target, maxsplit=1)[0]
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return
    if spec is None or spec.origin is not None:
        return
    for project in map(Path, spec.submodule_search_locations or ()):
        for root in (project / "src", project):
            if (root / top / "__init__.py").is_file() or (root / f"{top}.py").is_file():
                sys.path.insert(0, str(root))
                return


def status_of(kind: str, name: str, value: Any) -> tuple[str, str]:
    """The status of an imported value as a plugin of this kind and name ("ok", "broken", "incompatible"), and why."""
    api = getattr(value, "api", API)
    if api != API:
        older = "interp_core" if isinstance(api, int) and api > API else "the package that brings it"
        return "incompatible", f"it was written for interface {api!r}, this is {API}: update {older}"
    fault = metadata.EntryPoint("fault", KINDS[kind], "").load()
    wrong = fault(name, value)
    return ("broken", wrong) if wrong else ("ok", "")


def name_fault(name: str, value: Any) -> str:
    """What is wrong with the name that a plugin says it has: it goes by one (an empty `name`: any)."""
    said = getattr(value, "name", None)
    return "" if said == name or not name else f"has name = {said!r} but is registered as {name!r}: make the two equal"


def function_fault(name: str, value: Any) -> str:
    """What is wrong with a value as a recipe."""
    return "" if inspect.isfunction(value) else f"is {value!r:.60}, not a function"


class Registry:
    """The plugins of one kind, by name. Ours come first, then others by the name of their distribution."""

    def __init__(self, kind: str) -> None:
        if kind not in KINDS:
            raise PluginError(f"no kind of plugin is called {kind!r}. {nearest(kind, KINDS)}")
        self.kind = kind
        self.rows: list[Plugin] = []
        for plugin in installed():
            if plugin.kind == kind:
                self._add(replace(plugin))

    def _add(self, plugin: Plugin) -> None:
        if any((row.name, row.target, row.dist) == (plugin.name, plugin.target, plugin.dist) for row in self.rows):
            return
        first = next((row for row in self._visible() if row.name == plugin.name), None)
        if first is not None and plugin.state == "unloaded":
            _hide(plugin, first)
        self.rows.append(plugin)

    def register(self, name: str, value: Any) -> None:
        """Add a plugin by hand, for this process: it comes before installed ones, and replaces one of an earlier call.

        Raises:
            PluginError: it is not what a plugin of this kind must be.
        """
        target = f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', type(value).__name__)}"
        plugin = Plugin(self.kind, name, target, SESSION, "")
        plugin._judge(value)
        if plugin.state != "ok":
            raise PluginError(f"{self.kind[:-1]} {name!r} cannot be registered: {plugin.error}")
        self.rows = [row for row in self.rows if (row.dist, row.name) != (SESSION, name)]
        for row in self._visible():
            if row.name == name:
                _hide(row, plugin)
        self.rows.append(plugin)

    @contextmanager
    def lent(self, name: str, value: Any) -> Iterator[None]:
        """For a while, this name means this value, registered or not.

        Raises:
            PluginError: it is not what a plugin of this kind must be.
        """
        before = [replace(row) for row in self.rows]
        self.register(name, value)
        try:
            yield
        finally:
            self.rows = before

    def _visible(self) -> list[Plugin]:
        return [row for row in self.rows if not row.hidden and row.state != "incompatible"]

    def names(self) -> list[str]:
        """All names that can be used; `in` also knows those that say why not."""
        return [row.name for row in self._visible()]

    def __contains__(self, name: object) -> bool:
        return any(row.name == name for row in self.rows)

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self.rows)

    def find(self, name: str) -> Plugin:
        """The row of that name, not imported; `dist:name` reaches a shadowed one.

        Raises:
            PluginError: unknown.
        """
        if not isinstance(name, str):
            raise PluginError(wrong(f"a {self.kind[:-1]}", "its name", name))
        dist, _, bare = name.rpartition(":")
        rows = [row for row in self.rows if row.name == bare and (row.dist == dist if dist else not row.hidden)]
        usable = [row for row in rows if row.state != "incompatible"]
        if rows:
            return (usable or rows)[0]
        raise PluginError(f"no {self.kind[:-1]} is called {name!r}. {nearest(name, self.names())}")

    def get(self, name: str, kind: type | None = None) -> Any:
        """The plugin of that name, imported; `dist:name` reaches a shadowed one.

        Raises:
            PluginError: unknown, broken, incompatible, or not a `kind`.
        """
        row = self.find(name)
        value = row.load()
        if kind is not None and not isinstance(value, kind):
            raise PluginError(f"{row.label}: {row.target} is a {type(value).__name__}, not a {kind.__name__}")
        return value


def _hide(plugin: Plugin, first: Plugin) -> None:
    plugin.hidden = True
    if not plugin.error:
        plugin.error = f"{first.dist} has a {plugin.kind[:-1]} of this name; '{plugin.dist}:{plugin.name}' is this one"


@cache
def registry(kind: str) -> Registry:
    """The plugins of a kind.

    Raises:
        PluginError: no such kind.
    """
    return Registry(kind)


def find(name: str, kinds: Collection[str] = tuple(KINDS)) -> Plugin:
    """The one plugin of that name among several kinds, not imported.

    Raises:
        PluginError: none, or one in each of several kinds.
    """
    matches = []
    for kind in kinds:
        try:
            matches.append(registry(kind).find(name))
        except PluginError:
            pass
    if len(matches) == 1:
        return matches[0]
    what = " or ".join(kind[:-1] for kind in kinds)
    if matches:
        shared = " and a ".join(plugin.kind[:-1] for plugin in matches)
        raise PluginError(f"{name!r} is a {shared}; say which with --kind {matches[0].kind}")
    raise PluginError(f"no {what} is called {name!r}. {nearest(name, [n for k in kinds for n in registry(k).names()])}")


def refresh() -> None:
    """Look again at what is installed, and forget what was registered by hand."""
    installed.cache_clear()
    registry.cache_clear()


@cache
def installed() -> tuple[Plugin, ...]:
    """Every plugin of every installed distribution, from metadata alone: nothing is imported.

    Raises:
        PluginError: nothing says what this package itself brings, so that models of many families would be taken for
            what they are not.
    """
    plugins = list(_cloned())
    dists = {plugin.dist for plugin in plugins}
    for dist in metadata.distributions():
        try:
            text = dist.read_text("entry_points.txt") or ""
        except (OSError, ValueError):
            continue
        # Nearly all of what is installed: its metadata need not be parsed.
        if "interp_core." not in text:
            continue
        name, version, needs, error = _facts(dist)
        if name.lower() not in dists:  # of two on the path, the first is the one that would be imported
            dists.add(name.lower())
            plugins += _points(text, name, version, needs, error)
    if OWN not in dists:
        raise PluginError(
            f"{Path(__file__).parents[1]} is a copy without its engines and model families: {OWN} is not installed, "
            f"and no {PROJECT.name} of it lies beside. Install it: pip install {OWN}"
        )
    return tuple(sorted(plugins, key=lambda plugin: (plugin.dist != OWN, plugin.dist, plugin.name)))


def _cloned() -> Iterator[Plugin]:
    """What this package brings, where it runs from a clone."""
    try:
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return
    if project.get("name") == OWN:
        for group, points in project["entry-points"].items():
            kind = group.removeprefix("interp_core.")
            yield from (Plugin(kind, name, target, OWN, __version__) for name, target in points.items())


def _points(text: str, dist: str, version: str, needs: str, error: str) -> Iterator[Plugin]:
    """Rows of an `entry_points.txt`; a line that is none becomes a broken row."""
    kind = ""
    for line in (line.strip() for line in text.splitlines()):
        if section := re.fullmatch(r"\[(.*)\]", line):
            kind = section.group(1).strip().removeprefix("interp_core.") if "interp_core." in line else ""
        elif kind in KINDS and line and not line.startswith("#"):
            name, _, target = (part.strip() for part in line.partition("="))
            plugin = Plugin(kind, name, target, dist, version, needs)
            if error:
                plugin.state, plugin.error = "incompatible", error
            elif not re.fullmatch(r"[\w.]+:[\w.]+", target):
                plugin.state, plugin.error = "broken", f"its entry point {line!r} is not `name = module:attribute`"
            yield plugin


def _facts(dist: metadata.Distribution) -> tuple[str, str, str, str]:
    """Name and version of a distribution, what it requires of interp_core, and why that does not hold."""
    head = dist.metadata
    name, version = head["Name"] or "?", head["Version"] or "?"
    lines = [line for line in head.get_all("Requires-Dist") or () if re.match(r"interp[-_.]core(?![\w-])", line, re.I)]
    if name == OWN or not lines:
        return name, version, "", ""
    from packaging.requirements import InvalidRequirement, Requirement

    needs = []
    for line in lines:
        try:
            wanted = Requirement(line)
        except InvalidRequirement as error:
            return name, version, line, f"its requirement {line!r} cannot be read ({error}); update {name}"
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        needs.append(f"{OWN}{wanted.specifier}")
        if not wanted.specifier.contains(__version__, prereleases=True):
            fix = f"pip install -U '{needs[-1]}', or another version of {name}"
            return name, version, needs[-1], f"it needs {needs[-1]}, this is {__version__}: {fix}"
    return name, version, ", ".join(needs), ""
