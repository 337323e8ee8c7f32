"""From the residual stream to logits, and from heads to the residual stream, the way the model itself does it.

    logits = cap(scale * unembed(final_norm(resid)))
    attention's output = z @ W_O + b_O

`cap` and `scale` are in the config of the families that have them (Gemma's `final_logit_softcapping`, Cohere's
`logit_scale`, Granite's `logits_scaling`). The self-check holds the result against the model's own logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .architectures.atlas import Atlas
from .errors import PlanError, wrong
from .sites import Site


def readout(model: Any, final_norm: nn.Module, resid: Tensor) -> Tensor:
    """Logits `[… d_vocab]` of a residual stream `[… d_model]`."""
    return unembed(model, final_norm(resid))


def unembed(model: Any, normed: Tensor) -> Tensor:
    """Logits `[… d_vocab]` of a normed residual stream `[… d_model]`."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(normed)
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def scale_of(config: Any) -> float:
    """The factor between unembedding and logits, before a cap."""
    return float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)


def project(atlas: Atlas, z: Tensor, layer: int, added: bool) -> Tensor:
    """What the attention of a layer gives `[… d_model]` for heads `[… head d_head]`; see `Model.project`."""
    heads, end = (atlas.select(Site(name, layer))[0] for name in ("z", "attn_out"))
    assert heads.module is not None and heads.read is not None and end.read is not None
    out = heads.module(z.flatten(-2))
    if not added:
        return out
    if not f"{heads.read.module}.".startswith(f"{end.read.module}."):  # neither attention nor its last projection
        assert end.module is not None
        out = end.module(out)
    return out if end.read.lens is None else out * end.read.lens.factor


def demand_width(what: str, value: Any, *ends: int) -> None:
    """Refuse what is no tensor of numbers that ends in these sizes.

    Raises:
        PlanError: saying what it is.
    """
    wanted = f"a tensor of numbers [… {' '.join(map(str, ends))}]"
    if not isinstance(value, Tensor):
        raise PlanError(wrong(what, wanted, value))
    if tuple(value.shape[-len(ends) :]) != ends or not value.is_floating_point():
        raise PlanError(f"{what} takes {wanted}, not {value.dtype} {list(value.shape)}")
