"""Who may attend to the image: knockouts between groups of tokens, and truncation.

    knockout     pattern[l](q, k) = 0 for q ∈ Q, k ∈ K, before the softmax, so that the rest takes over
    truncation   from layer l on, Q = text after the first visual token and all that is generated, K = V

Truncation equals deletion: the visual rows are cut out of the stream before layer l, and all other tokens keep their
positions. What visual rows still compute is read by nobody. A layer is handed a mask, in the form that it takes, and
runs its own kernel; a step of generation masks its new token too. Layers that mix tokens without attention (linear
attention) cannot be masked, and are refused by name.

Cost: a forward pass, and the scores of the masked queries once more for the receipts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from .. import sites as S
from ..errors import CapabilityError, PlanError, SiteError, wrong
from ..positions import AFTER_VISION, VISION, PositionLike
from .states import demand_images

if TYPE_CHECKING:
    from ..session import Session
    from ..sites import Edit


def window(model: Session, layer: int, width: int = 1) -> tuple[int, ...]:
    """The layers `l - ⌊width/2⌋` to `l + ⌊width/2⌋` that the model has: fewer near its ends.

    Raises:
        SiteError: no such layer.
        PlanError: a width that is no odd number from 1 on.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1 or width % 2 == 0:
        raise PlanError(wrong("width", "an odd number of layers, 1 on", width))
    layer = layer_number(layer, model.n_layers - 1)
    half = width // 2
    return tuple(range(max(0, layer - half), min(model.n_layers, layer + half + 1)))


def layers_of(model: Session, layers: int | Iterable[int]) -> list[int]:
    """Layers whose attention can be masked, in order.

    Raises:
        SiteError: no such layer.
        CapabilityError: a layer that mixes tokens without attention, or whose attention is not to be had.
    """
    wanted = sorted({layer_number(layer, model.n_layers - 1) for layer in listed(layers)})
    entries = model.atlas.entries
    attending = [i for i in model.atlas.layers("pattern") if entries["pattern", i].write is not None]
    if missing := [i for i in wanted if i not in attending]:
        raise CapabilityError(
            f"layer {missing[0]} of this {model.atlas.family.name} has no attention that can be masked, so tokens "
            f"cannot be hidden there; layers {', '.join(map(str, attending))} have"
        )
    return wanted


def listed(layers: Any) -> list[Any]:
    """Layers that are asked for, one or several."""
    several = isinstance(layers, Iterable) and not isinstance(layers, str) and getattr(layers, "ndim", 1) != 0
    return list(layers) if several else [layers]


def layer_number(layer: Any, last: int, there: str = "") -> int:
    """A layer as a plain number: integers of numpy and torch are whole numbers too, as sites take them.

    Raises:
        SiteError: no number, or a layer that there is not.
    """
    try:
        number = index(layer)
    except TypeError:
        number = None
    if number is None or isinstance(layer, bool):
        raise SiteError(wrong("layer", f"a number from 0 to {last}", layer))
    if not 0 <= number <= last:
        raise SiteError(f"no layer {number}: there are {there or f'0 to {last}'}")
    return number


def blocked(
    model: Session,
    layers: int | Iterable[int],
    query: PositionLike = AFTER_VISION,
    key: PositionLike = VISION,
    heads: int | Sequence[int] | None = None,
) -> list[Edit]:
    """Edits that hide keys from queries in some layers (and heads): by default the image from the text after it.

    Args:
        query: positions or a name, as `Site.at` takes them; "last" is the predicting token and all that is generated.
        key: likewise: "image_0", the text of the question, the visual tokens of an object (`model.visual_grid`).

    Raises:
        SiteError, CapabilityError: layers that are not there, or do not attend; models without images.
    """
    demand_images(model)
    at = layers_of(model, layers)
    if not at:
        return []
    site = S.pattern[at] if heads is None else S.pattern[at, heads if isinstance(heads, int) else list(heads)]
    return [site.knockout(query=query, key=key)]


def truncated(model: Session, layer: int, stop: int | None = None) -> list[Edit]:
    """Edits that take the image away from layer `layer` on (up to before layer `stop`, for a band).

    Args:
        layer: 0 to L; at L nothing is taken away, and there are no edits.

    Raises:
        SiteError, CapabilityError: as `blocked`.
        PlanError: a band that ends before it begins.
    """
    last = model.n_layers
    there = f"0 to {last}, where the last takes nothing away"
    start, stop = (layer_number(i, last, there) for i in (layer, last if stop is None else stop))
    if stop < start:
        raise PlanError(
            f"truncated: a band from layer {start} to before layer {stop} is none; give stop= from {start} on"
        )
    return blocked(model, range(start, stop))
