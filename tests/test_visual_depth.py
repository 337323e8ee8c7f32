"""Depths, cliffs, windows and thresholds of curves: arrays by hand, planted curves, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest
from interp_plugins.visual import depth
from interp_plugins.visual.curves import crossing, curve, depth_gap, terciles
from interp_plugins.visual.depth import LayerEstimate, Layers
from interp_plugins.visual.threshold import histogram, noise_floor, threshold

import interp_core as ic
from interp_core import stats

FEW = stats.Bootstrap(resamples=400)
PROTOTYPE = [4.34, 2.15, 1.58, 1.41, 1.29, 0.36, 0.20, 0.03]
"""Mean effects of replacing a trained toy's image by a random one (specification): its cliff at 0.1 of the peak is 5."""


def planted(cliff: int, n: int = 60, layers: int = 12, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    """Samples whose effect is about 2 nats below a layer and about 0 from it on."""
    rng = np.random.default_rng(seed)
    return np.where(np.arange(layers) < cliff, 2.0, 0.0) + rng.normal(0, noise, (n, layers))


def test_depths_by_hand() -> None:
    values = np.array([[3, 2, 0.1, 0.4, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 2], [0.3, 0, 0, 0, 0]])
    assert depth.visual_depths(values, 0.3).tolist() == [3, -1, 4, 0]  # none is -1, the first layer is 0
    assert depth.falls_below(values, 0.3).tolist() == [4, 0, 5, 1]
    assert depth.first_below(values, 0.3).tolist() == [2, 0, 1, 1]
    assert depth.first_below(np.ones(5), 0.3) == depth.falls_below(np.ones(5), 0.3) == 5
    assert depth.steepest_drop(values[0]) == 1
    assert depth.share(values, np.array([4, 0, 2, 1.0])).tolist() == pytest.approx(
        [4.3 / 7, 2 / 7, 0.1 / 7, 0.4 / 7, 2 / 7]
    )
    assert depth.soft_depth(np.array([1.4, 0.5, -0.2, 0.1])) == pytest.approx(1.6 / 4)
    assert depth.crossing(np.array([3, 2, 1, 0.0]), np.array([0, 2, 0.5, 1])) == 3
    assert depth.crossing(np.array([3, 2, 1, 0.0]), np.array([0, 2, 1, 0.0])) == 1
    assert depth.crossing(np.ones(3), np.zeros(3)) == 3


def test_the_published_toy_has_its_cliff() -> None:
    """The table of the specification: sustained crossing 5 at τ = 0.1 · max, Gaussian noise 1, windowed knockout 6."""
    layers = Layers(tuple(range(8)), 8)
    for means, tau, cliff, first in [
        (PROTOTYPE, 0.434, 5, 5), ([0.65, 0.04, 0.01, 0.02, 0.01, 0, 0, 0], 0.065, 1, 1),
        ([2.05, 2.40, 0.25, 0.40, 0.33, 0.37, 0.06, 0.03], 0.24, 6, 6), ([2.61, 0.1, 0.02, 0.03, 0.26, 0.01, 0.04, 0.01], 0.26, 5, 1),
    ]:  # fmt: skip
        found = curve("x", np.array([means, means]), layers, tau, boot=FEW)
        assert (found.cliff.value, found.first, found.evd) == (cliff, first, cliff - 1)
        assert found.non_monotone == (cliff - first > 2)
    assert threshold(np.array([PROTOTYPE] * 8), adaptive=True).tau == pytest.approx(0.434)


@pytest.mark.parametrize("cliff", [1, 5, 11])
def test_planted_cliffs_are_found_with_their_interval(cliff: int) -> None:
    values, layers = planted(cliff), Layers(tuple(range(12)), 12)
    found = curve("planted", values, layers, 0.5, blind=values[:, 0], boot=FEW)
    assert found.cliff.value == found.cliff.mode == cliff and found.cliff.width == 0 and found.cliff.agreement == 1
    assert found.evd == cliff - 1 and found.drop == cliff - 1 and not found.no_cliff and not found.non_monotone
    assert found.l10 is not None and found.l10.value == cliff
    assert found.soft is not None and found.soft.value == pytest.approx(cliff / 12, abs=0.04)
    assert (found.p[:cliff] < 0.01).all() and (found.p[cliff:] > 0.05).all()
    assert found.share is not None and (found.band.high - found.band.low > found.mean.high - found.mean.low).all()
    assert found.row()["cliff"]["value"] == cliff and len(found.table()) == 12
    assert f"cliff {cliff}" in str(found) and "<svg" in found.chart().html()


def test_an_uncertain_cliff_says_so() -> None:
    """Half of the samples fall at 3, half at 7: the mean crosses τ where the mixture does, and resamples disagree."""
    values = np.concatenate([planted(3, 20, noise=0.1), planted(7, 20, noise=0.1, seed=1)])
    found = curve("mixed", values, Layers(tuple(range(12)), 12), 1.0)
    assert {3, 7} <= {layer for layer, _ in found.cliff.counts} and (found.cliff.low, found.cliff.high) == (3, 7)
    assert found.cliff.agreement < 0.7 and sorted(set(found.depths.tolist())) == [2, 6] and found.median == 4
    assert sum(count for _, count in found.cliff.counts) == 2000


def test_curves_without_a_cliff_or_with_two() -> None:
    layers = Layers((0, 2, 4, 6), 8)
    never = curve("high", np.full((4, 4), 2.0) + np.arange(4)[:, None] / 10, layers, 0.1, boot=FEW)
    assert never.no_cliff and never.cliff.value == 8 and any("no cliff" in note for note in never.notes)
    none = curve("low", np.zeros((4, 4)), layers, 0.1, blind=np.zeros(4), boot=FEW)
    assert none.cliff.value == 0 and none.evd == -1 and set(none.depths) == {-1} and none.soft is None
    twice = curve("twice", np.tile([3, 0, 0, 3.0], (4, 1)), layers, 0.1, boot=FEW)
    assert twice.non_monotone and (twice.first, twice.cliff.value) == (2, 8)
    assert any("4 of 8 layers" in note for note in twice.notes)  # a grid with holes only bounds the crossing
    single = curve("one", np.ones((4, 1)), Layers((3,), 8), 0.1)
    assert single.drop == -1 and single.cliff.value == 8


def test_images_are_drawn_not_layers_or_questions() -> None:
    """Ten questions on each of six images: an interval over images is wider than one that takes questions as samples,
    and doubling the layers changes no interval."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(6), 10)
    values = rng.normal(1, 1, 6)[images][:, None] + rng.normal(0, 0.1, (60, 4))
    layers, by = Layers(tuple(range(4)), 4), stats.Bootstrap(images, resamples=400)
    by_image = curve("x", values, layers, 0.1, boot=by)
    by_question = curve("x", values, layers, 0.1, boot=FEW)
    assert by_image.mean.units == 6 and by_image.mean.n == 60
    assert (by_image.mean.high - by_image.mean.low > 2 * (by_question.mean.high - by_question.mean.low)).all()
    twice = curve("x", np.repeat(values, 2, axis=1), Layers(tuple(range(8)), 8), 0.1, boot=by)
    np.testing.assert_allclose(twice.mean.low[::2], by_image.mean.low, rtol=1e-12)


def test_shares_are_ratios_of_sums() -> None:
    """A sample that blinding hardly touches would dominate a mean of ratios; in the ratio of sums it weighs nothing."""
    values = np.array([[4, 2, 0.0], [4, 2, 0.0], [0.01, 1, 0.0]])
    found = curve("x", values, Layers((0, 1, 2), 3), 0.1, blind=values[:, 0])
    assert found.share is not None and found.share.value[1] == pytest.approx(5 / 8.01)


def test_the_noise_floor_and_the_sign_guard_tau() -> None:
    pilots = planted(5, 20)
    found = threshold(pilots, adaptive=True, ratio=0.1, floor=0.05)
    assert found.tau == pytest.approx(pilots.mean(0).max() / 10) and found.pilots == 20 and found.blind_low > 0
    assert threshold(pilots, adaptive=True, floor=0.7).tau == 0.7  # ν holds it up
    assert threshold(pilots, tau=0.02).tau == 0.02
    assert threshold(pilots, adaptive=True, ratio=0.5).tau == pytest.approx(pilots.mean(0).max() / 2)
    assert noise_floor(np.linspace(-1, 1, 201)) == pytest.approx(0.975, abs=0.01)
    assert sum(row["count"] for row in histogram(pilots)) == pilots.size
    for bad in (-pilots, np.zeros((20, 12)), pilots - 2):  # "patching helps", nothing at all, nothing in sum
        with pytest.raises(ic.EffectError, match="no visual dependence measurable"):
            threshold(bad, adaptive=True)
        with pytest.raises(ic.EffectError, match="no visual dependence measurable"):
            threshold(bad)
    with pytest.raises(ic.EffectError, match="noise floor 3"):
        threshold(pilots, floor=3.0)
    with pytest.raises(ic.EffectError, match="blinding the pilots"):
        threshold(pilots, blind=np.random.default_rng(0).normal(0, 1, 20))


def test_what_is_refused() -> None:
    pilots, layers = planted(5, 7), Layers(tuple(range(12)), 12)
    with pytest.raises(ic.PlanError, match="7 pilots: τ needs 8"):
        threshold(pilots, adaptive=True)
    with pytest.raises(ic.PlanError, match="tau_ratio 2"):
        threshold(pilots, ratio=2.0)
    with pytest.raises(ic.PlanError, match="all finite"):
        threshold(np.full((9, 3), np.nan))
    with pytest.raises(ic.PlanError, match="0 effects"):
        noise_floor([])
    with pytest.raises(ic.PlanError, match=r"finite numbers \[sample, 12\]"):
        curve("x", np.zeros((4, 3)), layers, 0.1, boot=FEW)
    with pytest.raises(ic.PlanError, match="rising numbers"):
        Layers((2, 1), 4)
    with pytest.raises(ic.PlanError, match="one layer has no slope"):
        depth.steepest_drop(np.ones(1))


def test_gap_terciles_and_crossing() -> None:
    gap = depth_gap(np.array([6, 7, 6, 7]), np.array([2, 3, 2, -1]), resamples=200)
    assert gap.value == 5 and gap.excludes(0)
    hard, easy = terciles(np.arange(9.0))
    assert hard.tolist() == [False] * 6 + [True] * 3 and easy.tolist() == [True] * 3 + [False] * 6
    visual = np.tile([3, 2, 1, 0, 0.0], (6, 1)) + np.arange(6)[:, None] / 100
    text = np.tile([0, 1, 2, 3, 3.0], (6, 1))
    assert crossing(visual, text, Layers((0, 3, 6, 9, 12), 15), FEW).value == 6


def test_estimates_of_layers() -> None:
    found = LayerEstimate.of(4, [4] * 96 + [5] * 3 + [9])
    assert (found.value, found.mode, found.low, found.high, found.agreement) == (4, 4, 4, 5, 0.96)
