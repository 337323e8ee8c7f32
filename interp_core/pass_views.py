"""What runs, steps and stored values show of themselves: what is held, receipts, and what is likeliest to come next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from typing import Any

from torch import Tensor

from .engines.protocol import Slot
from .errors import InterpError
from .files import without_folder
from .positions import Rows, format_position, is_single
from .receipts import places_shown
from .sites import Site
from .text import Tokens
from .views import ROWS, Part, Shown, Table, View, batch_shown, part, shape_shown, token_shown, tokens_part

LISTED = 40
"""Sites and edits that are listed."""
LIKELY = 5
"""Tokens that are shown of what comes next; text has the first three."""
ValueOf = Callable[[int], Tensor | None]
"""The kept value of a slot."""


def axes_of(site: Site) -> tuple[str, ...]:
    """Names of the axes of a site's value, where every row selects as many positions; several layers come first."""
    gone = {site.info.unit} if isinstance(site.units, int) else set()
    chosen = [axis for axis in site.info.positions if axis != "key"]
    gone |= set(chosen) if is_single(site.pos) else set()
    gone |= {"key"} if is_single(site.key) else set()
    layer = ("layer",) if site.info.layered and not isinstance(site.layers, int) else ()
    return (*layer, *(axis for axis in site.info.axes if axis not in gone))


def owner_shown(model: Any) -> str:
    """A model in few words: its source, family and engine."""
    return f"{without_folder(model.source)} ({model.atlas.family.name}, engine {model.engine.name})"


def held_part(slots: Sequence[Slot], value_of: ValueOf, logits: Tensor | None = None, site: Site | None = None) -> Part:
    """Sites with the shapes that indexing gives, and the logits where there are any."""
    numbers: dict[Site, list[int]] = {}
    for number, slot in enumerate(slots):
        numbers.setdefault(slot.site, []).append(number)
    rows = [(str(read), *_measured(read, own, slots, value_of)) for read, own in list(numbers.items())[:LISTED]]
    if logits is not None and site is not None:
        rows.append(("logits" if site.pos is None else str(site), *_described(logits, axes_of(site))))
    note = f"{len(numbers)} sites, the first {LISTED} are shown" if len(numbers) > LISTED else ""
    lines = [" ".join(row).strip() for row in rows] or ["nothing"]
    return Part("held", lines, Table(["site", "shape", "dtype"], rows, note) if rows else None, _beyond(numbers))


def _measured(site: Site, numbers: Sequence[int], slots: Sequence[Slot], value_of: ValueOf) -> tuple[str, str]:
    """Shape and dtype of what was read of a site; without looking at a number."""
    axes = axes_of(site)
    for number in numbers:
        try:
            kept = value_of(number)
        except InterpError:
            return "let go, as it was handed to each=", ""
        if kept is not None:
            slot = slots[number]
            seen = slot.view(kept) if slot.late and slot.view is not None else kept
            return _described(seen, axes, [len(numbers)] if axes[0] == "layer" else [])
    return "none: the pass has none of its positions", ""


def _described(tensor: Tensor, axes: Sequence[str], before: Sequence[int] = ()) -> tuple[str, str]:
    shape = [*before, *tensor.shape]
    if len(shape) == len(axes) - 1 and "pos" in axes:  # rows with different numbers of positions are strung together
        axes = ["selected" if axis == "pos" else axis for axis in axes if axis != "batch"]
    return shape_shown(shape, axes), str(tensor.dtype).removeprefix("torch.")


def receipts_part(run: Any) -> Part:
    """What every edit of a run or generation did."""
    listed = list(run.receipts)
    lines = [_middle_cut(str(receipt), 84) for receipt in listed[:LISTED]]
    rows = [
        (
            str(r.edit),
            str(r.fired),
            ", ".join(map(str, r.layers)),
            "all" if r.positions is None else places_shown(r.positions, ", "),
            f"{r.norm:.4g}",
        )
        for r in listed[:LISTED]
    ]
    columns = ["edit", "fired", "layers", "positions", "norm of the change"]
    note = f"{len(listed)} edits, the first {LISTED} are shown" if len(listed) > LISTED else ""
    return Part("receipts", lines, Table(columns, rows, note) if rows else None, _beyond(listed))


def _middle_cut(text: str, width: int) -> str:
    """Text of so many letters at most, whose end stays: there a receipt has its number."""
    return text if len(text) <= width else f"{text[: width - 41]}…{text[-40:]}"


def next_part(logits: Tensor | None, site: Site, tokens: Tokens, word: Callable[[int], str]) -> Part:
    """The likeliest tokens after the last position of each row whose logits are kept."""
    if logits is None:
        return Part("next", ["unknown: the run ended before the logits (logits=False)"])
    if site.pos is not None and not is_single(site.pos):
        return Part("next", [f"unknown: logits are kept at {format_position(site.pos)} alone"])
    lines, rows = [], []
    for number, labels in enumerate(tokens.labels[:ROWS]):
        after = _after(site, labels)
        likely = _likely(_last(logits, site, tokens.rows, number), word)
        where = f"row {number}, " if len(tokens) > 1 else ""
        lines.append(f"{where}after {after}  {'  '.join(likely[:3])}")
        rows.append((str(number), after, *likely, *[""] * (LIKELY - len(likely))))
    note = f"{len(tokens)} rows, the first {ROWS} are shown" if len(tokens) > ROWS else ""
    columns = ["row", "after", "likeliest", *["then"] * (LIKELY - 1)]
    return Part("next", lines, Table(columns, rows, note), len(tokens) - len(lines))


