"""Encoders whose modules are not named as BERT's.

DistilBERT, GTE, Jina Embeddings, MPNet and Nomic BERT norm the stream after each sum, as BERT does; EuroBERT and
ModernBERT norm what attention and MLP read, as GPT does. ModernBERT looks through windows that reach to both sides; its
decoder has BERT's head too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .bart import NO_ROTARY
from .bert import NO_READOUT, PLACES
from .family import Family, Join, Place, fused_blocks


def _norms(attention: str, mlp: str) -> Join:
    """The norm of the sum, by the paths of both norms in the block."""

    def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
        return block.get_submodule(attention if site == "resid_mid" else mlp)(before + added)

    return join


def _rotated(name: str, mlp_out: str) -> Family:
    """Blocks of GTE and its kin."""
    attention = {f"blocks.attn.{part}": f"{part}_proj" for part in "qkvo"}
    no_norms = dict.fromkeys(("blocks.ln1_post", "blocks.ln2_post"), "|")  # those of these names norm the sums
    return Family(
        name,
        paths={"blocks.attn": "self_attn", **attention, "blocks.mlp": "mlp", "blocks.mlp.out": mlp_out, **no_norms},
        places={"resid_mid": Place("post_attention_layernorm", "out")},
        join=_norms("post_attention_layernorm", "post_mlp_layernorm"),
        refuse=NO_READOUT,
    )


_HEAD = {"readout": NO_READOUT["readout"]}


def _modern(name: str, model: str) -> Family:
    """ModernBERT's blocks in a model."""
    paths = {
        "blocks": f"{model}.layers", "ln_final": f"{model}.final_norm",
        "blocks.ln1": "attn_norm", "blocks.attn": "attn", "blocks.attn.qkv": "Wqkv", "blocks.attn.o": "Wo",
        "blocks.ln2": "mlp_norm", "blocks.mlp": "mlp", "blocks.mlp.in": "Wi", "blocks.mlp.out": "Wo",
    }  # fmt: skip
    return Family(name, paths=paths, fused=fused_blocks, refuse=_HEAD)


DISTILBERT = Family(
    "distilbert",
    paths={
        "blocks": "distilbert.transformer.layer", "blocks.attn": "attention", "blocks.attn.q": "q_lin",
        "blocks.attn.k": "k_lin", "blocks.attn.v": "v_lin", "blocks.attn.o": "out_lin", "blocks.mlp": "ffn",
        "blocks.mlp.in": "lin1", "blocks.mlp.out": "lin2",
    },
    places={"resid_mid": Place("sa_layer_norm", "out")},
    join=_norms("sa_layer_norm", "output_layer_norm"),
    refuse=NO_ROTARY | NO_READOUT,
)  # fmt: skip
EUROBERT = Family("eurobert")
GTE = _rotated("gte", "down_proj")
JINA = _rotated("jina_embeddings_v3", "fc2")
MODERNBERT = _modern("modernbert", "model")
MODERNBERT_DECODER = Family("modernbert-decoder", refuse=_HEAD)
MODERNVBERT = _modern("modernvbert", "model.text_model")
MPNET = Family(
    "mpnet",
    paths={
        "blocks": "mpnet.encoder.layer", "embed": "mpnet.embeddings.word_embeddings", "blocks.attn": "attention",
        "blocks.attn.q": "attn.q", "blocks.attn.k": "attn.k", "blocks.attn.v": "attn.v", "blocks.attn.o": "attn.o",
        "blocks.mlp.out": "output.dense",
    },
    places={**PLACES, "attn_in": Place("attention.attn", "in"), "attn_out": Place("attention.attn.o", "out")},
    join=_norms("attention.LayerNorm", "output.LayerNorm"),
    refuse=NO_ROTARY | NO_READOUT,
)  # fmt: skip
NOMIC = _rotated("nomic_bert", "down_proj")
