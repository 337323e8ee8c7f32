"""Selections of layers and units: integers, slices and lists of them, as data, as text, and as numbers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import SiteError
from .positions import Slice

Index = int | Slice | tuple[int, ...] | None
"""Normal form of a layer or unit selection; None selects all."""


def indices(index: Index, size: int, what: str, where: object) -> range | tuple[int, ...]:
    """The numbers that an index selects out of `size`, negative ones counted from the end.

    Raises:
        SiteError: out of range; `what` names the axis (`layer`, `head`), `where` what was asked.
    """
    if index is None:
        return range(size)
    if isinstance(index, Slice):
        numbers = range(size)[index.slice]
        if not numbers:
            raise SiteError(f"{where} selects no {what}: there are {size}, 0 to {size - 1}")
        return numbers
    listed = (index,) if isinstance(index, int) else index
    for i in listed:
        if not -size <= i < size:
            raise SiteError(f"{where}: no {what} {i}, there are {size}, 0 to {size - 1}")
    return tuple(i % size for i in listed)


def as_index(item: Any, name: str) -> Index:
    """A selection in its normal form.

    Args:
        name: what it selects from, for messages.

    Raises:
        SiteError: it is no integer, slice or list of integers.
    """
    if item.__class__ is int:  # nearly all
        return item
    if hasattr(item, "tolist"):
        item = item.tolist()
    if _is_integer(item):
        return int(item)
    if isinstance(item, slice):
        whole = item == slice(None)
        return None if whole else Slice(item.start, item.stop, item.step)
    if isinstance(item, Slice) or item is None:
        return item
    if isinstance(item, Sequence) and not isinstance(item, str):
        if not item:
            raise SiteError(f"{name}[[]]: an empty list selects nothing")
        if all(map(_is_integer, item)):
            return tuple(int(i) for i in item)
    raise SiteError(f"{name}[{item!r:.60}]: a layer or unit is an integer, slice or list of integers")


def _is_integer(item: Any) -> bool:
    return hasattr(item, "__index__") and not isinstance(item, bool)


def shown_index(index: Any) -> str:
    """A selection as one writes it."""
    if isinstance(index, slice):
        index = Slice(index.start, index.stop, index.step)
    if isinstance(index, tuple):
        return "[" + ",".join(map(str, index)) + "]"
    return str(index)


def split_at_commas(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def parsed_index(text: str, whole: str) -> Any:
    """The selection that a text writes; `whole` is what it is a part of, for messages."""
    text = text.strip()
    try:
        if text.startswith("["):
            return [int(part) for part in text.strip("[]").split(",")]
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        return int(text)
    except ValueError:
        raise SiteError(f"{whole!r}: {text!r} is not an integer, a slice like 2:5 or a list like [1,4]") from None
