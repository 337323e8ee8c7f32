"""Relations of the toy's words as tables, and runs over them on the shared toy."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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
    """Lengths of the passes that begin. Counted outside of the model, of whose fingerprint a hook is a part."""
    seen: list[int] = []
    weight, look_up = model.hf.get_input_embeddings().weight, torch.nn.functional.embedding

    def counting(x: torch.Tensor, table: torch.Tensor, *more: Any) -> torch.Tensor:
        if table is weight:
            seen.append(x.shape[1])
        return look_up(x, table, *more)

    torch.nn.functional.embedding = counting
    try:
        yield seen
    finally:
        torch.nn.functional.embedding = look_up
