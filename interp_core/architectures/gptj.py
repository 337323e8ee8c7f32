"""GPT-J computed attention by itself before transformers 5.24: only its probabilities had a module boundary (their
dropout)."""

from .family import Family

_OWN_ATTENTION = "GPT-J does not use transformers' attention interface, and this tensor crosses no module boundary"

FAMILY = Family(
    "gptj",
    parallel=lambda config: True,
    pattern="attn.attn_dropout",
    unseen=dict.fromkeys(("rot_q", "rot_k", "scores"), f"{_OWN_ATTENTION}; from transformers 5.24 on it does"),
)
