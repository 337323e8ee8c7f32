"""The family of `model.py`: Llama's names, but for the output projection of the MLP."""

from interp_core.architectures.family import Family

FAMILY = Family(
    "hello",
    paths={
        "blocks": "model.layers",
        "blocks.ln1": "input_layernorm",
        "blocks.attn": "self_attn",
        "blocks.attn.q": "q_proj",
        "blocks.attn.k": "k_proj",
        "blocks.attn.v": "v_proj",
        "blocks.attn.o": "o_proj",
        "blocks.ln2": "post_attention_layernorm",
        "blocks.mlp": "mlp",
        "blocks.mlp.in": "up_proj",
        "blocks.mlp.gate": "gate_proj",
        "blocks.mlp.out": "squeeze",
        "embed": "model.embed_tokens",
        "ln_final": "model.norm",
        "unembed": "lm_head",
    },
)
