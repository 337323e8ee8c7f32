"""GGUF files as llama.cpp writes them: a small Llama, its weights as they are or quantised, with a tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
MERGES = [("Ġ", "b"), ("i", "g"), ("Ġb", "ig"), ("o", "l")]
N_HEADS, N_KV = 4, 2


@cache
def tokenizer() -> Any:
    """Bytes, a few merges, and an end of text: short, since a file's reader takes a while for every token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġb", "ig", "Ġbig", "ol"]
    bpe = models.BPE({token: i for i, token in enumerate(alphabet)}, MERGES)
    made = Tokenizer(bpe)
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    made.add_special_tokens([end])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=end, eos_token=end, chat_template=TEMPLATE
    )


@cache
def llama() -> Any:
    """The model that the files hold."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=N_HEADS, num_key_value_heads=N_KV, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, rms_norm_eps=2.0**-17,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""What llama.cpp calls the modules of a layer."""


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Weights under llama.cpp's names; it keeps the rotary pairs of a head side by side."""
    found = {}
    for name, weight in llama().state_dict().items():
        value = weight.numpy()
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            found["token_embd.weight" if "embed" in name else "output_norm.weight"] = value
        elif name != "lm_head.weight":
            _, _, layer, module = name.removesuffix(".weight").split(".", 3)
            if module.endswith(("q_proj", "k_proj")):
                heads = N_HEADS if module.endswith("q_proj") else N_KV
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            found[f"blk.{layer}.{NAMES[module]}.weight"] = value
    return found


def write(
    path: Path,
    quant: str = "F32",
    *,
    vocabulary: bool = True,
    architecture: str = "llama",
    scaling: str = "",
    without: str = "",
    more: dict[str, Any] | None = None,
) -> str:
    """Write a file; matrices are quantised to `quant`, or all but a tensor is left out, or more are added."""
    import gguf

    kind = gguf.GGMLQuantizationType[quant]
    out = gguf.GGUFWriter(path, architecture)
    config = llama().config
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(N_HEADS)
    out.add_head_count_kv(N_KV)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_rope_dimension_count(config.hidden_size // N_HEADS)
    out.add_vocab_size(config.vocab_size)
    if scaling:
        out.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        out.add_rope_scaling_factor(4.0)
    if vocabulary:
        ids = tokenizer().get_vocab()
        tokens = sorted(ids, key=ids.__getitem__)
        out.add_tokenizer_model("gpt2")
        out.add_token_list(tokens)
        out.add_token_merges([" ".join(pair) for pair in MERGES])
        out.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
        out.add_bos_token_id(len(tokens) - 1)
        out.add_eos_token_id(len(tokens) - 1)
        out.add_chat_template(TEMPLATE)
    for name, value in (tensors() | (more or {})).items():
        if name != without:
            packed = value.ndim == 2 and quant != "F32"
            data = gguf.quants.quantize(value, kind) if packed else value
            out.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind if packed else None)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return str(path)
