"""Why a model lacks sites, so that it is without none in silence; routers by model type where nobody described them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..sites import SITES
from .atlas import OF_ATTENTION, ROUTED, Atlas
from .family import Family
from .mixers import state_reason

_EXPERTS = re.compile("(Experts|TopKGating|CDMoE)$")
"""Names of classes of experts."""
_SEQ2SEQ = "is an encoder-decoder with a capacity per expert: which tokens an expert drops depends on the others"

UNDESCRIBED: dict[str, str] = {
    "diffusion_gemma": "it denoises blocks of text and is no causal language model",
    "doge": (
        "its experts are rows of two tables, chosen by sums of two keys' scores inside the MLP (DogeCDMoE), which "
        "mixes those of tokens: no tensor has a score or a weight for each expert"
    ),
    "ernie4_5_vl_moe": (
        "text and images have routers and experts of their own in one block; a site by layer would be one of them"
    ),
    "nllb-moe": f"it {_SEQ2SEQ}",
    "qwen3_omni_moe": "it is several models; load its thinker, Qwen3OmniMoeThinkerForConditionalGeneration",
    "switch_transformers": f"it {_SEQ2SEQ}",
}


def refusals(family: Family, config: Any) -> dict[str, str]:
    """Sites that the family cannot give, with the reason."""
    return {**family.refuse, **(family.refuse_if(config) if family.refuse_if else {})}


def router_reason(model: Any, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why a model that sends tokens to experts has no router sites, where no family file describes its router."""
    listed = next((path for path in modules if path.endswith(".experts")), "")
    if not listed and not any(_EXPERTS.search(type(module).__name__) for module in modules.values()):
        return {}
    kinds = (str(model.config.model_type), str(model.config.get_text_config().model_type).removesuffix("_text"))
    why = next((UNDESCRIBED[kind] for kind in kinds if kind in UNDESCRIBED), "")
    if not why and listed:
        why = f"no family file says how it selects experts ({listed}); write one with a router, see docs/families.md"
    return dict.fromkeys(ROUTED, why) if why else {}


def _all_routed(atlas: Atlas) -> bool:
    """Whether every MLP sends tokens to experts."""
    modules = [atlas.module("mlp", layer) for layer in atlas.components.layers("mlp")]
    words = ("expert", "router")
    return bool(modules) and all(any(w in path for path, _ in m.named_modules() for w in words) for m in modules)


def explain(atlas: Atlas, refused: Mapping[str, str], parallel: bool) -> None:
    """Say why each site that is not there is not there."""
    present = {name for name, _ in atlas.entries}
    family, layers = atlas.family, atlas.components.layers
    for name in SITES:
        if name in present:
            continue
        own = next((why for (site, _), why in atlas.withdrawn.items() if site == name), "")
        if reason := refused.get(name, own):
            why = reason
        elif name == "resid_mid" and parallel:
            why = f"{family.name} blocks are parallel: attention and MLP read the same residual stream"
        elif name == "resid_mid" and not {*layers("mixer")} & {*layers("mlp")}:
            why = f"no block of this {family.name} has both a mixer and an MLP: there is no stream between them"
        elif name in ROUTED and not (name == "shared_expert_gate" and "router_logits" in present):
            why = f"{family.name} has no mixture-of-experts router that is known here"
        elif name == "shared_expert_gate":
            why = f"this {family.name} has no gate on a shared expert"
        elif SITES[name].visual:
            why = f"this {family.name} has no {'vision tower' if name == 'vision_embed' else 'DeepStack'}"
        elif name == "mlp_act" and _all_routed(atlas):
            why = f"every MLP of this {family.name} is a mixture of experts; see expert_out"
        elif name == "ssm_state":
            other = {*layers("mixer")} - {*layers("attn")}
            why = state_reason(family.name, bool(other) or "mixer_gate" in present)
        elif name == "mixer_gate":
            why = f"no mixer of this {family.name} has a projection that gates what it puts out (z lies behind a gate)"
        elif name in OF_ATTENTION and "mixer_out" in present and not layers("attn"):
            why = (
                f"no layer of this {family.name} is softmax attention; what mixes its tokens is at mixer_in, mixer_out"
            )
        else:
            why = f"it is not known where {family.name} keeps {name}; a family file says it, see docs/families.md"
        atlas.lacking[name] = why
    readable = "ln_final" in atlas.components.names() or "final_norm" in present
    unread = "" if readable else f"this {family.name} has no final norm that is known here"
    if why := refused.get("readout", unread):
        atlas.lacking["readout"] = why
