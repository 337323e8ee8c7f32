"""Phi-3 and Phi-4: a fused query-key-value projection; so in GPT-BigCode (StarCoder), which has one key head, and DBRX,
where attention and both norms lie in a module of their own."""

from .family import Family, fused_blocks

FAMILY = Family("phi3", fused=fused_blocks)
PHI4 = Family("phi4_multimodal", fused=fused_blocks)
BIGCODE = Family(
    "gpt_bigcode",
    fused=fused_blocks,
    refuse=dict.fromkeys(("rot_q", "rot_k"), "its positions are learnt embeddings, no rotary ones; read q and k"),
)
DBRX = Family(
    "dbrx",
    paths={
        "blocks": "transformer.blocks", "embed": "transformer.wte", "ln_final": "transformer.norm_f",
        "blocks.attn": "norm_attn_norm.attn", "blocks.attn.qkv": "Wqkv", "blocks.attn.o": "out_proj",
        "blocks.ln1": "norm_attn_norm.norm_1", "blocks.ln2": "norm_attn_norm.norm_2", "blocks.mlp": "ffn",
    },
    fused=fused_blocks,
)  # fmt: skip
