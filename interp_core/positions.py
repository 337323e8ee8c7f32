"""Where in a text: positions as data, and how they resolve against real rows.

A position is an integer, a `Slice`, a list of integers, a `Span`, a name, one of these as `Counted`, a `PerRow` of
these, or a `Mask`. All but `Mask` count the row's real tokens: 0 is the first token that is not padding, -1 the last,
so that padding never changes what they mean. `Mask` is the exception: it is laid over the padded batch as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from .errors import PositionError, nearest

__all__ = [
    "ALL", "GENERATED", "GROWING", "LAST", "VISION", "Counted", "Mask", "PerRow", "Position", "PositionLike", "Rows",
    "Slice", "Span", "format_position", "is_single", "parse_position", "position", "resolve",
]  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A slice that can be hashed and written to JSON."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None

    @property
    def slice(self) -> slice:
        """The Python slice."""
        return slice(self.start, self.stop, self.step)

    def __str__(self) -> str:
        parts = ["" if part is None else str(part) for part in (self.start, self.stop, self.step)]
        return ":".join(parts if self.step is not None else parts[:2])


@dataclass(frozen=True, order=True)
class Span:
    """Half-open range of tokens, counted over the row's real tokens."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))


@dataclass(frozen=True)
class Counted:
    """A position that has to select so many tokens in a row: of values of some text's rows, strung together."""

    at: Any
    count: int


@dataclass(frozen=True)
class PerRow:
    """One position per row of the batch: `PerRow((-1, -3))`."""

    rows: tuple[Any, ...]


@dataclass(frozen=True)
class Mask:
    """Chosen columns of each row of a padded batch; made from a boolean `[batch pos]` array."""

    columns: tuple[tuple[int, ...], ...]
    width: int


Position = int | Slice | tuple[int, ...] | Span | str | Counted | PerRow | Mask
PositionLike = Any
"""What `Site.at` takes: a `Position`, or a Python slice, list, nested list, or boolean array."""

LAST, ALL, GENERATED, VISION = "last", "all", "generated", "vision"
TEXT, AFTER_VISION = "text", "after_vision"
GROWING = (TEXT, AFTER_VISION)
"""Names of texts with images that tokens belong to which are generated, too."""


def position(value: PositionLike) -> Position:
    """Normal form of what a user gave.

    Raises:
        PositionError: not a position.
    """
    if value is None or isinstance(value, (Slice, Span, Counted, PerRow, Mask, str)):
        return Slice() if value is None else value
    if isinstance(value, slice):
        return Slice(value.start, value.stop, value.step)
    if getattr(value, "ndim", 0) == 2 and "bool" in str(getattr(value, "dtype", "")):
        rows = value.tolist()
        return Mask(tuple(tuple(i for i, on in enumerate(row) if on) for row in rows), len(rows[0]) if rows else 0)
    if hasattr(value, "tolist"):
        value = value.tolist()
    # Before integers: Python counts truth values among them.
    if isinstance(value, bool):
        raise PositionError(f"{value} is not a position; give an integer, slice, Span, list, mask or name")
    if hasattr(value, "__index__"):
        return int(value)
    if isinstance(value, Sequence):
        if value and all(hasattr(item, "__index__") and not isinstance(item, bool) for item in value):
            return tuple(int(item) for item in value)
        if value and not any(hasattr(item, "__index__") for item in value):
            return PerRow(tuple(position(item) for item in value))
    raise PositionError(f"{value!r} is not a position; give an integer, slice, Span, list, list per row, mask or name")


def is_single(value: Position | None) -> bool:
    """Whether it selects exactly one position per row, so that the axis is dropped; None, all of them, does not."""
    if isinstance(value, PerRow):
        return all(is_single(row) for row in value.rows)
    return isinstance(value, int) or value == LAST


class Rows(NamedTuple):
    """The rows of a batch as positions see them.

    Attributes:
        real: per row, the columns that hold real tokens, in order.
        names: per name, per row, indices into the row's real tokens.
        width: columns of the padded batch.
        prompt: per row, how many real tokens the prompt had (for generation; else the row's length).
        growing: more tokens will follow, so that a position beyond the row is not there yet, instead of wrong.
        stops: per row, how many of `real` are text, where a row has ended and the rest only fills it up (None: all).
        moved: per row, where a column of the batch as the caller laid it out lies now (None: where it was).
        patches: what the vision tower makes of the rows' images (None: there are none, or it is not known).
    """

    real: Sequence[Sequence[int]]
    names: Mapping[str, Sequence[Sequence[int]]]
    width: int
    prompt: Sequence[int] | None = None
    growing: bool = False
    stops: Sequence[int] | None = None
    moved: Sequence[Sequence[int]] | None = None
    patches: Patches | None = None

    @property
    def live(self) -> list[bool] | None:
        """Which rows have not ended (None: all)."""
        if self.stops is None:
            return None
        return [n == len(row) for row, n in zip(self.real, self.stops, strict=True)]

    @property
    def text(self) -> Rows:
        """These rows without what only fills up those that have ended."""
        if self.stops is None:
            return self
        return self._replace(real=[row[:n] for row, n in zip(self.real, self.stops, strict=True)], stops=None)


