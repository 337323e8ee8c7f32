"""Sweeps in a run of several processes: each takes some of the variants at a time.

A chunk of variants is a sweep of its own, so it pays for its own clean pass: 1 of `CHUNK` at most, as a full pass costs
about what one variant does. Chunks do not depend on how many processes there are, and neither do the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..score import Score
from ..sites import Edit
from ..text import Tokens
from .store import SweepStore, key_of

if TYPE_CHECKING:
    from ..runs import RunFolder

CHUNK = 256
"""Variants that one process takes at a time."""


def swept(
    run: RunFolder, tokens: Tokens, variants: Sequence[tuple[Edit, ...]], scores: Sequence[Score], store: SweepStore,
    sweep: Callable[[Sequence[tuple[Edit, ...]]], SweepStore],
) -> None:  # fmt: skip
    """Fill a store with the scores of all variants, of which this process works out its part.

    Args:
        run: an open run folder; the scores stand in its `sweeps/{digest}.jsonl`.
        sweep: scores of some of the variants.

    Raises:
        PlanError: something of which it cannot be told whether it is the same another time.
    """
    from ..runs import digest

    def made(start: int) -> dict[str, Any]:
        part = sweep(variants[start : start + CHUNK])
        return {"start": start, **{name: getattr(part, name).tolist() for name in ("values", "moved", "clean")}}

    key = key_of(tokens, variants, scores)
    name = f"sweeps/{digest(key)[:12]}.jsonl"
    for row in run.map(name, made, range(0, len(variants), CHUNK), by=lambda start: start, inputs=key, strict=True):
        _put(store, row)


def _put(store: SweepStore, row: Mapping[str, Any]) -> None:
    values, moved, clean = (_tensor(row[name], getattr(store, name)) for name in ("values", "moved", "clean"))
    places = slice(row["start"], row["start"] + len(values))
    store.values[places], store.moved[places], store.clean[:] = values, moved, clean
    store.done[places], store.clean_done[:] = True, True


def _tensor(numbers: Any, like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype)
