"""LongCat-Flash: some experts compute nothing and give back what they read ("zero experts"); they are the last numbers.

A block has two attentions and two dense MLPs, and experts that read between them and are added at its end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .atlas import OF_ATTENTION
from .family import Family
from .routing import Router
from .scored import BIAS, Scored


class RouterWithZeroExperts(Router):
    """A router that counts zero experts apart."""

    def sizes(self, module: Any) -> tuple[int, int]:
        """See `Router.sizes`."""
        return int(module.n_routed_experts), int(module.top_k)

    def contributions(self, experts: Any, args: Any, output: Tensor, units: tuple[int, ...]) -> Tensor:
        """See `Router.contributions`. The experts' module takes no single slot, so a second one has weight zero."""
        hidden, chosen, weights = args
        parts = []
        for expert in units:
            weight = torch.where(chosen == expert, weights, 0).sum(-1)
            slots = torch.stack([weight, torch.zeros_like(weight)], -1)
            parts.append(experts.forward(hidden, torch.full_like(chosen[:, :2], expert), slots))
        return torch.stack(parts, dim=1)


_TWO = "a LongCat-Flash block has two attentions and two dense MLPs; a site by layer would be one of them"
FAMILY = Family(
    "longcat_flash",
    paths={"blocks": "model.layers", "embed": "model.embed_tokens", "ln_final": "model.norm", "blocks.mlp": "mlp"},
    router=RouterWithZeroExperts(
        "mlp.router", "mlp.experts", Scored(bias=BIAS, renormalise=False, scale="routed_scaling_factor")
    ),
    refuse=dict.fromkeys((*OF_ATTENTION, "mixer_in", "mixer_out", "resid_mid", "mlp_act"), _TWO),
)
