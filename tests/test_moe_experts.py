"""The recipe `moe_experts`: the reference's numbers in both layouts, every file, going on, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interp_plugins.pairs import Pair, read_pairs, write_pairs
from interp_plugins.pairs.pair import SIDES, tokens_of
from interp_plugins.pairs.routing import VIEWS, routed_targets
from interp_plugins.router.points import Shape, read_points
from interp_recipes import moe_experts as recipe
from moe_golden import DATA, expected, model
from PIL import Image

import interp_core as ic
from interp_core import runs, testing

MODEL, PAIRS = str(DATA / "model"), DATA / "pairs.json"
FIGURES = {
    *(f"expert_usage_{view}_{which}.png" for view in VIEWS for which in (*SIDES, "diff", "diff_thresholded")),
    *(f"routing_{name}_curve.png" for name in ("tv", "jaccard", "intersection")),
}
TABLES = {
    "expert_core_layer_metrics.csv", "expert_core_matrices.npz", "expert_core_summary.json",
    "last_token_agentic_minus_assisted_points.json", "last_token_assisted_minus_agentic_points.json",
    "last_token_agentic_points.json", "expert_core_top_experts.csv", "expert_core_dropped.csv", "expert_core_samples",
}  # fmt: skip
LETTER = dict(zip(SIDES, "ab", strict=True))


def run(out: Path, **settings: Any) -> Path:
    return recipe.moe_experts(MODEL, PAIRS, out, device="cpu", **settings).parent


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("packed") / "out", layout="packed")


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("padded") / "out", layout="padded")


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "tables/expert_core_matrices.npz") as file:
        return {name: file[name] for name in file}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_reference_in_the_packed_layout(packed: Path) -> None:
    found, wanted = arrays(packed), expected()
    for view in VIEWS:
        for side, letter in LETTER.items():
            np.testing.assert_allclose(found[f"avg_{view}_{side}"], wanted[f"usage_weight_{view}_{letter}"], atol=1e-6)
            counts = found[f"count_{view}_{side}"]
            np.testing.assert_allclose(counts / counts.sum(-1, keepdims=True), wanted[f"usage_count_{view}_{letter}"])
        np.testing.assert_allclose(found[f"diff_{view}"], wanted[f"diff_{view}"], atol=1e-6)
        np.testing.assert_array_equal(found[f"thresholded_{view}"], wanted[f"thresholded_{view}_p99"])
        assert float(found[f"threshold_{view}"]) == pytest.approx(float(wanted[f"threshold_{view}_p99"]), abs=1e-6)
    np.testing.assert_allclose(found["tv_mean"], wanted["curve_tv_topk"], atol=1e-6)
    np.testing.assert_allclose(found["tv_persample"], wanted["curve_tv_topk_persample"], atol=2e-6)
    for name in ("jaccard", "intersection"):
        np.testing.assert_allclose(found[f"{name}_mean"], wanted[f"curve_{name}"], atol=1e-12)
    table = rows(packed / "tables/expert_core_layer_metrics.csv")
    assert list(table[0])[:4] == ["layer", "tv_topk", "jaccard_topk", "intersection_topk"] and len(table) == 4
    for row, tv, full in zip(table, wanted["curve_tv_topk"], wanted["curve_tv_full"], strict=True):
        assert float(row["tv_topk"]) == pytest.approx(tv, abs=1e-6)
        assert float(row["tv_full"]) == pytest.approx(full, abs=1e-6)
        assert (row["n_tokens_all"], row["n_tokens_last"]) == ("79", "6")
        assert float(row["tv_topk_low"]) < tv < float(row["tv_topk_high"])
        assert float(row["intersection_chance"]) == 0.5
    usage = [float(row["tv_usage_all"]) for row in table]
    np.testing.assert_allclose(usage, wanted["tv_of_mean_usage_all"], atol=1e-6)


def test_the_points_are_the_reference(packed: Path) -> None:
    """Those of differences without the cells that are not above 0."""
    reference = json.loads((DATA / "points.json").read_text())
    shape = Shape.of(model())
    lists = {
        "agentic_minus_assisted": "last_a_minus_b",
        "assisted_minus_agentic": "last_b_minus_a",
        "agentic": "last_a",
    }
    for name, theirs in lists.items():
        found = read_points(packed / f"tables/last_token_{name}_points.json", shape).points
        wanted = [row for row in reference[theirs] if name == "agentic" or row["value"] > 0]
        assert [point[:2] for point in found] == [(row["layer"], row["expert"]) for row in wanted] and len(found) > 5
        np.testing.assert_allclose([p.value for p in found], [row["value"] for row in wanted], atol=1e-6)
        assert all(point.a is not None and point.b is not None for point in found)


def test_the_padded_layout_is_what_transformers_makes_of_it(padded: Path) -> None:
    """Router logits of a plain forward with the mask as it stands, targets at their columns."""
    hf, found = model().hf, arrays(padded)
    sums, tokens, curves = np.zeros((4, 8)), 0, []
    for pair in read_pairs(PAIRS, layout="padded"):
        sides = []
        for side in SIDES:
            context = pair.tokens(side)
            with torch.no_grad():
                out = hf(
                    input_ids=context.ids, attention_mask=context.mask.long(), output_router_logits=True
                ).router_logits
            at = context.columns(list(pair.positions(side)))[0]
            probs = torch.stack([logits.double()[at].softmax(-1) for logits in out])
            top = probs.topk(2, -1)
            sides.append(
                torch.zeros_like(probs).scatter_(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
            )
        curves.append((sides[0] - sides[1]).abs().sum(-1).mean(-1).numpy() / 2)
        sums, tokens = sums + sides[1].sum(1).numpy(), tokens + len(pair)
    assert tokens == 77 and len(curves) == 6
    np.testing.assert_allclose(found["avg_all_assisted"], sums / tokens, atol=1e-6)
    np.testing.assert_allclose(found["tv_mean"], np.mean(curves, 0), atol=1e-6)
    assert abs(found["avg_all_assisted"] - expected()["usage_weight_all_b"]).max() > 1e-2
    dropped = rows(padded / "tables/expert_core_dropped.csv")
    assert dropped == [{"sample": "pair_3", "targets": "2", "reason": "masked out of a context"}]


def test_every_file_is_there(packed: Path) -> None:
    assert {path.name for path in (packed / "figures/expert_core").iterdir()} == FIGURES
    assert {path.name for path in (packed / "tables").iterdir()} == TABLES
    for name in FIGURES:
        with Image.open(packed / "figures/expert_core" / name) as picture:
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 5
    told = json.loads((packed / "tables/expert_core_summary.json").read_text())
    assert (told["n_samples"], told["n_targets"], told["top_k"], told["sets"]) == (6, 79, 2, "executed")
    assert told["dropped"] == [] and set(told["versions"]) >= {"torch", "transformers", "interp-core"}
    top = rows(packed / "tables/expert_core_top_experts.csv")
    assert len(top) == 40 and [row["view"] for row in top] == ["all"] * 20 + ["last"] * 20
    for row in top:
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
        assert float(row["difference"]) == pytest.approx(float(row["agentic"]) - float(row["assisted"]), abs=1e-12)
    found = arrays(packed)
    assert found["layers"].tolist() == [0, 1, 2, 3] and found["samples"].tolist() == [f"pair_{i}" for i in range(6)]


def test_the_page_stands_alone_and_says_what_the_numbers_say(packed: Path) -> None:
    page = (packed / "expert_core_report.html").read_text()
    assert "http" not in page and "layer 3, expert 4\nagentic" in page
    found = arrays(packed)
    most = int(found["tv_mean"].argmax())
    assert f"Routing differs most in layer {most} (total variation {found['tv_mean'][most]:.3f}" in page
    above = int((found["jaccard_low"] > 5 / 28).sum())
    assert f"above that of random sets (0.179) in {above} of 4 layers" in page
    cells = found["thresholded_all"]
    assert f"{(cells > 0).sum()} are used more by the agentic context, {(cells < 0).sum()} by the assisted" in page
    assert "Intervals of 6 samples are narrower than the truth" in page
    assert page.count("<table class='grid'>") == 8 and page.count("<svg") == 3


def test_differences_are_white_at_zero_and_symmetric(packed: Path) -> None:
    page = (packed / "expert_core_report.html").read_text()
    ends = re.findall(r"<figcaption>(-[\d.]+)<span class='bar'.*?</span>([\d.]+)<br>", page)
    assert len(ends) == 4 and all(float(low) == -float(high) for low, high in ends)
    assert "background:#fafafa" in page  # of a thresholded cell that does not stand out


def test_a_second_run_keeps_everything_and_a_stopped_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def counted(loaded: ic.Model, pair: Pair, side: Any, top_k: int | None) -> Any:
        calls.append(pair.name)
        if len(calls) == 7 and not calls.count("stop"):
            raise KeyboardInterrupt
        return routed_targets(loaded, pair, side, top_k)

    monkeypatch.setattr(recipe, "routed_targets", counted)
    monkeypatch.setattr(recipe, "BLOCK", 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", layout="packed")
    (home,) = (tmp_path / "out.runs").iterdir()
    assert runs.manifest(home)["state"] == "stopped" and not (tmp_path / "out/figures").exists()
    assert [path.name for path in (tmp_path / "out/tables/expert_core_samples").iterdir()] == ["0000.safetensors"]
    calls[:] = ["stop"]
    run(tmp_path / "out", layout="packed")
    assert calls[1:] == [f"pair_{i}" for i in (2, 2, 3, 3, 4, 4, 5, 5)] and runs.manifest(home)["state"] == "done"
    same = [path.relative_to(packed) for path in packed.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(same) > 18
    for path in same:
        assert (tmp_path / "out" / path).read_bytes() == (packed / path).read_bytes(), path
    calls[:] = ["stop"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    run(tmp_path / "out", layout="packed")
    assert calls == ["stop"] and "kept tables/expert_core_samples/0002.safetensors" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(ic.PlanError, match="give --overwrite to replace it"):
        run(tmp_path / "out", layout="packed", threshold_percentile=90.0)


def test_another_number_of_experts_is_a_statistic_of_the_probabilities(tmp_path: Path) -> None:
    """All of them: the router's mean probabilities. As many as the model takes: what it executes."""
    out = run(tmp_path / "all", layout="packed", top_k=8)
    found, wanted = arrays(out), expected()
    for view in VIEWS:
        for side, letter in LETTER.items():
            np.testing.assert_allclose(found[f"avg_{view}_{side}"], wanted[f"usage_softmax_{view}_{letter}"], atol=1e-6)
    np.testing.assert_allclose(found["tv_mean"], wanted["curve_tv_full"], atol=1e-6)
    told = json.loads((out / "tables/expert_core_summary.json").read_text())
    assert (told["top_k"], told["model_top_k"], told["sets"], told["chance"]) == (8, 2, "re-ranked", {})
    assert "the model executes 2. This is a statistic" in (out / "expert_core_report.html").read_text()


