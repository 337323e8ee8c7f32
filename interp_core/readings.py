"""What is kept of a pass: readings by site, gradients, receipts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engines.protocol import PassRecord, Slot
from .engines.selection import BoundSelection, Selection
from .errors import CapabilityError, EffectError, PositionError, ReadError, SiteError
from .foreign import RUN, Abroad, Answering
from .positions import PositionLike, Rows, is_single
from .sites import BOOSTS, SITES, TENSOR_OPS, Edit, Site
from .text import Tokens

if TYPE_CHECKING:
    from .architectures.atlas import Atlas, Entry
    from .engines.attention_rows import AttentionRows


class Reading(Tensor):
    """A value that a run read: a tensor that still knows its site and rows. Operations, copies and files give a plain
    tensor.

    Attributes:
        site: what it is.
        rows: what positions resolve against.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    site: Site
    rows: Rows

    @staticmethod
    def of(tensor: Tensor, site: Site, rows: Rows) -> Reading:
        """A tensor as a reading; shares its storage and graph."""
        reading = tensor.as_subclass(Reading)
        reading.site, reading.rows = site, rows
        return reading

    @property
    def plain(self) -> Tensor:
        """The same values as a tensor of torch's own class: shares storage and graph, and knows no site."""
        return self.as_subclass(Tensor)

    # A reading that leaves this process, or is copied, is the plain tensor: files then hold nothing of this package,
    # and `torch.load(…, weights_only=True)` takes them.

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.plain, memo)

    def at(self, pos: PositionLike = None, *, query: PositionLike = None, key: PositionLike = None) -> Tensor:
        """The value at positions, as `Site.at` selects them.

        Raises:
            ReadError: the reading is already a part of the site's value.
            PositionError: rows select different numbers of positions.
        """
        site = self.site
        if site.pos is not None or site.key is not None:
            raise ReadError(f"this is {site}, already at chosen positions")
        selection = Selection(Site(site.name).at(pos, query=query, key=key), None)
        headless = selection.attention and isinstance(site.units, int)

        def one(x: Tensor) -> Tensor:
            if headless:
                return _take(selection, x.unsqueeze(1), self.rows).squeeze(1)
            return _take(selection, x, self.rows)

        stacked = site.info.layered and not isinstance(site.layers, int)
        return torch.stack([one(layer) for layer in self.plain]) if stacked else one(self.plain)


def _take(selection: Selection, value: Tensor, rows: Rows) -> Tensor:
    bound = selection.laid(rows) if selection.tower else None if selection.whole else selection.bind(rows)
    if bound is None:
        return value
    if bound.ragged:
        raise PositionError(f"{selection.site} selects different numbers of positions per row; use run.rows(site)")
    return bound.take(value)


@dataclass(frozen=True)
class Routing:
    """What proves an edit of a router, counted over layers, passes and tokens that are no padding.

    Attributes:
        tokens: that were edited.
        broken: banned experts that were executed there all the same, or forced ones that were not; a run with any is
            refused.
        held: tokens whose experts were selected again from the router's own logits, without the edit.
        differing: of these, tokens where experts or weights (beyond rounding) came out otherwise than the model's own
            router had them; a run that edits logits is refused then.
        changed: slots whose expert is not executed any more.
        unmasked: tokens left as they are, since their whole set is banned (modes "keep" and "drop").
    """

    tokens: int
    broken: int
    held: int
    differing: int
    changed: int
    unmasked: int

    def __str__(self) -> str:
        left = f", {self.unmasked} tokens left as they are" if self.unmasked else ""
        again = f"the selection reproduced the router at {self.held - self.differing} of {self.held}"
        return f"{self.changed} slots went to others at {self.tokens} tokens{left}; {again}"


