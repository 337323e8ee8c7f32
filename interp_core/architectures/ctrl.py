"""CTRL: GPT-2's blocks under other names. Attention takes its input three times, as values, keys and queries."""

from .bart import NO_ROTARY
from .family import Family, Place

FAMILY = Family(
    "ctrl",
    paths={
        "blocks": "transformer.h", "embed": "transformer.w", "ln_final": "transformer.layernorm",
        "blocks.ln1": "layernorm1", "blocks.attn": "multi_head_attention", "blocks.attn.q": "Wq", "blocks.attn.k": "Wk",
        "blocks.attn.v": "Wv", "blocks.attn.o": "dense", "blocks.ln2": "layernorm2", "blocks.mlp": "ffn",
        "blocks.mlp.in": "0", "blocks.mlp.out": "2",
    },
    places={"attn_in": Place("layernorm1", "out")},
    refuse=NO_ROTARY,
)  # fmt: skip
