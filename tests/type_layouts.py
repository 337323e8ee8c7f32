"""Where hand-written hooks find things in the tiny models of every type (`interp_core.testing.types`), written out.

As in `layouts`, nothing comes from the atlas. Types that `layouts` describes are there; what is not in either has sites
that no hand-written hook holds, and the matrix says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hybrid_layouts
import layouts
from hybrid_layouts import LATENT
from layouts import LLAMA, SANDWICH
from torch import Tensor
from visual_layouts import around

POST = LLAMA | {"mid": "mlp", "attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
GLM4 = LLAMA | {"attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"}
PARALLEL = {key: path for key, path in LLAMA.items() if key != "mid"}
FUSED = {key: path for key, path in LLAMA.items() if key not in "qkv"}
SHARED = LLAMA | {
    "mlp_reads": "post_attention_layernorm", "mlp_beside": "block_sparse_moe", "mlp_out": "shared_mlp",
    "down": "shared_mlp.output_linear",
}  # fmt: skip
HYBRID = LLAMA | {
    "norm": "model.final_layernorm", "mlp": "feed_forward", "down": "feed_forward.down_proj", "mid": "pre_ff_layernorm",
    "mlp_out": "feed_forward",
}  # fmt: skip
LFM = HYBRID | {
    "norm": "model.embedding_norm", "o": "self_attn.out_proj", "down": "feed_forward.w2", "mid": "ffn_norm",
}  # fmt: skip
GPT = {
    "embed": "transformer.wte", "blocks": "transformer.h", "norm": "transformer.ln_f", "attn": "attn", "mlp": "mlp",
    "attn_out": "attn", "mlp_out": "mlp", "qkv": "attn.c_attn", "o": "attn.c_proj", "down": "mlp.c_proj", "mid": "ln_2",
}  # fmt: skip
BERT = {
    "attn": "attention.self", "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "o": "attention.output.dense", "mlp": "intermediate", "down": "output.dense", "mid_out": "attention.output",
    "attn_out": "attention.output.dense", "mlp_out": "output.dense",
}  # fmt: skip
PRE = {key: path for key, path in BERT.items() if key != "mid_out"} | {"mid": "intermediate.LayerNorm"}
"""Kin of BERT that norm what attention and MLP read."""
BART = {
    "attn": "self_attn", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.out_proj", "mlp": "fc1", "down": "fc2", "attn_out": "self_attn", "mlp_out": "fc2",
}  # fmt: skip
MAMBA = {
    "embed": "backbone.embeddings", "blocks": "backbone.layers", "norm": "backbone.norm_f", "attn": "mixer",
    "attn_out": "mixer",
}  # fmt: skip
NEOX = {
    "attn": "attention", "qkv": "attention.query_key_value", "o": "attention.dense", "mlp": "mlp",
    "down": "mlp.dense_4h_to_h", "attn_out": "attention", "mlp_out": "mlp",
}  # fmt: skip


def inside(layout: dict[str, str], model: str) -> dict[str, str]:
    """The same blocks, deeper in a model."""
    return layout | {"embed": f"{model}.embed_tokens", "blocks": f"{model}.layers", "norm": f"{model}.norm"}


def encoder(model: str, layout: dict[str, str] = BERT) -> dict[str, str]:
    """Blocks of BERT and its kin."""
    ends = {"embed": f"{model}.embeddings.word_embeddings", "blocks": f"{model}.encoder.layer", "norm": ""}
    return layout | ends


def decoder(model: str, layout: dict[str, str]) -> dict[str, str]:
    """Blocks of BART's decoder and its kin."""
    return layout | {"embed": f"{model}.embed_tokens", "blocks": f"{model}.layers", "norm": f"{model}.layer_norm"}


