"""The recipe `moe_experts`: the reference's numbers in both layouts, every file, going on, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import answered
import numpy as np
import pytest
import torch
from interp_plugins.pairs import Pair, read_pairs, write_pairs
from interp_plugins.pairs.pair import SIDES, tokens_of
from interp_plugins.pairs.routing import VIEWS, joined, pair_sums, routed_targets
from interp_plugins.router.point_files import read_points
from interp_plugins.router.points import Shape
from interp_recipes import moe_experts as recipe
from interp_recipes.moe_experts import MoeExpertsConfig
from interp_recipes.moe_experts.findings import Findings
from interp_recipes.moe_experts.report import answer_of, figures, sentences, summary
from moe_golden import DATA, expected, model
from PIL import Image

import interp_core as ic
from interp_core import runs, testing
from interp_core import sites as S

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


BROKEN = {
    "unequal": {"agentic_ids": [1, 20, 21], "assisted_aligned_ids": [1, 20, 22], "canonical_non_ws_positions": [2]},
    "outside": {"agentic_ids": [1, 600, 21], "assisted_aligned_ids": [1, 20, 21], "canonical_non_ws_positions": [2]},
}
"""Samples of which one is no pair, and one is not of this model."""


def run(out: Path, data: Path = PAIRS, **settings: Any) -> Path:
    config = MoeExpertsConfig(model_path=MODEL, data_path=data, out_dir=out, device="cpu", **settings)
    return recipe.moe_experts(config).parent


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in the seventh pass, and gone on with."""
    out, calls = tmp_path_factory.mktemp("packed") / "out", list[str]()

    def counted(loaded: ic.Model, pair: Pair, side: Any, top_k: int | None) -> Any:
        calls.append(pair.name)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return routed_targets(loaded, pair, side, top_k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "routed_targets", counted)
        patch.setattr(recipe, "BLOCK", 2)
        with pytest.raises(KeyboardInterrupt):
            run(out, layout="packed")
        assert runs.manifest(home(out))["state"] == "stopped" and not (out / "figures").exists()
        assert [path.name for path in (out / "tables/expert_core_samples").iterdir()] == ["0000.safetensors"]
        run(out, layout="packed")
        assert calls[7:] == [f"pair_{i}" for i in (2, 2, 3, 3, 4, 4, 5, 5)]
    assert runs.manifest(home(out))["state"] == "done"
    return out


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a file with two samples that cannot be used."""
    folder = tmp_path_factory.mktemp("padded")
    pairs = json.loads(PAIRS.read_text())["pairs"] + [{"id": name, **row} for name, row in BROKEN.items()]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return run(folder / "out", folder / "pairs.json", layout="padded")


def home(out: Path) -> Path:
    """The run's record beside its folder."""
    (found,) = Path(f"{out}.runs").iterdir()
    return found


def findings(loaded: ic.Model, pairs: Sequence[Pair], **settings: Any) -> Findings:
    """What the recipe finds, without its files."""
    config = MoeExpertsConfig(model_path=MODEL, data_path=PAIRS, **settings)
    sums = joined([pair_sums(*(routed_targets(loaded, pair, s, config.top_k) for s in SIDES)) for pair in pairs])
    return Findings(config, Shape.of(loaded), [pair.name for pair in pairs], sums, [], ["packed"], "here")


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


def test_every_file_is_there(packed: Path) -> None:
    assert {path.name for path in (packed / "figures/expert_core").iterdir()} == FIGURES
    assert {path.name for path in (packed / "tables").iterdir()} == TABLES
    for name in FIGURES:
        with Image.open(packed / "figures/expert_core" / name) as picture:
            assert picture.width > 300 and all(low < high for low, high in picture.convert("RGB").getextrema())
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
    text = (packed / "expert_core_report.html").read_text()
    finding = answered.finding_of(packed / "expert_core_report.html")
    most, least = (int(pick(arrays(packed)["tv_mean"])) for pick in (np.argmax, np.argmin))
    assert finding.startswith(f"Routing differs most in layer {most} ") and f"least in layer {least} (" in finding
    assert "http" not in text and "layer 3, expert 4\nagentic" in text
    found = arrays(packed)
    most = int(found["tv_mean"].argmax())
    assert f"Routing differs most in layer {most} (total variation {found['tv_mean'][most]:.3f}" in text
    above = int((found["jaccard_low"] > 5 / 28).sum())
    assert f"above that of random sets (0.179) in {above} of 4 layers" in text
    cells = found["thresholded_all"]
    assert f"{(cells > 0).sum()} are used more by the agentic context, {(cells < 0).sum()} by the assisted" in text
    assert "Intervals of 6 samples are narrower than the truth" in text
    assert text.count("<table class='grid'") == 8 and text.count("<svg") == 3


def test_differences_are_white_at_zero_and_symmetric(packed: Path) -> None:
    text = (packed / "expert_core_report.html").read_text()
    ends = re.findall(r"<figcaption>[^<]*?(-[\d.]+)<span class='bar'.*?</span>([\d.]+)[^<]*<br>", text)
    assert len(ends) == 4 and all(float(low) == -float(high) for low, high in ends)
    assert "background:#fafafa" in text  # of a thresholded cell that does not stand out


def test_a_second_run_keeps_everything(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "BLOCK", 2)
        patch.setattr(recipe, "routed_targets", None)
        before = {path: path.stat().st_mtime_ns for path in packed.rglob("*") if path.is_file()}
        run(packed, layout="packed")
        said = capsys.readouterr().out
        assert "kept tables/expert_core_samples/0002.safetensors" in said and "kept expert_core_report.html" in said
        assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) > 20
        with pytest.raises(ic.PlanError, match="give --overwrite to replace it"):  # before any pass
            run(packed, layout="packed", threshold_percentile=90.0)