@dataclass(frozen=True)
class Receipt:
    """What an edit did in a run.

    Attributes:
        edit: the edit.
        fired: how often it changed a value: once per layer and forward pass that had any of its positions.
        layers: in which layers.
        positions: per row, the positions it changed (counted over real tokens); None for all of them.
        norm: Euclidean norm of all its changes together. For `knockout` that of the probabilities taken away, for
            `mask` of the number of logits banned, for other edits of what a router selects that of the change of
            executed weights.
        routing: what proves an edit of a router.
    """

    edit: Edit
    fired: int
    layers: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...] | None
    norm: float
    routing: Routing | None = None

    def __str__(self) -> str:
        if not self.fired:
            return f"{self.edit}: never fired"
        if self.positions is None:
            positions = "all positions"
        else:
            shown = [f"row {i} at {','.join(map(str, row))}" for i, row in enumerate(self.positions) if row]
            positions = "; ".join(shown[:4]) + (f"; and {len(shown) - 4} more rows" if len(shown) > 4 else "")
        routing = "" if self.routing is None else f"; {self.routing}"
        return f"{self.edit}: fired {self.fired}×, {positions}, changed by norm {self.norm:.4g}{routing}"


def receipts(edits: Sequence[Edit], passes: Sequence[PassRecord], rows: Rows) -> list[Receipt]:
    """One receipt per edit, over all passes."""
    if not edits:
        return []
    fires = [fire for record in passes for fire in record.fires]
    fires_of: list[list[tuple[int, Any, float]]] = [[] for _ in edits]
    for (number, layer, columns, _), norm in zip(fires, _numbers([fire[3] for fire in fires]), strict=True):
        fires_of[number].append((layer, columns, norm))
    listed = [_receipt(edit, fires, rows) for edit, fires in zip(edits, fires_of, strict=True)]
    counted = routings(passes)
    return [replace(receipt, routing=counted[i][0]) if i in counted else receipt for i, receipt in enumerate(listed)]


def routings(passes: Sequence[PassRecord]) -> dict[int, tuple[Routing, list[int]]]:
    """What proves the edits of routers, by number, and how often each of their experts is executed."""
    counts: dict[int, list[Tensor]] = {}
    for record in passes:
        for proof in record.routed:
            assert proof.counts is not None
            counts.setdefault(proof.number, []).append(proof.counts.cpu())
    totals = {number: torch.stack(of_edit).sum(0).tolist() for number, of_edit in counts.items()}
    n = len(fields(Routing))
    return {number: (Routing(*total[:n]), total[n:]) for number, total in totals.items()}


def demand_proof(edits: Sequence[Edit], passes: Sequence[PassRecord]) -> None:
    """Refuse a run in which a router did not do as it was told, or its family's selection is not what the model does.

    Raises:
        CapabilityError: selecting again without the edit gives another result than the model's own router.
        EffectError: banned experts were executed, or forced ones were not.
    """
    for number, (routing, _) in routings(passes).items():
        if routing.differing and edits[number].site.name == "router_logits":
            raise CapabilityError(
                f"{edits[number]}: selecting experts again as the family file says gives other experts or weights than "
                f"the model's own router, at {routing.differing} of {routing.held} tokens; an edit would be another "
                "model's. Please report this family and version of transformers"
            )
        if routing.broken:
            what = "banned experts were executed" if edits[number].op.startswith("mask") else "forced ones were not"
            raise EffectError(
                f"{edits[number]}: {what} after all, {routing.broken} times at {routing.tokens} tokens: a later edit "
                "of the same router undid it; leave that edit out, or choose other positions"
            )


def _numbers(norms: list[Tensor]) -> list[float]:
    """Values of many scalars with one transfer, unless they lie on several devices."""
    if len(norms) == 1:
        return [float(norms[0])]
    if len({(norm.device, norm.dtype) for norm in norms}) == 1:
        return torch.stack(norms).tolist()
    return [float(norm) for norm in norms]


