"""Expert selection by hand, token by token, for every family with a router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNNORMED = ("qwen2_moe", "olmoe")
TOP_K_FIRST = ("gpt_oss", "granitemoe")
GROUPED = ("deepseek_v3", "glm4_moe")


def route(family: str, config: Any, module: Any, logits: Tensor) -> Tensor:
    """Dense weights `[n expert]` for logits `[n expert]`; minus infinity is never chosen."""
    scores = torch.sigmoid(logits)
    return torch.stack([_token(family, config, module, row, s) for row, s in zip(logits, scores, strict=True)])


def _token(family: str, config: Any, module: Any, logits: Tensor, scores: Tensor) -> Tensor:
    k = config.num_experts_per_tok
    weights = torch.zeros_like(logits)
    if family in GROUPED:
        chosen = _by_groups(config, module.e_score_correction_bias, logits, k)
        weights[chosen] = scores[chosen] / (scores[chosen].sum() + 1e-20) * config.routed_scaling_factor
        return weights
    chosen = sorted(range(len(logits)), key=lambda e: -float(logits[e]))[:k]
    if family == "llama4":
        weights[chosen] = torch.sigmoid(logits[chosen].float()).to(logits.dtype)
    elif family in TOP_K_FIRST:
        weights[chosen] = logits[chosen].softmax(0)
    else:
        shares = logits.float().softmax(0)
        total = 1 if family in UNNORMED else shares[chosen].sum()
        weights[chosen] = (shares[chosen] / total).to(logits.dtype)
    return weights


def _by_groups(config: Any, bias: Tensor, logits: Tensor, k: int) -> list[int]:
    """Experts of the groups whose two best are best together; banned ones count for nothing."""
    size = len(logits) // config.n_group
    choice = {e: float(torch.sigmoid(logits[e]) + bias[e]) for e in range(len(logits)) if logits[e] != float("-inf")}
    groups = [[e for e in range(g * size, (g + 1) * size) if e in choice] for g in range(config.n_group)]
    worth = {g: sum(sorted((choice[e] for e in group), reverse=True)[:2]) for g, group in enumerate(groups) if group}
    kept = sorted(worth, key=lambda g: -worth[g])[: config.topk_group]
    left = [e for g in kept for e in groups[g]]
    return sorted(left, key=lambda e: -choice[e])[:k]
