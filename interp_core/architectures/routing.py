"""Mixture-of-experts routers: what their module returns, and how each kind of family selects experts.

In transformers a router module returns `(logits, weights, indices)` over batch and pos flattened, and the block hands
weights and indices to the experts' module as they are. So what a router returns is what is executed; replacing its
logits alone does nothing. An edit of the logits therefore selects again, by the family's own rule (`Selection`), and a
banned expert (logit minus infinity) is out of every stage of the choice: correction biases and groups included
(`rerouting.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError

BANNED = float("-inf")


class Selection:
    """How a family's routers select experts, stage by stage: `weigh(choose(...))` is what the router itself does.

    All tensors have the batch and pos axes flattened to n. `router` is what `Router.rule` gives: the router's module,
    or something with the attributes that the rule reads, for families that hand the router a bias as an argument. A
    logit of minus infinity is a ban, by whoever edits; the family's own logits have none.

    A family overrides what it does differently. The base is that of GPT-OSS and Granite: top-k of the logits, then a
    softmax over these.
    """

    def scores(self, router: Any, logits: Tensor) -> Tensor:
        """Selection scores `[n expert]`: what single experts are ranked by, correction biases included, before groups.
        Minus infinity where banned."""
        return logits

    def choose(self, router: Any, logits: Tensor) -> Tensor:
        """Chosen experts `[n k]`, in the router's own order. Bans act at the selection score, before groups and top-k.
        Slots that no expert is left for hold banned ones (whoever calls clears them)."""
        return self.scores(router, logits).topk(router.top_k, dim=-1).indices

    def weigh(self, router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """Executed weights `[n k]` of any set `chosen` `[n k]`, after the family's normalisation and scaling: the
        router's own for its own set. A set may come from elsewhere (forced experts), in any order and whatever the
        logits would choose. Zero for banned experts; the dtype is the caller's to restore."""
        return torch.softmax(logits.gather(-1, chosen), -1)

    def probs(self, router: Any, logits: Tensor) -> Tensor:
        """The family's scores of all experts as probabilities `[n expert]`, float32 or wider, summing to 1: a softmax,
        or shares of the scores where a softmax means nothing to the family. Zero for banned experts."""
        return torch.softmax(logits, -1, dtype=wide(logits))


class TopKOfLogits(Selection):
    """Top-k of the logits, then softmax over these (GPT-OSS, Granite)."""


def wide(x: Tensor) -> torch.dtype:
    """The dtype to compute probabilities in."""
    return torch.promote_types(x.dtype, torch.float32)


def shares(scores: Tensor) -> Tensor:
    """Scores `[n expert]` that are no probabilities, divided by their sum."""
    scores = scores.to(wide(scores))
    return scores / scores.sum(-1, keepdim=True)


def in_groups(scores: Tensor, n_groups: int, n_kept: int, k: int, best: int = 2, left_out: float = BANNED) -> Tensor:
    """Top-k `[n k]` of scores `[n expert]` within the `n_kept` groups whose `best` highest ones sum to most.

    Args:
        left_out: what experts of other groups count in the choice.
    """
    groups = scores.view(len(scores), n_groups, -1)
    highest = groups.topk(best, dim=-1).values
    rank = torch.where(highest.isinf(), 0, highest).sum(-1).masked_fill(highest[..., 0].isinf(), BANNED)
    kept = torch.zeros_like(rank).scatter(-1, rank.topk(n_kept, dim=-1).indices, 1).bool()
    # slots that are over go to banned experts of these groups, so that all know them for what they are
    within = groups.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~kept[..., None], left_out)
    return within.masked_fill(groups.isinf() & ~kept[..., None], BANNED).flatten(1).topk(k, dim=-1).indices


@dataclass(frozen=True)
class Router:
    """A router whose module returns `(logits, weights, indices)`.

    Attributes:
        module: its path in the block.
        experts: path of the module that is called with `(hidden, indices, weights)`.
        selection: how the family selects.
        flat: the block's MLP returns batch and pos flattened.
        shared_gate: path of the linear layer whose sigmoid scales the shared expert's output, in blocks that have it.
        n_shared: attribute of the router's module with the number of shared experts, if it weighs these; see `shared`.
    """

    module: str
    experts: str
    selection: Selection
    flat: bool = False
    shared_gate: str = ""
    n_shared: str = ""

    def of(self, block: Any) -> Router:
        """The router of one block, where the block knows what its router's module does not."""
        return self

    def sizes(self, module: Any) -> tuple[int, int]:
        """How many experts the router has, and how many a token takes."""
        return int(module.num_experts), int(module.top_k)

    def absent(self, module: Any) -> Mapping[str, str]:
        """Sites that this router cannot give, with the reason, where others of the model can."""
        return {}

    def rule(self, module: Any, args: tuple[Any, ...]) -> Any:
        """What the selection is handed as `router`: the module; something that has its attributes and the bias too,
        where a family calls the module with the bias among its positional arguments `args`."""
        return module

    def within(self, rule: Any, part: slice) -> Any:
        """What `rule` gave, of some of the tokens."""
        return rule

    def logits(self, output: Any) -> Tensor:
        """Logits `[n expert]` in what the module returned."""
        return output[0]

    def weights(self, output: Any, n_experts: int) -> Tensor:
        """Executed weights `[n expert]`, zero where not chosen."""
        return dense(output[1], output[2], n_experts)

    def chosen(self, output: Any, k: int) -> Tensor:
        """Executed experts `[n k]`, as the router orders them. Slots that are over repeat an expert of the set."""
        return output[2]

    def shared(self, output: Any) -> Tensor:
        """Weights of shared experts `[n shared]`, of a router that has some."""
        raise NotImplementedError

    def slots(self, output: Any, k: int) -> tuple[Tensor, Tensor]:
        """Executed weights and experts `[n k]`; slots that are over have weight zero."""
        return output[1], self.chosen(output, k)

    def returned(self, output: Any, logits: Tensor, weights: Tensor, chosen: Tensor) -> Any:
        """The output with other logits, and other weights `[n k]` of other experts `[n k]`."""
        return logits, weights.to(output[1].dtype), chosen, *output[3:]

    def completed(self, rule: Any, before: Any, output: Any) -> Any:
        """What `returned` made of the output `before`, with what else follows from other experts."""
        return output

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
        none = kept == 0  # nothing that has no weight takes a slot, but what the token has
        chosen = torch.where(none, torch.where(none.all(-1, keepdim=True), output[2], chosen[:, :1]), chosen)
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


@dataclass(frozen=True)
class RouterInBlock(Router):
    """A router whose module gives logits alone: the block selects, and hands the experts' module `(hidden, indices,
    weights)`. So all of the router lies where these go in, and its "output" is `(logits, weights, indices)`.

    Attributes:
        n_experts, k: how many there are, and how many a token takes; of a block, see `of`.
    """

    n_experts: int = 0
    k: int = 0

    def sizes(self, module: Any) -> tuple[int, int]:
        """See `Router.sizes`."""
        return self.n_experts, self.k

    def gathered(self, logits: Tensor, args: tuple[Any, ...]) -> Any:
        """Logits, weights and indices of what went into the experts' module."""
        return logits, args[2], args[1]

    def handed(self, args: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
        """What goes into the experts' module for these."""
        return args[0], output[2], output[1], *args[3:]


def dense(weights: Tensor, chosen: Tensor, n_experts: int) -> Tensor:
    """Weights `[n k]` of chosen experts as `[n expert]`."""
    return weights.new_zeros(len(weights), n_experts).scatter_add(-1, chosen, weights)
