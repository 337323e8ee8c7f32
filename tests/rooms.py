"""The rooms of the code, and the picture of who imports whom: `python tests/rooms.py` draws it anew for the docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from imports import arrows, modules

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs/images/architecture.svg"
PACKAGES = {
    "interp_core": ROOT / "interp_core",
    "interp_plugins": ROOT / "plugins/interp_plugins",
    "interp_recipes": ROOT / "recipes/interp_recipes",
}
ROOMS: dict[str, str] = {
    "words": "_version cost errors foreign tensors positions indexing sites plan settings progress drawing files columns",
    "registry": "plugins",
    "stats": "stats",
    "report": "report views",
    "text": "text token_views chat inputs offsets",
    "result": "result result_files differing pandas",
    "scaffold": "scaffold",
    "launch": "launch",
    "atlas": "architectures",
    "engines": "engines snapshot",
    "vision": "vision",
    "session": "session structure loading placement strategy_checks gguf weights readout real identity batches table model_inputs wrappers",
    "run folders": "runs provenance",
    "runs": "run readings receipts score saved replacing collect activations pass_views",
    "check at load": "checks",
    "generation": "generation decoding",
    "sweep": "sweep",
    "model": "model",
    "visual edits": "visual",
    "batteries": "batteries",
    "methods": "methods many joining",
    "planning": "planning",
    "toys": "toys prompts",
    "bench": "bench",
    "testing": "testing",
    "compatibility": "compatibility",
    "command line": "cli",
    "ic": "interp_core",
    "plugins": "interp_plugins",
    "recipes": "interp_recipes",
}
"""Room by room, from the ground up, the modules and folders that are in it. A module imports from its own room and from
those above it in this table. `ic` is the map of public names, through which plugins and recipes come to all the rest."""


def room_of(module: str) -> str:
    """The room that a module is in; "" if the table does not say."""
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0] if package == "interp_core" and rest else package
    return next((room for room, names in ROOMS.items() if first in names.split()), "")


def between_rooms() -> dict[str, set[str]]:
    """Which rooms the modules of each import from."""
    out: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, targets in arrows(modules(PACKAGES)).items():
        out[room_of(module)] |= {room_of(target) for target in targets} - {room_of(module)}
    return out


def direct(graph: Mapping[str, Set[str]]) -> dict[str, set[str]]:
    """The arrows that no way over other rooms says already."""
    reached: dict[str, set[str]] = {}
    for room in graph:  # from the ground up
        reached[room] = set(graph[room]).union(*(reached[below] for below in graph[room]))
    return {room: {t for t in below if not any(t in reached[o] for o in below - {t})} for room, below in graph.items()}


def floors(graph: Mapping[str, Set[str]]) -> dict[str, int]:
    """On which floor a room is: one above the highest of those that it imports from."""
    out: dict[str, int] = {}
    for room, below in graph.items():
        out[room] = 1 + max((out[other] for other in below), default=-1)
    return out


def svg() -> str:
    """The picture: floors from the ground up, a line for every arrow that no other way says."""
    graph = between_rooms()
    floor, width, height = floors(graph), 112, 26
    rows: dict[int, list[str]] = {}
    for room in graph:
        rows.setdefault(floor[room], []).append(room)
    wide, top = max(map(len, rows.values())) * (width + 24), (max(rows) + 1) * 62
    at = {
        room: (wide * (i + 0.5) / len(names), top - 62 * number - 40)
        for number, names in rows.items()
        for i, room in enumerate(names)
    }
    return "\n".join(_lines(direct(graph), at, wide, top, width, height)) + "\n"


def _lines(
    graph: Mapping[str, Set[str]],
    at: Mapping[str, tuple[float, float]],
    wide: float,
    top: float,
    width: int,
    height: int,
) -> Iterator[str]:
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {top:g}" font-family="sans-serif" font-size="12">'
    yield f'<rect width="{wide:g}" height="{top:g}" fill="#fff"/>'
    for room, below in graph.items():
        x, y = at[room]
        for other in sorted(below):
            to_x, to_y = at[other][0], at[other][1] - height / 2
            bend = (to_y - y) / 2
            path = f"M{x:.0f} {y + height / 2:.0f}C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"
            yield f'<path d="{path}" fill="none" stroke="#9bb" stroke-width="1.2"/>'
    for room, (x, y) in at.items():
        yield (
            f'<rect x="{x - width / 2:.0f}" y="{y - height / 2:.0f}" width="{width}" height="{height}" rx="5" '
            'fill="#eef4f4" stroke="#478"/>'
        )
        yield f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" fill="#123">{room}</text>'
    yield "</svg>"


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