def _receipt(edit: Edit, fires: list[tuple[int, Any, float]], rows: Rows) -> Receipt:
    layers = tuple(sorted({layer for layer, _, _ in fires}))
    norm = math.sqrt(sum(norm**2 for _, _, norm in fires))
    if any(columns is None for _, columns, _ in fires) or not fires:
        return Receipt(edit, len(fires), layers, None, norm)
    rows = rows.patches.rows if edit.site.info.tower and rows.patches is not None else rows
    hit: list[set[int]] = [set() for _ in rows.real]
    for _, columns, _ in fires:
        for row, chosen in enumerate(columns):
            hit[row].update(chosen)
    index = [{column: i for i, column in enumerate(real)} for real in rows.real]
    last = [(len(real), real[-1] if real else 0) for real in rows.real]  # generated columns follow the last real one
    positions = tuple(
        tuple(sorted(index[row].get(c, last[row][0] + c - last[row][1] - 1) for c in chosen))
        for row, chosen in enumerate(hit)
    )
    return Receipt(edit, len(fires), layers, positions, norm)


def demand_used(edits: Sequence[Edit], passes: Sequence[PassRecord]) -> None:
    """Refuse a boost of an expert that is chosen nowhere.

    Raises:
        EffectError: naming it.
    """
    if not any(edit.op in BOOSTS for edit in edits):
        return
    for number, (_, used) in routings(passes).items():
        idle = [e for e, n in zip(edits[number].experts, used, strict=True) if not n]
        if edits[number].op in BOOSTS and idle:
            raise EffectError(
                f"{edits[number]}: expert {', '.join(map(str, idle))} is chosen at none of these positions, so there "
                "is no weight to boost; use S.router_logits.force to have it executed, or pass allow_noop=True"
            )


def demand_effect(
    edits: Sequence[Edit], passes: Sequence[PassRecord], make_receipts: Callable[[], list[Receipt]]
) -> None:
    """Refuse edits that did nothing. Receipts are made only to word the error.

    Raises:
        EffectError: naming the first of them.
    """
    demand_used(edits, passes)
    norms: list[list[Tensor]] = [[] for _ in edits]
    for record in passes:
        for number, _, _, norm in record.fires:
            norms[number].append(norm)
    for number, of_edit in enumerate(norms):
        sizes, edit = _numbers(of_edit) if of_edit else [], edits[number]
        if any(map(math.isnan, sizes)) and edit.op in TENSOR_OPS and (lost := int(torch.isnan(edit.value).sum())):
            raise EffectError(
                f"{edit}: {lost} of {edit.value.numel()} numbers of the value are NaN, and so is what follows; "
                "look at where the value comes from, or pass allow_noop=True if that is meant"
            )
        if any(sizes):
            continue
        receipt = make_receipts()[number]
        did = "changed nothing: the value was already so" if receipt.fired else "never fired in this run"
        raise EffectError(
            f"{receipt.edit} {did}. If that is meant (a sweep over equal tokens, say), pass allow_noop=True."
        )


