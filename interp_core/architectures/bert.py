"""BERT and its kin add the residual stream inside attention's and the MLP's output modules, so what they add is what
the last projections in these give.

Most norm the stream after each sum, in these modules: `resid_mid` and `resid_post` are the normed sums there. Those of
`_normed_before` norm what attention and MLP read, as GPT does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .family import Family, Place

PATHS = {
    "blocks.attn": "attention",
    "blocks.attn.q": "self.query|",  # or nowhere: DeBERTa's projections, of content and of positions, are others
    "blocks.attn.k": "self.key|",
    "blocks.attn.v": "self.value|",
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


def _normed_after(name: str) -> Family:
    return Family(name, paths=PATHS, places=PLACES, join=join, refuse=_NO_ROTARY)


def _normed_before(name: str) -> Family:
    return Family(name, paths=PATHS, places=PLACES, refuse=_NO_ROTARY)


FAMILY = _normed_after("bert")
BERT_GENERATION = _normed_after("bert-generation")
BIG_BIRD = _normed_after("big_bird")
CAMEMBERT = _normed_after("camembert")
CONVBERT = _normed_after("convbert")
DATA2VEC = _normed_after("data2vec-text")
DEBERTA = _normed_after("deberta")
DEBERTA_V2 = _normed_after("deberta-v2")
ELECTRA = _normed_after("electra")
ERNIE = _normed_after("ernie")
ESM = _normed_before("esm")
LAYOUTLM = _normed_after("layoutlm")
MEGATRON_BERT = _normed_before("megatron-bert")
MRA = _normed_after("mra")
NYSTROMFORMER = _normed_after("nystromformer")
REMBERT = _normed_after("rembert")
ROBERTA = _normed_after("roberta")
ROBERTA_PRELAYERNORM = _normed_before("roberta-prelayernorm")
ROFORMER = _normed_after("roformer")
TAPAS = _normed_after("tapas")
XLM_ROBERTA = _normed_after("xlm-roberta")
XLM_ROBERTA_XL = _normed_before("xlm-roberta-xl")
YOSO = _normed_after("yoso")
