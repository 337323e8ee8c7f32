"""Where further families keep their routers, and how these select: written out by hand, token by token.

Nothing here comes from the atlas or its selections; rules are in plain Python numbers, from reading transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import attrgetter
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
        normed: whether chosen scores are divided by their sum; None: as the config says.
        scale: of the config, the factor on weights.
        k: of the config, how many experts a token has.
        shared: modules whose outputs are added to the experts'.
        after: attribute of the MLP that multiplies what experts add up to.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    layers: tuple[int, ...] = (1, 2)
    score: str = "softmax"
    bias: str = ""
    groups: str = ""
    normed: bool | None = None
    scale: str = ""
    k: str = "num_experts_per_tok"
    shared: tuple[str, ...] = ()
    after: str = ""
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
_V2 = Mixture(groups="one", normed=False, scale="routed_scaling_factor", shared=_SHARED)
_MISTRAL = Mixture(groups="two", scale="routed_scaling_factor", shared=_SHARED)
_GRANITE = Mixture("block_sparse_moe.router", "block_sparse_moe.experts", _ALL, score="top", shared=("shared_mlp",))

_INNER = "model.language_model.layers"
_ARIA = Mixture("mlp.router", layers=_ALL, score="top", k="moe_topk", shared=_SHARED)
_QWEN = Mixture(layers=_ALL, shared=("mlp.shared_expert",))
_M3 = Mixture(score="sigmoid", bias="mlp.gate.e_score_correction_bias", shared=_SHARED, after="routed_scaling_factor")
_M2 = Mixture(score="sigmoid", bias="mlp.gate.e_score_correction_bias")
_MUSE = replace(_M2, layers=_ALL, scale="routed_scaling_factor")
_INKLING2 = Mixture(layers=_ALL, score="sigmoid", bias="mlp.gate.e_score_correction_bias", scale="route_scale")
_LOOP = replace(_INKLING2, layers=(0, 2))  # the other one runs several times

MIXTURES: dict[str, Mixture] = {
    "phimoe": Mixture("mlp.router", layers=_ALL, score="slots"),
    "deepseek_v2": _V2,
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
    "flex_olmo": Mixture(layers=_ALL),
    "mistral4": _MISTRAL,
    "deepseek_v4": Mixture(
        score="sqrtsoftplus", normed=True, bias="mlp.gate.e_score_correction_bias", scale="routed_scaling_factor", shared=_SHARED
    ),
    "longcat_flash": Mixture(
        "mlp.router", layers=_ALL, bias="mlp.router.e_score_correction_bias", normed=False, scale="routed_scaling_factor",
        k="moe_topk",
    ),
    "jetmoe": Mixture("mlp.router", "mlp.output_linear", _ALL, score="top"),
    "aria": _ARIA,
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
    "laguna": _M3,
    "glm4v_moe": replace(_V3, blocks="model.language_model.layers"),
    "qwen3_omni_moe_thinker": Mixture(layers=_ALL, blocks="model.language_model.layers"),
    "granitemoe_swa": replace(_GRANITE, shared=()),
    "dbrx": Mixture("ffn.router", "ffn.experts", _ALL, k="ffn_config.moe_top_k", blocks="transformer.blocks"),
    "minimax_m3_vl_text": _M3,
    "MiniMaxM3SparseForConditionalGeneration": replace(_M3, blocks=_INNER),
    "qwen4_exp_text": _QWEN,
    "qwen4_exp": _QWEN,
    "Qwen4ExpForConditionalGeneration": replace(_QWEN, blocks=_INNER),
    "Qwen3VLMoeForConditionalGeneration": Mixture(layers=_ALL, blocks=_INNER),
    "Qwen3_5MoeForConditionalGeneration": replace(_QWEN, blocks=_INNER),
    "Kimi_K25ForConditionalGeneration": replace(_V3, blocks=_INNER),
    **{
        f"{name}ForConditionalGeneration": replace(mixture, blocks=_INNER)
        for name, mixture in {
            "DeepseekOcr2": _V2, "Dots3Note": _V3, "Glm5Next": _V3, "HYV4VL": _V3, "Inkling2": _INKLING2,
            "Inkling2Loop": _LOOP, "MistralLarge4": _MISTRAL, "MuseSpark": _MUSE, "Step3p7": replace(_M2, shared=_SHARED, after="routed_scaling_factor"), "UnlimitedOcr": replace(_V2, groups=""),
        }.items()
    },
    "AriaForConditionalGeneration": replace(_ARIA, blocks=_INNER),
    "hy_v4": _V3,
    "dots3_note_text": _V3,
    "dots3_note": _V3,
    "axk2": replace(_V3, groups="two, or nothing"),
    "beam": replace(_V3, scale="", shared=(), after="routed_scaling_factor"),
    "inkling_text": Mixture(
        score="sigmoid", bias="mlp.gate.e_score_correction_bias", scale="route_scale", shared=_SHARED
    ),
    "inkling2_text": _INKLING2,
    "inkling2_loop_text": _LOOP,
    "zaya": Mixture(layers=_ALL, bias="mlp.gate.balancing_biases", normed=False),
}  # fmt: skip
"""By family, or by the model type or class that a tiny model of is built by."""
ALONE: dict[str, tuple[str, str, Mixture]] = {
    "deepseek_ocr2": ("DeepseekOcr2TextTopkRouter", "DeepseekOcr2TextConfig", _V2),
    "glm5_next": ("Glm5NextTextTopkRouter", "Glm5NextTextConfig", _V3),
    "hy_v4_vl": ("HYV4VLTopkRouter", "HYV4VLTextConfig", _V3),
    "mistral_large4": ("MistralLarge4TextTopkRouter", "MistralLarge4TextConfig", _MISTRAL),
    "muse_spark": ("MuseSparkTopkRouter", "MuseSparkTextConfig", _MUSE),
    "step3p7": ("Step3p7TopKRouter", "Step3p7TextConfig", _M2),
    "unlimited_ocr": ("UnlimitedOcrTextTopkRouter", "UnlimitedOcrTextConfig", _V2),
}
"""Families whose routers are held alone: names of the router's class and its config's."""
STREAMS = (
    "Glm5NextForConditionalGeneration", "HYV4VLForConditionalGeneration", "Inkling2ForConditionalGeneration",
    "Inkling2LoopForConditionalGeneration", "MuseSparkForConditionalGeneration", "Qwen4ExpForConditionalGeneration",
    "deepseek_v4", "hy_v4", "inkling2_loop_text", "inkling2_text", "inkling_text",
    "qwen4_exp", "qwen4_exp_text", "zaya",
)  # fmt: skip
"""Whose blocks pass several streams on, or do more with what the MLP gives than to add it."""
SHARING = ("inkling_text",)
"""Whose routed experts are weighed along with shared ones, by logits of the router's."""
PASSING = ("zaya",)
"""Whose last expert stands for none."""


