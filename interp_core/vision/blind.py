"""Blind images: pictures that say nothing about the question, as large as those they stand in for.

    black     every pixel (0, 0, 0)
    mean      every pixel the mean colour of all pixels of the set (or a colour given), rounded to whole numbers
    random    another sample's picture: a random derangement within pictures of the same processed grid; one that has
              no partner there gets another sample's picture made as large as its own, and is listed in `resized`
    noise     every value uniform on 0 … 255, independent
    blur      a Gaussian blur whose standard deviation is a quarter of the shorter side
    shuffled  squares of pixels in random order; what no whole square covers stays

Width and height stay, so the grid, the number of visual tokens and M-RoPE's positions do too, which patching needs.
All are made in pixel space, before the processor; `mean` is never all zeros after normalising by accident only, so a
model that drops such pictures (SmolVLM) is told of it before it runs. Cost: the pictures are gone through once.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PlanError, TextError, nearest, wrong
from .pictures import open_pictures
from .processors import grid_of

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = tuple[int, int, int]
TRIES = 1000
"""Permutations that are tried; behind so many it counts as settled that all leave somebody within their group."""
PATCH = 16
"""Edge in pixels of the squares that `shuffled` moves."""


@dataclass(frozen=True)
class BlindImages:
    """Pictures to show instead of others.

    Attributes:
        mode: how they were made.
        images: in the order of those that they stand in for, each as large.
        seed: of what is random.
        colour: of `mean`.
        donors: of `random`, which picture stands in for each.
        resized: of `random`, which ones had no partner of their own grid and got one that was made as large.
    """

    mode: str
    images: tuple[Image, ...] = field(repr=False)
    seed: int = 0
    colour: Colour | None = None
    donors: tuple[int, ...] = ()
    resized: tuple[int, ...] = ()


def blind_images(
    images: Sequence[Any],
    mode: str,
    *,
    processor: Any = None,
    groups: Sequence[Hashable] | None = None,
    colour: Colour | None = None,
    seed: int = 0,
) -> BlindImages:
    """Blind images for a set of pictures; see the module for the modes.

    Args:
        images: what `Model.tokens` takes for images.
        mode: `black`, `mean`, `random`, `noise`, `blur` or `shuffled`.
        processor: of the model, by whose grids `random` finds partners (default: those of equal width and height).
        groups: of each picture, the sample that it belongs to; nobody's donor is of the own sample.
        colour: of `mean`, instead of the mean of this set (that of a larger one, say).

    Raises:
        PlanError: no such mode, groups that do not fit, or nobody to be a donor.
        TextError, CapabilityError: as `open_picture`.
    """
    if mode not in MODES:
        raise PlanError(f"there are no blind images of mode {mode!r}. {nearest(mode, MODES)}")
    opened = open_pictures(images)
    if not opened:
        raise TextError("there are no images to blind; give at least one")
    if mode == "mean":
        filled = mean_colour(opened) if colour is None else _colour(colour)
        return BlindImages(mode, tuple(_plain(image, filled) for image in opened), seed, filled)
    if colour is not None:
        raise PlanError(f"colour= is for mode 'mean', not for {mode!r}")
    if mode == "random":
        return _random(opened, processor, groups, seed)
    change = CHANGES[mode]
    pick = np.random.default_rng(seed)
    return BlindImages(mode, tuple(change(image, pick) for image in opened), seed)


def mean_colour(images: Sequence[Any]) -> Colour:
    """The mean colour of all pixels of pictures, rounded to whole numbers.

    Raises:
        TextError, CapabilityError: as `open_picture`.
    """
    total, count = np.zeros(3), 0
    for image in open_pictures(images):
        total += np.asarray(image, dtype=np.float64).sum((0, 1))
        count += image.width * image.height
    if not count:
        raise TextError("the mean colour of no images; give at least one")
    red, green, blue = (int(value) for value in np.rint(total / count))
    return red, green, blue


def derangement(
    grids: Sequence[Hashable], groups: Sequence[Hashable], seed: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each item another one of the same grid and of another group, each used once where that is possible; and which
    items have no partner of their own grid, and got one of another.

    Raises:
        PlanError: all items belong to one group.
    """
    if len(set(groups)) < 2:
        raise PlanError(
            f"{len(groups)} images of one sample have nobody to be a donor; give those of two samples or more"
        )
    pick = random.Random(seed)
    buckets = defaultdict[Hashable, list[int]](list)
    for number, grid in enumerate(grids):
        buckets[grid].append(number)
    donors, alone = dict[int, int](), list[int]()
    for members in buckets.values():
        within = _deranged(members, groups, pick)
        donors |= within
        alone += [number for number in members if number not in within]
    for number in alone:
        donors[number] = pick.choice([other for other, group in enumerate(groups) if group != groups[number]])
    resized = [number for number in alone if grids[donors[number]] != grids[number]]
    return tuple(donors[number] for number in range(len(grids))), tuple(sorted(resized))