class ReadStore:
    """Read values by site. Base of runs, gradients and generation steps."""

    _what = "run"

    def __init__(self, slots: Sequence[Slot], atlas: Atlas, rows: Rows) -> None:
        self._slots, self._atlas, self._rows = slots, atlas, rows

    @cached_property
    def _index(self) -> dict[tuple[str, int], list[int]]:
        """Slots by site name and layer."""
        index: dict[tuple[str, int], list[int]] = {}
        for i, slot in enumerate(self._slots):
            index.setdefault((slot.entry.name, slot.entry.layer), []).append(i)
        return index

    def _value(self, slot: int) -> Tensor | None:
        raise NotImplementedError

    def __getitem__(self, site: Site | str) -> Reading:
        """The value of a site that was read, or of a part of it. Several layers are stacked along a first axis.

        Raises:
            ReadError: it was not read; the message lists what was.
            SiteError, PositionError: it does not exist, or rows have different numbers of its positions.
        """
        site = Site.parse(site) if isinstance(site, str) else site
        if not isinstance(site, Site):
            raise ReadError(f"a run is indexed by sites like S.resid_post[3], not by {type(site).__name__}")
        values = [self._pick(site, entry) for entry in self._atlas.select(site)]
        single = isinstance(site.layers, int) or not site.info.layered
        return Reading.of(values[0] if single else torch.stack(values), site, self._rows)

    def _pick(self, site: Site, entry: Entry) -> Tensor:
        value, whole = self._held(site, entry)
        if whole and site.info.tower:
            parts = self._patches(Selection(site, entry.n_units), value)
            if len({len(part) for part in parts}) > 1:
                raise PositionError(f"{site} selects different numbers of patches per row; use run.rows(site)")
            stacked = torch.stack(parts)
            return stacked[:, 0] if site.pos is not None and is_single(site.pos) else stacked
        if whole:
            return _take(Selection(site, entry.n_units), value, self._rows)
        if self._strung(site, value):
            raise PositionError(f"{site} selects different numbers of positions per row; use run.rows(site)")
        return value

    def _patches(self, selection: Selection, value: Tensor) -> list[Tensor]:
        """Row by row, a part of what was kept of all patches, whose rows are strung together where they differ."""
        known = self._rows.patches
        assert known is not None and selection.pos is not None
        strung = value.ndim < len(selection.site.info.axes)
        rows = value.split([*map(len, known.places)]) if strung else value.unbind()
        units = slice(None) if selection.units is None else selection.units
        chosen = selection.columns(self._rows, selection.pos)
        return [row[columns][:, list(units) if isinstance(units, tuple) else units]
                for row, columns in zip(rows, chosen, strict=True)]  # fmt: skip

    def _strung(self, site: Site, value: Tensor) -> bool:
        """Whether a kept part has its rows strung together, because they select different numbers of positions."""
        single = site.pos is not None and is_single(site.pos)  # then some rows have it, and others have ended
        return value.ndim < _ndim(site) or (single and len(value) < len(self._rows.real))

    def _held(self, site: Site, entry: Entry) -> tuple[Tensor, bool]:
        """The kept value that answers for a site, and whether it is the whole site or exactly this part."""
        wanted = (site.units, site.pos, site.key)
        for i in self._index.get((entry.name, entry.layer), ()):
            slot = self._slots[i]
            held = (slot.site.units, slot.site.pos, slot.site.key)
            if held != wanted and held != (None, None, None):
                continue
            value = self._value(i)
            if value is None:
                raise ReadError(f"{site}: this pass has none of its positions")
            value = slot.view(value) if slot.view is not None and slot.late else value
            return value, held != wanted
        raise ReadError(f"{site} was not read in this {self._what}. It holds: {self.held()}.")

    def rows(self, site: Site | str) -> list[Tensor]:
        """The value row by row, one tensor `[pos …]` each, for positions that differ in number.

        Raises:
            SiteError: several layers, an attention site, or no positions selected.
            ReadError: it was not read.
        """
        site = Site.parse(site) if isinstance(site, str) else site
        somewhere = site.pos is not None or site.info.visual
        if (site.info.layered and not isinstance(site.layers, int)) or "query" in site.info.axes or not somewhere:
            raise SiteError(f"{site}: rows() takes one layer of a site along pos, with positions: site[l].at(...)")
        entry = self._atlas.select(site)[0]
        selection = Selection(site, entry.n_units)
        assert selection.pos is not None
        columns = selection.columns(self._rows, selection.pos)
        value, whole = self._held(site, entry)
        if whole and site.info.tower:
            return self._patches(selection, value)
        if whole:
            value = _take(Selection(replace(site, pos=None), entry.n_units), value, self._rows)
            return [value[row][chosen] for row, chosen in enumerate(columns)]
        if self._strung(site, value):
            return list(value.split([len(row) for row in columns]))
        return list(value.unsqueeze(1) if site.pos is not None and is_single(site.pos) else value)

    def held(self) -> str:
        """What can be had, in short."""
        return ", ".join(dict.fromkeys(str(slot.site) for slot in self._slots)) or "nothing"

    def __contains__(self, site: object) -> bool:
        try:
            self[site]  # type: ignore[index]
        except (ReadError, SiteError, PositionError):
            return False
        return True

    def __iter__(self) -> Iterator[Site]:
        return iter(dict.fromkeys(slot.site for slot in self._slots))


