"""What is kept of a pass: readings by site, gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engines.protocol import Slot, viewed
from .engines.selection import BoundSelection, Selection
from .errors import PositionError, ReadError, SiteError
from .foreign import RUN, Abroad, Answering
from .pass_views import PassView, StoreView, axes_of, reading_view
from .positions import PositionLike, Rows, is_single
from .sites import SITES, Site
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

    # So that operations give plain tensors: what they make is the value of no site.
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

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes, such as `("batch", "pos", "d_model")`; several layers come first."""
        return axes_of(self.site)

    # A reading that leaves this process, or is copied, is the plain tensor: files then hold nothing of this package,
    # and `torch.load(…, weights_only=True)` takes them.

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.plain, memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{reading_view(self).title}\n{self.plain!r}"

    def _repr_html_(self) -> str:
        return reading_view(self).html()

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
        # One head has no axis of heads, on which the index of attention values counts.
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


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    """Layers in one tensor, where the first is; with a `device_map` they may be on several devices."""
    return torch.stack([layer.to(layers[0].device) for layer in layers])


class ReadStore(StoreView):
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
        return Reading.of(values[0] if single else _stacked(values), site, self._rows)

    def _pick(self, site: Site, entry: Entry) -> Tensor:
        value, whole = self._held(site, entry)
        if whole and site.info.tower:
            parts = self._patches(Selection(site, entry.n_units), value)
            if len({len(part) for part in parts}) > 1:
                raise PositionError(f"{site} selects different numbers of patches per row; use run.rows(site)")
            stacked = torch.stack(parts)
            return stacked[:, 0] if is_single(site.pos) else stacked
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
        some_ended = is_single(site.pos) and len(value) < len(
            self._rows.real
        )  # the position is of the other rows alone
        return value.ndim < _ndim(site) or some_ended

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
            return viewed(slot, value), held != wanted
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
        return list(value.unsqueeze(1) if is_single(site.pos) else value)

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
    return sum(axis != "layer" for axis in axes_of(site))


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


class ForwardPass(PassView, Answering, ReadStore):
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
