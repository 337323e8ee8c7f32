"""Llama 4: top-k of the router's logits, then a sigmoid that scales what each expert reads.

transformers runs every expert on every token, on zeros where it is not chosen. So a banned expert contributes exactly
nothing, but it is executed. Some layers have no rotary embedding, and attend to everything instead of a chunk.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .family import Family
from .routing import Router, Selection, dense, shares


class TopKOfLogitsThenSigmoid(Selection):
    """Top-k of the logits, then a sigmoid."""

    def weigh(self, router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """See `Selection.weigh`."""
        return torch.sigmoid(logits.gather(-1, chosen).float())

    def probs(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.probs`; shares of the sigmoids."""
        return shares(logits.sigmoid())


class InputRouter(Router):
    """The module returns `(weights [n expert], logits)`; experts get weighted inputs, one expert after the other."""

    def logits(self, output: Any) -> Tensor:
        """See `Router.logits`."""
        return output[1]

    def weights(self, output: Any, n_experts: int) -> Tensor:
        """See `Router.weights`."""
        return output[0]

    def chosen(self, output: Any, k: int) -> Tensor:
        """See `Router.chosen`; the heaviest first, which is the order of the logits."""
        best = output[0].topk(k, dim=-1)
        return torch.where(best.values == 0, best.indices[:, :1], best.indices)

    def slots(self, output: Any, k: int) -> tuple[Tensor, Tensor]:
        """See `Router.slots`."""
        return output[0].topk(k, dim=-1).values, self.chosen(output, k)

    def returned(self, output: Any, logits: Tensor, weights: Tensor, chosen: Tensor) -> Any:
        """See `Router.returned`."""
        return dense(weights.to(output[0].dtype), chosen, logits.shape[-1]), logits

    def reweighted(self, output: Any, weights: Tensor) -> Any:
        """The output with other weights; any number of experts can have some."""
        return weights, output[1]

    def contributions(self, experts: Any, args: Any, output: Tensor, units: tuple[int, ...]) -> Tensor:
        """See `Router.contributions`; they pass the experts' module as they are."""
        return output.view(experts.num_experts, -1, output.shape[-1])[list(units)].transpose(0, 1)

    def contributed(self, output: Tensor, change: Tensor) -> Tensor:
        """See `Router.contributed`. The block sums over experts, so all of the change may go in with the first."""
        total = change.sum(1)
        return torch.cat([output[: len(total)] + total, output[len(total) :]])


def _broken(config: Any) -> str:
    """transformers 5.24 hands on what its language model's output does not have, whatever the input."""
    from transformers import Llama4ForConditionalGeneration
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    wanted, word = inspect.unwrap(Llama4ForConditionalGeneration.forward).__code__.co_names, "image_outputs"
    if not hasattr(config, "vision_config") or word not in wanted or word in MoeCausalLMOutputWithPast.__annotations__:
        return ""
    return (
        f"in this version of transformers its forward pass ends in an error on any input: it reads `{word}` of what "
        "its language model gives, which has none; load that alone, as Llama4ForCausalLM"
    )


FAMILY = Family(
    "llama4",
    router=InputRouter("feed_forward.router", "feed_forward.experts", TopKOfLogitsThenSigmoid(), flat=True),
    unfit=_broken,
)
