"""Activations of many texts in a folder, as `model.collect` wrote them: indexed by site and text, read when asked for.

    acts = ic.Activations.open("out/acts")
    acts[S.resid_post[3], 17]              [pos d_model], mapped from the file
    acts[S.resid_post[3].at(-1), 17]       [d_model]
    acts.tokens(17)

A shard is a safetensors file of some texts. Of every read and layer it has one tensor, in which the texts' values
follow one another along their positions (`resid_post[3]`, `[selected d_model]`; attention values lie flat), and the
shape of each text's own (`shape/resid_post[3]`, `[text axis]`); beside them `ids`, and in `texts` the rest of the
tokens as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architectures.atlas import Atlas
from .engines.protocol import Slot
from .errors import LoadError, ReadError, wrong
from .files import folder_of, safetensors_bytes, split_lines
from .pass_views import axes_of
from .positions import is_single
from .saved import StoredSlot, StoredValues, atlas_from, mapped, slot_name, tokens_data, tokens_from
from .sites import Site
from .text import Tokens
from .views import Part, Shown, Table, View, part

SITES, INDEX, SHARDS = "sites.json", "texts.jsonl", "shards"
RECIPE = "collect"
OPEN_SHARDS = 64
"""Shards that stay open."""


class Activations(Shown):
    """What `model.collect` wrote. Values are mapped from the files, copy-on-write: they cost memory where they are
    looked at.

    Attributes:
        folder: where they are.
        reads: the sites that were read.
    """

    def __init__(self, folder: Path, reads: Sequence[Site], atlas: Atlas, shard_of: Sequence[tuple[str, int]]) -> None:
        self.folder, self.reads, self._atlas, self._shard_of = folder, tuple(reads), atlas, shard_of
        self._slots: list[Slot] = [StoredSlot(entry, site) for site in reads for entry in atlas.select(site)]
        # One cache for each object: on a method it would be all objects' together, and keep them alive.
        self._shard = lru_cache(OPEN_SHARDS)(lambda name: Shard(folder / SHARDS / name))

    @staticmethod
    def open(folder: str | Path) -> Activations:
        """Those of a folder.

        Raises:
            LoadError: there are none, they are not finished, or something of them is damaged or missing.
        """
        return _opened(folder_of("Activations.open", folder))

    def __len__(self) -> int:
        return len(self._shard_of)

    def _view(self) -> View:
        return View(f"Activations of {len(self):,} texts in {self.folder.name}", [part("held", self._held)])

    def _held(self) -> Part:
        """Sites with the axes of one text's value; nothing is opened."""
        rows = []
        for site in self.reads:
            own = [slot.entry for slot in self._slots if slot.site == site]
            sizes = {**own[0].sizes, "layer": len(own)}
            axes = [f"{axis} {sizes.get(axis, '')}".strip() for axis in axes_of(site) if axis != "batch"]
            rows.append((str(site), f"[{', '.join(axes)}]"))
        return Part("held", [" ".join(row) for row in rows], Table(["site", "of each text"], rows))

    def __getitem__(self, index: tuple[Site | str, int]) -> Tensor:
        """The value of a site, or of a part of it, on one text: axes as in a run, without `batch`. Several layers are
        stacked along a first axis.

        Raises:
            ReadError: it was not read, or there is no such text.
            SiteError, PositionError: it does not exist.
        """
        if not isinstance(index, tuple) or len(index) != 2:
            raise ReadError(wrong("activations", "a site and the number of a text: acts[S.resid_post[3], 17]", index))
        site, text = index
        shard, place = self._place(text)
        reading = _TextValues(self._slots, self._atlas, shard, place)[site]
        stacked = reading.site.info.layered and not isinstance(reading.site.layers, int)
        return reading.plain.squeeze(1 if stacked else 0)

    def values(self, site: Site | str) -> Iterator[Tensor]:
        """A site's value on every text, in order."""
        return (self[site, text] for text in range(len(self)))

    def tokens(self, text: int) -> Tokens:
        """A text as it ran, with its spans; images and the like are not kept."""
        shard, place = self._place(text)
        return shard.tokens(place)

    def _place(self, text: int) -> tuple[Shard, int]:
        if isinstance(text, bool) or not isinstance(text, int):
            raise ReadError(wrong("activations", "the number of a text", text))
        if not -len(self) <= text < len(self):
            raise ReadError(f"there is no text {text}: there are {len(self)}, 0 to {len(self) - 1}")
        name, place = self._shard_of[text]
        return self._shard(name), place


