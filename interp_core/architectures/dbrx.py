"""DBRX: attention and both norms lie in a module of their own, with a fused projection.

The router's module gives logits alone. The MLP takes a softmax and top-k of it, divides by a norm of these (the sum, by
default), and hands the experts' module numbers and weights, which is where the router is read and edited.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .family import Family, fused_blocks
from .routing import Router, RouterInBlock
from .scored import Beside, Scored, softmax_as_is


@dataclass(frozen=True)
class Normed(Scored):
    """Softmax, top-k, divided by a p-norm (None: not divided)."""

    p: float | None = None

    def weigh(self, router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """See `Selection.weigh`."""
        weights = super().weigh(router, logits, chosen)
        return weights if self.p is None else weights / weights.norm(p=self.p, dim=-1, keepdim=True)


@dataclass(frozen=True)
class DbrxRouter(RouterInBlock):
    """The MLP knows how it selects, and its experts lie flattened."""

    def of(self, block: Any) -> Router:
        """See `Router.of`."""
        rule = Normed(softmax_as_is, renormalise=False, p=block.ffn.moe_normalize_expert_weights)
        return replace(self, selection=rule, n_experts=block.ffn.experts.num_experts, k=block.ffn.top_k)

    def rule(self, module: Any, args: tuple[Any, ...]) -> Any:
        """See `Router.rule`."""
        return Beside(module, top_k=self.k)

    def contributions(self, experts: Any, args: Any, output: Tensor, units: tuple[int, ...]) -> Tensor:
        """See `Router.contributions`. The experts' module is called with batch and pos apart."""
        hidden, chosen, weights = args
        parts = super().contributions(experts, (hidden.flatten(0, 1), chosen, weights), output, units)
        return parts.squeeze(2)


FAMILY = Family(
    "dbrx",
    paths={
        "blocks": "transformer.blocks", "embed": "transformer.wte", "ln_final": "transformer.norm_f",
        "blocks.attn": "norm_attn_norm.attn", "blocks.attn.qkv": "Wqkv", "blocks.attn.o": "out_proj",
        "blocks.ln1": "norm_attn_norm.norm_1", "blocks.ln2": "norm_attn_norm.norm_2", "blocks.mlp": "ffn",
    },
    fused=fused_blocks,
    router=DbrxRouter("ffn.router", "ffn.experts", Normed()),
)  # fmt: skip
