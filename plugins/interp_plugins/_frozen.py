"""Norms with their scale held: the linear map that a norm is for vectors that leave its scale alone.

    N(x) = γ ⊙ (x - mean x) / σ + β      LayerNorm; RMSNorm leaves the mean in
    back(d) = (γ ⊙ d - mean(γ ⊙ d)) / σ      so that d · (N(x) - β) = back(d) · x

Gains and bias are those that `model.weights` and `model.bias` work out of the model's own module (Gemma's are 1 +
what is stored). σ and the mean are read off what the norm gave: 1 / σ is the factor that takes γ ⊙ x, with or without
its mean, nearest to N(x) - β, and a norm that is neither is refused. What a block multiplies by counts into its
gains; without a norm it is 1 / σ.

Source: this package.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

POST_NORMS = {"attn_out": "ln1_post", "mixer_out": "ln1_post", "mlp_out": "ln2_post"}


def mixed(model: ic.Model, layer: int) -> S.Site:
    """What a layer adds that mixes tokens: `attn_out`, or `mixer_out` where another mixer is in its place or beside."""
    return (S.attn_out if layer in model.layers(S.attn_out) else S.mixer_out)[layer]


def added(model: ic.Model, layer: int) -> list[S.Site]:
    """What a layer adds to the stream, as far as it does: what mixes tokens, and the MLP."""
    sites = (mixed(model, layer), S.mlp_out[layer])
    return [site for site in sites if layer in model.layers(S.named(site.name))]


class Frozen(NamedTuple):
    """A norm at some vectors.

    Attributes:
        gain, bias: `[d_model]`.
        inverse: 1 / σ `[batch]`.
        centred: the mean is taken out.
    """

    gain: Tensor
    bias: Tensor
    inverse: Tensor
    centred: bool

    def back(self, direction: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_model"]:
        """What a direction behind the norm is in front of it."""
        scaled = direction * self.gain
        if self.centred:
            scaled = scaled - scaled.mean(-1, keepdim=True)
        return scaled * self.inverse[:, None]


def frozen(
    model: ic.Model, site: S.Site, x: Float[Tensor, "batch d_model"], y: Float[Tensor, "batch d_model"]
) -> Frozen:
    """The norm that makes a site (`final_norm`, `attn_out[l]`, `mlp_out[l]`), held at `x`, for which it gave `y`; for
    what is added without a norm, the factor.

    Raises:
        CapabilityError: between them lies something else than LayerNorm, RMSNorm or a factor.
    """
    component = POST_NORMS.get(site.name)
    normed = component is None or component in model.components(site.layers if isinstance(site.layers, int) else None)
    gain, bias = (
        (model.weights(site).cpu().double(), model.bias(site).cpu().double())
        if normed
        else (x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1]))
    )
    # the gains may hold zeros, so the factor is fitted and not divided out
    fits = [_fit(x, y - bias, gain, centred) for centred in ((False, True) if normed else (False,))]
    off, inverse, centred = min(fits, key=lambda fit: float(fit[0].max()))
    slack = max(1e-4, 8 * torch.finfo(model.dtype).eps)
    if not bool((off <= slack).all()):
        raise ic.CapabilityError(
            f"{site} of {model.source} does not come out of {'a LayerNorm or RMSNorm' if normed else 'a factor'} with "
            f"its scale held (off by {float(off.max()):.1%})"
        )
    return Frozen(gain, bias, inverse, centred)


def _fit(x: Tensor, y: Tensor, gain: Tensor, centred: bool) -> tuple[Tensor, Tensor, bool]:
    """How far from y, as a share of it, the nearest multiple of γ ⊙ x is, and the factor `[batch]`."""
    scaled = gain * (x - x.mean(-1, keepdim=True) if centred else x)
    tiny = torch.finfo(x.dtype).tiny
    inverse = (scaled * y).sum(-1) / scaled.pow(2).sum(-1).clamp(min=tiny)
    off = (scaled * inverse[:, None] - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=tiny)
    return off, inverse, centred
