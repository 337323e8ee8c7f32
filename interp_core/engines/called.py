"""What blocks of a text with images are called with, for a pass over some of its columns.

Positions of visual tokens (M-RoPE), masks in which an image sees itself both ways (Gemma 3), and visual features that
are added between the first blocks (DeepStack) do not follow from the ids of some columns. So the clean pass, which the
model was called for with its images, keeps what it handed its blocks, and a pass over columns is told the same of these
columns. The vision tower does not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapabilityError
from .attention_prefix import RowTexts

MASK = "attention_mask"


class Called:
    """What a clean pass handed its blocks.

    Attributes:
        width: columns of the pass.
        blocks: per block, what it was called with beside the stream.
        visual: which columns are visual tokens `[text pos]`, where features are added to them.
        features: per block that they are added after, the features of all visual tokens `[token d_model]`.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.blocks: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.visual: Tensor | None = None
        self.features: Sequence[Tensor] = ()

    def laid(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note what the language model is handed to add between its blocks."""
        self.visual, self.features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds") or ()

    def told(self, within: Sequence[int], texts: RowTexts, count: int) -> Told:
        """What blocks are told of `count` columns of some of the texts, from their starts on.

        Raises:
            CapabilityError: columns before those see columns among them, and so change with them.
        """
        return Told(self, within, texts, count)


class Told:
    """What blocks are told of some columns of the clean pass' texts."""

    def __init__(self, called: Called, within: Sequence[int], texts: RowTexts, count: int) -> None:
        self.called, self.within, self.texts, self.count = called, list(within), texts, count
        self._known: dict[Any, Any] = {}
        for mask in {id(kwargs.get(MASK)): kwargs.get(MASK) for _, kwargs in called.blocks}.values():
            self._demand_causal(mask)

    def around(self, layer: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook on a block that adds what is added before it, lets rows join as `hook` does, and tells the block."""

        def told(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            if self.texts.rows and (added := self._added(layer - 1)) is not None:
                x = x + added.to(x.device, x.dtype)
            args, kwargs = hook(module, (x,), {})
            more, named = self.called.blocks[layer]
            return (args[0], *map(self._part, more)), {key: self._part(value, key) for key, value in named.items()}

        return told

    def _demand_causal(self, mask: Any) -> None:
        """Hold it against a mask that no column before the first one sees it or a later one.

        Raises:
            CapabilityError: one does.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            return
        for text, start in zip(self.within, self.texts.starts, strict=True):
            # Masks that are added hide by the lowest number or by half of it (`masks.LOWEST`).
            later = mask[text if len(mask) > 1 else 0, :, :start, start : start + self.count]
            if bool((later if later.dtype == torch.bool else later > torch.finfo(later.dtype).min / 4).any()):
                raise CapabilityError(f"positions before {start} see later ones in this model, and change with them")

    def _part(self, value: Any, name: str = "") -> Any:
        """Of what a block is told, what is said of the columns; for each row that takes part."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._part(x, name) for x in value)
        if not isinstance(value, Tensor):
            return value
        # By identity: all blocks are handed the same tensors, which `called` keeps alive.
        if id(value) not in self._known:
            self._known[id(value)] = self._columns(value, name)
        columns, batch = self._known[id(value)]
        return columns if batch is None else self._rows(columns, batch)

    def _columns(self, value: Tensor, name: str) -> tuple[Tensor, int | None]:
        """The pass' columns of a tensor, and the axis along which each text has its own; None if all rows take one."""
        batch, axes = _axes(value, name)
        if any(value.shape[axis] != self.called.width for axis in axes):
            return value, None
        parts = []
        for text, start in zip(self.within, self.texts.starts, strict=True):
            part = value if batch is None or value.shape[batch] == 1 else value.narrow(batch, text, 1)
            for axis in axes:
                part = part.narrow(axis, start, self.count)
            parts.append(part)
        if batch is not None and len(parts) > 1:
            return torch.cat(parts, batch), batch
        if not all(torch.equal(part, parts[0]) for part in parts[1:]):
            raise CapabilityError("blocks are told of columns what all texts share, and these begin at different ones")
        return parts[0], None

    def _rows(self, x: Tensor, batch: int) -> Tensor:
        """Each row's text's part of what texts have."""
        return x.index_select(batch, torch.tensor(self.texts.rows, device=x.device))

    def _added(self, layer: int) -> Tensor | None:
        """What is added to the rows after a block; None if nothing is added to these columns."""
        called = self.called
        if called.visual is None or not 0 <= layer < len(called.features):
            return None
        if ("added", layer) not in self._known:
            features = called.features[layer]
            everywhere = features.new_zeros(*called.visual.shape, features.shape[-1])
            everywhere[called.visual] = features.to(everywhere.device)
            parts = zip(self.within, self.texts.starts, strict=True)
            at_columns = torch.stack([everywhere[text, start : start + self.count] for text, start in parts])
            self._known["added", layer] = at_columns if bool(at_columns.any()) else None
        added = self._known["added", layer]
        return None if added is None else self._rows(added, 0)


def _axes(value: Tensor, name: str) -> tuple[int | None, list[int]]:
    """The axis of texts, and those of columns: both of a mask's last ones, the last one of whole numbers (positions, in
    one row or several), the one before the last of angles."""
    if name == MASK and value.ndim == 4:
        return 0, [-2, -1]
    whole = name == MASK or not (value.is_floating_point() or value.is_complex())
    column = -1 if whole else -2
    return (column - 1 if value.ndim >= 1 - column else None), [column] if value.ndim >= -column else []
