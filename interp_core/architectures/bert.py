"""BERT and its kin add the residual stream inside attention's and the MLP's output modules, so what they add is what
the last projections in these give.

Most norm the stream after each sum, in these modules: `resid_mid` and `resid_post` are the normed sums there. Those of
`_normed_before` norm what attention and MLP read, as GPT does. Attention is called inside the attention module, in
`self`.

Between the last stream and the unembedding lie a dense layer, an activation and a norm, so there is no final norm of
the stream and no readout.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .bart import NO_ROTARY, NORMED
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
GIT_PATHS = {"blocks": "git.encoder.layer", "embed": "git.embeddings.word_embeddings"}
HEAD = "a dense layer, an activation and a norm lie between the last stream and the unembedding"
NO_READOUT = {"readout": HEAD, "final_norm": f"{HEAD}: no norm of the stream is what that reads"}
_ADAPTED = {"mlp_out": "an adapter of the language reads the sum of the stream and what the MLP gives; read resid_post"}
_SPARSE = (
    "at the first text that is short this model exchanges its sparse attention for full attention, for good, so that "
    "numbers depend on what ran before: set attention_type='original_full' in its config"
)


def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """The norm of the sum."""
    output = block.attention.output if site == "resid_mid" else block.output
    return output.LayerNorm(before + added)


def demand_full_attention(config: Any) -> str:
    """Why a BigBird cannot be taken as it is; "" if it can."""
    return _SPARSE if config.attention_type == "block_sparse" else ""


def _normed_after(name: str, **more: Any) -> Family:
    return _normed_before(name, join=join, **more)


def _normed_before(name: str, **more: Any) -> Family:
    return Family(name, places=PLACES, **{"refuse": NO_ROTARY | NO_READOUT, "paths": PATHS, **more})


FAMILY = _normed_after("bert")
BERT_GENERATION = _normed_after("bert-generation", refuse=NO_ROTARY | NORMED, bare=True)
BIG_BIRD = _normed_after("big_bird", unfit=demand_full_attention)
CAMEMBERT = _normed_after("camembert")
CONVBERT = _normed_after("convbert")
DATA2VEC = _normed_after("data2vec-text")
DEBERTA = _normed_after("deberta")
DEBERTA_V2 = _normed_after("deberta-v2")
ELECTRA = _normed_after("electra")
ERNIE = _normed_after("ernie")
ESM = _normed_before("esm")
GIT = _normed_after("git", paths=PATHS | GIT_PATHS, refuse=NO_ROTARY | NORMED, bare=True)
LAYOUTLM = _normed_after("layoutlm")
MEGATRON_BERT = _normed_before("megatron-bert")
MRA = _normed_after("mra")
NYSTROMFORMER = _normed_after("nystromformer")
REMBERT = _normed_after("rembert")
ROBERTA = _normed_after("roberta")
ROBERTA_PRELAYERNORM = _normed_before("roberta-prelayernorm")
ROC_BERT = _normed_after("roc_bert")
ROFORMER = _normed_after("roformer", refuse=NO_READOUT)
TAPAS = _normed_after("tapas")
XLM_ROBERTA = _normed_after("xlm-roberta")
XLM_ROBERTA_XL = _normed_before("xlm-roberta-xl")
XMOD = _normed_after("xmod", refuse=NO_ROTARY | NO_READOUT | _ADAPTED)
YOSO = _normed_after("yoso")
