"""What the files of `fv_runtime` and of `fv_relation` have alike: vectors by layer, and the token that is measured.

Their other fields have the same names, but stand in another order, or are worked out from other passes (ranks there,
likeliest tokens here).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from ..effects import Head
from ..means import head_shape
from ..prompts import Prompt
from ..vectors import function_vector, head_space


def by_layer(
    model: ic.Model,
    mean: Float[Tensor, "layer head slot d_head"],
    heads: Sequence[Head],
    *,
    alpha: float,
    model_spec: str,
) -> dict[str, Any]:
    """`fv_by_layer.pt`: per layer of the heads their means before the output projection, and what they add after it."""
    before = head_space(model, mean, heads)
    added = {layer: function_vector(model, mean, [head for head in heads if head.layer == layer]) for layer in before}
    n_heads, d_head = head_shape(model)
    return {
        "n_heads": n_heads, "head_dim": d_head, "resid_dim": model.d_model, "selected_k": len(heads),
        "alpha_default": alpha, "model_spec": model_spec,
        "space": {"fv_by_layer": "head_space", "resid_by_layer": "resid"},
        "fv_by_layer": {layer: vector.vector for layer, vector in before.items()},
        "resid_by_layer": {layer: vector.vector for layer, vector in added.items()},
    }  # fmt: skip


def target_fields(prompt: Prompt, word: str) -> dict[str, Any]:
    """Of an evaluation's row: the first token of the answer, which is the one that is measured.

    Args:
        word: how the file writes that token.
    """
    target = prompt.target_ids[0]
    return {
        "target_id": target, "target_token": word, "leading_space": (prompt.target or "").startswith(" "),
        "used_id": target, "used_token": word,
    }  # fmt: skip
