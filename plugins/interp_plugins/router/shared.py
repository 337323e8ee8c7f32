"""Shared experts, which every token has: how far their gate is open, and their part of what the block puts out.

    o = r + s      the block's output; s is what the same block puts out when its routed experts give nothing, so that
                   r is their weighted sum as it enters, with the factor or norm that some blocks put on it
    gate           mean of the gate (a sigmoid), where there is one; of several shared experts' weights their sum
    share          mean over tokens of ‖s‖ / ‖o‖; may be above 1, where r points the other way
    along          mean over tokens of s · o / ‖o‖²: the part of o that is due to s; with that of r it is 1

They are in no usage matrix: no router chooses them.

Source: this package.
Cost: one forward pass, in which blocks with experts run a second time without these; a number of each kind per layer.
Must equal: the shared expert's module, times its gate, over the block's output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

import interp_core as ic
from interp_core import sites as S

from .points import demand_routers, named
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
    blocks = {layer: _block(model, layer) for layer in demand_routers("shared experts", model)}
    gated = not model.can("shared_expert_gate", "read")
    shared = SharedExperts()
    for tokens in batches:
        places = Places(tokens, at)
        counted = places.mask(tokens)
        rules: dict[Any, Any] = {}
        for layer, (block, experts) in blocks.items():
            rules |= _rules(shared, layer, block, experts, counted)
        with model.replacing(rules):
            run = model.run(tokens, read=[S.shared_expert_gate] if gated else [], logits=-1)
        for layer in blocks if gated else ():
            shared.add(layer, {"gate": places.of(run[S.shared_expert_gate[layer]].plain.sum(-1))})
        shared.tokens += int(counted.sum())
        if not any(sums["shared_norm"] for sums in shared.sums.values()):
            raise ic.CapabilityError(
                f"shared experts: {named(model)} has none in its blocks with routers: these put out nothing without "
                "the routed experts"
            )
    return shared


def _block(model: ic.Model, layer: int) -> tuple[nn.Module, nn.Module]:
    """The module that adds routed and shared experts up, and the routed experts in it.

    Raises:
        CapabilityError: they are added up elsewhere.
    """
    block, experts = model.module("mlp", layer), model.module("experts", layer)
    if why := model.can("expert_out", "read"):
        raise ic.CapabilityError(f"shared experts: of {named(model)} no expert is known by itself: {why}")
    if experts not in block.modules():
        raise ic.CapabilityError(
            f"shared experts: in {named(model)} what every token has stands beside the block with the router, not in "
            f"it; compare expert_out with what module {type(block).__name__} of layer {layer} puts out"
        )
    return block, experts


def _rules(shared: SharedExperts, layer: int, block: Any, experts: Any, counted: Bool[Tensor, " token"]) -> Any:
    """What runs a block again with experts that give nothing, and compares what it puts out both times."""
    gave: list[Tensor] = []

    def of_experts(_: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if gave:
            return torch.zeros_like(gave.pop())
        gave.append(forward(*args, **kwargs))
        return gave[0]

    def of_block(_: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        whole = forward(*args, **kwargs)
        shared.add(layer, _compared(*(_counted(out, counted) for out in (whole, forward(*args, **kwargs)))))
        return whole

    return {experts: of_experts, block: of_block}


def _counted(out: Any, counted: Bool[Tensor, " token"]) -> Tensor:
    """What a block puts out at tokens that count `[n d_model]`."""
    flat = (out[0] if isinstance(out, tuple) else out).detach().reshape(len(counted), -1)
    return flat[counted.to(flat.device)].double()


def _compared(block: Tensor, shared: Tensor) -> dict[str, Tensor]:
    """The numbers of tokens, of what a block and its shared experts put out `[n d_model]`."""
    norms = [x.norm(dim=-1) for x in (shared, block - shared, block)]
    size = norms[2].clamp(min=1e-30)
    values = (norms[0] / size, (shared * block).sum(-1) / size**2, *norms)
    return dict(zip(NAMES, values, strict=True))
