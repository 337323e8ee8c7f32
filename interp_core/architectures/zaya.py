"""Zaya: a router's last number stands for no expert at all; a token that takes it passes by all experts.

Blocks scale the stream and what they add to it, by learnt factors of each dimension. A router also reads what the
router of the block before has made of the stream, which no edit of its logits changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .family import Family
from .hook_points import Call, HookPoint, transposed
from .routing import Router, dense
from .scored import Scored, softmax_as_is


class OrNone(Scored):
    """Softmax, chosen with a bias, as they are; passing by all experts weighs nothing."""

    def weigh(self, router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """See `Selection.weigh`."""
        return super().weigh(router, logits, chosen).masked_fill(chosen == router.num_experts, 0)


class RouterPastExperts(Router):
    """The module returns `(logits, weights, indices, what the next router reads)`. Whoever passes by all experts has
    weight zero there, and the number of some expert."""

    def sizes(self, module: Any) -> tuple[int, int]:
        """See `Router.sizes`."""
        return int(module.num_router_classes), int(module.top_k)

    def weights(self, output: Any, n_experts: int) -> Tensor:
        """See `Router.weights`."""
        return dense(output[1], self.chosen(output, 1), n_experts)

    def chosen(self, output: Any, k: int) -> Tensor:
        """See `Router.chosen`."""
        return output[2].masked_fill(output[1] == 0, output[0].shape[-1] - 1)

    def returned(self, output: Any, logits: Tensor, weights: Tensor, chosen: Tensor) -> Any:
        """See `Router.returned`; the number of an expert that is not banned for those that pass by all."""
        last = logits.shape[-1] - 1
        best = logits[:, :last].argmax(-1, keepdim=True)
        return super().returned(output, logits, weights, torch.where(chosen == last, best, chosen))


def added(block: Any) -> Mapping[str, Tensor]:
    """Learnt factors on what is added, one per dimension."""
    scales = {"attn_out": block.post_attention_residual_scale, "mlp_out": block.post_mlp_residual_scale}
    return {name: scale.hidden_states_scale.detach() for name, scale in scales.items()}


def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """Others on the stream, and biases."""
    scale = block.post_attention_residual_scale if site == "resid_mid" else block.post_mlp_residual_scale
    kept: Tensor = (before + scale.residual_bias) * scale.residual_scale
    return kept + added + scale.hidden_states_bias * scale.hidden_states_scale


def heads(block: Any) -> None:
    """A module gives queries, keys and values, each as heads."""
    attention, path = block.module.self_attn, f"{block.path}.self_attn"
    n, n_kv, d = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim

    def given(number: int) -> HookPoint:
        def put(call: Call, _old: Tensor, new: Tensor) -> None:
            call.output = (*call.output[:number], new, *call.output[number + 1 :])

        return HookPoint(f"{path}.qkv_proj", "out", get=lambda call, _units: call.output[number], put=put)

    block.view("q", given(0), {"head": n, "d_head": d})
    block.view("k", given(1), {"head": n_kv, "d_head": d})
    block.view("v", HookPoint(path, "attention", "v", view=transposed), {"head": n_kv, "d_head": d})


FAMILY = Family(
    "zaya",
    added=added,
    join=join,
    sites=(heads,),
    router=RouterPastExperts("mlp.gate", "mlp.experts", OrNone(softmax_as_is, "balancing_biases", renormalise=False)),
)
