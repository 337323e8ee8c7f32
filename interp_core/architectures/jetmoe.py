"""JetMoE: top-k of the logits, then softmax over these; the router's module gives the slots sorted by expert.

Attention is a mixture too: a router of its own chooses the heads' projections, and has no site. No single module runs an
expert, so `expert_out` does not exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family
from .routing import Router, TopKOfLogits, dense, selected


class SortedRouter(Router):
    """The module returns `(slots in the order of their experts, their tokens, weights, slots per expert, logits)`, where
    slot i is the (i mod k)-th of token i div k."""

    def logits(self, output: Any) -> Tensor:
        """See `Router.logits`."""
        logits: Tensor = output[4]
        return logits

    def weights(self, output: Any, n_experts: int) -> Tensor:
        """See `Router.weights`."""
        slots, _, weights, _, logits = output
        k = len(slots) // len(logits)
        by_token = torch.empty_like(weights).scatter(0, slots, weights).view(-1, k)
        return dense(by_token, self.chosen(output, k), n_experts)

    def chosen(self, output: Any, k: int) -> Tensor:
        """See `Router.chosen`."""
        slots, _, _, sizes, _ = output
        experts = torch.arange(len(sizes), device=slots.device)
        experts = experts.repeat_interleave(torch.tensor(sizes, device=slots.device))
        return torch.empty_like(experts).scatter(0, slots, experts).view(-1, k)

    def rerouted(self, router: Any, output: Any, logits: Tensor) -> Any:
        """See `Router.rerouted`."""
        return self._sorted(*selected(self.selection, router, logits, output[2].dtype), logits)

    def reweighted(self, output: Any, weights: Tensor) -> Any:
        """See `Router.reweighted`."""
        k = len(output[0]) // len(weights)
        plain = (None, output[2].view(-1, k), None)
        _, kept, chosen = super().reweighted(plain, weights)
        return self._sorted(kept, chosen, output[4])

    def _sorted(self, weights: Tensor, chosen: Tensor, logits: Tensor) -> Any:
        """The module's output for weights and experts `[n k]`."""
        experts, slots = chosen.flatten().sort(stable=True)
        sizes = torch.bincount(experts, minlength=logits.shape[-1]).tolist()
        return slots, slots.div(chosen.shape[-1], rounding_mode="trunc"), weights.flatten()[slots], sizes, logits


FAMILY = Family(
    "jetmoe",
    router=SortedRouter("mlp.router", "mlp.output_linear", TopKOfLogits()),
    refuse={"expert_out": "JetMoE runs its experts on rows sorted by expert; no module gives one expert's output"},
)
