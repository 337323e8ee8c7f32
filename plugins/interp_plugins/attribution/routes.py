"""Information-flow routes as a graph: along which tokens, heads and MLPs the state that gives an answer came about.

Nodes are the stream after each block, the stream between attention and MLP, and the embeddings. Into each go edges:

    into resid_pre + attn_out:   each head from each token, the residual stream, the output bias
    into resid_post:             the MLP, the residual stream
    share(edge) = prox(part, whole) / sum over all edges into the node        prox as in `proximity`

From the nodes that predict the answer downwards, edges with a share above `threshold` are kept, and the nodes where
they begin; what is left of a node's shares, divided by their sum, is an edge's importance. Beside the graph stand the
scores of real routes, through all layers and over all edges, none dropped:

    scores[L] = 1 at the answer's predictors (1 together)
    scores[l][j] = Σ_i scores[l + 1][i] · (Σ_heads share(j → i) + [i = j] (share of residual and bias))

MLPs and biases keep mass at their token. Every node's shares add up to 1, so that every layer's scores do. (The summed
form, method `ifr`, takes each layer's shares at the answer's predictors, and follows no edge.)

Source: Ferrando and Voita (2024), arXiv:2403.00824; prox by L1 norms, with values' biases, as their published tool.
Parallel blocks are taken as attention first, then MLP.
Cost: two forward passes, and per layer the proximities of all tokens up to the answer. Memory is linear in the length.
Must equal: matrices of shares multiplied by hand (float64); scores that add up to 1 after each layer; and, for a higher
threshold, the same graph filtered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .._pictures import which
from .flows.flow import Flow, KeptLayer
from .flows.out_maps import demand_patterns
from .flows.proximity import proximities, proximity
from .flows.route_graph import ATTENTION, BIAS, COLUMNS, MLP, MLP_RESIDUAL, RESIDUAL, RouteGraph
from .flows.routes_drawing import GraphChart
from .layout import Layout
from .method import Attributed, Attribution, AttributionConfig, AttributionResult


class RoutesConfig(AttributionConfig):
    """Settings of information-flow routes as a graph.

    Attributes:
        threshold: edges with no more than this share of their node are dropped.
        chunk_tokens: tokens that are worked on at a time; bounds memory, and changes no result.
        sink_chunk_tokens: rows of nodes that are worked on at a time; the same.
    """

    threshold: float = Field(0.04, ge=1e-3, lt=1)
    chunk_tokens: int = Field(128, ge=1)
    sink_chunk_tokens: int = Field(32, ge=1)


@dataclass(frozen=True, eq=False)
class RoutesResult(AttributionResult):
    """Scores of tokens through all layers, and the graph.

    Attributes:
        layer_scores: mass at each token after each step down: the embeddings first, the answer's predictors last.
        edges: the graphs' edges as plain columns, per row; see `graph`.
        tops: positions that each graph explains.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **AttributionResult.AXES, "layer_scores": ("batch", "step", "pos")
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = {**AttributionResult.JOINS, "edges": "rows", "tops": "rows"}
    layer_scores: Float[Tensor, "batch step pos"]
    edges: tuple[dict[str, list[Any]], ...]
    tops: tuple[tuple[int, ...], ...]

    def graph(self, row: int = 0) -> RouteGraph:
        """One row's graph."""
        return RouteGraph.of(self.edges[row], self.tops[row])

    def filter(self, threshold: float) -> RoutesResult:
        """The same with the graphs of a higher threshold; scores stay."""
        kept = tuple(self.graph(row).filter(threshold).columns() for row in range(len(self.edges)))
        return replace(self, edges=kept)

    def table(self) -> list[dict[str, Any]]:
        """Every edge of every row, the most important first."""
        rows = range(len(self.edges))
        return [{"row": row, **line} for row in rows for line in self.graph(row).table(self.labels[row])]

    def html(self) -> str:
        """Each row's graph, with a slider that filters it, and its tokens coloured by their scores."""
        return "".join(chart.html() for chart in self.charts()) + super().html()

    def charts(self) -> list[GraphChart]:
        """Each row's graph."""
        return [
            GraphChart(self.graph(row), self.labels[row], self.n_layers, f"{self.method}{which(row, len(self.edges))}")
            for row in range(len(self.edges))
        ]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.layer_scores.shape[1] - 1


