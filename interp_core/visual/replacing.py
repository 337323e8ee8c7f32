"""Visual rows of the residual stream replaced at the input of a layer.

    x[V] := X_l                          at `resid_pre[l]`, and
    D_j[V] := the source's D_j, j ≥ l    with `deepstack="follow"`: what DeepStack adds after block l and later

Everything after it is computed again. Where a source is a run with another image of the same grid, `follow` leaves
nothing of the clean image in the rows from layer l on; `keep` lets later additions bring it back, so that effects below
the last addition come out too small. At layer 0 with `follow` the result is the run with the other image; at layer L
(the input of the final norm) no other position's logits change; a run's own rows change nothing.

Cost: a forward pass; from layer l on in a sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import sites as S
from ..errors import PlanError, ReadError, SiteError, nearest, wrong
from ..positions import VISION, Counted, Mask, PerRow, PositionLike, format_position, position
from .attending import layer_number, listed
from .states import Rows, States, of

if TYPE_CHECKING:
    from ..run import Run
    from ..sites import Edit, Site

POLICIES = ("follow", "keep")
"""What becomes of DeepStack's later additions: the source's too, or as the model has them."""


def replaced(
    source: Run | States, layer: int | Sequence[int], deepstack: str = "follow", at: PositionLike = None
) -> list[Edit]:
    """Edits that put a source's rows in the place of the visual rows at a layer's input.

    Args:
        source: a run that has read `visual.reads(model)`, or `States` made of one (`zeros`, `own_mean`, …).
        layer: 0 to L, or several: at each the rows are replaced again (`visual.window` gives those around one).
        deepstack: "follow": additions after the first of these layers and later are the source's too; "keep": they are
            the model's.
        at: other positions than the source's own, which are "vision" unless it was made of others.

    Returns:
        Edits for a text whose visual tokens are as many as the source's; a text of another length is refused when the
        plan meets it.

    Raises:
        PlanError: no such policy, or a source that is neither.
        SiteError: a layer that the model does not have.
        ReadError: a layer that the source's run has not read.
    """
    if deepstack not in POLICIES:
        raise PlanError(f"deepstack={deepstack!r} is no policy. {nearest(deepstack, POLICIES)}")
    known = of(source, VISION if at is None else at)
    where = known.at if at is None else at
    layers = _layers(layer, known.n_layers)
    edits = [_set(known, _at_input(i, known.n_layers), where, i) for i in layers]
    if deepstack == "follow" and position(where) == VISION:
        later = [i for i in sorted(known.additions) if i >= layers[0]]
        edits += [S.deepstack[i].set(_value(known, known.additions, i)) for i in later]
    return edits


def _at_input(layer: int, n_layers: int) -> Site:
    """The input of a layer; of the final norm after the last one."""
    return S.resid_pre[layer] if layer < n_layers else S.resid_post[n_layers - 1]


def _layers(layer: Any, n_layers: int) -> list[int]:
    """Layers in order.

    Raises:
        SiteError: none, or one that is not there.
    """
    there = f"0 to {n_layers - 1}, and {n_layers} for the final norm's input"
    if not (wanted := listed(layer)):
        raise SiteError(wrong("layer", f"a number from 0 to {n_layers}, or several", layer))
    return sorted({layer_number(i, n_layers, there) for i in wanted})


def _set(known: States, site: Site, where: PositionLike, layer: int) -> Edit:
    """The edit of the rows at a layer's input.

    Rows of different lengths are strung together, and would also fit a text that shares them out in another way: so
    each row of it is held to its own number.
    """
    value, rows, at = _value(known, known.streams, layer), known.streams[layer], position(where)
    if not isinstance(rows, Tensor) and value.ndim == 2 and not isinstance(at, (PerRow, Mask)):
        at = PerRow(tuple(Counted(at, len(x)) for x in rows))
    return site.at(at).set(value)


def _value(known: States, layers: Any, layer: int) -> Tensor:
    """What an edit of all these rows takes: strung together where they differ in number."""
    if layer not in layers:
        there = ", ".join(map(str, sorted(layers))) or "none"
        raise ReadError(
            f"{known.of} holds no rows of layer {layer} at {format_position(position(known.at))}, but of layers {there}"
            "; run with read=visual.reads(model)"
        )
    rows: Rows = layers[layer]
    if isinstance(rows, Tensor):
        return rows
    lengths = {len(x) for x in rows}
    return torch.stack(rows) if len(lengths) == 1 and 0 not in lengths else torch.cat(rows)
