"""Rows of a layer's attention pattern, to be had after the pass that the layer was called in.

All patterns of a model are `[layer head query key]`; what they are made of is linear in the length of the text. So a
pass keeps what each layer's attention was called with, and rows are made again when they are asked for, by the same
steps as attention in the open:

    pattern[query] = softmax(cap(scaling * rot_q[query] @ rot_k) + mask, with the sink if the family has one)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PositionError
from .attention import additive, at_queries, is_causal, masked, scale_of, shaped, softmax

CHUNK = 64
"""Queries whose rows are made at a time, where only their sum is asked for."""


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """One layer's attention as a pass called it. Queries and keys are columns of the batch, padding among them.

    Attributes:
        query, key: as they met, `[batch head query d_head]` and `[batch kv_head key d_head]`; queries are the `kept`.
        mask: what attention was handed, for all queries; None where it is implied.
        called: what else it was called with: scaling, cap, window, sinks, bias by position.
        module: the layer's attention.
        softmax_dtype: in which the family takes its softmax even for wider types.
        kept: columns of the queries that are still here, in order; None for all.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    called: Mapping[str, Any]
    module: nn.Module
    softmax_dtype: torch.dtype | None
    kept: tuple[int, ...] | None = None

    def at(self, queries: Sequence[int]) -> AttentionRows:
        """The same with these queries only, so that the others' memory is free.

        Raises:
            PositionError: a query that is not here.
        """
        places = torch.tensor(self._places(queries), device=self.query.device)
        called = {**self.called, "position_bias": at_queries(places, self.called.get("position_bias"))}
        return replace(self, query=self.query[:, :, places], called=called, kept=tuple(queries))

    def pattern(self, queries: Sequence[int]) -> Float[Tensor, "batch head query key"]:
        """What `run[S.pattern[layer].at(query=…)]` is, in the model's dtype.

        Raises:
            PositionError: a query that is not here.
        """
        made = self._rows(queries, self._places(queries))
        n_keys = self.key.shape[2]
        return made if made.shape[-1] == n_keys else nn.functional.pad(made, (0, n_keys - made.shape[-1]))

    def mixed(
        self, queries: Sequence[int], weights: Float[Tensor, "batch query"], chunk: int = CHUNK
    ) -> Float[Tensor, "batch head key"]:
        """The sum of these queries' rows, each times its weight, without holding more than `chunk` rows. In float32, or
        the dtype of the weights where that is wider.

        Raises:
            PositionError: a query that is not here.
        """
        wide = torch.promote_types(torch.promote_types(weights.dtype, self.query.dtype), torch.float32)
        out = self.key.new_zeros(self.query.shape[0], self.query.shape[1], self.key.shape[2], dtype=wide)
        queries, places, weights = list(queries), self._places(queries), weights.to(out)
        for start in range(0, len(queries), chunk):
            part = slice(start, start + chunk)
            rows = self._rows(queries[part], places[part])
            out[..., : rows.shape[-1]] += torch.matmul(weights[:, None, None, part], rows.to(wide)).squeeze(2)
        return out

    def _places(self, queries: Sequence[int]) -> list[int]:
        """Where queries lie in `query`."""
        known = range(self.key.shape[2]) if self.kept is None else self.kept
        index = {column: place for place, column in enumerate(known)}
        if missing := [query for query in queries if query not in index]:
            shown = f"{known[0]} to {known[-1]}" if self.kept is None else f"{len(known)} kept ones"
            raise PositionError(f"attention of this layer has no query in column {missing[0]}: there are {shown}")
        return [index[query] for query in queries]

    def _rows(self, queries: Sequence[int], places: Sequence[int]) -> Tensor:
        """Rows of the pattern `[batch head query key]`; later keys that a causal layer hides are cut off. With a graph
        only where the pass had one: sinks and biases are weights, which always ask for it.

        Args:
            queries: columns of the batch.
            places: where they lie in `query`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.query.requires_grad):
            return self._made(queries, places)

    def _made(self, queries: Sequence[int], places: Sequence[int]) -> Tensor:
        mask, called = self.mask, {**self.called}
        query, key = _taken(self.query, places), self.key
        if called.get("position_bias") is not None:
            called["position_bias"] = at_queries(torch.tensor(places, device=key.device), called["position_bias"])
        hides = mask is None and self.key.shape[2] > 1 and is_causal(called, self.module)
        if hides and called.get("position_bias") is None:
            key = key[:, :, : max(queries) + 1]
        scores = shaped(_grouped(query * scale_of(query, called["scaling"]), key), called)
        if hides:
            first = min(queries)  # keys before it are seen by all of these queries
            asked = torch.tensor(queries, device=key.device)
            own = torch.arange(first, key.shape[2], device=asked.device) <= asked[:, None]
            scores[..., first:] += additive(own, scores.dtype)
        elif mask is not None:
            scores = masked(scores, at_queries(torch.tensor(queries, device=key.device), mask), called, self.module)
        return softmax(scores, called.get("s_aux"), self.softmax_dtype)


def _taken(query: Tensor, places: Sequence[int]) -> Tensor:
    """Some of the queries; without a copy where they follow each other."""
    if places[-1] - places[0] == len(places) - 1 and all(b > a for a, b in pairwise(places)):
        return query[:, :, places[0] : places[-1] + 1]
    return query[:, :, torch.tensor(places, device=query.device)]


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """Queries with keys, as `attention` has them, without a copy of the keys for each head of a group."""
    batch, heads, n, d = query.shape
    joined = query.reshape(batch, key.shape[1], -1, d)
    return torch.matmul(joined, key.mT).view(batch, heads, n, -1)