def mixture_of(model_type: str, family: str) -> str:
    """The name in `MIXTURES` for a model type; "" if there is none."""
    return next((name for name in (model_type, family) if name in MIXTURES), "")


def route(name: str, hf: Any, layer: int, logits: Tensor, shared: Tensor | None = None) -> Numbers:
    """Executed weights of one token, by expert.

    Args:
        shared: the token's logits of shared experts, where these are weighed too.
    """
    mixture, config = MIXTURES[name] if name in MIXTURES else ALONE[name][2], hf.config.get_text_config()
    block = mixture.block(hf, layer)
    left = {e: float(z) for e, z in enumerate(logits.tolist()) if z != float("-inf")}
    k = attrgetter(mixture.k)(config)
    if mixture.score == "slots":
        return _slots(left, k, config.router_jitter_noise)
    scores = _scores(mixture.score, left)
    biased = mixture.bias and getattr(config, "use_expert_bias", True)
    bias = _attribute(block, mixture.bias).flatten().tolist() if biased else [0.0] * len(logits)
    choice = {e: score + bias[e] for e, score in (left if mixture.score == "sigmoid of the biased" else scores).items()}
    if mixture.groups and config.n_group:
        choice = _best_groups(choice, len(logits) // config.n_group, config.topk_group, mixture.groups)
    # torch decides between equals: groups that are left out count the same nothing in A.X K2
    best = torch.tensor([choice.get(e, -math.inf) for e in range(len(logits))]).topk(k).indices.tolist()
    chosen = [e for e in best if e in left]
    if mixture.score == "top":
        return _scores("softmax", {e: left[e] for e in chosen})
    says = [getattr(config, word) for word in ("norm_topk_prob", "moe_renormalize") if hasattr(config, word)]
    normed = all(says) if mixture.normed is None else mixture.normed
    total = sum(scores[e] for e in chosen) if normed else 1.0
    if shared is not None:
        total += sum(_scores("sigmoid", dict(enumerate(shared.tolist()))).values())
    scale = getattr(config, mixture.scale) if mixture.scale else 1.0
    if name in SHARING:
        scale *= block.mlp.gate.global_scale.item()
    by_expert = block.router.per_expert_scale.tolist() if name == "gemma4" else [1.0] * len(logits)
    if name in PASSING:
        chosen = [e for e in chosen if e != len(logits) - 1]
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
    """Experts of the groups that are worth most, by their best or their two best experts; others are out, or count
    nothing."""
    groups: dict[int, list[int]] = {}
    for expert in choice:
        groups.setdefault(expert // size, []).append(expert)
    n = 1 if count == "one" else 2
    worth = {g: sum(sorted((choice[e] for e in group), reverse=True)[:n]) for g, group in groups.items()}
    best = sorted(worth, key=lambda g: -worth[g])[:kept]
    rest = [e for g in groups if g not in best for e in groups[g]] if "nothing" in count else []
    inside = [e for g in best for e in range(g * size, (g + 1) * size)]
    return {e: choice.get(e, torch.finfo(torch.float32).min) for e in inside} | dict.fromkeys(rest, 0.0)


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


def by_hand(name: str, hf: Any, layer: int, logits: Tensor, ids: Tensor) -> Tensor:
    """Executed weights `[batch pos expert]` of logits, for what a layer reads of some texts."""
    dense = torch.zeros(logits.shape, dtype=torch.float64)
    shared = shared_logits(name, hf, layer, ids) if name in SHARING else None
    for b, row in enumerate(logits):
        for p, token in enumerate(row):
            beside = None if shared is None else shared[b, p]
            for expert, weight in route(name, hf, layer, token, beside).items():
                dense[b, p, expert] = weight
    return dense


def shared_by_hand(name: str, hf: Any, layer: int, logits: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """What shared experts are weighed by `[batch pos shared]`, beside routed ones that have weights."""
    scale = getattr(hf.config.get_text_config(), MIXTURES[name].scale)
    scale *= MIXTURES[name].block(hf, layer).mlp.gate.global_scale.item()
    shared = shared_logits(name, hf, layer, ids).double().sigmoid()
    routed = (logits.double().sigmoid() * (weights != 0)).sum(-1, keepdim=True)
    return shared / (routed + shared.sum(-1, keepdim=True)) * scale


def shared_logits(name: str, hf: Any, layer: int, ids: Tensor) -> Tensor:
    """A router's logits of shared experts `[batch pos shared]`, in a plain pass."""
    gate = MIXTURES[name].block(hf, layer).get_submodule(MIXTURES[name].router)
    read: list[Tensor] = []
    handle = gate.register_forward_hook(lambda _m, args, _o: read.append(args[0]))
    try:
        with torch.no_grad():
            hf(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return (read[0].float() @ gate.weight.detach().float().T)[..., -gate.n_shared_experts :]
