"""Blind images: as large as what they stand in for, and what each mode promises."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from test_visual_images import MOST, drawn, seeing

import interp_core as ic
from interp_core import vision


@pytest.mark.parametrize("family", MOST)
@pytest.mark.parametrize("mode", vision.MODES)
def test_the_text_stays(mode: str, family: str) -> None:
    """The same ids and grids, other pixels: what patching needs."""
    model, pictures = seeing(family), [*drawn(), *ic.testing.pictures(4, seed=5)]
    if family == "smolvlm":
        pictures = pictures[:2] + pictures[4:]
    blind = vision.blind_images(pictures, mode, processor=model.processor, seed=3)
    for image, other in zip(pictures, blind.images, strict=True):
        one, two = (model.tokens("Which shape?", images=x) for x in (image, other))
        assert (np.array_equal(one.ids, two.ids) and image.size == other.size) or mode == "random"
        assert one.ids.shape == two.ids.shape and not np.array_equal(
            one.inputs["pixel_values"], two.inputs["pixel_values"]
        )
    again = vision.blind_images(pictures, mode, processor=model.processor, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(blind.images, again.images, strict=True))


def test_black_mean_noise_blur_shuffled() -> None:
    pictures = [Image.new("RGB", (16, 16), (200, 10, 0)), Image.new("RGB", (32, 16), (20, 40, 90))]
    assert not np.asarray(vision.blind_images(pictures, "black").images[1]).any()
    mean = vision.blind_images(pictures, "mean")
    assert mean.colour == vision.mean_colour(pictures) == (80, 30, 60)  # by pixels: the second is twice as large
    assert [set(map(tuple, np.asarray(image).reshape(-1, 3))) for image in mean.images] == [{(80, 30, 60)}] * 2
    assert vision.blind_images(pictures, "mean", colour=(1, 2, 3)).colour == (1, 2, 3)
    noise = [
        np.asarray(image).astype(int)
        for image in vision.blind_images([Image.new("RGB", (128, 128))] * 2, "noise").images
    ]
    assert abs(noise[0].mean() - 127.5) < 2 and noise[0].min() == 0 and noise[0].max() == 255
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.03
    ramp = Image.fromarray(np.arange(3 * 33 * 20, dtype=np.uint32).reshape(33, 20, 3).astype(np.uint8))
    mixed = np.asarray(vision.blind_images([ramp], "shuffled").images[0])
    assert sorted(mixed.ravel()) == sorted(np.asarray(ramp).ravel()) and not np.array_equal(mixed, ramp)
    assert np.array_equal(mixed[30:], np.asarray(ramp)[30:])  # squares of 5 pixels: three rows are left over
    step = Image.fromarray(np.repeat(np.array([[0] * 32 + [255] * 32], np.uint8), 64, 0))
    soft = np.asarray(vision.blind_images([step], "blur").images[0])[32, :, 0].astype(int)
    assert (np.diff(soft) >= 0).all() and np.diff(soft).max() < 12


def test_donors_are_others_of_the_same_grid() -> None:
    grids = ["a"] * 6 + ["b"] * 3 + ["c"]
    groups = [0, 0, 1, 1, 2, 3, 4, 5, 6, 7]
    seen = set()
    for seed in range(40):
        donors, resized = vision.derangement(grids, groups, seed)
        assert all(groups[donor] != groups[number] for number, donor in enumerate(donors))
        assert resized == (9,) and all(grids[donors[n]] == grids[n] for n in range(9))
        assert sorted(donors[:6]) == list(range(6)) and sorted(donors[6:9]) == [6, 7, 8]
        seen.add(donors[6:9])
    assert seen == {(7, 8, 6), (8, 6, 7)}
    donors, resized = vision.derangement(["a"] * 4, [0, 0, 0, 1])
    assert donors[:3] == (3, 3, 3) and donors[3] in (0, 1, 2) and not resized  # too many of one sample
    with pytest.raises(ic.PlanError, match="2 images of one sample have nobody to be a donor"):
        vision.derangement(["a", "a"], [0, 0])


def test_a_donor_without_a_partner_is_resized() -> None:
    pictures = drawn()
    blind = vision.blind_images(pictures, "random")
    assert blind.resized == (2, 3) and [image.size for image in blind.images] == [image.size for image in pictures]
    assert blind.donors[:2] == (1, 0) and blind.images[0] == pictures[1]


def test_by_grid_of_the_processor() -> None:
    """Two sizes that are processed to the same grid can stand in for each other as they are."""
    processor = ic.testing.processor("qwen3_vl")
    pictures = [Image.new("RGB", (17, 16)), Image.new("RGB", (16, 15), (9, 9, 9))]
    assert vision.blind_images(pictures, "random", processor=processor).resized == ()
    assert vision.blind_images(pictures, "random").resized == (0, 1)


def test_bad_input() -> None:
    picture = drawn()[0]
    for call, message in (
        (lambda: vision.blind_images([picture], "blck"), "Did you mean 'black'"),
        (lambda: vision.blind_images([picture] * 2, "random", groups=[1]), "groups= has 1 items for 2 images"),
        (lambda: vision.blind_images([picture], "random"), "1 images of one sample|nobody to be a donor"),
        (lambda: vision.blind_images([picture], "mean", colour=(1, 2)), "colour= takes red, green and blue"),
        (lambda: vision.blind_images([picture], "mean", colour=(1, 2, 300)), "from 0 to 255"),
        (lambda: vision.blind_images([picture], "black", colour=(1, 2, 3)), "colour= is for mode 'mean'"),
    ):
        with pytest.raises(ic.PlanError, match=message):
            call()
    for empty in (lambda: vision.blind_images([], "black"), lambda: vision.mean_colour([])):
        with pytest.raises(ic.TextError, match="no images"):
            empty()
