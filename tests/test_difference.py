"""Two results minus each other: the numbers, what is told apart, what is refused, and that it shows itself as a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from autoencoders import folder
from conftest import toy_model
from typer.testing import CliRunner

import interp_core as ic
from interp_core import report, testing
from interp_core import sites as S
from interp_core.cli import app
from interp_core.differing import rows_beside
from interp_core.report.subtracted import by_scale, minus

HOT, DRY = "Q: big\nA: small\n\nQ: hot\nA:", "Q: big\nA: small\n\nQ: dry\nA:"
OLD = "Q: big\nA: small\n\nQ: old\nA:"
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{name}_patching": {"corrupted": OLD} for name in ("activation", "attribution", "path")},
    "function_vectors": {"trials": 2, "shots": 2, "questions": 2, "top": 3},
    "head_detectors": {"sequences": 1, "length": 8, "copying": False},
    "information_horizon": {"keep": [0.5], "layers": [1]},
    "route_utility": {"layers": [-1], "alternatives": 2},
    "steering_vectors": {"negative": "Q: wet\nA:"},
    "visual": {"interventions": ["truncation"]},
}


@cache
def toy(name: str) -> ic.Model:
    return toy_model() if name == "toy:text" else ic.load(name)


def two_of(name: str, at: Path) -> tuple[Any, Any]:
    """A method's results of two prompts, on the toy that has what it needs."""
    method, settings = ic.method(name), SETTINGS.get(name, {"sae": folder(at / "sae")} if name == "sae" else {})
    if name in ("visual", "visual_map", "information_horizon"):
        model = toy("toy:vision")
        rows = [model.tokens("what color ?", " red", images=[image]) for image in testing.pictures(2, seed=0)]
    else:
        model = toy("toy:moe" if name.startswith("rout") else "toy:text")
        rows = [model.tokens(text) for text in (HOT, DRY)]
    first, second = (method(model, row, **settings) for row in rows)
    return first, second


def nought(difference: ic.Difference) -> bool:
    """Whether every field and every number of the charts is nought, or no number."""
    first, _ = difference.sides
    tensors = [getattr(difference, n) for n in first.AXES if is_float(getattr(first, n))]
    return all(not tensor.nan_to_num().any() for tensor in tensors) and not any(map(any, drawn(difference)))


def drawn(difference: ic.Difference) -> list[list[float]]:
    """The numbers of the charts, scale by scale, those that are numbers."""
    charts = difference.charts()
    return [[pair.first for pair in pairs if pair.first == pair.first] for pairs in by_scale(charts, charts)]


def is_float(held: Any) -> bool:
    return held is not None and held.is_floating_point()


@pytest.mark.parametrize("name", ic.registry("methods").names())
def test_results_of_every_method(name: str, tmp_path: Path) -> None:
    """The laws: nothing minus itself, the other way round the opposite, saved and loaded the same, fields subtracted;
    and it draws what its sides draw."""
    first, second = two_of(name, tmp_path)
    difference, back = first - second, second - first
    assert isinstance(difference, ic.Difference) and difference == -back and difference != back
    assert nought(first - first) and (first - first).finding == "There is no difference."
    for field in first.AXES:
        if is_float(getattr(first, field)):
            apart = getattr(difference, field)
            assert torch.equal(apart.nan_to_num(), (getattr(first, field) - getattr(second, field)).nan_to_num())
            assert torch.equal(apart.nan_to_num(), (-getattr(back, field)).nan_to_num())
    assert len(difference.charts()) == len(first.charts())
    for scale, opposite in zip(drawn(difference), drawn(back), strict=True):
        assert sorted(scale) == sorted(-number for number in opposite)
    loaded = ic.Result.load(difference.save(tmp_path / "both"))
    assert type(loaded) is ic.Difference and loaded == difference and loaded.finding == difference.finding
    assert loaded.provenance == json.loads(json.dumps(difference.provenance))
    assert ic.Result.load(first.save(tmp_path / "first")) - second == difference
    page = difference.to_html(tmp_path / "page.html").read_text()
    assert "Shown is the first result minus the second" in page and difference.table()
    assert difference.finding.startswith("The largest difference") and len(str(difference).splitlines()) <= 10


