"""Cells of a layer · expert map that matter: thresholds, ranked points, and the files that hold them.

    threshold   t = max(minimum, quantile_q of |D| over all layer · expert cells), numpy's linear interpolation
    map         sign(D) where |D| >= t, else 0
    points      cells in descending order of value; ties by layer, then expert

A file `router-points/1`:

    {"format": "router-points/1", "model": …, "weights": …, "n_layers": 48, "moe_layers": […], "n_experts": 128,
     "top_k": 8, "statistic": "usage_weight last A-B", "order": "descending",
     "points": [{"layer": 30, "expert": 24, "value": 0.31, "a": …, "b": …, "rank": 0}]}

`layer` is the decoder layer. Read too are the origin's forms: a bare list, or an object with `points`; keys `router` or
`expert`, `diff`, `score` or `value`. There a layer may be a number in the list of routers (`layer_index="router"`),
which differs from the decoder's wherever dense layers come before.

Source: this package; the older forms are Geuan666/XAI4Agent's (2026).
Must equal: golden thresholds, maps and points exactly; written and read back, the same points.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

import interp_core as ic
from interp_core import sites as S

from .._json_files import read_json

FORMAT = "router-points/1"
LayerIndex = Literal["decoder", "router"]


class Thresholded(NamedTuple):
    """A map of what stands out.

    Attributes:
        threshold: the smallest size that does.
        map: `[layer expert]` of -1, 0 and 1.
    """

    threshold: float
    map: Int[np.ndarray, "layer expert"]


def thresholded(difference: Any, percentile: float = 99.0, minimum: float = 0.005) -> Thresholded:
    """The cells of a difference map that stand out. The quantile is over all cells, layers together.

    Raises:
        PlanError: numbers that are none, a percentile that is none.
    """
    values = _matrix("thresholded", difference)
    if not 0 <= percentile <= 100 or not math.isfinite(minimum):
        raise ic.PlanError(f"thresholded: percentile {percentile} and minimum {minimum}; percentiles are 0 to 100")
    t = max(float(minimum), float(np.percentile(np.abs(values), percentile)))
    return Thresholded(t, (np.sign(values) * (np.abs(values) >= t)).astype(np.int8))


def _matrix(owner: str, values: Any) -> Float[np.ndarray, "layer expert"]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise ic.PlanError(f"{owner} takes finite numbers [layer expert], not {list(matrix.shape)} with "
                           f"{int((~np.isfinite(matrix)).sum())} that are not finite")  # fmt: skip
    return matrix


@dataclass(frozen=True)
class Shape:
    """What of a model a layer · expert map depends on.

    Attributes:
        model: its name.
        n_layers: all decoder layers.
        moe_layers: decoder layers that have a router.
        n_experts: of each of them.
        top_k: experts per token.
        weights: digest of its weights; empty if not known.
    """

    model: str
    n_layers: int
    moe_layers: tuple[int, ...]
    n_experts: int
    top_k: int
    weights: str = ""

    @staticmethod
    def of(model: ic.Model) -> Shape:
        """The shape of a model.

        Raises:
            CapabilityError: a dense model, or one whose layers have different numbers of experts.
        """
        layers = demand_routers("router", model)
        weights = weights_digest(model)
        sizes = model.sizes(S.router_indices)
        n_experts = model.sizes(S.router_logits)["expert"]
        return Shape(Path(model.source).name, model.n_layers, tuple(layers), n_experts, sizes["k"], weights)

    def row(self, layer: int) -> int:
        """The row of a decoder layer.

        Raises:
            SiteError: a layer without experts.
        """
        if layer not in self.moe_layers:
            raise ic.SiteError(
                f"layer {layer} of {self.model} has no experts; those that have: {list(self.moe_layers)}"
            )
        return self.moe_layers.index(layer)


def weights_digest(model: ic.Model) -> str:
    """What stands for a model's weights; they are read once, while they stay as they are.

    Raises:
        CapabilityError: weights that are not here.
    """
    return str(ic.runs.model_record(model)["parts"].get("weights", ""))


def demand_routers(owner: str, model: ic.Model) -> list[int]:
    """The layers that have routers.

    Raises:
        CapabilityError: there are none.
    """
    layers = model.layers(S.router_logits)
    if not layers:
        why = model.can("router_logits", "read") or "no layer has experts"
        raise ic.CapabilityError(
            f"{owner} needs a mixture of experts; {model.source} ({model.hf.config.model_type}) has no router: {why}"
        )
    return layers


class Point(NamedTuple):
    """A cell.

    Attributes:
        layer: decoder layer.
        expert: number in the layer.
        value: what it is ranked by.
        a, b: what the value is the difference of, if it is one.
    """

    layer: int
    expert: int
    value: float
    a: float | None = None
    b: float | None = None


@dataclass(frozen=True)
class Points:
    """Ranked cells of a model.

    Attributes:
        points: in descending order of value.
        statistic: what the value is.
        shape: of the model; None where the file does not say.
    """

    points: tuple[Point, ...]
    statistic: str = ""
    shape: Shape | None = None

    def __len__(self) -> int:
        return len(self.points)

    def experts(self, n: int | None = None) -> dict[int, tuple[int, ...]]:
        """Experts by layer of the first n points, as masks take them; layers and experts in rising order."""
        by_layer: dict[int, list[int]] = {}
        for point in self.points[:n]:
            by_layer.setdefault(point.layer, []).append(point.expert)
        return {layer: tuple(sorted(by_layer[layer])) for layer in sorted(by_layer)}

    def write(self, path: str | Path) -> Path:
        """Write a `router-points/1` file.

        Raises:
            PlanError: points of no known model.
        """
        out = Path(path)
        ic.runs.write(out, self.text())
        return out

    def text(self) -> str:
        """What the file holds.

        Raises:
            PlanError: points of no known model.
        """
        if self.shape is None:
            raise ic.PlanError("these points do not say of which model they are; make them with shape=Shape.of(model)")
        head = {
            "format": FORMAT, "model": self.shape.model, "weights": self.shape.weights, "n_layers": self.shape.n_layers,
            "moe_layers": list(self.shape.moe_layers), "n_experts": self.shape.n_experts, "top_k": self.shape.top_k,
            "statistic": self.statistic, "order": "descending",
        }  # fmt: skip
        rows = [
            {name: value for name, value in point._asdict().items() if value is not None} | {"rank": rank}
            for rank, point in enumerate(self.points)
        ]
        return json.dumps(head | {"points": rows}, indent=1, ensure_ascii=False)


def ranked(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points in descending order; ties by layer, then expert."""
    return tuple(sorted(points, key=lambda point: (-point.value, point.layer, point.expert)))


