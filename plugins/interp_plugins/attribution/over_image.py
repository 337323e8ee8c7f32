"""An attribution over the pictures that the visual tokens stand for: each token's box, coloured by its number.

A picture of several tiles (LLaVA-OneVision, InternVL, SmolVLM) has an overlay per tile, as the tower was given them.
Tokens without pixels (those that end a row of LLaVA-OneVision) are not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import report

Place = tuple[int, int, int, float, float, float, float]
"""A visual token: index among the row's tokens, image, tile, and left, top, right, bottom in pixels of the tile."""


def places_of(model: ic.Model, tokens: ic.Tokens) -> tuple[tuple[Place, ...], ...]:
    """Where each row's visual tokens lie; nothing where there are none, or the family's grid is not known."""
    if not any(tokens.spans.get("vision", ())):
        return tuple(() for _ in range(len(tokens)))
    try:
        rows = model.visual_grid(tokens)
    except (ic.CapabilityError, ic.TextError):
        return tuple(() for _ in range(len(tokens)))
    return tuple(tuple((t.position, t.image, t.tile, *t.box) for t in row if t.box is not None) for row in rows)


def grid_map(values: Float[Tensor, " pos"], places: Sequence[Place], image: int, tile: int) -> Float[Tensor, "row col"]:
    """Numbers of a row's tokens as a map of a tile, in its grid of boxes; not a number where there is no token.

    Raises:
        PositionError: no such image or tile.
    """
    cells = [place for place in places if place[1:3] == (image, tile)]
    if not cells:
        there = sorted({place[1:3] for place in places})
        raise ic.PositionError(f"there is no tile {tile} of image {image}; the row has {there or 'no images'}")
    # the grid is told by the boxes' edges: families lay their tokens out in other orders
    columns, rows = (sorted({place[edge] for place in cells}) for edge in (3, 4))
    out = values.new_full((len(rows), len(columns)), float("nan"))
    for place in cells:
        out[rows.index(place[4]), columns.index(place[3])] = values[place[0]]
    return out


def overlays(
    layers: Mapping[str, Sequence[float]],
    places: Sequence[Place],
    pictures: Sequence[Any] | None = None,
    *,
    title: str = "",
    scale: str = "score",
) -> dict[str, report.Overlay]:
    """An overlay per picture, or per tile of it, by name ("image 0", or "image 0, tile 1").

    Args:
        layers: numbers by name, each one per token of the row.
        pictures: one per image (of several tiles: one per tile of it), as `report.Overlay` takes them.

    Raises:
        PlanError: another number of pictures.
    """
    tiles: dict[int, set[int]] = {}
    for _, image, tile, *_ in places:
        tiles.setdefault(image, set()).add(tile)
    if pictures is not None and len(pictures) != len(tiles):
        raise ic.PlanError(f"{len(pictures)} pictures for {len(tiles)} images of the row; give one per image")
    negative = any(values[place[0]] < 0 for values in layers.values() for place in places)
    limits = {name: _limits([values[place[0]] for place in places], negative) for name, values in layers.items()}
    drawn = {}
    for image, numbers in sorted(tiles.items()):
        for tile in sorted(numbers):
            name = f"image {image}" if numbers == {0} else f"image {image}, tile {tile}"
            own = [place for place in places if place[1:3] == (image, tile)]
            picture = None if pictures is None else _of_tile(pictures[image], tile, len(numbers), name)
            drawn[name] = report.Overlay(
                [place[3:] for place in own],
                {layer: [values[place[0]] for place in own] for layer, values in layers.items()},
                picture=picture, diverging=negative, colorbar=scale, title=": ".join(filter(None, (title, name))),
                limits=limits,
            )  # fmt: skip
    return drawn


def _of_tile(pictures: Any, tile: int, count: int, name: str) -> Any:
    """The picture of a tile."""
    if count == 1:
        return pictures
    if not hasattr(pictures, "__len__") or len(pictures) < count or hasattr(pictures, "convert"):
        raise ic.PlanError(
            f"{name} is one of {count} that the tower was given for this image; give a list of {count} pictures for it"
        )
    return pictures[tile]


def _limits(values: Sequence[float], negative: bool) -> tuple[float, float]:
    """Ends of a scale for all tiles, so that their colours can be compared."""
    low, high = min(values), max(values)
    top = max(abs(low), abs(high)) or 1.0
    return (-top, top) if negative else (low, high if high > low else low + 1.0)