Images = tuple[tuple[Sequence[int], ...], ...]
"""Per row and image, where each of its patches passes in the vision tower, counted over the image's own."""


class Patches:
    """Patches as positions of their own. A tower is run once for all images of a batch, which follow one another there.

    Attributes:
        total: how many patches all images have.
        rows: the batch's rows as they count patches, for `resolve`; `image_0`, … are those of single images.
        places: where a row's patch passes, over all images `[row][patch]`.
    """

    def __init__(self, images: Images) -> None:
        starts = [0, *accumulate(len(image) for row in images for image in row)]
        self.total = starts[-1]
        image_starts = iter(starts)
        self.places = [[start + i for image in row for start in (next(image_starts),) for i in image] for row in images]
        names: dict[str, list[list[int]]] = {}
        for i in range(max(map(len, images), default=0)):
            before = [sum(map(len, row[:i])) for row in images]
            names[f"image_{i}"] = [
                [*range(n, n + len(row[i]))] if i < len(row) else [] for n, row in zip(before, images, strict=True)
            ]
        counts = [len(row) for row in self.places]
        self.rows = Rows([range(count) for count in counts], names, max(counts, default=0))


def resolve(value: Position, rows: Rows) -> list[list[int]]:
    """Columns of the padded batch that a position selects, per row.

    Raises:
        PositionError: outside a row, an unknown name, or a count of rows that differs.
    """
    if isinstance(value, Mask):
        fits = value.width <= rows.width if rows.prompt is not None else value.width == rows.width
        if len(value.columns) != len(rows.real) or not fits:
            raise PositionError(
                f"the mask is [{len(value.columns)}, {value.width}], the batch is [{len(rows.real)}, {rows.width}]"
            )
        if rows.moved is not None:
            return [sorted(to[c] for c in row) for row, to in zip(value.columns, rows.moved, strict=True)]
        return [list(columns) for columns in value.columns]
    if isinstance(value, PerRow):
        if len(value.rows) != len(rows.real):
            raise PositionError(f"positions for {len(value.rows)} rows, the batch has {len(rows.real)}")
        return [_row(item, rows, i) for i, item in enumerate(value.rows)]
    return [_row(value, rows, i) for i in range(len(rows.real))]


def selects_newest(value: Position, rows: Rows, row: int) -> bool:
    """Whether a position selects a row's last token, where that came after the prompt: as `resolve` has it, but at the
    same cost however long the row is."""
    newest = len(rows.real[row]) - 1
    if isinstance(value, int):
        return value in (-1, newest)
    if isinstance(value, str):
        if value in rows.names:  # all other names are the prompt's
            return _grows(value, rows)
        return value in (LAST, ALL, GENERATED)
    if isinstance(value, Slice):
        return newest in range(newest + 1)[value.slice]
    if isinstance(value, Span):
        return value.start <= newest < value.stop
    if isinstance(value, Counted):
        return selects_newest(value.at, rows, row)
    if isinstance(value, PerRow):
        return selects_newest(value.rows[row], rows, row)
    return isinstance(value, tuple) and any(selects_newest(item, rows, row) for item in value)


def settled(value: Position, rows: Rows, row: int) -> bool:
    """Whether what `selects_newest` says of the newest token will hold of every later one."""
    newest = len(rows.real[row]) - 1
    if isinstance(value, int):
        return value < newest
    if isinstance(value, Slice):
        return value.step in (None, 1) and all(bound is None or bound <= newest for bound in (value.start, value.stop))
    if isinstance(value, Span):
        return value.stop <= newest
    if isinstance(value, Counted):
        return settled(value.at, rows, row)
    if isinstance(value, PerRow):
        return settled(value.rows[row], rows, row)
    return not isinstance(value, tuple) or all(settled(item, rows, row) for item in value)


