"""Look at a plugin in a process of its own, under a time limit: whatever it does there, this one goes on.

inspect_plugin("methods", "logit_lens", "interp_plugins.logit_lens:LogitLens").settings
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from .. import settings
from ..errors import InterpError, PluginError, nearest
from . import status_of, uncover

LIMIT = 60.0
"""Seconds that a plugin may take to be imported and to say what its settings are."""


@dataclass(frozen=True)
class PluginInfo:
    """What was seen of a plugin.

    Attributes:
        status: "ok", "broken" or "incompatible".
        error: why it could not be looked at, with the traceback; the rest is then empty.
        doc, page: docstrings of the plugin and of its module.
        requires: sites and capabilities that a method needs.
        settings: name, type, default and description of each.
        schema: of the settings, as JSON schema.
        faults: what is wrong with the settings.
    """

    status: str = "ok"
    error: str = ""
    doc: str = ""
    page: str = ""
    requires: list[str] = field(default_factory=list)
    settings: list[dict[str, str]] = field(default_factory=list)
    schema: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@cache
def inspect_plugin(kind: str, name: str, target: str, seconds: float = LIMIT) -> PluginInfo:
    """Look at `module:attribute` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "look.json"
        run = [sys.executable, "-m", "interp_core.plugins.sandbox", kind, name, target, str(report)]
        path = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        try:
            done = subprocess.run(run, env=path, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return PluginInfo(
                "broken", f"{target} took more than {seconds:g} s to be imported and to say what its settings are"
            )
        if not report.exists():
            last = done.stderr.decode(errors="replace").strip()[-500:]
            return PluginInfo(
                "broken", f"{target} ended the process that looked at it (status {done.returncode}): {last}"
            )
        return PluginInfo(**json.loads(report.read_text(encoding="utf-8")))


def address(value: Any) -> str | None:
    """`module:attribute` of a class or function, if another process finds it there."""
    module, path = getattr(value, "__module__", "__main__"), getattr(value, "__qualname__", "<none>")
    if module == "__main__" or "<" in path:
        return None
    try:
        return f"{module}:{path}" if _resolve(f"{module}:{path}") is value else None
    except (ImportError, AttributeError):
        return None


def inspect_here(kind: str, name: str, value: Any, module: str = "") -> PluginInfo:
    """Look at a plugin in this process, without a time limit. `module` is where its entry point leads."""
    status, why = status_of(kind, name, value)
    if why:
        return PluginInfo(status, why)
    page = inspect.getdoc(sys.modules.get(module or getattr(value, "__module__", "")))
    doc = inspect.getdoc(value) if inspect.isclass(value) or inspect.isfunction(value) else ""
    info = PluginInfo(doc=doc or "", page=page or "")
    if kind == "methods":
        return _with_settings(info, value.Config, sorted(value.requires))
    if kind == "recipes":
        return _with_settings(info, settings.of_function(value), [])
    return info


def _with_settings(info: PluginInfo, config: type[settings.Config], requires: list[str]) -> PluginInfo:
    schema = settings.schema(config)
    json.dumps(schema)
    rows = settings.rows(config)
    faults: list[str] = []
    if all(row["default"] != settings.NEEDED for row in rows):
        try:
            config()
        except ValueError as error:
            faults.append(f"the defaults are refused: {error}")
    for key, wanted in (("extra", "forbid"), ("frozen", True)):
        if config.model_config.get(key) != wanted:
            faults.append(f"its model_config has {key}={config.model_config.get(key)!r}: leave it at {wanted!r}")
    return replace(info, requires=requires, settings=rows, schema=schema, faults=faults)


def _resolve(target: str) -> Any:
    module, _, path = target.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _named(target: str) -> Any:
    """What stands at an address.

    Raises:
        PluginError: no such module, or it has nothing of that name.
    """
    module, _, path = target.partition(":")
    uncover(target)
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a package that the module needs
        raise PluginError(
            f"there is no module {error.name!r}, installed or in this folder; give MODULE:NAME of one of these, or "
            "install its package: pip install -e FOLDER"
        ) from error
    try:
        return _resolve(target)
    except AttributeError as error:
        here = sys.modules[module]
        known = [name for name in dir(here) if not name.startswith("_")]
        bare = getattr(here, "__file__", None) is None
        why = (
            f"the folder {module!r} here is no package: it has no __init__.py. Run the command where the package is"
            if bare
            else f"{module} has no {path!r}. {nearest(path, known)}"
        )
        raise PluginError(why) from error


def main(kind: str, name: str, target: str, report: str) -> None:
    """Inspect one plugin and write the answer to a file; what the process says on its own goes to nobody."""
    try:
        info = inspect_here(kind, name, _named(target), target.partition(":")[0])
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        info = PluginInfo("broken", str(error) if isinstance(error, InterpError) else traceback.format_exc())
    # Renamed when it is whole: that the report is there says that this process came through.
    draft = Path(report).with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(info)), encoding="utf-8")
    draft.replace(report)


if __name__ == "__main__":
    main(*sys.argv[1:])
