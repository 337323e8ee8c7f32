"""`interp show`: print or draw again what a folder holds: a result, a run, activations, or what a recipe left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..columns import terminal_width, wrapped
from ..errors import LoadError, PlanError

if TYPE_CHECKING:
    from ..result import Result


def show(
    folder: Annotated[Path, typer.Argument(help="a folder that a method, a recipe, run.save or collect wrote")],
    html: Annotated[Path | None, typer.Option(help="write the page of a result to this file")] = None,
    png: Annotated[Path | None, typer.Option(help="draw a result into this file: .png, .pdf or .svg")] = None,
    width: Annotated[float | None, typer.Option(help="of the picture in inches: 3.3 for a column of a paper")] = None,
    row: Annotated[int | None, typer.Option(help="which prompt to draw (default: all)")] = None,
) -> None:
    """Print a saved result, run or collection of activations again, or draw a result (--html, --png)."""
    if (folder / "result.json").is_file():
        from ..result import Result

        _result(Result.load(folder), html, png, width, row)
        return
    if html or png:
        raise PlanError(f"{folder} holds no result.json, and only results are drawn; leave --html and --png out")
    if (folder / "run.json").is_file():
        from ..saved import open_run

        print(open_run(folder))
    elif (folder / "manifest.json").is_file():
        _run(folder)
    else:
        if not folder.is_dir():
            raise LoadError(f"there is no folder {folder}; give one that a method, a recipe or run.save wrote")
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise LoadError(
            f"{folder} holds nothing that was saved here ({held}); give a folder with a result.json, a run.json or a "
            "manifest.json"
        )


def _result(saved: Result, html: Path | None, png: Path | None, width: float | None, row: int | None) -> None:
    if html is not None:
        print(saved.to_html(html))
    if png is not None:
        print(saved.png(png, row, width=width))
    if html is not None or png is not None:
        return
    screen = terminal_width()
    print("\n".join(wrapped(line, screen) for line in (saved.heading, saved.question, saved.finding) if line))
    print()
    saved.show()
    if record := saved.provenance:
        from ..report.answer import origin

        print("", *(wrapped(f"{name}: {said}", screen) for name, said in origin(record).items()), sep="\n")


def _run(folder: Path) -> None:
    """A run folder: what it is of, how it stands, and the pages in it."""
    from ..runs import manifest

    held: Mapping[str, Any] = manifest(folder)
    model = (held["model"] or {}).get("source", "no model")
    print(f"{held['recipe']} of {model}: {held['state']}, {len(held['sessions'])} session(s)")
    for page in sorted(folder.rglob("*.html")):
        print(f"  {page}")
