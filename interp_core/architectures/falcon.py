"""Falcon: blocks are parallel unless the config says no. Parallel ones add attention's output to the MLP's in place."""

from __future__ import annotations

from typing import Any

from .family import Family


def parallel(config: Any) -> bool:
    """Whether attention and MLP read the same stream."""
    return bool(config.new_decoder_architecture or config.parallel_attn)


FAMILY = Family("falcon", paths={"blocks.ln2": "post_attention_layernorm"}, parallel=parallel)
