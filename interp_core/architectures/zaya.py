"""Zaya: a router's last number stands for no expert at all; a token that takes it passes by all experts.

A router also reads what the router of the block before has made of the stream, which no edit of its logits changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family
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


FAMILY = Family(
    "zaya",
    router=RouterPastExperts("mlp.gate", "mlp.experts", OrNone(softmax_as_is, "balancing_biases", renormalise=False)),
)
