"""Where further families keep their routers, and how these select: written out by hand, token by token.

Nothing here comes from the atlas or its selections; rules are in plain Python numbers, from reading transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Numbers = dict[int, float]
"""By expert; banned ones are not in it."""


@dataclass(frozen=True)
class Mixture:
    """One family's mixture of experts.

    Attributes:
        router, experts: modules in the block.
        layers: with a router.
        score: what logits are turned into.
        bias: of the block, what is added to scores for the choice.
        groups: how a group's scores count, where the best groups are chosen first.
        normed: whether chosen scores are divided by their sum.
        scale: of the config, the factor on weights.
        k: of the config, how many experts a token has.
        shared: modules whose outputs are added to the experts'.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    layers: tuple[int, ...] = (1, 2)
    score: str = "softmax"
    bias: str = ""
    groups: str = ""
    normed: bool = True
    scale: str = ""
    k: str = "num_experts_per_tok"
    shared: tuple[str, ...] = ()
    blocks: str = "model.layers"

    def block(self, hf: nn.Module, layer: int) -> nn.Module:
        return hf.get_submodule(f"{self.blocks}.{layer}")


_ALL = (0, 1, 2)
_SHARED = ("mlp.shared_experts",)
_V3 = Mixture(
    score="sigmoid",
    bias="mlp.gate.e_score_correction_bias",
    groups="two",
    scale="routed_scaling_factor",
    shared=_SHARED,
)
_GRANITE = Mixture("block_sparse_moe.router", "block_sparse_moe.experts", _ALL, score="top", shared=("shared_mlp",))

MIXTURES: dict[str, Mixture] = {
    "phimoe": Mixture("mlp.router", layers=_ALL, score="slots"),
    "deepseek_v2": Mixture(groups="one", normed=False, scale="routed_scaling_factor", shared=_SHARED),
    "ernie4_5_moe": Mixture(bias="mlp.gate.moe_statics.e_score_correction_bias", k="moe_k", shared=_SHARED),
    "minimax": Mixture(layers=_ALL),
    "minimax_m2": Mixture(layers=_ALL, score="sigmoid", bias="mlp.e_score_correction_bias"),
    "gemma4": Mixture("router", "experts", _ALL, k="top_k_experts"),
    "hunyuan_v1_moe": Mixture(layers=_ALL, k="moe_topk", shared=("mlp.shared_mlp",)),
    "jamba": Mixture("feed_forward.router", "feed_forward.experts", (0, 2), normed=False),
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "glm4_moe_lite": _V3,
    "dots1": _V3,
    "nemotron_h": Mixture(
        "mixer.gate", "mixer.experts", (0, 3), score="sigmoid", bias="mixer.gate.e_score_correction_bias", groups="two",
        scale="routed_scaling_factor", shared=("mixer.shared_experts",),
    ),
    "exaone_moe": _V3,
    "lfm2_moe": Mixture(
        "feed_forward.gate", "feed_forward.experts", score="sigmoid", bias="feed_forward.expert_bias",
        scale="routed_scaling_factor",
    ),
    "afmoe": Mixture("mlp.router", score="sigmoid", bias="mlp.expert_bias", scale="route_scale", shared=_SHARED),
    "flex_olmo": Mixture(layers=_ALL, normed=False),
    "mistral4": Mixture(groups="two", scale="routed_scaling_factor", shared=_SHARED),
    "deepseek_v4": Mixture(
        score="sqrtsoftplus", bias="mlp.gate.e_score_correction_bias", scale="routed_scaling_factor", shared=_SHARED
    ),
    "longcat_flash": Mixture(
        "mlp.router", layers=_ALL, bias="mlp.router.e_score_correction_bias", normed=False, scale="routed_scaling_factor",
        k="moe_topk",
    ),
    "jetmoe": Mixture("mlp.router", "mlp.output_linear", _ALL, score="top"),
    "aria": Mixture("mlp.router", layers=_ALL, score="top", k="moe_topk", shared=_SHARED),
    "axk1": _V3,
    "deepseek_v32": _V3,
    "glm_moe_dsa": _V3,
    "kimi_linear": _V3,
    "bailing_hybrid": _V3,
    "mimo_v2_flash": replace(_V3, shared=()),
    "solar_open": replace(_V3, layers=_ALL),
    "mellum": Mixture(layers=_ALL),
    "lara_mini": Mixture(layers=_ALL, shared=("mlp.shared_expert",)),
    "flint": Mixture(layers=(2,), score="sigmoid", shared=("mlp.shared_expert",)),
    "hy_v3": Mixture(score="sigmoid", bias="mlp.e_score_correction_bias", scale="router_scaling_factor", shared=_SHARED),
    "cohere2_moe": Mixture(layers=_ALL, score="sigmoid", shared=_SHARED),
    "kolibri1": Mixture(layers=_ALL, score="sigmoid of the biased", bias="mlp.gate.e_score_correction_bias", shared=_SHARED),
    "laguna": Mixture(score="sigmoid", bias="mlp.gate.e_score_correction_bias", shared=_SHARED),
    "glm4v_moe": replace(_V3, blocks="model.language_model.layers"),
    "qwen3_omni_moe_thinker": Mixture(layers=_ALL, blocks="model.language_model.layers"),
    "granitemoe_swa": replace(_GRANITE, shared=()),
}  # fmt: skip