def _row(value: Any, rows: Rows, row: int) -> list[int]:
    real = rows.real[row]
    length = len(real)
    if isinstance(value, int):
        if rows.growing and (value >= length or not length):
            return []
        if not -length <= value < length:
            raise PositionError(f"no position {value} in row {row}: it has {length} tokens, 0 to {length - 1}")
        return [real[value]]
    if isinstance(value, str):
        return [real[i] for i in _named(value, rows, row)]
    if isinstance(value, Counted):
        selected = _row(value.at, rows, row)
        if len(selected) != value.count:
            raise PositionError(
                f"{format_position(value.at)} selects {len(selected)} tokens of row {row}, and the value has "
                f"{value.count} for it; give values of as many tokens in each row, in the order of the rows"
            )
        return selected
    if isinstance(value, Span):
        if rows.growing:
            return list(real[value.start : value.stop])
        if not 0 <= value.start < value.stop <= length:
            raise PositionError(f"span {value.start}:{value.stop} lies outside row {row}, which has {length} tokens")
        return list(real[value.start : value.stop])
    if isinstance(value, Slice):
        return list(real[value.slice])
    columns = [column for item in value for column in _row(item, rows, row)]
    if len(set(columns)) != len(columns):
        raise PositionError(f"{format_position(value)} selects a position twice in row {row}")
    return columns


def _named(name: str, rows: Rows, row: int) -> Sequence[int]:
    length = len(rows.real[row])
    # A text's own names come before those that every text has.
    if name in rows.names:
        known = rows.names[name][row]
        if rows.prompt is None or not _grows(name, rows):
            return known
        return [*known, *range(rows.prompt[row], length)]
    if name == LAST:
        return range(length)[-1:]
    if name == ALL:
        return range(length)
    prompt = length if rows.prompt is None else rows.prompt[row]
    if name == "prompt":
        return range(prompt)
    if name == GENERATED and rows.prompt is not None:
        return range(prompt, length)
    hint = "" if name != GENERATED else " Generated tokens exist only in generate()."
    own = f" A name of your own is given by tokens.name({name}=…)." if name.isidentifier() and not hint else ""
    raise PositionError(
        f"the text has no positions called {name!r}.{hint} {nearest(name, [*rows.names, LAST, ALL, 'prompt'])}{own}"
    )


def _grows(name: str, rows: Rows) -> bool:
    """Whether new tokens belong to a name that the batch knows: they are text, and come after its images."""
    return name in GROWING and VISION in rows.names


def format_position(value: Position) -> str:
    """Short text form: `-1`, `3:7`, `[0,4]`, `vision`; rows joined by `|`."""
    if isinstance(value, Span):
        return f"span({value.start},{value.stop})"
    if isinstance(value, Counted):
        return f"{format_position(value.at)}#{value.count}"
    if isinstance(value, PerRow):
        return "|".join(format_position(row) for row in value.rows)
    if isinstance(value, Mask):
        rows = "/".join(",".join(map(str, row)) for row in value.columns)
        return f"mask({value.width}:{rows})"
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def parse_position(text: str) -> Position:
    """The position that `format_position` shows.

    Raises:
        PositionError: not in this form.
    """
    text = text.strip()
    try:
        # From the outside in: rows have positions of any other kind, and counted ones any that are not by row.
        if text.startswith("mask(") and text.endswith(")"):
            width, _, rows = text[5:-1].partition(":")
            columns = [tuple(int(i) for i in row.split(",") if i) for row in rows.split("/")]
            return Mask(tuple(columns), int(width))
        if "|" in text:
            return PerRow(tuple(parse_position(part) for part in text.split("|")))
        if "#" in text:
            at, _, count = text.rpartition("#")
            return Counted(parse_position(at), int(count))
        if text.startswith("span(") and text.endswith(")"):
            start, stop = text[5:-1].split(",")
            return Span(int(start), int(stop))
        if text.startswith("[") and text.endswith("]"):
            return tuple(_item(part) for part in text[1:-1].split(",") if part)
        if ":" in text:
            return _item(text)
        return int(text) if text.lstrip("-").isdigit() else _name(text)
    except (ValueError, TypeError):
        raise PositionError(
            f"{text!r} is not a position; write -1, 3:7, [0,4], span(3,7), a name, or rows joined by |"
        ) from None


def _item(text: str) -> Any:
    """An integer, or a slice."""
    return Slice(*(int(part) if part.strip() else None for part in text.split(":"))) if ":" in text else int(text)


def _name(text: str) -> str:
    if not text or not all(char.isalnum() or char in "_-.:" for char in text) or text[0].isdigit():
        raise ValueError(text)
    return text
