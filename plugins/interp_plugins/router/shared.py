"""Shared experts, which every token has: how far their gate is open, and their part of what the block puts out.

    o = r + s      the block's output: the routed experts' weighted sum, and the shared expert's output after its gate
    gate           mean of the gate (a sigmoid), where there is one; of several shared experts' weights their sum
    share          mean over tokens of ‖s‖ / ‖o‖; may be above 1, where r points the other way
    along          mean over tokens of s · o / ‖o‖²: the part of o that is due to s; with that of r it is 1

They are in no usage matrix: no router chooses them.

Source: this package.
Cost: one forward pass that ends with the last block that has experts; a number of each kind per layer.
Must equal: the shared expert's module, times its gate, over the block's output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .points import demand_routers
from .reading import Places

NAMES = ("share", "along", "shared_norm", "routed_norm", "block_norm")


@dataclass(eq=False)
class SharedExperts:
    """Sums over tokens by decoder layer, gathered batch by batch.

    Attributes:
        sums: of each of `NAMES`, and of the gate where there is one.
        tokens: how many tokens there are.
    """

    sums: dict[int, dict[str, float]] = field(default_factory=dict)
    tokens: int = 0

    def add(self, layer: int, values: dict[str, Tensor]) -> None:
        """Values `[n]` of tokens, by name."""
        kept = self.sums.setdefault(layer, {})
        for name, value in values.items():
            kept[name] = kept.get(name, 0.0) + float(value.double().sum())

    def table(self) -> list[dict[str, Any]]:
        """One row per layer: means over tokens."""
        return [
            {"layer": layer, "tokens": self.tokens} | {name: total / self.tokens for name, total in sums.items()}
            for layer, sums in sorted(self.sums.items())
        ]


def shared_of(model: ic.Model, batches: Iterable[ic.Tokens], at: Any = None) -> SharedExperts:
    """What shared experts put out.

    Args:
        model: with routers, and experts that no router chooses beside them.
        batches: of tokens, also from a generator.
        at: positions that count; None: all real tokens.

    Raises:
        CapabilityError: a dense model, one without shared experts, or with such beside the block that has the router.
        PositionError: a row without a token there.
    """
    layers = demand_routers("shared experts", model)
    blocks = {layer: (model.module("mlp", layer), model.module("experts", layer)) for layer in layers}
    gated = not model.can("shared_expert_gate", "read")
    shared = SharedExperts()
    for tokens in batches:
        places = Places(tokens, at)
        counted = places.mask(tokens)
        rules: dict[Any, Any] = {}
        for layer, (block, experts) in blocks.items():
            rules |= _rules(shared, layer, block, experts, counted)
        with model.replacing(rules):
            read = [S.shared_expert_gate] if gated else []
            run = model.run(tokens, read=[*read, S.resid_post[layers[-1]]], logits=False)
        for layer in layers if gated else ():
            shared.add(layer, {"gate": places.of(run[S.shared_expert_gate[layer]].plain.sum(-1))})
        shared.tokens += int(counted.sum())
        if not any(sums["shared_norm"] for sums in shared.sums.values()):
            raise ic.CapabilityError(
                f"shared experts: {model.source} ({model.hf.config.model_type}) has none in its blocks with routers: "
                "what these put out is what the routed experts give"
            )
    return shared


def _rules(shared: SharedExperts, layer: int, block: Any, experts: Any, counted: Bool[Tensor, " token"]) -> Any:
    """What keeps the routed experts' sum, and then compares the block's output with it."""
    routed: list[Tensor] = []

    def of_experts(_: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        added = out.detach().reshape(-1, len(counted), out.shape[-1]).sum(0)  # Llama 4 leaves the sum to the block
        routed.append(added[counted.to(added.device)])  # a copy: some blocks add to the tensor itself
        return out

    def of_block(_: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        whole = (out[0] if isinstance(out, tuple) else out).detach().reshape(len(counted), -1)
        shared.add(layer, _compared(whole[counted.to(whole.device)], routed.pop()))
        return out

    return {experts: of_experts, block: of_block}


def _compared(block: Tensor, routed: Tensor) -> dict[str, Tensor]:
    """The numbers of tokens, of what a block and its routed experts put out `[n d_model]`."""
    eps = torch.finfo(block.dtype).eps
    block, routed = block.double(), routed.double()
    shared = block - routed
    norms = [x.norm(dim=-1) for x in (shared, routed, block)]
    shared = torch.where((norms[0] <= 16 * eps * norms[2])[:, None], 0, shared)  # a sum in another order
    size = norms[2].clamp(min=1e-30)
    norms[0] = shared.norm(dim=-1)
    values = (norms[0] / size, (shared * block).sum(-1) / size**2, *norms)
    return dict(zip(NAMES, values, strict=True))
