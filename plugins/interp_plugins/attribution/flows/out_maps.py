"""What each layer makes of what its heads mix: a linear map, so that a layer's output has parts by heads and tokens.

    attn_out = norm(z @ W_O + bias)      a post-norm's gains go into W_O and bias here, its 1 / rms is each row's

Layers in which something else lies between heads and stream are refused before the model runs. The profile
"reference" makes values of the stream itself, as the published code does: by its eps, with gains and without biases.

Source: Ferrando and Voita (2024), arXiv:2403.00824; the reference is FlashTrace (Pan et al. 2026), arXiv:2602.01914.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .linear import head_size, projection, rule_name

Profile = Literal["sound", "reference"]
EPS = 1e-6
"""What the published code adds to every variance, whatever the model's config says."""


class OutMap(NamedTuple):
    """What a layer makes of what its heads mix.

    Attributes:
        w_o: output projection, with a post-norm's gains, as it lies in memory `[d_model head d_head]`.
        longest: each head's longest column of it.
        bias: its bias, with the gains `[d_model]`.
        own: bias of the post-norm `[d_model]`.
        normed: there is a post-norm.
        biased: there are biases, whose part is told apart.
        w_v: in the reference, value projection, gains before it and whether its norm takes the mean away.
    """

    w_o: Float[Tensor, "d_model head d_head"]
    longest: Float[Tensor, " head"]
    bias: Tensor
    own: Tensor
    normed: bool
    biased: bool
    w_v: tuple[Tensor, Tensor, bool] | None


def maps_of(model: ic.Model, profile: Profile) -> list[OutMap]:
    """What every layer makes of what its heads mix.

    Raises:
        CapabilityError: weights that there are not, or families that the reference does not know.
    """
    wide, maps = torch.promote_types(model.dtype, torch.float32), []
    gains = model.weights(S.attn_in).to(wide) if profile == "reference" else None
    for layer in range(model.n_layers):
        w_o, bias = (x.to(wide) for x in _projected(model, layer))
        own, normed = torch.zeros_like(bias), "ln1_post" in components(model, layer)
        if normed:
            post, own = (of(S.attn_out[layer]).to(wide) for of in (model.weights, model.bias))
            w_o, bias = w_o * post, bias * post
        w_v = None
        if gains is not None:
            if normed or model.layers("resid_mid") != list(range(model.n_layers)):
                what = "norms behind attention" if normed else "parallel blocks"
                raise ic.CapabilityError(
                    f"profile 'reference' follows published code that knows no {what}, which {model.source} has; use "
                    "profile='sound'"
                )
            if layer not in model.layers("pattern"):
                raise ic.CapabilityError(
                    f"profile 'reference' follows published code that knows no linear attention, which layer {layer} "
                    f"of {model.source} has; use profile='sound'"
                )
            centred = isinstance(model.module("ln1", layer), torch.nn.LayerNorm)
            w_v = model.weights(S.v[layer]).to(wide), gains[layer], centred
        biased = w_v is None and bool(bias.any() | own.any())
        w_o = w_o.permute(2, 0, 1).contiguous()
        maps.append(OutMap(w_o, w_o.norm(dim=-1).amax(0), bias, own, normed, biased, w_v))
    return maps


def _projected(model: ic.Model, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's output projection `[head d_head d_model]` and its bias; of linear attention the module's own."""
    if layer in model.layers("z"):
        return model.weights(S.z[layer]), model.bias(S.z[layer])
    module = model.module("linear_attn", layer)
    linear = projection(module)
    weight = linear.weight.detach().mT.unflatten(0, (-1, head_size(module)))
    return weight, weight.new_zeros(weight.shape[-1]) if linear.bias is None else linear.bias.detach()


def reference_values(before: Float[Tensor, "pos d_model"], w_v: Tensor, gains: Tensor, centred: bool) -> Tensor:
    """Values as the published code makes them `[pos kv_head d_head]`: an eps of 1e-6, no mean taken away, no biases."""
    spread = before.var(-1, correction=0, keepdim=True) if centred else before.square().mean(-1, keepdim=True)
    return torch.einsum("pm,hmd->phd", before * gains * (spread + EPS).rsqrt(), w_v)


def components(model: ic.Model, layer: int) -> set[str]:
    """Which of the components that matter here a layer has."""
    names = set()
    for name in ("ln1_post", "linear_attn"):
        try:
            model.module(name, layer)
        except (ic.SiteError, ic.CapabilityError):
            continue
        names.add(name)
    return names


def demand_patterns(model: ic.Model, *, linear: bool = False) -> None:
    """Refuse a model that has layers whose mixing is no pattern of heads, before it runs.

    Args:
        linear: linear attention whose rule is known will do.

    Raises:
        CapabilityError: naming the layer.
    """
    for name in ("resid_pre", "attn_out", "v", "z", "pattern"):
        if why := model.can(name, "read"):
            raise ic.CapabilityError(f"information flow is told by values, heads and patterns: {why}")
    for layer in range(model.n_layers):
        if lacking := [name for name in ("v", "z", "pattern") if layer not in model.layers(name)]:
            known = "linear_attn" in components(model, layer)
            if linear and known and rule_name(model.module("linear_attn", layer)):
                continue
            mixer = "mixer" in model.components(layer) and type(model.module("mixer", layer)).__name__
            what = "linear attention" if known else mixer or "something"
            raise ic.CapabilityError(
                f"layer {layer} of {model.source} mixes tokens by {what} without {' and '.join(lacking)} of heads, and "
                f"information flow is told by these; layers {', '.join(map(str, model.layers('pattern')))} have them"
            )
