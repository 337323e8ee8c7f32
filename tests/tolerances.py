"""How far two computations of one number may lie apart: what their arithmetic says, not what one processor does.

*The same operations on the same shapes* (hooks by hand against ours, engine against engine) give the same bits on any
processor, or nearly: such tests keep limits far below the model's dtype, or `torch.equal`.

*The same number by other shapes* (a row alone or in a batch, with the cache or without, many variants at once, a token
alone) comes from sums in another order: kernels are chosen by shape, and their vectors are as wide as the processor's.
Then what counts is the coarsest dtype that a value passes through. Most families' norms, rotary angles, routers or
linear attention compute in float32 whatever the model's dtype is, so float64 models are no better than float32 there.
`rounding` asks the model itself.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import interp_core as ic
from interp_core.batteries.sites import coarsest

GROWTH = 256
"""Roundings of `eps` in what comes out of a tiny model, relative to the largest value there: sums of up to 96 terms in
another order differ by about their square root (10), some 25 operations lie one behind the other in three layers and
add up by their square root again (5), and attention and gates sharpen differences (5)."""


def in_float32(family: str, site: str) -> bool:
    """Whether an edit of a site goes on in float32 whatever the model's dtype: routers, and the eager attention
    function of GPT-J, which takes over what was edited before the scores."""
    return site.startswith("router") or (family == "gptj" and site in ("rot_q", "rot_k", "v"))


@cache
def rounding(model: ic.Model) -> float:
    """Relative difference that a change of shapes can make in a model."""
    return GROWTH * torch.finfo(coarsest(model)).eps


def close(found: Tensor, wanted: Tensor, model: ic.Model, *, size: Tensor | float | None = None) -> None:
    """Assert that two computations by other shapes agree, relative to the largest value.

    Args:
        size: of what `wanted` is a difference of. Logits, log-probabilities and shares, which effects are made of, are
            of order one, so without it one is the least.
    """
    found, wanted = found.as_subclass(Tensor), wanted.as_subclass(Tensor)
    largest = max(1.0, float(wanted.detach().abs().max())) if size is None else float(size)
    torch.testing.assert_close(found, wanted, atol=rounding(model) * largest, rtol=0)


def same_choice(found: int, wanted: int, values: Tensor, slack: float) -> bool:
    """Whether two choices of the largest of `values` `[n]` are one, or lie within rounding of a tie."""
    return found == wanted or bool((values[found] - values[wanted]).abs() <= slack * values.abs().max())


def agreeing(found: Tensor, wanted: Tensor, logits: Tensor, slack: float) -> int:
    """How many greedily chosen tokens `[new]` are the same; where they part, `logits` `[new vocab]` must be tied."""
    for step, (one, other) in enumerate(zip(found.tolist(), wanted.tolist(), strict=True)):
        if one != other:
            assert same_choice(one, other, logits[step], slack), (found, wanted, step)
            return step
    return len(found)


def possible_ranks(values: Tensor, chosen: Tensor, slack: float | Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest rank that rounding can give the `chosen` `[…]` among `values` `[… n]`."""
    mine = values.gather(-1, chosen[..., None])
    return (values > mine + slack).sum(-1), (values >= mine - slack).sum(-1) - 1
