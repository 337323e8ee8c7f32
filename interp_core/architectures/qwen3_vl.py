"""Qwen-VL: the position offset of the last image stays on the model and would shift the next text.

In Qwen3-VL, DeepStack adds visual features between the first blocks, outside any module, so `resid_post[l]` and
`resid_pre[l+1]` differ at visual positions there: read and edit layer inputs. What is added is the site `deepstack`.
"""

from typing import Any

from .family import Family
from .grids import by_grid_thw
from .qwen3_moe import ROUTER
from .towers import QWEN

CARRIED = ("model.rope_deltas",)
NEEDS = ("mm_token_type_ids",)
IMAGES: dict[str, Any] = {"carried": CARRIED, "grid": by_grid_thw, "pixels": "patch", "needs": NEEDS, "tower": QWEN}
"""What all Qwen-VL families have in common."""
FAMILY = Family("qwen3_vl", **IMAGES)
MOE = Family("qwen3_vl_moe", router=ROUTER, **IMAGES)
QWEN2_5 = Family("qwen2_5_vl", **IMAGES)
