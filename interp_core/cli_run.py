"""`interp run`: a method or a recipe from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import settings
from .errors import PlanError
from .plugins import find, registry

RUNNABLE = ("methods", "recipes")


def run(
    name: Annotated[str, typer.Argument(help="a method or a recipe (dist:name reaches a shadowed one)")],
    given: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as needed")] = None,
    model: Annotated[str | None, typer.Option(help="toy:text, a folder, or a hub id")] = None,
    text: Annotated[list[str] | None, typer.Option(help="what a method runs on; several make a batch")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the result and its page")] = None,
    kind: Annotated[
        str | None, typer.Option(help="methods or recipes; with a name of both, text means the method")
    ] = None,
) -> None:
    """Run a method on text, or a recipe. `interp plugins show NAME` says what can be set."""
    both = all(name in registry(either).names() for either in RUNNABLE)
    plugin = find(name, (kind or ("methods" if text else "recipes"),) if kind or both else RUNNABLE)
    value = plugin.load()
    if plugin.kind == "methods":
        _method(value, given or [], model or "toy:text", text or [], out or Path("out") / plugin.name)
    elif plugin.kind == "recipes":
        options = {"model": model, "text": text[0] if text and len(text) == 1 else text, "out": out}
        _recipe(plugin.name, value, given or [], {key: v for key, v in options.items() if v is not None})
    else:
        raise PlanError(f"{plugin.label} cannot be run; methods and recipes can")


def _method(kind: Any, given: list[str], model: str, text: list[str], out: Path) -> None:
    values = settings.read(kind.name, kind.Config, given)
    if not text:
        raise PlanError(f"{kind.name} is a method and runs on text: --text 'Q: big\\nA:'")
    ready = kind()
    ready.configured(values)  # before the model is loaded
    from .model import load

    _keep(ready(load(model), text, **values), out)


def _recipe(name: str, function: Any, given: list[str], options: dict[str, Any]) -> None:
    config = settings.of_function(function)
    for key in options:
        if key not in config.model_fields:
            raise PlanError(f"recipe {name} has no --{key}; its settings: {', '.join(config.model_fields) or 'none'}")
    ready = settings.configured(f"recipe {name}", config, settings.read(name, config, given) | options)
    found = function(**{key: getattr(ready, key) for key in config.model_fields})
    if hasattr(found, "to_html") and hasattr(found, "save"):
        _keep(found, options.get("out", Path("out") / name))
    elif found is not None:
        print(found)


def _keep(result: Any, out: Path) -> None:
    result.show()
    result.save(out)
    print(f"\n{result.to_html(out / 'result.html')}")
