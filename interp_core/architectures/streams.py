"""Families whose blocks scale or norm the stream itself, or what they add to it, in a way of their own.

BEAM, Doge, Dory, MiniMax, Muse Spark and RWKV do so before they add; ESM C, Kolibri, MiniCPM3 and OLMo-hybrid change
only what they add.

`attn_out` and `mlp_out` are what is added, after the block's multipliers; the stream goes on as `join` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .deepseek_v3 import FAMILY as DEEPSEEK_V3
from .family import Family
from .qwen3_moe import ROUTER as QWEN_ROUTER
from .routing import Router
from .scored import BIAS, SIGMOID_IN_GROUPS, BiasOnLogits, sigmoid


def beam_added(block: Any) -> Mapping[str, float]:
    """BEAM: the n-th thing that is added counts as one of n, by variance."""
    places = {"attn_out": block.attn_residual_add_idx, "mlp_out": block.mlp_residual_add_idx}
    return {name: 1 / math.sqrt(n) for name, n in places.items()}


def beam_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """BEAM: the stream before as the other n - 1."""
    n = block.attn_residual_add_idx if site == "resid_mid" else block.mlp_residual_add_idx
    return before * math.sqrt((n - 1) / n) + added


def doge_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """Doge: learnt factors on the stream, one per dimension."""
    return (block.input_residual if site == "resid_mid" else block.post_attention_residual) * before + added


def dory_added(block: Any) -> Mapping[str, Tensor]:
    """Dory: the share of what attention and MLP give in the stream after them, one per dimension."""
    rates = {"attn_out": block.lambda_1, "mlp_out": block.lambda_2}
    return {name: (rate.detach() * block.lambda_scale).abs() for name, rate in rates.items()}


def dory_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """Dory: the rest is the stream, normed as attention and the MLP read it."""
    name, norm = ("attn_out", "input_layernorm") if site == "resid_mid" else ("mlp_out", "pre_feedforward_layernorm")
    normed: Tensor = getattr(block, norm)(before)
    return normed * (1 - dory_added(block)[name]) + added


def minimax_added(block: Any) -> Mapping[str, float]:
    """MiniMax: "beta" of attention (by its kind) and of the MLP."""
    return {"attn_out": block.attn_beta_factor, "mlp_out": block.mlp_beta_factor}


def minimax_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """MiniMax: what is carried on is the norm that attention or the MLP reads, times "alpha"."""
    if site == "resid_mid":
        return block.input_layernorm(before) * block.attn_alpha_factor + added
    return block.post_attention_layernorm(before) * block.mlp_alpha_factor + added


def _muse_gate(block: Any, site: str) -> tuple[Tensor, Tensor]:
    """Muse Spark: the shares of the stream and of what is added, one per dimension."""
    name = "post_attention_residual_gate" if site in ("attn_out", "resid_mid") else "post_feedforward_residual_gate"
    gate = getattr(block, name)
    share = torch.sigmoid((gate.gate / gate.temperature).detach())
    return ((1 - share) * (1 + share)).clamp(min=gate.eps).sqrt(), share


def muse_added(block: Any) -> Mapping[str, Tensor]:
    """Muse Spark: attention's and the MLP's share, after their norms."""
    return {name: _muse_gate(block, name)[1] for name in ("attn_out", "mlp_out")}


def muse_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """Muse Spark: the stream is scaled so that the variance stays."""
    return _muse_gate(block, site)[0] * before + added


def rwkv_join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """RWKV: the first block norms the embeddings before anything else."""
    return (block.pre_ln(before) if site == "resid_mid" and block.layer_id == 0 else before) + added


def _evenly(factor: Callable[[Any], float]) -> Callable[[Any], Mapping[str, float]]:
    """One factor for attention and MLP."""
    return lambda block: dict.fromkeys(("attn_out", "mlp_out"), factor(block))


def olmo_hybrid_paths(block: Any) -> Mapping[str, str]:
    """OLMo-hybrid: blocks with linear attention norm what parts read, those with attention what parts give."""
    if hasattr(block, "linear_attn"):
        return {}
    return {"blocks.ln1_post": "post_attention_layernorm", "blocks.ln2": ""}


BEAM = Family(
    "beam",
    added=beam_added,
    join=beam_join,
    router=Router("mlp.gate", "mlp.experts", replace(SIGMOID_IN_GROUPS, scale="")),
)
DOGE = Family("doge", join=doge_join)
DORY = Family("dory", added=dory_added, join=dory_join)
ESMC = Family(
    "esmc",
    paths={"blocks.attn": "self_attn", "blocks.mlp": "mlp", "blocks.ln2": "post_attention_layernorm"},
    added=_evenly(lambda block: 1 / block.scaling_factor),
)
KOLIBRI = Family(
    "kolibri1",
    router=Router("mlp.gate", "mlp.experts", BiasOnLogits(sigmoid, BIAS, renormalise="norm_topk_prob")),
)
MINICPM3 = replace(DEEPSEEK_V3, name="minicpm3", router=None, added=_evenly(lambda block: block.residual_scale))
MINIMAX = Family("minimax", added=minimax_added, join=minimax_join, router=QWEN_ROUTER)
OLMO_HYBRID = Family("olmo_hybrid", varied=olmo_hybrid_paths)
RWKV = Family(
    "rwkv",
    paths={
        "blocks": "rwkv.blocks",
        "embed": "rwkv.embeddings",
        "ln_final": "rwkv.ln_out",
        "blocks.mlp": "feed_forward",
        "blocks.mlp.out": "value",
        "blocks.ln1": "ln1",
        "blocks.ln2": "ln2",
    },
    varied=lambda block: {"blocks.attn": "", "blocks.linear_attn": "attention"},
    join=rwkv_join,
)
