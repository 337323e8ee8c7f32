"""Routers that score experts one by one, in the stages that families put together in their own ways.

A score of each logit (softmax, sigmoid, …); a correction bias, for the choice only; groups, of which the best are kept;
top-k; the chosen scores, divided by their sum or not, times a factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .parameters import parameter
from .routing import BANNED, Router, Selection, in_groups, shares

Score = Callable[[Any, Tensor], Tensor]
"""Of the router and its logits `[n expert]`: what experts are ranked and weighed by."""


def softmax(_router: Any, logits: Tensor) -> Tensor:
    """A softmax in float32."""
    return torch.softmax(logits, -1, dtype=torch.float)


def softmax_as_is(_router: Any, logits: Tensor) -> Tensor:
    """A softmax in the logits' dtype."""
    return torch.softmax(logits, -1)


def sigmoid(_router: Any, logits: Tensor) -> Tensor:
    """A sigmoid in float32."""
    return logits.float().sigmoid()


def sigmoid_as_is(_router: Any, logits: Tensor) -> Tensor:
    """A sigmoid in the logits' dtype."""
    return logits.sigmoid()


def own_score(router: Any, logits: Tensor) -> Tensor:
    """The function that the config names."""
    score: Tensor = router.score_fn(logits)
    return score


@dataclass(frozen=True)
class Scored(Selection):
    """Scores, chosen with a bias and in groups, and normalised, as said.

    Attributes:
        score: what experts are ranked and weighed by.
        bias: attribute of the router with what is added for the choice, "" for none.
        best: how many of its best experts a group counts by; 0 where there are no groups.
        renormalise: whether chosen scores are divided by their sum, or the router's attribute that says so (they are
            where it has none).
        eps: what is added to that sum.
        least: attribute of the router that says what that sum is at least, "" for none.
        scale: attribute of the router with the factor on the weights, "" for none.
    """

    score: Score = softmax
    bias: str = ""
    best: int = 0
    renormalise: bool | str = True
    eps: float = 0.0
    least: str = ""
    scale: str = ""

    def scores(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.scores`."""
        scores = self.score(router, logits)
        if self.bias and attrgetter(self.bias)(router) is not None:
            scores = scores + parameter(router, self.bias)
        # The sigmoid of minus infinity is 0, which a bias would lift above the scores of others.
        return scores.masked_fill(logits == BANNED, BANNED)

    def choose(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.choose`."""
        if not self.best:
            return super().choose(router, logits)
        return in_groups(self.scores(router, logits), router.num_group, router.topk_group, router.top_k, self.best)

    def weigh(self, router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """See `Selection.weigh`."""
        weights = self.score(router, logits).gather(-1, chosen)
        named = isinstance(self.renormalise, str)
        if getattr(router, str(self.renormalise), True) if named else self.renormalise:
            total = weights.sum(-1, keepdim=True) + self.eps
            weights = weights / (total.clamp(min=getattr(router, self.least)) if self.least else total)
        return weights * getattr(router, self.scale) if self.scale else weights

    def probs(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.probs`; shares of the scores, without the bias, where these are no softmax."""
        if self.score in (softmax, softmax_as_is):
            return super().probs(router, logits)
        return shares(self.score(router, logits))


class BiasOnLogits(Scored):
    """The bias is added to the logits, not to their scores."""

    def scores(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.scores`."""
        return logits + parameter(router, self.bias)


BIAS = "e_score_correction_bias"
TOP_K_OF_SOFTMAX = Scored(renormalise="norm_topk_prob")
"""Mixtral, Qwen, OLMoE."""
SIGMOID_IN_GROUPS = Scored(
    sigmoid_as_is, BIAS, best=2, renormalise="norm_topk_prob", eps=1e-20, scale="routed_scaling_factor"
)
"""DeepSeek-V3, GLM-4-MoE. A group counts by its two best experts: banned ones are not among them, and a group without
others is out."""


class Beside:
    """A router with attributes that it does not have itself."""

    def __init__(self, router: Any, **attributes: Any) -> None:
        self.router = router
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.router, name)


class HandedRouter(Router):
    """The block hands the module its correction bias along with the hidden states."""

    def rule(self, module: Any, args: tuple[Any, ...]) -> Any:
        """See `Router.rule`."""
        return Beside(module, **{BIAS: args[1] if len(args) > 1 else None})