class _TextValues(StoredValues):
    """The values of one text, each read when it is asked for."""

    _what = "collection"

    def __init__(self, slots: Sequence[Slot], atlas: Atlas, shard: Shard, place: int) -> None:
        super().__init__(slots, atlas, shard.tokens(place), ())
        self._shard, self._place = shard, place

    def _value(self, slot: int) -> Tensor:
        stored = self._slots[slot]
        return self._shard.value(slot_name(stored.site, stored.entry), self._place)[None]


class Shard:
    """One file of values."""

    def __init__(self, path: Path) -> None:
        self.path, self._tensors = path, mapped(path)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise LoadError(f"{self.path} is damaged: it has no {name}; delete it, and collect the texts again")
        return self._tensors[name]

    def value(self, name: str, place: int) -> Tensor:
        """A text's own part of what is strung together."""
        strung, shapes = self._tensor(name), self._tensor(f"shape/{name}")
        sizes = shapes.prod(-1) // max(strung[:1].numel(), 1)
        start = int(sizes[:place].sum())
        return strung[start : start + int(sizes[place])].view(shapes[place].tolist())

    @cached_property
    def _texts(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads(bytes(self._tensor("texts").numpy())))
        except ValueError as error:
            raise LoadError(f"{self.path} is damaged: {error}; delete it, and collect the texts again") from error

    def tokens(self, place: int) -> Tokens:
        """The tokens of a text."""
        ids = self.value("ids", place)[None]
        return tokens_from(self._texts[place], {"tokens/ids": ids, "tokens/mask": torch.ones_like(ids).bool()})


def shard_bytes(slots: Sequence[Slot], tokens: Sequence[Tokens], values: Sequence[Sequence[Tensor]]) -> bytes:
    """The file of some texts.

    Args:
        values: per slot, per text, without the axis `batch`.
    """
    tensors = _strung("ids", [text.ids[0] for text in tokens], ())
    for slot, of_slot in zip(slots, values, strict=True):
        site, first = slot.site, of_slot[0]
        common = first.shape if is_single(site.pos) else first.shape[1:]  # by texts of other lengths
        # Attention values of two texts may differ in two axes, queries and keys: of these nothing is common.
        tail = () if "query" in site.info.axes else tuple(common)
        tensors |= _strung(slot_name(site, slot.entry), of_slot, tail)
    texts = json.dumps([tokens_data(text)[0] for text in tokens], ensure_ascii=False).encode()
    tensors["texts"] = torch.frombuffer(bytearray(texts), dtype=torch.uint8)
    return safetensors_bytes(tensors)


def _strung(name: str, parts: Sequence[Tensor], tail: tuple[int, ...]) -> dict[str, Tensor]:
    """Values one after the other, and the shape of each."""
    shapes = torch.tensor([part.shape for part in parts], dtype=torch.int64).reshape(len(parts), -1)
    return {name: torch.cat([part.reshape(-1, *tail) for part in parts]), f"shape/{name}": shapes}


def _opened(folder: Path) -> Activations:
    from . import runs

    record = runs.manifest(folder)
    if record["recipe"] != RECIPE:
        raise LoadError(f"{folder} holds a run of {record['recipe']}, not activations of model.collect")
    if not (folder / INDEX).is_file():
        raise LoadError(f"{folder} is not finished: call model.collect with the same arguments, and it goes on there")
    try:
        atlas = atlas_from(json.loads((folder / SITES).read_text(encoding="utf-8")))
        rows = [json.loads(line) for line in split_lines((folder / INDEX).read_text(encoding="utf-8"))]
        reads = [Site.parse(text) for text in record["settings"]["read"]]
        places = located(rows)
        shard_of = [places[number] for number in range(len(places))]
    except (OSError, ValueError, KeyError, TypeError, LookupError) as error:
        raise LoadError(f"{folder} is damaged ({type(error).__name__}: {error}); collect the texts again") from error
    for name in dict.fromkeys(name for name, _ in shard_of):
        if not (folder / SHARDS / name).is_file():
            raise LoadError(f"{folder / SHARDS / name} is missing: call model.collect with the same arguments again")
    return Activations(folder, reads, atlas, shard_of)


def located(rows: Sequence[Mapping[str, Any]]) -> dict[int, tuple[str, int]]:
    """Per text its shard and place in it; what comes later takes the place of what was before."""
    places: dict[int, tuple[str, int]] = {}
    for row in rows:
        places[int(row["text"])] = str(row["shard"]), int(row["place"])
    return places
