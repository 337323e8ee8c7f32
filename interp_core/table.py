"""The table of sites that `model.sites` shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .architectures.atlas import Atlas, Entry
from .columns import aligned, wrapped
from .sites import SITES
from .views import Part, Shown, Table, View


class SiteTable(Shown):
    """All sites of a model: axes with sizes, layers, what cannot be done; then the sites that it lacks, and why."""

    def __init__(self, atlas: Atlas) -> None:
        self.atlas = atlas

    def __iter__(self) -> Iterator[str]:
        return (name for name in SITES if self.atlas.layers(name))

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """`(site, axes, layers, remark)` of every site that the model has."""
        rows = []
        for name in self:
            entries = [self.atlas.entries[name, layer] for layer in self.atlas.layers(name)]
            rows.append((name, _axes(entries[0]), _layers(self.atlas, name), _remark(entries)))
        return rows

    def missing(self) -> dict[str, list[str]]:
        """Sites that the model lacks, by the reason."""
        names: dict[str, list[str]] = {}
        for name, why in self.atlas.lacking.items():
            names.setdefault(why, []).append(name)
        return names

    def text(self, width: int | None = None) -> str:
        """All of it as lines of at most `width` letters; as long as they come without one."""
        lines = aligned([("site", "axes", "layers", "remark"), *self.rows()], width, keep=3)
        missing = self.missing()
        lines += ["", "not in this model:"] if missing else []
        said = [f"  {', '.join(names)}: {why}" for why, names in missing.items()]
        said += [f"note: {note}" for note in self.atlas.notes]
        return "\n".join([*lines, *(wrapped(line, width, "    ") for line in said)])

    def __repr__(self) -> str:
        return self.text()

    def _view(self) -> View:
        missing = [(", ".join(names), why) for why, names in self.missing().items()]
        parts = [
            Part("sites", (), Table(["site", "axes", "layers", "remark"], self.rows())),
            Part("not in this model", (), Table(["sites", "why"], missing)) if missing else Part("", ()),
            Part("notes", self.atlas.notes),
        ]
        return View(f"Sites of {self.atlas.family.name}", parts)


def _axes(entry: Entry) -> str:
    return " ".join(f"{axis}={entry.sizes[axis]}" if axis in entry.sizes else axis for axis in SITES[entry.name].axes)


def _layers(atlas: Atlas, name: str) -> str:
    layers = atlas.layers(name)
    if not SITES[name].layered:
        return "-"
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return ",".join(map(str, layers))


def _remark(entries: Sequence[Entry]) -> str:
    why: dict[str, str] = {}
    for entry in entries:
        why |= entry.why
    return "; ".join([SITES[entries[0].name].doc, *(f"no {what}: {reason}" for what, reason in why.items())])