def _ndim(site: Site) -> int:
    """Axes of a site's value in one layer when every row selects as many positions."""
    dropped = isinstance(site.units, int)
    singles = sum(pos is not None and is_single(pos) for pos in (site.pos, site.key))
    return len(site.info.axes) - dropped - singles


class Gradients(ReadStore):
    """Gradients of the run's scalar with respect to what was read; indexed like the run."""

    def __init__(self, run: ReadStore, grads: list[Tensor], bounds: list[BoundSelection | None]) -> None:
        super().__init__(run._slots, run._atlas, run._rows)
        self._grads, self._bounds = grads, bounds

    def _value(self, slot: int) -> Tensor:
        grad, bound, info = self._grads[slot], self._bounds[slot], self._slots[slot]
        if info.late:
            return grad
        whole = grad if info.view is None else info.view(grad)
        return whole if bound is None else bound.take(whole)


class LayerReadings(ReadStore):
    """What a run has read of one layer, for the time of a call of `each`: `values[S.pattern]` is this layer's.

    Attributes:
        layer: which one.
    """

    _what = "layer"

    def __init__(
        self, slots: Sequence[Slot], atlas: Atlas, rows: Rows, layer: int, values: list[Tensor | None],
        attention: AttentionRows | None = None,
    ) -> None:  # fmt: skip
        super().__init__(slots, atlas, rows)
        self.layer, self._values, self._attention = layer, values, attention

    @property
    def attention(self) -> AttentionRows:
        """The layer's attention, which gives rows of its pattern as long as it is held.

        Raises:
            ReadError: the run was not asked for it, or nothing is read of this layer behind its attention.
        """
        if self._attention is None:
            raise ReadError(
                f"layer {self.layer} was handed over without its attention: pass run(…, attention=True), and read "
                "something of the layer that comes after attention, such as S.attn_out"
            )
        return self._attention

    def _value(self, slot: int) -> Tensor | None:
        return self._values[slot]

    def __getitem__(self, site: Site | str) -> Reading:
        """As of a run; a site without a layer is this layer's."""
        site = Site.parse(site) if isinstance(site, str) else site
        if isinstance(site, Site) and site.info.layered and site.layers is None:
            site = replace(site, layers=self.layer)
        return super().__getitem__(site)


class ForwardPass(Answering, ReadStore):
    """What one forward pass gave, now or in an earlier process: values by site, logits, gradients.

    Attributes:
        tokens: the input.
        model: what ran; of a saved run, the model in a line.
    """

    _abroad = Abroad("a run", RUN, "run[{}]", SITES)
    _inner = frozenset(("demand_effect", "differentiate", "set_logits"))
    tokens: Tokens
    model: Any = None
    _logits: Tensor | None = None
    _logits_site = Site("logits")
    _grad: ReadStore | None = None

    @property
    def logits(self) -> Reading:
        """Logits `[batch pos d_vocab]`, at the positions that `run(logits=…)` asked for.

        Raises:
            ReadError: the run went without.
        """
        if self._logits is None:
            raise ReadError("this run ended before the logits (logits=False)")
        return Reading.of(self._logits, self._logits_site, self._rows)

    @property
    def grad(self) -> ReadStore:
        """Gradients of the scalar that `run(grad=…)` computed, by site.

        Raises:
            ReadError: the run computed none.
        """
        if self._grad is None:
            raise ReadError("this run has no gradients; pass grad=lambda logits: <a scalar>")
        return self._grad
