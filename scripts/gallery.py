"""Makes what docs/gallery.md shows, by running the page's own blocks on the real model: python scripts/gallery.py

Pictures go to docs/images/gallery, pages to docs/gallery, and what a block prints into the block of text below it. So
the page cannot say anything else than its code does; tests/test_gallery.py holds the two together.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/gallery.md"
PICTURES, PAGES = ROOT / "docs/images/gallery", ROOT / "docs/gallery"
LARGEST = {"png": 80_000, "html": 100_000}
BLOCKS = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?", re.S)


def blocks(text: str) -> Iterator[re.Match[str]]:
    """The page's Python blocks, each with what it prints, if the page shows that."""
    return BLOCKS.finditer(text)


def run(text: str) -> str:
    """The page with what its blocks print now; pictures and pages are written where one is."""
    names: dict[str, Any] = {}
    done, at = [], 0
    for number, block in enumerate(blocks(text)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], f"{PAGE.name}, block {number}", "exec"), names)
        if block["printed"] is not None:
            done += [text[at : block.start("printed")], printed.getvalue()]
            at = block.end("printed")
    return "".join([*done, text[at:]])


def small(path: Path) -> None:
    """A picture in 256 colours, of which charts have hardly more: half the bytes."""
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        text = run(PAGE.read_text(encoding="utf-8"))
        os.chdir(ROOT)
        for path in sorted(Path(folder).iterdir()):
            if path.suffix == ".png":
                small(path)
            if path.stat().st_size > LARGEST[path.suffix[1:]]:
                sys.exit(f"{path.name} has {path.stat().st_size:,} bytes: too many to keep beside the docs")
            target = PICTURES if path.suffix == ".png" else PAGES
            target.mkdir(parents=True, exist_ok=True)
            (target / path.name).write_bytes(path.read_bytes())
            print(f"{target.relative_to(ROOT) / path.name}: {path.stat().st_size:,} bytes")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
