"""A run of several processes without a model, for tests that kill them: `python tests/sharded.py FOLDER ITEMS SHARDS`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from interp_core import runs
from interp_core.runs.stopping import stoppable

SIZES = "sizes.jsonl"


def study(folder: Path, items: int = 40, shards: int = 4, seconds: float = 0.0, **more: Any) -> list[dict[str, Any]]:
    """Squares of numbers, then what depends on all of them: two tables, a stage between them, and a summary."""
    plan(folder, shards)

    def square(number: int) -> dict[str, Any]:
        time.sleep(seconds)
        run.put({f"own/{number}.txt": "x" * number})
        return {"number": number, "square": number**2, "tenth": number * 0.1, "text": "line\u2028 separator ü" * 3}

    with runs.open(folder, {"items": items}, recipe="squares", say=lambda line: None, **more) as run:
        rows = run.map(SIZES, square, range(items), by=lambda n: n, beside=lambda n, rows: [f"own/{n}.txt"])
        total = run.stage("total.json", lambda: sum(row["square"] for row in rows))
        pairs = [(row["number"], row["square"] / (total or 1)) for row in rows]
        shares = run.map(
            "shares.csv", lambda some: [[{"number": p[0], "share": p[1], "half": h} for h in (0, 1)] for p in some], pairs,
            by=lambda pair: pair[0], batch=3,
        )  # fmt: skip
        run.table("summary.csv", [{"total": total, "rows": len(shares)}])
    return rows


def plan(folder: Path, shards: int) -> None:
    """Divide the run, as `interp run --shards` does."""
    path = folder / "record/command.json"
    if not path.exists():
        runs.write(path, json.dumps({"shards": shards, "folder": os.getcwd(), "command": {}}))


def tables(folder: Path) -> dict[str, bytes]:
    """All files of a run but its record."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "record" not in path.parts and path.name not in ("manifest.json", "DONE")
    }


def check(folder: Path, expected: dict[str, bytes], items: int) -> None:
    """Every row exactly once, no file but the run's, nothing left behind.

    Raises:
        AssertionError: a row is lost, doubled or damaged.
    """
    assert tables(folder) == expected
    numbers = [json.loads(line)["number"] for line in (folder / SIZES).read_text("utf-8").split("\n")[:-1]]
    assert numbers == list(range(items)), numbers
    assert runs.status(folder).state == "done"
    left = [path for kind in ("*.tmp", "*.journal", "*.lease") for path in folder.rglob(kind)]
    assert not left, left


if __name__ == "__main__":
    with stoppable():
        study(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
