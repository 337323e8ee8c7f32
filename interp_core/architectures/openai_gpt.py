"""OpenAI's first GPT: a fused projection as GPT-2's, attention of its own, and a norm of the stream after each sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .bart import NO_ROTARY, NORMED
from .family import Family, Place, fused_blocks


def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """The norm of the sum."""
    return (block.ln_1 if site == "resid_mid" else block.ln_2)(before + added)


FAMILY = Family(
    "openai-gpt",
    fused=fused_blocks,
    places={"resid_mid": Place("ln_1", "out")},
    join=join,
    bare=True,
    refuse=NO_ROTARY | NORMED,
)
