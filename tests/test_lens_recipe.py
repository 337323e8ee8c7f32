"""Recipe moe_nll: the published files and columns with the golden numbers, from passes and from files of streams."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import answered
import moe_golden
import numpy as np
import pytest
import torch
from interp_plugins.logit_lens import curves
from interp_plugins.logit_lens.curves import scores_of
from interp_recipes.moe_nll import MoeNllConfig, moe_nll
from interp_recipes.moe_nll.config import Settings
from interp_recipes.moe_nll.report import charts_of, final, sentences
from safetensors.torch import load_file
from test_lens_aligned import TOLERANCE, golden, published

import interp_core as ic

PAIRS = moe_golden.DATA / "pairs.json"
FIGURES = [
    f"{name}.png"
    for scope in ("all", "last")
    for name in (
        f"nll_{scope}_agentic_vs_assisted", f"delta_nll_{scope}", f"logitlens_{scope}_agentic_vs_assisted",
        f"delta_logitlens_{scope}", f"js_{scope}", f"rank_{scope}", f"entropy_{scope}", f"top1_{scope}",
    )
] + ["delta_nll_progress.png"]  # fmt: skip
CURVES = [f"{name}_{scope}" for name in ("nll_agentic", "nll_assisted", "delta_nll", "js") for scope in ("all", "last")]


def run(out: Path, **how: Any) -> Path:
    files = {"model_path": str(moe_golden.DATA / "model"), "pair_tokens_json": how.pop("pairs", PAIRS), "out_dir": out}
    return moe_nll(MoeNllConfig(**files, **how))


def table(out: Path) -> list[dict[str, str]]:
    with (out / "tables/nll_core_layer_metrics.csv").open() as file:
        return list(csv.DictReader(file))


def curve(out: Path, name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in table(out)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nll") / "tree"
    run(out, save_hidden_states=out.parent / "states")
    return out


def test_files_columns_and_numbers(whole: Path) -> None:
    assert sorted(path.name for path in (whole / "figures/nll_core").iterdir()) == sorted(FIGURES)
    wanted = moe_golden.expected()
    keys = {"nll_agentic": "nll_a", "nll_assisted": "nll_b", "delta_nll": "delta_nll", "js": "js"}
    with np.load(whole / "tables/nll_core_matrices.npz") as arrays:
        for name in CURVES:
            stem, scope = name.rsplit("_", 1)
            theirs = wanted[f"{keys[stem]}_{scope}"]
            assert np.abs(curve(whole, name) - theirs).max() < TOLERANCE
            assert np.abs(arrays[f"mean_{name}"] - theirs).max() < TOLERANCE and arrays[name].shape == (6, 5)
        assert np.array_equal(arrays["logitlens_agentic_all"], -arrays["nll_agentic_all"])
        assert np.array_equal(arrays["delta_logitlens_last"], -arrays["delta_nll_last"])
        assert arrays["layer"].tolist() == [-1, 0, 1, 2, 3] and arrays["delta_nll_progress"].shape[0] == 5
    assert [row["layer"] for row in table(whole)] == ["-1", "0", "1", "2", "3"]
    low, high = (curve(whole, f"delta_nll_all_{end}") for end in ("low", "high"))
    assert (low < wanted["delta_nll_all"]).all() and (wanted["delta_nll_all"] < high).all()
    assert "delta_nll_all_p_adjusted" in table(whole)[0] and "micro_nll_agentic_all" in table(whole)[0]


def test_page_and_summary_say_what_the_numbers_say(whole: Path) -> None:
    page = (whole / "nll_core.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "which does not tell them apart" in page
    summary = json.loads((whole / "tables/nll_core_summary.json").read_text())
    assert (
        summary["processed_samples"] == 6 and summary["skipped_samples"] == 0 and sum(summary["targets"].values()) == 79
    )
    assert any("farthest apart" in line for line in summary["sentences"]) and summary["js_mode"] == "exact"


def test_the_better_context_is_the_one_of_lower_nll(whole: Path) -> None:
    """The page's finding; another winner gives another sentence."""
    assert answered.finding_of(whole / "nll_core.html").endswith("which does not tell them apart.")
    loaded = [load_file(path) for path in sorted((whole / "tables/nll_core_samples").iterdir())]

    def said(**levels: float) -> str:
        scores = []
        for i, tensors in enumerate(loaded * 3):
            flat = {f"logprob_{s}": torch.full_like(tensors["js"], -x - 0.01 * (i % 4)) for s, x in levels.items()}
            flat["logprob_agentic"] -= 0.001 * (i % 3)
            scores.append(scores_of(f"s{i}", tensors | flat))
        return final(curves.Curves.of(scores), "all")

    assert said(agentic=1.0, assisted=2.0).endswith(": the agentic context predicts better.")
    assert said(agentic=2.0, assisted=1.0).endswith(": the assisted context predicts better.")