def other_pairs(tmp_path: Path, count: int = 3, vocabulary: int = 60) -> Path:
    draw = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        a, b, target = (torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in (9, 5, 4))
        made.append(
            Pair(f"s{number}", tokens_of(a + target), tokens_of(b + target), (9, 10, 11, 12), (5, 6, 7, 8))
        )  # fmt: skip
    return write_pairs(tmp_path / "pair_tokens.json", made)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_layers_are_the_decoders(family: str, tmp_path: Path) -> None:
    """Dense layers have no row; sets are the executed ones where a bias and groups choose, not the largest probabilities."""
    folder = tmp_path / "model"
    testing.tiny(family).save_pretrained(folder)
    loaded = ic.load(str(folder), check=False)
    recipe.moe_experts(str(folder), other_pairs(tmp_path), tmp_path / "out", device="cpu")
    found = arrays(tmp_path / "out")
    assert found["layers"].tolist() == loaded.layers(ic.sites.router_logits)
    np.testing.assert_allclose(found["avg_all_agentic"].sum(-1), 1, atol=1e-6)
    counts = np.zeros_like(found["count_all_agentic"])
    for pair in read_pairs(tmp_path / "pair_tokens.json"):
        indices = loaded.run(pair.agentic, read=ic.sites.router_indices.at(list(pair.agentic_positions)), logits=False)
        for row, layer in enumerate(found["layers"].tolist()):
            ids = indices[ic.sites.router_indices[layer].at(list(pair.agentic_positions))].plain.flatten()
            counts[row] += np.bincount(ids.numpy(), minlength=counts.shape[1])
    np.testing.assert_array_equal(found["count_all_agentic"], counts)


