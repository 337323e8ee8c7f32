"""OPT: no module holds the MLP, whose parts see batch and pos flattened; queries are scaled before they meet the keys.

OPT-350m norms the stream after attention and after the MLP, so the stream between the two is what the MLP reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, Place


def refuse_if(config: Any) -> Mapping[str, str]:
    """OPT-350m's blocks norm the stream itself."""
    if config.do_layer_norm_before:
        return {}
    why = "this OPT norms the stream itself after attention, so no sum of resid_pre and attn_out passes; read mlp_in"
    return {"resid_mid": why}


_NO_ROTARY = "OPT has learnt position embeddings, no rotary ones; read q and k"

FAMILY = Family(
    "opt",
    refuse={"rot_q": _NO_ROTARY, "rot_k": _NO_ROTARY},
    places={
        "resid_mid": Place("final_layer_norm", "in", flat=True),
        "mlp_in": Place("fc1", "in", flat=True),
        "mlp_act": Place("fc2", "in", flat=True),
        "mlp_out": Place("fc2", "out", flat=True),
    },
    refuse_if=refuse_if,
)
