"""Folders of artefacts, read into one form: golden files, runtime files, and what the published code leaves.

A folder that holds `eval_meta.json` or `mean_activations.pt` is of the layout "runtime", any other of "source".
Of every part the first file that is there is taken:

    part      source                                                                      runtime
    trials    src_reference_dump.json, injection_trials.json                              eval_trials.jsonl
    maps      slot_maps.json, slot_maps.json.gz                                           slot_maps.json
    labels    <ds>_dummy_labels.json                                                      mean_activations_meta.json
    mean      <ds>_mean_head_activations_FIXED.pt, <ds>_mean_head_activations.pt          mean_activations.pt
    effects   <ds>_indirect_effect.pt                                                     indirect_effect.pt
    heads     top_heads_src.json                                                          top_heads.json
    vector    src_fv.pt                                                                   fv_global_resid.pt
    answers   as trials                                                                   as trials
    logits    injection_logits.safetensors, golden.safetensors                            injection_logits.safetensors
    said      top_heads_src.json                                                          top_heads.json
    norm      top_heads_src.json                                                          fv_global_resid_meta.json
    by_layer                                                                              fv_by_layer.pt

The last three are only held against the others (see `derived`). A file that
is missing or cannot be read is a part with a problem, for the comparison to report in its place.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import interp_core as ic
from interp_core import runs

from .golden import DUMP, HEADS, LOGITS, MAPS, VECTOR
from .published import read_tensor

Combination = tuple[str, int]
"""Kind of prompts, and layer of injection."""


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        key: what it is of, in words.
        trial: number of the trial.
        of: kind of prompt and layer of injection, where rows have them.
        fields: its values.
    """

    key: str
    trial: int
    of: Combination | None
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows by key.

    Attributes:
        rows: the first of each key.
        problems: key and what is wrong with it: rows that are there twice, or not as many as the file says.
    """

    rows: Mapping[str, Row]
    problems: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(rows: Iterable[Row], expected: int | None = None) -> Table:
        """A table; repeated keys are problems."""
        listed = list(rows)
        counts = Counter(row.key for row in listed)
        problems = [(key, f"{count} rows") for key, count in counts.items() if count > 1]
        if expected is not None and len(counts) != expected:
            problems.append(("n_trials", f"{len(counts)} trials, the file says {expected}"))
        first: dict[str, Row] = {}
        for row in listed:
            first.setdefault(row.key, row)
        return Table(first, tuple(problems))


class Part(NamedTuple):
    """One thing that a folder holds.

    Attributes:
        file: where it is, or should be.
        value: a `Table`, a tensor, tensors by name, or a list; None if there is a problem.
        problem: why it could not be read.
    """

    file: Path
    value: Any
    problem: str = ""


@dataclass(frozen=True)
class Artefacts:
    """What a folder holds.

    Attributes:
        folder: where.
        layout: "source" or "runtime".
        parts: by name.
        settings: what it says of its run; empty for folders of the published code.
    """

    folder: Path
    layout: str
    parts: Mapping[str, Part]
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_folder(folder: str | Path, dataset_name: str | None = None) -> Artefacts:
    """Read a folder of artefacts.

    Args:
        dataset_name: which task's files, where there are several.

    Raises:
        LoadError: no folder, or none of the files in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ic.LoadError(f"there is no folder {path}; `interp run fv_golden` and `interp run fv_runtime` write such")
    layout = (
        "runtime" if any((path / name).exists() for name in ("eval_meta.json", "mean_activations.pt")) else "source"
    )
    settings = _settings(path)
    named = dataset_name or str(settings.get("dataset_name", ""))
    parts = {name: _part(path, named, sources) for name, sources in LAYOUTS[layout].items()}
    if not any(part.file.exists() for part in parts.values()):
        names = sorted({file for sources in LAYOUTS["source"].values() for file, _ in sources})
        raise ic.LoadError(f"{path} holds no artefacts of function vectors: none of {', '.join(names)}")
    return Artefacts(path, layout, parts, settings)


