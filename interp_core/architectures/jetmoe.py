"""JetMoE: top-k of the logits, then softmax over these; the router's module gives the slots sorted by expert.

Attention is a mixture too: a router of its own chooses the heads' projections, and has no site. No single module runs
an expert, so `expert_out` does not exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family
from .routing import Router, TopKOfLogits, dense


class SortedRouter(Router):
    """The module returns `(slots in the order of their experts, their tokens, weights, slots per expert, logits)`; slot
    i is the (i mod k)-th of token i div k."""

    def logits(self, output: Any) -> Tensor:
        """See `Router.logits`."""
        logits: Tensor = output[4]
        return logits

    def weights(self, output: Any, n_experts: int) -> Tensor:
        """See `Router.weights`."""
        return dense(*self.slots(output, len(output[0]) // len(output[4])), n_experts)

    def chosen(self, output: Any, k: int) -> Tensor:
        """See `Router.chosen`."""
        slots, _, _, sizes, _ = output
        experts = torch.arange(len(sizes), device=slots.device)
        experts = experts.repeat_interleave(torch.tensor(sizes, device=slots.device))
        return torch.empty_like(experts).scatter(0, slots, experts).view(-1, k)

    def slots(self, output: Any, k: int) -> tuple[Tensor, Tensor]:
        """See `Router.slots`."""
        weights = torch.empty_like(output[2]).scatter(0, output[0], output[2])
        return weights.view(-1, k), self.chosen(output, k)

    def returned(self, output: Any, logits: Tensor, weights: Tensor, chosen: Tensor) -> Any:
        """See `Router.returned`."""
        experts, slots = chosen.flatten().sort(stable=True)
        sizes = torch.bincount(experts, minlength=logits.shape[-1]).tolist()
        sorted_weights = weights.to(output[2].dtype).flatten()[slots]
        return slots, slots.div(chosen.shape[-1], rounding_mode="trunc"), sorted_weights, sizes, logits

    def reweighted(self, output: Any, weights: Tensor) -> Any:
        """See `Router.reweighted`."""
        as_others_give_it = (output[4], *self.slots(output, len(output[0]) // len(weights)))
        return self.returned(output, *super().reweighted(as_others_give_it, weights))


FAMILY = Family(
    "jetmoe",
    router=SortedRouter("mlp.router", "mlp.output_linear", TopKOfLogits()),
    refuse={"expert_out": "JetMoE runs its experts on rows sorted by expert; no module gives one expert's output"},
)
