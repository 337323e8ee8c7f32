"""Inkling: norms and short convolutions behind attention and MLP, and shared experts that the router weighs too.

A token's routed and shared experts are weighed together: the logarithms of their sigmoids pass one softmax. The
router's module gives the routed logits alone, so those of shared experts are worked out anew from what it reads. Where
an edit chooses other routed experts, shared ones get what these leave them.

Inkling 2 has no shared experts, and no such sum. What attention and the MLP read is a learnt mix of the stream with
those of earlier groups of blocks: the first block of a group lays its stream aside, and what its attention gives begins
the next one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Family
from .hook_points import resid_mid
from .parameters import parameter
from .routing import BANNED, Router
from .scored import BIAS, Beside, Scored, own_score, sigmoid


class WithShared(Beside):
    """A router, and its logits of shared experts `[n shared]`."""

    def __init__(self, router: Any, hidden: Tensor, part: slice = slice(None)) -> None:
        super().__init__(router, hidden=hidden, part=part)

    @cached_property
    def shared(self) -> Tensor:
        """The logits, as the module computes them."""
        weight = parameter(self.router, "weight")[-self.router.n_shared_experts :]
        return F.linear(self.hidden.reshape(-1, self.hidden.shape[-1]).float(), weight.float())[self.part]


class Together(Scored):
    """Sigmoids, chosen with a bias, and divided by their sum with those of shared experts."""

    def weigh(self, router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """See `Selection.weigh`."""
        return self.every(router, logits.gather(-1, chosen))[..., : chosen.shape[-1]]

    def every(self, router: Any, logits: Tensor) -> Tensor:
        """Weights of routed experts by their logits `[n k]`, then those of shared ones `[n shared]`."""
        shares = F.logsigmoid(torch.cat([logits.float(), router.shared], -1))
        weights = torch.exp(shares - shares.logsumexp(-1, keepdim=True))
        return weights * router.route_scale * parameter(router.router, "global_scale").float()


TOGETHER = Together(sigmoid, BIAS)


class SharingRouter(Router):
    """The module returns `(logits, weights, indices, weights of shared experts)`."""

    def rule(self, module: Any, args: tuple[Any, ...]) -> Any:
        """See `Router.rule`."""
        return WithShared(module, args[0])

    def within(self, rule: Any, part: slice) -> Any:
        """See `Router.within`."""
        return WithShared(rule.router, rule.hidden, part)

    def completed(self, rule: Any, before: Any, output: Any) -> Any:
        """See `Router.completed`: shared experts' weights, of tokens with other logits or other experts."""
        logits, weights, chosen, shared = output
        other = ~(chosen[:, :, None] == before[2][:, None, :]).any(-1).all(-1)
        anew = other | (logits != before[0]).any(-1)
        routed = logits.gather(-1, chosen).masked_fill(weights == 0, BANNED)
        fresh = TOGETHER.every(rule, routed)[..., chosen.shape[-1] :].to(shared.dtype)
        return logits, weights, chosen, torch.where(anew[:, None], fresh, shared)

    def shared(self, output: Any) -> Tensor:
        """See `Router.shared`."""
        weights: Tensor = output[3]
        return weights


FAMILY = Family(
    "inkling",
    paths={"blocks.ln1_post": "attn_sconv", "blocks.ln2_post": "mlp_sconv"},
    inside=("v",),  # behind a convolution over positions
    router=SharingRouter("mlp.gate", "mlp.experts", TOGETHER, n_shared="n_shared_experts"),
)


def begins(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """Inkling 2: every few blocks, what attention gives begins a stream anew, and the one before is laid aside."""
    return added if site == "resid_mid" and block.is_block_boundary else before + added


def between(block: Any) -> None:
    """`resid_mid` of Inkling 2, which no module reads alone: `mlp_input` mixes it with the streams laid aside."""
    added = block.addition("attn_out", f"{block.path}.post_attention_convolution")
    point = resid_mid(block.stack.point(block.path, "in"), added, partial(begins, block.module, "resid_mid"))
    block.add("resid_mid", point, point, block.d_model, {"grad": "it is computed of what the block reads and adds"})


_MIXED = "a learnt mix with the streams of earlier blocks, and a norm, lie between the last stream and the unembedding"
_BEHIND = {f"blocks.attn.{part}": f"{part}_proj.linear" for part in "qko"}
INKLING2 = Family(
    "inkling2",
    paths={
        "blocks.attn": "self_attn", "blocks.mlp": "mlp", **_BEHIND, "blocks.ln1_post": "post_attention_convolution",
        "blocks.ln2_post": "post_mlp_convolution",
    },
    inside=("v",),
    join=begins,
    router=Router("mlp.gate", "mlp.experts", Scored(own_score, BIAS, eps=1e-20, scale="routed_scaling_factor")),
    refuse=dict.fromkeys(("final_norm", "readout"), _MIXED),
    sites=(between,),
)  # fmt: skip
INKLING2_LOOP = replace(INKLING2, name="inkling2_loop")
