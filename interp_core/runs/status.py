"""How far a run is, told by its files alone: no scheduler is asked, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoadError, nearest
from . import leases
from .folder import COMMAND, DONE, RECORD, RunFolder
from .session import sessions
from .shards import ENDING, Shard, ShardFolder


@dataclass(frozen=True)
class TableStatus:
    """How far a table of rows is.

    Attributes:
        name: of its file.
        shards, done: how many there are, and how many of them are whole.
        items, items_done: the same of items; those of shards that are not whole are among them.
        at_work: shards at which a process may be at work, with seconds since its last sign of life.
        failed: items that raised errors, each with what it said.
    """

    name: str
    shards: int
    done: int
    items: int
    items_done: int
    at_work: dict[int, float]
    failed: dict[str, str]


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        home: its folder.
        recipe: whose it is.
        state: done; running; planned, if nobody has been at work; failed, if items raised errors and nobody is at work;
            else unfinished.
        tables: in the order of their names; a table that the run has not come to is not among them.
        workers: sessions that may be at work.
        command: what was planned: shards, command and folder; None for a run of one process.
    """

    home: Path
    recipe: str
    state: str
    tables: tuple[TableStatus, ...]
    workers: tuple[str, ...]
    command: dict[str, Any] | None

    @property
    def missing(self) -> int:
        """How many shards are known not to be done."""
        return sum(table.shards - table.done for table in self.tables)

    @property
    def failed(self) -> int:
        """How many items raised errors."""
        return sum(len(table.failed) for table in self.tables)


def status(run: str | Path) -> RunStatus:
    """How far a run is, from its files.

    Args:
        run: its folder; of a published tree, the tree, if one run writes into it.

    Raises:
        LoadError: the folder holds no run, or several.
    """
    home = home_of(run)
    record = RunFolder.read(home / RECORD / "run.json") or {}
    tables = tuple(_tables(home / RECORD / "rows"))
    listed = sessions(home / RECORD / "sessions")
    workers = tuple(session["id"] for session in listed if session["state"] == "running")
    if (home / DONE).is_file():
        state = "done"
    elif workers:
        state = "running"
    elif any(table.failed for table in tables):
        state = "failed"
    else:
        state = "unfinished" if listed else "planned"
    return RunStatus(home, record["recipe"], state, tables, workers, RunFolder.read(home / RECORD / COMMAND))


def home_of(run: str | Path) -> Path:
    """The folder that a run's record is in.

    Raises:
        LoadError: there is none, or there are several.
    """
    path = Path(run)
    if (path / RECORD / "run.json").is_file():
        return path
    beside = sorted(folder.parent.parent for folder in (path.parent / f"{path.name}.runs").glob("*/record/run.json"))
    if len(beside) == 1:
        return beside[0]
    if beside:
        names = ", ".join(str(folder) for folder in beside)
        raise LoadError(f"several runs write into {path}: give one of {names}")
    around = [folder.parent.parent for folder in path.parent.glob("*/record/run.json")] if path.parent.is_dir() else []
    advice = f". {nearest(path.name, [folder.name for folder in around])}" if around else ""
    raise LoadError(f"{path} holds no run: there is no {RECORD}/run.json in it{advice}")


def _tables(rows: Path) -> Iterator[TableStatus]:
    for path in sorted(rows.rglob(f"*{ENDING}")):
        folder = ShardFolder(path)
        plan = folder.read_plan()
        if plan is None:
            continue
        shards = [Shard(number, *entry) for number, entry in enumerate(plan["shards"])]
        items = plan["depends"]["items"]
        there = {entry.name for entry in path.iterdir()}
        done = [shard for shard in shards if folder.file(shard.number).name in there and folder.is_done(shard)]
        left = {shard.number for shard in shards} - {shard.number for shard in done}
        begun = sum(len(shard.items) for shard in done)
        failed: dict[str, str] = {}
        for name in there:
            number = int(name.partition(".")[0]) if name.partition(".")[0].isdigit() else -1
            if number in left and name.endswith(".journal"):
                begun += _lines(path / name)
            elif number in left and name == folder.failures(number).name:
                noted = RunFolder.read(path / name) or {}
                failed |= {key: entry["error"] for key, entry in noted.items()}
        held = leases.at_work(folder.lease(number) for number in left if folder.lease(number).name in there)
        ages = {int(lease.name.partition(".")[0]): _age(lease) for lease in held}
        table = path.relative_to(rows).as_posix().removesuffix(ENDING)
        yield TableStatus(table, len(shards), len(done), items, min(begun, items), dict(sorted(ages.items())), failed)


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:  # its shard has come to its end
        return 0


def _age(lease: Path) -> float:
    """Seconds since a lease's last sign of life, by this machine's clock."""
    try:
        return max(0.0, time.time() - lease.stat().st_mtime)
    except FileNotFoundError:
        return 0.0
