"""BART and its kin as decoders: no module holds the MLP. Some norm before attention and MLP, as GPT does; BART, MVP,
PLBart, Blenderbot-small, Marian and TrOCR norm the stream itself after each sum, so `resid_mid` and `resid_post` are
normed sums there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .family import Family, Place

PATHS = {f"blocks.attn.{part}": f"{part}_proj" for part in "qkv"} | {
    "blocks.attn": "self_attn", "blocks.attn.o": "out_proj", "blocks.mlp.out": "fc2",
}  # fmt: skip
PLACES = {"mlp_in": Place("fc1", "in"), "mlp_out": Place("fc2", "out")}
NORMED = {
    "final_norm": "the last block norms the stream itself: resid_post of the last layer is what the unembedding reads"
}  # fmt: skip
NO_ROTARY = dict.fromkeys(("rot_q", "rot_k"), "its positions are embeddings, no rotary ones; read q and k")


def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """The norm of the sum."""
    norm = block.self_attn_layer_norm if site == "resid_mid" else block.final_layer_norm
    return norm(before + added)


def _normed_before(name: str, **more: Any) -> Family:
    places = {"resid_mid": Place("final_layer_norm", "in"), **PLACES}
    return Family(name, paths=PATHS, places=places, refuse=NO_ROTARY, **more)


def _normed_after(name: str, **more: Any) -> Family:
    places = {"resid_mid": Place("self_attn_layer_norm", "out"), **PLACES}
    return Family(name, paths=PATHS, places=places, join=join, bare=True, refuse=NO_ROTARY | NORMED, **more)


FAMILY = _normed_after("bart")
BIGBIRD_PEGASUS = _normed_before("bigbird_pegasus")
BIOGPT = _normed_before("biogpt")
BLENDERBOT = _normed_before("blenderbot")
BLENDERBOT_SMALL = _normed_after("blenderbot-small")
KOSMOS = Family("kosmos-2.5", places={"resid_mid": Place("final_layer_norm", "in")}, refuse=NO_ROTARY)
MARIAN = _normed_after("marian")
MBART = _normed_before("mbart")
MVP = _normed_after("mvp")
PEGASUS = _normed_before("pegasus")
PLBART = _normed_after("plbart")
TROCR = _normed_after("trocr")
WHISPER = _normed_before("whisper")
XGLM = _normed_before("xglm")
