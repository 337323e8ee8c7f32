"""GPT-Neo computes attention by itself, without scaling, and every second layer looks back a short way only."""

from .family import Family

_NO_ROTARY = "GPT-Neo has learnt position embeddings, no rotary ones; read q and k"

FAMILY = Family(
    "gpt_neo",
    pattern="attn.attention.attn_dropout",
    refuse={"rot_q": _NO_ROTARY, "rot_k": _NO_ROTARY},
    unseen={"scores": "GPT-Neo does not use transformers' attention interface, and scores cross no module boundary"},
)
