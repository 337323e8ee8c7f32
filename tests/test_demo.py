"""The demo: what it says of the toy is true, and it works on a real folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import answered
import pytest
import torch
from conftest import DATA, toy_model
from interp_recipes import demo as recipe

import interp_core as ic
from interp_core import sites as S


def test_the_named_heads_are_those_that_decide() -> None:
    """Named by patching; confirmed here by ablation on other words, against every pair of other heads drawn."""
    model = toy_model()
    task = recipe.toy_task(model)
    effect, high, low = recipe.patching_map(model, task)
    heads = recipe.named_heads(effect)
    assert high > 5 and low < -5 and 1 <= len(heads) <= 4
    assert float(sum(effect[h] for h in heads)) > 0.7
    rows = recipe.ablation(model, task, heads)
    whole, without, others = (row["answer is first"] for row in rows)
    assert whole == 1.0 and without <= 0.6 and others >= 0.95
    fresh = recipe.toy_task(model, n=40, shots=8)
    mean = model.run(fresh.neutral, read=S.z.at(-1))
    edits = [S.z[a, h].at(-1).set(mean[S.z[a].at(-1)][:, h].mean(0)) for a, h in heads]
    hit = recipe.judged(model.run(fresh.clean, edits=edits, logits=-1), fresh)
    assert hit["answer is first"] <= 0.7


def test_steering_turns_corrupted_prompts() -> None:
    model = toy_model()
    task = recipe.toy_task(model)
    layer, layers = recipe.best_layer(model, task)
    assert layers[layer]["answer is first"] >= 0.95 and layers[0]["answer is first"] == 0
    rows, made = recipe.steering(model, task, layer, 2)
    answers = [model.tokenizer.decode([i]) for i in task.answer[:4].tolist()]
    assert [row["steered"].startswith(a) for row, a in zip(rows, answers, strict=True)] == [True] * 4
    assert not any(row["plain"].startswith(a) for row, a in zip(rows, answers, strict=True))
    assert made.receipts[0].fired == 2


def test_report_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second run writes over the first
        path = recipe.demo(recipe.DemoConfig(out=tmp_path))
    page = path.read_text()
    assert answered.finding_of(path).startswith("Heads z[2,2] and z[2,3] carry the answer")
    said = capsys.readouterr().out
    assert "z[2,2]" in said and str(path) in said
    for line in ("Logit lens", "Control: the heads taken out", "Steered text", "resid_post"):
        assert line in page
    files = {"report.html", "lens.png", "patching.png", "patching.safetensors", "lens"}
    assert {p.name for p in tmp_path.iterdir()} == files | {"manifest.json", "record", "DONE"}
    with pytest.raises(ic.PlanError, match="holds another run: answer was ' cat', is ' dog'"):
        recipe.demo(recipe.DemoConfig(out=tmp_path, answer=" dog"))
    assert "kept patching.safetensors" in said and said.count("made patching.safetensors") == 1
    assert "http" not in page


def test_prompts_that_are_given_are_run_on_the_toy_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the toy's own task; the answers are the model's, and prompts of different lengths are refused."""
    shown = "Q: big\nA: {}\n\nQ: hot\nA: {}\n\nQ: wet\nA:"
    clean, corrupted = shown.format("small", "cold"), shown.format("grand", "chaud")
    recipe.demo(recipe.DemoConfig(out=tmp_path / "own", clean=clean, corrupted=corrupted))
    page = (tmp_path / "own/report.html").read_text()
    assert "the answer comes first in 100% of the prompts, as with them." in page
    assert "Q: hot\nA: chaud" in page and "One pair of prompts" in page and "Five shots" not in page
    assert recipe.answers(toy_model(), recipe.DemoConfig(clean=clean, corrupted=corrupted))[0] == " dry"
    with pytest.raises(ic.TextError, match="corrupted 4: patching needs as many"):
        recipe.demo(recipe.DemoConfig(out=tmp_path / "other", clean=clean, corrupted="Q: hot\nA:"))
    assert "Five shots" not in capsys.readouterr().out


def test_a_real_folder(tmp_path: Path) -> None:
    path = recipe.demo(recipe.DemoConfig(model=str(DATA / "stories260K"), out=tmp_path))
    assert "One pair of prompts" in path.read_text()
    run = [
        sys.executable,
        "-m",
        "interp_core.cli",
        "demo",
        "--model",
        str(DATA / "stories260K"),
        "--out",
        str(tmp_path / "b"),
    ]
    out = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "these heads give back so much of that gap" in out.stdout and (tmp_path / "b" / "report.html").is_file()


def test_pairs_that_do_not_fit(tmp_path: Path) -> None:
    model = ic.load(str(DATA / "stories260K"))
    with pytest.raises(ic.TextError, match="patching needs as many"):
        recipe.text_task(model, "Once upon a time", "Once", " there", " was")
    with pytest.raises(ic.TextError, match="begin with the same token"):
        recipe.text_task(model, "Once upon a time", "Once upon a time", " there", " there")
    assert torch.is_tensor(recipe.text_task(model, "Once upon a time", "Once upon a time", " there", " was").answer)