def _after(site: Site, labels: Sequence[str]) -> str:
    """The position after which the next token is looked at, and the token there."""
    at = len(labels) - 1 if site.pos is None or site.pos == "last" else site.pos
    if not isinstance(at, int):
        return format_position(at)
    at = at % len(labels)
    return f"{at}:{token_shown(labels[at])}"


def _last(logits: Tensor, site: Site, rows: Rows, number: int) -> Tensor:
    return logits[number, rows.real[number][-1]] if site.pos is None else logits[number]


def _likely(row: Tensor, word: Callable[[int], str]) -> list[str]:
    """The likeliest tokens of one row of logits `[d_vocab]`, with their probabilities."""
    row = row.detach()
    if row.is_meta:
        return ["unknown: logits on meta have no numbers"]
    if row.shape[-1] == 1:  # a reward, of which there is no chance
        return [f"{token_shown(word(0))} {row.item():.4g}"]
    chances, ids = row.float().softmax(-1).topk(min(LIKELY, row.shape[-1]))
    pairs = list(zip(chances.tolist(), ids.tolist(), strict=True))
    if any(math.isnan(chance) for chance, _ in pairs):
        return ["unknown: the logits are not numbers (NaN)"]
    return [f"{token_shown(word(token))} {'<0.1%' if chance < 0.001 else f'{chance:.1%}'}" for chance, token in pairs]


def reading_view(reading: Any) -> View:
    """A tensor that was read: its site, its axes, and itself as torch prints it."""
    site = getattr(reading, "site", None)  # torch makes readings of its own, which are of no site
    shape, dtype = _described(reading, () if site is None else axes_of(site))
    return View(f"Reading of {site}: {shape} {dtype}", [Part("", repr(reading.plain).splitlines())])


class StoreView(Shown):
    """The looks of values by site."""

    _slots: Sequence[Slot]

    def _value(self, slot: int) -> Tensor | None:
        raise NotImplementedError

    def _view(self) -> View:
        return View(f"{type(self).__name__}, indexed by sites", [part("held", held_part, self._slots, self._value)])


class PassView(StoreView):
    """The looks of a forward pass, of now or of a folder."""

    tokens: Tokens
    model: Any
    source: str
    _logits: Tensor | None
    _logits_site: Site
    _grad: Any

    def _view(self) -> View:
        saved = isinstance(self.model, str)  # a saved run knows its model in words
        of = without_folder(self.source) if saved else owner_shown(self.model)
        word = (lambda token: f"#{token}") if saved else self.model.word
        tokens = self.tokens
        parts = [
            part("tokens", tokens_part, tokens.labels),
            part("held", held_part, self._slots, self._value, self._logits, self._logits_site),
            Part("gradients", ["of all that is held: run.grad"] if self._grad is not None else []),
            part("receipts", receipts_part, self),
            part("next", next_part, self._logits, self._logits_site, tokens, word),
        ]
        return View(f"{type(self).__name__} of {of}: {batch_shown(tokens.lengths)}", parts)


class GenerationView(Shown):
    """The looks of a generation."""

    ids: Tensor
    texts: list[str]
    tokens: Tokens
    ended: Sequence[bool]
    model: Any
    _compiled: Any
    _passes: Sequence[Any]

    def _view(self) -> View:
        title = f"Generation of {owner_shown(self.model)}: {batch_shown(self.tokens.lengths)}, {self.ids.shape[1]} new"
        parts = [
            part("new", self._new),
            part("tokens", tokens_part, self.tokens.labels),
            part("held", self._kept),
            part("receipts", receipts_part, self),
        ]
        return View(title, parts)

    def _new(self) -> Part:
        """What was written, and whether it came to its own end."""
        texts = [repr(text) for text in self.texts] or [str(row.tolist()) for row in self.ids]
        ends = ["came to its end" if ended else "stopped" for ended in self.ended]
        counts = [str(spans[0].stop - spans[0].start) for spans in self.tokens.spans["generated"]]
        rows = [(str(i), *row) for i, row in enumerate(list(zip(texts, counts, ends, strict=True))[:ROWS])]
        note = f"{len(texts)} rows, the first {ROWS} are shown" if len(texts) > ROWS else ""
        lines = [f"{_middle_cut(text, 64)} ({n} tokens, {end})" for _, text, n, end in rows]
        return Part("new", lines, Table(["row", "text", "tokens", "how it ended"], rows, note), len(texts) - len(lines))

    def _kept(self) -> Part:
        """What was read, and over how many steps."""
        sites = list(dict.fromkeys(str(slot.site) for slot in self._compiled.program.slots))
        more = f" and {len(sites) - LISTED} more" if len(sites) > LISTED else ""
        lines = [f"{', '.join(sites[:LISTED])}{more} at each of {len(self._passes)} steps"] if sites else []
        return Part("held", lines)


class PlanView(Shown):
    """The looks of a compiled plan."""

    __slots__ = ()
    model: Any
    edits: tuple[Any, ...]
    _reads: tuple[Any, ...]

    def _view(self) -> View:
        parts = [part(name, _listed, name, what) for name, what in (("reads", self._reads), ("edits", self.edits))]
        return View(f"CompiledPlan for {owner_shown(self.model)}", parts)


def _listed(name: str, things: Sequence[Any]) -> Part:
    lines = [_middle_cut(str(thing), 84) for thing in things[:LISTED]]
    return Part(name, lines or ["nothing"], more=_beyond(things))


def _beyond(things: Sized) -> int:
    """How many there are beside those that are listed."""
    return max(0, len(things) - LISTED)
