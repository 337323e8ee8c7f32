"""From the residual stream to logits, the way the model itself does it.

    logits = cap(scale * unembed(final_norm(resid)))

`cap` and `scale` are in the config of the families that have them (Gemma's `final_logit_softcapping`, Cohere's
`logit_scale`, Granite's `logits_scaling`). The self-check holds the result against the model's own logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