PLAIN = (
    "arcee", "bitnet", "cwm", "diffllama", "emu3", "ernie4_5", "exaone", "gemma", "glm", "granite", "granite_swa",
    "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "jais2", "ministral", "ministral3", "mllama", "nemotron",
    "olmo", "seed_oss", "smollm3", "stablelm",
)  # fmt: skip
"""Types with Llama's blocks."""
MIXED = (
    "aria_text", "dots1", "ernie4_5_moe", "exaone_moe", "flint", "hunyuan_v1_moe", "hy_v3", "laguna", "mellum",
    "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "phimoe", "solar_open",
)  # fmt: skip
"""Types with Llama's blocks and experts in some layers or all."""
LATENTLY = (
    "axk1", "axk2", "deepseek_v2", "dots3_note", "dots3_note_text", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "mistral_large4", "youtu",
)  # fmt: skip
"""Types whose keys and values come out of a latent."""
NORMED = ("bart", "blenderbot-small", "marian", "mvp", "plbart", "trocr")
"""Decoders that norm the stream after each sum; the others norm what attention and MLP read."""
PRENORMED = ("blenderbot", "mbart", "pegasus", "whisper")
BERTS = {
    "bert": "bert", "camembert": "roberta", "data2vec-text": "data2vec_text", "electra": "electra", "ernie": "ernie",
    "roberta": "roberta", "xlm-roberta": "roberta", "bert-generation": "bert", "big_bird": "bert",
    "rembert": "rembert", "roc_bert": "roc_bert", "roformer": "roformer", "xmod": "roberta",
}  # fmt: skip
"""BERT and its kin, and what their encoder is called."""
QWEN4 = ("qwen4_exp", "qwen4_exp_text")
KIN = {
    "llama4_text": "llama4", "qwen3_5_moe_text": "qwen3_5_moe", "sarvam_mla": "deepseek_v3", "sarvam_moe": "glm4_moe",
}  # fmt: skip
"""Types whose classes are another's, and whose routers select as that one's."""
LAYOUT: dict[str, dict[str, str]] = {
    **layouts.LAYOUT,
    **hybrid_layouts.LAYOUT,
    **dict.fromkeys((*PLAIN, *MIXED), LLAMA),
    **dict.fromkeys(LATENTLY, LATENT),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere_compass_text"), PARALLEL),
    **dict.fromkeys(("exaone4", "flex_olmo", "olmo3"), POST),
    **dict.fromkeys(("gemma3_text", "gemma4_unified_text", "gemma4_text"), SANDWICH),
    **dict.fromkeys(("apertus", "apertus1p5_text"), LLAMA | {"mid": "feedforward_layernorm"}),
    **dict.fromkeys(("got_ocr2", "moss_transcribe_diarize"), inside(LLAMA, "model.language_model")),
    "gemma4": SANDWICH,
    "gemma4_unified": inside(SANDWICH, "model.language_model"),
    "mistral_large4": LATENT | {"q": "self_attn.q_proj"},
    "axk2": LATENT | {"q": "self_attn.q_gate_proj"},
    "afmoe": SANDWICH | {"mid": "pre_mlp_layernorm", "mlp_out": "post_mlp_layernorm"},
    "beam": SANDWICH,
    "codegen": {key: path for key, path in GPT.items() if key != "mid"}
    | {"qkv": "attn.qkv_proj", "o": "attn.out_proj", "down": "mlp.fc_out"},
    "dbrx": {
        "embed": "transformer.wte", "blocks": "transformer.blocks", "norm": "transformer.norm_f",
        "attn": "norm_attn_norm.attn", "qkv": "norm_attn_norm.attn.Wqkv", "o": "norm_attn_norm.attn.out_proj",
        "mlp": "ffn", "mid": "norm_attn_norm.norm_2", "attn_out": "norm_attn_norm.attn", "mlp_out": "ffn",
    },
    "git": encoder("git", BERT | {"pattern": "attention.self.dropout"}),
    "kosmos_2_5": decoder("text_model.model", BART | {"mid": "final_layer_norm", "mlp": "ffn", "down": "ffn.fc2", "mlp_out": "ffn"}),
    "muse_spark": SANDWICH | {"mid_out": "post_attention_residual_gate"},
    **dict.fromkeys(QWEN4, LLAMA),
    "ctrl": {
        "embed": "transformer.w", "blocks": "transformer.h", "norm": "transformer.layernorm",
        "attn": "multi_head_attention", "q": "multi_head_attention.Wq", "k": "multi_head_attention.Wk",
        "v": "multi_head_attention.Wv", "o": "multi_head_attention.dense", "mlp": "ffn", "down": "ffn.2",
        "mid": "layernorm2", "attn_out": "multi_head_attention", "mlp_out": "ffn", "reads": "layernorm1",
    },
    "falcon": GPT
    | {"embed": "transformer.word_embeddings", "attn": "self_attention", "qkv": "self_attention.query_key_value"}
    | {"o": "self_attention.dense", "down": "mlp.dense_4h_to_h", "attn_out": "self_attention"},
    "glm4": GLM4,
    "gpt-sw3": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox_japanese": {
        "embed": "gpt_neox_japanese.embed_in", "blocks": "gpt_neox_japanese.layers",
        "norm": "gpt_neox_japanese.final_layer_norm", **NEOX, "mid": "post_attention_layernorm",
    },
    "hyperclovax": LLAMA | {"attn_out": "post_norm1", "mlp_out": "post_norm2"},
    "kolibri1": GLM4,
    "nanochat": LLAMA | {"down": "mlp.fc2"},
    "persimmon": FUSED | {
        "norm": "model.final_layernorm", "qkv": "self_attn.query_key_value", "o": "self_attn.dense",
        "down": "mlp.dense_4h_to_h",
    },
    "fuyu": inside(FUSED, "model.language_model") | {
        "norm": "model.language_model.final_layernorm", "qkv": "self_attn.query_key_value", "o": "self_attn.dense",
        "down": "mlp.dense_4h_to_h",
    },
    "phi": PARALLEL | {"norm": "model.final_layernorm", "o": "self_attn.dense", "down": "mlp.fc2"},
    "phi4_multimodal": FUSED | {"qkv": "self_attn.qkv_proj"},
    "qwen3_5_text": LLAMA,
    "lfm2": LFM, "lfm2_moe": LFM,
    "lfm3": LFM | {"o": "self_attn.o_proj", "attn_out": "post_operator_norm", "mlp_out": "post_ffn_norm"},
    "jamba": HYBRID, "bamba": HYBRID,
    "recurrent_gemma": {
        "embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.final_norm", "attn": "temporal_block",
        "q": "temporal_block.q_proj", "k": "temporal_block.k_proj", "v": "temporal_block.v_proj",
        "o": "temporal_block.o_proj", "mlp": "mlp_block", "down": "mlp_block.down_proj", "mid": "channel_pre_norm",
        "attn_out": "temporal_block", "mlp_out": "mlp_block",
    },
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), MAMBA),
    "xlstm": {
        "embed": "backbone.embeddings", "blocks": "backbone.blocks", "norm": "backbone.out_norm", "attn": "mlstm_layer",
        "attn_out": "mlstm_layer", "mid": "norm_ffn", "mlp": "ffn", "down": "ffn.proj_down", "mlp_out": "ffn",
    },
    "lara_mini": LLAMA,
    "granitemoeshared": SHARED, "granitemoehybrid": SHARED,
    "granitemoe_swa": LLAMA | {"mlp_reads": "post_attention_layernorm", "mlp_out": "block_sparse_moe"},
    "starcoder2": LLAMA | {"down": "mlp.c_proj"},
    "vaultgemma": LLAMA | {"mid": "pre_feedforward_layernorm"},
    "modernbert-decoder": {
        "embed": "model.embeddings.tok_embeddings", "blocks": "model.layers", "norm": "model.final_norm", "attn": "attn",
        "q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.Wo", "mlp": "mlp", "down": "mlp.Wo",
        "mid": "mlp_norm", "attn_out": "attn", "mlp_out": "mlp",
    },
    **{name: layouts.LAYOUT[kin] for name, kin in KIN.items()},
    **{name: encoder(model) for name, model in BERTS.items()},
    "xmod": encoder("roberta", BERT | {"mid_out": "attention"}),
    "roberta-prelayernorm": encoder("roberta_prelayernorm", PRE),
    "xlm-roberta-xl": encoder("roberta", PRE | {"mid": "LayerNorm", "mlp": "intermediate.dense"}),
    "megatron-bert": encoder("bert", PRE | {"mid": "ln"}),
    **dict.fromkeys(NORMED, decoder("model.decoder", BART | {"mid_out": "self_attn_layer_norm"})),
    **dict.fromkeys(PRENORMED, decoder("model.decoder", BART | {"mid": "final_layer_norm"})),
    "bigbird_pegasus": decoder("model.decoder", BART | {"mid": "final_layer_norm"})
    | {"norm": "model.decoder.layernorm_embedding"},
    "xglm": decoder("model", BART | {"mid": "final_layer_norm"}),
    "biogpt": decoder("biogpt", BART | {"mid": "final_layer_norm"}),
    **dict.fromkeys(("git", "GitForCausalLM"), encoder("git")),
    "openai-gpt": GPT | {"embed": "transformer.tokens_embed", "norm": "", "mid_out": "ln_1"},
    "bloom": GPT
    | {"embed": "transformer.word_embeddings", "attn": "self_attention", "qkv": "self_attention.query_key_value"}
    | {"o": "self_attention.dense", "down": "mlp.dense_4h_to_h", "mid": "post_attention_layernorm"}
    | {"attn_out": "self_attention.dense", "mlp_out": "mlp.dense_4h_to_h"},
    "mpt": {
        "embed": "transformer.wte", "blocks": "transformer.blocks", "norm": "transformer.norm_f", "attn": "attn",
        "qkv": "attn.Wqkv", "o": "attn.out_proj", "mlp": "ffn", "down": "ffn.down_proj", "mid": "norm_2",
        "attn_out": "attn.out_proj", "mlp_out": "ffn.down_proj",
    },
}  # fmt: skip
"""Module names by type."""
LAYOUT |= around(LAYOUT)
WIDE_QUERIES = {"deepseek_v3", "sarvam_mla", *LATENTLY, *hybrid_layouts.WIDE_QUERIES}
"""Queries and keys are wider than values, which lie per head behind a part of its key."""
MIXED_VALUES = hybrid_layouts.MIXED_VALUES | {
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "mimo_v2_flash",
}
"""Values are normed or scaled before attention mixes them; they are what it is handed."""
PER_HEAD = {"bloom", "gpt_neox", "gpt_neox_japanese", "persimmon", "fuyu"}
"""Query, key and value of a head lie side by side."""
SCALES: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(
        ("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "granitemoehybrid"),
        lambda config: config.residual_multiplier,
    ),
    "hyperclovax": lambda config: config.residual_multiplier,
    "minicpm3": lambda config: config.scale_depth * config.num_hidden_layers**-0.5,
}
"""What blocks multiply attention and MLP by before they add them."""
NO_DENSE = {
    "aria_text", "cohere2_moe", "flex_olmo", "hunyuan_v1_moe", "kolibri1", "mellum", "minimax_m2", "phimoe", "solar_open",
}  # fmt: skip
DENSE = (
    layouts.DENSE
    | hybrid_layouts.DENSE
    | {family: [0] for family in (*MIXED, *LATENTLY, "afmoe", "beam") if family not in NO_DENSE}
)
DENSE["flint"] = [0, 1]
DENSE |= {family: [0, 1, 2] for family in ("minicpm3", "youtu")}
DENSE |= {name: [] for name in NO_DENSE}
DENSE |= {
    "llama4_text": [],
    "qwen3_5_moe_text": [],
    "sarvam_mla": [0],
    "sarvam_moe": [0],
    "jamba": [1],
    "lfm2_moe": [0],
}
"""Layers with a dense MLP of types that have experts in others."""
OF_ATTENTION = {"attn_in", "q", "k", "v", "rot_q", "rot_k", "scores", "pattern", "z", "head_out", "attn_out"}
OF_MLP = {"resid_mid", "mlp_in", "mlp_act", "mlp_out"}
LACKS: dict[str, set[str]] = {
    **layouts.LACKS,
    **hybrid_layouts.LACKS,
    **{family: {"resid_mid"} for family in ("cohere", "cohere2", "cohere_compass_text", "phi")},
    **{family: {"mlp_act"} for family in NO_DENSE},
    **{family: {"k"} for family in (*LATENTLY, "sarvam_mla")},
    "cohere2_moe": {"resid_mid", "mlp_act"},
    "llama4_text": {"mlp_act"},
    "qwen3_5_moe_text": {"mlp_act"},
    **{family: {"rot_q", "rot_k"} for family in ("gpt-sw3", "gpt_bigcode")},
    "falcon": {"resid_mid"},
    "codegen": {"resid_mid"},
    "dbrx": {"mlp_act"},
    **{name: {*OF_ATTENTION, *OF_MLP} for name in ("mamba", "mamba2", "falcon_mamba")},
    "xlstm": OF_ATTENTION,
    "lara_mini": {"mlp_act"},
    "granitemoe_swa": {"mlp_act"},
    "ctrl": {"rot_q", "rot_k"},
    **{name: {"rot_q", "rot_k", "final_norm"} for name in (*BERTS, *NORMED, "roberta-prelayernorm", "xlm-roberta-xl")},
    "xmod": {"rot_q", "rot_k", "final_norm", "mlp_out"},
    "megatron-bert": {"rot_q", "rot_k", "final_norm"},
    "roformer": {"final_norm"},
    **{name: {"rot_q", "rot_k"} for name in (*PRENORMED, "xglm", "biogpt")},
    "kosmos_2_5": {"rot_q", "rot_k"},
    "muse_spark": {"mlp_act"},
    **{
        key: {"resid_pre", "attn_out", "mixer_out", "resid_mid", "mlp_act", "mlp_out", "resid_post", "final_norm"}
        for key in QWEN4
    },
    "bigbird_pegasus": {"rot_q", "rot_k"},
    **{name: {"rot_q", "rot_k"} for name in ("bloom", "mpt")},
    **{name: {"rot_q", "rot_k", "final_norm"} for name in ("git", "GitForCausalLM", "openai-gpt")},
}
"""What a type does not have, or what no hook here is written for."""
LINEAR = (
    layouts.LINEAR
    | hybrid_layouts.LINEAR
    | {"lara_mini": [0, 2], "qwen3_5_text": [0, 1], "qwen3_5_moe_text": [0, 1], **{key: [0, 1] for key in QWEN4}}
)
"""Layers with linear attention."""
GATED_QUERIES = {*LINEAR} - {"lara_mini", *hybrid_layouts.LINEAR}
"""Types whose query projection holds a gate beside each query."""
SOME = hybrid_layouts.SOME
"""Sites in some layers alone."""
MIXERS: dict[str, dict[int, str]] = hybrid_layouts.MIXERS | {
    **{family: {0: "conv"} for family in ("lfm2", "lfm2_moe", "lfm3")},
    "jamba": dict.fromkeys((0, 1), "mamba"),
    "bamba": dict.fromkeys((0, 2), "mamba"),
    "recurrent_gemma": dict.fromkeys((0, 1), "temporal_block"),
    **{name: dict.fromkeys((0, 1, 2), "mixer") for name in ("mamba", "mamba2", "falcon_mamba")},
    "xlstm": dict.fromkeys((0, 1, 2), "mlstm_layer"),
    "granitemoehybrid": {0: "mamba"},
}
"""Layers of hybrids that are not attention, and the module that mixes tokens there."""
GATES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), ("in_proj", lambda x: x.chunk(2, -1)[1])),
    **dict.fromkeys(
        ("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "falcon_h1"), ("in_proj", lambda x: x[..., :128])
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), ("in_proj", lambda x: x.chunk(3, -1)[1])),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", *QWEN4, "lara_mini"),
        ("in_proj_z", lambda x: x),
    ),
    "zamba": ("in_proj", lambda x: x.unflatten(-1, (128, 2))[..., 1]),
    "zamba2": ("in_proj", lambda x: x[..., :128]),
    "xlstm": ("ogate_preact", lambda x: x),
    "recurrent_gemma": ("linear_y", lambda x: x),
    "rwkv": ("receptance", lambda x: x),
    "olmo_hybrid": ("g_proj", lambda x: x),
    **dict.fromkeys(("kimi_linear", "glm5_next_text"), ("g_b_proj", lambda x: x)),
    "bailing_hybrid": ("g_proj", lambda x: x),
    "minimax": ("output_gate", lambda x: x),
}
"""The projection in a mixer, and what of it gates the mixer's output."""
