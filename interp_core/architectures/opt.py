"""OPT: no module holds the MLP, whose parts see batch and pos flattened; queries are scaled before they meet the keys.

OPT-350m norms the stream itself after attention and after the MLP, so `resid_mid` and `resid_post` are normed sums; its
token embeddings are half as wide as the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .bart import NORMED
from .family import Family, Place


def places(config: Any) -> Mapping[str, Place]:
    """Where the stream passes between attention and MLP, and the parts of the MLP."""
    before = Place("final_layer_norm", "in", flat=True)
    return {
        "resid_mid": before if config.do_layer_norm_before else Place("self_attn_layer_norm", "out"),
        "mlp_in": Place("fc1", "in", flat=True),
        "mlp_act": Place("fc2", "in", flat=True),
        "mlp_out": Place("fc2", "out", flat=True),
    }


def join(block: Any, site: str, before: Tensor, added: Tensor) -> Tensor:
    """The sum, or its norm."""
    total = before + added
    if block.do_layer_norm_before:
        return total
    return block.self_attn_layer_norm(total) if site == "resid_mid" else block.final_layer_norm(total)


def bare(config: Any) -> bool:
    """Whether there is no norm behind the last block."""
    return not config.do_layer_norm_before or config._remove_final_layer_norm


def refused(config: Any) -> Mapping[str, str]:
    """Positions are learnt embeddings; the last block may have normed the stream; tokens may be narrower than it."""
    narrow = config.word_embed_proj_dim != config.hidden_size
    return _NO_ROTARY | (NORMED if bare(config) else {}) | (_NARROW if narrow else {})


_NARROW = {"readout": "the unembedding reads a narrower stream, which project_out makes of it"}
_NO_ROTARY = dict.fromkeys(("rot_q", "rot_k"), "OPT has learnt position embeddings, no rotary ones; read q and k")

FAMILY = Family("opt", refuse_if=refused, places=places, join=join, bare=bare)
