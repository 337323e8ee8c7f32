"""DiffLlama: what a head gives is a difference of two softmax patterns' mixtures (Ye et al. 2024, arXiv:2410.05258).

Heads go in pairs, h and h + n/2. Each has a pattern of its own, and both mix the same values, which are twice as wide:
a value head of the first half beside one of the second. The mixture of the second times lambda is taken from that of
the first, and normed: `z` has a pair's difference, laid out as two heads that follow each other. The module calls
attention twice, for each half of the values, with the same queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family


def mixed(attention: Any, pattern: Tensor, v: Tensor) -> Tensor:
    """`z` by patterns and values."""
    values = torch.cat([half.repeat(1, 1, 2, 1) for half in v.chunk(2, 2)], -1)
    values = values.repeat_interleave(pattern.shape[1] // values.shape[2], 2)
    first, second = torch.einsum("bhqk,bkhd->bqhd", pattern, values).chunk(2, 2)
    plus, minus = ((q * k).sum().exp() for q, k in (
        (attention.lambda_q1, attention.lambda_k1), (attention.lambda_q2, attention.lambda_k2)
    ))  # fmt: skip
    difference = first - (plus - minus + attention.lambda_init) * second
    normed: Tensor = (1 - attention.lambda_init) * attention.groupnorm(difference)
    return normed.reshape(*normed.shape[:2], -1, v.shape[-1])


FAMILY = Family("diffllama", mixed=mixed, calls=2)
