"""Whether knockouts leave every query something to attend to.

A softmax over nothing means nothing: kernels give zeros, an average over what is hidden, or NaN. So knockouts that
together, or together with a window, hide every key of a query are refused. What cannot be known before the pass (masks
of the caller's, texts packed into a row, scores that a function sets) is refused where it shows, inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..architectures.reach import Reach
from ..errors import PlanError
from ..positions import VISION, Rows
from ..sites import Edit

NOTHING_LEFT = (
    "a query has no key left to attend to, so its softmax means nothing: leave it out of the queries, or keep a key"
)


class Hidden(NamedTuple):
    """What one knockout hides in one layer: from which queries of which heads, and which keys, as columns per row."""

    edit: Edit
    layer: int
    heads: Sequence[int]
    queries: list[list[int]]
    keys: list[list[int]]


def check_knockouts(knockouts: Iterable[Hidden], reaches: dict[int, Reach], rows: Rows) -> None:
    """Refuse knockouts that leave a query nothing to attend to.

    Raises:
        PlanError: naming the first such position.
    """
    layers: dict[int, list[Hidden]] = {}
    for knockout in knockouts:
        layers.setdefault(knockout.layer, []).append(knockout)
    checked: set[Any] = set()
    for layer, members in layers.items():
        same = tuple((id(member.queries), id(member.keys), tuple(member.heads)) for member in members)
        alike = reaches[layer], same
        if alike in checked:
            continue
        checked.add(alike)
        heads = sorted({head for member in members for head in member.heads})
        sharing = {tuple(i for i, member in enumerate(members) if head in member.heads) for head in heads}
        for numbers in sharing:
            _check_together([members[i] for i in numbers], reaches[layer], rows)


def _check_together(knockouts: Sequence[Hidden], reach: Reach, rows: Rows) -> None:
    """Knockouts of one layer that act on one head."""
    for row, real in enumerate(rows.real):
        ends = _image_ends(rows, row) if reach.images else {}
        seen, places = [(set(knockout.queries[row]), set(knockout.keys[row])) for knockout in knockouts], set(real)
        most = len(set().union(*(keys for _, keys in seen)))
        for query in sorted(set().union(*(queries for queries, _ in seen)) & places):
            visible = reach.visible(real, query, ends.get(query))
            if len(visible) > most:
                continue
            gone = set().union(*(keys for queries, keys in seen if query in queries))
            if all(real[index] in gone for index in visible):
                _refuse(knockouts, row, [*real], query, reach)


def _image_ends(rows: Rows, row: int) -> dict[int, int]:
    """Per visual token of a row, the last one of its image, as columns."""
    ends: dict[int, int] = {}
    places = rows.names.get(VISION, ())
    real = rows.real[row]
    for index in reversed(places[row] if places else ()):
        ends[real[index]] = ends[real[index + 1]] if index + 1 < len(real) and real[index + 1] in ends else real[index]
    return ends


def _refuse(knockouts: Sequence[Hidden], row: int, real: list[int], query: int, reach: Reach) -> None:
    edits = " and ".join(dict.fromkeys(str(knockout.edit) for knockout in knockouts))
    index = real.index(query)
    layer = f" in layer {knockouts[0].layer}{reach}" if str(reach) else ""
    rest = f" (query=slice({index + 1}, None))" if index + 1 < len(real) else ""
    raise PlanError(
        f"{edits}: position {index} of row {row} would have nothing left to attend to{layer}; leave it out of the "
        f"queries{rest}, or keep a key"
    )


def renormalised(pattern: Tensor) -> Tensor:
    """Rows of a pattern in which knocked-out entries are negative, made to sum to one without them.

    Raises:
        PlanError: nothing is left of a row.
    """
    kept = pattern.clamp(min=0)
    total = kept.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        raise PlanError(NOTHING_LEFT)
    return kept / total
