"""Expert selection by hand, token by token, for every family with a router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        total = _total(family, config, scores[chosen]) + 1e-20
        weights[chosen] = scores[chosen] / total * config.routed_scaling_factor
        return weights
    chosen = sorted(range(len(logits)), key=lambda e: -float(logits[e]))[:k]
    if family == "llama4":
        weights[chosen] = torch.sigmoid(logits[chosen].float()).to(logits.dtype)
    elif family in TOP_K_FIRST:
        weights[chosen] = logits[chosen].softmax(0)
    else:
        shares = logits.float().softmax(0)
        weights[chosen] = (shares[chosen] / _total(family, config, shares[chosen])).to(logits.dtype)
    return weights


def _total(family: str, config: Any, weights: Tensor) -> Tensor | int:
    """What the weights of a token are divided by."""
    return weights.sum() if family == "qwen3_5_moe" or getattr(config, "norm_topk_prob", True) else 1


def _by_groups(config: Any, bias: Tensor, logits: Tensor, k: int) -> list[int]:
    """Experts of the groups whose two best are best together; banned ones count for nothing."""
    size = len(logits) // config.n_group
    choice = {e: float(torch.sigmoid(logits[e]) + bias[e]) for e in range(len(logits)) if logits[e] != float("-inf")}
    groups = [[e for e in range(g * size, (g + 1) * size) if e in choice] for g in range(config.n_group)]
    worth = {g: sum(sorted((choice[e] for e in group), reverse=True)[:2]) for g, group in enumerate(groups) if group}
    kept = sorted(worth, key=lambda g: -worth[g])[: config.topk_group]
    left = [e for g in kept for e in groups[g]]
    return sorted(left, key=lambda e: -choice[e])[:k]


def route_edited(family: str, config: Any, module: Any, logits: Tensor, op: str, value: Any) -> Tensor:
    """Dense weights `[n expert]` after an edit of what a router selects, token by token."""
    rows = []
    for row in logits:
        own = route(family, config, module, row[None])[0]
        rows.append(_edited(family, config, module, row, own, op, value))
    return torch.stack(rows)


def _edited(family: str, config: Any, module: Any, logits: Tensor, own: Tensor, op: str, value: Any) -> Tensor:
    chosen = [e for e in range(len(own)) if own[e] != 0]
    if op.startswith("boost"):
        experts, factor = value
        new = own.clone()
        for e in experts:
            new[e] = own[e] * factor
        return new * (own.sum() / new.sum()) if op == "boost_renormalised" else new
    if op in ("mask_keep", "mask_drop"):
        left = [e for e in chosen if e not in value]
        if not left:
            return own
        new = torch.zeros_like(own)
        new[left] = own[left]
        return new * (own.sum() / new.sum()) if op == "mask_keep" else new
    logits = logits.clone()
    if op == "mask":
        logits[list(value)] = float("-inf")
        return route(family, config, module, logits[None])[0]
    if op == "force_steermoe":
        logits[list(value)] = logits.max() + 0.01
        raised = route(family, config, module, logits[None])[0]
        chosen = [e for e in range(len(own)) if raised[e] != 0]
    strength = _strength(family, module, logits)
    others = sorted((e for e in chosen if e not in value), key=lambda e: -strength[e])
    kept = others[: config.num_experts_per_tok - len(value)]
    return _weighed(family, config, logits, [*value, *kept])


def _strength(family: str, module: Any, logits: Tensor) -> list[float]:
    return (torch.sigmoid(logits) + module.e_score_correction_bias if family in GROUPED else logits).tolist()


def _weighed(family: str, config: Any, logits: Tensor, chosen: list[int]) -> Tensor:
    """The family's weights of a given set."""
    weights = torch.zeros_like(logits)
    if family in GROUPED:
        scores = torch.sigmoid(logits[chosen])
        weights[chosen] = scores / (_total(family, config, scores) + 1e-20) * config.routed_scaling_factor
    elif family == "llama4":
        weights[chosen] = torch.sigmoid(logits[chosen].float()).to(logits.dtype)
    elif family in TOP_K_FIRST:
        weights[chosen] = logits[chosen].softmax(0)
    else:
        shares = logits.float().softmax(0)
        weights[chosen] = (shares[chosen] / _total(family, config, shares[chosen])).to(logits.dtype)
    return weights