class Routes(Attribution):
    """Along which tokens, heads and MLPs the state that gives an answer came about."""

    name = "ifr_routes"
    Config = RoutesConfig
    requires = frozenset({"causal", "resid_pre", "attn_out", "v", "z", "pattern", "resid_post"})
    contrastive: ClassVar[bool] = False

    def check(self, model: ic.Model, tokens: ic.Tokens, config: RoutesConfig) -> None:
        """As all attribution methods; and every layer mixes tokens by a pattern."""
        demand_patterns(model)
        super().check(model, tokens, config)

    def attribute(self, model: ic.Model, layout: Layout, config: RoutesConfig) -> Attributed:
        """One row; the graph goes with the notes."""
        sound = config.profile == "sound" or not len(layout.sink)
        walk = Walk(model, layout.tokens, layout.predictors if sound else tuple(layout.sink), config)
        graph, steps = walk.down()
        return Attributed(steps[0], stream=walk.flow.stream, notes={"graph": graph, "steps": steps})

    def __call__(
        self, model: ic.Model, x: Any, *, target: str | Sequence[str] | None = None, **settings: Any
    ) -> RoutesResult:
        """As any attribution method; the result has the graph."""
        routes: Any = super().__call__(model, x, target=target, **settings)
        return routes

    def run(self, model: ic.Model, tokens: ic.Tokens, config: RoutesConfig) -> RoutesResult:
        """Row by row."""
        plain = super().run(model, tokens, config)
        steps = plain.scores.new_full((len(plain.notes), model.n_layers + 1, plain.scores.shape[1]), float("nan"))
        for row, notes in enumerate(plain.notes):
            steps[row, :, plain.columns(row)] = notes["steps"].to(steps)
        kept = {f.name: getattr(plain, f.name) for f in fields(plain)}
        kept["notes"] = tuple({"threshold": config.threshold} for _ in plain.notes)
        graphs = [notes["graph"] for notes in plain.notes]
        return RoutesResult(
            **kept, layer_scores=steps, edges=tuple(graph.columns() for graph in graphs),
            tops=tuple(graph.tops for graph in graphs),
        )  # fmt: skip

    def conserved(self, model: ic.Model, tokens: ic.Tokens, result: Any) -> Mapping[str, tuple[Tensor, Tensor]]:
        """After every layer, the mass of the answer's predictors."""
        mass = result.layer_scores.nansum(-1)
        return {"mass through the layers": (mass, torch.ones_like(mass))}


