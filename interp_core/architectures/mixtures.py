"""Families of which nothing is particular but how their routers select experts, and where.

transformers has most of them call the experts' module with what the router's module returned, as Mixtral does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, Place, llama_like
from .granite import added
from .qwen3_moe import ROUTER as QWEN_ROUTER
from .routing import Router, SigmoidInGroups, TopKOfLogits
from .scored import BIAS, HandedRouter, Scored, sigmoid, sigmoid_as_is

_LLAMA = llama_like("model")
IN_GROUPS = Router("mlp.gate", "mlp.experts", SigmoidInGroups())

DOTS = Family("dots1", paths=_LLAMA, router=IN_GROUPS)
EXAONE = Family("exaone_moe", paths=_LLAMA, router=IN_GROUPS)
FLEX_OLMO = Family("flex_olmo", router=QWEN_ROUTER)
HUNYUAN = Family(
    "hunyuan_v1_moe",
    paths={**_LLAMA, "blocks.attn.q_norm": "query_layernorm", "blocks.attn.k_norm": "key_layernorm"},
    router=Router("mlp.gate", "mlp.experts", Scored()),
)
MINIMAX_M2 = Family("minimax_m2", router=HandedRouter("mlp.gate", "mlp.experts", Scored(sigmoid, BIAS)))
ERNIE = Family(
    "ernie4_5_moe",
    router=Router("mlp.gate", "mlp.experts", Scored(bias=f"moe_statics.{BIAS}", least="norm_min")),
)
JAMBA = Family(
    "jamba",
    paths={"blocks.linear_attn": "mamba"},
    router=Router("feed_forward.router", "feed_forward.experts", Scored(renormalise=False)),
)
LFM2 = Family(
    "lfm2_moe",
    paths={"blocks.linear_attn": "conv"},
    router=HandedRouter(
        "feed_forward.gate",
        "feed_forward.experts",
        Scored(sigmoid_as_is, BIAS, renormalise="norm_topk_prob", eps=1e-6, scale="routed_scaling_factor"),
    ),
)
AFMOE = Family(
    "afmoe",
    gated=True,
    router=HandedRouter("mlp.router", "mlp.experts", Scored(sigmoid, BIAS, eps=1e-20, scale="route_scale")),
)
ARIA_ROUTER = Router("mlp.router", "mlp.experts", TopKOfLogits())
ARIA_TEXT = Family("aria_text", paths=_LLAMA, router=ARIA_ROUTER)
ARIA = Family("aria", paths=llama_like("model.language_model"), router=ARIA_ROUTER)
GRANITE_HYBRID = Family(
    "granitemoehybrid",
    paths={"blocks.linear_attn": "mamba"},
    places={"resid_mid": Place("post_attention_layernorm", "in")},
    added=added,
    router=Router("block_sparse_moe.router", "block_sparse_moe.experts", TopKOfLogits()),
)


def nemotron_paths(block: Any) -> Mapping[str, str]:
    """Nemotron-H: a block has one mixer, of attention, a state space model or experts."""
    kinds = {"full_attention": "blocks.attn", "linear_attention": "blocks.linear_attn"}
    return {kinds.get(block.block_type, "blocks.mlp"): "mixer"}


NEMOTRON = Family(
    "nemotron_h",
    paths={
        "blocks": "model.layers", "embed": "model.embeddings", "ln_final": "model.norm_f", "blocks.ln1": "norm",
    } | {f"blocks.attn.{part}": f"mixer.{part}_proj" for part in "qkvo"},
    varied=nemotron_paths,
    router=Router("mixer.gate", "mixer.experts", SigmoidInGroups()),
)  # fmt: skip
