"""Families with DeepSeek's latent attention (MLA) and other routers than DeepSeek-V3's, or other names of classes.

DeepSeek-V2 takes a softmax, and by its config the best groups first, each by its best expert; it does not renormalise.
Mistral 4 takes a softmax and counts groups by their two best experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from .deepseek_v3 import FAMILY as DEEPSEEK_V3
from .family import Family, Heads, View, split_heads
from .routing import Router, in_groups
from .scored import SIGMOID_IN_GROUPS, Scored, softmax, softmax_as_is


class GroupsByConfig(Scored):
    """Groups only where the config says so."""

    def choose(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.choose`."""
        rule = self if router.topk_method == "group_limited_greedy" else Scored(self.score)
        return Scored.choose(rule, router, logits)


class NothingOutside(Scored):
    """Experts of groups that are left out count nothing in the choice, but may be chosen, where others count less. Some
    configs have no groups."""

    def choose(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.choose`."""
        scores, groups = self.scores(router, logits), router.num_group
        if groups is None:
            return scores.topk(router.top_k, dim=-1).indices
        return in_groups(scores, groups, router.topk_group, router.top_k, self.best, left_out=0.0)


def delta_paths(block: Any) -> Mapping[str, str]:
    """Kimi Linear and its kin: most layers' attention is linear, under the same name."""
    return {} if hasattr(block.self_attn, "qk_head_dim") else {"blocks.attn": "", "blocks.linear_attn": "self_attn"}


def query_then_gate(heads: Heads, _part: str) -> View:
    """A.X K2: per head its query, then a gate on its values."""
    split = split_heads(heads.n_heads, heads.d_key + heads.d_head)
    return lambda x: split(x)[..., : heads.d_key]


_V2 = GroupsByConfig(softmax, best=1, renormalise=False, scale="routed_scaling_factor")
_MISTRAL = Scored(softmax_as_is, best=2, renormalise="norm_topk_prob", eps=1e-20, scale="routed_scaling_factor")

DEEPSEEK_V2 = replace(DEEPSEEK_V3, name="deepseek_v2", router=Router("mlp.gate", "mlp.experts", _V2))
DEEPSEEK_OCR2 = Family("deepseek_ocr2", router=DEEPSEEK_V2.router)
UNLIMITED_OCR = Family("unlimited_ocr", router=DEEPSEEK_V2.router)
MISTRAL4 = replace(DEEPSEEK_V3, name="mistral4", router=Router("mlp.gate", "mlp.experts", _MISTRAL))
MISTRAL_LARGE4 = replace(MISTRAL4, name="mistral_large4")
GLM_LITE = replace(DEEPSEEK_V3, name="glm4_moe_lite")
AXK1 = replace(DEEPSEEK_V3, name="axk1")
DEEPSEEK_V32 = replace(DEEPSEEK_V3, name="deepseek_v32")
GLM_DSA = replace(DEEPSEEK_V3, name="glm_moe_dsa")
KIMI_LINEAR = replace(DEEPSEEK_V3, name="kimi_linear", varied=delta_paths)
BAILING = replace(DEEPSEEK_V3, name="bailing_hybrid", varied=delta_paths)
DOTS3 = replace(DEEPSEEK_V3, name="dots3_note")
HY_V4 = replace(DEEPSEEK_V3, name="hy_v4")
HY_V4_VL = replace(DEEPSEEK_V3, name="hy_v4_vl")
GLM5_NEXT = replace(DEEPSEEK_V3, name="glm5_next", varied=delta_paths)
YOUTU = replace(DEEPSEEK_V3, name="youtu", router=None)
AXK2 = replace(
    DEEPSEEK_V3,
    name="axk2",
    paths={"blocks.attn.q": "q_gate_proj"},
    views={"q": query_then_gate},
    router=Router("mlp.gate", "mlp.experts", NothingOutside(**vars(SIGMOID_IN_GROUPS))),
)
