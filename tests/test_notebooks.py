"""The notebooks run, and are those of their sources."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import interp_core as ic
from interp_core.plugins import refresh

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import notebooks  # noqa: E402


@pytest.fixture(autouse=True)
def plugins_as_they_were() -> Iterator[None]:
    yield
    refresh()  # one registers a method by hand


def shape(notebook: dict[str, Any]) -> list[Any]:
    """Cells, and of what kinds their outputs are; numbers and pictures in these may differ."""
    return [
        (cell["cell_type"], "".join(cell["source"]), [sorted(out.get("data", out)) for out in cell.get("outputs", [])])
        for cell in notebook["cells"]
    ]


@pytest.mark.parametrize("path", notebooks.sources(), ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_that_of_its_source(path: Path) -> None:
    kept = path.with_suffix(".ipynb")
    text = kept.read_text(encoding="utf-8")
    assert len(text.encode()) <= notebooks.LARGEST
    assert shape(json.loads(text)) == shape(notebooks.executed(path)), f"python scripts/notebooks.py {path.stem}"


def test_there_are_three_and_the_kit_is_content_with_the_method() -> None:
    assert [path.stem for path in notebooks.sources()] == ["method", "patching", "steering"]
    said = (notebooks.FOLDER / "method.ipynb").read_text(encoding="utf-8")
    assert "ok    documented" in said and "FAIL" not in said
    assert "attention_distance" not in ic.registry("methods").names()
