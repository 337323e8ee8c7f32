"""What every recipe must keep.

testing.check_recipe("demo", settings={"words": 2}).raise_if_failed()
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import settings as _settings
from ..errors import InterpError, PlanError
from ..plugins import registry, status_of
from ..result import same
from .report import Failed, NotReached, Report, Tell, reported

MODELS = ("model", "model_path")
"""Settings that a model goes into."""
TOY = "toy:text"
RECORD = ("manifest.json", "record", "DONE")
"""Of a run folder, what says when and how it was made."""


def check_recipe(
    recipe: Callable[..., Any] | str,
    model: str = TOY,
    *,
    settings: Mapping[str, Any] | None = None,
    tell: Tell | None = None,
) -> Report:
    """Run every check on a recipe: it runs twice, in a folder that is deleted afterwards, on the toy if its model can
    be chosen.

    Args:
        recipe: the function, or its registered name.
        model: what goes into its setting `model` or `model_path`.
        settings: those that have no default, and others.
        tell: gets each row as soon as its check is done.

    Raises:
        PluginError: no recipe of this name.
    """
    function = registry("recipes").get(recipe) if isinstance(recipe, str) else recipe
    name = recipe if isinstance(recipe, str) else getattr(recipe, "__name__", repr(recipe))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        case = _Case(function, model, dict(settings or {}), Path(folder) / "out")
        checks = (case.function, case.help, case.runs, case.again)
        return reported(f"recipe {name!r}", [(check.__name__, check, None) for check in checks], tell)


class _Case:
    """One recipe; each method is a check, and its docstring says what must hold."""

    def __init__(self, function: Any, model: str, settings: dict[str, Any], folder: Path) -> None:
        self.call, self.model, self.settings, self.folder = function, model, settings, folder
        self.returned: Any = None
        self.files: dict[str, Any] | None = None

    def function(self) -> str:
        """A function of one config."""
        _, why = status_of("recipes", "", self.call)
        if why:
            raise Failed(why)
        config = _settings.of_function(self.call)
        if config.__name__ == self.call.__name__:
            return f"its {len(config.model_fields)} arguments are its settings"
        return config.__name__

    def help(self) -> str:
        """Its help can be shown, and has every setting."""
        config = _settings.of_function(self.call)
        page = _settings.page(config)
        if lacking := [name for name in config.model_fields if f"--{name}  " not in page]:
            raise Failed(f"its help lacks {', '.join(lacking)}")
        return f"{len(config.model_fields)} settings"

    def runs(self) -> str:
        """It runs on the toy, into a folder, with its defaults."""
        self.returned = self._once(self._config())
        self.files = _files(self.folder)
        shown = f", {len(self.files)} files" if self.folder.exists() else ""
        return f"gave {'nothing' if self.returned is None else type(self.returned).__name__}{shown}"

    def again(self) -> str:
        """A second run over the first gives the same, or goes on with it."""
        if self.files is None:
            raise NotReached("needs a first run")
        returned, before = self._once(self._config()), self.files
        after = _files(self.folder)
        if differ := sorted(name for name in {**before, **after} if before.get(name) != after.get(name)):
            raise Failed(f"a second run into the same folder differs in {', '.join(differ[:5])}")
        if before:
            return "the same files"
        kind: Any = type(returned)
        if returned is None or kind.__eq__ is object.__eq__:
            raise NotReached("it wrote no files, and gave nothing that can be compared")
        if not same(self.returned, returned):
            raise Failed("a second run gives something else: draw from a generator with a seed among the settings")
        return "the same value"

    def _config(self) -> Any:
        config = _settings.of_function(self.call)
        fields, chosen = config.model_fields, dict(self.settings)
        for name in MODELS:
            if name in fields:
                chosen.setdefault(name, self.model)
        if "out" in fields:
            chosen["out"] = self.folder
        if needed := [name for name, field in fields.items() if field.is_required() and name not in chosen]:
            raise NotReached(f"it needs {', '.join(needed)}, which have no default: give them, {_flags(needed)}")
        try:
            return _settings.configured("the recipe", config, chosen)
        except InterpError as error:
            raise Failed(str(error)) from error

    def _once(self, config: Any) -> Any:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return _settings.call(self.call, config)
        except PlanError as error:
            if self.settings:
                raise Failed(f"it refuses these settings: {error}") from error
            raise NotReached(f"it refuses its defaults: {error}") from error
        except (Exception, SystemExit) as error:  # a plugin may raise anything
            trace = traceback.format_exc().strip()
            raise Failed(f"it raised {type(error).__name__}: {error}\n{trace}") from error


def _flags(names: list[str]) -> str:
    return " ".join(f"--set {name}=…" for name in names)


def _files(folder: Path) -> dict[str, Any]:
    """What a run wrote, but for the records of when and how."""
    return {
        str(path.relative_to(folder)): _without_origin(path)
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in RECORD
    }


def _without_origin(path: Path) -> Any:
    """A file's content; of a saved result, without where it came from, which has the date."""
    content = path.read_bytes()
    if path.name == "result.json":
        return {key: part for key, part in json.loads(content).items() if key != "provenance"}
    return content