def _deranged(members: Sequence[int], groups: Sequence[Hashable], pick: random.Random) -> dict[int, int]:
    """A permutation that leaves nobody within their group, by trying (uniform over all such); where one group has more
    than half of the members there is none, and those that are too many get anyone of another group."""
    if len({groups[number] for number in members}) < 2:
        return {}
    shuffled = list(members)
    for _ in range(TRIES):
        pick.shuffle(shuffled)
        if all(groups[a] != groups[b] for a, b in zip(members, shuffled, strict=True)):
            return dict(zip(members, shuffled, strict=True))
    return {a: pick.choice([b for b in members if groups[b] != groups[a]]) for a in members}


def _random(images: list[Image], processor: Any, groups: Sequence[Hashable] | None, seed: int) -> BlindImages:
    whose = list(range(len(images))) if groups is None else list(groups)
    if len(whose) != len(images):
        raise PlanError(f"groups= has {len(whose)} items for {len(images)} images")
    grids = [image.size if processor is None else grid_of(processor, image) for image in images]
    donors, resized = derangement(grids, whose, seed)
    noise = [
        images[donor].resize(image.size) if number in resized else images[donor]
        for number, (image, donor) in enumerate(zip(images, donors, strict=True))
    ]
    return BlindImages("random", tuple(noise), seed, None, donors, resized)


def _plain(image: Image, colour: Colour) -> Image:
    from PIL import Image as kind

    return kind.new("RGB", image.size, colour)


def _black(image: Image, _pick: np.random.Generator) -> Image:
    return _plain(image, (0, 0, 0))


def _noise(image: Image, pick: np.random.Generator) -> Image:
    from PIL import Image as kind

    return kind.fromarray(pick.integers(0, 256, (image.height, image.width, 3), dtype=np.uint8))


def _blur(image: Image, _pick: np.random.Generator) -> Image:
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 4))


def _shuffled(image: Image, pick: np.random.Generator) -> Image:
    """Squares of `PATCH` pixels, a quarter of the shorter side where that is less."""
    from PIL import Image as kind

    side = max(1, min(PATCH, min(image.size) // 4))
    values = np.array(image)
    corners = [(y, x) for y in range(0, image.height - side + 1, side) for x in range(0, image.width - side + 1, side)]
    out = values.copy()
    for (y, x), source in zip(corners, pick.permutation(len(corners)), strict=True):
        top, left = corners[source]
        out[y : y + side, x : x + side] = values[top : top + side, left : left + side]
    return kind.fromarray(out)


def _colour(colour: Any) -> Colour:
    whole = isinstance(colour, (tuple, list)) and len(colour) == 3
    if not whole or any(isinstance(c, bool) or not isinstance(c, int) or not 0 <= c <= 255 for c in colour):
        raise PlanError(wrong("colour=", "red, green and blue, whole numbers from 0 to 255", colour))
    return colour[0], colour[1], colour[2]


CHANGES: dict[str, Callable[[Any, np.random.Generator], Any]] = {
    "black": _black, "noise": _noise, "blur": _blur, "shuffled": _shuffled,
}  # fmt: skip
MODES = ("black", "mean", "random", "noise", "blur", "shuffled")
