"""What a sweep gives back: keys, grids, tables, pictures, folders."""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, toy_model

import interp_core as ic
from interp_core import score
from interp_core import sites as S

TEXT = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"
BATCH = [TEXT, "Q: big\nA:"]
JUDGED = score.logit_diff(" dry", " wet")
NASTY = "<script>alert(1)</script>\"'\u202e&"


def by_head(model: ic.Model) -> dict[Any, ic.Edit]:
    return {(layer, head): S.z[layer, head].at(-1).zero() for layer, head in model.heads}


@cache
def heads() -> ic.Sweep:
    return toy_model().sweep(BATCH, by_head(toy_model()), JUDGED)


@cache
def mixed() -> ic.Sweep:
    """Keys of several kinds; a variant whose score is not a number; tensors and functions in edits."""
    vector = torch.linspace(-1, 1, 128)
    variants = {
        "add": S.resid_post[2].at(-1).add(vector),
        (1, "both"): [S.z[2, 2].zero(), S.mlp_out[1].scale(0.5)],
        3: S.resid_post[2].at(-1).apply(lambda x: x * float("nan")),
        0.5: S.resid_post[4].at(-1).scale(0.5),
        NASTY: S.pattern[3].knockout(query=-1, key=[0, 1]),
    }
    return toy_model().sweep(TEXT, variants, JUDGED)


@cache
def many() -> ic.Sweep:
    """A sweep of 2,000 variants that nobody had to run."""
    torch.manual_seed(0)
    keys = tuple((layer, head) for layer in range(40) for head in range(50))
    variants = tuple((S.z[layer, head].at(-1).set(torch.ones(4)),) for layer, head in keys)
    values = torch.randn(2000, 3)
    return ic.Sweep(values, torch.zeros(3), values.abs(), "logprob", variants, keys, "strategy     staircase")


@pytest.mark.parametrize("engine", ["torch", "nnsight", "transformer_lens"])
def test_keys_come_back_on_every_engine(engine: str) -> None:
    model = toy_model() if engine == "torch" else toy_model().on(engine)
    variants = {f"head {head}": S.z[2, head].at(-1).zero() for head in range(4)}
    swept = model.sweep(BATCH, variants, JUDGED)
    assert swept.keys == tuple(variants) == tuple(swept) and len(swept) == 4
    assert swept.variants == tuple((edit,) for edit in variants.values())
    wanted = torch.stack([heads()[2, head] for head in range(4)])
    torch.testing.assert_close(torch.stack([swept[key] for key in variants]), wanted, atol=1e-3, rtol=1e-3)


def test_keys_name_effects() -> None:
    swept = heads()
    assert swept[2, 1].shape == (2,) and torch.equal(swept[2, 1], swept.effects[swept.keys.index((2, 1))])
    assert (2, 1) in swept and (9, 9) not in swept and "x" not in swept
    plain = toy_model().sweep(BATCH, list(by_head(toy_model()).values()), JUDGED)
    assert plain.keys == tuple(range(24)) and torch.equal(plain.values, swept.values)
    integers = toy_model().sweep(TEXT, {(np.int64(2), 1): S.z[2, 1].at(-1).zero()}, JUDGED)
    assert type(integers.keys[0][0]) is int and torch.allclose(integers[2, 1], swept[2, 1][:1], atol=1e-4)  # type: ignore[index]


def test_a_plan_takes_keys_too() -> None:
    model, variants = toy_model(), by_head(toy_model())
    assert ic.Sweep.planned(model, TEXT, variants, JUDGED) == ic.Sweep.planned(
        model, TEXT, [*variants.values()], JUDGED
    )


def test_several_scores_share_keys_and_edits() -> None:
    variants = {name: S.named(name)[2].at(-1).zero() for name in ("attn_out", "mlp_out")}
    pair = toy_model().sweep(BATCH, variants, [score.logprob(" dry"), score.rank(" dry")])
    assert [(sweep.score, sweep.keys) for sweep in pair] == [("logprob", tuple(variants)), ("rank", tuple(variants))]


