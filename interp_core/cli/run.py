"""`interp run`: a method or a recipe from the command line.

Settings are given as `--name value` or, where a setting takes several, `--name A B`; or as `--set name=value`, which
also reaches those that are called like an option of `interp run` itself. A setting that is true or false needs no
value: `--verify` is `--verify true`. A file after `--config` has any of them by name; flags win over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import settings
from ..columns import terminal_width, wrapped
from ..errors import PlanError
from ..plugins import Plugin, find, registry
from ..progress import Progress
from ..runs.stopping import stoppable
from . import flags, outputs
from .elsewhere import run_elsewhere
from .planned import carry_out, planned, starter_of

if TYPE_CHECKING:
    from ..result import Result
    from ..runs import RunFolder

RUNNABLE = ("methods", "recipes")


def completed(incomplete: str) -> list[str]:
    """Names that begin so, for the shell."""
    return sorted(name for kind in RUNNABLE for name in registry(kind).names() if name.startswith(incomplete))


def run(
    name: Annotated[
        str,
        typer.Argument(help="a method or a recipe (dist:name reaches a shadowed one)", autocompletion=completed),
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="--SETTING VALUE", help="settings: `interp run NAME --help`")
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="setting=value, as often as needed")] = None,
    model: Annotated[
        str | None, typer.Option(help="toy:text, a folder, or a hub id; may also stand behind the name")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="what a method runs on; several make a batch")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run (default: one of its own below results/)")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON or TOML file of settings; flags win over it")] = None,
    kind: Annotated[
        str | None, typer.Option(help="methods or recipes; with a name of both, text means the method")
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="run it as jobs of this launcher (`interp plugins launchers`)")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="divide it, for several processes at once; see `interp status`")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="of --shards: how many processes; 0: only plan it")] = None,
    launcher_option: Annotated[
        list[str] | None, typer.Option("--launcher-option", help="of the launcher, as 'time=60'; as often as needed")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="of --shards: submit the workers, do not wait")] = False,
) -> None:
    """Run a method on text, or a recipe. `interp run NAME --help` says what can be set, each by `--setting value`.
    `--overwrite` deletes what another run has made in `--out`."""
    if name.startswith("-"):
        raise PlanError(f"interp run takes the name of a method or a recipe first, then its settings, not {name}")
    plugin = runnable(name, kind, text)
    words = list(words or [])
    if words and not words[0].startswith("-"):
        model = flags.one_model(words.pop(0), model)
    chosen = launcher_option or ()
    _demand_together(shards, launcher, workers, detach, chosen)
    if launcher is not None or shards is not None:
        settings_and_options = {"words": words, "assignments": assignments, "model": model, "text": text, "out": out}
        arguments = {**settings_and_options, "name": name, "config": config, "kind": kind}
        if shards is None:
            run_elsewhere(starter_of(str(launcher), chosen), run, plugin, arguments)
            return
        home = planned(run, plugin, arguments, shards, starter_of(launcher or "local", chosen))
        print(f"{home}: planned, {shards} shards")
        if workers != 0:
            carry_out(run, home, workers, launcher or "local", chosen, detach)
        return
    with stoppable():
        _here(plugin, words, assignments, {"model": model, "text": text, "out": out}, config)


def _here(
    plugin: Plugin, words: list[str], assignments: list[str] | None, options: dict[str, Any], config: Path | None
) -> None:
    """Run it in this process."""
    value = plugin.load()
    if plugin.kind == "methods":
        _method(value, words, assignments, options, config)
    elif plugin.kind == "recipes":
        text = options["text"]
        options["text"] = text[0] if text and len(text) == 1 else text
        _recipe(plugin.name, value, words, assignments, {k: v for k, v in options.items() if v is not None}, config)
    else:
        raise PlanError(f"{plugin.label} cannot be run; methods and recipes can")


def _demand_together(
    shards: int | None, launcher: str | None, workers: int | None, detach: bool, options: Sequence[str]
) -> None:
    if shards is None and (workers is not None or detach):
        option = "--workers" if workers is not None else "--detach"
        raise PlanError(f"{option} comes with --shards N, which divides the run among workers")
    if launcher is None and options:
        raise PlanError("--launcher-option comes with --launcher NAME")


def runnable(name: str, kind: str | None = None, text: Sequence[str] | None = None) -> Plugin:
    """The method or recipe of that name, not imported.

    Raises:
        PluginError: none.
    """
    both = all(name in registry(each).names() for each in RUNNABLE)
    return find(name, (kind or ("methods" if text else "recipes"),) if kind or both else RUNNABLE)


@contextmanager
def passed(pairs: list[str], **options: Any) -> Iterator[None]:
    """For a while, manifests of run folders have these settings as those that were passed."""
    from ..runs.session import PASSED

    words = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    more = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    token = PASSED.set({**words, **{key: value for key, value in more.items() if value is not None}})
    try:
        yield
    finally:
        PASSED.reset(token)


def _method(
    kind: Any, words: list[str], assignments: list[str] | None, options: dict[str, Any], file: Path | None
) -> None:
    """A method on text: settings of its own, and those of every method."""
    from ..methods import Batching

    overwrite = _overwriting(words)

    called = settings.joined(Batching, kind.Config)
    pairs = flags.pairs(kind.name, called, words, assignments)
    values = settings.read(kind.name, called, pairs)
    if file is not None:
        known = {**called.model_fields, **options}
        for key, value in flags.read_file(file, kind.name, list(known)).items():
            if key in options:
                options[key] = value if options[key] is None else options[key]
            else:
                values.setdefault(key, value)
    model, text, out = options["model"] or "toy:text", options["text"] or [], options["out"]
    if not text:
        raise PlanError(f"{kind.name} is a method and runs on text: --text 'Q: big\\nA:'")
    settings.configured(kind.name, called, values)  # refuses before the model is loaded
    batching = {key: values.pop(key) for key in Batching.model_fields if key in values}
    ready = kind()
    config = ready.configured(values)
    from ..provenance import plain_settings

    record = {**plain_settings(config), "text": text}
    with passed(pairs, **options):
        _demand_free(out, record, kind.name, "text", overwrite)
    from ..model import load

    loaded = load(model)
    with passed(pairs, **options), _opened(out, record, kind.name, loaded, "text", overwrite) as run:
        # batches are kept one by one in the run's folder, so that a stopped run goes on; without them there is no need
        more = {"out": run} if batching.get("batch_size") is not None or run.shards is not None else {}
        _keep(ready(loaded, text, **values, **batching, **more), run)


def _overwriting(words: list[str], config: type[settings.Config] | None = None) -> bool:
    """Whether `--overwrite` is among the words, which is taken out of them; a setting of that name is the recipe's."""
    if "--overwrite" not in words or (config is not None and "overwrite" in config.model_fields):
        return False
    words.remove("--overwrite")
    return True


