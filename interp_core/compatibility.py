"""The matrix of model types and engines: what is served, what holds it and what is missing, as it was measured.

`scripts/compatibility.py` measures it on tiny models and writes `compatibility.json`, which `interp families` and
docs/compatibility.md show.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .columns import aligned, wrapped
from .errors import LoadError, nearest

FILE = Path(__file__).with_name("compatibility.json")
ENGINES = ("torch", "nnsight", "transformer_lens")
WORDS = {
    "verified": "every site that the model has is served, and equals hooks written by hand, as do logits after edits",
    "partial": "some sites are missing, or served and held by the self-check alone",
    "refused": "it does not load, with the reason",
    "not built": "transformers cannot build a tiny model from its config here",
}
"""What is said of a type on an engine, best first."""
HUB_MODELS = 15_736
"""Models in TransformerLens' table, encoder-decoders and towers among them."""


@cache
def matrix() -> dict[str, Any]:
    """The file: `versions`, `types` by model type and `visual` by class (of images and text), with a cell for each
    engine."""
    return json.loads(FILE.read_text())


def counts(types: Mapping[str, Mapping[str, Any]], engine: str = "torch") -> list[str]:
    """Sentences with the numbers of a matrix.

    Args:
        types: a cell for each engine, by model type.
    """
    cells = {name: cell for name, row in types.items() if (cell := row.get(engine)) is not None}
    loaded = {name: cell for name, cell in cells.items() if cell["word"] in ("verified", "partial")}
    served = [sites_of(cell) for cell in loaded.values()]
    heads = sum({"z", "pattern"} <= set(sites) for sites in served)
    routers = sum("router_weights" in sites for sites in served)
    mixers = sum("mixer_out" in sites for sites in served)
    wrong = sum(len(cell.get("false", "").split()) for cell in loaded.values())
    classes = {types[name]["class"]: types[name].get("hub", 0) for name in loaded}  # types may share a class
    covered = sum(classes.values())
    return [
        f"{len(cells)} model types: {tally(cells.values())}; {len(loaded)} load.",
        f"{heads} have heads and attention patterns, {routers} routers, {mixers} a site for what their mixer adds.",
        f"{wrong} sites are served that are further from hooks written by hand than rounding.",
        f"They are the classes of {covered:,} of the {HUB_MODELS:,} models in TransformerLens' table of the hub.",
    ]


def counts_of_images(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence with the numbers of the classes of images and text."""
    said = tally(row["torch"] for row in classes.values())
    return f"{len(classes)} classes of images and text, measured on text alone: {said}."


def tally(cells: Iterable[Mapping[str, Any]]) -> str:
    """How many cells have each word, best first."""
    words = Counter(cell["word"] for cell in cells)
    return ", ".join(f"{words[word]} {word}" for word in WORDS if words[word])


def sites_of(cell: Mapping[str, Any]) -> list[str]:
    """Sites that are served."""
    return [*cell.get("held", "").split(), *cell.get("unheld", "").split()]


def listing(types: Mapping[str, Mapping[str, Any]], width: int | None = None) -> str:
    """All types, with a word for each engine."""
    return _table(types, ("type", *ENGINES, "class"), width)


def listing_of_images(classes: Mapping[str, Mapping[str, Any]], width: int | None = None) -> str:
    """All classes of images and text, with a word for each engine."""
    return _table(classes, ("class", *ENGINES), width)


def _table(rows: Mapping[str, Mapping[str, Any]], head: tuple[str, ...], width: int | None) -> str:
    lines = [head]
    for name, row in rows.items():
        words = (row[engine]["word"] if engine in row else "–" for engine in ENGINES)
        lines.append((name, *words, row.get("class", "–"))[: len(head)])
    return "\n".join(aligned(lines, width, keep=2))


def row_of(model_type: str) -> dict[str, Any]:
    """The row of a type, or of a class of images and text.

    Raises:
        LoadError: none of this name, with the nearest.
    """
    every = matrix()["types"] | matrix()["visual"]
    if model_type not in every:
        raise LoadError(f"there is no causal model type {model_type!r} in transformers. {nearest(model_type, every)}")
    return every[model_type]


def of_type(model_type: str, width: int | None = None) -> str:
    """All that is known of a type.

    Raises:
        LoadError: no type of this name, with the nearest.
    """
    row = row_of(model_type)
    lines = [f"{model_type} ({row.get('class', 'not built')})", ""]
    for engine in ENGINES:
        cell = row.get(engine)
        if cell is None:
            continue
        lines.append(f"{engine}: {cell['word']}" + (f", {cell['why']}" if cell.get("why") else ""))
        if cell.get("held"):
            lines.append(f"  held by hooks written by hand (at most {cell.get('off', 0):.0e} off): {cell['held']}")
        if cell.get("unheld"):
            lines.append(f"  held by the self-check: {cell['unheld']}")
        lines += [f"  missing {names}: {why}" for why, names in cell.get("missing", {}).items()]
    return "\n".join(wrapped(line, width) for line in lines)
