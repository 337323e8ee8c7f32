"""Families of which nothing is particular but how their routers select experts, and where.

transformers has most of them call the experts' module with what the router's module returned, as Mixtral does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .family import Family, Heads
from .granite import SHARED, SHARED_MLP
from .qwen3_moe import ROUTER as QWEN_ROUTER
from .qwen3_vl import CARRIED, NEEDS
from .routing import Router, Selection, TopKOfLogits, shares
from .scored import BIAS, SIGMOID_IN_GROUPS, HandedRouter, Scored, sigmoid, sigmoid_as_is
from .streams import muse_added, muse_join


class CohereSelection(Selection):
    """Top-k of the logits, then a softmax over these or their sigmoids, as the config says."""

    def weigh(self, router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """See `Selection.weigh`."""
        best = logits.gather(-1, chosen)
        if router.expert_selection_fn == "softmax":
            return torch.softmax(best, -1, dtype=torch.float)
        weights = best.sigmoid()
        return weights / weights.sum(-1, keepdim=True) if router.norm_topk_prob else weights

    def probs(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.probs`."""
        return super().probs(router, logits) if router.expert_selection_fn == "softmax" else shares(logits.sigmoid())


def mimo_heads(attention: Any, _heads: Heads) -> Heads:
    """MiMo: keys are wider than values (which are scaled before they are mixed), and layers with windows have more."""
    n = attention.config.num_attention_heads
    return Heads(n, n // attention.num_key_value_groups, attention.v_head_dim, attention.head_dim)


class NarrowRouter(Router):
    """Muse Spark: experts add up in fewer dimensions, before a projection to the stream."""

    def absent(self, module: Any) -> Mapping[str, str]:
        """See `Router.absent`."""
        return {
            "expert_out": "experts add up in moe_hidden_size dimensions, before post_expert_proj, not in the stream's"
        }


IN_GROUPS = Router("mlp.gate", "mlp.experts", SIGMOID_IN_GROUPS)

SOLAR = Family("solar_open", router=IN_GROUPS)
MIMO = Family("mimo_v2_flash", heads=mimo_heads, inside=("v",), router=IN_GROUPS)
MELLUM = Family("mellum", router=QWEN_ROUTER)
LARA = Family("lara_mini", paths={"blocks.linear_attn": "linear_attn"}, router=QWEN_ROUTER)
FLINT = Family("flint", router=Router("mlp.gate", "mlp.experts", Scored(sigmoid, renormalise="norm_topk_prob")))
HY3 = Family(
    "hy_v3",
    router=HandedRouter("mlp.gate", "mlp.experts", Scored(sigmoid, BIAS, eps=1e-20, scale="router_scaling_factor")),
)
COHERE = Family(
    "cohere2_moe",
    parallel=lambda _config: True,
    router=Router("mlp.gate", "mlp.experts", CohereSelection()),
)
SIGMOIDS = Router("mlp.gate", "mlp.experts", Scored(sigmoid, BIAS))
LAGUNA = Family("laguna", router=SIGMOIDS)
MINIMAX_M3 = Family("minimax_m3_vl", router=SIGMOIDS)
MUSE_SPARK = Family(
    "muse_spark",
    added=muse_added,
    join=muse_join,
    router=NarrowRouter("mlp.gate", "mlp.experts", Scored(sigmoid, BIAS, eps=1e-15, scale="routed_scaling_factor")),
)
STEP = Family("step3p7", router=SIGMOIDS)
DOTS = Family("dots1", router=IN_GROUPS)
EXAONE = Family("exaone_moe", router=IN_GROUPS)
FLEX_OLMO = Family("flex_olmo", router=QWEN_ROUTER)
HUNYUAN = Family(
    "hunyuan_v1_moe",
    paths={"blocks.attn.q_norm": "query_layernorm", "blocks.attn.k_norm": "key_layernorm"},
    router=Router("mlp.gate", "mlp.experts", Scored()),
)
MINIMAX_M2 = Family("minimax_m2", router=HandedRouter("mlp.gate", "mlp.experts", Scored(sigmoid, BIAS)))
ERNIE = Family(
    "ernie4_5_moe", router=Router("mlp.gate", "mlp.experts", Scored(bias=f"moe_statics.{BIAS}", least="norm_min"))
)
JAMBA = Family(
    "jamba",
    router=Router("feed_forward.router", "feed_forward.experts", Scored(renormalise=False)),
)
LFM2 = Family(
    "lfm2_moe",
    router=HandedRouter(
        "feed_forward.gate",
        "feed_forward.experts",
        Scored(sigmoid_as_is, BIAS, renormalise="norm_topk_prob", eps=1e-6, scale="routed_scaling_factor"),
    ),
)
AFMOE = Family(
    "afmoe",
    router=HandedRouter("mlp.router", "mlp.experts", Scored(sigmoid, BIAS, eps=1e-20, scale="route_scale")),
)
ARIA = Family("aria", router=Router("mlp.router", "mlp.experts", TopKOfLogits()))
GLM4V = Family("glm4v_moe", router=IN_GROUPS, carried=CARRIED, needs=NEEDS)
QWEN_OMNI = Family("qwen3_omni_moe_thinker", router=QWEN_ROUTER, carried=CARRIED)
GRANITE_HYBRID = Family("granitemoehybrid", paths=SHARED_MLP, **SHARED)


def nemotron_paths(block: Any) -> Mapping[str, str]:
    """Nemotron-H: a block has one mixer, of attention, a state space model or experts."""
    kinds = {"full_attention": "blocks.attn", "linear_attention": "blocks.mixer"}
    return {kinds.get(block.block_type, "blocks.mlp"): "mixer"}


def latent_experts(config: Any) -> Mapping[str, str]:
    """Experts of Nemotron 3 may work in fewer dimensions than the stream has."""
    why = "experts add up in moe_latent_size dimensions, before fc2_latent_proj, not in the stream's"
    return {"expert_out": why} if config.moe_latent_size else {}


NEMOTRON = Family(
    "nemotron_h",
    paths={
        "blocks": "model.layers", "embed": "model.embeddings", "ln_final": "model.norm_f", "blocks.ln1": "norm",
    } | {f"blocks.attn.{part}": f"mixer.{part}_proj" for part in "qkvo"}
    | {"blocks.mlp.in": "mixer.up_proj|", "blocks.mlp.out": "mixer.down_proj|"},
    varied=nemotron_paths,
    refuse_if=latent_experts,
    router=Router("mixer.gate", "mixer.experts", SIGMOID_IN_GROUPS),
)  # fmt: skip
