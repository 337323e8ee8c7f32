"""GPT-J computed attention by itself before transformers 5.24: only its probabilities had a module boundary (their
dropout). CodeGen's one projection lies in four parts, each with queries, values and keys of a quarter of the heads."""

from .family import Family

_OWN_ATTENTION = "GPT-J does not use transformers' attention interface, and this tensor crosses no module boundary"

FAMILY = Family(
    "gptj",
    parallel=lambda config: True,
    pattern="attn.attn_dropout",
    unseen=dict.fromkeys(("rot_q", "rot_k", "scores"), f"{_OWN_ATTENTION}; from transformers 5.24 on it does"),
)
_IN_PARTS = "they lie in four parts of one projection, so heads are no view of it"
CODEGEN = Family(
    "codegen",
    parallel=lambda config: True,
    inside=("v",),
    refuse={"q": f"{_IN_PARTS}; rot_q has them rotated", "k": f"{_IN_PARTS}; rot_k has them rotated"},
)