@pytest.mark.parametrize(
    ("asking", "said"),
    [
        (lambda: heads()["x"], r"no variant of this sweep has the key 'x'\. There are: '\(0, 0\)'"),
        (lambda: mixed()["ad"], r"Did you mean 'add'\?"),
        (lambda: heads()[[1]], "has the key"),
        (lambda: mixed().grid(), r"takes keys of 2 parts or more, and there is 'add': sweep over \{\(layer, head\)"),
        (lambda: heads().grid(0, 2), "keys of 3 parts or more"),
        (lambda: heads().grid([0, 7]), "no variant lies in the cell of row 7 and column 0"),
        (lambda: heads().grid(0, 0), r"4 variants lie in the cell of row 0 and column 0: \(0, 0\), \(0, 1\)"),
        (lambda: heads().grid("layer"), "rows= takes the number of a part of the keys, or a list"),
        (lambda: heads().grid([]), "a grid needs a row and a column"),
        (lambda: heads().grid(example=2), "example= takes an example of the sweep, 0 to 1, not int 2"),
        (lambda: heads().top(example=True), "example= takes"),
    ],
)
def test_what_is_not_there_is_named(asking: Callable[[], Any], said: str) -> None:
    with pytest.raises(ic.InterpError, match=said):
        asking()


@pytest.mark.parametrize("key", [None, (), (1, None), float("nan"), torch.tensor(1), b"x"])
def test_keys_of_other_kinds_are_refused(key: Any) -> None:
    with pytest.raises(ic.PlanError, match="the key of a variant takes a string, a number or a tuple of these"):
        toy_model().sweep(TEXT, {key: S.z[2, 1].zero()}, JUDGED)
    with pytest.raises(ic.PlanError, match="a sweep needs variants"):
        toy_model().sweep(TEXT, {}, JUDGED)


def test_grids() -> None:
    swept = heads()
    grid = swept.grid()
    assert grid.shape == (6, 4) and torch.equal(grid, swept.effects.mean(-1).view(6, 4))
    assert torch.equal(swept.grid(columns=0, rows=1), grid.T)
    assert torch.equal(swept.grid([3, 1], range(3, 0, -1)), grid[[3, 1]][:, [3, 2, 1]])
    assert torch.equal(swept.grid(columns=[5, 0], rows=1), grid.T[:, [5, 0]])
    assert torch.equal(swept.grid(example=-1), swept.effects[:, 1].view(6, 4))
    longer = replace(swept, keys=tuple((f"x{layer}", "z", head) for layer, head in swept.keys))  # type: ignore[misc]
    assert torch.equal(longer.grid(0, 2), grid)


def test_top_gives_the_variants_themselves() -> None:
    best = heads().top(2)[0]
    key, edits, effect = best
    assert edits == (S.z[key].at(-1).zero(),) and effect == float(heads().effects.mean(-1)[heads().keys.index(key)])
    assert repr(best) == f"Effect(key={key!r}, edits=z[{key[0]},{key[1]}]@-1 zero, effect={effect:.4g})"  # type: ignore[index]
    run = toy_model().run(TEXT, edits=heads().top(1, example=0)[0].edits)
    torch.testing.assert_close(
        JUDGED(run) - heads().clean[:1], heads()[heads().top(1, example=0)[0].key][:1], atol=1e-3, rtol=1e-3
    )
    assert mixed().top()[-1].key == 3 and len(mixed().top()) == 5, "what is not a number comes last"


