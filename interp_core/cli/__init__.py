"""`interp …`: the command line. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InterpError
from . import help, plugins, run
from .show import show

app = typer.Typer(
    help="Name any site of a transformer, read it, change it, see that it acted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(plugins.app, name="plugins")
# settings are flags that only the plugin knows: what click does not know it hands on as words
settings_as_words = {"ignore_unknown_options": True}
app.command(cls=help.NamedCommand, context_settings=settings_as_words)(run.run)
for recipe, about in {
    "demo": "Logit lens, a patching map and a steered generation on one model, in one HTML report.",
    "attribute": "Which tokens of a prompt an answer comes from (--prompt, --target, --method): a table and a page.",
}.items():
    app.command(recipe, cls=help.Shortcut, help=about, context_settings=settings_as_words)(run.run)
app.command()(show)
Model = Annotated[str, typer.Argument(help="toy:text, a folder, or a hub id")]


@app.command()
def sites(model: Model) -> None:
    """Every site of a model, and what its self-check found."""
    from ..model import load

    loaded = load(model)
    print(loaded, "", loaded.sites, "", loaded.check, sep="\n")


@app.command()
def check(
    model: Model,
    engine: Annotated[
        list[str] | None, typer.Option(help="an engine, or several; default: all that are installed")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write the table to a file")] = None,
) -> None:
    """The whole battery on your model: every site, read, edited, differentiated and generated with, on every engine."""
    from ..batteries.sites import check_model
    from ..model import load

    loaded = load(model)
    battery = check_model(loaded, engine or ())
    print(loaded, "", battery, sep="\n")
    if out is not None:
        from ..files import write

        write(out, f"{battery}\n")
    if battery.failed:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model = "toy:text",
    rounds: Annotated[int, typer.Option(min=1, help="how often each operation is timed")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="length of the prompt")] = 32,
    out: Annotated[Path | None, typer.Option(help="also write the table as Markdown")] = None,
    extra: Annotated[
        list[str] | None, typer.Option(help="a method, or module:function of your own taking model and ids")
    ] = None,
) -> None:
    """Time reads and edits on your model against hand-written hooks."""
    from ..bench import benchmark
    from ..model import load

    text = benchmark(load(model), rounds=rounds, n_tokens=tokens, extra=extra or [])
    print(text)
    if out is not None:
        from ..files import write

        write(out, text + "\n")


def main() -> None:
    """Run the command line; errors of interp_core, and files that cannot be read or written, end it with their message,
    not a traceback."""
    try:
        app()
    except (InterpError, OSError) as error:
        print(f"interp: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interp: stopped", file=sys.stderr)
        sys.exit(130)
