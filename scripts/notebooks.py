"""Makes docs/notebooks/*.ipynb by running the .py files beside them: python scripts/notebooks.py [NAME …]

A source is plain Python in cells: `# %%` begins one, `# %% [markdown]` one of text in comments. Cells run in one module
after another as Jupyter runs them: what is printed and what the last expression shows are kept. No kernel is needed.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs/notebooks"
LARGEST = 200_000


class Cell(NamedTuple):
    """A cell of a source: whether it is text, and its lines as a notebook has them."""

    is_text: bool
    source: str


def sources() -> list[Path]:
    """The sources of all notebooks."""
    return sorted(FOLDER.glob("*.py"))


def cells(text: str) -> Iterator[Cell]:
    """The cells of a source."""
    _, *parts = re.split(r"^# %%", text, flags=re.M)
    for part in parts:
        head, _, body = part.partition("\n")
        is_text = head.strip() == "[markdown]"
        yield Cell(is_text, (re.sub(r"^# ?", "", body, flags=re.M) if is_text else body).strip())


def outputs(code: str, module: ModuleType, count: int) -> list[dict[str, Any]]:
    """Run a cell: what it prints, and what its last expression shows."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, shown = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), vars(module))
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), vars(module))
    said: list[dict[str, Any]] = []
    if text := printed.getvalue():
        said.append({"name": "stdout", "output_type": "stream", "text": lines(text)})
    if shown is not None and not isinstance(shown, str):
        data = {"text/plain": lines(repr(shown))}
        if hasattr(shown, "_repr_html_"):
            data["text/html"] = lines(shown._repr_html_())
        said.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return said


def lines(text: str) -> list[str]:
    """Text as notebooks keep it."""
    return text.splitlines(keepends=True)


def executed(path: Path) -> dict[str, Any]:
    """The notebook of a source, run from beginning to end in a folder of its own."""
    module, mine = ModuleType("__main__"), sys.modules["__main__"]
    sys.modules["__main__"] = module  # where a notebook's classes are, for all who look for them
    written, here = [], Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for number, cell in enumerate(cells(path.read_text(encoding="utf-8"))):
                kept = {"id": f"cell-{number}", "metadata": {}, "source": lines(cell.source)}
                if cell.is_text:
                    written.append({"cell_type": "markdown", **kept})
                else:
                    count = sum(each["cell_type"] == "code" for each in written) + 1
                    said = outputs(cell.source, module, count)
                    written.append({"cell_type": "code", "execution_count": count, "outputs": said, **kept})
        finally:
            os.chdir(here)
            sys.modules["__main__"] = mine
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": written,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def dumped(notebook: Mapping[str, Any]) -> str:
    """A notebook as its file has it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(names: list[str]) -> None:
    for path in sources():
        if not names or path.stem in names:
            text, target = dumped(executed(path)), path.with_suffix(".ipynb")
            if len(text.encode()) > LARGEST:
                sys.exit(f"{target.name} would have {len(text.encode()):,} bytes: show less in it")
            target.write_text(text, encoding="utf-8")
            print(f"{target.relative_to(ROOT)}: {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
