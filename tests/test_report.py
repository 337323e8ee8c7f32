"""Pages: escaped, self-contained, whole or not written at all."""

from __future__ import annotations

import base64
import inspect
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp_core as ic
from interp_core import report
from interp_core.files import write
from interp_core.report import colors, html, png, svg
from interp_core.report.answer import answer_page
from interp_core.report.pictures import pixels_of

NASTY = "<script>alert('x')</script>\"'&"


def test_everything_is_escaped() -> None:
    body = html.heatmap([[0.5]], [NASTY], [NASTY], texts=[[NASTY]], tips=[[NASTY]], caption=NASTY)
    body += html.tokens([NASTY], {NASTY: [1.0], NASTY + "2": [2.0]}, caption=NASTY) + html.table([{NASTY: NASTY}])
    body += html.copyable(NASTY, NASTY)
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
        "thead", "tbody", "tr", "th", "td", "figcaption", "span", "br", "script", "form", "input", "details", "summary", "pre",
    }  # fmt: skip


def test_a_token_turns_no_other_round() -> None:
    """A token that overrides the direction of text does so within itself; others stand as they do without it."""
    body = report.TokenStrip(["a", "\u202eb", " c"], [1.0, 2.0, 3.0]).html()
    assert re.findall(r"<span[^>]* style='([^']*)' data-tip", body)[1].endswith(";unicode-bidi:isolate")
    assert body.count("unicode-bidi") == 1 and "unicode-bidi" not in report.TokenStrip(["a", "שלום"], [1.0, 2.0]).html()


def test_a_page_says_units_and_names_and_nothing_twice() -> None:
    grid = report.Heatmap([[0.5, 2.0]], ["layer 0"], ["0", "1"], xlabel="expert", colorbar="nats").html()
    assert ">expert</th>" in grid and "2 nats<br>" in grid
    lines = report.Curves([report.Line("gini", [0.1, 0.2])], ["0", "1"], ylabel="evenness").html()
    assert "evenness<br><span" in lines and "<div class='scroll'><svg" in lines  # wide enough to be read on a phone
    plain = report.Answer("h", picture=html.table([{"x": 1.5}]), rows=[{"x": 1.5}])
    for answer, folded in ((plain, True), (plain._replace(picture="<p>nothing</p>"), False)):
        shown, fold, _ = answer_page(answer).partition("All numbers")
        assert shown.count("<table class='rows'>") == 1 and bool(fold) == folded


def test_pages_need_no_network() -> None:
    page = html.page("t", "i", [html.Section("a", "b", html.table([{"x": 1.5}]))])
    assert not re.search(r"(src|href)=|@import|url\(|https?:", page)


def test_white_space_shows() -> None:
    names = [report.place_name("7", " hot"), report.place_name("-1", "\n"), report.place_name("3", ""), "3", "2:5"]
    assert names[:2] == ["7 ·hot", "-1 ⏎"]
    assert [report.place_words(name) for name in names] == [
        "position 7, ' hot'", "the last position, '⏎'", "position 3, ''", "position 3", "2:5",
    ]  # fmt: skip
    assert [html.visible(t) for t in (" a", "\n\n", "", "b\t", "  ", "\x01")] == ["·a", "⏎⏎", "∅", "b⇥", "· ", "\\x01"]


def test_colours() -> None:
    assert colors.limits_of([[0.0, -2.0], [1.0, float("nan")]], True) == (-2.0, 2.0)
    assert colors.limits_of([[1.0]], False) == (1.0, 2.0) and colors.limits_of([], False) == (0.0, 1.0)
    assert colors.css(float("nan"), 0, 1, False)[0] == "#ececec"
    ends = [colors.rgb(v, -1, 1, True) for v in (-1.0, 0.0, 1.0)]
    assert ends[0][2] > ends[0][0] and ends[2][0] > ends[2][2] and min(ends[1]) > 240
    assert colors.rgb(9.0, 0, 1, False) == colors.rgb(1.0, 0, 1, False)


def test_pictures(tmp_path: Path) -> None:
    values, texts = [[0.0, 1.0], [float("nan"), -1.0]], [["1", None], ["3", "$4"]]
    chart = report.Heatmap(values, ["a", "b"], ["$x$", " y"], texts=texts, diverging=True, percent=True)
    path = chart.png(tmp_path / "a" / "x.png")
    assert path.stat().st_size > 2000
    assert chart.png(tmp_path / "b").name == "b.png" and chart.png(tmp_path / "b.pdf").read_bytes()[:4] == b"%PDF"
    assert "<svg" in chart.png(tmp_path / "b.svg").read_text()
    with pytest.raises(ic.PlanError, match="no picture is written as .jpgg. Did you mean 'jpg'"):
        chart.png(tmp_path / "b.jpgg")
    assert "-100%<span class='bar'" in chart.html() and ">∅<" not in chart.html()


