"""What charts look like in grey print, on dark pages, and in letters that the usual font lacks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from interp_core import report
from interp_core.report import colors, fonts, html

WORDS = ["中", " 文字", "🦊", "a"]


def signed() -> list[report.Chart]:
    """The same amount above and below zero, without numbers."""
    values = [-1.0, 1.0]
    return [
        report.Heatmap([values], ["r"], ["a", "b"], diverging=True, colorbar="nats"),
        report.TokenStrip(["aa", "bb"], values, diverging=True),
        report.Overlay([(0, 0, 8, 8), (8, 0, 16, 8)], values, diverging=True),
    ]


def test_below_zero_is_told_from_above_in_grey(tmp_path: Path) -> None:
    """Deep blue and deep red are one grey: what is below zero bears a mark, and the scale says so."""
    from matplotlib.collections import LineCollection

    for chart in signed():
        body = chart.html()
        assert body.count("class='minus'") + body.count("<path d='M") == 1 and "– marks what is below 0" in body
        axes = chart.plot()
        lines = [part for part in axes.collections if isinstance(part, LineCollection)]
        assert sum(len(part.get_segments()) for part in lines) == 1
        assert "– marks" in axes.get_title() + "".join(each.get_ylabel() for each in axes.figure.axes)
        pyplot.close(axes.figure)
    written = report.Heatmap([[-1.0, 1.0]], ["r"], ["a", "b"], diverging=True, texts=[["-1", "1"]])
    for chart in (written, report.Heatmap([[1.0, 2.0]], ["r"], ["a", "b"])):
        assert "class='minus'" not in chart.html() and "marks" not in chart.html(), "numbers say it, or there is none"
        chart.png(tmp_path / "x.png")


def test_nothing_is_the_background_of_dark_pages() -> None:
    """A white block would be the brightest part of a dark page, though it says nothing."""
    for diverging, values in ((True, [0.0, -2.0, 2.0]), (False, [0.0, 1.0, 2.0])):
        grid = report.Heatmap([values], ["r"], ["a", "b", "c"], diverging=diverging).html()
        strip = report.TokenStrip(["a", "b", "c"], values, diverging=diverging).html()
        boxes = report.Overlay([(i, 0, i + 1, 1) for i in range(3)], values, diverging=diverging).html()
        for body in (grid, strip, boxes):
            nights = re.findall(r"--d:(#\w+)", body.split("class='bar'")[0])
            assert nights[0] == html._NIGHT["card"] and len(set(nights)) == 3
    assert "background:var(--d)!important" in html.STYLE and "--d:linear-gradient" in grid
    for night in (colors._SIGNED_NIGHT, colors._AMOUNT_NIGHT):
        light = [0.3 * red + 0.59 * green + 0.11 * blue for red, green, blue in night]
        assert max(light) < 140 and light[-1] == max(light[len(light) // 2 :]), "light letters are readable on all"
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    assert "fill:#fafafa'" in report.Overlay([(0, 0, 4, 4)], [0.0], picture=picture, diverging=True).html()


def spoken() -> list[report.Chart]:
    """All charts, with letters that the usual font lacks wherever there is text."""
    said = {"title": "題 title", "caption": "題"}
    return [
        report.Heatmap([[1.0] * 4], ["層"], WORDS, texts=[WORDS], xlabel="字", ylabel="行", colorbar="值", **said),
        report.Curves([report.Line("線", [1, 2])], ["一", "$二"], xlabel="中", ylabel="文", **said),
        report.Bars([report.Bar("棒", 1.0)], xlabel="值", **said),
        report.TokenStrip(WORDS, [1.0, 2, 3, 4], spans={"段": (0, 2)}, colorbar="值", **said),
        report.Overlay([(0, 0, 4, 4)], {"層": [1.0]}, colorbar="值", **said),
    ]


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of letters is looked up anew."""
    monkeypatch.setattr(fonts, "_FAMILIES", {})


@pytest.mark.usefixtures("forgotten")
def test_letters_that_no_font_has_are_written_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning (they are errors here), and no empty boxes."""
    from matplotlib.font_manager import fontManager

    ours = [font for font in fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(fontManager, "ttflist", ours)  # as on a machine without others
    assert fonts.drawable("aé ·⏎ 中\x7f🦊") == "aé ·⏎ \\u4e2d\x7f\\U0001f98a"
    for number, chart in enumerate(spoken()):
        assert chart.png(tmp_path / f"{number}.png").stat().st_size > 1000
    assert b"u4e2d" in spoken()[0].png(tmp_path / "words.svg").read_bytes()
    axes = spoken()[1].plot(title="新")
    axes.figure.savefig(tmp_path / "plot.png")
    pyplot.close(axes.figure)
    assert axes.get_title() == "\\u65b0"


@pytest.mark.usefixtures("forgotten")
def test_letters_are_drawn_in_a_font_that_has_them(tmp_path: Path) -> None:
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib.font_manager import fontManager

    pen = TTGlyphPen(None)
    for place, step in zip([(0, 0), (0, 900), (900, 900), (900, 0)], ["moveTo", *["lineTo"] * 3], strict=True):
        getattr(pen, step)(place)
    pen.closePath()
    box, letters = pen.glyph(), [ord(letter) for letter in "\ue000\ue001"]  # of nobody else's fonts
    build = FontBuilder(1000, isTTF=True)
    build.setupGlyphOrder([".notdef", "box"])
    build.setupCharacterMap(dict.fromkeys(letters, "box"))
    build.setupGlyf({".notdef": box, "box": box})
    build.setupHorizontalMetrics({".notdef": (1000, 0), "box": (1000, 0)})
    build.setupHorizontalHeader(ascent=900, descent=0)
    build.setupNameTable({"familyName": "AAA Boxes", "styleName": "Regular"})
    build.setupOS2(usWeightClass=400)
    build.setupPost()
    build.save(tmp_path / "boxes.ttf")
    fontManager.addfont(tmp_path / "boxes.ttf")
    try:
        assert fonts.drawable("\ue000") == "\ue000"
        axes = report.TokenStrip(["\ue000", "中\ue001"], [1.0, 2.0], title="\ue000").plot()
        axes.figure.savefig(tmp_path / "x.png")
        pyplot.close(axes.figure)
        assert "AAA Boxes" in axes.title.get_fontfamily() and axes.texts[0].get_fontfamily()[0] == "monospace"
    finally:
        fontManager.ttflist = [font for font in fontManager.ttflist if font.name != "AAA Boxes"]