def _part(folder: Path, dataset: str, sources: Iterable[tuple[str, Callable[[Path], Any]]]) -> Part:
    """The first of the files that is there; of any task if none is named."""
    first = None
    for pattern, reader in sources:
        paths = sorted(folder.glob(pattern.replace("<ds>", glob.escape(Path(dataset).name) or "*")))
        first = first or folder / pattern.replace("<ds>", dataset or "<ds>")
        if len(paths) > 1:
            return Part(first, None, f"{len(paths)} files of this name; say which task's: dataset_name=…")
        if paths:
            try:
                return Part(paths[0], reader(paths[0]))
            except KeyError as error:
                return Part(paths[0], None, f"has no field {error}")
            except Exception as error:  # whatever JSON, pickle, safetensors and wrong types raise
                return Part(paths[0], None, f"cannot be read: {str(error).splitlines()[0] if str(error) else error!r}")
    assert first is not None
    return Part(first, None, "missing")


def _json(path: Path) -> Any:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return json.load(file)
    return json.loads(path.read_text(encoding="utf-8"))


def _settings(folder: Path) -> dict[str, Any]:
    for name in (DUMP, "eval_meta.json"):
        if (folder / name).exists():
            try:
                data = _json(folder / name)
                meta = dict(data.get("meta", data))
                return {**meta, **meta.get("config", {})}
            except (ValueError, AttributeError, TypeError):
                return {}
    return {}


def _rows(path: Path) -> tuple[list[dict[str, Any]], int | None]:
    """Rows of trials under the golden files' names, and how many there should be."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in runs.split_lines(path.read_text(encoding="utf-8")) if line.strip()]
        return [_renamed(row) for row in rows], _settings(path.parent).get("n_eval")
    data = _json(path)
    return (data["trials"], data["meta"]["n_trials"]) if isinstance(data, dict) else (data, None)


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A runtime row: `logprob_base` is `base_logprob`, and so on."""
    fields = {"trial_id": row["idx"], "trial_idx": row["idx"], **row, "boundary_answer": row["answer"]}
    for side in ("base", "with"):
        fields |= {f"{side}_{key}": row[f"{key}_{side}"] for key in ("logprob", "rank", "pred_id")}
    return fields


def _place(row: Mapping[str, Any]) -> str:
    return f"trial ({row['trial_id']}, {row['trial_idx']})"


def _trials(path: Path) -> Table:
    """Prompt and target of each trial."""
    rows, expected = _rows(path)
    names = ("prompt", "n_tokens", "boundary_prefix", "boundary_answer", "answer_ids", "target_id")
    read = []
    for row in rows:
        if row["prompt"] is not None:  # the published tables write it once
            fields = {name: row[name] for name in names if name in row}
            of = (row["prompt_kind"], row["edit_layer"])
            read.append(Row(f"{_place(row)}, {of[0]}", int(row["trial_idx"]), of, fields))
    return Table.of(read, expected)


def _answers(path: Path) -> Table:
    """What each trial answers, without the vector and with it."""
    rows, expected = _rows(path)
    names = ("target_id", *(f"{s}_{key}" for key in ("logprob", "rank", "pred_id") for s in ("base", "with")))
    read = []
    for row in rows:
        fields = {name: row[name] for name in (*names, "delta_logprob") if name in row}
        fields |= {f"{side}_pred_id": row[f"{side}_top5"][0] for side in ("base", "with") if f"{side}_top5" in row}
        of = (row["prompt_kind"], row["edit_layer"])
        read.append(Row(f"{_place(row)}, {of[0]}, layer {of[1]}", int(row["trial_idx"]), of, fields))
    return Table.of(read, expected)


def _maps(path: Path) -> Table:
    """Tokens and slots of each prompt."""
    rows = _json(path)
    # maps name trials by their number, which may start anywhere; rows are matched by place
    order = {number: place for place, number in enumerate(dict.fromkeys(row["trial_id"] for row in rows))}
    return Table.of(Row(f"trial {row['trial_id']}, {row['mode']}", order[row["trial_id"]], None, row) for row in rows)


def _labels(path: Path) -> list[str]:
    data = _json(path)
    rows = data["labels"] if "labels" in data else data["dummy_labels"]
    return [label for _, label in rows]