def test_pictures_of_many_rows_and_columns_stay_small(tmp_path: Path) -> None:
    """Names that would run into each other are left out, long titles are broken into lines."""
    from matplotlib.image import imread

    values = [[float(i == j) for j in range(400)] for i in range(300)]
    chart = report.Heatmap(values, [f"r{i}" for i in range(300)], [f"c{j}" for j in range(400)], title="long " * 200)
    path = chart.png(tmp_path / "x.png")
    height, width, _ = imread(path).shape
    assert width < 150 * (png.SIDE + 3) and height < 150 * (png.SIDE + 4)
    assert list(png._named(10, 0.42)) == list(range(10)) and len(png._named(400, 0.06)) == 134


def test_wide_matrices_go_on_below_in_a_narrow_figure(tmp_path: Path) -> None:
    """Letters keep their size: of forty tokens in a column of a paper, each has its name and room for it."""
    from matplotlib import pyplot

    chart = report.Heatmap([[0.5] * 40] * 3, ["a", "b", "c"], [f"t{j}" for j in range(40)], texts=[["word"] * 40] * 3)
    frame = chart.frame(3.3)
    assert frame.width == 3.3 and frame.down > 4 and chart.frame().down < frame.down
    figure = pyplot.figure(figsize=(frame.width, frame.height))
    places = figure.subplots(frame.down, 1).tolist()
    chart.draw(places)
    assert [tick.get_text() for axes in places for tick in axes.get_xticklabels()] == list(chart.columns)
    assert sum(len(axes.texts) for axes in places) == 3 * 40
    pyplot.close(figure)


def test_charts_draw_on_axes_of_the_users() -> None:
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2)
    for chart in charts("x")[:4]:
        assert chart.plot(left, title="mine") is left and left.get_title().startswith("mine")
    assert not right.has_data()
    several = report.Overlay([(0, 0, 1, 1)], {"a": [1.0], "b": [2.0]})
    with pytest.raises(ic.PlanError, match="Overlay takes 2 axes beside each other; leave ax= out"):
        several.plot(left)
    assert several.plot(figsize=(5, 2)).figure.get_figwidth() == 5
    pyplot.close("all")


def test_the_keyboard_comes_into_every_chart_once() -> None:
    for chart in charts("x"):
        body = chart.html()
        assert body.count("tabindex='0'") == max(1, body.count("class='layer'")) and "data-tip" in body


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


def charts(name: str) -> list[report.Chart]:
    """One of each kind, its texts all the same."""
    lines = [
        report.Line(name, [0.1, math.nan, 0.4, 0.9], [(0, 0.2), (0, 0), (0.3, 0.5), (0.8, 1)], base=0.25),
        report.Line("other", torch.tensor([1.0, 0.5, 0.5, 0.0])),
    ]
    bars = [report.Bar(name, 0.5, (0.4, 0.6)), report.Bar("less", -0.25), report.Bar("none", math.nan)]
    said = {"title": name, "caption": name}
    return [
        report.Heatmap(torch.eye(2), [name, "b"], [name, "d"], texts=[[name, ""], ["", name]], ylabel=name, **said),
        report.Curves(lines, [name, "1", "2", name], base=name, xlabel=name, ylabel=name, **said),
        report.Curves(lines, ["0", "1", "2", "3"], percent=True),
        report.Bars(bars, base=0.1, xlabel=name, **said),
        report.TokenStrip([name, " a", "\n"], [1.0, math.nan, -1.0], spans={name: (0, 2)}, colorbar=name, **said),
        report.TokenStrip([name, " a", "\n"], {name: [1.0, 0, -1], "b": torch.ones(3)}, spans={name: (0, 2)}, **said),
        report.Overlay([(0, 0, 4, 4), (4, 0, 8, 4)], {name: [1.0, -2], "b": [math.nan, 0]}, colorbar=name, **said),
    ]


def test_charts_are_pages_and_pictures(tmp_path: Path) -> None:
    """The same object gives both; texts are escaped in the one, and taken as they are by the other."""
    for number, chart in enumerate(charts(NASTY)):
        body = chart.html()
        assert "<script" not in body and "alert('x')" not in body and not re.search(r"(src|href)=|url\(|https?:", body)
        assert f"<div class='ic'>{body}" in chart._repr_html_()
        assert chart.png(tmp_path / "a" / f"{number}.png").stat().st_size > 2000
    for number, chart in enumerate(charts("$x_")):
        assert chart.png(tmp_path / f"{number}.png").is_file()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-300, float("nan")])