def route(family: str, hf: Any, layer: int, logits: Tensor) -> Numbers:
    """Executed weights of one token, by expert."""
    mixture, config = MIXTURES[family], hf.config.get_text_config()
    block = mixture.block(hf, layer)
    left = {e: float(z) for e, z in enumerate(logits.tolist()) if z != float("-inf")}
    k = getattr(config, mixture.k)
    if mixture.score == "slots":
        return _slots(left, k, config.router_jitter_noise)
    scores = _scores(mixture.score, left)
    bias = _attribute(block, mixture.bias).flatten().tolist() if mixture.bias else [0.0] * len(logits)
    choice = {e: score + bias[e] for e, score in (left if mixture.score == "sigmoid of the biased" else scores).items()}
    if mixture.groups:
        choice = _best_groups(choice, len(logits) // config.n_group, config.topk_group, mixture.groups)
    chosen = sorted(choice, key=lambda e: -choice[e])[:k]
    if mixture.score == "top":
        return _scores("softmax", {e: left[e] for e in chosen})
    total = sum(scores[e] for e in chosen) if mixture.normed else 1.0
    scale = getattr(config, mixture.scale) if mixture.scale else 1.0
    by_expert = block.router.per_expert_scale.tolist() if family == "gemma4" else [1.0] * len(logits)
    return {e: scores[e] / total * scale * by_expert[e] for e in chosen}


def _scores(kind: str, logits: Numbers) -> Numbers:
    if kind.startswith("sigmoid"):
        return {e: 1 / (1 + math.exp(-z)) for e, z in logits.items()}
    if kind == "sqrtsoftplus":
        return {e: math.sqrt(math.log1p(math.exp(z))) for e, z in logits.items()}
    if kind == "top":
        return logits
    most = max(logits.values())
    total = sum(math.exp(z - most) for z in logits.values())
    return {e: math.exp(z - most) / total for e, z in logits.items()}


def _best_groups(choice: Numbers, size: int, kept: int, count: str) -> Numbers:
    """Experts of the groups that are worth most, by their best or their two best experts."""
    groups: dict[int, list[int]] = {}
    for expert in choice:
        groups.setdefault(expert // size, []).append(expert)
    n = {"one": 1, "two": 2}[count]
    worth = {g: sum(sorted((choice[e] for e in group), reverse=True)[:n]) for g, group in groups.items()}
    best = sorted(worth, key=lambda g: -worth[g])[:kept]
    return {e: choice[e] for g in best for e in groups[g]}


def _slots(logits: Numbers, k: int, jitter: float) -> Numbers:
    """Phi's sparse mixer: the best that is left, weighed among those within a band below it."""
    left, weights = dict(logits), {}
    for _ in range(min(k, len(logits))):
        best = max(left, key=lambda e: left[e])
        near = {e: z for e, z in left.items() if (left[best] - z) / max(abs(z), left[best]) <= 2 * jitter}
        weights[best] = _scores("softmax", near)[best]
        del left[best]
    return weights


def _attribute(block: nn.Module, path: str) -> Tensor:
    value: Any = block
    for name in path.split("."):
        value = getattr(value, name)
    return value


def by_hand(family: str, hf: Any, layer: int, logits: Tensor) -> Tensor:
    """Executed weights `[batch pos expert]` of logits."""
    dense = torch.zeros(logits.shape, dtype=torch.float64)
    for b, row in enumerate(logits):
        for p, token in enumerate(row):
            for expert, weight in route(family, hf, layer, token).items():
                dense[b, p, expert] = weight
    return dense