def test_the_lens_by_hand(tmp_path: Path) -> None:
    """Tokens of both prompts stand beside each other; the picture has probabilities, the fields their logarithms."""
    lens = ic.method("logit_lens")
    hot, dry = lens(toy_model(), HOT), lens(toy_model(), DRY)
    difference = hot - dry
    assert difference.tokens[0] == ("Q:", " big", "\n", "A:", " small", "\n\n", "Q:", " hot |  dry", "\n", "A:")
    (chart,) = difference.charts()
    probability = hot.target_logprob.exp() - dry.target_logprob.exp()
    assert torch.equal(torch.tensor(chart.values), probability[0]) and chart.diverging and chart.limits is None
    row, column = divmod(int(probability[0].abs().argmax()), probability.shape[2])
    said = f"is {probability[0, row, column]:+.4g}: after layer {hot.layers[row]}, "
    assert said in difference.finding and "·hot | ·dry (" in difference.finding
    assert "cold" in chart.tips[-1][-1] and "|" in chart.texts[-1][-1] and chart.texts[-1][0] == " find"
    line = difference.table()[-1]
    assert line["top"] == " cold" != line["top (second)"] and line["token"] == "A:"
    assert line["logprob"] == pytest.approx(float(difference.target_logprob[0, -1, -1]))
    assert difference.prompt_rows() == [{"prompt": HOT, "prompt (second)": DRY}]
    assert difference.layers == hot.layers and difference.sides == (hot, dry)
    assert len(difference.to_dataframe()) == len(hot.table())
    assert difference.png(tmp_path / "x.png").stat().st_size > 2000 and difference.plot() is not None
    with pytest.raises(
        AttributeError, match=r"top_ids is no number to subtract, and differs: see it of difference\.sides"
    ):
        _ = difference.top_ids


def test_names_of_both_sides(tmp_path: Path) -> None:
    """What both have alike is theirs; arrays inside of mappings are not compared, and so differ."""
    first, second = two_of("router", tmp_path)
    difference = first - second
    assert difference.top_k == first.top_k and difference.layers == first.layers and difference.shape == first.shape
    for name in ("loads", "count"):
        with pytest.raises(AttributeError, match=f"{name} is no number to subtract"):
            getattr(difference, name)
    with pytest.raises(AttributeError, match=r"usage is a method of both sides: call it of difference\.sides"):
        difference.usage()


def test_another_model_and_other_settings() -> None:
    lens, model = ic.method("logit_lens"), ic.load("toy:text")
    with torch.no_grad():
        model.hf.lm_head.weight[0, 0] += 1
    difference = lens(toy_model(), HOT, at=-1) - lens(model, HOT, at=-1)
    assert "model fingerprint" in difference.question and "model fingerprint: " in difference.details()["What differs"]
    assert difference.kl.abs().max() > 0
    by_place = lens(toy_model(), HOT, at=3) - lens(toy_model(), HOT, at=-1)
    assert by_place.details() == {"What differs": "setting at: 3 | -1"}
    assert "| -1" in str(by_place.provenance["settings"]["at"]) and by_place.sides[0].provenance["settings"]["at"] == 3
    bare = lens(toy_model(), HOT).with_provenance(None)
    assert (bare - bare).provenance is None and (bare - bare).heading == "Logit Lens: difference".capitalize()


def swept(text: str, keyed: bool = True, score: Any = None) -> ic.Sweep:
    edits = {head: S.z[head].at(-1).zero() for head in toy_model().heads}
    return toy_model().sweep(text, edits if keyed else [*edits.values()], score or ic.score.logprob(" cold"))


def test_sweeps(tmp_path: Path) -> None:
    """By their keys; the strongest of plain lists are looked for among all variants, not among the strongest of each."""
    hot, dry = swept(HOT), swept(DRY)
    difference = ic.Sweep.load(hot.save(tmp_path / "hot")) - dry
    assert torch.equal(difference.effects, hot.effects - dry.effects)
    (chart,) = difference.charts()
    assert isinstance(chart, report.Heatmap) and torch.allclose(torch.tensor(chart.values), hot.grid() - dry.grid())
    assert ic.Result.load(difference.save(tmp_path / "both")) == difference
    best = max(hot.keys, key=lambda key: abs(float(hot[key] - dry[key])))
    assert f"layer {best[0]}, head {best[1]}" in difference.finding and "(change of logprob)" in difference.finding
    assert difference.table()[0]["effect"] == pytest.approx(float(difference.effects[0]))
    listed = swept(HOT, keyed=False) - swept(DRY, keyed=False)
    (bars,) = listed.charts()
    far = sorted((hot.effects - dry.effects).flatten().tolist(), key=lambda x: -abs(x))
    assert isinstance(bars, report.Bars) and [bar.value for bar in bars.bars] == pytest.approx(far[:20])
    assert f"z[{best[0]},{best[1]}]@-1 zero" in bars.bars[0].name and bars.bars[0].name in listed.finding


