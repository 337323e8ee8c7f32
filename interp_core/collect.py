"""Streaming activations of many texts to a folder: a batch in memory at a time, a shard on disk at a time.

Texts are drawn a window at a time, sorted by length and run in batches. Values wait until they make a shard, which is
written whole and then noted with its texts; after a kill, what is not noted is done again. What a text is, is told by
its ids, spans and inputs: a text that was noted and is another now is refused by its number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import runs
from .activations import INDEX, RECIPE, SHARDS, SITES, Activations, located, shard_bytes
from .batches import AHEAD, batch_size_of, bucketed, laid_out, numbering, sides, windows
from .engines.protocol import Slot, viewed
from .engines.selection import Selection
from .errors import InterpError, PlanError, wrong
from .identity import NoIdentityError, identity
from .inputs import undivided
from .pass_views import axes_of
from .plan import Plan
from .positions import Mask, PerRow, Rows, is_single
from .progress import Progress
from .readings import ForwardPass
from .saved import atlas_data
from .sites import Site
from .text import Tokens

SHARD_BYTES = 1 << 24
"""Of values that wait to be written."""
SHOWN = 40
"""Characters of a text in the index."""


def collect(
    model: Any,
    texts: Iterable[Any],
    read: Iterable[Site | str] | Site | str,
    out: str | Path,
    batch_size: int,
    progress: bool,
) -> Activations:
    """See `Model.collect`, which calls this with itself."""
    reads = Plan.of(read).reads
    _check(model, texts, reads)
    size = batch_size_of(batch_size)
    settings = {"read": [str(site) for site in reads]}
    run = runs.open(out, settings, recipe=RECIPE, model=model, say=lambda line: None, kind="collection")
    total = len(texts) if isinstance(texts, Sized) else None
    with run, Progress(RECIPE, total, shown=progress) as shown:
        run.put({SITES: runs.json_text(atlas_data(model.atlas))})
        with run.rows(INDEX, key="shard") as rows:
            shelf = Shelf(run, rows)
            for window in windows(_items(model, texts, shelf, shown), size * AHEAD):
                for item in window:
                    _check_positions(model, reads, item)
                _run_window(model, reads, window, size, shelf, shown)
            shelf.flush()
            shelf.check_end(run.path)
    return Activations.open(run.path)


@dataclass
class Item:
    """One text on its way."""

    number: int
    tokens: Tokens
    digest: str


@dataclass
class Shelf:
    """Shards that are there, and values that wait to become one."""

    run: runs.RunFolder
    rows: runs.Rows
    items: list[Item] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)
    slots: Sequence[Slot] = ()
    waiting: int = 0
    seen: int = 0

    def __post_init__(self) -> None:
        noted = list(self.rows)
        whole = {name: self.run.kept(f"{SHARDS}/{name}") for name in dict.fromkeys(row["shard"] for row in noted)}
        kept = {number for number, (name, _) in located(noted).items() if whole[name]}
        self.digests = {row["text"]: row["digest"] for row in noted}
        self.kept = kept

    def has(self, item: Item) -> bool:
        """Whether a text is there already.

        Raises:
            PlanError: another one is there under its number.
        """
        self.seen = item.number + 1
        before = self.digests.get(item.number)
        if before is not None and before != item.digest:
            raise PlanError(
                f"{self.run.path} holds a collection of other texts: text {item.number} "
                f"({_start(item.tokens)!r}) was another; give another folder"
            )
        return item.number in self.kept

    def put(self, item: Item, slots: Sequence[Slot], values: list[Tensor]) -> None:
        """Keep a text's values, per slot; write a shard once there are many."""
        self.slots = slots
        self.items.append(item)
        self.values.append(values)
        self.waiting += sum(value.nbytes for value in values)
        if self.waiting >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard, then note its texts."""
        if not self.items:
            return
        name = f"{len(self.rows):06}.safetensors"
        tokens = [item.tokens for item in self.items]
        data = shard_bytes(self.slots, tokens, list(zip(*self.values, strict=True)))
        self.run.put({f"{SHARDS}/{name}": data})
        self.rows.add(
            *(
                {
                    "shard": name, "place": place, "text": item.number, "tokens": item.tokens.lengths[0],
                    "starts": _start(item.tokens), "digest": item.digest,
                }
                for place, item in enumerate(self.items)
            )
        )  # fmt: skip
        self.items, self.values, self.waiting = [], [], 0

    def check_end(self, path: Path) -> None:
        """Refuse fewer texts than there are."""
        if self.seen <= max(self.digests, default=-1):
            raise PlanError(
                f"{path} holds a collection of other texts: it has {max(self.digests) + 1}, {self.seen} were given; "
                "give them all, or another folder"
            )
        if not self.seen:
            raise PlanError("collect got no texts")


def _start(tokens: Tokens) -> str:
    return "".join(tokens.labels[0])[:SHOWN]


def _check(model: Any, texts: Any, reads: Sequence[Site]) -> None:
    """Refuse what cannot be collected of any text."""
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise PlanError(wrong("collect", "texts, one by one", texts))
    if not reads:
        raise PlanError("collect needs sites: read=[S.resid_post, S.z[3].at(-1)]")
    # Refuses sites that the model lacks before the first text is drawn.
    model.compile(reads)
    for site in reads:
        for place in (site.pos, site.key):
            if isinstance(place, (PerRow, Mask)):
                raise PlanError(
                    f"{site}: collect takes positions that mean the same in every text: numbers, slices, or names of "
                    "spans (tokens.name(subject=…)), not positions per row"
                )


def _items(model: Any, texts: Iterable[Any], shelf: Shelf, shown: Progress) -> Iterator[Item]:
    """Texts that are not there yet, by number."""
    number = 0
    for text in texts:
        try:
            tokens = model.input(text)
            rows = [tokens] if len(tokens) == 1 else list(tokens)
        except InterpError as error:
            raise type(error)(f"text {number}: {error}") from error
        for row in rows:
            item = Item(number, row, _digest(row, number))
            number += 1
            if shelf.has(item):
                shown.add(1)
            else:
                yield item


def _digest(tokens: Tokens, number: int) -> str:
    try:
        return identity(numbering(tokens))[:32]
    except NoIdentityError as error:
        raise PlanError(f"text {number} cannot be told from another one: {error}; leave it out") from error


def _check_positions(model: Any, reads: Sequence[Site], item: Item) -> None:
    """Refuse a text that lacks a position, before those around it run."""
    for site in reads:
        selection = Selection(site, model.atlas.select(site)[0].n_units)
        try:
            for place in (selection.pos, selection.key):
                if place is not None:
                    selection.columns(item.tokens.rows, place)
        except InterpError as error:
            raise type(error)(f"text {item.number} ({_start(item.tokens)!r}): {error}") from error


def _run_window(
    model: Any, reads: Sequence[Site], window: list[Item], size: int, shelf: Shelf, shown: Progress
) -> None:
    alone = [item for item in window if undivided(item.tokens)]
    together = [item for item in window if not undivided(item.tokens)]
    numbers = bucketed([item.tokens.lengths[0] for item in together], size, mixed=bool(sides(model.atlas)))
    for batch in [*([together[i] for i in part] for part in numbers), *([item] for item in alone)]:
        tokens = batch[0].tokens if len(batch) == 1 else Tokens.stack([item.tokens for item in batch])
        run = model.run(laid_out(model.atlas, tokens), read=reads, logits=False)
        per_slot = [row_values(run, slot) for slot in range(len(run._slots))]
        for item, values in zip(batch, zip(*per_slot, strict=True), strict=True):
            shelf.put(item, run._slots, list(values))
        shown.add(len(batch))


def row_values(run: ForwardPass, number: int) -> list[Tensor]:
    """What a run kept in a slot, row by row on the CPU: axes of the site without `batch`, no padding."""
    slot, rows = run._slots[number], run._rows
    site, kept = slot.site, run._value(number)
    assert kept is not None
    value = viewed(slot, kept)
    parts = _unstrung(value, site, rows) if run._strung(site, value) else list(value)
    # Chosen positions are real tokens; only an axis of all positions has the padding of longer rows in it.
    whole = [dim for dim, all_of_it in enumerate(_axes(site)) if all_of_it]
    for row, real in enumerate(rows.real):
        if len(real) < rows.width:
            for dim in whole:
                parts[row] = parts[row].index_select(dim, torch.tensor(real, device=value.device))
    return [part.cpu() for part in parts]


def _axes(site: Site) -> list[bool]:
    """Of each axis of a site's value in one row, whether it has all positions."""
    whole = {"pos": site.pos is None, "query": site.pos is None, "key": site.key is None}
    return [whole.get(axis, False) for axis in axes_of(site) if axis not in ("batch", "layer")]


def _unstrung(value: Tensor, site: Site, rows: Rows) -> list[Tensor]:
    """Rows of a value whose rows select different numbers of positions, and follow one another along its first axis; in
    attention all pairs of a row's queries and keys do, before the heads."""
    selection = Selection(replace(site, units=None), None)
    places = [selection.pos, selection.key] if selection.attention else [selection.pos]
    tables = [
        [range(rows.width)] * len(rows.real) if place is None else selection.columns(rows, place) for place in places
    ]
    counts = [[len(columns) for columns in row] for row in zip(*tables, strict=True)]
    parts = []
    for sizes, part in zip(counts, value.split([math.prod(row) for row in counts]), strict=True):
        if selection.attention:
            part = part.unflatten(0, sizes)
            part = part.movedim(2, 0) if part.ndim == 3 else part
            part = part.squeeze([dim for dim, at in ((-1, selection.key), (-2, selection.pos)) if is_single(at)])
        parts.append(part)
    return parts