def test_values_that_are_all_alike_are_drawn(tmp_path: Path, value: float) -> None:
    charts: list[report.Chart] = [
        report.Bars([report.Bar("a", value), report.Bar("b", value, (value, value))]),
        report.Curves([report.Line("a", [value, value])], ["x", "y"]),
        report.TokenStrip(["a", "b"], [value, value]),
        report.Heatmap([[value, value]], ["r"], ["a", "b"]),
    ]
    for number, chart in enumerate(charts):
        assert chart.html() and chart.png(tmp_path / f"{number}.png").stat().st_size > 500


def test_layers_of_a_strip_are_switched_by_the_style_sheet() -> None:
    """One button per layer, the first on; each right before what it shows, which is how the style sheet finds it."""
    values = {"sum": [1.0, 0.0], "hop 0": [0.0, 2.0], "hop 1": [0.5, 0.5]}
    body = report.TokenStrip(["a", " b"], values, spans={"sink": (1, 2)}).html()
    buttons = re.findall(
        r"<input type='radio' name='layer' aria-label=\"([^\"]+)\"( checked)?><div class='layer'>", body
    )
    assert buttons == [("sum", " checked"), ("hop 0", ""), ("hop 1", "")]
    assert "form.layers>input:checked+.layer{display:block}" in html.STYLE
    assert re.findall(r'data-tip="([^"]+)"', body) == [
        f"{token}: {number}{end}"
        for numbers in values.values()
        for token, number, end in zip(("a", "·b"), (f"{x:.4g}" for x in numbers), ("", "\nsink"), strict=True)
    ]
    single = report.TokenStrip(["a", " b"], {"sum": [1.0, 0.0]}).html()
    assert single == report.TokenStrip(["a", " b"], [1.0, 0.0]).html() and "<input" not in single


def test_boxes_lie_over_a_picture(tmp_path: Path) -> None:
    """The picture's own pixels behind, each box where it is said; layers are switched, tips say the numbers."""
    from matplotlib.image import imread

    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    boxes = [(0, 0, 3, 4), (3, 0, 6, 4)]
    body = report.Overlay(boxes, {"all": [1.0, 3.0], "hop 0": [2.0, math.nan]}, picture=picture).html()
    (uri,) = set(re.findall(r"href='data:image/png;base64,([^']+)'", body))
    (tmp_path / "behind.png").write_bytes(base64.b64decode(uri))
    assert np.array_equal(np.rint(imread(tmp_path / "behind.png") * 255), picture)
    assert re.findall(r"viewBox='([^']+)'", body) == ["0 0 6 4"] * 2 and body.count("type='radio'") == 2
    places = re.findall(
        r"<rect[^>]* x='(\d)' y='0' width='3' height='4' style='fill:(#\w+)' opacity='0.6' data-tip=\"(\w+)", body
    )
    assert [(x, tip) for x, _, tip in places] == [("0", "1"), ("3", "3"), ("0", "2"), ("3", "nan")]
    assert places[3][1] == "#ececec" and "<image" not in report.Overlay(boxes, [1.0, 2.0]).html()


def test_titles_over_boxes_are_whole(tmp_path: Path) -> None:
    """Nothing of them is cut off, however many layers and lines there are."""
    from PIL import Image

    title, boxes = "visual tokens: image 0", [(0.0, 0, 8, 8), (8.0, 0, 16, 8), (0.0, 8, 16, 16)]
    for names in (["all"], ["visual_map", "ifr", "attnlrp"]):
        chart = report.Overlay(boxes, {name: [1.0, 2, 3] for name in names}, title=title, colorbar="nats lost " * 6)
        ink = np.asarray(Image.open(chart.png(tmp_path / "boxes.png")).convert("L")) < 128
        assert not ink[:3].any() and ink[3:60].any()


def test_pictures_of_many_kinds() -> None:
    """Arrays, tensors as processors give them, grey ones, shares, whole numbers: all the same bytes."""
    wanted = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    first = np.ascontiguousarray(wanted.transpose(2, 0, 1))
    alpha = np.concatenate([wanted, wanted[:, :, :1]], 2)
    for picture in (wanted, wanted.tolist(), alpha, first, torch.from_numpy(first), torch.from_numpy(wanted / 255)):
        assert np.array_equal(pixels_of(picture), wanted)
    assert np.array_equal(pixels_of(wanted[:, :, 0]), np.repeat(wanted[:, :, :1], 3, 2))
    stretched = pixels_of(torch.tensor([[-2.0, 0.0, 2.0]]).to(torch.bfloat16))
    assert stretched[0, :, 0].tolist() == [0, 128, 255]
    assert pixels_of(np.full((2, 2), -3.0)).tolist() == [[[0] * 3] * 2] * 2


