"""Every Python block of the README and the docs runs, in order, page by page; every link leads somewhere.

The tutorial, whose blocks are files and shell commands too, has `test_tutorial.py`, the gallery `test_gallery.py`."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import the_real_model, toy_model
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from interp_core.plugins import refresh

ROOT = Path(__file__).parent.parent
REAL = ("real_model.md",)
"""Pages whose blocks need the real model."""
APART = ("tutorial.md", "gallery.md")
"""Pages whose blocks have tests of their own."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def marked(page: Path) -> Any:
    return pytest.param(page, marks=[pytest.mark.real] * (page.name in REAL), id=page.name)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if page.name not in APART])
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in REAL:
        the_real_model()
    monkeypatch.chdir(tmp_path)
    document = Sybil(parsers=[PythonCodeBlockParser()], path=str(page.parent), patterns=[page.name]).parse(page)
    examples = list(document.examples())
    assert len(examples) == page.read_text().count("```python")
    try:
        for example in examples:
            example.evaluate()
    finally:
        refresh()  # a page may register plugins by hand


def prose(page: Path) -> str:
    """A page without its blocks and pieces of code."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@cache
def places(page: Path) -> set[str]:
    """What can be linked to on a page: its headings, named as GitHub and the docs site name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To pages, pictures and files that are there, and to headings that these pages have."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, place = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), f"{page.name}: {target}"
        if place:
            assert place in places(other.resolve()), f"{page.name}: {target} (no such heading there)"


def test_the_picture_of_the_staircase_is_drawn_from_the_plans() -> None:
    script = runpy.run_path(str(ROOT / "scripts/staircase.py"))
    assert script["PICTURE"].read_text(encoding="utf-8") == script["svg"](toy_model())


def test_commands_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    make = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.M):
        assert f"\n{target}:" in make
    from interp_core.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    known |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"^interp (\w+)", text, re.M)) <= known
    assert "make test" in (ROOT / ".ci/run").read_text()