def patched(**settings: Any) -> Any:
    return ic.method("activation_patching")(toy_model(), HOT, corrupted=OLD, **settings)


def lens(text: Any = HOT, **settings: Any) -> Any:
    return ic.method("logit_lens")(toy_model(), text, **settings)


@pytest.mark.parametrize(
    ("subtract", "says"),
    [
        (lambda: lens() - 3, "takes another of its class, not int 3"),
        (lambda: lens() - swept(HOT), "a LogitLensResult minus a Sweep: results of one class"),
        (
            lambda: lens() - lens("Q: hot\nA:"),
            "pos is 10 in the first, 4 in the second; give prompts of as many tokens",
        ),
        (lambda: lens([HOT, DRY]) - lens(), "batch is 2 in the first, 1 in the second; give as many prompts"),
        (
            lambda: lens(top_k=3) - lens(),
            r"k is 3 in the first, 5 in the second; .*\(what differs: setting top_k 3 | 5",
        ),
        (
            lambda: patched(layers=[0, 1]) - patched(layers=[1, 2]),
            r"layers along layer differ, '0' in the first, '1' in",
        ),
        (lambda: patched(layers=[0], at=[0, 1]) - patched(layers=[1], at=[0, 1]), "layers along layer differ, '0' in"),
        (lambda: patched(layers=[0]) - patched(layers=[1, 2]), r"layer is 1 in the first, 2 .* take the same layers"),
        (
            lambda: patched(score="probability") - patched(score="logprob"),
            "score is 'probability' in the first, 'logpr",
        ),
        (lambda: swept(HOT) - swept(HOT, keyed=False), r"keys along variant differ, \(0, 0\) .* same variants"),
        (lambda: swept(HOT) - swept(HOT, score=ic.score.logit(" cold")), "score is 'logprob' in the first, 'logit' in"),
        (lambda: Half(torch.ones(2), None) - Half(torch.ones(2), torch.ones(2)), "b is there in the second only"),
        (lambda: (lens() - lens()) - (lens() - lens()), "differences are not subtracted again"),
    ],
)
def test_what_is_refused(subtract: Callable[[], Any], says: str) -> None:
    with pytest.raises(ic.PlanError, match=says):
        subtract()


@dataclass(frozen=True, eq=False)
class Half(ic.Result):
    """No charts, and no row of the table has a number."""

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"a": ("pos",), "b": ("pos",)}
    a: torch.Tensor
    b: torch.Tensor | None
    note: str = ""


def test_a_class_without_charts(tmp_path: Path) -> None:
    difference = Half(torch.tensor([1.0, 5.0]), None, "x") - Half(torch.tensor([2.0, 1.0]), None, "y")
    assert difference.charts() == [] and "<table" in difference.html()
    assert difference.table() == [
        {"field": "a", "axes": "pos", "at": "pos 1", "first": 5.0, "second": 1.0, "largest": 4.0, "mean": 2.5}
    ]
    assert difference.finding == "The largest difference (a) is +4: pos 1 (5 against 1)."
    assert difference.details() == {"What differs": "note: x | y"} and difference.heading == "Half: difference"
    with pytest.raises(ic.PlanError, match="Difference has no picture"):
        difference.png(tmp_path / "x.png")


