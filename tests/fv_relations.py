"""Relations of the toy's words as tables, and runs over them on the shared toy."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import toy_model
from interp_plugins.function_vectors.relation.run import run_relation
from interp_plugins.function_vectors.relation.settings import RelationSettings

import interp_core as ic
from interp_core.toys.text import relations

QUICK = {"n_trials": 4, "n_demos": 5}


def table(path: Path, questions: dict[str, Sequence[tuple[str, str]]], header: str = "id,ex_A,ex_B") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(header.split(","))
        out.writerows((q_id, *pair) for q_id, pairs in questions.items() for pair in pairs)
    return path


def toy_pairs(relation: str, n: int = 24) -> list[tuple[str, str]]:
    return list(relations()[relation].items())[:n]


def settings(path: Path, out: Path, **more: Any) -> RelationSettings:
    return RelationSettings(relation_csv=path, out=out, **{**QUICK, **more})


def run(path: Path, out: Path, **more: Any) -> list[str]:
    """A run on the shared toy; returns what it says."""
    said: list[str] = []
    run_relation(settings(path, out, **more), toy_model().tokenizer, toy_model, said.append)
    return said


def status(out: Path, q_id: str) -> dict[str, Any]:
    return dict(json.loads((out / "questions" / q_id / "qid_status.json").read_text()))


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def counted(model: ic.Model) -> Iterator[list[int]]:
    """Lengths of the passes that begin."""
    seen: list[int] = []
    hook = model.hf.get_input_embeddings().register_forward_hook(lambda module, x, out: seen.append(out.shape[1]))
    try:
        yield seen
    finally:
        hook.remove()
