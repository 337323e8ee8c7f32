"""Families whose layers mix tokens by a state space model, a recurrence or a convolution, alone or beside attention.

Every layer has `mixer_in` and `mixer_out`. What a family calls its mixer is found by name (`mixers.NAMES`); a file
says where the rest is, and where blocks put mixers together in a way of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, Place
from .mixers import recurrent_gemma_state

_MAMBA = {"blocks": "backbone.layers", "embed": "backbone.embeddings", "ln_final": "backbone.norm_f"}

MAMBA = Family(
    "mamba",
    paths=_MAMBA | {"blocks.ln1": "norm"},
    refuse=dict.fromkeys(("resid_mid", "mlp_in", "mlp_act", "mlp_out"), "a Mamba block is its mixer: it has no MLP"),
)
XLSTM = Family(
    "xlstm",
    paths={
        "blocks": "backbone.blocks", "embed": "backbone.embeddings", "ln_final": "backbone.out_norm",
        "blocks.ln1": "norm_mlstm", "blocks.ln2": "norm_ffn", "blocks.mlp": "ffn", "blocks.mlp.in": "proj_up",
        "blocks.mlp.gate": "proj_up_gate", "blocks.mlp.out": "proj_down",
    },
)  # fmt: skip


def griffin_paths(block: Any) -> Mapping[str, str]:
    """RecurrentGemma: what mixes tokens has one name, in layers with attention and with a recurrence."""
    return {"blocks.attn": "temporal_block"} if hasattr(block.temporal_block, "q_proj") else {}


RECURRENT_GEMMA = Family(
    "recurrent_gemma",
    paths={
        "blocks": "model.layers", "embed": "model.embed_tokens", "ln_final": "model.final_norm",
        "blocks.ln1": "temporal_pre_norm", "blocks.ln2": "channel_pre_norm", "blocks.mlp": "mlp_block",
        "blocks.mlp.in": "up_proj", "blocks.mlp.gate": "gate_proj", "blocks.mlp.out": "down_proj",
    } | {f"blocks.attn.{part}": f"temporal_block.{part}_proj" for part in "qkvo"},
    varied=griffin_paths,
    sites=(recurrent_gemma_state,),
)  # fmt: skip


def falcon_added(block: Any) -> Mapping[str, float]:
    """Falcon-H1: a multiplier on each of the two mixers."""
    return {"attn_out": block.attn_out_multiplier, "beside": block.ssm_out_multiplier}


FALCON_H1 = Family(
    "falcon_h1",
    beside={"attn_out": "mamba"},
    places={"mixer_in": Place("input_layernorm", "out")},
    added=falcon_added,
    refuse={
        "attn_out": "attention gives one part of what a block of falcon_h1 adds, a state space model beside it the "
        "other; mixer_out is their sum, and head_out what each head gives"
    },
)

_ADAPTED = (
    "an adapter of each layer adds to what the shared projection gives; rot_q and rot_k have the queries and keys that "
    "attention multiplies, and z what it makes of the values"
)
_BEHIND = (
    "attention and MLP of this family are a branch: what they give goes into the norm that the state space model reads "
    "(mixer_in), and nothing of it is added to the stream"
)


def branch(block: Any) -> None:
    """Zamba: attention reads the stream beside the embeddings, and a pass meets it and the MLP before what the state
    space model reads."""
    entries = block.stack.atlas.entries
    if attention := block.parts.get("attn"):
        width = {"d_model": block.stack.modules[attention].attention_hidden_size}
        block.view("attn_in", block.stack.point(attention, "in"), width)
    for number, name in enumerate(("mixer_in", "mixer_gate", "mixer_out")):
        entries[name, block.layer].order = entries["resid_post", block.layer].order - 0.5 + 0.125 * number


def adapted(config: Any) -> Mapping[str, str]:
    """Zamba2 may add to the shared attention's projections what adapters of each layer give."""
    return dict.fromkeys("qkv", _ADAPTED) if getattr(config, "use_shared_attention_adapter", False) else {}


def _zamba(name: str, shared: str) -> Family:
    parts = {f"blocks.attn.{part}": f"{part}_proj" for part in "qkvo"} | {"blocks.mlp.out": "down_proj"}
    branched = {"blocks.attn": f"{shared}.self_attn", "blocks.mlp": f"{shared}.feed_forward"}
    ends = {"blocks": "model.layers", "embed": "model.embed_tokens", "ln_final": "model.final_layernorm"}
    return Family(
        name,
        paths=ends | parts | branched | {"blocks.mixer": "mamba|mamba_decoder.mamba"},
        refuse=dict.fromkeys(("attn_out", "resid_mid", "mlp_out"), _BEHIND),
        refuse_if=adapted,
        sites=(branch,),
    )


ZAMBA, ZAMBA2 = _zamba("zamba", "shared_transf"), _zamba("zamba2", "shared_transformer")