def _heads(path: Path) -> list[tuple[int, int, float]]:
    """Heads with their AIE; of the published list, whose scores are rounded, that of the full list beside it."""
    data = _json(path)
    if "heads" in data:
        return [(int(row["layer"]), int(row["head"]), float(row["rank_score"])) for row in data["heads"]]
    exact = {(layer, head): score for layer, head, score in data.get("aie_sorted_full", [])}
    return [(int(at), int(head), float(exact.get((at, head), score))) for at, head, score in data["top_heads"]]


def _said(path: Path) -> dict[str, Any]:
    """What a list of heads says of itself: how many there are, AIE of all heads in order, places of rounded scores."""
    data = _json(path)
    if "heads" in data:
        return {"n_top_heads": data["meta"].get("k")}
    every = data.get("aie_sorted_full")
    return {"n_top_heads": data.get("n_top_heads"), "aie": every, "places": 4 if every is None else None}


def _norm(path: Path) -> float | None:
    """The vector's length."""
    data = _json(path)
    norm = data.get("fv_norm", data.get("norm"))
    return None if norm is None else float(norm)


def _by_layer(path: Path) -> dict[str, dict[int, Tensor]]:
    """Vectors of the layers, before and behind their output projections."""
    data = ic.runs.read_pt(path, "vectors of the layers")
    return {name: dict(data[name]) for name in ("fv_by_layer", "resid_by_layer")}


def _global(path: Path) -> Tensor:
    vector: Tensor = ic.runs.read_pt(path, "a function vector")["fv_global_resid"]
    return vector.flatten()


def _vector(path: Path) -> Tensor:
    return read_tensor(path).flatten()


def _logits(path: Path) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Logits without the vector and with it `[trial vocab]`, by kind of prompt and layer."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        if "clean" in file.keys():  # noqa: SIM118 (no mapping)
            kind, layer = json.loads(file.metadata()["of"])
            return {(kind, layer): (file.get_tensor("clean"), file.get_tensor("with"))}
        # the published file has all layers of a kind in one tensor [trial layer vocab]
        logits = {}
        for kind in ("corrupted", "clean", "zeroshot"):
            steered = file.get_tensor(f"inject_{kind}_with_logits")
            for layer in range(steered.shape[1]):
                logits[kind, layer] = file.get_tensor(f"inject_{kind}_clean_logits"), steered[:, layer]
        return logits


LAYOUTS: dict[str, dict[str, list[tuple[str, Callable[[Path], Any]]]]] = {
    "source": {
        "trials": [(DUMP, _trials), ("injection_trials.json", _trials)],
        "maps": [(MAPS, _maps), (f"{MAPS}.gz", _maps)],
        "labels": [("<ds>_dummy_labels.json", _labels)],
        "mean": [
            ("<ds>_mean_head_activations_FIXED.pt", read_tensor), ("<ds>_mean_head_activations.pt", read_tensor),
        ],
        "effects": [("<ds>_indirect_effect.pt", read_tensor)],
        "heads": [(HEADS, _heads)],
        "vector": [(VECTOR, _vector)],
        "answers": [(DUMP, _answers), ("injection_trials.json", _answers)],
        "logits": [(LOGITS, _logits), ("golden.safetensors", _logits)],
        "said": [(HEADS, _said)],
        "norm": [(HEADS, _norm)],
    },
    "runtime": {
        "trials": [("eval_trials.jsonl", _trials)],
        "maps": [(MAPS, _maps)],
        "labels": [("mean_activations_meta.json", _labels)],
        "mean": [("mean_activations.pt", read_tensor)],
        "effects": [("indirect_effect.pt", read_tensor)],
        "heads": [("top_heads.json", _heads)],
        "vector": [("fv_global_resid.pt", _global)],
        "answers": [("eval_trials.jsonl", _answers)],
        "logits": [(LOGITS, _logits)],
        "said": [("top_heads.json", _said)],
        "norm": [("fv_global_resid_meta.json", _norm)],
        "by_layer": [("fv_by_layer.pt", _by_layer)],
    },
}  # fmt: skip
"""Files of every part, the first that is there, with what reads them."""
