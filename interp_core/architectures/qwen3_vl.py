"""Qwen3-VL: the position offset of the last image stays on the model and would shift the next text.

DeepStack adds visual features between the first blocks, outside any module, so `resid_post[l]` and `resid_pre[l+1]`
differ at visual positions there: read and edit layer inputs.
"""

from .family import Family

FAMILY = Family("qwen3_vl", carried=("model.rope_deltas",))
