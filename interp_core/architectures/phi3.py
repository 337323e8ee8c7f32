"""Phi-3 and Phi-4: a fused query-key-value projection; so in GPT-BigCode (StarCoder), whose heads share one key head or
have one each."""

from .family import Family, fused_blocks, fused_per_head_or_shared

FAMILY = Family("phi3", fused=fused_blocks)
PHI4 = Family("phi4_multimodal", fused=fused_blocks)
BIGCODE = Family(
    "gpt_bigcode",
    fused=fused_per_head_or_shared,
    refuse=dict.fromkeys(("rot_q", "rot_k"), "its positions are learnt embeddings, no rotary ones; read q and k"),
)
