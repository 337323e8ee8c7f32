"""Where the visual tokens are, and what part of which image each one stands for.

Processors put one placeholder id per visual token into the text, so the ids themselves say where: the positions named
`"vision"` are those of the config's image and video token ids, `"text"` all others, `"after_vision"` the text after a
row's first visual token, and `"image_0"`, `"image_1"`, … those of a row's single images. Tokens that are generated
belong to `"text"` and `"after_vision"`. Nothing here needs an image library: places and boxes follow from the ids and
the sizes that the processor returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..architectures.family import Family
from ..architectures.grids import Box, Cell
from ..architectures.towers import patches_of
from ..errors import CapabilityError, TextError
from ..inputs import PER_TOKEN, Shares
from ..positions import AFTER_VISION, TEXT, VISION, Images, Span
from ..text import CACHE, Tokens

IMAGES = ("pixel_values", "image_grid_thw")
"""Inputs that say that there are images."""
Picture = tuple[list[int], list[Cell]]
"""An image's visual positions in its row, and their cells."""


@dataclass(frozen=True)
class VisualToken:
    """One visual token: where it is in the text, and which pixels it stands for.

    Attributes:
        position: index among the row's real tokens.
        image: which of the row's images.
        tile: which of the pictures that the vision tower was given for that image (0 if there is one).
        row: row in the tile's grid.
        col: column, None for a token that only ends a row (LLaVA-OneVision).
        box: left, top, right, bottom in pixels of the tile as the tower was given it; None without pixels.
    """

    position: int
    image: int
    tile: int
    row: int
    col: int | None
    box: Box | None


