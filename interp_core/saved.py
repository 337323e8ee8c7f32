"""Runs in folders: all that a forward pass gave, in `run.json` and `run.safetensors`, to be read without the model.

    run.save("out/run")
    ic.open_run("out/run")[S.resid_post[3]].at(-1)

The head holds the digest of the values, which is compared when a run is opened; values are mapped then, not held. No
pickle, no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .architectures.atlas import Atlas, Entry, Shape
from .architectures.family import Family, View
from .engines.protocol import Slot, viewed
from .errors import InterpError, LoadError, PlanError
from .files import file_sha256, folder_of, safetensors_bytes, sha256, write
from .plan import Plan
from .positions import Images, Span
from .readings import ForwardPass, ReadStore
from .receipts import Receipt, Routing
from .sites import Edit, Site
from .text import Tokens

if TYPE_CHECKING:
    from .structure import Structure

FORMAT = "interp-readings/1"
HEAD, VALUES = "run.json", "run.safetensors"


@dataclass
class StoredSlot:
    """One value in a file: a read in one layer."""

    entry: Entry
    site: Site
    late: bool = False

    @property
    def view(self) -> View | None:
        """None: it was written in the site's axes."""
        return None


class StoredValues(ReadStore):
    """Values that were read from a folder, by site."""

    def __init__(self, slots: Sequence[Slot], atlas: Atlas, tokens: Tokens, values: Sequence[Tensor | None]) -> None:
        super().__init__(slots, atlas, tokens.rows)
        self._values = values

    def _value(self, slot: int) -> Tensor | None:
        return self._values[slot]


class SavedRun(StoredValues, ForwardPass):
    """A run that `run.save` wrote: indexed by sites, as the run itself.

    Attributes:
        tokens: the input.
        plan: what was read and edited.
        receipts: one per edit.
        source: where the model came from.
        model: the model in a line, for people.
    """

    def __init__(self, slots: Sequence[Slot], atlas: Atlas, tokens: Tokens, values: Sequence[Tensor | None]) -> None:
        super().__init__(slots, atlas, tokens, values)
        self.tokens, self.source, self.model = tokens, "", ""
        self.plan, self.receipts = Plan(), list[Receipt]()


def save_run(run: ForwardPass, plan: Plan, receipts: Sequence[Receipt], model: Structure, folder: str | Path) -> Path:
    """See `Run.save`."""
    out = folder_of("save", folder)
    tokens, tensors = tokens_data(run.tokens)
    tensors |= {f"plan/{key}": value for key, value in plan.tensors().items()}
    reads: list[dict[str, Any]] = []
    for number, slot in enumerate(run._slots):
        name = slot_name(slot.site, slot.entry)
        held = []
        for kind, store in (("read", run), ("grad", run._grad)):
            value = None if store is None else store._value(number)
            if value is not None:
                tensors[f"{kind}/{name}"] = viewed(slot, value)
                held.append(f"{kind}/{name}")
        reads.append({"site": str(slot.site), "name": slot.entry.name, "layer": slot.entry.layer, "held": held})
    if run._logits is not None:
        tensors["logits"] = run._logits
    data = safetensors_bytes(tensors)
    head = {
        "format": FORMAT,
        "sha256": sha256(data),
        "source": model.source,
        "model": repr(model),
        "atlas": atlas_data(model.atlas),
        "reads": reads,
        "gradients": run._grad is not None,
        "logits": None if run._logits is None else str(run._logits_site),
        "tokens": tokens,
        "plan": plan.to_json(),
        "receipts": [
            {"fired": r.fired, "layers": r.layers, "positions": r.positions, "norm": r.norm}
            | ({"routing": asdict(r.routing)} if r.routing else {})
            for r in receipts
        ],
    }
    text = json.dumps(head, ensure_ascii=False)
    write(out / VALUES, data)  # before the head, which names its digest: a kill between the two shows
    write(out / HEAD, text)
    return out


def open_run(folder: str | Path) -> SavedRun:
    """A run that `run.save(folder)` wrote: what it read, gradients, logits, tokens, plan and receipts.

    Raises:
        LoadError: nothing there, of another format, or damaged.
    """
    path = folder_of("open_run", folder)
    head, values = _read_head(path), path / VALUES
    if file_sha256(values) != head.get("sha256"):
        what = "not the file that was saved with it" if values.is_file() else "missing"
        raise LoadError(f"{values} is {what}; save the run again")
    try:
        return _rebuilt(head, mapped(values))
    # The digest is that of the values alone: in the head anything may be wrong.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, InterpError) as error:
        raise LoadError(f"{path / HEAD} is damaged ({type(error).__name__}: {error}); save the run again") from error


def _read_head(folder: Path) -> dict[str, Any]:
    try:
        head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"{folder} holds no run: there is no {HEAD} in it; run.save(folder) writes one") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder / HEAD} cannot be read: {error}; save the run again") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        written = head.get("format") if isinstance(head, dict) else type(head).__name__
        raise LoadError(f"{folder / HEAD} is of format {written}, not {FORMAT}; open it with the version that wrote it")
    return head


