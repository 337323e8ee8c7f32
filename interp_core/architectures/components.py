"""Components: the modules of a model by TransformerLens' names, so that code need not know a family's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import CapabilityError, SiteError, nearest, wrong

ENDS = ("embed", "embed_ln", "pos_embed", "rotary_emb", "ln_final", "unembed", "vision_encoder", "vision_projector")
"""Components that a model has once."""
OF_BLOCKS = (
    "block", "ln1", "attn", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.o",
    "linear_attn", "mixer", "ln1_post", "ln2", "mlp", "mlp.in", "mlp.gate", "mlp.out", "router", "experts", "ln2_post",
)  # fmt: skip
"""Components that a block may have, in the order of a forward pass. `ln1_post` and `ln2_post` norm what is added,
`mixer` is what mixes tokens, attention or not."""


class Components:
    """Modules by component and layer; layer None for what a model has once."""

    def __init__(self, family: str, n_layers: int) -> None:
        self.family, self.n_layers = family, n_layers
        self._modules: dict[tuple[str, int | None], nn.Module] = {}

    def add(self, component: str, layer: int | None, module: nn.Module) -> None:
        """Note where a component is; the first module counts."""
        self._modules.setdefault((component, layer), module)

    def add_block(self, layer: int, paths: Mapping[str, str], modules: Mapping[str, nn.Module]) -> None:
        """Note what a block has, by component. TransformerLens names the MLP's parts otherwise in blocks that stand
        among mixtures of experts."""
        for component, path in paths.items():
            name = component.replace("mlp.dense_", "mlp.")
            if name in OF_BLOCKS:
                self.add(name, layer, modules[path])

    def add_router(self, layer: int, router: nn.Module, experts: nn.Module) -> None:
        """Note a mixture of experts. Where TransformerLens calls its router the MLP's gate, that name is free again: a
        gate is the projection that gates an MLP's neurons."""
        self.add("router", layer, router)
        self.add("experts", layer, experts)
        if self._modules.get(("mlp.gate", layer)) is router:
            del self._modules["mlp.gate", layer]

    def layers(self, component: str) -> list[int]:
        """Layers that have the component."""
        return [layer for name, layer in self._modules if name == component and layer is not None]

    def names(self, layer: int | None = None) -> Iterator[str]:
        """What a layer has, or what the model has once."""
        return (name for name in (ENDS if layer is None else OF_BLOCKS) if (name, layer) in self._modules)

    def get(self, component: Any, layer: Any = None) -> nn.Module:
        """A component's module; see `Structure.module`."""
        if not isinstance(component, str) or component not in (*ENDS, *OF_BLOCKS):
            raise SiteError(f"no component is called {component!r}. {nearest(component, (*ENDS, *OF_BLOCKS), 99)}")
        if component in ENDS:
            if layer is not None:
                raise SiteError(f"{component} is in no layer: leave the layer out, module({component!r})")
        elif isinstance(layer, bool) or not isinstance(layer, int) or not -self.n_layers <= layer < self.n_layers:
            takes = f"a layer, 0 to {self.n_layers - 1}"
            raise SiteError(wrong(f"module({component!r}, layer)", takes, layer))
        number = None if layer is None else layer % self.n_layers
        if (module := self._modules.get((component, number))) is not None:
            return module
        if having := self.layers(component):
            shown = ", ".join(map(str, having))
            raise SiteError(f"layer {number} of this {self.family} has no {component}; layers {shown} have")
        raise CapabilityError(
            f"this {self.family} has no module for {component} that is known here; "
            f"it has {', '.join(self.names(number)) or 'none'}"
        )