class Walk:
    """From the top of a row's graph down."""

    def __init__(self, model: ic.Model, tokens: ic.Tokens, tops: Sequence[int], config: RoutesConfig) -> None:
        self.config, self.tops, self.length = config, tuple(sorted(set(tops))), tokens.lengths[0]
        rows = list(range(self.tops[-1] + 1))
        last = S.resid_post[model.n_layers - 1].at(rows)
        self.post: Tensor = model.run(tokens, read=last, logits=False)[last].plain[0]
        chunks = (config.chunk_tokens, config.sink_chunk_tokens)
        self.flow = Flow(model, tokens, tuple(rows), config.profile, 0.0, *chunks)
        gated = [layer for layer, kept in enumerate(self.flow.layers) if kept.z is not None]
        if gated:
            raise ic.CapabilityError(
                f"layers {gated} of {model.source} gate what attention gives before its output projection, and routes "
                "are told by what heads bring from each token; method 'ifr' follows gates"
            )
        self.scores = torch.zeros(self.length, dtype=torch.float64)
        self.scores[list(self.tops)] = 1 / len(self.tops)
        self.power = torch.zeros(self.length, dtype=torch.float64)
        """The largest threshold below which a node is in the graph: 0 if it is not."""
        self.power[list(self.tops)] = torch.inf
        self.edges: list[tuple[Tensor, ...]] = []

    def down(self) -> tuple[RouteGraph, Float[Tensor, "step pos"]]:
        """The graph, and scores after each step: the embeddings first."""
        steps = [self.scores]
        for layer in reversed(range(len(self.flow.layers))):
            kept = self.flow.layers[layer]
            mid = kept.before + kept.added
            self.through_mlp(layer, mid)
            self.through_attention(layer, kept, mid)
            self.post = kept.before
            steps.append(self.scores)
        columns = dict(zip(COLUMNS, map(torch.cat, zip(*self.edges, strict=True)), strict=True))
        return RouteGraph(**columns, tops=self.tops), torch.stack(steps[::-1])

    def through_mlp(self, layer: int, mid: Tensor) -> None:
        """The MLP's part and the residual's, of the nodes in the graph."""
        at = self.power.nonzero()[:, 0]
        whole, before = self.post[at].to(mid), mid[at]
        shares = _shares(torch.stack([proximity(whole - before, whole), proximity(before, whole)]))
        power = torch.zeros_like(self.power)
        for kind, share in zip((MLP, MLP_RESIDUAL), shares, strict=True):
            self.add(kind, layer, at, at, share, power)
        self.power = power

    def through_attention(self, layer: int, kept: KeptLayer, mid: Tensor) -> None:
        """The parts of heads, residual and bias, of all nodes that have mass or are in the graph."""
        scores, power = torch.zeros_like(self.scores), torch.zeros_like(self.power)
        nodes = ((self.scores > 0) | (self.power > 0)).nonzero()[:, 0]
        # all nodes of a layer against all tokens would be head · pos² edges
        for at in nodes.split(max(self.config.sink_chunk_tokens, 1) * 4):
            heads, own = self.parts(layer, kept, mid, at)
            mass = self.scores[at]
            scores[: heads.shape[-1]] += mass @ heads.sum(0)
            scores.index_add_(0, at, mass * own.sum(0))
            head, row, source = (heads > self.config.threshold).nonzero().unbind(1)
            self.add(ATTENTION, layer, source, at[row], heads[head, row, source], power, head)
            self.add(RESIDUAL, layer, at, at, own[0], power)
            # nothing lies before a bias: no node begins there
            self.add(BIAS, layer, at, at, own[1], None)
        self.scores, self.power = scores, power

    def parts(self, layer: int, kept: KeptLayer, mid: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of heads and keys `[head row key]`, and of residual and bias `[2 row]`, on this machine in float64."""
        whole, scale, reach = mid[at], kept.scale[at], int(at[-1]) + 1
        pattern = self.flow.pattern_at(layer, at.tolist())[:, :, :reach] * scale[:, None]
        near = proximities(
            pattern, kept.values[:reach], kept.out.w_o.permute(1, 2, 0), whole, edges=True,
            chunk_tokens=self.config.chunk_tokens, sink_chunk_tokens=self.config.sink_chunk_tokens,
        ).edges  # fmt: skip
        assert near is not None
        resid = proximity(kept.before[at], whole)
        bias = torch.zeros_like(resid)
        if kept.out.biased:
            bias = proximity(scale[:, None] * kept.out.bias + kept.out.own, whole)
        stacked = _shares(torch.cat([near.permute(0, 2, 1).flatten(0, 1), bias[None], resid[None]]))
        return stacked[:-2].view(len(near), reach, -1).transpose(1, 2), stacked[[-1, -2]]

    def add(
        self, kind: int, layer: int, source: Tensor, target: Tensor, share: Tensor, power: Tensor | None,
        head: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Edges into nodes of the graph, those with a large enough share; `power` of where they begin grows by it."""
        # a way is as strong as its weakest edge, a node as the strongest way from it to the top: up to that
        # threshold both are in the graph
        strength = torch.minimum(share, self.power[target])
        kept = strength > self.config.threshold
        source, target, share, strength = source[kept], target[kept], share[kept], strength[kept]
        if power is not None:
            power.scatter_reduce_(0, source, strength, "amax")
        heads = torch.full_like(source, -1) if head is None else head[kept]
        numbers = (torch.full_like(source, kind), torch.full_like(source, layer), heads, source, target)
        self.edges.append((*numbers, share, strength))


def _shares(near: Float[Tensor, "part node"]) -> Float[Tensor, "part node"]:
    """Proximities in parts of their sums; where nothing is near, the last part, the residual stream, is all."""
    near = near.double().cpu()
    whole = near.sum(0)
    shares = near / torch.where(whole > 0, whole, 1)
    # so that mass is never lost: every node's shares add up to 1
    shares[-1] += whole == 0
    return shares
