"""Maps against evidence, baselines, and images with regions blurred: by hand, pixel by pixel, and on a drawn image."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from interp_plugins.localisation import (
    blurred,
    centre_map,
    compare,
    evidence,
    hits,
    perturbation_curves,
    perturbed,
    random_map,
    regions,
)
from PIL import Image, ImageDraw

import interp_core as ic

GOLDEN = [[0.5, 0.5], [0.1, -0.3]]
DIAGONAL = np.array([[True, False], [False, True]])


def test_the_golden_map() -> None:
    found = hits(GOLDEN, evidence(DIAGONAL, (2, 2)), (0.25, 0.5))
    assert found.pointing == 0.5 and found.energy == pytest.approx(0.5 / 1.1) and found.rank_auc == 0.375
    assert found.recall == {0.25: 0.25, 0.5: 0.5} and found.tied == 2 and found.evidence == 0.5
    assert found.iou == pytest.approx(1 / 3)  # both tied patches, one of them evidence
    assert found.record()["R@0.25"] == 0.25
    assert hits(torch.tensor(GOLDEN, dtype=torch.float64), evidence(DIAGONAL, (2, 2)), (0.25, 0.5)) == found


def test_patches_of_pixels() -> None:
    """7 × 5 pixels in 3 × 2 patches: every pixel belongs to one, rows by ⌊r · 3 / 7⌋."""
    mask = np.zeros((7, 5), dtype=bool)
    mask[2, 2] = True
    found = evidence(mask, (3, 2))
    assert found.area.tolist() == [[9, 6], [6, 4], [6, 4]] and found.area.sum() == 35
    assert found.pixels.tolist() == [[1, 0], [0, 0], [0, 0]] and found.share[0, 0] == pytest.approx(1 / 9)
    fine = evidence(mask, (14, 10))  # more patches than pixels
    assert fine.area.sum() == 35 and fine.pixels.sum() == 1 and set(np.unique(fine.area)) == {0, 1}
    assert not fine.share[fine.area == 0].any()


def test_boxes_touch_whole_pixels_and_are_clipped_and_united() -> None:
    box = evidence([(0.2, 1.0, 2.1, 2.0)], (4, 4), (4, 4)).pixels
    assert np.argwhere(box).tolist() == [[1, 0], [1, 1], [1, 2]]
    two = evidence([(-5, -5, 1, 1), (0, 0, 2, 1), (3, 3, 99, 99)], (4, 4), (4, 4)).pixels
    assert np.argwhere(two).tolist() == [[0, 0], [0, 1], [3, 3]] and two.max() == 1


def naive(scores: np.ndarray, mask: np.ndarray, share: float) -> dict[str, float]:
    """The numbers pixel by pixel, over all orders of the patches."""
    (gh, gw), (height, width) = scores.shape, mask.shape
    rows = [min(gh - 1, r * gh // height) for r in range(height)]
    cols = [min(gw - 1, c * gw // width) for c in range(width)]
    pixels = [(r, c) for r in range(height) for c in range(width)]
    s = {(r, c): scores[rows[r], cols[c]] for r, c in pixels}
    inside, outside = [p for p in pixels if mask[p]], [p for p in pixels if not mask[p]]
    pairs = [(s[a] > s[b]) + (s[a] == s[b]) / 2 for a in inside for b in outside]
    area = {
        patch: sum((rows[r], cols[c]) == patch for r, c in pixels) for patch in itertools.product(range(gh), range(gw))
    }
    mass = [max(s[r, c], 0) / area[rows[r], cols[c]] for r, c in pixels]
    patches = list(area)
    orders = [
        o for o in itertools.permutations(patches) if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))
    ]
    numbers = {"pointing": 0.0, "recall": 0.0, "both": 0.0, "budget": 0.0}
    for order in orders:
        in_top = {patch: sum((rows[r], cols[c]) == patch for r, c in inside) for patch in patches}
        numbers["pointing"] += (in_top[order[0]] > 0) / len(orders)
        top = order[: max(1, math.ceil(share * len(patches)))]
        numbers["recall"] += sum(in_top[p] for p in top) / len(inside) / len(orders)
        top = order[: max(1, math.ceil(mask.mean() * len(patches) - 1e-9))]
        numbers["both"] += sum(in_top[p] for p in top) / len(orders)
        numbers["budget"] += sum(area[p] for p in top) / len(orders)
    iou = numbers["both"] / (numbers["budget"] + len(inside) - numbers["both"])
    energy = sum(m for p, m in zip(pixels, mass, strict=True) if mask[p]) / sum(mass) if sum(mass) else 0.0
    return {
        "pointing": numbers["pointing"], "energy": energy, "rank_auc": sum(pairs) / len(pairs), "recall": numbers["recall"],
        "iou": iou,
    }  # fmt: skip


def test_against_every_pixel_and_every_order_of_ties() -> None:
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(40):
        scores = rng.integers(-2, 3, (2, 3)).astype(float)
        mask = rng.random((int(rng.integers(3, 8)), int(rng.integers(3, 8)))) < rng.choice([0.1, 0.5])
        if not mask.any():
            continue
        share = float(rng.choice([0.05, 0.3, 0.5, 1.0]))
        found = hits(scores, evidence(mask, (2, 3)), (share,))
        for name, value in naive(scores, mask, share).items():
            mine = found.recall[share] if name == "recall" else getattr(found, name)
            assert mine == pytest.approx(value, abs=1e-12), name
            compared += 1
    assert compared > 150


def test_maps_of_one_value_and_nothing_above_zero() -> None:
    where = evidence(DIAGONAL, (2, 2))
    flat = hits(np.ones((2, 2)), where)
    assert (flat.pointing, flat.energy, flat.rank_auc) == (0.5, 0.5, 0.5) and flat.tied == 4
    assert flat.recall[0.2] == 0.25  # a fourth of the patches
    assert hits(-np.ones((2, 2)), where).energy == 0
    assert hits(GOLDEN, evidence(np.ones((4, 4), dtype=bool), (2, 2))).rank_auc is None
    tens = hits(np.arange(30.0).reshape(5, 6), evidence(np.ones((5, 6), dtype=bool), (5, 6)), (0.1, 0.7))
    assert tens.recall == {0.1: pytest.approx(0.1), 0.7: pytest.approx(0.7)}  # 0.7 · 30 is 21 patches


def test_what_is_refused() -> None:
    where = evidence(DIAGONAL, (2, 2))
    for scores, message in (
        (np.ones((3, 2)), "the map is"), ([[1.0, np.nan]] * 2, "not one that is not finite"), ([1.0, 2.0], r"not \[2\]"), ("a", "a map of numbers"),
    ):  # fmt: skip
        with pytest.raises(ic.PlanError, match=message):
            hits(scores, where)
    with pytest.raises(ic.PlanError, match="shares of patches"):
        hits(GOLDEN, where, (0.0,))
    for boxes, size, message in (
        ([], (4, 4), "no pixel is evidence"), ([(9, 9, 12, 12)], (4, 4), "no pixel"), ([(2, 0, 1, 1)], (4, 4), "boxes of left"),
        ([(0, 0, 1)], (4, 4), "boxes of left"), ([(0, 0, 1, 1)], None, "need size="),
    ):  # fmt: skip
        with pytest.raises(ic.PlanError, match=message):
            evidence(boxes, (2, 2), size)
    with pytest.raises(ic.PlanError, match="at least one row"):
        evidence(DIAGONAL, (0, 2))
    with pytest.raises(ic.PlanError, match="target takes a whole number from 4"):
        regions(GOLDEN, (8, 8), target=3)


def test_baselines() -> None:
    assert np.array_equal(random_map("a"), random_map("a")) and not np.array_equal(random_map("a"), random_map("b"))
    assert random_map("a").shape == (32, 32) and 0.45 < random_map("a").mean() < 0.55
    centre = centre_map()
    assert centre.shape == (32, 32) and np.array_equal(centre, centre[::-1]) and np.array_equal(centre, centre.T)
    assert centre[0, 0] == pytest.approx(math.exp(-2 / (2 * 0.35**2))) and centre.max() == centre[15, 16]
    middle = evidence([(24, 24, 40, 40)], (32, 32), (64, 64))
    assert hits(centre, middle).rank_auc > 0.99 and abs(hits(random_map("a"), middle).rank_auc - 0.5) < 0.1


def test_regions_are_nearly_square_and_about_as_many_as_asked() -> None:
    for size, grid in (
        ((64, 64), (8, 8)),
        ((50, 200), (4, 16)),
        ((200, 50), (16, 4)),
        ((1, 1000), (1, 64)),
        ((100, 150), (7, 9)),
    ):
        assert regions(GOLDEN, size).grid == grid
    found = regions(np.arange(16.0).reshape(4, 4), (40, 64))
    rows, cols = found.grid
    boxes = [found.box(i) for i in range(rows * cols)]
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in boxes) == 40 * 64
    assert np.array_equal(found.scores.reshape(rows, cols)[:, 0], [r * 4 // rows * 4.0 for r in range(rows)])


def test_order_of_regions_and_ties() -> None:
    """Of ties the later region first; the larger groups first; signs count."""
    found = regions([[1.0, 1.0], [-2.0, 3.0]], (4, 4), target=4, steps=4)
    assert found.step.tolist() == [2, 1, 3, 0] and found.tied == 0.5
    assert regions([[1.0, 1.0], [-2.0, 3.0]], (4, 4), target=4, steps=3).step.tolist() == [1, 0, 2, 0]
    assert np.bincount(regions(GOLDEN, (64, 64)).step).tolist() == [7, 7, 7, 7, 6, 6, 6, 6, 6, 6]
    assert regions(GOLDEN, (4, 4), target=4, steps=99).steps == 4


def picture() -> Image.Image:
    image = Image.new("RGB", (48, 32), "white")
    ImageDraw.Draw(image).rectangle((30, 4, 44, 28), fill=(200, 0, 40))
    return image


def test_images_with_regions_blurred() -> None:
    image = picture()
    found = regions(np.arange(6.0).reshape(2, 3), (32, 48))
    pairs = list(perturbed(image, found))
    assert len(pairs) == found.steps + 1 == 11
    clean, blur = np.asarray(image), np.asarray(blurred(image))
    assert not np.array_equal(clean, blur)
    for step, (deleted, inserted) in enumerate(pairs):
        gone = np.zeros((32, 48), dtype=bool)
        for selection in np.flatnonzero(found.step < step):
            left, top, right, bottom = found.box(int(selection))
            gone[top:bottom, left:right] = True
        assert gone.mean() == pytest.approx((found.step < step).mean(), abs=0.05)
        assert np.array_equal(np.asarray(deleted), np.where(gone[..., None], blur, clean))
        assert np.array_equal(np.asarray(inserted), np.where(gone[..., None], clean, blur))
    assert np.array_equal(np.asarray(pairs[0][0]), clean) and np.array_equal(np.asarray(pairs[-1][0]), blur)
    assert np.array_equal(np.asarray(image), np.asarray(picture()))
    with pytest.raises(ic.PlanError, match="the image is"):
        next(perturbed(image.resize((20, 20)), found))


def test_curves_by_hand() -> None:
    found = regions([[4.0, 3.0], [1.0, -2.0]], (8, 8), target=4, steps=4)
    curves = perturbation_curves(found, [-1, -3, -2, -4, -5], [-5, -4, -4.5, -2, -1])
    assert curves.deletion.tolist() == [1, 0.5, 0.5, 0.25, 0] and curves.insertion.tolist() == [0, 0.25, 0.25, 0.75, 1]
    assert curves.shares.tolist() == [0, 0.25, 0.5, 0.75, 1] and curves.density.tolist() == [1, 0.5, 0.125, 0, 0]
    assert curves.deletion_auc == 0.4375 and curves.insertion_auc == 0.4375 and not curves.degenerate
    corrected = np.array([1, 0.5, 0.5 + 0.375, 0.5, 0])  # level + |level - density|
    assert curves.mas == pytest.approx(np.trapezoid(corrected) / 4)
    assert list(curves.record()) == ["deletion", "insertion", "mas"]


def test_groups_of_unlike_size_weigh_by_their_regions() -> None:
    found = regions(np.ones((1, 1)), (8, 8), target=4, steps=3)
    curves = perturbation_curves(found, [0, -1, -1, -1], [-1, -1, -1, 0])
    assert curves.shares.tolist() == [0, 0.5, 0.75, 1] and curves.deletion_auc == 0.25 and curves.insertion_auc == 0.125
    negative = regions(-np.ones((1, 1)), (8, 8), target=4, steps=3)
    assert perturbation_curves(negative, [0, -1, -1, -1], [-1, -1, -1, 0]).density.tolist() == [1, 0.5, 0.25, 0]


def test_degenerate_curves_are_marked() -> None:
    found = regions([[4.0, 3.0], [1.0, 2.0]], (8, 8), target=4, steps=4)
    still = perturbation_curves(found, [-1, -9, -3, -2, -1], [-1, -2, -3, -4, -1])
    assert still.degenerate and still.deletion_auc == still.insertion_auc == 0.5
    assert still.deletion.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert perturbation_curves(found, [-5, -4, -3, -2, -1], [-1, -2, -3, -4, -5]).degenerate
    assert not perturbation_curves(found, [-1, -2, -3, -4, -5], [-5, -4, -3, -2, -1]).degenerate
    for deleted, inserted, message in (
        ([-1, -2], [-2, -1], "deleted takes 5 finite numbers"), ([-1, -2, math.nan, -4, -5], [-5, -4, -3, -2, -1], "deleted takes"),
        ([-1, -2, -3, -4, -5], [-1, -2, -3, -4, -5], "the ends differ by 4"),
    ):  # fmt: skip
        with pytest.raises(ic.PlanError, match=message):
            perturbation_curves(found, deleted, inserted)


def test_a_map_of_what_counts_beats_both_baselines() -> None:
    """A judge that sees nothing but how red the bar is: the map of the bar's patches is best on every number."""
    image = picture()
    bar = evidence([(30, 4, 45, 29)], (8, 12), (32, 48))

    def judged(seen: Image.Image) -> float:
        return -float(np.abs(np.asarray(seen, float) - np.asarray(image, float))[4:29, 30:45].mean()) / 50

    maps = {"bar": bar.share, "random": random_map("a"), "centre": centre_map()}
    records = {}
    for name, scores in maps.items():
        found = regions(scores, (32, 48))
        deleted, inserted = zip(*([judged(seen) for seen in pair] for pair in perturbed(image, found)), strict=True)
        where = evidence([(30, 4, 45, 29)], scores.shape, (32, 48))
        records[name] = perturbation_curves(found, deleted, inserted).record() | hits(scores, where).record()
    for name in ("random", "centre"):
        assert (
            records["bar"]["deletion"] < records[name]["deletion"]
            and records["bar"]["insertion"] > records[name]["insertion"]
        )
        for metric in ("energy", "rank_auc", "iou", "R@0.1"):
            assert records["bar"][metric] > records[name][metric], metric


