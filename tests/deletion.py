"""Visual rows cut out of the stream before a layer, written by hand: what truncation has to equal.

From layer l on, pre-hooks hand every block the stream, rotary embeddings, positions and mask without the visual rows;
all other tokens keep their positions. What DeepStack adds later goes to the rows that are left. One row at a time, without
a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from layouts import LAYOUT
from pictures import IMAGE
from torch import Tensor

FEATURES, PLACES = "deepstack_visual_embeds", "visual_pos_masks"


@contextmanager
def deleted(family: str, hf: Any, layer: int, gone: Sequence[int], width: int) -> Iterator[list[int]]:
    """Within it, a forward pass of `width` columns loses columns before a layer; gives those that are left."""
    blocks = hf.get_submodule(LAYOUT[family]["blocks"])
    language = hf.get_submodule(LAYOUT[family]["blocks"].rpartition(".")[0])
    kept = [i for i in range(width) if i not in set(gone)]

    added: dict[str, Any] = {}

    def cut(number: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, *rest = args
            assert x.shape[1] == (width if number == layer else len(kept))
            x = x[:, kept] if number == layer else _with_additions(x, added, number - 1, kept)
            return (x, *rest), {k: _cut(k, v, kept) for k, v in kwargs.items()}

        return hook

    def without_later_additions(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get(FEATURES) is None:
            return args, kwargs
        added.update({name: kwargs[name] for name in (FEATURES, PLACES)})
        return args, {**kwargs, FEATURES: kwargs[FEATURES][:layer]}

    handles = [blocks[i].register_forward_pre_hook(cut(i), with_kwargs=True) for i in range(layer, len(blocks))]
    handles.append(language.register_forward_pre_hook(without_later_additions, with_kwargs=True))
    try:
        yield kept if layer < len(blocks) else list(range(width))
    finally:
        for handle in handles:
            handle.remove()


def _with_additions(x: Tensor, added: dict[str, Any], block: int, kept: list[int]) -> Tensor:
    """The stream after a block, with what DeepStack adds to the visual rows that are left."""
    if not added or block >= len(added[FEATURES]):
        return x
    visual = torch.nonzero(added[PLACES][0]).flatten().tolist()
    rows = [i for i, column in enumerate(visual) if column in kept]
    x = x.clone()
    x[0, [kept.index(visual[i]) for i in rows]] += added[FEATURES][block][rows]
    return x


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
    """Greedy tokens that are no places of images, a whole pass for each, and the logits `[step d_vocab]` behind them."""
    inputs, rows, ids = dict(inputs), list[Tensor](), list[int]()
    for _ in range(steps):
        last = logits(family, hf, inputs, layer, gone)[0][:, -1]
        rows.append(last[0])
        ids.append(int(last[0].index_fill(-1, torch.tensor([IMAGE]), float("-inf")).argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids[-1:]])], 1)
        for name, new in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=new)
    return ids, torch.stack(rows)


def _forget(hf: Any) -> None:
    """Position offsets that an earlier pass left."""
    if hasattr(hf.model, "rope_deltas"):
        hf.model.rope_deltas = None