def placeholder_ids(config: Any) -> set[int]:
    """Token ids that stand for visual tokens; empty for text models."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return {value for name in names if isinstance(value := getattr(config, name, None), int)}


def with_visual_names(tokens: Tokens, config: Any, family: Family) -> Tokens:
    """The tokens with the positions `vision`, `text` and those of single images, if there are visual ones.

    Raises:
        TextError: images without an input that the family needs, or placeholders that do not fit the images.
    """
    visual = _visual(tokens, placeholder_ids(config))
    _demand_places(tokens, visual, config, family)
    if not any(visual):
        return tokens
    spans = dict(tokens.spans)
    rows = list(zip(visual, tokens.lengths, strict=True))
    spans[VISION] = tuple(tuple(runs(places)) for places in visual)
    spans[TEXT] = tuple(tuple(runs(sorted({*range(n)} - {*places}))) for places, n in rows)
    after = (sorted({*range(places[0] if places else n, n)} - {*places}) for places, n in rows)
    spans[AFTER_VISION] = tuple(tuple(runs(places)) for places in after)
    _demand(tokens.inputs, family)
    shares: Shares = {}
    patches: Images | None = None
    if (images := _images(tokens, config, family)) is not None:
        for i in range(max(map(len, images))):
            spans[f"image_{i}"] = tuple(tuple(runs(row[i][0])) if i < len(row) else () for row in images)
        _demand_seen(tokens.inputs, images, family)
        shares = _shares(tokens.inputs, images, family)
        patches = _patches(tokens.inputs, images, config, family)
    _demand_marked(tokens, visual, family)
    return replace(tokens, spans=spans, shares=shares, patches=patches)


def _patches(
    inputs: Mapping[str, Any], images: Sequence[Sequence[Picture]], config: Any, family: Family
) -> Images | None:
    """Per row and image, where its patches pass in the vision tower; None where it is not known."""
    if family.tower is None or "pixel_values" not in inputs:
        return None
    known = patches_of(config, inputs, [cells for row in images for _, cells in row], family.pixels)
    return tuple(tuple(next(known) for _ in row) for row in images)


def _shares(inputs: Mapping[str, Any], images: Sequence[Sequence[Picture]], family: Family) -> Shares:
    """Which part of each input is whose; see `inputs`."""
    counts = tuple(map(len, images))
    pixels = counts
    if family.pixels == "tile":
        pixels = tuple(sum(len({cell.tile for cell in cells}) for _, cells in row) for row in images)
    if family.pixels == "patch":
        grids = iter(inputs["image_grid_thw"].prod(-1).tolist())
        pixels = tuple(sum(next(grids) for _ in range(count)) for count in counts)
    by_name = {"image_grid_thw": counts, "image_sizes": counts, "batch_num_images": None}
    if family.pixels:
        by_name |= dict.fromkeys(("pixel_values", "pixel_attention_mask"), None if family.pixels == "row" else pixels)
    shares = {name: share for name, share in by_name.items() if name in inputs}
    for name, share in shares.items():
        wanted, there = len(images) if share is None else sum(share), len(inputs[name])
        if wanted != there:
            raise TextError(
                f"{name} has {there} entries, and the text has visual tokens for {wanted}: they do not fit. "
                "Pass what this model's processor returned, whole."
            )
    return shares


def _demand_seen(inputs: Mapping[str, Any], images: Sequence[Sequence[Picture]], family: Family) -> None:
    """Refuse tiles of zeros where the model takes them for padding.

    Raises:
        TextError: there are any.
    """
    pixels = inputs.get("pixel_values")
    if family.pixels != "row" or not isinstance(pixels, Tensor) or pixels.ndim < 3:
        return
    shown = pixels.flatten(2).ne(0).any(-1).sum(-1).tolist()
    kept = sum(shown) == 0 and sum(map(len, images)) == 1  # a single one is shown all the same
    for row, (tiles, seen) in enumerate(zip(images, shown, strict=True)):
        if seen < len(tiles) and not kept:
            raise TextError(
                f"row {row}: {len(tiles) - seen} of {len(tiles)} tiles hold nothing but zeros after normalising, which "
                f"{family.name} takes for padding and drops. Make the picture one that is not exactly the processor's "
                "mean colour (black is not, with the usual mean of 0.5)."
            )


def visual_grid(tokens: Tokens, config: Any, family: Family) -> list[list[VisualToken]]:
    """Per row, its visual tokens in order; see `VisualToken`.

    Raises:
        CapabilityError: a family whose grids are not known, or videos.
        TextError: no images, or placeholders that do not fit them.
    """
    if _has_video(tokens, config):
        raise CapabilityError("the input has videos, whose grids are not known")
    if not any(name in tokens.inputs for name in IMAGES):
        raise TextError("the input has no images")
    rows = _images(tokens, config, family)
    if rows is None:
        raise CapabilityError(f"it is not known how this {family.name} lays visual tokens over an image")
    return [
        [
            VisualToken(position, number, *cell)
            for number, (places, cells) in enumerate(row)
            for position, cell in zip(places, cells, strict=True)
        ]
        for row in rows
    ]


def _demand_places(tokens: Tokens, visual: Sequence[Sequence[int]], config: Any, family: Family) -> None:
    """Hold what images bring against the places for them: transformers takes places without pixels for text, and lets
    videos fall that the model does not know.

    Raises:
        TextError: one without the other, or such videos.
    """
    inputs = tokens.inputs
    pixels = [name for name in inputs if "pixel_values" in name]
    if (video := next((name for name in inputs if "video" in name), None)) and not _video_ids(config):
        raise TextError(f"the inputs have {video}, and {family.name} takes no videos; pass their frames as images")
    if pixels and not any(visual):
        raise TextError(
            f"the inputs have {pixels[0]}, and no text has a place for an image (a visual token); pass what the "
            "processor returned for text and images together, whole"
        )
    brought = any(word in name for name in inputs for word in ("pixel", "embeds", "encoder", CACHE))
    if any(visual) and not brought:
        row, places = next((i, places) for i, places in enumerate(visual) if places)
        raise TextError(
            f"row {row}: the text has {len(places)} visual tokens, and no pixels come with it: transformers would take "
            "them for text. Pass what the processor returned, whole"
        )


def _demand(inputs: Mapping[str, Any], family: Family) -> None:
    if any("pixel" in name for name in inputs) and (missing := [n for n in family.needs if n not in inputs]):
        raise TextError(
            f"{family.name} with images needs {missing[0]}: without it transformers treats visual tokens like "
            "text, and does not say so. Pass what the processor returned, whole."
        )


def _demand_marked(tokens: Tokens, visual: Sequence[Sequence[int]], family: Family) -> None:
    """Hold inputs that say which tokens are visual against the places.

    Raises:
        TextError: they say something else.
    """
    for name in set(family.needs) & set(PER_TOKEN) & set(tokens.inputs):
        kinds = tokens.inputs[name]
        for row, (kind, keep, places) in enumerate(zip(kinds, tokens.mask, visual, strict=True)):
            if (marked := torch.nonzero(kind[keep.to(kind.device)]).flatten().tolist()) != places:
                others = ", others" if len(marked) == len(places) else ""
                raise TextError(
                    f"row {row}: {name} marks {len(marked)} tokens as visual, and the text has {len(places)} visual "
                    f"tokens{others}. Pass what the processor returned, whole."
                )


def _has_video(tokens: Tokens, config: Any) -> bool:
    return any(i in tokens.ids for i in _video_ids(config))


def _video_ids(config: Any) -> set[int]:
    names = ("video_token_id", "video_token_index")
    return {value for name in names if isinstance(value := getattr(config, name, None), int)}


def _visual(tokens: Tokens, placeholders: set[int]) -> list[list[int]]:
    """Per row, the indices of visual tokens among the real ones."""
    rows = zip(tokens.ids, tokens.mask, strict=True)
    return [[i for i, token in enumerate(row[keep].tolist()) if token in placeholders] for row, keep in rows]


def _images(tokens: Tokens, config: Any, family: Family) -> list[list[Picture]] | None:
    """Per row and image, its visual positions and their cells; None where the grids are not known."""
    if family.grid is None or not any(name in tokens.inputs for name in IMAGES) or _has_video(tokens, config):
        return None
    visual = _visual(tokens, placeholder_ids(config))
    cells = family.grid(config, tokens.inputs, [len(run) for places in visual for run in runs(places)])
    if cells is None:
        return None
    left, pictures = list(cells), []
    for places in visual:
        row, start = [], 0
        while start < len(places) and left and start + len(left[0]) <= len(places):
            image = left.pop(0)
            row.append((places[start : start + len(image)], image))
            start += len(image)
        if start < len(places):
            break
        pictures.append(row)
    if left or len(pictures) < len(visual):
        total, there = sum(map(len, cells)), sum(map(len, visual))
        raise TextError(
            f"the images stand for {total} visual tokens, the text has {there} placeholders, or they cross rows. Pass "
            "what the processor returned, whole."
        )
    return pictures


def runs(places: Iterable[int]) -> list[Span]:
    """Increasing integers as spans."""
    runs: list[Span] = []
    for i in places:
        if runs and runs[-1].stop == i:
            runs[-1] = Span(runs[-1].start, i + 1)
        else:
            runs.append(Span(i, i + 1))
    return runs
