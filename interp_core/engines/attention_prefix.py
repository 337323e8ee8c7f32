"""Attention of rows that share the keys of their text's earlier columns.

A sweep sends variants of a text through the model as the rows of a batch, from the first column on in which any of them
differs. The columns before are the same in all of them, so their keys and values are there once for each text:

    text 0   shared keys and values ──┬── row 0   keys and values of its own columns
                                      ├── row 1   …
                                      └── row 4   …
    text 1   shared keys and values ──┬── row 2   …
                                      └── row 3   …

A row attends to both parts under one softmax. `merged` works each part out by itself and joins them by their maxima and
by the sums that a softmax divides by (log-sum-exp merging), as flash attention joins blocks of keys (Milakov and
Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). The shared part is one product for all rows of a
text, as in Hydragen (Juravsky et al. 2024, arXiv:2402.05099). Where a plan wants scores or patterns themselves,
`joined_scores` puts both parts into one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention_steps import HALF, mixed, products, shaped, sinks_of
from .masks import LOWEST, masked

_BITS = math.log2(math.e)


class RowTexts:
    """The texts whose rows go through a pass together.

    Attributes:
        starts: per text, how many columns lie before those of the pass.
        rows: the text of each row that takes part, in the order of the rows.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self.starts, self.rows = list(starts), list[int]()
        self._known: dict[Any, Any] = {}  # every layer asks the same

    def join(self, rows: Sequence[int]) -> None:
        """More rows take part from here on."""
        self.rows += rows
        self._known.pop("order", None)

    def order(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The index that lays rows out text by text, and the index that takes them back; None for one text.

        Texts with fewer rows than others are filled up with row 0, so that `[text row]` is one tensor; the way back
        leaves these out.
        """
        if len(self.starts) == 1:
            return None
        if "order" not in self._known:
            members: list[list[int]] = [[] for _ in self.starts]
            places = []
            for row, text in enumerate(self.rows):
                places.append((text, len(members[text])))
                members[text].append(row)
            most = max(map(len, members))
            table = torch.tensor([i for rows in members for i in (*rows, *[0] * (most - len(rows)))], device=device)
            self._known["order"] = table, torch.tensor([text * most + at for text, at in places], device=device)
        return self._known["order"]

    def hidden(self, n: int, window: int | None, device: torch.device) -> Tensor | None:
        """Which shared keys the `n` queries of a text do not see `[text key query]`; None if they see all.

        Shared keys are as many as the longest start has, so those of shorter texts end before; and a sliding window
        may have passed some.
        """
        if (n, window) not in self._known:
            starts = torch.tensor(self.starts, device=device).view(-1, 1, 1)
            keys = torch.arange(max(self.starts), device=device).view(1, -1, 1)
            hidden = (keys >= starts).expand(-1, -1, n)
            if window is not None:
                hidden = hidden | (starts + torch.arange(n, device=device) - keys >= window)
            self._known[n, window] = hidden if bool(hidden.any()) else None
        return self._known[n, window]


class SharedPrefix(NamedTuple):
    """What all rows of a text attend to besides their own columns.

    Attributes:
        keys, values: `[text kv_head key d_head]`.
        texts: which row is of which text, and where its own columns begin.
    """

    keys: Tensor
    values: Tensor
    texts: RowTexts


def joined_scores(prefix: SharedPrefix, query: Tensor, scores: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Scores of shared keys and, after them, the `scores` of a row's own; and the shared values, `[1 …]` or one for
    each row. The query is scaled."""
    texts = prefix.texts
    keys, values = (x if len(x) == 1 else x[texts.rows] for x in (prefix.keys, prefix.values))
    before = shaped(products(query, keys), kwargs)
    hidden = texts.hidden(query.shape[2], kwargs.get("sliding_window"), query.device)
    if hidden is not None:
        before = before.masked_fill(hidden[texts.rows].mT[:, None], LOWEST[before.dtype])
    return torch.cat([before, scores], -1), values


def merged(
    prefix: SharedPrefix,
    called: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    kwargs: dict[str, Any],
    module: nn.Module,
    softmax_dtype: torch.dtype | None,
) -> Tensor:
    """Attention `[batch head query d_head]` over shared keys and a row's own, without a tensor of both:

        top    = max(shared scores, own scores)      weights = 2 ** (shared - top)      mine = 2 ** (own - top)
        output = (weights @ shared values + mine @ values) / (sum of weights + sum of mine)

    Scores are in bits here, times log2 e: powers of two take a third of the time of exponentials. The large one,
    `[(text kv_head) key (row group query)]`, is written over in place; keys come before rows in it, which makes its
    products and its maximum twice as fast for narrow heads.

    Args:
        called: query, key and value of the rows' own columns.
        mask: over their own keys.
        kwargs: what else attention was called with, its `scaling` among it.
    """
    query, key, value = called
    (_, heads, n, _), kv, texts, scale = query.shape, key.shape[1], prefix.texts, kwargs["scaling"]
    n_texts, order, kind = len(texts.starts), texts.order(query.device), value.dtype
    keys, values = prefix.keys.flatten(0, 1), prefix.values.flatten(0, 1)

    def by_text(x: Tensor) -> Tensor:
        """`[row head query x]` as `[(text kv_head) x (row group query)]`: a text's rows, the heads of a group and their
        queries all meet the same keys, so they are columns of one product."""
        x = x if order is None else x[order[0]]
        return x.reshape(n_texts, -1, kv, heads // kv * n, x.shape[-1]).transpose(1, 2).flatten(2, 3).flatten(0, 1).mT

    def by_row(x: Tensor) -> Tensor:
        """The way back from `by_text`; what fills a text up is left out."""
        x = x.mT.reshape(n_texts, kv, -1, heads // kv * n, x.shape[1]).transpose(1, 2).reshape(-1, heads, n, x.shape[1])
        return x if order is None else x[order[1]]

    own = masked(shaped(products(query, key) * scale, kwargs), mask, kwargs, module)
    shared = shaped(torch.matmul(keys, by_text(query * scale)), kwargs)
    if (hidden := texts.hidden(n, kwargs.get("sliding_window"), shared.device)) is not None:
        each = shared.view(n_texts, kv, shared.shape[1], -1, n)
        shared = each.masked_fill_(hidden[:, None, :, None], LOWEST[shared.dtype]).view(shared.shape)
    if (wide := softmax_dtype or (torch.float32 if own.dtype in HALF else None)) is not None:
        own, shared = own.to(wide), shared.to(wide)
    own, shared = own * _BITS, shared.mul_(_BITS)
    highest = own.amax(-1, keepdim=True)
    if (sinks := sinks_of(kwargs)) is not None:
        sinks = sinks.to(own.dtype) * _BITS
        highest = torch.maximum(highest, sinks)
    # One maximum for both parts, so that no power overflows and the two sums are of the same unit.
    top = torch.maximum(shared.amax(1, keepdim=True), by_text(highest))
    weights = shared.sub_(top).exp2_()
    # Mixture, sum and maximum of the shared part go back to their rows together: one reordering instead of three.
    summary = torch.cat([torch.matmul(values.mT, weights.to(kind)), weights.sum(1, keepdim=True), top], 1)
    out, total, top = by_row(summary).split([value.shape[-1], 1, 1], -1)
    mine = (own - top).exp2_()
    total = total + mine.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp2_()
    return ((out + mixed(mine.to(kind), value)) / total).to(kind)
