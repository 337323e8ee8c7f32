"""Keys of variants: what may be one, what their parts number in the edits, and which cell of a grid each is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import PlanError, ReadError, nearest, wrong
from ..sites import TENSOR_OPS, Edit
from ..tensors import is_tensor

Key = str | int | float | tuple[Any, ...]
"""What a user calls a variant: a string, a number, or a tuple of these."""
Parts = int | Iterable[Any]
"""Which part of the keys goes along a side of a grid, or the values of that part, in order."""
SAID = 3
"""Edits of a variant that its words name."""


class Effect(NamedTuple):
    """A variant and what it does to the score, averaged over examples."""

    key: Key
    edits: tuple[Edit, ...]
    effect: float

    def __repr__(self) -> str:
        return f"Effect(key={self.key!r}, edits={words(self.edits)}, effect={self.effect:.4g})"


class Cells(NamedTuple):
    """A grid of variants: the parts of keys along both sides, and the number of the variant in each cell."""

    rows: tuple[Any, ...]
    columns: tuple[Any, ...]
    numbers: list[list[int]]
    parts: tuple[int, int]


def by_key(variants: Any) -> tuple[tuple[Key, ...], Any]:
    """The keys of a mapping of variants, and the variants; of anything else no keys.

    Raises:
        PlanError: a key that is none.
    """
    if not isinstance(variants, Mapping):
        return (), variants
    return tuple(_key(key, key) for key in variants), tuple(variants.values())


def _key(key: Any, whole: Any) -> Key:
    if isinstance(key, tuple) and key:
        return tuple(_key(part, whole) for part in key)
    if isinstance(key, (str, int)) or (isinstance(key, float) and key == key):
        return key
    if hasattr(key, "__index__") and not is_tensor(key):  # numpy's integers
        return int(key)
    raise PlanError(wrong("the key of a variant", "a string, a number or a tuple of these", whole))


def number_of(index: Mapping[Key, int], key: Any) -> int:
    """The number of a variant.

    Raises:
        ReadError: there is none of that key.
    """
    try:
        return index[key]
    except (KeyError, TypeError):
        known = nearest(key if isinstance(key, str) else None, map(str, index))
        raise ReadError(f"no variant of this sweep has the key {key!r:.60}. {known}") from None


def words(edits: Sequence[Edit]) -> str:
    """A variant in few words: sites and operations, without the shapes of tensors."""
    said = [f"{edit.site} {edit.op}" if edit.op in TENSOR_OPS else str(edit) for edit in edits[:SAID]]
    more = [f"{len(edits) - SAID} more"] if len(edits) > SAID else []
    return ", ".join(said + more) or "no edit"


def shown(key: Key) -> str:
    """A key as labels have it: `2, 5` for `(2, 5)`."""
    return ", ".join(map(shown, key)) if isinstance(key, tuple) else str(key)


def part_names(keys: Sequence[Key], variants: Sequence[Sequence[Edit]]) -> list[str]:
    """What the parts of keys are called: after what they number in the edits (`layer`, `head`, `pos`, `key`), else
    `key_0` and so on; `key` alone where keys have no parts that all share."""
    sizes = {len(key) if isinstance(key, tuple) else 0 for key in keys}
    if len(sizes) > 1 or not variants:
        return ["key"] if 0 in sizes or len(sizes) > 1 else [f"key_{part}" for part in range(max(sizes))]
    split = [key if isinstance(key, tuple) else (key,) for key in keys]
    names: list[str] = []
    for part in range(len(split[0])):
        named = [name for name in _numbered(variants[0]) if name not in names]
        numbered = (
            name for name in named if all(_says(v, name, key[part]) for v, key in zip(variants, split, strict=True))
        )
        names.append(next(numbered, f"key_{part}" if sizes != {0} else "key"))
    return names


def _numbered(edits: Sequence[Edit]) -> list[str]:
    """What keys may number in a variant: its layers, units, positions and positions of keys."""
    units = [str(edit.site.info.unit) for edit in edits if isinstance(edit.site.units, int)]
    keys = ["key" for edit in edits if edit.site.key is not None]
    return list(dict.fromkeys(["layer", *units, "pos", *keys]))


def _says(edits: Sequence[Edit], name: str, part: Any) -> bool:
    """Whether that is the number of a variant's layer, unit or position."""
    if isinstance(part, (str, float)):
        return False
    sites = [edit.site for edit in edits]
    if name == "layer":
        return bool(sites) and all(site.layers == part for site in sites)
    if name == "pos":
        return bool(sites) and all(site.pos == part for site in sites)
    if name == "key":
        return bool(sites) and all(site.key == part for site in sites)
    return bool(sites) and all(site.units == part and site.info.unit == name for site in sites)


def cells(keys: Sequence[Key], rows: Parts, columns: Parts) -> Cells:
    """Where each variant lies in a grid.

    Raises:
        PlanError: keys without these parts, or a cell with no variant or with several.
    """
    parts = _part("rows", rows, columns, 0), _part("columns", columns, rows, 1)
    for key in keys:
        if not isinstance(key, tuple) or len(key) <= max(parts):
            raise PlanError(
                f"a grid takes keys of {max(*parts, 1) + 1} parts or more, and there is {key!r:.60}: sweep over "
                "{(layer, head): edit, …}, say"
            )
    at: dict[tuple[Any, Any], list[int]] = {}
    for number, key in enumerate(keys):
        assert isinstance(key, tuple)
        at.setdefault((key[parts[0]], key[parts[1]]), []).append(number)
    sides = [
        tuple(dict.fromkeys(cell[side] for cell in at)) if isinstance(chosen, int) else tuple(chosen)
        for side, chosen in enumerate((rows, columns))
    ]
    numbers = [[_only(at.get((row, column), []), row, column, keys) for column in sides[1]] for row in sides[0]]
    if not numbers or not sides[1]:
        raise PlanError("a grid needs a row and a column at least; rows= and columns= are empty")
    return Cells(sides[0], sides[1], numbers, parts)


def _part(side: str, chosen: Any, other: Any, default: int) -> int:
    """Which part of the keys goes along a side: the one chosen, else the first or second, whichever is left."""
    if isinstance(chosen, int) and not isinstance(chosen, bool) and chosen >= 0:
        return chosen
    if isinstance(chosen, (str, bytes, bool, int)) or not isinstance(chosen, Iterable):
        raise PlanError(wrong(f"{side}=", "the number of a part of the keys, or a list of its values", chosen))
    return 1 - default if other == default and isinstance(other, int) else default


def _only(numbers: Sequence[int], row: Any, column: Any, keys: Sequence[Key]) -> int:
    if len(numbers) == 1:
        return numbers[0]
    where = f"the cell of row {row!r} and column {column!r}"
    if numbers:
        raise PlanError(
            f"{len(numbers)} variants lie in {where}: {', '.join(repr(keys[n]) for n in numbers[:3])}; choose parts of "
            "the keys that tell them apart, rows= and columns="
        )
    raise PlanError(f"no variant lies in {where}; give rows= and columns= as lists of those that are there")
