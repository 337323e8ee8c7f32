"""Pages: escaped, self-contained, whole or not written at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import interp_core as ic
from interp_core.report import colors, html, png
from interp_core.result import write

NASTY = "<script>alert('x')</script>\"'&"


def test_everything_is_escaped() -> None:
    body = html.heatmap([[0.5]], [NASTY], [NASTY], texts=[[NASTY]], tips=[[NASTY]], caption=NASTY)
    body += html.tokens([NASTY], [1.0], caption=NASTY) + html.table([{NASTY: NASTY}])
    page = html.page(NASTY, NASTY, [html.Section(NASTY, NASTY, body)])
    assert page.count("<script>") == 1  # our own
    assert "alert('x')" not in page

    class Tags(HTMLParser):
        found: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found.add(tag)
            assert all(not name.startswith("on") for name, _ in attrs)

    parser = Tags()
    parser.feed(page)
    assert parser.found <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "section", "figure", "div", "table",
        "thead", "tbody", "tr", "th", "td", "figcaption", "span", "br", "script",
    }  # fmt: skip


def test_pages_need_no_network() -> None:
    page = html.page("t", "i", [html.Section("a", "b", html.table([{"x": 1.5}]))])
    assert not re.search(r"(src|href)=|@import|url\(|https?:", page)


def test_white_space_shows() -> None:
    assert [html.visible(t) for t in (" a", "\n\n", "", "b\t", "  ")] == ["·a", "⏎⏎", "∅", "b⇥", "· "]


def test_colours() -> None:
    assert colors.limits_of([[0.0, -2.0], [1.0, float("nan")]], True) == (-2.0, 2.0)
    assert colors.limits_of([[1.0]], False) == (1.0, 2.0) and colors.limits_of([], False) == (0.0, 1.0)
    assert colors.css(float("nan"), 0, 1, False)[0] == "#ececec"
    ends = [colors.rgb(v, -1, 1, True) for v in (-1.0, 0.0, 1.0)]
    assert ends[0][2] > ends[0][0] and ends[2][0] > ends[2][2] and min(ends[1]) > 240
    assert colors.rgb(9.0, 0, 1, False) == colors.rgb(1.0, 0, 1, False)


def test_pictures(tmp_path: Path) -> None:
    path = png.heatmap(
        tmp_path / "a" / "x.png",
        [[0.0, 1.0], [float("nan"), -1.0]],
        ["a", "b"],
        ["$x$", " y"],
        texts=[["1", "2"], ["3", "$4"]],
        diverging=True,
    )
    assert path.stat().st_size > 2000


def test_pictures_of_many_rows_and_columns_stay_small(tmp_path: Path) -> None:
    """Names that would run into each other are left out, long titles are broken into lines."""
    from matplotlib.image import imread

    values = [[float(i == j) for j in range(400)] for i in range(300)]
    path = png.heatmap(
        tmp_path / "x.png", values, [f"r{i}" for i in range(300)], [f"c{j}" for j in range(400)], title="long " * 200
    )
    height, width, _ = imread(path).shape
    assert width < 150 * (png.SIDE + 3) and height < 150 * (png.SIDE + 4)
    assert list(png._named(10, 0.42)) == list(range(10)) and len(png._named(400, 0.06)) == 134


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.html"
    write(target, "first")

    def fail(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write(target, "second")
    assert target.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["page.html"]


@dataclass(frozen=True, eq=False)
class Sample(ic.Result):
    """A result with one optional tensor."""

    AXES = {"a": ("batch", "pos"), "b": ("batch",)}
    a: torch.Tensor
    b: torch.Tensor | None
    names: tuple[str, ...]
    note: str = ""


def test_results(tmp_path: Path) -> None:
    sample = Sample(torch.ones(2, 3), None, ("x", "y"), note="é")
    assert Sample.load(sample.save(tmp_path)) == sample
    assert sample != Sample(torch.ones(2, 3), torch.ones(2), ("x", "y"), note="é")
    with pytest.raises(ValueError, match="batch is 3, elsewhere 2"):
        Sample(torch.ones(2, 3), torch.ones(3), ())
    with pytest.raises(ValueError, match="has 1 axes, not batch pos"):
        Sample(torch.ones(2), None, ())
    with pytest.raises(AttributeError):
        sample.note = "other"  # type: ignore[misc]
    (tmp_path / "result.safetensors").write_bytes(b"torn")
    with pytest.raises(ic.LoadError, match="no readable result"):
        Sample.load(tmp_path)
