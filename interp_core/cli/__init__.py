"""`interp …`: the command line. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import compatibility, progress
from .._version import __version__
from ..columns import terminal_width, wrapped
from ..errors import InterpError
from . import flags, help, outputs, plan, plugins, run, shards
from .show import show

ANEW = "nothing is written, and the same command begins anew"


class Interp(TyperGroup):
    """All commands. `-q` is one of their words wherever it stands; Ctrl-C ends them with what they have kept."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """With `-q` before the command, where typer looks for it."""
        words = [word for word in args if word != "-q"]
        return super().parse_args(ctx, ["-q"] * (len(words) < len(args)) + words)

    def invoke(self, ctx: Any) -> Any:
        """The command, silent about how far it is with `-q` and where standard error is no terminal."""
        with progress.hushing(ctx.params["quiet"] or not sys.stderr.isatty()), progress.above():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as stop:
                kept = "; ".join(getattr(stop, "__notes__", ())) or "the same command begins anew"
                print(f"interp: stopped: {kept}", file=sys.stderr)
                raise typer.Exit(130) from stop


app = typer.Typer(
    cls=Interp,
    help="Name any site of a transformer, read it, change it, see that it acted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"interp_core {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="no lines about how far work is; -q may stand anywhere")
    ] = False,
) -> None:
    """Options of all commands, whose help is that of `app`."""


app.add_typer(plugins.app, name="plugins")
# settings are flags that only the plugin knows: what click does not know it hands on as words
settings_as_words = {"ignore_unknown_options": True}
app.command(cls=help.NamedCommand, context_settings=settings_as_words)(run.run)
for recipe, about in {
    "demo": "Logit lens, a patching map and a steered generation on one model, in one HTML report.",
    "attribute": "Which tokens of a prompt an answer comes from (--prompt, --target, --method): a table and a page.",
}.items():
    app.command(recipe, cls=help.Shortcut, help=about, context_settings=settings_as_words)(run.run)
app.command(cls=flags.SeveralCommand, context_settings=settings_as_words)(plan.plan)
app.command()(show)
for of_a_run in (shards.work, shards.resume, shards.collect, shards.sbatch):
    app.command()(of_a_run)
app.command("status")(shards.show_status)
Model = Annotated[str | None, typer.Argument(help="toy:text, a folder, or a hub id")]
Named = Annotated[str | None, typer.Option("--model", help="the same, as an option")]
Out = Annotated[Path | None, typer.Option(help="also write the table to a file")]


@app.command()
def sites(model: Model = None, named: Named = None) -> None:
    """Every site of a model, and what its self-check found."""
    source = flags.one_model(model, named)
    from ..model import load

    loaded, width = load(source), terminal_width()
    print(wrapped(str(loaded), width), "", loaded.sites.text(width), "", wrapped(str(loaded.check), width), sep="\n")


@app.command()
def families(
    model_type: Annotated[
        str | None, typer.Argument(help="a model type, such as mamba, or a class; default: all")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Which model types, and classes of images and text, are served on which engines, and what each has; measured on
    tiny models, none is loaded."""
    known, width = compatibility.matrix(), terminal_width()
    types, images = known["types"], known["visual"]
    if model_type is not None:
        shown = compatibility.of_type(model_type, width)
        print(json.dumps(compatibility.row_of(model_type), indent=1) if as_json else shown)
    elif as_json:
        print(json.dumps({"types": types, "visual": images}, indent=1))
    else:
        print(compatibility.listing(types, width), "", *compatibility.counts(types), "", sep="\n")
        print(compatibility.listing_of_images(images, width), "", compatibility.counts_of_images(images), sep="\n")


@app.command()
def check(
    model: Model = None,
    named: Named = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="an engine, or several; default: all that are installed")
    ] = None,
    out: Out = None,
) -> None:
    """The whole battery on your model: every site, read, edited, differentiated and generated with, on every engine."""
    source = flags.one_model(model, named)
    outputs.demand_writable(out, file=True)
    from ..batteries.sites import check_model
    from ..model import load

    alone = "" if engine and len(engine) == 1 else "; --engine NAME checks one engine alone"
    with progress.stopping(lambda: f"{ANEW}{alone}"):
        loaded = load(source)
        battery = check_model(loaded, engine or ())
    _written(out, f"{battery}\n")
    width = terminal_width()
    print(wrapped(str(loaded), width), "", battery.text(width), sep="\n")
    if battery.failed:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model = None,
    named: Named = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often each operation is timed")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="length of the prompt")] = 32,
    out: Out = None,
    extra: Annotated[
        list[str] | None, typer.Option(help="a method, or module:function of your own taking model and ids")
    ] = None,
) -> None:
    """Time reads and edits on your model (the toy, if none is named) against hand-written hooks."""
    source = flags.one_model(model, named, "toy:text")
    outputs.demand_writable(out, file=True)
    from ..bench import benchmark
    from ..model import load

    with progress.stopping(lambda: f"{ANEW}; fewer --rounds take less time"):
        text = benchmark(load(source), rounds=rounds, n_tokens=tokens, extra=extra or [])
    _written(out, f"{text}\n")
    print(text)


def _written(out: Path | None, text: str) -> None:
    """Write a table before it is shown."""
    if out is not None:
        from ..files import write

        write(out, text)


def main() -> None:
    """Run the command line; errors of interp_core, and files that cannot be read or written, end it with their message,
    not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")  # a letter that a terminal lacks is no reason to lose the rest
    try:
        app()
    except (InterpError, OSError, UnicodeError) as error:
        print(f"interp: {outputs.sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interp: stopped: the same command begins anew", file=sys.stderr)
        sys.exit(130)
