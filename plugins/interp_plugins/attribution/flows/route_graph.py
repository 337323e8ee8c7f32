"""A graph of information-flow routes: edges as columns, filtered by a threshold.

    strength(edge) = min(share(edge), strength of the node where it ends)
    strength(node) = max over edges that begin there of their strength; of what is explained: infinite

so that an edge is in the graph of every threshold below its strength, and in no other.

Source: Ferrando and Voita (2024), arXiv:2403.00824, for the graph; this package for strengths.
Must equal: the graph built anew with the higher threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

KINDS = ("attention", "residual", "bias", "mlp", "mlp_residual")
"""Of edges, by their numbers."""
ATTENTION, RESIDUAL, BIAS, MLP, MLP_RESIDUAL = range(5)


@dataclass(frozen=True, eq=False)
class RouteGraph:
    """Edges of one row's graph, from the top down.

    Attributes:
        kind: number of the kind in `KINDS`.
        layer: of the block.
        head: of attention; else -1.
        source, target: positions where the edge begins and ends; the same but for attention.
        share: of the part in all that its node is made of.
        strength: the largest threshold below which the edge is in the graph: the least share on the best way from its
            end to the top, and its own.
        tops: positions that the graph explains, in the last layer.
    """

    kind: Int[Tensor, " edge"]
    layer: Int[Tensor, " edge"]
    head: Int[Tensor, " edge"]
    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    share: Float[Tensor, " edge"]
    strength: Float[Tensor, " edge"]
    tops: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.kind)

    def filter(self, threshold: float) -> RouteGraph:
        """The graph of a higher threshold: edges with a larger share, as far as they still lead to the top."""
        return self[self.strength > threshold]

    def __getitem__(self, edges: Tensor) -> RouteGraph:
        """Some of the edges, by a mask or by index."""
        return replace(self, **{name: getattr(self, name)[edges] for name in COLUMNS})

    @property
    def importance(self) -> Float[Tensor, " edge"]:
        """Shares among the edges that are left of each node."""
        node = torch.stack([self.layer, self.target, (self.kind >= MLP).long()])
        _, index = node.unique(dim=1, return_inverse=True)
        sums = self.share.new_zeros(len(self) + 1).index_add_(0, index.flatten(), self.share)
        return self.share / sums[index.flatten()]

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]], tops: Sequence[int]) -> RouteGraph:
        """From plain columns."""
        dtype = {"share": torch.float64, "strength": torch.float64}
        tensors = {n: torch.tensor(columns[n], dtype=dtype.get(n, torch.int64)) for n in COLUMNS}
        return cls(**tensors, tops=tuple(tops))

    def columns(self) -> dict[str, list[Any]]:
        """As plain columns."""
        return {name: getattr(self, name).tolist() for name in COLUMNS}

    def table(self, tokens: Sequence[str]) -> list[dict[str, Any]]:
        """A row per edge, the most important first."""
        importance = self.importance
        order = importance.argsort(descending=True, stable=True).tolist()
        return [
            {
                "kind": KINDS[int(self.kind[e])], "layer": int(self.layer[e]),
                "head": int(self.head[e]) if self.head[e] >= 0 else "",
                "source": int(self.source[e]), "target": int(self.target[e]),
                "from": tokens[int(self.source[e])], "to": tokens[int(self.target[e])],
                "share": float(self.share[e]), "importance": float(importance[e]),
            }
            for e in order
        ]  # fmt: skip


COLUMNS = tuple(f.name for f in fields(RouteGraph) if f.name != "tops")
