"""GPT-J computes attention by itself, so only its probabilities have a module boundary (their dropout)."""

from .family import Family

_OWN_ATTENTION = "GPT-J does not use transformers' attention interface, and this tensor crosses no module boundary"

FAMILY = Family(
    "gptj",
    parallel=lambda config: True,
    pattern="attn.attn_dropout",
    refuse=dict.fromkeys(("rot_q", "rot_k", "scores"), _OWN_ATTENTION),
)
