"""How a model routes the targets of pairs: read at their positions, and summed sample by sample.

    executed    the router's own sets and weights, where the number of experts asked for is the model's
    re-ranked   with another number: the largest so many of the router's probabilities, as Geuan666/XAI4Agent takes them

Weights are normalised over the set in both cases. What is kept of a sample has no axis of tokens: sums of the usage of
each view ("all" targets, the "last" one) and context, and the mean over targets of every statistic of two sets.

Source: docs/methods/router.md has the formulas. Cost: two passes per pair, up to the last layer that has a router.
Must equal: the functions of `router` on routing read at the same positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

import interp_core as ic

from ..router.divergence import token_statistics
from ..router.reading import read
from ..router.routed import Layers, Routed, chosen_of
from ..router.usage import LayerSums, Usage, layer_sums
from .pair import SIDES, Pair, Side

View = Literal["all", "last"]
VIEWS: tuple[View, View] = ("all", "last")
CURVES = ("tv", "tv_full", "jaccard", "intersection", "weighted_jaccard", "top1_same")
"""Statistics of two contexts' routing of the same token."""
Sums = Mapping[str, Tensor]
"""By name, a tensor whose first axis is `sample` and whose second is `layer`."""


def routed_targets(model: ic.Model, pair: Pair, side: Side, top_k: int | None = None) -> dict[int, Routed]:
    """Routing of a context's targets, in their order, by decoder layer.

    Args:
        top_k: experts per token (None, or the model's own number: the executed ones; see the module).

    Raises:
        CapabilityError: a model without routers.
        PlanError: no such number of experts.
    """
    with torch.no_grad():
        layers = read(model, pair.tokens(side), list(pair.positions(side)))
    return {number: _of(routed, top_k) for number, routed in layers.items()}


def _of(routed: Routed, top_k: int | None) -> Routed:
    if top_k is None or top_k == int(routed.chosen[0].sum()):
        return routed
    if not 1 <= top_k <= routed.n_experts:
        raise ic.PlanError(f"top_k is {top_k}: give 1 to {routed.n_experts}, the number of experts")
    probs = routed.need("probs")
    chosen = chosen_of(probs.topk(top_k, dim=-1).indices, routed.n_experts)
    return Routed(chosen, probs * chosen, probs, routed.logits)


def pair_sums(agentic: Layers, assisted: Layers) -> dict[str, Tensor]:
    """What is kept of one sample, with an axis `sample` of one in front.

    {view}_{side}_{tokens|count|weight|prob|executed} `[sample layer (expert)]`, curve_{name} and curve_{name}_last
    `[sample layer]`.
    """
    kept: dict[str, list[Tensor]] = {}
    for number in agentic:
        sides = dict(zip(SIDES, (agentic[number], assisted[number]), strict=True))
        for side, routed in sides.items():
            for view, part in (("all", routed), ("last", routed.take([-1]))):
                for name, value in layer_sums(part).tensors.items():
                    kept.setdefault(f"{view}_{side}_{name}", []).append(value.cpu())
        for name, each in token_statistics(*sides.values()).items():
            if name in CURVES:
                kept.setdefault(f"curve_{name}", []).append(each.mean().cpu()[None])
                kept.setdefault(f"curve_{name}_last", []).append(each[-1].cpu()[None])
    return {name: torch.stack(values, 1) for name, values in kept.items()}


def joined(parts: Sequence[Sums]) -> dict[str, Tensor]:
    """Several samples after one another."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def usage_of(sums: Sums, view: View, side: Side, layers: Sequence[int]) -> Usage:
    """The usage of experts in a view of a context, each sample's own kept."""
    usage = Usage(keep_samples=True)
    names = ("tokens", "count", "weight", "prob", "executed")
    for row, number in enumerate(layers):
        usage.add_sums(number, LayerSums(*(sums[f"{view}_{side}_{name}"][:, row] for name in names)))
    return usage