def _demand_free(
    out: Path | str | None, values: dict[str, Any], name: str, dataset: str = "", overwrite: bool = False
) -> None:
    """Refuse a folder that cannot be written or is another run's, before a model is loaded; with `overwrite`, what that
    run made is deleted."""
    from .. import runs

    outputs.demand_writable(runs.RESULTS if out is None else Path(out))
    if out is not None and overwrite:
        runs.discard(out)
    if out is not None:
        _opened(out, values, name, dataset=dataset, overwrite=overwrite)


def _opened(
    out: Path | str | None, values: dict[str, Any], name: str, model: Any = None, dataset: str = "",
    overwrite: bool = False,
) -> RunFolder:  # fmt: skip
    """The run folder of something that keeps none itself."""
    from .. import runs

    run = runs.open(out, values, recipe=name, model=model, dataset=dataset, free=("progress",), say=lambda line: None)
    run.overwrite = overwrite
    run.claim(["result.json", "result.safetensors"], stage="result")
    return run


def _recipe(
    name: str, function: Any, words: list[str], assignments: list[str] | None, options: dict[str, Any],
    file: Path | None,
) -> None:  # fmt: skip
    config = settings.of_function(function)
    overwrite = _overwriting(words, config)
    pairs = flags.pairs(f"recipe {name}", config, words, assignments)
    for key in options:
        if key not in config.model_fields:
            raise PlanError(f"recipe {name} has no --{key}; its settings: {', '.join(config.model_fields) or 'none'}")
    held = {} if file is None else flags.read_file(file, f"recipe {name}", list(config.model_fields))
    values = held | settings.read(f"recipe {name}", config, pairs) | options
    ready = settings.configured(f"recipe {name}", config, values)
    out = options.get("out", getattr(ready, "out", None))
    if isinstance(out, (str, Path)) and str(out):
        outputs.demand_writable(Path(out))
        if overwrite:
            from .. import runs

            runs.discard(out)
    with passed(pairs, **{key: str(value) for key, value in held.items()} | options), Progress(name, 0):
        returned = settings.call(function, ready)
    if hasattr(returned, "to_html") and hasattr(returned, "save"):
        from ..provenance import plain_settings

        values = {key: value for key, value in plain_settings(ready).items() if key != "out"}
        with _opened(options.get("out"), values, name, overwrite=overwrite) as run:
            _keep(returned, run)
    elif returned is not None:
        print(returned)
    if code := getattr(returned, "exit_code", 0):  # a verdict, say; 1 and 2 are those of errors
        raise typer.Exit(code)


def _keep(result: Result, run: RunFolder) -> None:
    """Save a result, then show it: what is shown may end in an error, or on a screen that lacks a letter."""
    run.put(result.files(), stage="result")
    run.figure("result.html", result.to_html)
    result.show()
    if result.finding and result.finding not in str(result):
        print(f"\n{wrapped(result.finding, terminal_width())}")
    print(f"\n{run.path / 'result.html'}")
