"""Measures the matrix of model types and engines: python scripts/compatibility.py [TYPE …]

Writes interp_core/compatibility.json and docs/compatibility.md, in two processes. With types named, measures these anew
and keeps the other rows; with `--page`, writes the page from the file alone; with `--lowest`, counts for the installed
transformers, which is to be the lowest of the range, on engine torch, and keeps all rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import multiprocessing
import sys
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from interp_core.compatibility import ENGINES, FILE, WORDS, counts, counts_of_images, sites_of, tally  # noqa: E402
from interp_core.files import write  # noqa: E402
from interp_core.testing.types import types, visual  # noqa: E402

HEAD = """# Compatibility

Written by `python scripts/compatibility.py` ({versions}): a tiny model
of every type in transformers' mapping of causal language models, random weights, every kind of layer of the family, in
float64. `interp families` prints this table, and `interp families TYPE` all that is known of a type.

"""
MEANING = """
A site is *held* where it is read and edited in every layer that has it, and the values read and the logits after the
edit are those of hooks that were written by hand for the type ([tests/type_layouts.py](../tests/type_layouts.py),
[tests/reference.py](../tests/reference.py), [tests/mixtures.py](../tests/mixtures.py)); layers that are not attention
also by [tests/test_mixers.py](../tests/test_mixers.py). The number is the largest difference, `n of m` how many of the
sites that are served are held; all others have passed the [self-check](families.md#the-self-check). A test holds that
no row gets worse ([tests/test_types.py](../tests/test_types.py)), another one that models whose configs are not the
default of their type are served as truly: with all turned that a config can switch, and as OPT-350m, Falcon-RW,
OLMo-7B, StableLM-2-12B and others have it ([tests/test_type_switches.py](../tests/test_type_switches.py)).
[Agreement](agreement.md) has three dtypes, site by site.

"""


def main(*words: str) -> None:
    """Measure, and write the file and the page."""
    known: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    if "--lowest" in words:
        known["lowest"] = {
            "transformers": _version("transformers"),
            "counts": counts(_measured(types(), ("torch",)))[:2],
        }
    elif "--page" not in words:
        named = [word for word in words if not word.startswith("-")]
        rows = _measured(named or [*types(), *visual()], ENGINES)
        every = {**known.get("types", {}), **known.get("visual", {}), **rows} if named else rows
        causal, every = set(types()), dict(sorted(every.items()))
        known |= {"versions": {name: _version(name) for name in VERSIONS}}
        known["types"] = {name: row for name, row in every.items() if name in causal}
        known["visual"] = {name: row for name, row in every.items() if name not in causal}
    write(FILE, json.dumps(known, indent=1) + "\n")
    write(ROOT / "docs/compatibility.md", page(known))


VERSIONS = ("torch", "transformers", "nnsight", "transformer-lens")


def _version(package: str) -> str:
    return importlib.metadata.version(package).split("+")[0]


def _measured(names: list[str], engines: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    hub = _hub_models()
    rows: dict[str, dict[str, Any]] = {}
    with multiprocessing.get_context("spawn").Pool(2, _quiet) as pool:
        for name, row in pool.imap_unordered(_row, [(name, engines) for name in names], chunksize=1):
            row["hub"] = hub[row.get("class", "")]
            rows[name] = {key: row[key] for key in ("class", "hub", *engines) if row.get(key)}
            print(f"{len(rows):4} of {len(names)}", name, *(row[engine]["word"] for engine in engines), flush=True)
    return dict(sorted(rows.items()))


def _quiet() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()


def _row(task: tuple[str, tuple[str, ...]]) -> tuple[str, dict[str, Any]]:
    from matrix import row

    name, engines = task
    cells: dict[str, Any] = {}
    for engine in engines:
        try:
            cells[engine] = row(name, engine)
        except Exception as error:
            raise RuntimeError(f"{name} on {engine}: {type(error).__name__}: {error}") from error
        cells["class"] = cells[engine].pop("class", cells.get("class"))
    return name, cells


def _hub_models() -> Counter[str]:
    """How many models of the hub have a class, by TransformerLens' table."""
    spec = find_spec("transformer_lens")
    assert spec is not None and spec.origin is not None
    table = Path(spec.origin).parent / "tools/model_registry/data/supported_models.json"
    return Counter(model["architecture_id"] for model in json.loads(table.read_text())["models"])


def page(known: dict[str, Any]) -> str:
    """The page."""
    types, versions = known["types"], ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    lines = [HEAD.format(versions=versions).rstrip(), ""]
    lines += [f"- {sentence}" for sentence in counts(types)]
    for engine in ENGINES[1:]:
        lines.append(f"- On engine `{engine}`: {tally(row[engine] for row in types.values())}.")
    if lowest := known.get("lowest"):
        lines.append(
            f"- With transformers {lowest['transformers']}, the lowest that is supported: {' '.join(lowest['counts'])}"
        )
    lines += ["", "| word | means |", "|---|---|", *(f"| **{word}** | {means} |" for word, means in WORDS.items())]
    lines += [MEANING.rstrip(), "", "## Types × engines", "", *_table("type", types)]
    pictures = known["visual"]
    lines += ["", "## Models that take images × engines", "", counts_of_images(pictures)]
    lines += ["Images, towers and grids: [families](families.md#images).", "", *_table("class", pictures)]
    lines += ["", "## What is missing on `torch`, and why", ""]
    for name, row in (types | pictures).items():
        cell = row["torch"]
        said = [f"{why}" for why in [cell.get("why")] if why]
        said += [f"without `{'`, `'.join(names.split())}`: {why}" for why, names in cell.get("missing", {}).items()]
        if cell.get("unheld"):
            said.append(f"held by the self-check alone: `{'`, `'.join(cell['unheld'].split())}`")
        if said:
            lines.append(f"- **{name}** {'; '.join(said)}")
    return "\n".join(lines) + "\n"


def _table(first: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"| {first} | " + " | ".join(f"`{engine}`" for engine in ENGINES) + " |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row[engine]) for engine in ENGINES) + " |")
    return lines


def _cell(cell: dict[str, Any]) -> str:
    if cell["word"] not in ("verified", "partial"):
        return cell["word"]
    held = len(cell.get("held", "").split())
    return f"**{cell['word']}** {cell.get('off', 0):.0e}, {held} of {len(sites_of(cell))}"


if __name__ == "__main__":
    main(*sys.argv[1:])