def _rebuilt(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SavedRun:
    atlas = atlas_from(head["atlas"])
    tokens = tokens_from(head["tokens"], tensors)
    slots: list[Slot] = []
    values = {"read": list[Tensor | None](), "grad": list[Tensor | None]()}
    for item in head["reads"]:
        slots.append(StoredSlot(atlas.entries[item["name"], item["layer"]], Site.parse(item["site"])))
        held = {name.partition("/")[0]: tensors[name] for name in item["held"]}
        for kind, of_kind in values.items():
            of_kind.append(held.get(kind))
    run = SavedRun(slots, atlas, tokens, values["read"])
    run.source, run.model = str(head["source"]), str(head["model"])
    run.plan = Plan.from_json(head["plan"], {k.removeprefix("plan/"): v for k, v in tensors.items()})
    run.receipts = [_receipt(edit, item) for edit, item in zip(run.plan.edits, head["receipts"], strict=True)]
    if head["gradients"]:
        run._grad = StoredValues(slots, atlas, tokens, values["grad"])
    if head["logits"] is not None:
        run._logits, run._logits_site = tensors["logits"], Site.parse(head["logits"])
    return run


def _receipt(edit: Edit, item: Mapping[str, Any]) -> Receipt:
    routing = Routing(**item["routing"]) if "routing" in item else None
    return Receipt(
        edit, int(item["fired"]), tuple(item["layers"]), _rows_of(item["positions"]), float(item["norm"]), routing
    )


def _rows_of(positions: list[list[int]] | None) -> tuple[tuple[int, ...], ...] | None:
    return None if positions is None else tuple(tuple(map(int, row)) for row in positions)


# Parts that other folders have too


def slot_name(site: Site, entry: Entry) -> str:
    """A read in one layer, as files name it: `resid_post[3]@-1`."""
    return str(replace(site, layers=entry.layer) if site.info.layered else site)


def mapped(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped: nothing is read before it is looked at.

    Raises:
        LoadError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error


def atlas_data(atlas: Atlas) -> dict[str, Any]:
    """Which sites a model has, with sizes: enough to say what a stored value is, and why another is not there."""
    shape = atlas.shape
    return {
        "family": atlas.family.name,
        "tower": atlas.tower,
        "shape": [shape.n_layers, shape.d_model, shape.d_vocab, shape.n_ctx],
        "sites": [[entry.name, entry.layer, dict(entry.sizes)] for entry in atlas.entries.values()],
        "lacking": atlas.lacking,
    }


def atlas_from(data: Mapping[str, Any]) -> Atlas:
    """The atlas of `atlas_data`: it answers what sites there are, and reaches no module."""
    atlas = Atlas(Family(str(data["family"])), Shape(*data["shape"]), None)
    atlas.tower = int(data.get("tower", 0))  # folders of before vision towers had sites say nothing of them
    for name, layer, sizes in data["sites"]:
        atlas.entries[name, layer] = Entry(name, layer, None, None, sizes)
    atlas.lacking = {str(name): str(why) for name, why in data["lacking"].items()}
    return atlas


def tokens_data(tokens: Tokens) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Tokens as JSON and tensors.

    Raises:
        PlanError: a further input that is no tensor.
    """
    tensors = {"tokens/ids": tokens.ids, "tokens/mask": tokens.mask}
    for name, value in tokens.inputs.items():
        if not isinstance(value, Tensor):
            raise PlanError(
                f"the text comes with {name}, a {type(value).__name__}, which a folder cannot hold; run the whole text "
                "without it, or keep the values that you need by yourself"
            )
        tensors[f"tokens/inputs/{name}"] = value
    spans = {name: [[[s.start, s.stop] for s in row] for row in rows] for name, rows in tokens.spans.items()}
    # Left out where there are none, so that the head of a text without images is what it was before there were any.
    shares: dict[str, Any] = {"shares": dict(tokens.shares)} if tokens.shares else {}
    if tokens.patches is not None:
        shares["patches"] = [[list(image) for image in row] for row in tokens.patches]
    plain = {"texts": tokens.texts, "offsets": tokens.offsets, "spans": spans, "labels": tokens.labels}
    return plain | shares, tensors


def tokens_from(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tokens:
    """The tokens of `tokens_data`."""
    start = "tokens/inputs/"
    return Tokens(
        tensors["tokens/ids"],
        tensors["tokens/mask"],
        None if data["texts"] is None else tuple(map(str, data["texts"])),
        None if data["offsets"] is None else tuple(tuple((int(a), int(b)) for a, b in row) for row in data["offsets"]),
        {str(n): tuple(tuple(Span(*span) for span in row) for row in rows) for n, rows in data["spans"].items()},
        tuple(tuple(map(str, row)) for row in data["labels"]),
        {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)},
        {str(n): None if s is None else tuple(map(int, s)) for n, s in data.get("shares", {}).items()},
        _patches_from(data.get("patches")),
    )


def _patches_from(data: Any) -> Images | None:
    return None if data is None else tuple(tuple(tuple(map(int, image)) for image in row) for row in data)
