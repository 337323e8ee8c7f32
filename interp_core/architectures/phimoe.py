"""Phi-3.5-MoE: a sparse mixer. Each of the two slots takes the best expert that is left, and weighs it by a softmax
over those experts that lie within a band below it; so a token's weights do not sum to one, but to nearly two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family
from .routing import BANNED, Router, Selection


class SparseMixer(Selection):
    """Slot by slot, the best expert that is left, which top-k of the logits is too."""

    def weigh(self, router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """See `Selection.weigh`. A set that the router would not choose is weighed as if each slot had taken its expert
        for the best: what is better and not of the set does not count."""
        order = logits.gather(-1, chosen).sort(dim=-1, descending=True, stable=True).indices
        left, weights = logits, torch.zeros_like(chosen, dtype=logits.dtype)
        for slot in order.unbind(-1):
            expert = chosen.gather(-1, slot[:, None])
            best = logits.gather(-1, expert)
            left = left.masked_fill(left > best, BANNED)
            apart = (best - logits) / logits.abs().clamp(min=best) > 2 * router.router_jitter_noise
            shares = torch.softmax(left.masked_fill(apart, BANNED), -1)
            weights = weights.scatter(-1, slot[:, None], shares.gather(-1, expert))
            left = left.scatter(-1, expert, BANNED)
        return weights.nan_to_num(0.0)  # slots of banned experts, which nothing is left for


FAMILY = Family("phimoe", router=Router("mlp.router", "mlp.experts", SparseMixer()))
