"""OPT: no module holds the MLP, whose parts see batch and pos flattened; queries are scaled before they meet the keys.

OPT-350m norms the stream itself after attention and after the MLP, so `resid_mid` and `resid_post` are normed sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .family import Family, Place


def places(config: Any) -> Mapping[str, Place]:
    """Where the stream passes between attention and MLP, and the parts of the MLP."""
    before = Place("final_layer_norm", "in", flat=True)
    return {
        "resid_mid": before if config.do_layer_norm_before else Place("self_attn_layer_norm", "out"),
        "mlp_in": Place("fc1", "in", flat=True),
        "mlp_act": Place("fc2", "in", flat=True),
        "mlp_out": Place("fc2", "out", flat=True),
    }


def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """The sum, or its norm."""
    total = before + added
    if block.do_layer_norm_before:
        return total
    return block.self_attn_layer_norm(total) if site == "resid_mid" else block.final_layer_norm(total)


_NO_ROTARY = "OPT has learnt position embeddings, no rotary ones; read q and k"

FAMILY = Family("opt", refuse={"rot_q": _NO_ROTARY, "rot_k": _NO_ROTARY}, places=places, join=join)
