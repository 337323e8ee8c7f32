"""Cells of a layer · expert map that matter: thresholds, and points in the order of their values.

    threshold   t = max(minimum, quantile_q of |D| over all layer · expert cells), numpy's linear interpolation
    map         sign(D) where |D| >= t, else 0
    points      cells in descending order of value; ties by layer, then expert

A layer is the decoder's, wherever dense layers come before. Points are of one model: `Shape` says what of it they
depend on, and points of another are refused. `point_files` reads their files.

Source: this package; the statistics that are ranked say whose they are.
Must equal: golden thresholds, maps and points exactly; written and read back, the same points.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

import interp_core as ic
from interp_core import sites as S

FORMAT = "router-points/1"


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


def named(model: ic.Model) -> str:
    """A model and its type, as messages call it."""
    return f"{model.source} ({model.hf.config.model_type})"


def demand_routers(owner: str, model: ic.Model) -> list[int]:
    """The layers that have routers.

    Raises:
        CapabilityError: there are none.
    """
    layers = model.layers(S.router_logits)
    if not layers:
        why = model.can("router_logits", "read") or "no layer has experts"
        raise ic.CapabilityError(f"{owner} needs a mixture of experts; {named(model)} has no router: {why}")
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
        ic.runs.write(Path(path), self.text())
        return Path(path)

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
        # either may be unknown: old files, weights that lie elsewhere
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
    # a mask of a cell twice would count one expert for two
    ((layer, expert), times), *_ = Counter((p.layer, p.expert) for p in points.points).most_common(1) or [((0, 0), 0)]
    if times > 1:
        raise ic.PlanError(f"{where}: layer {layer}, expert {expert} stands there {times} times")
    return replace(points, shape=shape)