def test_layers_that_differ_are_decoder_layers(whole: Path) -> None:
    """On the page's charts as in its sentences: the first row is the embedding, no layer 0."""
    loaded = [(path.stem, load_file(path)) for path in sorted((whole / "tables/nll_core_samples").iterdir())]
    many = [scores_of(f"{name}_{i}", tensors) for i in range(30) for name, tensors in loaded]
    found, settings = curves.Curves.of(many), Settings("exact", None, None, "forward")
    differ = [layer for layer, yes in zip(found.layers, found.tests["all"].below(0.05), strict=True) if yes]
    assert differ == [-1, 0, 1, 3]
    said = "the embedding to layer 1, layer 3"
    assert f"together): {said}." in charts_of(found, curves.progress(many), settings)["delta_nll_all"].caption
    assert f"differ after {said} (p" in "".join(sentences(found, settings, [], ["packed"]))


def test_the_same_command_keeps_what_is_there(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.*") if path.name != "nll_core_summary.json"}
    run(whole)
    assert "targets (" not in capsys.readouterr().err
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for other in ({"js_mode": "none"}, {"js_mode": "exact", "dtype": "bfloat16"}):
        with pytest.raises(ic.PlanError, match="give --overwrite to replace it, or another folder"):
            run(whole, **other)
    assert "targets (" not in capsys.readouterr().err  # refused before any work


def test_states_of_another_model_are_not_written_over(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = whole.parent / "states"
    before = {path: path.read_bytes() for path in states.iterdir()}
    capsys.readouterr()
    with pytest.raises(ic.PlanError, match=r"pair_0.agentic.safetensors is there: states of another model .*bfloat16"):
        run(tmp_path / "out", save_hidden_states=states, dtype="bfloat16", max_samples=1)
    with pytest.raises(ic.PlanError, match=r"pair_0.assisted.safetensors is there: states of another context"):
        run(tmp_path / "padded", save_hidden_states=states, layout="padded", max_samples=1)
    assert "targets (" not in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in states.iterdir()}


@pytest.mark.slow
def test_states_from_files_give_the_same(whole: Path, tmp_path: Path) -> None:
    how = {"max_samples": 2, "max_tokens": 5}
    run(tmp_path / "again", hidden_states_dir=whole.parent / "states", js_mode="topk_rest", js_topk=16, **how)
    run(tmp_path / "forward", **how)
    for name in CURVES[:6]:
        assert np.abs(curve(tmp_path / "again", name) - curve(tmp_path / "forward", name)).max() < 1e-6
    exact = curve(tmp_path / "forward", "js_all")
    lower, upper = (curve(tmp_path / "again", name) for name in ("js_all", "js_upper_all"))
    assert (lower <= exact + 1e-6).all() and (exact <= upper + 1e-6).all()


@pytest.mark.slow
def test_one_sample_has_no_bands(tmp_path: Path) -> None:
    run(tmp_path / "one", max_samples=1)
    assert "nll_agentic_all_low" not in table(tmp_path / "one")[0]
    assert "one sample does not tell how sure that is" in (tmp_path / "one/nll_core.html").read_text()


@pytest.mark.slow
def test_published_states_and_samples_that_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hidden"
    folder.mkdir()
    for pair in golden("padded")[:3]:
        published(folder / f"{pair.name}.pt", pair, mode="canonical" if pair.name == "pair_1" else "full")
    out = tmp_path / "tree"
    run(out, hidden_states_dir=folder, max_samples=4, js_mode="none")
    said = capsys.readouterr().err
    assert "left out pair_1" in said and "left out pair_3" in said
    summary = json.loads((out / "tables/nll_core_summary.json").read_text())
    assert [row["sample"] for row in summary["dropped"]] == ["pair_1", "pair_3"] and summary["layouts"] == ["padded"]
    assert "save_mode is &#x27;canonical&#x27;" in (out / "nll_core.html").read_text()
    assert len(table(out)) == 4 and not (out / "figures/nll_core/js_all.png").exists()
    with pytest.raises(ic.LoadError, match="pair_1: token_meta.save_mode is 'canonical'"):
        run(tmp_path / "strict", hidden_states_dir=folder, max_samples=4, strict=True)


def test_bad_settings_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    def refused(match: str, **how: Any) -> None:
        with pytest.raises(ic.InterpError, match=match):
            moe_nll(MoeNllConfig(model_path="no/such/model", pair_tokens_json=PAIRS, out_dir=tmp_path / "out", **how))

    refused("hidden_states_dir: there is no folder", hidden_states_dir=tmp_path / "nowhere")
    refused("holds neither .safetensors nor .pt files", hidden_states_dir=tmp_path)
    refused("chunk_size is 0: give at least 1", chunk_size=0)
    refused("hidden states are read or written", hidden_states_dir=tmp_path, save_hidden_states=tmp_path)
    assert not (tmp_path / "out").exists()
