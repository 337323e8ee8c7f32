"""BERT and its kin norm the stream after each sum: what is added is what the last projections give, and `resid_mid` and
`resid_post` are the normed sums. The norms lie inside the attention's and the MLP's output modules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .family import Family, Place

PATHS = {
    "blocks.attn": "attention",
    "blocks.attn.q": "self.query",
    "blocks.attn.k": "self.key",
    "blocks.attn.v": "self.value",
    "blocks.attn.o": "output.dense",
    "blocks.mlp.out": "output.dense",
}
PLACES = {
    "attn_in": Place("attention.self", "in"),
    "attn_out": Place("attention.output.dense", "out"),
    "resid_mid": Place("attention", "out"),
    "mlp_in": Place("intermediate", "in"),
    "mlp_act": Place("output.dense", "in"),
    "mlp_out": Place("output.dense", "out"),
}
_NO_ROTARY = dict.fromkeys(("rot_q", "rot_k"), "its positions are learnt embeddings, no rotary ones; read q and k")


def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """The norm of the sum."""
    output = block.attention.output if site == "resid_mid" else block.output
    return output.LayerNorm(before + added)


def _family(name: str) -> Family:
    return Family(name, paths=PATHS, places=PLACES, join=join, refuse=_NO_ROTARY)


FAMILY = _family("bert")
BERT_GENERATION = _family("bert-generation")
CAMEMBERT = _family("camembert")
DATA2VEC = _family("data2vec-text")
ELECTRA = _family("electra")
ERNIE = _family("ernie")
ROBERTA = _family("roberta")
XLM_ROBERTA = _family("xlm-roberta")
