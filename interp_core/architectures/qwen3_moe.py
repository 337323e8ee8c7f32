"""Qwen3-MoE: softmax over all experts, then top-k, renormalised if the config says so; some layers may be dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family, Router


def select(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and indices that the router derives from `logits` `[n expert]`."""
    weights, indices = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float), router.top_k, dim=-1)
    if router.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), indices


FAMILY = Family("qwen3_moe", router=Router("mlp.gate", "mlp.experts", select))
