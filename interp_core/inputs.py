"""Further inputs of a batch, such as pixels: taken apart into rows, and put together again.

Inputs with one value per token (`mm_token_type_ids`, `token_type_ids`) follow the tokens. Of others a batch says in
`Tokens.shares` how many entries of the first axis are each row's: patches of the row's pictures in Qwen-VL, pictures in
LLaVA. What is neither (a cache, `position_ids`) stays with the whole batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import TextError
from .positions import GROWING, VISION, Images, Span

Shares = Mapping[str, tuple[int, ...] | None]
"""Per input, how many entries of its first axis belong to each row; None where that axis is the rows themselves."""
PER_TOKEN = ("mm_token_type_ids", "token_type_ids")


@runtime_checkable
class Batch(Protocol):
    """What is needed of `Tokens` here."""

    @property
    def ids(self) -> Tensor:
        """Token ids `[batch pos]`."""

    @property
    def mask(self) -> Tensor:
        """Which of them are real."""

    @property
    def spans(self) -> Mapping[str, Any]:
        """Spans per name and row."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Further inputs."""

    @property
    def shares(self) -> Shares:
        """By input, how many of its first axis belong to each row; None for one for each row."""

    @property
    def patches(self) -> Images | None:
        """What a vision tower makes of them."""


def per_token(name: str, value: Any, tokens: Batch) -> bool:
    """Whether an input has a value for each token."""
    return name in PER_TOKEN and isinstance(value, Tensor) and value.shape == tokens.ids.shape


def undivided(tokens: Batch) -> list[str]:
    """Names of inputs that cannot be taken apart into rows."""
    return [
        name
        for name, value in tokens.inputs.items()
        if name not in tokens.shares and not per_token(name, value, tokens)
    ]


def some(tokens: Batch, rows: Sequence[int], columns: Tensor) -> tuple[dict[str, Any], Shares]:
    """Inputs of some rows, and which are whose: none where none of these rows has an image.

    Args:
        columns: which columns of the tokens stay.

    Raises:
        TextError: inputs that cannot be taken apart.
    """
    if whole := undivided(tokens):
        raise TextError(f"a batch with {', '.join(whole)} cannot be split into rows; tokenize them one by one")
    visual = tokens.spans.get("vision")
    if not tokens.shares or (visual is not None and not any(visual[row] for row in rows)):
        kept = {} if tokens.shares else tokens.inputs
        # A list, since a tuple would index one axis after the other.
        return {name: value[list(rows)][:, columns] for name, value in kept.items()}, {}
    inputs, shares = {}, dict[str, "tuple[int, ...] | None"]()
    for name, value in tokens.inputs.items():
        if name not in tokens.shares:
            inputs[name] = value[list(rows)][:, columns]
            continue
        share = tokens.shares[name]
        if share is None:
            inputs[name], shares[name] = value[list(rows)], None
            continue
        starts = [sum(share[:row]) for row in rows]
        parts = [value[start : start + share[row]] for start, row in zip(starts, rows, strict=True)]
        inputs[name], shares[name] = torch.cat(parts), tuple(share[row] for row in rows)
    return inputs, shares


def stacked(rows: Sequence[Batch], width: int) -> tuple[dict[str, Any], Shares]:
    """Inputs of single rows as those of one batch that is padded on the left to `width`.

    Raises:
        TextError: inputs that cannot be put together: of other kinds, or pictures of sizes that share no tensor.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.inputs))
    inputs, shares = {}, dict[str, "tuple[int, ...] | None"]()
    for name in names:
        holders = [row for row in rows if name in row.inputs]
        if {name in row.shares for row in holders} == {False}:
            inputs[name] = torch.cat([_along(row, name, width) for row in rows])
            continue
        known = [row.shares.get(name, ()) for row in holders]
        if any(share == () for share in known) or len({share is None for share in known}) > 1:
            raise TextError(f"rows whose {name} are laid out differently cannot be one batch; run them one by one")
        parts = [row.inputs[name] for row in holders]
        if known[0] is None:
            parts = [row.inputs.get(name, torch.zeros_like(parts[0][:1])) for row in rows]
            shares[name] = None
        else:
            shares[name] = tuple((row.shares.get(name) or (0,))[0] for row in rows)
        inputs[name] = torch.cat(_alike(name, parts))
    return inputs, shares


def stacked_patches(rows: Sequence[Batch]) -> Images | None:
    """What a vision tower makes of the images of single rows; None where it is not known of one that has images."""
    if any(row.patches is None and row.inputs for row in rows) or all(row.patches is None for row in rows):
        return None
    return tuple(() if row.patches is None else row.patches[0] for row in rows)


def _along(row: Batch, name: str, width: int) -> Tensor:
    """A row's values per token, zeros for padding, and for a row that has none."""
    value = row.inputs.get(name)
    if value is None:
        value = torch.zeros(1, row.ids.shape[1], dtype=torch.long)
    return torch.nn.functional.pad(value, (width - value.shape[1], 0))


def _alike(name: str, parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors filled up with zeros along the second axis (tiles), so that they can be joined along the first."""
    if len({part.shape[1:] for part in parts}) < 2:
        return list(parts)
    if len({(part.ndim, part.shape[2:]) for part in parts}) > 1 or parts[0].ndim < 3:
        shapes = " and ".join(dict.fromkeys(str(list(part.shape)) for part in parts))
        raise TextError(f"{name} of {shapes} cannot be one tensor; run these rows one by one")
    most = max(part.shape[1] for part in parts)
    return [torch.cat([part, part.new_zeros(len(part), most - part.shape[1], *part.shape[2:])], 1) for part in parts]


def is_visual(name: str) -> bool:
    """Whether positions of that name come from images: `vision`, `text`, `after_vision`, `image_0`, …"""
    return name in (VISION, *GROWING) or bool(re.fullmatch(r"image_\d+", name))


def in_row(tokens: Batch, name: str, row: int) -> bool:
    """Whether a row has a name: those of images it has only if it has such images."""
    if "vision" not in tokens.spans or not is_visual(name):
        return True
    return bool(tokens.spans["vision"][row] and tokens.spans[name][row])


def spans_of(single: Batch, name: str) -> tuple[Span, ...]:
    """The spans of a name in a single row; without images, all of it is text."""
    whole = (Span(0, int(single.mask.sum())),) if name == "text" else ()
    return single.spans[name][0] if name in single.spans else whole


def filler(single: Batch) -> int:
    """A token id for the padding of a row: its first that is not visual, since models count those in padding too."""
    visual = {i for span in single.spans.get("vision", ((),))[0] for i in span}
    return next((token for i, token in enumerate(single.ids[0].tolist()) if i not in visual), 0)
