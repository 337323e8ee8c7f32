"""`interp plugins …`: what is installed, what it is, whether it holds, and a package to start from."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..columns import aligned, terminal_width, wrapped
from ..errors import PlanError, PluginError, nearest
from ..plugins import KINDS, OWN, SESSION, Plugin, find, registry
from ..progress import Progress, stopping

if TYPE_CHECKING:
    from ..testing import Report
    from ..testing.report import Row

COMMANDS = ("list", "show", "check", "new")
SHOWN = ("kind", "name", "status", "dist", "version", "target")


class _ListFirst(TyperGroup):
    """`interp plugins [KIND]` is `interp plugins list [KIND]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in COMMANDS or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["list", *args])


app = typer.Typer(cls=_ListFirst, help="What is installed: list, show, check; or write a new one.")
Name = Annotated[str, typer.Argument(help="as listed; dist:name reaches a shadowed one")]
Kind = Annotated[str | None, typer.Option(help=f"one of {', '.join(KINDS)}, where several have the name")]


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help=f"one of {', '.join(KINDS)}")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="load each one; show tracebacks")] = False,
) -> None:
    """List what is installed, broken ones included. Nothing is imported, unless asked for."""
    if kind is not None and kind not in KINDS:
        raise PluginError(f"no kind of plugin or command is called {kind!r}. {nearest(kind, [*KINDS, *COMMANDS])}")
    listed = [plugin for each in ([kind] if kind else KINDS) for plugin in registry(each)]
    rows = [_facts(plugin) | (_looked_at(plugin) if verbose else {}) for plugin in listed]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print("\n\n".join(_groups(rows, whole=verbose or kind is not None)))
    for plugin, row in zip(listed, rows, strict=True):
        if row["error"]:
            print(f"\n{plugin.label}: {row['error']}")


def _groups(rows: list[dict[str, Any]], whole: bool) -> Iterator[str]:
    """The listing, kind by kind; of our own families only how many there are, unless it is to be `whole`."""
    width = terminal_width()
    for kind in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        listed = [row for row in of_kind if whole or kind != "architectures" or row["dist"] != OWN]
        parts = [columns([{key: str(row[key]) for key in SHOWN[1:]} for row in listed])] if listed else []
        if more := len(of_kind) - len(listed):
            said = f"{more} model families of {OWN}: interp plugins {kind}, or -v"
            parts.append(wrapped(said, None if width is None else width - 2))
        if parts:
            yield "\n".join([kind, *(textwrap.indent(part, "  ") for part in parts)])


def _facts(plugin: Plugin) -> dict[str, Any]:
    return {key: getattr(plugin, key) for key in (*SHOWN, "needs", "error")}


def _looked_at(plugin: Plugin) -> dict[str, Any]:
    """What becomes of a plugin that is imported: ours here, those of others in a process of their own each."""
    if plugin.state != "unloaded":
        return {}
    if plugin.dist == OWN:
        try:
            plugin.load()
        except PluginError:
            pass  # it says so itself
        return {"status": plugin.status, "error": plugin.error}
    from ..plugins.sandbox import inspect_plugin

    info = inspect_plugin(plugin.kind, plugin.name, plugin.target)
    if info.error:
        return {"status": info.status, "error": info.error}
    return {} if plugin.hidden else {"status": "ok"}


@app.command()
def show(
    name: Name,
    kind: Kind = None,
    as_json: Annotated[bool, typer.Option("--json", help="with the JSON schema of its settings")] = False,
) -> None:
    """What a plugin is, needs and can be set to. It is read in another process, under a time limit."""
    from ..plugins.sandbox import inspect_plugin

    plugin = find(name, (kind,) if kind else KINDS)
    facts = _facts(plugin)
    if plugin.state in ("broken", "incompatible"):
        print(json.dumps(facts, indent=1) if as_json else f"{plugin.label}: {plugin.status}\n{plugin.error}")
        raise typer.Exit(1)
    info = inspect_plugin(plugin.kind, plugin.name, plugin.target)
    if as_json:
        status = plugin.status if plugin.hidden else info.status
        print(json.dumps(facts | vars(info) | {"status": status, "error": info.error or plugin.error}, indent=1))
    else:
        print(_page(plugin, info))
    raise typer.Exit(bool(info.error))


def _page(plugin: Plugin, info: Any) -> str:
    needs = f" ({plugin.needs})" if plugin.needs else ""
    parts = [f"{plugin.label}{needs}\n{plugin.target}"]
    if info.error:
        return "\n\n".join([*parts, info.error.strip()])
    parts += dict.fromkeys((info.doc.strip(), info.page.strip()))
    if info.requires:
        parts.append(f"requires {', '.join(info.requires)}")
    if info.settings:
        parts.append(columns(info.settings))
    return "\n\n".join(part for part in parts if part)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="as listed, or MODULE:NAME of what is not installed, with its --kind")],
    kind: Kind = None,
    model: Annotated[
        str | None, typer.Option(help="what it is run on: a toy, a folder, or a hub id; a small one that fits")
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as needed")] = None,
) -> None:
    """Run the conformance kit; exit status 1 if anything fails. Each check prints a line as soon as it is done."""
    from .. import testing

    plugin = _installed_or_module(name, kind)
    what = f"{plugin.kind[:-1]} {plugin.target}" if plugin.dist == SESSION else f"{plugin.label} ({plugin.target})"
    print(what, flush=True)
    told: list[Row] = []

    def tell(row: Row) -> None:
        told.append(row)
        print(wrapped(str(row), terminal_width(), " " * 6), flush=True)

    with stopping(lambda: f"{testing.Report('', tuple(told)).summary} so far; the same command begins anew"):
        with Progress(f"importing {plugin.target} in another process", 0):
            first = testing.check_plugin(plugin)
        importable = first.rows[0].ok
        if importable and plugin.kind == "methods":  # the whole kit looks at documentation and settings again
            first = testing.Report(first.title, ())
        for row in first.rows:
            tell(row)
        report = _checked(plugin, model, assignments or [], tell) if importable else testing.Report("", ())
    report = testing.Report(report.title, first.rows + report.rows)
    print(report.summary)
    raise typer.Exit(not report.ok)


def _checked(plugin: Plugin, model: str | None, assignments: list[str], tell: Callable[[Row], None]) -> Report:
    """What the kit of its kind finds of a plugin that can be imported."""
    from .. import settings, testing

    imported = plugin.load()
    ref = imported if plugin.dist == SESSION else f"{plugin.dist}:{plugin.name}" if plugin.hidden else plugin.name
    if plugin.kind == "methods":
        values = settings.read(plugin.name, imported.Config, assignments)
        return testing.check_method(imported, model, settings=values, tell=tell)
    if plugin.kind == "recipes":
        values = settings.read(f"recipe {plugin.name}", settings.of_function(imported), assignments)
        return testing.check_recipe(ref, model or "toy:text", settings=values, tell=tell)
    if assignments:
        raise PlanError(f"--set is for settings of methods and recipes; {plugin.label} has none")
    if plugin.kind == "architectures":
        beside = sys.modules[plugin.target.partition(":")[0]]
        return testing.check_family(ref, model or getattr(beside, "tiny", None), tell=tell)
    if plugin.kind == "engines":
        return testing.check_engine(imported, model, tell=tell)
    return testing.check_launcher(imported, tell=tell)


def _installed_or_module(name: str, kind: str | None) -> Plugin:
    if kind is not None and kind not in KINDS:  # `interp plugins new` calls them by one word each
        from ..scaffold import KINDS as WRITTEN

        if kind not in WRITTEN:
            raise PluginError(f"no kind of plugin is called {kind!r}. {nearest(kind, KINDS)}")
        kind = WRITTEN[kind].group
    try:
        return find(name, (kind,) if kind else KINDS)
    except PluginError:
        if Path(name, "pyproject.toml").is_file():
            raise PluginError(f"{name} is a folder here whose plugin is not installed: pip install -e {name}") from None
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
            raise
    sys.path.insert(0, os.getcwd())  # a module of this folder is meant, which a console script does not look into
    return Plugin(kind or "methods", "", name, SESSION, "")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="a Python name: my_lens")],
    out: Annotated[Path | None, typer.Option(help="folder to write, ./NAME by default")] = None,
    kind: Annotated[str, typer.Option(help="method, recipe, family, engine or launcher")] = "method",
    minimal: Annotated[bool, typer.Option("--minimal", help="of a method, the smallest that is right")] = False,
) -> None:
    """Write a package with a plugin that works, its test and its entry point."""
    from ..scaffold import next_steps, write_package

    folder = write_package(name, out, kind, minimal=minimal)
    print(f"{folder} is a package with the {kind} {name!r}. Next:\n\n{next_steps(name, folder, kind)}")


def columns(rows: list[dict[str, str]]) -> str:
    """Rows as lines with aligned columns, under the names of their keys; as wide as the terminal at most."""
    if not rows:
        return "nothing"
    keys, width = list(rows[0]), terminal_width()
    lines = [keys, *([row[key] for key in keys] for row in rows)]
    return "\n".join(aligned(lines, None if width is None else width - 2, keep=2))