def test_another_number_of_experts_is_a_statistic_of_the_probabilities() -> None:
    """All of them: the router's mean probabilities. As many as the model takes: what it executes."""
    pairs, wanted = read_pairs(PAIRS, layout="packed"), expected()
    found = findings(model(), pairs, top_k=8)
    for view in VIEWS:
        for side, letter in LETTER.items():
            np.testing.assert_allclose(found.matrix(view, side), wanted[f"usage_softmax_{view}_{letter}"], atol=1e-6)
    np.testing.assert_allclose(found.curve("tv"), wanted["curve_tv_full"], atol=1e-6)
    told = summary(found, model())
    assert (told["top_k"], told["model_top_k"], told["sets"], told["chance"]) == (8, 2, "re-ranked", {})
    said = " ".join(sentences(found, found.top_rows("all") + found.top_rows("last")))
    assert "the model executes 2. This is a statistic" in said and "random sets" not in said
    plain, named = (findings(model(), pairs[:2], top_k=k) for k in (None, 2))
    assert all(torch.equal(plain.sums[name], named.sums[name]) for name in plain.sums) and named.executed


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
    """Dense layers have no row; sets are the executed ones where a bias and groups choose, not the largest ones."""
    loaded = ic.load(testing.tiny(family), check=False)
    pairs = read_pairs(other_pairs(tmp_path))
    found = findings(loaded, pairs)
    assert found.arrays()["layers"].tolist() == loaded.layers(S.router_logits)
    np.testing.assert_allclose(found.matrix("all", "agentic").sum(-1), 1, atol=1e-6)
    counts = np.zeros((len(found.layers), found.shape.n_experts))
    for pair in pairs:
        indices = loaded.run(pair.agentic, read=S.router_indices, logits=False)
        for row, layer in enumerate(found.layers):
            ids = indices[S.router_indices[layer]].plain[0, list(pair.agentic_positions)].flatten()
            counts[row] += np.bincount(ids.numpy(), minlength=counts.shape[1])
    np.testing.assert_array_equal(found.arrays()["count_all_agentic"], counts)
    assert counts.sum() == 12 * found.top_k * len(found.layers)


def test_samples_that_cannot_be_used_are_listed(padded: Path) -> None:
    listed = {row["sample"]: row for row in rows(padded / "tables/expert_core_dropped.csv")}
    assert "1 of 1 targets have other ids" in listed["unequal"]["reason"]
    assert "agentic: token id 600 does not exist" in listed["outside"]["reason"]
    assert (listed["pair_3"]["targets"], listed["pair_3"]["reason"]) == ("2", "masked out of a context")
    told = json.loads((padded / "tables/expert_core_summary.json").read_text())
    assert len(told["samples"]) == 6 and {row["sample"] for row in told["dropped"]} == set(listed) and len(listed) == 3
    page = (padded / "expert_core_report.html").read_text()
    assert "Left out: 2 samples and 2 targets" in page and "token id 600" in page


@pytest.mark.parametrize(("name", "says"), [("unequal", "1 of 1 targets have other ids"), ("outside", "token id 600")])
def test_samples_that_cannot_be_used_end_a_strict_run(name: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({name: BROKEN[name]}))
    for strict in (True, False):  # not strict, no sample is left
        with pytest.raises(ic.InterpError, match=f"sample {name!r}.*{says}"):
            run(tmp_path / f"out{strict}", path, strict=strict)
        assert not (tmp_path / f"out{strict}/figures").exists()


def test_another_layer_gives_another_finding() -> None:
    found = findings(model(), read_pairs(PAIRS, layout="packed"))
    turned = replace(found, sums={**found.sums, "curve_tv": found.sums["curve_tv"].flip(-1)})
    said = [answer_of(each, figures(each), [], []).finding for each in (found, turned)]
    layers = [[int(layer) for layer in re.findall(r"in layer (\d)", each)] for each in said]
    assert layers[1] == [3 - layer for layer in layers[0]] and "random sets of equal weights give 0.750" in said[0]
    same = replace(found, sums={**found.sums, "curve_tv": found.sums["curve_tv"][:, :1].expand(-1, 4)})
    assert "least" not in answer_of(same, figures(same), [], []).finding


def test_one_sample_has_no_intervals() -> None:
    found = findings(model(), read_pairs(PAIRS, layout="packed", max_samples=1))
    top = found.top_rows("all") + found.top_rows("last")
    assert found.bands == {} and "tv_low" not in found.arrays() and top[0]["low"] == ""
    said = sentences(found, top)
    assert "There is one sample, and intervals need two." in said and "interval" not in "".join(said[:-1])
    assert answer_of(found, figures(found), top, said).finding.startswith("Routing differs most in layer")


def test_a_dense_model_is_refused_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "routed_targets", None)
    with pytest.raises(ic.CapabilityError, match="needs a mixture of experts; toy:text"):
        recipe.moe_experts(MoeExpertsConfig(model_path="toy:text", data_path=PAIRS, out_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top_k": 0}, "top_k is 0: give 1 to the number of experts"),
        ({"top_k": 9}, "top_k is 9: give 1 to 8, or leave it out"),
        ({"threshold_percentile": 101.0}, "threshold_percentile is 101.0: give 0 to 100"),
        ({"threshold_min": -1.0}, "threshold_min is -1.0: give 0 or more"),
        ({"threshold_min": float("inf")}, "threshold_min is inf: give 0 or more, a finite number"),
        ({"max_samples": 0}, "max_samples is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ic.PlanError, match=says):
        run(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
