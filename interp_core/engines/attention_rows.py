"""Rows of a layer's attention pattern, to be had after the pass that the layer was called in.

All patterns of a model are `[layer head query key]`; what they are made of is linear in the length of the text. So a
pass keeps what each layer's attention was called with, and rows are made again when they are asked for, by the same
steps as attention in the open:

    pattern[query] = softmax(cap(scaling * rot_q[query] @ rot_k) + mask, with the sink if the family has one)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PositionError
from .attention_steps import scale_of, shaped, sinks_of, softmax
from .masks import additive, at_queries, by_query, is_causal, masked, no_later

ROOM, LEAST = 1 << 18, 16
"""Where only a sum of rows is asked for: how many numbers of them are made at a time, so that a CPU keeps them in its
cache (other devices: 64 times as many); `LEAST` rows in any case."""


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
        made: their rows of the pattern as far as these were made to last: some queries at a time, and which.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    called: Mapping[str, Any]
    module: nn.Module
    softmax_dtype: torch.dtype | None
    kept: tuple[int, ...] | None = None
    made: tuple[tuple[slice, Tensor], ...] = ()

    def at(self, queries: Sequence[int]) -> AttentionRows:
        """This layer's attention with these queries only, so that the others' memory is free.

        Raises:
            PositionError: a query that is not here.
        """
        places = torch.tensor(self._places(queries), device=self.query.device)
        called = {**self.called, **by_query(self.called, places)}
        return replace(self, query=self.query.index_select(2, places), called=called, kept=tuple(queries), made=())

    def held(self) -> AttentionRows:
        """This layer's attention with its rows of the pattern made now, once: `mixed` takes them from memory then."""
        known = list(self._index)
        with self._graph():
            return replace(self, made=tuple(self._rows(known, self._fastest)))

    def pattern(self, queries: Sequence[int]) -> Float[Tensor, "batch head query key"]:
        """What `run[S.pattern[layer].at(query=…)]` is, in the model's dtype.

        Raises:
            PositionError: a query that is not here.
        """
        with self._graph():
            ((_, rows),) = self._rows(queries, len(queries))
        n_keys = self.key.shape[2]
        return rows if rows.shape[-1] == n_keys else nn.functional.pad(rows, (0, n_keys - rows.shape[-1]))

    def mixed(
        self, queries: Sequence[int], weights: Float[Tensor, "batch query"], chunk: int | None = None
    ) -> Float[Tensor, "batch head key"]:
        """The sum of these queries' rows, each times its weight, without holding more than `chunk` rows (default: as
        many as are made fastest). In float32, or the dtype of the weights where that is wider.

        Raises:
            PositionError: a query that is not here.
        """
        wide = torch.promote_types(torch.promote_types(weights.dtype, self.query.dtype), torch.float32)
        (batch, heads), n_keys = self.query.shape[:2], self.key.shape[2]
        out, weights = self.key.new_zeros(batch, heads, n_keys, dtype=wide), weights.to(self.key.device, wide)
        rows_of: Iterable[tuple[slice, Tensor]] = self.made
        with self._graph():
            if self.made:
                places = torch.tensor(self._places(queries), device=weights.device)
                weights = weights.new_zeros(batch, self.query.shape[2]).index_add_(1, places, weights)
            else:
                rows_of = self._rows(queries, self._fastest if chunk is None else chunk)
            for part, rows in rows_of:
                out[..., : rows.shape[-1]] += torch.matmul(weights[:, None, None, part], rows.to(wide)).squeeze(2)
        return out

    @property
    def _fastest(self) -> int:
        """How many rows are made at a time: as many as the device's cache holds (see `ROOM`)."""
        batch, heads = self.query.shape[:2]
        room = ROOM if self.query.device.type == "cpu" else ROOM << 6
        return max(LEAST, room // (batch * heads * self.key.shape[2]))

    def _places(self, queries: Sequence[int]) -> list[int]:
        """Where the queries of these columns lie in `query`, which has the kept ones alone."""
        index = self._index
        if missing := [query for query in queries if query not in index]:
            known = list(index)
            shown = f"{known[0]} to {known[-1]}" if self.kept is None else f"{len(known)} kept ones"
            raise PositionError(f"attention of this layer has no query in column {missing[0]}: there are {shown}")
        return [index[query] for query in queries]

    @cached_property
    def _index(self) -> dict[int, int]:
        """By column, where its query lies in `query`."""
        known = range(self.key.shape[2]) if self.kept is None else self.kept
        return {column: place for place, column in enumerate(known)}

    def _graph(self) -> torch.set_grad_enabled:
        """A graph only where the pass had one: sinks and biases are weights, which always ask for it."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.query.requires_grad)

    def _rows(self, queries: Sequence[int], chunk: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the pattern `[batch head query key]`, some queries at a time and which these are; later keys that a
        causal layer hides are cut off."""
        queries, places = list(queries), self._places(queries)
        called, key = {**self.called}, self.key.mT
        query = _taken(self.query, places)
        query = query * scale_of(query, called["scaling"])
        hides = self.mask is None and self.key.shape[2] > 1 and is_causal(called, self.module)
        if len(queries) > chunk:
            key = key.contiguous()  # laid out as products want it, once for all
        for start in range(0, len(queries), chunk):
            part = slice(start, start + chunk)
            columns = queries[part]
            called |= by_query(self.called, torch.tensor(places[part], device=key.device))
            visible = key[..., : max(columns) + 1] if hides and called.get("position_bias") is None else key
            scores = shaped(_grouped(query[:, :, part], visible), called)
            if hides:
                first = min(columns)  # keys before it are seen by all of these queries
                scores[..., first:] += _later(columns, scores)
            elif self.mask is not None:
                mask = at_queries(torch.tensor(columns, device=key.device), self.mask)
                scores = masked(scores, mask, called, self.module)
            yield part, softmax(scores, sinks_of(called), self.softmax_dtype)


def _later(queries: Sequence[int], scores: Tensor) -> Float[Tensor, "query key"]:
    """What hides from queries the keys after them, from the key of the first query on."""
    first, n_keys = min(queries), scores.shape[-1]
    if _row(queries) and n_keys == queries[-1] + 1:
        return no_later(len(queries), len(queries), scores.device, scores.dtype)
    columns = torch.tensor(queries, device=scores.device)
    return additive(torch.arange(first, n_keys, device=columns.device) <= columns[:, None], scores.dtype)


def _row(places: Sequence[int]) -> bool:
    """Whether these are neighbours in ascending order, so that a slice can take them."""
    return list(places) == list(range(places[0], places[-1] + 1))


def _taken(query: Tensor, places: Sequence[int]) -> Tensor:
    """Some of the queries; without a copy where they follow each other."""
    if _row(places):
        return query[:, :, places[0] : places[-1] + 1]
    return query[:, :, torch.tensor(places, device=query.device)]


def _grouped(query: Tensor, key: Float[Tensor, "batch kv_head d_head key"]) -> Float[Tensor, "batch head query key"]:
    """Queries with keys, as `attention` has them, without a copy of the keys for each head of a group."""
    batch, heads, n, d = query.shape
    joined = query.reshape(batch, key.shape[1], -1, d)
    return torch.matmul(joined, key).view(batch, heads, n, -1)
