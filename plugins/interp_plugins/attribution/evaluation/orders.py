"""In which order tokens are deleted: from weights to deletion steps, and what ties leave open.

    step      K = min(steps, tokens) groups in descending weight, ⌊n/K⌋ tokens each, the first n mod K one more
    ties      equal weights have no order; declared: the lower position first (`"stable"`). The reference takes torch's
              argsort, whose order among equals is an accident of the machine, so that an order can be given instead

Source: the reference implementation of FlashTrace for the groups; the rule for ties is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import interp_core as ic

STEPS = 20


def checked_weights(weights: Any, size: int, what: str) -> Float[Tensor, "vector prompt"]:
    """Weights in float64, one row per vector; a single vector becomes a row.

    Raises:
        PlanError: other shapes, or numbers that are not finite.
    """
    if not isinstance(weights, Tensor) or weights.ndim not in (1, 2) or weights.shape[-1] != size or not len(weights):
        shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ic.PlanError(
            f"{what} takes weights [vector, {size}], one per prompt token, not {shape}. Weights over prompt and target "
            f"together are cut to the prompt by weights[..., :{size}]"
        )
    weights = torch.atleast_2d(weights).detach().cpu().double()
    if not bool(torch.isfinite(weights).all()):
        row, column = (int(i) for i in (~torch.isfinite(weights)).nonzero()[0])
        raise ic.PlanError(f"{what}: the weight of prompt token {column} in vector {row} is {weights[row, column]}")
    return weights


def checked_count(what: str, value: Any, least: int) -> int:
    """A whole number.

    Raises:
        PlanError: something else, or a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ic.PlanError(ic.errors.wrong(what, f"a whole number from {least} on", value))
    return value


def checked_kept(kept: Any, size: int, what: str) -> Bool[Tensor, " prompt"]:
    """Which prompt tokens are ranked, as a mask (None: all; or their indices).

    Raises:
        PlanError: other tokens than the prompt's, or none.
    """
    if kept is None:
        return torch.ones(size, dtype=torch.bool)
    kept = torch.as_tensor(kept).cpu()
    if kept.dtype != torch.bool:
        bad = [int(i) for i in kept.flatten() if not 0 <= i < size]
        if bad or kept.ndim != 1:
            raise ic.PlanError(f"{what} takes tokens of the prompt, 0 to {size - 1}, not {bad[:5] or list(kept.shape)}")
        kept = torch.zeros(size, dtype=torch.bool).index_fill(0, kept.long(), True)
    if list(kept.shape) != [size]:
        raise ic.PlanError(f"{what} is a mask of {list(kept.shape)}, the prompt has {size} tokens")
    return kept


def checked_deleted(owner: str, kept: Any, size: int, steps: Any) -> Bool[Tensor, " prompt"]:
    """Which prompt tokens are deleted, in how many steps.

    Raises:
        PlanError: none of them, other tokens, or no steps.
    """
    keep = checked_kept(kept, size, f"{owner}: kept=")
    if not bool(keep.any()):
        raise ic.PlanError(f"{owner}: kept= leaves no prompt token to delete; give at least one, or None for all")
    checked_count(f"{owner}: steps=", steps, 1)
    return keep


def named(names: Sequence[str], count: int, what: str) -> tuple[str, ...]:
    """Names of vectors; numbers where none are given.

    Raises:
        PlanError: another number of them.
    """
    if names and len(names) != count:
        raise ic.PlanError(f"{what}: {len(names)} names for {count} vectors")
    return tuple(names) or tuple(map(str, range(count)))


def ordered(
    weights: Float[Tensor, "vector prompt"], kept: Bool[Tensor, " prompt"], seed: int | None = None
) -> Int[Tensor, "vector ranked"]:
    """Prompt tokens in descending weight, of those that are kept.

    Args:
        seed: None: among equals the lower position first; else a random order among equals.
    """
    candidates = kept.nonzero()[:, 0]
    if seed is not None:
        # the sort is stable: shuffled before, equal weights come out in that random order
        shuffled = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        candidates = candidates[shuffled]
    return candidates[weights[:, candidates].argsort(dim=1, descending=True, stable=True)]


def checked_order(order: Any, kept: Bool[Tensor, " prompt"], vectors: int) -> Int[Tensor, "vector ranked"]:
    """An order that was given, one row per vector.

    Raises:
        PlanError: not each of the kept tokens once.
    """
    order = torch.atleast_2d(torch.as_tensor(order)).long().cpu()
    wanted = kept.nonzero()[:, 0]
    if order.shape != (vectors, len(wanted)) or not bool((order.sort(dim=1).values == wanted).all()):
        raise ic.PlanError(
            f"order= takes, for each of {vectors} vectors, every one of the {len(wanted)} ranked prompt tokens once, "
            f"highest weight first; it is {list(order.shape)}"
        )
    return order


def step_sizes(count: int, steps: int) -> list[int]:
    """How many tokens each step deletes: K = min(steps, count) groups, the first ones larger."""
    groups = min(steps, count)
    return [count // groups + (number < count % groups) for number in range(groups)]


def deletion_steps(order: Int[Tensor, "vector ranked"], steps: int, size: int) -> Int[Tensor, "vector prompt"]:
    """The step in which each prompt token is deleted; -1 for those that never are."""
    sizes = torch.tensor(step_sizes(order.shape[1], steps))
    number = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    out = torch.full((len(order), size), -1, dtype=torch.long)
    return out.scatter_(1, order, number.expand(order.shape))


def tied_share(weights: Float[Tensor, "vector prompt"], kept: Bool[Tensor, " prompt"]) -> Float[Tensor, " vector"]:
    """Share of the ranked tokens whose weight another ranked token has too."""
    out = []
    for row in weights[:, kept]:
        counts = torch.unique(row, return_inverse=True, return_counts=True)[1:]
        out.append((counts[1][counts[0]] > 1).double().mean())
    return torch.stack(out)
