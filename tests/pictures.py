"""Inputs with pictures for the tiny vision models, packed by hand as each family's processor would.

A row is a list of pictures; a picture is a tensor `[channel height width]`. The text around them is `5 17 … 33 8`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IMAGE, START, END, SEPARATOR = 90, 92, 93, 60
QWEN = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5_vision")
FINE = {(16, 32): (1, 2, 4), (32, 16): (2, 1, 8), (32, 32): (2, 2, 8)}
"""LLaVA-OneVision: of a picture of this size, how many tiles down and across, and how many rows of tokens."""


def picture(family: str, seed: int = 0) -> Tensor:
    """A random picture of a size that the family's tower takes."""
    size = {"llava": (16, 16), "gemma3_vision": (16, 16), "llava_onevision": (16, 32)}.get(family, (16, 24))
    size = (16, 32) if family in ("internvl", "smolvlm") else size
    return torch.randn(3, *size, generator=torch.Generator().manual_seed(seed))


def count(family: str, image: Tensor) -> int:
    """How many visual tokens a picture has."""
    height, width = image.shape[1:]
    if family in QWEN:
        return (height // 8) * (width // 8)
    if family == "llava_onevision":
        return 16 + FINE[height, width][2] * (width // 4 + 1)
    return height * width // 16 if family == "llava" else 4 * (height // 16) * (width // 16)


def inputs(family: str, rows: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """What the model is called with, rows padded on the left."""
    texts = [_ids(family, row) for row in rows]
    width = max(map(len, texts))
    ids = torch.tensor([[7] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    out: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    visual = (ids == IMAGE).int()
    images = [image for row in rows for image in row]
    if family in QWEN:
        grids = [[1, image.shape[1] // 4, image.shape[2] // 4] for image in images]
        out |= {"mm_token_type_ids": visual, "image_grid_thw": torch.tensor(grids)}
        return out | {"pixel_values": torch.cat([_patches(image) for image in images])}
    if family == "gemma3_vision":
        out["token_type_ids"] = visual
    if family == "llava_onevision":
        out["image_sizes"] = torch.tensor([list(image.shape[1:]) for image in images])
        most = max(len(_fine(image)) for image in images)
        padded = [torch.cat([_fine(i), torch.zeros(most - len(_fine(i)), 3, 16, 16)]) for i in images]
        return out | {"pixel_values": torch.stack(padded)}
    tiles = torch.cat([_tiles(image) for image in images])
    if family == "smolvlm":
        per_row = [torch.cat([_tiles(image) for image in row]) for row in rows]
        most = max(map(len, per_row))
        tiles = torch.stack([torch.cat([x, torch.zeros(most - len(x), 3, 16, 16)]) for x in per_row])
    return out | {"pixel_values": tiles}


def _ids(family: str, row: Sequence[Tensor]) -> list[int]:
    ids = [5, 17]
    for image in row:
        n = count(family, image)
        if family == "smolvlm":  # text between tiles
            ids += [START, *([SEPARATOR, *[IMAGE] * 4] * (n // 4)), END]
        else:
            ids += [START, *[IMAGE] * n, END]
    return [*ids, 33, 8]


def _patches(image: Tensor) -> Tensor:
    """Patches of 4x4 pixels, four of a 2x2 block after each other."""
    _, height, width = image.shape
    x = image.reshape(3, height // 8, 2, 4, width // 8, 2, 4)
    return x.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 48)


def _tiles(image: Tensor) -> Tensor:
    """Tiles of 16x16 pixels, row by row."""
    _, height, width = image.shape
    return image.reshape(3, height // 16, 16, width // 16, 16).permute(1, 3, 0, 2, 4).reshape(-1, 3, 16, 16)


def _fine(image: Tensor) -> Tensor:
    """The whole at low resolution (here its top left corner, halved), then its tiles."""
    small = torch.nn.functional.interpolate(image[None], (16, 16), mode="nearest")
    return torch.cat([small, _tiles(image)])
