"""Visual rows cut out of the stream before a layer, written by hand: what truncation has to equal.

From layer l on, pre-hooks hand every block the stream, rotary embeddings, positions and mask without the visual rows;
all other tokens keep their positions. What DeepStack would add to rows that are gone is not added. One row at a time,
without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from layouts import LAYOUT
from torch import Tensor

DROPPED = ("deepstack_visual_embeds", "visual_pos_masks")


@contextmanager
def deleted(family: str, hf: Any, layer: int, gone: Sequence[int], width: int) -> Iterator[list[int]]:
    """Within it, a forward pass of `width` columns loses columns before a layer; gives those that are left."""
    blocks = hf.get_submodule(LAYOUT[family]["blocks"])
    language = hf.get_submodule(LAYOUT[family]["blocks"].rpartition(".")[0])
    kept = [i for i in range(width) if i not in set(gone)]

    def cut(number: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, *rest = args
            assert x.shape[1] == (width if number == layer else len(kept))
            return (x[:, kept] if number == layer else x, *rest), {k: _cut(k, v, kept) for k, v in kwargs.items()}

        return hook

    def without_additions(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        added = kwargs.get(DROPPED[0])
        return args, kwargs if added is None else {**kwargs, DROPPED[0]: added[:layer]}

    handles = [blocks[i].register_forward_pre_hook(cut(i), with_kwargs=True) for i in range(layer, len(blocks))]
    handles.append(language.register_forward_pre_hook(without_additions, with_kwargs=True))
    try:
        yield kept if layer < len(blocks) else list(range(width))
    finally:
        for handle in handles:
            handle.remove()


def _cut(name: str, value: Any, kept: list[int]) -> Any:
    if name == "attention_mask" and value is not None:
        return value[..., kept, :][..., kept] if value.ndim == 4 else value[:, kept]
    if name == "position_ids" and value is not None:
        return value[..., kept]
    if name == "position_embeddings" and value is not None:
        return tuple(x[..., kept, :] for x in value)
    return value


def logits(family: str, hf: Any, inputs: dict[str, Any], layer: int, gone: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Logits of the columns that are left, and these columns."""
    width = inputs["input_ids"].shape[1]
    with deleted(family, hf, layer, gone, width) as kept, torch.no_grad():
        _forget(hf)
        return hf(**inputs, use_cache=False).logits, kept


def generated(
    family: str, hf: Any, inputs: dict[str, Any], layer: int, gone: Sequence[int], steps: int
) -> tuple[list[int], Tensor]:
    """Greedy tokens, a whole pass for each, and the logits that chose them `[step d_vocab]`."""
    inputs, rows = dict(inputs), []
    for _ in range(steps):
        last = logits(family, hf, inputs, layer, gone)[0][:, -1]
        rows.append(last[0])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], last.argmax(-1)[:, None]], 1)
        for name, new in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=new)
    return [int(row.argmax()) for row in rows], torch.stack(rows)


def _forget(hf: Any) -> None:
    """Position offsets that an earlier pass left."""
    if hasattr(hf.model, "rope_deltas"):
        hf.model.rope_deltas = None