def test_methods_are_compared_over_the_samples_that_all_have() -> None:
    rng = np.random.default_rng(0)
    values = {
        name: {f"s{i}": float(level + rng.normal(0, 0.05)) for i in range(40)}
        for name, level in (("map", 0.3), ("random", 0.5), ("centre", 0.45))
    }
    values["map"]["s3"] = None
    del values["centre"]["s4"]
    found = compare("deletion", values, resamples=500)
    assert len(found.samples) == 38 and found.left_out == 2 and found.means["map"].n == 38
    gain = found.above["map", "centre"]
    assert gain.high < 0 and gain.value == pytest.approx(found.means["map"].value - found.means["centre"].value)
    row = found.table()[0]
    assert row["better than random"] and row["better than centre"] and row["method"] == "map"
    assert not compare("energy", values, resamples=500).table()[0]["better than random"]
    images = {f"s{i}": i // 4 for i in range(40)}
    assert compare("deletion", values, images=images, resamples=500).means["map"].units == 10
    with pytest.raises(ic.PlanError, match="lacks the baseline 'centre'"):
        compare("deletion", {"map": values["map"], "random": values["random"]})
    with pytest.raises(ic.PlanError, match="0 of 1 samples"):
        compare("deletion", {"map": {"s": None}, "random": {"s": 1.0}, "centre": {"s": 1.0}})
