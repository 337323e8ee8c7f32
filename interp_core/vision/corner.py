"""The smallest text with images that a model treats as it treats a larger one: corners of the images, a little text.

Where images have as many visual tokens as their sizes ask for (Qwen-VL), 2 × 2 of them show all that a picture brings
with it: positions by row and by column, features that DeepStack adds, text before and behind.
"""

from __future__ import annotations

from typing import Any

import torch

from ..architectures.family import Family
from ..positions import VISION
from ..text import Tokens
from .places import with_visual_names

IMAGES, SIDE, BESIDE = 2, 2, 3
"""How many images stay, how many visual tokens of each across and down, and how many tokens of text on either side."""
SIZED = {"pixel_values", "image_grid_thw"}


def shorter(text: Tokens, config: Any, family: Family) -> Tokens:
    """The text of one row without its first token, or its last one; itself where both are visual."""
    n, visual = text.ids.shape[1], {i for span in text.spans.get(VISION, ((),))[0] for i in span}
    left = next((i for i in (0, n - 1) if i not in visual), None)
    return text if left is None else _columns(text, [i for i in range(n) if i != left], {}, config, family)


def corner(text: Tokens, config: Any, family: Family) -> Tokens:
    """A text of one row with the first patches of its first images as pictures of 2 × 2 visual tokens, and a few tokens
    of text around them; the text itself, where the family's images have a size of their own or are as small."""
    count = SIDE**2
    if family.pixels != "patch" or text.padded or {*text.shares} != SIZED:
        return text
    grids = text.inputs["image_grid_thw"][:IMAGES]
    images = [[i for span in text.spans[f"image_{n}"][0] for i in span] for n in range(len(grids))]
    if any(len(places) <= count for places in images):
        return text
    visual = {i for span in text.spans[VISION][0] for i in span}
    near = {i for at in images for end in (at[0], at[-1]) for i in range(end - BESIDE, end + BESIDE + 1)}
    within = near & {*range(text.ids.shape[1])} - visual
    columns = sorted(within | {i for places in images for i in places[:count]})
    side = SIDE * config.vision_config.spatial_merge_size
    starts = [0, *grids.prod(-1).cumsum(0).tolist()]
    pixels = torch.cat([text.inputs["pixel_values"][start : start + side**2] for start in starts[: len(grids)]])
    sized = {"pixel_values": pixels, "image_grid_thw": grids.new_tensor([[1, side, side]] * len(grids))}
    return _columns(text, columns, sized, config, family)


def _columns(text: Tokens, columns: list[int], sized: dict[str, Any], config: Any, family: Family) -> Tokens:
    """Some columns of a text of one row, with other images."""
    shared = text.shares.keys()
    inputs = {name: value if name in shared else value[:, columns] for name, value in text.inputs.items()}
    part = Tokens(text.ids[:, columns], text.mask[:, columns], inputs={**inputs, **sized})
    return with_visual_names(part, config, family)
