"""How a sweep looks: as a few lines of text, and as a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..views import Part, View
from .keys import Effect, Key, Parts, cells, part_names, shown, words

if TYPE_CHECKING:
    from ..report import Chart
    from ..sites import Edit

Labels = Sequence[Sequence[str]]
"""Tokens of every text as they are shown."""
BARS = 20
"""Variants that a picture without a grid shows."""
WIDEST, MOST = 32, 1000
"""Columns and cells up to which a heat map says its numbers."""


def label(key: Key, edits: Sequence[Edit], numbered: bool) -> str:
    """What a variant is called in a list; a number that says nothing is left out."""
    return words(edits) if numbered else f"{shown(key)}: {words(edits)}"


def said_by_edits(keys: Sequence[Key], variants: Sequence[Sequence[Edit]]) -> bool:
    """Whether keys say nothing beside the edits: those of a plain list, and numbers of layers, heads and positions."""
    if keys == tuple(range(len(keys))):
        return True
    names = part_names(keys, variants)
    return names != ["key"] and not any(name.startswith("key_") for name in names)


def spot(name: str, number: int, labels: Labels) -> str:
    """A position (`pos`) or position of a key as axes name it, with its token where all texts have the same there."""
    from ..report import place_name

    told = {row[number] if -len(row) <= number < len(row) else None for row in labels}
    return f"{name} {place_name(str(number), told.pop() if len(told) == 1 else None)}"


def of_images(edits: Sequence[Edit]) -> bool:
    """Whether positions of edits count visual tokens or patches, not the tokens of the text."""
    return any(edit.site.info.visual for edit in edits)


def spot_words(edits: Sequence[Edit], labels: Labels) -> str:
    """Where a variant's edits are, in brackets: ` (position 7, ' hot')`; "" where that is no single token."""
    from ..report import place_words

    spots = {number for edit in edits for number in (edit.site.pos, edit.site.key) if number is not None}
    if of_images(edits) or len(spots) != 1 or not isinstance(only := spots.pop(), int):
        return ""
    name = spot("", only, labels).strip()
    return f" ({place_words(name)})" if " " in name else ""


def lines(top: Sequence[Effect], count: int, without_key: bool) -> Part:
    """The strongest variants, one a line."""
    shown_effects = [f"{'nan' if math.isnan(e.effect) else f'{e.effect:+.4g}':>10}" for e in top]
    said = [f"{n}  {label(e.key, e.edits, without_key)}" for n, e in zip(shown_effects, top, strict=True)]
    return Part("top", said, more=count - len(top))


def view(title: str, top: Part, failed: Sequence[str], explain: str) -> View:
    """A sweep in a few lines."""
    bad = [failed_words(failed)] if failed else []
    cost = [line for line in explain.splitlines() if line.startswith(("strategy", "token-layers"))]
    return View(title, [top, Part("failed", bad), Part("cost", [" ".join(line.split()) for line in cost])])


def failed_words(failed: Sequence[str]) -> str:
    """That some variants have no score, and which the first are."""
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return f"not a number: the score of {', '.join(failed[:3])}{more}"


def is_grid(keys: Sequence[Key]) -> bool:
    """Whether keys are pairs that fill a grid."""
    pairs = all(isinstance(key, tuple) and len(key) == 2 for key in keys)
    return pairs and len(keys) == len({k[0] for k in keys}) * len({k[1] for k in keys})  # type: ignore[index]


def grid_chart(
    effects: Sequence[float], keys: Sequence[Key], variants: Sequence[Sequence[Edit]], rows: Parts, columns: Parts,
    score: str, measured: str, said: str, labels: Labels,
) -> Chart:  # fmt: skip
    """Effects as a heat map."""
    from ..report import Heatmap, cell_texts

    placed = cells(keys, rows, columns)
    names = part_names(keys, variants)
    down, across = (names[part] if part < len(names) else f"key_{part}" for part in placed.parts)
    labels = () if any(map(of_images, variants)) else labels
    values = [[effects[number] for number in line] for line in placed.numbers]
    small = len(placed.columns) <= WIDEST and len(values) * len(placed.columns) <= MOST
    tips = [
        [f"{label(keys[n], variants[n], False)}\n{effects[n]:+.4g}" if variants else f"{keys[n]}" for n in line]
        for line in placed.numbers
    ]
    return Heatmap(
        values, [_named(down, row, labels) for row in placed.rows],
        [_named(across, column, labels) for column in placed.columns],
        texts=cell_texts(values) if small else None, tips=tips, diverging=True, title=f"Effect on {measured} ({said})",
        colorbar=f"change of {score}",
    )  # fmt: skip


def _named(name: str, part: Any, labels: Labels) -> str:
    if name in ("pos", "key") and isinstance(part, int):
        return spot(name, part, labels)
    return shown(part) if name.startswith("key_") else f"{name} {shown(part)}"


def bar_chart(top: Sequence[Effect], count: int, without_key: bool, measured: str, said: str) -> Chart:
    """The strongest variants as bars."""
    from ..report import Bar, Bars

    if not top:
        raise PlanError("there is nothing to draw: no variant of this sweep has a number for its score")
    which = f"the {len(top)} strongest of {count:,} variants; " if len(top) < count else ""
    return Bars(
        [Bar(label(e.key, e.edits, without_key), e.effect) for e in top], title=f"Effect on {measured} ({which}{said})",
        xlabel=f"change of {measured}",
    )  # fmt: skip
