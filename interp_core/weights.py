"""Weights by site, laid out as TransformerLens has them; see `Structure.weights` for shapes.

A projection's weights are its module's own matrix, seen through the view by which its site sees what the module gives,
so that fused, transposed and grouped layouts come out right wherever the site does. Of a module that is no plain matrix
(quantized, adapted, scaled, a norm) the weights are worked out from what it gives: a linear map from the
unit vectors, an embedding from all ids, a norm from one vector of mean 0; and then held against it on random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .architectures.atlas import Atlas, Entry
from .architectures.parameters import (
    ROWS,
    Weights,
    by_unit_vectors,
    device_of,
    is_numbers,
    is_plain,
    matrix,
    parameter,
    runs_own_forward,
    widths,
)  # fmt: skip
from .architectures.shards import called
from .errors import CapabilityError, SiteError, nearest
from .indexing import indices
from .readout import scale_of
from .sites import Site

HEADS = ("q", "k", "v")
INPUTS = {
    **dict.fromkeys(("attn_in", "mixer_in"), (("ln1",), ("resid_pre",))),
    "mlp_in": (("ln2", "ln1"), ("resid_mid", "resid_pre")),
}
"""Sites that a norm makes in most families: the components that it may be, and the sites that it may read."""
ADDED = {"attn_out": "ln1_post", "mixer_out": "ln1_post", "mlp_out": "ln2_post"}
"""Sites that a norm makes in families with post-norms, and the component that it is."""
KNOWN = (*HEADS, "z", "mlp_act", "embed", "logits", *INPUTS, *ADDED, "final_norm")


class WeightReader(NamedTuple):
    """Where weights are read.

    Attributes:
        atlas: of the model.
        loaded: the model whose modules the atlas has.
        running: the model that the engine runs: its parameters are those that count.
        dtype: of what modules are called with.
        sample: values of sites on a few tokens.
    """

    atlas: Atlas
    loaded: nn.Module
    running: nn.Module
    dtype: torch.dtype
    sample: Callable[[Sequence[Site]], list[Tensor]]

    @torch.no_grad()
    def read(self, site: Site, bias: bool = False) -> Weights:
        """Weights of the units that a site names, and the bias.

        Args:
            bias: it is the bias that is asked for, so there must be one for just this.

        Raises:
            SiteError, CapabilityError: see `Structure.weights`.
        """
        if site.name not in KNOWN:
            raise SiteError(f"no weights belong to {site.name}. {nearest(site.name, KNOWN)}")
        if site.pos is not None or site.key is not None:
            raise SiteError(f"{site}: weights are the same at all positions; leave .at(…) out")
        if bias and site.name == "embed":
            raise SiteError("an embedding has no bias")
        if bias and site.units is not None and site.name not in HEADS:
            raise SiteError(f"{site}: the bias is that of the whole projection, of no {site.info.unit} by itself")
        entries = self.atlas.select(site)
        if site.name in INPUTS:
            layers = [self._norm(entry, module) for entry, module in self._norms(site.name, entries)]
        elif site.name in ADDED:
            layers = [self._added(entry) for entry in entries]
        else:
            layers = [self._in_layer(site, entry) for entry in entries]
        if isinstance(site.layers, int) or not site.info.layered:
            return layers[0]
        if len({layer.weight.shape for layer in layers}) > 1:
            raise CapabilityError(f"{site}: the weights have other shapes in other layers; ask for one layer")
        place = layers[0].weight.device  # of several devices, the first layer's
        return Weights(*(torch.stack([part.to(place) for part in parts]) for parts in zip(*layers, strict=True)))

    def _in_layer(self, site: Site, entry: Entry) -> Weights:
        if entry.name == "embed":
            table = self._table(entry)
            return Weights(table, table.new_zeros(table.shape[1:]))
        if entry.name == "final_norm":
            return self._norm(entry, entry.module)
        module = self.atlas.module("unembed") if entry.name == "logits" else entry.module
        weight, bias = self._linear(entry, module)
        if entry.name in ("z", "mlp_act"):
            weight = weight.unflatten(0, (entry.sizes["head"], -1)) if entry.name == "z" else weight
            return Weights(_chosen(weight, site, entry), bias)
        # Latent attention projects twice, with a norm between: no one matrix leads from the stream to the heads.
        if len(weight) != self.atlas.shape.d_model:
            raise CapabilityError(
                f"{self._what(entry)} comes out of a latent of {len(weight)} numbers, not of the stream's "
                f"{self.atlas.shape.d_model}, so there is no such matrix; see model.module for the modules themselves"
            )
        if entry.name == "logits":
            scale = scale_of(self.loaded)
            return Weights(weight, bias) if scale == 1 else Weights(weight * scale, bias * scale)
        assert entry.view is not None
        by_head, bias = entry.view(weight[None])[0].transpose(0, 1), entry.view(bias[None, None])[0, 0]
        return Weights(_chosen(by_head, site, entry), _chosen(bias, site, entry))

    def _what(self, entry: Entry) -> str:
        where = f" in layer {entry.layer}" if Site(entry.name).info.layered else ""
        return f"{entry.name} of this {self.atlas.family.name}{where}"

    def _linear(self, entry: Entry, module: nn.Module | None) -> Weights:
        """The matrix of a linear map, `[in out]`, and its bias."""
        if module is not None and is_plain(module):
            self._demand_running(entry, module)
            weights = matrix(module, module.weight)  # type: ignore[arg-type]
            return Weights(weights.weight.detach(), weights.bias.detach())
        try:
            width = widths(module)[0] if module is not None else 0
        except CapabilityError:
            width = 0
        if module is None or not width:
            raise CapabilityError(f"{self._what(entry)} does not come out of one linear map; see model.module")
        self._demand_running(entry, module)
        linear = by_unit_vectors(partial(called, module), self._like(module, torch.zeros(0)), width)
        if linear is None:
            raise CapabilityError(f"{self._what(entry)} comes out of a map that is not linear to rounding")
        return linear

    def _table(self, entry: Entry) -> Tensor:
        """What an embedding gives for every id `[d_vocab d_model]`."""
        module = entry.module
        assert module is not None
        self._demand_running(entry, module)
        plain = runs_own_forward(module) and type(module).forward is nn.Embedding.forward
        if plain and is_numbers(module.weight):
            return parameter(module).detach()
        ids = torch.arange(len(module.weight), device=device_of(module))  # type: ignore[arg-type]
        return torch.cat([module(part) for part in ids.split(ROWS)])

    def _norm(self, entry: Entry, module: nn.Module | None) -> Weights:
        """Gains and bias of a norm, from what it gives for a vector ±c of mean 0: that has the deviation c, beside
        which what the norm adds to the variance is nothing."""
        assert module is not None
        self._demand_running(entry, module)
        # A power of two, which scales without rounding; float16 ends at 2^16.
        c = 2.0**10 if self.dtype is torch.float16 else 2.0**24
        sign = torch.ones(self.atlas.shape.d_model)
        sign[1::2] = -1
        up, down = module(self._like(module, c * torch.stack([sign, -sign]))[None])[0]  # a convolution has positions
        weights = Weights((up - down) / 2 * sign.to(up), (up + down) / 2)
        x = self._like(module, c * _random(8, len(sign)))[None]
        eps = max(torch.finfo(kind).eps for kind in (self.dtype, torch.float32))
        gain, bias = weights.weight.double(), weights.bias.double()
        # RMSNorm leaves the mean in, LayerNorm takes it out; for ±c above both are the same.
        for mean in (0.0, x.double().mean(-1, keepdim=True)):
            values = x.double() - mean
            values = values / values.pow(2).mean(-1, keepdim=True).sqrt()
            size = (1 + values.abs()) * gain.abs() + bias.abs()  # 1 is the deviation, against which a mean rounds
            if _close(module(x), values * gain + bias, 8 * eps * size):
                return weights
        raise CapabilityError(
            f"{self._what(entry)} is made by {type(module).__name__}, which is no LayerNorm or RMSNorm with gains; see "
            "model.module"
        )

    def _added(self, entry: Entry) -> Weights:
        """Gains and bias of the norm of what is added, with the factor that the block multiplies by."""
        if (component := ADDED[entry.name]) not in self.atlas.components.names(entry.layer):
            raise CapabilityError(f"{self._what(entry)} is not what a norm makes: this layer has no {component}")
        norm = self._norm(entry, self.atlas.module(component, entry.layer))
        factor = entry.read.layout.factor if entry.read is not None and entry.read.layout is not None else 1.0
        return Weights(norm.weight * factor, norm.bias * factor)

    def _norms(self, name: str, entries: Sequence[Entry]) -> Iterator[tuple[Entry, nn.Module]]:
        """The norm that makes a site, layer by layer: of those that it may be, the one that on a few tokens does."""
        components, sources = INPUTS[name]
        reads = [[name, *(site for site in sources if (site, entry.layer) in self.atlas.entries)] for entry in entries]
        sites = [Site(site, entry.layer) for entry, named in zip(entries, reads, strict=True) for site in named]
        values = iter(self.sample(sites))
        for entry, named in zip(entries, reads, strict=True):
            layer = entry.layer
            value, *streams = (next(values) for _ in named)
            names = [component for component in components if component in self.atlas.components.names(layer)]
            modules = [self.atlas.module(component, layer) for component in names]
            rounding = 16 * torch.finfo(value.dtype).eps * value.abs().amax(-1, keepdim=True)
            makers = (m for m in modules for x in streams if _close(m(x), value, rounding))
            if (module := next(makers, None)) is None:
                raise CapabilityError(
                    f"{self._what(entry)} is not what a norm makes of the stream "
                    f"(tried: {', '.join(names) or 'this layer has none'})"
                )
            yield entry, module

    def _like(self, module: nn.Module, x: Tensor) -> Tensor:
        """Numbers as a module takes them."""
        return x.to(device_of(module, self.running), self.dtype)

    def _demand_running(self, entry: Entry, module: nn.Module) -> None:
        """Refuse weights that are not those that the engine's runs have."""
        if self.running is self.loaded:
            return
        known = {id(parameter) for parameter in self.running.parameters()}
        if any(id(parameter) not in known for parameter in module.parameters()):
            raise CapabilityError(
                f"{self._what(entry)}: this engine runs with weights of its own (folded ones); load without fold, or "
                "take them from the engine's model"
            )


def _chosen(values: Tensor, site: Site, entry: Entry) -> Tensor:
    """Of values `[unit …]` those of the units that a site names."""
    if site.units is None:
        return values
    chosen = indices(site.units, len(values), site.info.unit or "unit", site)
    return values[chosen[0]] if isinstance(site.units, int) else values[list(chosen)]


def _random(*shape: int) -> Tensor:
    """Normal numbers, the same every time, that leave torch's own random state alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _close(a: Tensor, b: Tensor, slack: Tensor | None = None) -> bool:
    """Whether two results differ by no more than a few roundings, and `slack`."""
    allowed = 4 * torch.finfo(a.dtype).eps * b.abs() + (torch.zeros_like(b) if slack is None else slack)
    return a.shape == b.shape and bool(((a - b).abs() <= allowed).all())
