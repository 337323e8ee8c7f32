"""Qwen3-Next and Qwen3.5: linear attention in most layers, full attention in every fourth, with a gate on its output.

The query projection holds query and gate of each head side by side. `z` is what the output projection reads, after the
gate. Linear attention has `attn_in` and `attn_out`, but no heads that mix by a pattern.
"""

from typing import Any

from .family import Family, first_half
from .qwen3_moe import ROUTER
from .qwen3_vl import IMAGES

GATED: dict[str, Any] = {"views": {"q": first_half}}
FAMILY = Family("qwen3_next", router=ROUTER, **GATED)
_STREAMS = (
    "a block of Qwen4-Exp passes on several residual streams side by side, and mixes what attention and the MLP read "
    "of them; a site is of one stream"
)
QWEN4_EXP = Family(
    "qwen4_exp",
    router=ROUTER,
    refuse=dict.fromkeys(("resid_pre", "attn_out", "mixer_out", "resid_mid", "mlp_out", "resid_post"), _STREAMS)
    | dict.fromkeys(
        ("final_norm", "readout"), "a learnt mix and a norm lie between the last streams and the unembedding"
    ),
    **GATED,
)
QWEN3_5 = Family("qwen3_5", **GATED, **IMAGES)
QWEN3_5_MOE = Family("qwen3_5_moe", router=ROUTER, **GATED, **IMAGES)
