"""Which experts a mask sweep bans: cells of a points file in several orders, N at a time, for a list of N.

    descending     the file's order, best first
    reversed       the same from its end
    random         each cell's expert replaced by one that is drawn at random among all experts of its layer
    usage_random   the same, drawn among experts that are used about as much

A random order bans as many experts per layer as the descending one does at every N: an expert's stand-in is given by a
permutation of the layer's experts, so no stand-in comes twice. For `usage_random` the layer's experts are sorted by
usage and permuted within blocks of four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from interp_plugins.router.points import Points, Shape
from jaxtyping import Float

import interp_core as ic

Mode = Literal["replace", "keep", "drop"]
MODES: dict[str, Mode] = {
    "replace": "replace", "keep": "keep", "drop": "drop", "replace_topk": "replace", "keep_topk": "keep",
}  # fmt: skip
"""Modes by the names that they go by."""
ORDERS = ("descending", "reversed", "random", "usage_random")
BLOCK = 4
"""Neighbours in usage that stand in for each other."""
Cells = tuple[tuple[int, int], ...]
Banned = dict[int, tuple[int, ...]]
"""Experts by layer."""


@dataclass(frozen=True)
class Order:
    """Cells in the order in which they are banned.

    Attributes:
        kind: one of `ORDERS`.
        draw: which of the random orders; 0 of the others.
        cells: pairs of decoder layer and expert.
    """

    kind: str
    draw: int
    cells: Cells

    def banned(self, n: int) -> Banned:
        """Experts by layer of the first n cells."""
        layers = sorted({layer for layer, _ in self.cells[:n]})
        return {layer: tuple(sorted(e for at, e in self.cells[:n] if at == layer)) for layer in layers}


@dataclass(frozen=True)
class Variant:
    """One mask.

    Attributes:
        mode: how it bans.
        order: whose first cells.
        n: how many.
        banned: experts by layer.
        skipped: why it is not run; empty if it is.
    """

    mode: Mode
    order: Order
    n: int
    banned: Banned
    skipped: str = ""

    @property
    def clean(self) -> Variant:
        """The run without a mask: N = 0, of whatever mode and order."""
        return Variant(self.mode, self.order, 0, {})

    @property
    def key(self) -> str:
        """Its name in files: equal masks of one mode have one name, and are run once."""
        cells = ";".join(f"{layer}:{','.join(map(str, experts))}" for layer, experts in self.banned.items())
        return f"{self.mode} {cells}" if cells else "none"


def orders(
    points: Points,
    shape: Shape,
    kinds: Sequence[str],
    draws: int,
    seed: int,
    usage: Sequence[Sequence[float]] | Float[np.ndarray, "layer expert"] | None = None,
) -> list[Order]:
    """The orders of these kinds.

    Args:
        draws: random orders of each random kind.
        usage: `[layer expert]` of the layers that have routers, for `usage_random` (None: it is drawn like `random`).
    """
    cells: Cells = tuple((point.layer, point.expert) for point in points.points)
    listed = []
    for kind in kinds:
        if kind in ("descending", "reversed"):
            listed.append(Order(kind, 0, cells if kind == "descending" else cells[::-1]))
            continue
        for draw in range(draws):
            # a stream per kind and draw: another number of draws, or kinds, leaves each of them as it was
            rng = np.random.default_rng([seed, ORDERS.index(kind), draw])
            stand_in = {
                layer: _permutation(rng, shape.n_experts, None if kind == "random" or usage is None else usage[row])
                for row, layer in enumerate(shape.moe_layers)
            }
            listed.append(Order(kind, draw, tuple((layer, int(stand_in[layer][e])) for layer, e in cells)))
    return listed


def _permutation(rng: np.random.Generator, n: int, usage: Sequence[float] | np.ndarray | None) -> np.ndarray:
    """Which expert stands in for each."""
    if usage is None:
        return rng.permutation(n)
    by_usage = np.argsort(-np.asarray(usage), kind="stable")
    stand_in = np.empty(n, dtype=int)
    for start in range(0, n, BLOCK):
        block = by_usage[start : start + BLOCK]
        stand_in[block] = rng.permutation(block)
    return stand_in


def variants(listed: Sequence[Order], modes: Sequence[Mode], sizes: Sequence[int], shape: Shape) -> list[Variant]:
    """Every mask of the sweep, in the order of modes, orders and sizes."""
    masks = [Variant(mode, order, n, order.banned(n)) for mode in modes for order in listed for n in sizes]
    return [replace(mask, skipped=guard(mask.banned, mask.mode, shape)) for mask in masks]


def guard(banned: Banned, mode: Mode, shape: Shape) -> str:
    """Why a mask cannot be run; empty if it can. Where banned experts are replaced, each layer needs `top_k` others."""
    if mode != "replace":
        return ""
    for layer, experts in banned.items():
        left = shape.n_experts - len(experts)
        if left < shape.top_k:
            return f"layer {layer} would have {left} of {shape.n_experts} experts left, a token takes {shape.top_k}"
    return ""


def modes_of(words: Sequence[str]) -> list[Mode]:
    """Modes by name, each once.

    Raises:
        PlanError: no such mode, or none.
    """
    for word in words:
        if word not in MODES:
            raise ic.PlanError(f"there is no mode {word!r}. {ic.errors.nearest(word, MODES)}")
    if not words:
        raise ic.PlanError("give a mode: replace, keep or drop")
    return list(dict.fromkeys(MODES[word] for word in words))


def sizes_of(sizes: Sequence[int] | None, points: Points) -> list[int]:
    """How many cells are banned at a time, rising.

    Args:
        sizes: None: 15 to 100 in steps of 5, as far as there are points, or 1, 2, 4, … where there are fewer than 15.

    Raises:
        PlanError: no points, sizes below 1, or above the number of points.
    """
    most = len(points)
    if not most:
        raise ic.PlanError("the points file holds no points: there is nothing to mask")
    if sizes is None:
        usual = [n for n in range(15, 101, 5) if n <= most]
        return usual or [n for n in (1, 2, 4, 6, 8, 10, 12) if n <= most]
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ic.PlanError(f"sizes are whole numbers from 1, as 15,20,25, not {sizes}; N = 0 is always run")
    if too_large := [n for n in sizes if n > most]:
        raise ic.PlanError(f"size {too_large[0]}: the points file holds {most} points; give sizes up to {most}")
    return sorted(set(sizes))