def test_samples_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    data = json.loads(other_pairs(tmp_path, 3).read_text())
    data["s1"]["assisted_ids"][-1] += 1  # another target
    data["s2"]["agentic_ids"][0] = 600  # not in the vocabulary
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data))
    out = recipe.moe_experts(MODEL, path, tmp_path / "out", device="cpu").parent
    listed = {row["sample"]: row["reason"] for row in rows(out / "tables/expert_core_dropped.csv")}
    assert "1 of 4 targets have other ids" in listed["s1"] and "token id 600 does not exist" in listed["s2"]
    told = json.loads((out / "tables/expert_core_summary.json").read_text())
    assert told["samples"] == ["s0"] and {row["sample"] for row in told["dropped"]} == {"s1", "s2"}
    page = (out / "expert_core_report.html").read_text()
    assert "Left out: 2 samples and 0 targets" in page and "token id 600" in page
    assert "There is one sample, and intervals need two." in page and "tv_low" not in arrays(out)
    for number, says in ((1, "sample 's1': 1 of 4 targets"), (2, "sample 's2': .*token id 600")):
        path.write_text(json.dumps({"s0": data["s0"], f"s{number}": data[f"s{number}"]}))
        with pytest.raises((ic.LoadError, ic.TextError), match=says):
            recipe.moe_experts(MODEL, path, tmp_path / f"strict{number}", device="cpu", strict=True)
        path.write_text(json.dumps({f"s{number}": data[f"s{number}"]}))
        with pytest.raises((ic.LoadError, ic.PlanError), match="the first: .*s" + str(number)):
            recipe.moe_experts(MODEL, path, tmp_path / f"none{number}", device="cpu")


def test_a_dense_model_is_refused_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "routed_targets", None)
    with pytest.raises(ic.CapabilityError, match="needs a mixture of experts; toy:text"):
        recipe.moe_experts("toy:text", PAIRS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top_k": 0}, "top_k is 0: give 1 to the number of experts"),
        ({"top_k": 9}, "top_k is 9: give 1 to 8, or leave it out"),
        ({"threshold_percentile": 101.0}, "threshold_percentile is 101.0: give 0 to 100"),
        ({"threshold_min": -1.0}, "threshold_min is -1.0: give 0 or more"),
        ({"max_samples": 0}, "max_samples is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ic.PlanError, match=says):
        run(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
