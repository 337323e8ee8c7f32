"""The gallery shows what its own blocks make: pictures and pages that are there, and what they print on the real model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import the_real_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import gallery  # noqa: E402

TEXT = gallery.PAGE.read_text(encoding="utf-8")


def test_pictures_and_pages_are_those_of_the_blocks() -> None:
    code = "".join(block["code"] for block in gallery.blocks(TEXT))
    for kind, folder in (("png", gallery.PICTURES), ("html", gallery.PAGES)):
        written = set(re.findall(rf'"(\w+\.{kind})"', code))
        assert len(written) == 5 and written == {path.name for path in folder.iterdir()}
        assert all((folder / name).stat().st_size <= gallery.LARGEST[kind] for name in written)
        assert all(f"]({(folder / name).relative_to(gallery.PAGE.parent)})" in TEXT for name in written)


@pytest.mark.real
def test_blocks_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words, and numbers that rounding on another processor may move by one in the last digit."""
    the_real_model()
    monkeypatch.chdir(tmp_path)
    number = re.compile(r"\d+")
    now = gallery.run(TEXT)
    assert number.sub("#", now) == number.sub("#", TEXT)
    pairs = zip(number.findall(now), number.findall(TEXT), strict=True)
    assert all(abs(int(new) - int(old)) <= 1 for new, old in pairs)
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.html"))) == 5
