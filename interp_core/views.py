"""How things show themselves: one description of plain data, as a few lines of text and as a notebook's HTML.

    View              a title
    └── parts ─ Part  a name, its lines in text, and the table that HTML has in their place

Nothing here looks at a model: whoever shows itself says in `_view` what there is. A thing that cannot be described says
so, and raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .columns import shortened

WIDTH, LINES = 100, 10
"""Columns and lines that a thing takes in text."""
ROWS = 8
"""Rows of a batch that are shown."""
HEAD, TAIL = 32, 16
"""Tokens that are shown of a long row, from its ends."""
CELL = 300
"""Letters that a cell shows; the whole text is in its tip and label."""


class Table(NamedTuple):
    """Cells as text; the first of a row names it. `note` says what is left out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Part(NamedTuple):
    """Something under a name: lines of text, how many more there would be, and the table that HTML shows instead.
    Lines without a name keep their columns."""

    name: str
    lines: Sequence[str]
    table: Table | None = None
    more: int = 0


class View(NamedTuple):
    """What there is to see of a thing."""

    title: str
    parts: Sequence[Part] = ()

    def text(self) -> str:
        """A few lines; of long parts the first."""
        parts = [part for part in self.parts if part.lines]
        counts = [len(part.lines) + bool(part.more) for part in parts]
        while sum(counts) > LINES - 1 and max(counts) > 1:
            counts[counts.index(max(counts))] -= 1
        width = max((len(part.name) for part in parts), default=0)
        lines = [self.title]
        for part, count in zip(parts, counts, strict=True):
            lines += [f"  {'' if i else part.name:{width}}  {line}" for i, line in enumerate(_first(part, count))]
        return "\n".join(shortened(plainly(line), WIDTH) for line in lines)

    def html(self) -> str:
        """Tables below each other, for a notebook."""
        from .report.html import escape, fragment

        body = "".join(_part(part) for part in self.parts if part.lines or part.table)
        return fragment(f"<section><p><b>{escape(plainly(self.title))}</b></p>{body}</section>")


class Shown:
    """Base of what shows itself by its `_view`."""

    __slots__ = ()

    def _view(self) -> View:
        raise NotImplementedError

    def __repr__(self) -> str:
        return _seen(self).text()

    def _repr_html_(self) -> str:
        return _seen(self).html()


def part(name: str, make: Callable[..., Part], *args: Any) -> Part:
    """The part that a function makes, or one that says why there is none."""
    try:
        return make(*args)
    except Exception as error:  # whoever prints a thing wants to see the rest of it
        return Part(name, [f"not shown ({type(error).__name__}: {error})"])


def _first(part: Part, count: int) -> list[str]:
    """A part in so many lines; the last says how many more there are."""
    if len(part.lines) <= count and not part.more:
        return list(part.lines)
    kept = list(part.lines[: max(count - 1, 1)])
    more = f"… and {len(part.lines) - len(kept) + part.more} more"
    return [*kept, more] if count > 1 else [f"{shortened(kept[0], WIDTH - 40)} {more}"]


def _seen(thing: Shown) -> View:
    try:
        return thing._view()
    except Exception as error:  # a half-built or damaged thing is printed too, in tracebacks above all
        return View(f"{type(thing).__name__} (not shown: {type(error).__name__}: {error})")


# Pieces of views