def points_of(
    values: Any,
    layers: Sequence[int],
    *,
    a: Any = None,
    b: Any = None,
    statistic: str = "",
    shape: Shape | None = None,
    positive: bool = False,
) -> Points:
    """All cells of a map `[layer expert]`, ranked.

    Args:
        values: what to rank by.
        layers: decoder layers of the rows.
        a, b: maps that `values` is the difference of, to stand beside it.
        statistic: what the values are.
        shape: of the model, for `write`.
        positive: cells above 0 alone, for lists of differences.

    Raises:
        PlanError: maps that do not fit each other, the layers or the model.
    """
    matrix = _matrix("points_of", values)
    sides = [None if side is None else _matrix("points_of: a and b", side) for side in (a, b)]
    if len(layers) != len(matrix) or any(side is not None and side.shape != matrix.shape for side in sides):
        shapes = [list(side.shape) for side in sides if side is not None]
        raise ic.PlanError(f"points_of: values are {list(matrix.shape)}, a and b {shapes}, of {len(layers)} layers")
    cells = [
        Point(layer, expert, float(matrix[row, expert]), *(None if s is None else float(s[row, expert]) for s in sides))
        for row, layer in enumerate(layers)
        for expert in range(matrix.shape[1])
        if not positive or matrix[row, expert] > 0
    ]  # fmt: skip
    points = Points(ranked(cells), statistic, shape)
    return points if shape is None else demand_shape(points, shape, "these points")


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


def demand_shape(points: Points, shape: Shape, where: str) -> Points:
    """The points, if they are of that model.

    Raises:
        PlanError: another model, number of layers or experts; a layer without experts; a cell twice.
    """
    has = points.shape
    if has is not None:
        for name in ("n_layers", "moe_layers", "n_experts", "top_k"):
            was, now = getattr(has, name), getattr(shape, name)
            if was != now:
                raise ic.PlanError(f"{where}: of {has.model}, {name} {was}; {shape.model} has {now}: make them for it")
        if has.weights and shape.weights and has.weights != shape.weights:
            raise ic.PlanError(
                f"{where}: of {has.model} with other weights than {shape.model}; make them for this model, "
                "or remove 'weights' from the file if the ranking is to be carried over"
            )
    for layer, expert, *_ in points.points:
        if layer not in shape.moe_layers:
            raise ic.PlanError(
                f"{where}: layer {layer} of {shape.model} has no experts; those that have: {list(shape.moe_layers)}"
            )
        if expert >= shape.n_experts:
            raise ic.PlanError(
                f"{where}: expert {expert} in layer {layer}; {shape.model} has {shape.n_experts} experts"
            )
    ((layer, expert), times), *_ = Counter((p.layer, p.expert) for p in points.points).most_common(1) or [((0, 0), 0)]
    if times > 1:
        raise ic.PlanError(f"{where}: layer {layer}, expert {expert} stands there {times} times")
    return replace(points, shape=shape)
