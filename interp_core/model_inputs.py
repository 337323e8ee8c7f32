"""What a Hugging Face model is called with, of tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .architectures.atlas import Atlas
from .errors import CapabilityError, PlanError
from .session import Session
from .text import CACHE, Tokens


def model_inputs(model: Session, tokens: Tokens, *, cache: bool = False) -> dict[str, Any]:
    """What the Hugging Face model is called with, made and checked once per tokens, kind of model and device. What the
    caller gave goes in as it is; masks and positions are added only where there is padding: without, the model's own
    defaults are the same and cheaper.

    Args:
        cache: a cache of earlier tokens is allowed for.

    Raises:
        TextError: tokens that do not fit the model.
        CapabilityError: padding on a side where it changes the numbers of this model.
        PlanError: a cache where there must be none.
    """
    if model.atlas.lacking and tokens.padded:
        _check_padding(model.atlas, tokens)
    device = model.device
    key = (model.atlas.shape, device)
    if CACHE in tokens.inputs and not cache:
        raise PlanError(f"{CACHE} is for run(), one pass that starts where the cache ends: pass the whole text instead")
    if key in tokens.placed:
        return tokens.placed[key]
    more = tokens.inputs[CACHE].get_seq_length() if cache and CACHE in tokens.inputs else 0
    model.fit(tokens, more)
    extras, width = tokens.inputs, tokens.ids.shape[1]
    # A caller's mask is wider than the text where a cache comes with it: it covers the cache's tokens too.
    mask = extras.get("attention_mask", tokens.mask).to(device, torch.long)
    padded = not bool(mask.all())
    inputs: dict[str, Any] = {"input_ids": tokens.ids.to(device)}
    if padded or (extras and not {CACHE, "position_ids"} & set(extras)):
        inputs["attention_mask"] = mask
    # With images of any size the model works positions out of their grids by itself, from ids and mask.
    by_grids = any(name.endswith("_grid_thw") for name in extras)
    if padded and not by_grids and model.takes("position_ids"):
        inputs["position_ids"] = (_from_first(mask) + model.first_position)[:, -width:]
    for name, value in extras.items():
        inputs[name] = value.to(device) if isinstance(value, Tensor) else value
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_inference():  # autograd would not take it in a later run
            inputs[name] = value.clone()
    tokens.placed[key] = inputs
    return inputs


def _from_first(mask: Tensor) -> Tensor:
    """Columns counted from each row's first real token to its last, as `forward` counts a row that begins in column 0:
    padding around a row takes no part, holes in it do."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    first, last = mask.argmax(1, keepdim=True), mask.shape[1] - 1 - mask.flip(1).argmax(1, keepdim=True)
    return (columns - first).clamp(min=0).minimum(last - first)


def _check_padding(atlas: Atlas, tokens: Tokens) -> None:
    """Refuse rows whose padding would change their numbers, as the self-check found."""
    behind = max(tokens.ids.shape[1] - 1 - row[-1] for row in tokens.rows.real)
    blind = atlas.blind_behind is not None and behind >= atlas.blind_behind
    right = "its queries see nothing of the text, and are nan" if blind else atlas.lacking.get("right padding")
    whys = {"left": atlas.lacking.get("left padding"), "right": right}
    for side, column in (("left", 0), ("right", -1)):
        if (why := whys[side]) and not tokens.mask[:, column].all():
            other = {"left": "right", "right": "left"}[side]
            free = "" if whys[other] else f", or pad on the {other}"
            raise CapabilityError(
                f"a row that is padded on the {side} gets other numbers in this {atlas.family.name} than alone "
                f"({why}): run rows one by one (for row in tokens){free}"
            )


def cache_name(hf: Any) -> str:
    """What a model calls the cache that it is handed; most have another word for it since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(type(hf).forward).parameters else CACHE
