"""GPT-Neo computes attention by itself, without scaling, and every second layer looks back a short way only."""

from .family import Family

_NO_ROTARY = "GPT-Neo has learnt position embeddings, no rotary ones; read q and k"

FAMILY = Family(
    "gpt_neo",
    refuse={"rot_q": _NO_ROTARY, "rot_k": _NO_ROTARY},
)
