"""Hidden states as others have saved them: one `.pt` per sample, both contexts at all positions.

    {"agentic":  {"hidden_states": [layers, columns, d_model]},      float16 as a rule
     "assisted": {"hidden_states": [layers, columns, d_model]},      in the columns of the agentic context
     "token_meta": {"save_mode": "full", …}}

Layers are the outputs of the blocks; where there is one more than the model has, the first is the embedding. What
transformers calls the last hidden state has been through the final norm already. Whether it was saved so is told by the
numbers themselves (a normed row has variance 1 once the norm's gains are taken out), so that it is not normed again.

Source: the files of Geuan666/XAI4Agent, `humaneval_*.pt`. They are read with `weights_only=True`.
Must equal: the lens of the same forward pass, to the rounding of the dtype that they were saved in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_plugins.pairs import Pair
from interp_plugins.pairs.pair import SIDES, Side

from .aligned import EMBEDDING, States, context_of
from .states import check_finite

VARIANCE = 0.02
"""How far the variance of a normed row may be from 1, by the rounding of half precision and the norm's epsilon."""
MODES = {
    "canonical": "it holds the states at the targets, and a target is predicted from the state before it",
    "pooled": "it holds means over targets",
}


def read_origin(path: str | Path, model: ic.Model, pair: Pair) -> tuple[States, States]:
    """Both contexts of a pair.

    Raises:
        LoadError: no such file, of another form, not of all positions, of another size, or with numbers that are not
            finite; it names sample and field.
    """
    content = ic.runs.read_pt(path, f"hidden states of {pair.name}", mmap=True)
    if not isinstance(content, Mapping):
        raise ic.LoadError(f"{pair.name}: {path} holds a {type(content).__name__}, not a table of contexts")
    meta = content.get("token_meta")
    mode = meta.get("save_mode") if isinstance(meta, Mapping) else None
    if mode not in (None, "full"):
        why = MODES.get(str(mode), "it does not hold all positions")
        raise ic.LoadError(
            f"{pair.name}: token_meta.save_mode is {mode!r}: {why}; save again with save_mode 'full', or leave "
            "--hidden_states_dir out to work the states out"
        )
    agentic, assisted = (_states(content, model, pair, side) for side in SIDES)
    return agentic, assisted


def _states(content: Mapping[Any, Any], model: ic.Model, pair: Pair, side: Side) -> States:
    entry = content.get(side)
    hidden = entry.get("hidden_states") if isinstance(entry, Mapping) else None
    where = f"{pair.name} {side}.hidden_states"
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point():
        raise ic.LoadError(f"{where} is no tensor [layers, columns, d_model]; save it again")
    tokens = pair.tokens(side)
    positions = pair.positions(side)
    width = tokens.ids.shape[1]
    counts = (model.n_layers, model.n_layers + 1)
    if hidden.shape[0] not in counts or tuple(hidden.shape[1:]) != (width, model.d_model):
        raise ic.LoadError(
            f"{where} is {list(hidden.shape)}; the model has {model.n_layers} layers of {model.d_model} and the "
            f"context {width} columns, so it is [{counts[0]} or {counts[1]}, {width}, {model.d_model}]"
        )
    stream = hidden[:, tokens.columns([p - 1 for p in positions])[0]]
    layers = tuple(range(model.n_layers)) if len(hidden) == counts[0] else (EMBEDDING, *range(model.n_layers))
    for layer, rows in zip(layers, stream, strict=True):
        check_finite(where, layer, rows, ic.LoadError)
    ids = pair.target_ids()
    normed_last = is_normed(model, stream[-1])
    return States(pair.name, side, layers, positions, ids, stream, None, normed_last, context_of(tokens))


def is_normed(model: ic.Model, rows: Tensor) -> bool:
    """Whether rows `[target d_model]` have been through the final norm: without bias and gains they have variance 1.

    Rows of the stream itself do not: their lengths differ from target to target, and from one by orders of magnitude.
    """
    gains = model.weights(S.final_norm).to(device="cpu", dtype=torch.float64)
    bias = model.bias(S.final_norm).to(device="cpu", dtype=torch.float64)
    # a coordinate whose gain is about 0 says nothing of what was there before: it is left out of the variance
    plain = (rows.double() - bias) / torch.where(gains.abs() < 1e-6, torch.inf, gains)
    used = (gains.abs() >= 1e-6).sum()
    return bool(((plain.square().sum(-1) / used).sub(1).abs() < VARIANCE).all())
