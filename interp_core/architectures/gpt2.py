"""GPT-2: one projection holds all queries, then all keys, then all values."""

from .family import Family, fused_blocks

_NO_ROTARY = "GPT-2 has learnt position embeddings, no rotary ones; read q and k"

FAMILY = Family("gpt2", fused=fused_blocks, refuse={"rot_q": _NO_ROTARY, "rot_k": _NO_ROTARY})
