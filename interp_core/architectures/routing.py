"""Mixture-of-experts routers: what their module returns, and how each kind of family selects experts.

In transformers a router module returns `(logits, weights, indices)` over batch and pos flattened, and the block hands
weights and indices to the experts' module as they are. So what a router returns is what is executed; replacing its
logits alone does nothing. An edit of the logits therefore selects again, by the family's own rule (`Select`), and a
banned expert (logit minus infinity) is out of every stage of the choice: correction biases and groups included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError

Select = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""`(router module, logits [n expert])` to `(weights [n k], indices [n k])`, as the family selects."""


@dataclass(frozen=True)
class Router:
    """A router whose module returns `(logits, weights, indices)`.

    Attributes:
        module: its path in the block.
        experts: path of the module that is called with `(hidden, indices, weights)`.
        select: the family's selection.
        flat: the block's MLP returns batch and pos flattened.
    """

    module: str
    experts: str
    select: Select
    flat: bool = False

    def logits(self, output: Any) -> Tensor:
        """Logits `[n expert]` in what the module returned."""
        return output[0]

    def weights(self, output: Any, n_experts: int) -> Tensor:
        """Executed weights `[n expert]`, zero where not chosen."""
        return dense(output[1], output[2], n_experts)

    def rerouted(self, module: Any, output: Any, logits: Tensor) -> Any:
        """What the module would have returned for other logits.

        Raises:
            PlanError: no expert is left for a token.
        """
        return logits, *selected(self.select, module, logits, output[1].dtype), *output[3:]

    def reweighted(self, output: Any, weights: Tensor) -> Any:
        """The output with other dense weights.

        Raises:
            PlanError: weight on more experts than a token can have.
        """
        k = output[1].shape[-1]
        chosen = weights.abs().topk(k, dim=-1).indices
        kept = weights.gather(-1, chosen)
        if not torch.equal(dense(kept, chosen, weights.shape[-1]), weights):
            raise PlanError(f"router_weights: a token can have {k} experts, the edit gives weight to more")
        return output[0], kept.to(output[1].dtype), chosen, *output[3:]

    def contributions(self, experts: Any, args: Any, _output: Tensor, units: tuple[int, ...]) -> Tensor:
        """Weighted outputs `[n expert d_model]` of single experts, by the experts' own code, one at a time."""
        hidden, chosen, weights = args
        parts = []
        for expert in units:
            weight = torch.where(chosen == expert, weights, 0).sum(-1, keepdim=True)
            parts.append(experts.forward(hidden, torch.full_like(chosen[:, :1], expert), weight))
        return torch.stack(parts, dim=1)

    def contributed(self, output: Tensor, change: Tensor) -> Tensor:
        """The experts' output, with contributions changed by `change` `[n expert d_model]`."""
        return output + change.sum(1).view_as(output)


def dense(weights: Tensor, chosen: Tensor, n_experts: int) -> Tensor:
    """Weights `[n k]` of chosen experts as `[n expert]`."""
    return weights.new_zeros(len(weights), n_experts).scatter_add(-1, chosen, weights)


def selected(select: Select, module: Any, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights and indices for `logits`, where minus infinity bans an expert.

    A token with fewer than k experts left spends the slots that are over on an expert that it has, with weight zero:
    nothing banned is executed, not even for nothing.

    Raises:
        PlanError: no expert is left for a token.
    """
    weights, chosen = select(module, logits)
    dead = logits.gather(-1, chosen) == float("-inf")
    if bool(dead.any()):
        if bool(dead.all(-1).any()):
            raise PlanError("router_logits: a token has no expert left to go to; ban fewer")
        spare = chosen.gather(-1, (~dead).int().argmax(-1, keepdim=True))
        weights, chosen = torch.where(dead, 0, weights), torch.where(dead, spare, chosen)
    return weights.to(dtype), chosen


def softmax_top_k(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then top-k, renormalised unless the router's flag says no (Mixtral, Qwen, OLMoE)."""
    weights, chosen = torch.softmax(logits, -1, dtype=torch.float).topk(router.top_k, dim=-1)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


def top_k_softmax(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k of the logits, then softmax over these (GPT-OSS, Granite)."""
    best, chosen = logits.topk(router.top_k, dim=-1)
    return torch.softmax(best, -1), chosen


def sigmoid_in_groups(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid scores; the choice adds a correction bias and takes the best groups first (DeepSeek-V3, GLM-4-MoE).

    A group counts by its two best experts: banned ones are not among them, and a group without others is out.
    """
    scores, banned = logits.sigmoid(), logits == float("-inf")
    choice = (scores + router.e_score_correction_bias).masked_fill(banned, float("-inf"))
    groups = choice.view(len(choice), router.num_group, -1)
    best = groups.topk(2, dim=-1).values
    rank = torch.where(best.isinf(), 0, best).sum(-1).masked_fill(best[..., 0].isinf(), float("-inf"))
    kept = torch.zeros_like(rank).scatter(-1, rank.topk(router.topk_group, dim=-1).indices, 1).bool()
    choice = groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    chosen = choice.topk(router.top_k, dim=-1).indices
    weights = scores.gather(-1, chosen).masked_fill(choice.gather(-1, chosen).isinf(), 0)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor, chosen