def test_tables() -> None:
    rows = heads().table()
    assert list(rows[0]) == ["layer", "head", "edits", "effect", "value", "clean", "moved"] and len(rows) == 24
    assert rows[5] == {
        "layer": 1, "head": 1, "edits": "z[1,1]@-1 zero", "effect": float(heads().effects.mean(-1)[5]),
        "value": float(heads().values[5].mean()), "clean": float(heads().clean.mean()),
        "moved": float(heads().moved[5].mean()),
    }  # fmt: skip
    assert heads().table(example=1)[5]["value"] == float(heads().values[5, 1])
    assert [row["key"] for row in mixed().table()] == list(mixed().keys)
    assert [row["edits"] for row in mixed().table()][:2] == [
        "resid_post[2]@-1 add",
        "z[2,2] zero, mlp_out[1] scale 0.5",
    ]
    by_position = {(2, at): S.resid_pre[2].at(at).zero() for at in range(3)}
    assert list(toy_model().sweep(TEXT, by_position, JUDGED).table()[0])[:2] == ["layer", "pos"]
    hidden = {(2, at): S.pattern[2].knockout(query=-1, key=at) for at in range(3)}
    knocked = toy_model().sweep(TEXT, hidden, JUDGED)
    assert list(knocked.table()[0])[:2] == ["layer", "key"] and knocked.chart().columns == [
        "key 0 Q:",
        "key 1 ·big",
        "key 2 ⏎",
    ]
    spoken = by_position | {(3, at): S.resid_pre[3].at(at).zero() for at in (0, 1, 2)}
    texts = ["Q: big\nA:", "Q: hot\nA:"]
    swept = toy_model().sweep(texts, spoken, score.logprob([" small", " cold"]))
    assert swept.chart().columns == ["pos 0 Q:", "pos 1", "pos 2 ⏎"], "texts differ at 1"
    assert swept.chart().title.startswith("Effect on the log-probability of each prompt's target (without edits")
    assert replace(swept, labels=()).chart().columns == ["pos 0", "pos 1", "pos 2"]
    others = {("a", 7): S.z[2, 1].zero(), ("b", 7): S.z[2, 2].zero()}
    assert list(toy_model().sweep(TEXT, others, JUDGED).table()[0])[:2] == ["key_0", "key_1"]


def test_pandas_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ic.CapabilityError, match="pip install pandas"):
        heads().to_dataframe()
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = heads().to_dataframe(example=0)
    assert isinstance(frame, pandas.DataFrame) and frame.to_dict("records") == heads().table(example=0)


def test_pictures(tmp_path: Path, rough_figures: None) -> None:
    chart, bars = heads().chart(), mixed().chart()
    assert isinstance(chart, ic.report.Heatmap) and chart.rows[2] == "layer 2" and chart.columns[3] == "head 3"
    without = f"(without edits {heads().clean.mean():.4g}, mean of 2 examples)"
    assert chart.title == f"Effect on the logit of ' dry' minus that of ' wet' {without}"
    np.testing.assert_allclose(chart.values, heads().grid())
    assert isinstance(bars, ic.report.Bars) and "the 4 strongest of 5 variants" in bars.title
    some = {key: edit for key, edit in by_head(toy_model()).items() if key != (2, 2)}
    holes = toy_model().sweep(TEXT, some, JUDGED)
    assert isinstance(holes.chart(), ic.report.Bars) and isinstance(holes.chart([0, 1]), ic.report.Heatmap)
    for sweep in (heads(), mixed()):
        assert sweep.png(tmp_path / "sweep.png").stat().st_size > 1000
        assert ic.report.escape(sweep.measured) in sweep.to_html(tmp_path / "sweep.html").read_text()
    failed = replace(heads(), values=heads().values * float("nan"))
    with pytest.raises(ic.PlanError, match="nothing to draw"):
        replace(failed, keys=()).chart()
    assert "not a number" in failed._repr_html_() and "nan" in repr(failed)


def test_looks() -> None:
    lines = repr(heads()).splitlines()
    assert lines[0] == f"Sweep of 24 variants: logit_diff, without edits {heads().clean.mean():.4g}, mean of 2 examples"
    assert "z[" in lines[1] and len(lines) <= 10 and max(map(len, lines)) <= 100
    assert "float32" not in repr(mixed()), "labels leave tensors out"
    page = mixed()._repr_html_()
    assert page.startswith("<style>") and "<div class='ic'>" in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_show_prints(capsys: pytest.CaptureFixture[str]) -> None:
    heads().show()
    assert capsys.readouterr().out == repr(heads()) + "\n"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_folders_and_looks_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype)
    ones = torch.ones(model.d_head, dtype=dtype)
    variants = {(layer, head): S.z[layer, head].at(-1).set(ones) for layer, head in model.heads}
    swept = model.sweep(torch.tensor([[5, 17, 33]]), variants, score.logit(5))
    swept.save(tmp_path)
    again = ic.Sweep.load(tmp_path)
    assert again == swept and again.variants[0][0].value.dtype == dtype and repr(again) == repr(swept)


