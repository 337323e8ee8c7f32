"""The state of every question, in its `qid_status.json`, and what went wrong, by stage and class of error.

    pending → running → completed | failed        skipped (too few rows)        dry_run (trials drawn, no model)

What is done is read from files: a question is completed when its status says so and every file is there. A run that was
killed leaves `running` behind, which is taken up again; so is `failed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import interp_core as ic
from interp_core.result import write

from ..artefacts import text
from .settings import difference
from .tables import Row

STATUS = "qid_status.json"
QUESTIONS = "questions"
STAGES = ("rows", "trials", "mean activations", "effects", "vector", "injection", "summary")
"""Where a question can fail."""


@dataclass
class Status:
    """A question's state and its file.

    Attributes:
        folder: the question's.
        data: fields of the file.
        stage: what is being done.
    """

    folder: Path
    data: Row
    stage: str = STAGES[0]

    @staticmethod
    def of(folder: Path, q_id: str, rows: int, config: Row) -> Status:
        """The state that is on file, or a new one; the file is not written."""
        found = read_status(folder) or {"created_at": _now(), "status": "pending", "reason": ""}
        data = {
            "q_id": q_id, "status": found["status"], "reason": found["reason"], "created_at": found["created_at"],
            "updated_at": found.get("updated_at"), "config": config, "q_row_count": rows,
            "q_root": f"{QUESTIONS}/{folder.name}", "expected_layers": found.get("expected_layers"),
        }  # fmt: skip
        return Status(folder, data)

    @property
    def name(self) -> str:
        """The state."""
        return str(self.data["status"])

    def set(self, status: str, reason: str = "", **more: Any) -> None:
        """Change the state, and write it."""
        self.data = {k: v for k, v in self.data.items() if k not in ("error", "dropped_rows")}
        self.data |= {"status": status, "reason": reason, "updated_at": _now()} | more
        write(self.folder / STATUS, text(self.data))

    def fail(self, error: Exception) -> None:
        """Note an error with its stage."""
        problems = [str(problem) for problem in getattr(error, "problems", ())]
        noted = {
            "stage": self.stage, "error_class": type(error).__name__, "message": str(error) or repr(error),
            "fix": fix(self.stage, error),
        }  # fmt: skip
        self.set("failed", f"{self.stage}: {noted['message']}", error=noted | ({"rows": problems} if problems else {}))


def read_status(folder: Path) -> Row | None:
    """A question's status, if it has one.

    Raises:
        LoadError: a file that is no status.
    """
    path = folder / STATUS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert {"q_id", "status", "config", "created_at"} <= found.keys()
    except (ValueError, AttributeError, AssertionError) as error:
        raise ic.LoadError(f"{path} is not the status of a question; delete its folder, or give another out") from error
    return dict(found)


def statuses(out: Path) -> list[Row]:
    """Of all questions in a run's folder, Q2 before Q10."""
    folders = [path.parent for path in (out / QUESTIONS).glob(f"*/{STATUS}")]
    return sorted((found for folder in folders if (found := read_status(folder))), key=_natural)


def _natural(status: Mapping[str, Any]) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", status["q_id"])
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def holds_numbers(folder: Path) -> bool:
    """Whether a model has run for this question."""
    return any((folder / "stepD_mean_acts").glob("*.pt"))


def refuse_changes(out: Path, configs: Mapping[str, Row]) -> None:
    """Refuse a folder whose questions have numbers from other settings or other pairs.

    Args:
        configs: of the questions that the relation has now.

    Raises:
        PlanError: naming the question, and what differs.
    """
    any_config = next(iter(configs.values()))
    for found in statuses(out):
        if not holds_numbers(out / found["q_root"]):
            continue
        q_id, old = found["q_id"], found["config"]
        if differs := difference(old, any_config):
            raise ic.PlanError(
                f"{out} holds question {q_id!r} of another run: {differs}. Give another out, or the "
                "settings as they were"
            )
        if q_id in configs and old.get("pairs_sha256") != configs[q_id]["pairs_sha256"]:
            raise ic.PlanError(
                f"{out} holds question {q_id!r} with other pairs than the relation has now. Give another out, or "
                f"delete {out / found['q_root']}"
            )


_FIXES: tuple[tuple[str | None, type[BaseException], str], ...] = (
    ("rows", ic.InterpError, "correct the table, or leave bad rows out (bad_rows=drop)"),
    ("trials", ic.InterpError, "give other prefixes and separators, or fewer demonstrations (n_demos)"),
    (None, torch.OutOfMemoryError, "load the model in a smaller dtype or on another device, or ask for fewer n_demos"),
    (None, ic.LoadError, "delete the file that the message names, and run again"),
    (None, ic.InterpError, "do what the message says, and run again"),
    (None, OSError, "see to space and rights of the run's folder, and run again"),
)


def fix(stage: str, error: Exception) -> str:
    """What to do about an error."""
    for where, kind, advice in _FIXES:
        if where in (None, stage) and isinstance(error, kind):
            return advice
    return "run this question alone with on_error=stop to see where it comes from, and report it"


def classified(found: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Failures by stage and class of error, in the order of the stages."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for status in found:
        if status["status"] == "failed":
            error = status["error"]
            groups.setdefault((error["stage"], error["error_class"]), []).append(status)
    return [
        {
            "stage": stage, "error_class": kind, "count": len(group), "q_ids": [status["q_id"] for status in group],
            "messages": [status["error"]["message"] for status in group],
            "rows": [f"{s['q_id']}: {row}" for s in group for row in s["error"].get("rows", ())],
            "fix": group[0]["error"]["fix"],
        }
        for (stage, kind), group in sorted(groups.items(), key=lambda item: _place(item[0]))
    ]  # fmt: skip


def _place(key: Sequence[str]) -> tuple[int, str]:
    return STAGES.index(key[0]), key[1]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