def test_rows_are_paired_by_what_tells_them_apart() -> None:
    """Never by their place: the strongest of one table are not those of the other."""
    first = [{"row": 0, "pos": 3, "token": "a", "score": 2.0}, {"row": 0, "pos": 1, "token": "b", "score": 1.0}]
    second = [{"row": 0, "pos": 1, "token": "c", "score": 4.0}, {"row": 0, "pos": 2, "token": "d", "score": 1.0}]
    rows = rows_beside(first, second)
    assert rows.key == ("row", "pos") and rows.left == 2
    assert rows.subtracted == [{"row": 0, "pos": 1, "token": "b", "token (second)": "c", "score": -3.0}]
    assert [pair.where for pair in rows.numbers] == ["row 0, pos 1"]
    assert rows_beside([{"score": 1.0}], [{"score": 2.0}]).pairs == [] and rows_beside([], first).left == 2


def test_charts_by_hand() -> None:
    """Every kind: numbers are subtracted, scales are about zero, names must be the same."""
    curves = report.Curves([report.Line("x", [1.0, 2.0], [(0, 1), (1, 3)], base=0.5)], ["0", "1"], limits=(0, 1))
    (line,) = minus(curves, replace(curves, lines=[report.Line("x", [0.5, 4.0])])).lines  # type: ignore[union-attr]
    assert line.values == [0.5, -2.0] and line.bands is None and line.base == 0.0
    bars = report.Bars([report.Bar("x", 3.0, (2, 4)), report.Bar("y", 1.0)], base=1.0)
    apart = minus(bars, replace(bars, bars=[report.Bar("x", 1.0), report.Bar("y", 2.0)]))
    assert [(bar.value, bar.ends) for bar in apart.bars] == [(2.0, None), (-1.0, None)] and apart.base is None  # type: ignore[union-attr]
    assert minus(bars, replace(bars, bars=bars.bars[:1])) is None and minus(bars, curves) is None
    strip = report.TokenStrip([" a", "b"], {"sum": [1.0, 2.0], "hop": [0.0, 1.0]}, limits=(0, 2))
    apart = minus(strip, replace(strip, values={"sum": [2.0, 2.0], "hop": [1.0, 0.0]}))
    assert apart.layers == {"sum": [-1.0, 0.0], "hop": [-1.0, 1.0]} and apart.diverging and apart.limits is None  # type: ignore[union-attr]
    apart = minus(strip, replace(strip, values={"sum": [1.0, 1.0], "hop (7 %)": [0.0, 0.5]}))
    assert apart.layers == {"sum": [0.0, 1.0], "hop | hop (7 %)": [0.0, 0.5]}  # type: ignore[union-attr]
    over = report.Overlay([(0, 0, 1, 1)], [2.0], picture=torch.zeros(1, 1, 3))
    apart = minus(over, replace(over, values=[5.0]))
    assert apart.values == [-3.0] and apart.diverging and apart.picture is not None  # type: ignore[union-attr]
    cells = report.Heatmap([[0.5]], ["r"], ["c"], texts=[["50%"]], percent=True, colorbar="share", limits=(0, 1))
    apart = minus(cells, replace(cells, values=[[0.25]], texts=[["25%"]], title="t"))
    assert apart.values == [[0.25]] and apart.texts == [["25%"]] and apart.tips == [["r, c: 25.0%\n50.0% minus 25.0%"]]  # type: ignore[union-attr]
    assert apart.title == " − t" and minus(cells, replace(cells, colorbar="nats")) is None  # type: ignore[union-attr]


def test_a_saved_difference_is_shown_and_a_damaged_one_refused(tmp_path: Path) -> None:
    difference = lens(at=-1) - lens(DRY, at=-1)
    folder = difference.save(tmp_path / "d")
    shown = CliRunner().invoke(app, ["show", str(folder)])
    assert (
        shown.exit_code == 0 and "The largest difference" in shown.output and "Logit lens: difference" in shown.output
    )
    with pytest.raises(ic.LoadError, match="holds a Difference .*, not a Sweep"):
        ic.Sweep.load(folder)
    with pytest.raises(ic.LoadError, match="holds a LogitLensResult .*, not a Difference"):
        ic.Difference.load(folder / "first")
    lens(top_k=2, at=-1).save(folder / "second")
    with pytest.raises(ic.LoadError, match="holds a damaged Difference: .* k is 5 in the first, 2"):
        ic.Result.load(folder)
    (folder / "second/result.json").unlink()
    with pytest.raises(ic.LoadError, match="second holds no readable result"):
        ic.Result.load(folder)
