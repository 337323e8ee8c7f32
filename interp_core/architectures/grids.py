"""Which part of a picture each visual token stands for, family by family.

A grid function gets the model's config, the inputs of the batch and the lengths of the runs of visual tokens in it. It
returns the cells of every image in the batch's order, or None where it does not know them. Boxes are in pixels of what
the tower was given: the processed picture, or one of its tiles, which processors cut or resize from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Box = tuple[float, float, float, float]


class Cell(NamedTuple):
    """Place of one visual token in its image.

    Attributes:
        tile: which of the pictures that the tower was given for this image.
        row: row in the tile's grid.
        col: column, None for a token that ends a row and has no pixels.
        box: left, top, right, bottom in pixels of the tile, None without pixels.
    """

    tile: int
    row: int
    col: int | None
    box: Box | None


Grid = Callable[[Any, Mapping[str, Any], Sequence[int]], list[list[Cell]] | None]


def raster(
    rows: int, cols: int, size: tuple[float, float], tile: int = 0, start: tuple[float, float] = (0, 0)
) -> list[Cell]:
    """Cells of `size` (height, width) row by row, from `start` (left, top)."""
    height, width = size
    left, top = start
    return [
        Cell(tile, r, c, (left + c * width, top + r * height, left + (c + 1) * width, top + (r + 1) * height))
        for r in range(rows)
        for c in range(cols)
    ]


def by_grid_thw(config: Any, inputs: Mapping[str, Any], _runs: Sequence[int]) -> list[list[Cell]]:
    """Qwen-VL: merged patches of pictures of any size; a tile is a frame."""
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    images = []
    for frames, rows, cols in inputs["image_grid_thw"].tolist():
        shape = rows // vision.spatial_merge_size, cols // vision.spatial_merge_size
        images.append([cell for frame in range(frames) for cell in raster(shape[0], shape[1], (side, side), frame)])
    return images


def edge_of(value: Any) -> int:
    """An edge of something square, which configs give as a number or a pair."""
    return int(value if isinstance(value, int) else value[0])


def _squares(config: Any, per_tile: int, runs: Sequence[int]) -> list[list[Cell]]:
    """One image per run, of square tiles with `per_tile` tokens each."""
    n = math.isqrt(per_tile)
    size = edge_of(config.vision_config.image_size) / n
    return [[cell for tile in range(run // per_tile) for cell in raster(n, n, (size, size), tile)] for run in runs]


def by_patch(config: Any, inputs: Mapping[str, Any], runs: Sequence[int]) -> list[list[Cell]] | None:
    """LLaVA: one square picture per image, one token per patch, after one for the whole if the tower's is kept. Towers
    for pictures of any size (Pixtral) are not known."""
    images = len(inputs["pixel_values"])
    n = edge_of(config.vision_config.image_size) // edge_of(config.vision_config.patch_size)
    if "image_sizes" in inputs:
        return None
    whole = [Cell(0, 0, None, None)] if sum(runs) == images * (n * n + 1) else []
    return [[*whole, *image] for image in _squares(config, n * n, [n * n] * images)]


def by_shuffled_tile(config: Any, _inputs: Mapping[str, Any], runs: Sequence[int]) -> list[list[Cell]]:
    """InternVL: the tiles of an image follow each other, a thumbnail of the whole last."""
    return _squares(config, config.image_seq_length, runs)


def by_pooled_crop(config: Any, _inputs: Mapping[str, Any], runs: Sequence[int]) -> list[list[Cell]]:
    """Gemma 3: one square picture per run; crops of pan-and-scan are images of their own."""
    return _squares(config, config.mm_tokens_per_image, runs)


def by_separated_tile(config: Any, _inputs: Mapping[str, Any], runs: Sequence[int]) -> list[list[Cell]]:
    """SmolVLM: text between tiles says where they lie, so every tile is an image of its own."""
    n = edge_of(config.vision_config.image_size) // edge_of(config.vision_config.patch_size) // config.scale_factor
    return _squares(config, n * n, runs)


def by_any_resolution(config: Any, inputs: Mapping[str, Any], _runs: Sequence[int]) -> list[list[Cell]]:
    """LLaVA-OneVision: tile 0 is the whole picture, tile 1 the same at high resolution without its padding, each of its
    rows ended by a newline token. Rows with several images have tile 0 only, with one newline token."""
    patch, side = edge_of(config.vision_config.patch_size), edge_of(config.vision_config.image_size)
    n = side // patch
    images = []
    for size, is_alone in sizes_alone(inputs):
        base = raster(n, n, (patch, patch))
        fine = _high_resolution(config, size, patch) if is_alone else [Cell(0, n, None, None)]
        images.append([*base, *fine])
    return images


def sizes_alone(inputs: Mapping[str, Any]) -> list[tuple[list[int], bool]]:
    """Height and width of each of LLaVA-OneVision's images, and whether it is alone in its row: it is cut into tiles
    then."""
    sizes, counts = inputs["image_sizes"].tolist(), inputs.get("batch_num_images")
    alone = [True] * len(sizes) if counts is None else [int(c) == 1 for c in counts for _ in range(int(c))]
    return list(zip(sizes, alone, strict=True))


def _high_resolution(config: Any, size: Sequence[int], patch: int) -> list[Cell]:
    """Tile 1 of an image of `size` (height, width): its canvas, less the padding that keeps its proportions."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = size
    rows, cols = (edge // patch for edge in select_best_resolution(tuple(size), config.image_grid_pinpoints))
    top = left = 0
    if width / height > cols / rows:
        top = (rows - int(round(height * cols / width, 7))) // 2
    else:
        left = (cols - int(round(width * rows / height, 7))) // 2
    rows, cols = rows - 2 * top, cols - 2 * left
    n = edge_of(config.vision_config.image_size) // patch
    ratio = math.sqrt(rows * cols / (int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * n**2))
    kept = (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)  # then it is interpolated
    step = rows * patch / max(1, kept[0]), cols * patch / max(1, kept[1])  # of a thin picture newlines alone are left
    cells = raster(kept[0], kept[1], step, 1, (left * patch, top * patch))
    out = []
    for row in range(kept[0]):
        out += [*cells[row * kept[1] : (row + 1) * kept[1]], Cell(1, row, None, None)]
    return out
