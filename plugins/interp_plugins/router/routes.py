"""Alternative routes of a token: other sets of as many experts, which cost the same.

    gumbel      top-k of log p / temperature + Gumbel noise: k experts drawn without replacement by the router's p;
                sets drawn before, and the native one, are dropped and drawn again (a sure router runs out of others)
    swap_last   ranks 1 … k-1, and in the place of the last one of ranks k+1 … k+m. Ranks are by p, the chosen first: a
                correction bias or groups, where they overrule p, say who is native and nothing else
    random      sets of k experts, all equally likely, none twice and none native

p are the family's scores as probabilities (`S.router_probs`); with a softmax log p is the router's logits, up to a
constant that no draw sees.

Source: equal-compute routes of arXiv:2605.07260, whose abstract leaves number and temperature open.
Cost: `draws` · k log E of a token and layer; no model runs.
Must equal: swap_last by hand; frequencies of two-expert sets drawn by Gumbel noise, by the Plackett-Luce formula.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["gumbel", "swap_last"]
Route = tuple[int, ...]
"""Experts of a token, ascending."""
COUNTS: dict[Kind, int] = {"gumbel": 16, "swap_last": 4}
DRAWS = 64
"""Draws for each alternative that is wanted, at most."""
LISTED = 4096
"""Up to so many possible sets are listed and shuffled; of more, sets are drawn until there are enough."""


def alternatives(
    kind: Kind, probs: Float[Tensor, " expert"], native: Route, count: int, temperature: float, seed: torch.Generator
) -> list[Route]:
    """Up to `count` routes of a token, none of them native, none twice."""
    if kind == "swap_last":
        return swapped(probs, native, count)
    logits = torch.log(probs.double().clamp(min=1e-45)) / temperature
    return _distinct(logits, native, count, DRAWS * count, seed)


def swapped(probs: Float[Tensor, " expert"], native: Route, count: int) -> list[Route]:
    """The weakest of a set replaced by one of the `count` strongest outside it; the strongest first."""
    order = probs.double().argsort(descending=True, stable=True).tolist()
    inside, outside = [e for e in order if e in native], [e for e in order if e not in native]
    return [tuple(sorted((*inside[:-1], expert))) for expert in outside[:count]]


def random_routes(n_experts: int, native: Route, count: int, seed: torch.Generator) -> list[Route]:
    """`count` routes that the router has no say in, or as many as there are."""
    k = len(native)
    if math.comb(n_experts, k) <= LISTED:
        sets = [route for route in combinations(range(n_experts), k) if route != native]
        order = torch.randperm(len(sets), generator=seed)[:count].tolist()
        return [sets[i] for i in order]
    return _distinct(torch.zeros(n_experts, dtype=torch.float64), native, count, DRAWS * count, seed)


def _distinct(
    logits: Float[Tensor, " expert"], native: Route, count: int, draws: int, seed: torch.Generator
) -> list[Route]:
    """The first `count` different sets among so many draws."""
    kept: dict[Route, None] = {}
    # twice as many at a time as are wanted, since some repeat a set; a sure router is given up after `draws`
    for first in range(0, draws, 2 * count):
        noise = torch.rand(min(2 * count, draws - first), len(logits), generator=seed, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(noise.clamp(1e-300, 1 - 1e-16)))
        for row in (logits + gumbel).topk(len(native)).indices.sort(-1).values.tolist():
            if (route := tuple(row)) != native:
                kept.setdefault(route)
            if len(kept) == count:
                return list(kept)
    return list(kept)


def log_score(probs: Float[Tensor, " expert"], route: Route) -> float:
    """Σ log p over a route's experts: how much the router likes it, as far as experts go one by one."""
    return float(np.log(np.maximum(probs.double().numpy()[list(route)], 1e-45)).sum())
