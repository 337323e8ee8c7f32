"""Images in which blocks are blurred: what a block shows is gone, its brightness and place stay.

A block is one of 4 × 4; the blur is Gaussian, of a deviation of a twelfth of the image's larger side, worked out on the
pixels that the processor made, which are the model's input.

Source: Pan et al. (2026), arXiv:2602.01914, for blur in the place of deletion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .units import CELLS

RADIUS = 12
"""The blur's deviation is the larger side of the image over this."""


def blurred(owner: str, model: ic.Model, tokens: ic.Tokens, cells: Sequence[tuple[int, int, int, int]]) -> ic.Tokens:
    """The same tokens with blocks of their images blurred.

    Args:
        cells: image, tile, row and column of each.

    Raises:
        CapabilityError: images that do not come as pictures `[picture channel height width]`, one per tile.
    """
    pixels = tokens.inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        shape = list(pixels.shape) if isinstance(pixels, Tensor) else None
        raise ic.CapabilityError(
            f"{owner}: blur needs pixel_values as pictures, [picture channel height width], these are {shape} (cut "
            "into patches by their processor); use convention 'mask'"
        )
    flat = pixels.reshape(-1, *pixels.shape[-3:]).clone()
    pictures = sorted({(token.image, token.tile) for token in model.visual_grid(tokens)[0]})
    # of one text of a batch there may be more pictures than its own, blank ones at the end
    if len(flat) != len(pictures) and (len(pixels) > 1 or any(tile for _, tile in pictures)):
        raise ic.CapabilityError(
            f"{owner}: blur needs a picture per tile; there are {len(pictures)} tiles, made of {len(flat)} pictures; "
            "use convention 'mask'"
        )
    height, width = flat.shape[-2:]
    for image, tile, row, col in cells:
        number = pictures.index((image, tile))
        down = slice(height * row // CELLS, height * (row + 1) // CELLS)
        across = slice(width * col // CELLS, width * (col + 1) // CELLS)
        flat[number, :, down, across] = gaussian(flat[number], max(height, width) / RADIUS)[:, down, across]
    return replace(tokens, inputs={**tokens.inputs, "pixel_values": flat.reshape(pixels.shape)})


def gaussian(picture: Float[Tensor, "channel height width"], deviation: float) -> Float[Tensor, "channel height width"]:
    """A picture under a Gaussian blur, its edges continued."""
    reach = max(1, round(3 * deviation))
    steps = torch.arange(-reach, reach + 1, dtype=picture.dtype)
    kernel = torch.exp(-0.5 * (steps / deviation) ** 2)
    kernel = (kernel / kernel.sum()).to(picture)
    padded = torch.nn.functional.pad(picture[None], (reach,) * 4, mode="replicate")[0]
    across = torch.nn.functional.conv1d(padded.flatten(0, 1)[:, None], kernel[None, None])[:, 0]
    across = across.reshape(len(picture), padded.shape[1], -1).mT
    down = torch.nn.functional.conv1d(across.flatten(0, 1)[:, None], kernel[None, None])[:, 0]
    return down.reshape(len(picture), picture.shape[2], -1).mT
