"""Qwen-VL: the position offset of the last image stays on the model and would shift the next text.

In Qwen3-VL, DeepStack adds visual features between the first blocks, outside any module, so `resid_post[l]` and
`resid_pre[l+1]` differ at visual positions there: read and edit layer inputs. What is added is the site `deepstack`.
"""

from .family import Family
from .qwen3_moe import ROUTER

CARRIED = ("model.rope_deltas",)
FAMILY = Family("qwen3_vl", carried=CARRIED)
MOE = Family("qwen3_vl_moe", carried=CARRIED, router=ROUTER)
QWEN2_5 = Family("qwen2_5_vl", carried=CARRIED)
