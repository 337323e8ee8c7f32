"""Gemma 4 with experts: they lie beside the dense MLP in each block, and both are normed before they are added up.

The router's module keeps its logits to itself and gives probabilities: `router_logits` are their logarithms, which are
the logits up to a constant per token, and minus infinity where a probability is zero in float32.

A block may go on with what it makes of a token's embedding for this layer, gated by the stream after the MLP; in that
stream `mlp_out` is added. At the very end it multiplies the whole stream.

Values are normed before they are mixed, in Gemma 3n and the unified Gemma 4 too: `v` is read inside attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family, Place
from .routing import Router
from .scored import Beside, Scored


class ScaledByExpert(Scored):
    """Softmax, top-k, renormalised; then times a learnt factor per expert."""

    def weigh(self, router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """See `Selection.weigh`."""
        return super().weigh(router, logits, chosen) * router.per_expert_scale[chosen]


class ProbabilityRouter(Router):
    """The module returns `(probabilities, weights, indices)`."""

    def sizes(self, module: Any) -> tuple[int, int]:
        """See `Router.sizes`."""
        return int(module.config.num_experts), int(module.config.top_k_experts)

    def rule(self, module: Any, args: tuple[Any, ...]) -> Any:
        """See `Router.rule`."""
        return Beside(module, top_k=module.config.top_k_experts)

    def logits(self, output: Any) -> Tensor:
        """See `Router.logits`."""
        probabilities: Tensor = output[0]
        return probabilities.log()

    def returned(self, output: Any, logits: Tensor, weights: Tensor, chosen: Tensor) -> Any:
        """See `Router.returned`; tokens whose logits are what they were keep the bits of their probabilities."""
        same = (logits == self.logits(output)).all(-1, keepdim=True)
        probabilities = torch.where(same, output[0], torch.softmax(logits, -1, dtype=output[0].dtype))
        return super().returned(output, probabilities, weights, chosen)


def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """Blocks end with a factor on the whole stream."""
    return (before + added) * block.layer_scalar if site == "resid_post" else before + added


SUMMED = Place("per_layer_input_gate", "in")
FAMILY = Family(
    "gemma4", inside=("v",), router=ProbabilityRouter("router", "experts", ScaledByExpert()), join=join, summed=SUMMED
)
UNIFIED = Family("gemma4_unified", inside=("v",), join=join)
GEMMA3N = Family("gemma3n", inside=("v",))
