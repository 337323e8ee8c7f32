"""Files of ranked points, in all forms that there are.

    {"format": "router-points/1", "model": …, "weights": …, "n_layers": 48, "moe_layers": […], "n_experts": 128,
     "top_k": 8, "statistic": "usage_weight last A-B", "order": "descending",
     "points": [{"layer": 30, "expert": 24, "value": 0.31, "a": …, "b": …, "rank": 0}]}

`Points.write` writes it; `layer` is the decoder layer. Read too are the origin's forms: a bare list, or an object with
`points`; keys `router` or `expert`, `diff`, `score` or `value`. There a layer may be a number in the list of routers
(`layer_index="router"`), which differs from the decoder's wherever dense layers come before.

Source: this package; the older forms are Geuan666/XAI4Agent's (2026).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import interp_core as ic

from .._json_files import read_json
from .points import FORMAT, Point, Points, Shape, demand_shape, ranked

LayerIndex = Literal["decoder", "router"]


def read_points(path: str | Path, shape: Shape | None = None, *, layer_index: LayerIndex | None = None) -> Points:
    """Points of a file, in any of its forms, held against the model that they are for.

    Args:
        path: the file.
        shape: `Shape.of(model)` of that model; None: nothing is compared.
        layer_index: how an old file counts layers: "decoder", or "router" for the origin's, which counts routers; None
            where both are the same. New files always have decoder layers.

    Raises:
        LoadError: no file of points, or a damaged one, with the field.
        PlanError: points of another model, layer or number of experts; an old file whose layers may mean two things.
    """
    data = read_json(path, "a file of points")
    head = data if isinstance(data, dict) else {}
    rows = head.get("points") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        keys = ", ".join(map(repr, list(head)[:8]))
        raise ic.LoadError(
            f"{path} holds no points: it has {keys or type(data).__name__}; a list, or 'points', is wanted"
        )
    new = head.get("format")
    if new is not None and new != FORMAT:
        raise ic.LoadError(f"{path} is of format {new!r}; this version reads {FORMAT!r}, and lists without a format")
    points = Points(ranked(_point(path, i, row) for i, row in enumerate(rows)), str(head.get("statistic", "")))
    if new is not None:
        if layer_index == "router":
            raise ic.PlanError(f"{path} is a {FORMAT} file, whose layers are the decoder's; leave layer_index out")
        points = replace(points, shape=_shape(path, head))
    elif shape is not None:
        points = _as_decoder(path, points, shape, layer_index)
    elif layer_index == "router":
        raise ic.PlanError(f"{path}: layer_index='router' needs the model to know its layers by; give shape=")
    return points if shape is None else demand_shape(points, shape, str(path))


def _as_decoder(path: str | Path, points: Points, shape: Shape, layer_index: LayerIndex | None) -> Points:
    """An old file's points by decoder layer."""
    # no dense layer in front: router n is decoder layer n, and either count says the same
    same = shape.moe_layers == tuple(range(len(shape.moe_layers)))
    if layer_index is None and not same:
        raise ic.PlanError(
            f"{path} does not say how it counts layers, and {shape.model} has dense layers (its routers are in layers "
            f"{list(shape.moe_layers)[:6]}…): give layer_index='router' for files of the original scripts, "
            "else layer_index='decoder'"
        )
    if layer_index != "router" or same:
        return points
    for point in points.points:
        if not 0 <= point.layer < len(shape.moe_layers):
            raise ic.PlanError(f"{path}: router {point.layer}, {shape.model} has {len(shape.moe_layers)} routers")
    moved = (point._replace(layer=shape.moe_layers[point.layer]) for point in points.points)
    return replace(points, points=ranked(moved))


def _point(path: str | Path, number: int, row: Any) -> Point:
    where = f"{path}: point {number}"
    if not isinstance(row, Mapping):
        raise ic.LoadError(f"{where} is a {type(row).__name__}, not an object with layer, expert and value")
    layer, expert = _field(where, row, ("layer",)), _field(where, row, ("expert", "router"))
    value = _field(where, row, ("value", "diff", "score"))
    for name, index in (("layer", layer), ("expert", expert)):
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ic.LoadError(f"{where}: {name} is {index!r}, not a number from 0")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ic.LoadError(f"{where}: its value is {value!r}, not a finite number")
    return Point(layer, expert, float(value), row.get("a"), row.get("b"))


def _field(where: str, row: Mapping[str, Any], names: Sequence[str]) -> Any:
    # files with both of two synonyms exist; they are read if both say the same
    present = [row[name] for name in names if name in row]
    if not present or any(value != present[0] for value in present[1:]):
        has = "has several different" if present else "has none"
        raise ic.LoadError(f"{where} {has} of {', '.join(names)}; it has {', '.join(map(str, row)) or 'nothing'}")
    return present[0]


def _shape(path: str | Path, head: Mapping[str, Any]) -> Shape:
    try:
        return Shape(
            str(head["model"]), int(head["n_layers"]), tuple(map(int, head["moe_layers"])), int(head["n_experts"]),
            int(head["top_k"]), str(head.get("weights", "")),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ic.LoadError(
            f"{path}: a {FORMAT} file has model, n_layers, moe_layers, n_experts and top_k: {error}"
        ) from error
