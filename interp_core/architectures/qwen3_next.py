"""Qwen3-Next and Qwen3.5: linear attention in most layers, full attention in every fourth, with a gate on its output.

The query projection holds query and gate of each head side by side. `z` is what the output projection reads, after the
gate. Linear attention has `attn_in` and `attn_out`, but no heads that mix by a pattern.
"""

from .family import Family, first_half
from .grids import by_grid_thw
from .qwen3_moe import ROUTER
from .qwen3_vl import CARRIED, NEEDS
from .towers import QWEN

FAMILY = Family("qwen3_next", views={"q": first_half}, gated=True, router=ROUTER)
QWEN3_5 = Family(
    "qwen3_5",
    views={"q": first_half},
    gated=True,
    carried=CARRIED,
    grid=by_grid_thw,
    pixels="patch",
    needs=NEEDS,
    tower=QWEN,
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe",
    views={"q": first_half},
    gated=True,
    router=ROUTER,
    carried=CARRIED,
    grid=by_grid_thw,
    pixels="patch",
    needs=NEEDS,
    tower=QWEN,
)
