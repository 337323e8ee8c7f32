"""Two results of one class beside each other: whether they can be subtracted, and what of both becomes what.

tensors of floating point    first minus second
names that prompts give      once where they are equal, else both: `hot | dry`
all other fields             told apart, except those that say what the numbers are, which must be equal
rows of tables               those of the same key, that is of the first columns that tell rows apart
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .columns import shortened
from .report.subtracted import Pair

R = TypeVar("R")
UNITS = ("score", "unit", "metric", "distance", "statistic")
"""Fields that say what numbers are."""
OF_PROMPTS = ("rows", "union", "first")
"""Rules of `JOINS` for what depends on the prompts."""
FIXES = {
    **dict.fromkeys(("pos", "query", "key"), "give prompts of as many tokens, or one position of each (at=-1)"),
    "batch": "give as many prompts to both",
    "layer": "take the same layers of both (layers=[…])",
    "variant": "sweep the same variants in the same order",
}
"""How results become alike along an axis."""
SETTING = "setting"
SAID = {("prompts", "texts"): "prompts", ("model", "source"): "model"}
"""What parts of a record are called that say the most of it."""
SAME = "run both with the same settings"


def unlike(first: Any, second: Any) -> str:
    """Why two results of one class cannot be subtracted, and what to do; "" if they can."""
    sizes: dict[str, int] = {}
    for name, axes in first.AXES.items():
        here, there = getattr(first, name), getattr(second, name)
        if here is None and there is None:
            continue
        if here is None or there is None:
            return f"{name} is there in the {'second' if here is None else 'first'} only; {SAME}"
        for axis, size, other in zip(axes, here.shape, there.shape, strict=True):
            sizes[axis] = size
            if size != other:
                return f"{axis} is {size} in the first, {other} in the second; {FIXES.get(axis, SAME)}"
    for field in _plain(first):
        here, there = getattr(first, field.name), getattr(second, field.name)
        if equal(here, there) or _of_prompts(first, field.name):
            continue
        if field.name in UNITS:
            return f"{field.name} is {here!r} in the first, {there!r} in the second; {SAME}"
        if (axis := _axis_named(field, here, there, sizes)) is not None:
            a, b = next((a, b) for a, b in zip(here, there, strict=True) if a != b)
            return f"{field.name} along {axis} differ, {a!r} in the first, {b!r} in the second; {FIXES.get(axis, SAME)}"
    return ""


def _axis_named(field: Any, here: Any, there: Any, sizes: Mapping[str, int]) -> str | None:
    """The axis along which a field has names; None of one that has none."""
    if not isinstance(here, tuple) or not isinstance(there, tuple) or len(here) != len(there):
        return None
    if axis := field.metadata.get("names"):
        return str(axis)
    if any(isinstance(name, (tuple, Mapping)) for name in here):
        return None
    fitting = [axis for axis, size in sizes.items() if size == len(here)]
    # `layers` are the names along `layer`, also where another axis is as long
    return next((axis for axis in fitting if field.name.startswith(axis)), next(iter(fitting), None))


def named_alike(first: R, second: R) -> tuple[R, R]:
    """The two with the names that prompts give of both, so that they draw themselves with the same."""
    names: dict[str, Any] = {}
    for field in _plain(first):
        here, there = getattr(first, field.name), getattr(second, field.name)
        if here != there and _of_prompts(first, field.name) and _texts(here, there):
            names[field.name] = both(here, there)
    return _renamed(first, names), _renamed(second, names)


def _renamed(side: Any, names: Mapping[str, Any]) -> Any:
    return replace(side, **names).with_provenance(side.provenance) if names else side


def _texts(here: Any, there: Any) -> bool:
    """Whether both are texts, as many and nested alike."""
    if isinstance(here, tuple) and isinstance(there, tuple):
        return len(here) == len(there) and all(_texts(a, b) for a, b in zip(here, there, strict=True))
    return isinstance(here, str) and isinstance(there, str)


def both(here: Any, there: Any) -> Any:
    """Two pieces of plain data as one: what is equal once, what is not beside each other."""
    if here == there:
        return here
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        return {key: both(here.get(key), there.get(key)) for key in {**here, **there}}
    if isinstance(here, (tuple, list)) and isinstance(there, (tuple, list)) and len(here) == len(there):
        return type(here)(both(a, b) for a, b in zip(here, there, strict=True))
    return f"{here} | {there}"


def records(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """Two records of where results come from as one."""
    record: dict[str, Any] = both(here, there)
    count = max(here["prompts"]["count"], there["prompts"]["count"])
    record["prompts"] = {**both(here["prompts"], there["prompts"]), "count": count}
    return record


def told_apart(first: Any, second: Any) -> dict[str, str]:
    """What the two differ in, by name: what their records say of model, settings and prompts, and their fields of one
    number or word."""
    apart: dict[str, str] = {}
    if first.provenance and second.provenance:
        for name, part in (("model", "model"), (SETTING, "settings"), ("prompts", "prompts")):
            apart |= _apart(name, first.provenance[part], second.provenance[part])
    for field in _plain(first):
        here, there = getattr(first, field.name), getattr(second, field.name)
        if isinstance(here, (str, int, float)) and not equal(here, there) and not _of_prompts(first, field.name):
            apart[field.name] = f"{here} | {there}"
    return apart


def _apart(part: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, str]:
    keys = [key for key in {**here, **there} if here.get(key) != there.get(key) and key not in ("digest", "lengths")]
    return {SAID.get((part, key), f"{part} {key}"): _shown(both(here.get(key), there.get(key))) for key in keys}


def _shown(said: Any) -> str:
    return "; ".join(map(repr, said)) if isinstance(said, list) else str(said)


def numbers(first: Any, second: Any) -> Iterator[tuple[str, tuple[str, ...], Tensor, Tensor]]:
    """Name, axes and both tensors of the fields that are subtracted."""
    for name, axes in first.AXES.items():
        here, there = getattr(first, name), getattr(second, name)
        if here is not None and here.is_floating_point():
            yield name, axes, here, there.to(here.device)


def field_rows(first: Any, second: Any) -> list[dict[str, Any]]:
    """A row per subtracted field: where it differs most, and by how much in the mean."""
    rows = []
    for name, axes, here, there in numbers(first, second):
        far = (here - there).double()
        row: dict[str, Any] = {"field": name, "axes": " ".join(axes)}
        known = far.flatten().abs().nan_to_num(-1.0)
        if known.numel() and float(known.max()) >= 0:
            place = int(known.argmax())
            where = torch.unravel_index(torch.tensor(place), far.shape)
            row["at"] = ", ".join(f"{axis} {int(index)}" for axis, index in zip(axes, where, strict=True))
            row |= {label: float(side.flatten()[place]) for label, side in (("first", here), ("second", there))}
            row |= {"largest": float(far.flatten()[place]), "mean": float(far.abs().nanmean())}
        rows.append(row)
    return rows


def field_pairs(first: Any, second: Any) -> list[list[Pair]]:
    """Where each subtracted field differs most, each by itself: they are on scales of their own."""
    rows = [row for row in field_rows(first, second) if "largest" in row]
    return [[Pair(row["at"] or "all", row["first"], row["second"], row["field"])] for row in rows]


class Rows(NamedTuple):
    """Rows of two tables that are of the same.

    Attributes:
        key: columns that tell the rows apart.
        pairs: of the first table and of the second.
        left: how many rows of both tables have no twin.
    """

    key: tuple[str, ...]
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]]
    left: int

    @property
    def subtracted(self) -> list[dict[str, Any]]:
        """One row per pair: numbers with a fraction subtracted; of what else differs both, in two columns."""
        return self._joined(subtracted=True)

    @property
    def beside(self) -> list[dict[str, Any]]:
        """One row per pair, of what differs both, in two columns."""
        return self._joined(subtracted=False)

    def _joined(self, subtracted: bool) -> list[dict[str, Any]]:
        pairs = [(here, there, column) for here, there in self.pairs for column in here]
        split = {column for here, there, column in pairs if not equal(here[column], there[column])}
        rows = []
        for here, there in self.pairs:
            row: dict[str, Any] = {}
            for column, held in here.items():
                if subtracted and _number(held, there[column]):
                    row[column] = held - there[column]
                elif column in split:
                    row |= {column: held, f"{column} (second)": there[column]}
                else:
                    row[column] = held
            rows.append(row)
        return rows

    @property
    def numbers(self) -> list[Pair]:
        """The numbers of the first column that has some."""
        columns = (column for here, _ in self.pairs[:1] for column, held in here.items() if isinstance(held, float))
        column = next(columns, "")
        return [
            Pair(self._where(here, there), here[column], there[column], column)
            for here, there in self.pairs
            if isinstance(here.get(column), float) and isinstance(there.get(column), float)
        ]

    def _where(self, here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
        """What a pair is of: its key, and texts that both have."""
        more = [text for name, text in here.items() if name not in self.key and isinstance(text, str)]
        key = [f"{name} {here[name]}" for name in self.key if here[name] != ""]
        return ", ".join([*key, *dict.fromkeys(text for text in more if text in there.values())])


def rows_beside(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> Rows:
    """The rows of two tables that have the same key: the fewest columns, from the left, that tell all rows apart in
    both. Numbers with a fraction are no key."""
    columns = list(first[0]) if first else []
    if any(list(row) != columns for row in (*first, *second)):
        return Rows((), [], len(first) + len(second))
    for width in range(1, len(columns) + 1):
        key = tuple(columns[:width])
        if any(isinstance(row[key[-1]], float) for row in (*first, *second)):
            break
        here, there = ({tuple(map(repr, (row[name] for name in key))): row for row in rows} for rows in (first, second))
        if len(here) == len(first) and len(there) == len(second):
            pairs = [(row, there[name]) for name, row in here.items() if name in there]
            return Rows(key, pairs, len(first) + len(second) - 2 * len(pairs))
    return Rows((), [], len(first) + len(second))


def equal(here: Any, there: Any) -> bool:
    """Whether they are equal; what is not a number equals itself."""
    try:
        return bool(here == there) or repr(here) == repr(there)
    except (ValueError, RuntimeError):  # arrays and tensors inside of something else, of which nobody says it
        return False


def _number(here: Any, there: Any) -> bool:
    """Whether both are numbers, and one of them with a fraction."""
    return {type(here), type(there)} in ({float}, {float, int})


def in_words(apart: Mapping[str, str]) -> str:
    """What differs, a line each."""
    return "\n".join(f"{name}: {shortened(said, 400)}" for name, said in apart.items())


def _plain(first: Any) -> list[Any]:
    """Fields that are no tensors and no notes."""
    return [f for f in fields(first) if f.name not in first.AXES and f.compare and not f.metadata.get("apart")]


def _of_prompts(first: Any, name: str) -> bool:
    return first.JOINS.get(name) in OF_PROMPTS
