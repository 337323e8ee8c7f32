"""Usage, divergence, thresholds and points against independent float64 numbers (tests/data/moe), and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from interp_plugins.router import divergence, points, usage
from interp_plugins.router.divergence import Chance, Divergence
from interp_plugins.router.point_files import read_points
from interp_plugins.router.points import Point, Points, Shape, points_of, thresholded
from interp_plugins.router.routed import Routed
from interp_plugins.router.usage import Usage
from moe_golden import DATA, expected, pairs, routing

import interp_core as ic
from interp_core import stats

VARIANTS = {"a": 0, "b": 1}
SHAPE = Shape("golden", 4, (0, 1, 2, 3), 8, 2, "w")


def gathered(variant: str, last: bool = False, **how: bool) -> Usage:
    made = Usage(**how)
    for pair in routing():
        layers = pair[VARIANTS[variant]]
        made.add({layer: routed.take([-1]) for layer, routed in layers.items()} if last else layers)
    return made


def differences(last: bool) -> np.ndarray:
    return (gathered("a", last).matrix() - gathered("b", last).matrix()).numpy()


@pytest.mark.parametrize("view", ["all", "last"])
@pytest.mark.parametrize("variant", ["a", "b"])
def test_usage_is_the_reference(variant: str, view: str) -> None:
    made = gathered(variant, view == "last")
    for name, theirs in (("weight", "weight"), ("count", "count"), ("prob", "softmax")):
        matrix = made.matrix(name)  # type: ignore[arg-type]
        np.testing.assert_allclose(matrix, expected()[f"usage_{theirs}_{view}_{variant}"], atol=1e-6, rtol=0)
        np.testing.assert_allclose(matrix.sum(-1), 1, atol=1e-6)
    assert made.tokens == (79 if view == "all" else 6) and made.samples == 6 and made.layers == (0, 1, 2, 3)
    np.testing.assert_allclose(made.executed_sum, 1, atol=1e-6)


def test_one_batch_is_any_split_into_batches() -> None:
    """Tokens of all samples in one call, with their samples named, give the same as sample by sample."""
    alone, together = gathered("a", keep_samples=True), Usage(keep_samples=True)
    sizes = [len(pair[0][0]) for pair in routing()]
    rows = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for layer in alone.layers:
        joined = Routed.joined([pair[0][layer] for pair in routing()]).take(mixed)
        together.add_layer(layer, joined, rows[mixed], len(sizes))
    for statistic in usage.STATISTICS:
        for average in ("micro", "macro"):
            ours, theirs = (made.matrix(statistic, average) for made in (alone, together))  # type: ignore[arg-type]
            np.testing.assert_allclose(ours, theirs, atol=1e-12)
        np.testing.assert_allclose(alone.per_sample(statistic), together.per_sample(statistic), atol=1e-12)
        np.testing.assert_allclose(alone.per_sample(statistic).mean(0), alone.matrix(statistic, "macro"), atol=1e-12)
    assert torch.equal(alone.counts, together.counts)
    assert not torch.allclose(alone.matrix(), alone.matrix(average="macro"), atol=1e-3)


def test_curves_are_the_reference() -> None:
    made = Divergence()
    for first, second in routing():
        made.add(first, second)
    assert made.tokens.tolist() == expected()["tokens_per_sample"].tolist()
    for ours, theirs in (("tv", "tv_topk"), ("tv_full", "tv_full"), ("top1_same", "top1_same")):
        np.testing.assert_allclose(made.per_sample(ours), expected()[f"curve_{theirs}_persample"], atol=1e-6)
        np.testing.assert_allclose(made.curve(ours), expected()[f"curve_{theirs}"], atol=1e-6)
        np.testing.assert_allclose(made.curve(ours, "micro"), expected()[f"curve_{theirs}_micro"], atol=1e-6)
    for name in ("jaccard", "intersection"):
        np.testing.assert_allclose(made.per_sample(name), expected()[f"curve_{name}_persample"], atol=1e-14)
        np.testing.assert_allclose(made.curve(name, "micro"), expected()[f"curve_{name}_micro"], atol=1e-14)
    band = made.band("tv", stats.Bootstrap(resamples=200))
    np.testing.assert_allclose(band.value, expected()["curve_tv_topk"], atol=1e-6)
    assert (band.low < band.value).all() and (band.value < band.high).all()


def test_total_variation_of_usage_is_the_reference_and_below_that_of_tokens() -> None:
    for view in ("all", "last"):
        first, second = (gathered(variant, view == "last").matrix() for variant in "ab")
        found = usage.total_variation(first, second)
        np.testing.assert_allclose(found, expected()[f"tv_of_mean_usage_{view}"], atol=1e-6)
    first, second = (gathered(variant).matrix() for variant in "ab")
    assert (usage.total_variation(first, second) <= expected()["curve_tv_topk_micro"] + 1e-9).all()


@pytest.mark.parametrize("q", [90, 99])
@pytest.mark.parametrize("view", ["all", "last"])
def test_thresholds_are_the_reference(view: str, q: int) -> None:
    found = thresholded(differences(view == "last"), q)
    assert found.threshold == pytest.approx(float(expected()[f"threshold_{view}_p{q}"]), abs=1e-6)
    np.testing.assert_array_equal(found.map, expected()[f"thresholded_{view}_p{q}"])


def test_threshold_has_a_floor_and_no_sign_of_nothing() -> None:
    assert thresholded([[0.0, 0.001], [-0.004, 0.002]]).map.tolist() == [[0, 0], [0, 0]]
    assert thresholded([[0.0, 0.0]], minimum=0.0).map.tolist() == [[0, 0]]
    assert thresholded([[0.1, -0.1, 0.0]], 50).map.tolist() == [[1, -1, 0]]
    with pytest.raises(ic.PlanError, match="2 that are not finite"):
        thresholded([[float("nan"), float("inf")]])


def test_points_are_the_reference() -> None:
    """Order and cells exactly; the tied cells, unused by either, by layer and expert."""
    reference = json.loads((DATA / "points.json").read_text())
    matrices = {
        "last_a_minus_b": differences(True),
        "last_b_minus_a": -differences(True),
        "last_a": gathered("a", True).matrix(),
        "all_a_minus_b": differences(False),
    }
    assert set(matrices) == set(reference)
    for name, matrix in matrices.items():
        made = points_of(matrix, range(4))
        wanted = [(row["layer"], row["expert"]) for row in reference[name]]
        assert [point[:2] for point in made.points] == wanted
        np.testing.assert_allclose([p.value for p in made.points], [r["value"] for r in reference[name]], atol=1e-6)


def test_points_are_read_as_they_were_written(tmp_path: Path) -> None:
    first, second = (gathered(variant, True).matrix() for variant in "ab")
    made = points_of(
        first - second, range(4), a=first, b=second, statistic="usage_weight last A-B", shape=SHAPE, positive=True
    )
    again = read_points(made.write(tmp_path / "points.json"), SHAPE)
    assert again == made and 0 < len(made) < 32 and made.points[-1].value > 0
    best = made.points[0]
    assert best.a is not None and best.b is not None and best.value == pytest.approx(best.a - best.b)
    assert made.experts(3) == {0: (5,), 2: (5,), 3: (4,)}
    data = json.loads((tmp_path / "points.json").read_text())
    assert data["format"] == "router-points/1" and [row["rank"] for row in data["points"]] == list(range(len(made)))


def test_old_points_in_every_form(tmp_path: Path) -> None:
    """A bare list or an object; any of the keys; layers of the decoder, or numbers in the list of routers."""
    path = tmp_path / "old.json"
    rows = [{"layer": 0, "router": 3, "diff": 0.2}, {"layer": 1, "expert": 2, "score": 0.5}, {"layer": 0, "expert": 1, "value": 0.2}]  # fmt: skip
    dense_first = Shape("m", 4, (1, 3), 8, 2)
    for form in (rows, {"points": rows}):
        path.write_text(json.dumps(form))
        assert read_points(path, SHAPE).points == (Point(1, 2, 0.5), Point(0, 1, 0.2), Point(0, 3, 0.2))
        moved = read_points(path, dense_first, layer_index="router").points
        assert moved == (Point(3, 2, 0.5), Point(1, 1, 0.2), Point(1, 3, 0.2))
        with pytest.raises(ic.PlanError, match="give layer_index='router' for files of the original"):
            read_points(path, dense_first)
        with pytest.raises(ic.PlanError, match="layer 0 of m has no experts"):
            read_points(path, dense_first, layer_index="decoder")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_experts": 16}, "n_experts 8; golden has 16"),
        ({"n_layers": 6}, "n_layers 4; golden has 6"),
        ({"moe_layers": (0, 1, 2)}, "moe_layers"),
        ({"weights": "other"}, "with other weights"),
        ({"top_k": 4}, "top_k 2; golden has 4"),
    ],
)
def test_points_of_another_model_are_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    from dataclasses import replace

    path = points_of(np.eye(4, 8), range(4), shape=SHAPE).write(tmp_path / "points.json")
    with pytest.raises(ic.PlanError, match=says):
        read_points(path, replace(SHAPE, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("{", ic.LoadError, "cannot be read"),
        ('{"a": 1}', ic.LoadError, "holds no points: it has 'a'"),
        ('{"format": "router-points/9", "points": []}', ic.LoadError, "of format 'router-points/9'"),
        ('{"format": "router-points/1", "points": []}', ic.LoadError, "file has model, n_layers"),
        ("[3]", ic.LoadError, "point 0 is a int"),
        ('[{"layer": 0, "value": 1}]', ic.LoadError, "has none of expert, router"),
        ('[{"layer": 0, "expert": 1, "router": 2, "value": 1}]', ic.LoadError, "several different of expert, router"),
        ('[{"layer": 0.5, "expert": 1, "value": 1}]', ic.LoadError, "layer is 0.5"),
        ('[{"layer": 0, "expert": 1, "value": NaN}]', ic.LoadError, "not a finite number"),
        ('[{"layer": 0, "expert": 8, "value": 1}]', ic.PlanError, "expert 8 in layer 0; golden has 8 experts"),
        ('[{"layer": 4, "expert": 0, "value": 1}]', ic.PlanError, "layer 4 of golden has no experts"),
        ('[{"layer": 0, "expert": 1, "value": 1}, {"layer": 0, "expert": 1, "value": 2}]', ic.PlanError, "2 times"),
    ],
)
def test_bad_points_are_refused(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    path = tmp_path / "points.json"
    path.write_text(text)
    with pytest.raises(error, match=says):
        read_points(path, SHAPE)


def test_divergence_by_hand() -> None:
    a = Routed.of_ids(torch.tensor([[0, 1], [2, 3]]), 4, torch.tensor([[0.6, 0.4, 0, 0], [0, 0, 1.5, 0.5]]))
    b = Routed.of_ids(torch.tensor([[1, 2], [2, 3]]), 4, torch.tensor([[0, 0.5, 0.5, 0], [0, 0, 0.75, 0.25]]))
    found = divergence.token_statistics(a, b)
    np.testing.assert_allclose(found["tv"], [0.6, 0.0], atol=1e-7)  # the second differs in scale alone
    np.testing.assert_allclose(found["weighted_jaccard"], [0.4 / 1.6, 1.0], atol=1e-7)
    assert found["intersection"].tolist() == [1, 2] and found["overlap"].tolist() == [0.5, 1]
    np.testing.assert_allclose(found["jaccard"], [1 / 3, 1])
    assert "tv_full" not in found
    made = Divergence()
    made.add({0: a}, {0: b})
    assert made.per_sample("jaccard", "sample").tolist() == [[3 / 4]]  # {0 1 2 3} and {1 2 3}
    assert made.curve("overlap", level="sample").tolist() == [1.0]
    assert divergence.saturation(a, b) == {"top_k": 0.75, "top_1": 0.5}
    sets = divergence.corpus_sets([[0.5, 0.3, 0.1, 0.1]], [[0.1, 0.5, 0.1, 0.3]], 2)
    assert sets["intersection"].tolist() == [1] and sets["jaccard"].tolist() == [1 / 3]
    tv = found["tv"]
    np.testing.assert_allclose(found["weighted_jaccard"], (1 - tv) / (1 + tv))


def test_chance_is_what_random_sets_share() -> None:
    chance = Chance.of(2, 8)
    assert chance.intersection == 0.5 and Chance.of(8, 128).intersection == 0.5 and chance.overlap == 0.25
    sets = [{i, j} for i in range(8) for j in range(i)]
    exact = np.mean([len(s & t) / len(s | t) for s in sets for t in sets])
    assert chance.jaccard == pytest.approx(exact, abs=1e-12)
    assert Chance.of(3, 4).jaccard == pytest.approx((1 + 3 * 2 / 4) / 4)


def test_what_does_not_fit_is_refused() -> None:
    a, b = (Routed.of_ids(torch.zeros(n, 1, dtype=torch.long), e) for n, e in ((2, 4), (3, 4)))
    with pytest.raises(ic.PlanError, match="2 tokens are compared with 3"):
        divergence.token_statistics(a, b)
    with pytest.raises(ic.PlanError, match="4 experts is compared with one of 5"):
        divergence.token_statistics(a, Routed.of_ids(torch.zeros(2, 1, dtype=torch.long), 5))
    with pytest.raises(ic.PlanError, match=r"layers \[0\] are compared with layers \[1\]"):
        Divergence().add({0: a}, {1: a})
    with pytest.raises(ic.PlanError, match="expert ids run from 0 to 4, there are 4"):
        Routed.of_ids(torch.tensor([[0, 4]]), 4)
    made = Usage()
    with pytest.raises(ic.PlanError, match="needs a token"):
        made.matrix()
    made.add({0: a})
    with pytest.raises(ic.ReadError, match="no weight usage of expert ids alone"):
        made.matrix("weight")
    assert made.matrix("count").tolist() == [[1, 0, 0, 0]]
    with pytest.raises(ic.PlanError, match="had 4 experts in earlier batches, 5"):
        made.add({0: Routed.of_ids(torch.zeros(2, 1, dtype=torch.long), 5)})
    with pytest.raises(ic.PlanError, match="sample 1 of this batch has no tokens"):
        made.add_layer(0, a, torch.tensor([0, 0]), 2)
    with pytest.raises(ic.PlanError, match="per-sample usage was not kept"):
        made.per_sample()
    with pytest.raises(ic.PlanError, match="no usage 'wieght'"):
        made.matrix("wieght")  # type: ignore[arg-type]
    with pytest.raises(ic.PlanError, match="do not say of which model"):
        Points((Point(0, 0, 1.0),)).write("nowhere.json")
    assert len(pairs()) == 6 and points.FORMAT == "router-points/1"


def test_bootstrap_intervals_are_the_reference() -> None:
    """On the reference's resamples: `index` of its file are those that seed 0 draws."""
    boot = stats.Bootstrap(method="percentile", resamples=1000)
    for view in ("all", "last"):
        a, b = (expected()[f"lens_logp_{variant}_persample_{view}"] for variant in "ab")
        band = boot.band(b - a, axes=("layer",))
        np.testing.assert_allclose(np.stack([band.low, band.high]), expected()[f"delta_nll_{view}_ci95"], atol=1e-9)
    drawn = boot.draws(lambda i: np.bincount(i.astype(int), minlength=6), np.arange(6.0))
    wanted = [np.bincount(row, minlength=6) for row in expected()["bootstrap_index"]]
    np.testing.assert_array_equal(drawn, wanted)