def test_a_folder_gives_back_an_equal_sweep(tmp_path: Path) -> None:
    heads().save(tmp_path / "heads")
    again = ic.Sweep.load(tmp_path / "heads")
    assert again == heads() and again.explain == heads().plan.explain() and again.keys == heads().keys
    assert again != replace(again, keys=()) and again != replace(again, score="logit")
    assert again != replace(again, variants=(again.variants[1], *again.variants[1:]))
    assert torch.equal(again.grid(), heads().grid()) and again.table() == heads().table()
    with pytest.raises(ic.ReadError, match=r"sweep\.explain"):
        _ = again.plan
    assert pickle.loads(pickle.dumps(heads())) == heads()


def test_functions_come_back_as_names(tmp_path: Path) -> None:
    mixed().save(tmp_path / "a")
    again = ic.Sweep.load(tmp_path / "a")
    assert again.keys == mixed().keys and again.table()[0] == mixed().table()[0] and repr(again) == repr(mixed())
    assert again.variants[0] == mixed().variants[0] and torch.equal(
        again.variants[0][0].value, torch.linspace(-1, 1, 128)
    )
    assert str(again.variants[2]) == str(mixed().variants[2]) and again.failed == mixed().failed
    assert again != mixed(), "a function that is gone is not the function that was there"
    with pytest.raises(ic.PlanError, match="the name of its function"):
        toy_model().run(TEXT, edits=again.variants[2])
    again.save(tmp_path / "b")
    assert ic.Sweep.load(tmp_path / "b") == again


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "variants.json").unlink(),
        lambda folder: (folder / "variants.safetensors").write_bytes(b"x"),
        lambda folder: (folder / "variants.safetensors").unlink(),
        lambda folder: (folder / "variants.json").write_text(json.dumps({"format": "x", "variants": []})),
        lambda folder: (folder / "variants.json").write_text('{"format": "interp-variants/1", "variants": [[3]]}'),
        lambda folder: (folder / "variants.json").write_text("[]"),
        lambda folder: (folder / "result.json").write_text("{"),
        lambda folder: (folder / "result.json").write_text(
            (folder / "result.json").read_text().replace('"Sweep"', '"Other"')
        ),
    ],
)
def test_damaged_folders_are_refused(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    mixed().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ic.LoadError):
        ic.Sweep.load(tmp_path)


def test_a_stopped_sweep_goes_on_with_keys(tmp_path: Path) -> None:
    """The folder knows scores by their edits: what these are called is the call's."""
    model, variants = toy_model(), by_head(toy_model())
    first = model.sweep(TEXT, variants, JUDGED, out=tmp_path)
    again = model.sweep(TEXT, variants, JUDGED, out=tmp_path)
    assert again == first and again.plan.token_layers == 0
    assert model.sweep(TEXT, list(variants.values()), JUDGED, out=tmp_path) == replace(first, keys=())
    with pytest.raises(ic.PlanError, match="variants"):
        model.sweep(TEXT, dict(reversed(variants.items())), JUDGED, out=tmp_path)


def test_thousands_of_variants_are_cheap(tmp_path: Path) -> None:
    swept = many()
    start = time.process_time()
    assert "of 2,000 variants" in repr(swept) and len(swept.table()) == 2000
    assert swept.grid().shape == (40, 50) and len(swept._repr_html_()) < 600_000
    swept.save(tmp_path)
    assert ic.Sweep.load(tmp_path) == swept
    assert time.process_time() - start < 5
