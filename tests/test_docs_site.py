"""The docs site: every page has its place, links are made its own, and it builds (`pytest -m docs`)."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import interp_core as ic

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import docs_site  # noqa: E402


def test_every_page_has_a_place() -> None:
    listed = [page for members in docs_site.SECTIONS.values() for page in members]
    assert len(listed) == len(set(listed))
    assert set(listed) == docs_site.pages(), "give it a place in SECTIONS of scripts/docs_site.py"


def test_links_become_those_of_the_site(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    page = tmp_path / "page.md"
    for text, there in {
        "[a study](docs/notebooks/patching.ipynb)": "[a study](docs/notebooks/patching.md)",
        "[the page](gallery/fact.html)": '<a href="gallery/fact.html">the page</a>',
        "[the start](../README.md#use)": "[the start](../index.md#use)",
        "[tests](../tests/test_sweep.py)": "[tests](path:../tests/test_sweep.py)",
        "[folder](plugins)": "folder",
        "[a heading](#use), [elsewhere](https://a.b/tests), ![picture](images/a.png), [page](runs.md#x)": None,
    }.items():
        page.write_text(text)
        assert docs_site.as_on_the_site(page) == (there or text)


def test_lost_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<h1 id='here'></h1><a href='b.html#there'></a><a href='#here'></a><img src='c.png'>"
    )
    (tmp_path / "b.html").write_text("<a href='a.html#here'></a><a href='a.html#gone'></a><a href='https://x.y'></a>")
    lost = sorted(docs_site.broken(tmp_path))
    assert [line.split(" (")[0] for line in lost] == ["a.html: b.html#there", "a.html: c.png", "b.html: a.html#gone"]


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, str(ROOT / "scripts/docs_site.py"), str(tmp_path / "site")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site/html"
    index = (site / "searchindex.js").read_text()
    for name in ic.__all__:
        kind = getattr(ic, name)
        page = "errors" if isinstance(kind, type) and issubclass(kind, Exception) else name
        mark = "module-" if page == "errors" or inspect.ismodule(kind) else ""
        text = (site / f"api/{page}.html").read_text()
        assert f'id="{mark}interp_core.{page}"' in text and f'"{name}"' in index
    assert "big\\nA:" in (site / "api/toys.html").read_text()  # code keeps its backslashes
    assert "<table" in (site / "docs/notebooks/patching.html").read_text()