def test_curves_are_drawn_where_they_are() -> None:
    """Heights by hand, gaps where a number lacks, bands, levels and tips; bars begin at 0."""
    body = charts("x")[2].html()
    top, height = svg.TOP, svg.HEIGHT
    heights = [float(y) for y in re.findall(r"<circle[^>]* cx='[\d.]+' cy='([\d.]+)'", body)]
    wanted = [top + (1 - share) * height for share in (0.1, 0.4, 0.9, 1.0, 0.5, 0.5, 0.0)]
    assert heights == pytest.approx(wanted, abs=0.06)  # written with one decimal
    assert body.count("<polyline") == 3 and body.count("<polygon") == 2 and body.count("stroke-dasharray") == 1
    assert 'data-tip="x, 2: 40.0% (base 25.0%)\n30.0% to 50.0%"' in body
    assert re.findall(r">(\d+%)<", body) == ["0%", "25%", "50%", "75%", "100%"]
    bars = charts("x")[3].html()
    drawn = re.findall(r"<rect[^>]* x='([\d.]+)' y='[\d.]+' width='([\d.]+)'", bars)
    half, less = ((float(x), float(wide)) for x, wide in drawn)
    assert half[0] == pytest.approx(less[0] + less[1], abs=0.11) and half[1] == pytest.approx(2 * less[1], abs=0.11)


def test_charts_take_statistics() -> None:
    """Bands and intervals as `interp_core.stats` gives them."""
    boot = ic.stats.Bootstrap(resamples=100)
    values = torch.arange(24.0).view(12, 2)
    band = boot.band(values, axes=("layer",))
    line = report.Line.of("drop", band, base=3.0)
    assert line.values == band.value.tolist() == [11.0, 12.0] and line.bands[1] == (band.low[1], band.high[1])
    assert report.Curves([line], ["0", "1"]).span[0] < 3
    bars = report.Bars.of({"a": boot.mean(values[:, 0]), "b": ic.stats.wilson(3, 4)}, xlabel="share")
    assert [bar.value for bar in bars.bars] == [11.0, 0.75] and bars.bars[1].ends == pytest.approx(
        (0.3006, 0.9544), abs=1e-4
    )


def test_ticks_are_round_and_inside() -> None:
    assert svg.ticks(0, 1, 5) == [0, 0.25, 0.5, 0.75, 1] and svg.ticks(-0.3, 2.2, 5) == [0, 1, 2]
    for low, high in ((-3e-7, 5e-7), (0.2, 0.21), (-1234.0, 77.0), (1e9, 2e9)):
        found = svg.ticks(low, high)
        assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high


def test_charts_refuse_what_does_not_fit() -> None:
    for message, call in {
        "values are 1 rows of \\[2\\], the names 2 rows of 2": lambda: report.Heatmap([[1, 2]], ["a", "b"], ["c", "d"]),
        "texts are 1 rows of \\[1\\]": lambda: report.Heatmap([[1, 2]], ["a"], ["c", "d"], texts=[["x"]]),
        "line 'a' has 1 values, there are 2 places": lambda: report.Curves([report.Line("a", [1])], ["0", "1"]),
        "1 values and 2 bands": lambda: report.Curves([report.Line("a", [1], [(0, 1), (0, 1)])], ["0"]),
        "0 lines over 1 places": lambda: report.Curves([], ["0"]),
        "Bars: there are none": lambda: report.Bars([]),
        "1 values for 2 tokens": lambda: report.TokenStrip(["a", "b"], [1.0]),
        "1 values of 'y' for 2 tokens": lambda: report.TokenStrip(["a", "b"], {"x": [1.0, 2.0], "y": [1.0]}),
        "there are no values; give one per token": lambda: report.TokenStrip(["a"], {}),
        "span 'x' is 1 to 3": lambda: report.TokenStrip(["a", "b"], [1.0, 2.0], spans={"x": (1, 3)}),
        "1 values for 2 boxes": lambda: report.Overlay([(0, 0, 1, 1)] * 2, [1.0]),
        "nothing to draw": lambda: report.Overlay([], []),
        "takes a picture .*, not str": lambda: report.Overlay([(0, 0, 1, 1)], [1.0], picture="x.png"),
        "values that are no numbers": lambda: report.Overlay([(0, 0, 1, 1)], [1.0], picture=[[math.nan, 1.0]]),
        "takes lists of numbers, not float": lambda: report.TokenStrip(["a"], 1.0),
    }.items():
        with pytest.raises(ic.PlanError, match=message):
            call()


@pytest.mark.parametrize("module", [report, ic.stats], ids=["report", "stats"])
def test_public_names_are_documented(module: Any) -> None:
    assert module.__all__ == sorted(set(module.__all__)) and inspect.getdoc(module)
    for name in module.__all__:
        thing = getattr(module, name)
        assert inspect.getdoc(thing), name
        for attribute, value in vars(thing).items() if inspect.isclass(thing) else ():
            if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{name}.{attribute}"
