"""GPT-NeoX (Pythia): query, key and value of a head lie side by side; blocks are parallel unless the config says no.

GPT-NeoX-Japanese and Persimmon (Fuyu's language model) have that projection in blocks that are not parallel.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .family import Family, fused_per_head


def last_bias(block: Any) -> Mapping[str, Tensor]:
    """GPT-NeoX-Japanese: in the last block attention hands a bias to the block, which adds it."""
    bias = block.attention.dense_bias
    return {} if bias is None else {"attn_out": bias.detach()}


FAMILY = Family("gpt_neox", fused=fused_per_head)
JAPANESE = Family("gpt_neox_japanese", fused=fused_per_head, biases=last_bias)
PERSIMMON = Family("persimmon", fused=fused_per_head)
FUYU = Family("fuyu", fused=fused_per_head)