def plainly(text: str) -> str:
    """Text in which letters that print nothing, or that steer a terminal, are written out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def token_shown(label: str) -> str:
    """A token with its white space made visible."""
    from .report.html import visible

    return plainly(visible(label))


def shape_shown(shape: Sequence[int], axes: Sequence[str] = ()) -> str:
    """`[batch 2, pos 16]`; without names where their number does not fit."""
    named = axes if len(axes) == len(shape) else [""] * len(shape)
    return "[" + ", ".join(f"{axis} {size}".strip() for axis, size in zip(named, shape, strict=True)) + "]"


def batch_shown(lengths: Sequence[int]) -> str:
    """`2 rows of 9 and 16 tokens`."""
    if len(lengths) == 1:
        return f"1 row of {lengths[0]} tokens"
    if len(set(lengths)) == 1:
        return f"{len(lengths)} rows of {lengths[0]} tokens"
    sizes = " and ".join(map(str, lengths)) if len(lengths) == 2 else f"{min(lengths)} to {max(lengths)}"
    return f"{len(lengths)} rows of {sizes} tokens"


def tokens_part(labels: Sequence[Sequence[str]]) -> Part:
    """Tokens with their positions, row by row."""
    lines = [row_shown(row, WIDTH - 24) for row in labels[:ROWS]]
    longest = max(map(len, labels), default=0)
    whole = longest <= HEAD + TAIL
    columns = [*map(str, range(longest))] if whole else [*map(str, range(HEAD)), "…", *map(str, range(-TAIL, 0))]
    cells = [[str(number), *_cells(row, len(columns), whole)] for number, row in enumerate(labels[:ROWS])]
    notes = [f"{len(labels)} rows, the first {ROWS} are shown"] if len(labels) > ROWS else []
    notes += [] if whole else [f"of long rows, the first {HEAD} and the last {TAIL} tokens"]
    return Part("tokens", lines, Table(["row", *columns], cells, "; ".join(notes)), len(labels) - len(lines))


def row_shown(labels: Sequence[str], width: int) -> str:
    """Tokens of a row with their positions, in a line: of a long row those at its ends."""
    shown = [f"{at}:{shortened(token_shown(label), 24)}" for at, label in enumerate(labels)]
    if len(" ".join(shown)) <= width:
        return " ".join(shown)
    tail = shown[-2:]
    head: list[str] = []
    for token in shown[:-2]:
        if len(" ".join([*head, token, "…", *tail])) > width:
            break
        head.append(token)
    return " ".join([*head, "…", *tail])


def _cells(labels: Sequence[str], columns: int, whole: bool) -> list[str]:
    """A row's tokens as cells; of a long one those at its ends."""
    shown = [token_shown(label) for label in labels]
    if whole or len(shown) <= HEAD:
        return shown + [""] * (columns - len(shown))
    if len(shown) <= HEAD + TAIL:
        return [*shown[:HEAD], "", *[""] * (HEAD + TAIL - len(shown)), *shown[HEAD:]]
    return [*shown[:HEAD], f"{len(shown) - HEAD - TAIL} more", *shown[-TAIL:]]


# HTML


def _part(part: Part) -> str:
    from .report.html import escape

    if part.table is None:
        more = [f"… and {part.more} more"] if part.more else []
        lines = "<br>".join(escape(plainly(line)) for line in [*part.lines, *more])
        return f"<p><span class='soft'>{escape(part.name)}</span> {lines}</p>" if part.name else f"<pre>{lines}</pre>"
    table = part.table
    head = "".join(f"<th scope='col'>{escape(plainly(column))}</th>" for column in table.columns)
    body = "".join(
        f"<tr><th scope='row'>{escape(plainly(row[0]))}</th>{''.join(map(_cell, row[1:]))}</tr>" for row in table.rows
    )
    note = f"<figcaption>{escape(table.note)}</figcaption>" if table.note else ""
    name = escape(part.name)
    return (
        f"<figure><div class='scroll' tabindex='0' role='region' aria-label='{name}'><table class='rows'>"
        f"<caption class='soft' style='text-align:left'>{name}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</figure>"
    )


def _cell(text: str) -> str:
    from .report.html import escape

    whole = escape(plainly(text))
    if len(text) <= CELL:
        room = (
            " style='min-width:16rem'" if len(text) > WIDTH // 2 else ""
        )  # narrow screens would break it at every word
        return f"<td{room}>{whole}</td>"
    return f"<td tabindex='0' data-tip='{whole}' aria-label='{whole}'>{escape(shortened(plainly(text), CELL))}</td>"
