"""What tokens show of themselves: each with its position, row by row; named spans; further inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .positions import Span
from .views import ROWS, Part, Shown, Table, View, batch_shown, part, shape_shown, tokens_part

if TYPE_CHECKING:
    from torch import Tensor


class TokensView(Shown):
    """The looks of `Tokens`."""

    ids: Tensor
    labels: tuple[tuple[str, ...], ...]
    spans: Mapping[str, tuple[tuple[Span, ...], ...]]
    inputs: Mapping[str, Any]

    def _view(self) -> View:
        lengths = [len(row) for row in self.labels]
        padded = f", padded to {self.ids.shape[1]}" if min(lengths) < self.ids.shape[1] else ""
        parts = [
            part("tokens", tokens_part, self.labels),
            part("spans", _spans, self.spans, len(lengths)),
            part("inputs", _inputs, self.inputs),
        ]
        return View(f"Tokens: {batch_shown(lengths)}{padded}", parts)


def _spans(spans: Mapping[str, tuple[tuple[Span, ...], ...]], rows: int) -> Part:
    """Named spans as half-open ranges of positions: all of them in the table, those of the first row in text."""
    shown = {
        name: [", ".join(f"{span.start}:{span.stop}" for span in row) for row in by_row[:ROWS]]
        for name, by_row in spans.items()
    }
    first = ", ".join(f"{name} {by_row[0]}" for name, by_row in shown.items() if by_row[0])
    where = " in row 0" if rows > 1 else ""
    table = Table(["name", *(f"row {row}" for row in range(min(rows, ROWS)))], [(n, *r) for n, r in shown.items()])
    return Part("spans", [first + where] if first else [], table if shown else None)


def _inputs(inputs: Mapping[str, Any]) -> Part:
    """Further tensors that the model takes, with their shapes."""
    kinds = {name: shape_shown(x.shape) if hasattr(x, "shape") else type(x).__name__ for name, x in inputs.items()}
    return Part("inputs", [", ".join(f"{name} {kind}" for name, kind in kinds.items())] if kinds else [])
