"""Shards of a table of rows: fixed slices of its items, each worked at by one process, each whole in a file of its own.

    record/rows/{table}.shards/
        plan.json                       what there is to do: items, and of each shard its slice and digest
        00012.lease                     who is at work on it
        00012.{session}.journal         rows of a process that has not come to the shard's end
        00012.failed.json               items that raised an error, each with its traceback
        00012.jsonl                     all rows of the shard, below a line with their digest; then the others go

What is done is told by these files alone. A journal has one writer, and of two processes only the first can make a
shard's file: so it does not matter when a process dies, or whether two are at work on the same shard.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import LoadError, PlanError
from ..files import create, sha256, write
from . import journals
from .identity import difference, digest

Group = list[Any]
"""What is kept of an item: its key, then its rows."""
FORMAT = "interp-shards/1"
ENDING = ".shards"
PLAN = "plan.json"


@dataclass(frozen=True)
class Shard:
    """A slice of the items.

    Attributes:
        number: among the shards of its table.
        start, stop: its items.
        hash: of what its rows depend on: the run, the table, its items.
    """

    number: int
    start: int
    stop: int
    hash: str

    @property
    def items(self) -> range:
        """Numbers of its items."""
        return range(self.start, self.stop)


@dataclass(frozen=True)
class Plan:
    """What there is to do for a table of rows.

    Attributes:
        depends: what all rows depend on, part by part, as digests and plain data.
        keys: one per item.
        units: items that are made together, which depend neither on shards nor on what is done already: so neither do
            numbers that depend on who is in a batch.
        shards: whole units each.
    """

    depends: Mapping[str, Any]
    keys: Sequence[Any]
    units: Sequence[range]
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, depends: Mapping[str, Any], keys: Sequence[Any], units: Sequence[range], count: int) -> Plan:
        """At most `count` slices of nearly equally many units."""
        count = min(count, len(units))
        cuts = [number * len(units) // count for number in range(count + 1)] if count else [0]
        about = digest(depends)
        shards = []
        for number, (first, last) in enumerate(pairwise(cuts)):
            start, stop = units[first].start, units[last - 1].stop
            shards.append(Shard(number, start, stop, digest([about, list(keys[start:stop])])))
        return cls(depends, keys, units, tuple(shards))

    def units_of(self, shard: Shard) -> list[range]:
        """The units of a shard; its part of them, where it was planned when batches had another size."""
        first = bisect_right(self.units, shard.start, key=lambda unit: unit.start) - 1
        last = bisect_left(self.units, shard.stop, key=lambda unit: unit.start)
        return [range(max(u.start, shard.start), min(u.stop, shard.stop)) for u in self.units[first:last]]

    def record(self) -> dict[str, Any]:
        """The plan as its file has it."""
        shards = [[shard.start, shard.stop, shard.hash] for shard in self.shards]
        noted = {"items": len(self.keys), "keys": digest(list(self.keys))}
        return {"format": FORMAT, "depends": {**self.depends, **noted}, "shards": shards}


def units_of(items: Sequence[Any], batch: int | None, alike: Callable[[Any], Any] | None) -> list[range]:
    """Numbers of items that go together: up to `batch` neighbours, of one kind where `alike` tells kinds apart."""
    units: list[range] = []
    for number, item in enumerate(items):
        last = units[-1] if units else range(0)
        room = bool(units) and len(last) < (batch or 1)
        if room and (alike is None or alike(items[last.start]) == alike(item)):
            units[-1] = range(last.start, number + 1)
        else:
            units.append(range(number, number + 1))
    return units


class ShardFolder:
    """The files of a table's shards.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_plan(self) -> dict[str, Any] | None:
        """The plan's record; None where there is none.

        Raises:
            LoadError: it is damaged.
        """
        file = self.path / PLAN
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            assert record["format"] == FORMAT and isinstance(record["shards"], list)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise LoadError(f"{file} is damaged ({error}); delete {self.path}, and its rows are made again") from error
        return dict(record)

    def enter(self, plan: Plan) -> Plan:
        """Make this the plan, or hold it against the one that is there, whose shards are kept.

        Raises:
            PlanError: rows that are there are of another plan; says what differs.
        """
        text = json.dumps(plan.record())
        if create(self.path / PLAN, text):
            return plan
        there = self.read_plan()
        if there is None:
            return self.enter(plan)
        noted = plan.record()["depends"]
        differs = difference(there["depends"], noted)
        if differs and not self.has_rows():
            write(self.path / PLAN, text)
            return plan
        if differs:
            raise PlanError(
                f"{self.path} holds rows of another plan: {differs}; delete that folder, or give the run another one"
            )
        shards = [Shard(number, *entry) for number, entry in enumerate(there["shards"])]
        return Plan(plan.depends, plan.keys, plan.units, tuple(shards))

    def has_rows(self) -> bool:
        """Whether anything was done."""
        return any(self.path.glob("*.jsonl")) or any(self.path.glob("*.journal"))

    # One shard

    def lease(self, number: int) -> Path:
        """The file that says who is at work on a shard."""
        return self.path / f"{number:05}.lease"

    def journal(self, number: int, session: str) -> Path:
        """The file of a process's rows of a shard."""
        return self.path / f"{number:05}.{session}.journal"

    def failures(self, number: int) -> Path:
        """The file of a shard's items that raised errors."""
        return self.path / f"{number:05}.failed.json"

    def file(self, number: int) -> Path:
        """The file of a shard that is done."""
        return self.path / f"{number:05}.jsonl"

    def is_done(self, shard: Shard) -> bool:
        """Whether a shard's file is there, and of this plan by its first line; what is below `groups` looks at."""
        try:
            with self.file(shard.number).open("rb") as file:
                head = json.loads(file.readline())
            return bool(head["hash"] == shard.hash)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def publish(self, shard: Shard, groups: Sequence[Group]) -> None:
        """Write a shard's file, unless another process was first, and delete what led to it."""
        body = b"".join(journals.line_of(group) for group in groups)
        head = {"shard": shard.number, "hash": shard.hash, "items": len(groups), "sha256": sha256(body)}
        path = self.file(shard.number)
        data = (json.dumps(head) + "\n").encode() + body
        if not create(path, data) and not self.is_done(shard):
            write(path, data)
        self.sweep(f"{shard.number:05}.")

    def sweep(self, start: str = "") -> None:
        """Delete what is of no use beside the files of shards that are done, of names that start so."""
        for path in self.path.glob(f"{start}*"):
            if path.name.endswith((".journal", ".failed.json", ".lease")):
                path.unlink(missing_ok=True)

    def groups(self, shard: Shard) -> list[Group] | None:
        """Groups of a shard that is done; None if it is not, or its file is not as it was written."""
        try:
            head, _, body = self.file(shard.number).read_bytes().partition(b"\n")
            noted = json.loads(head)
            if noted["hash"] != shard.hash or noted["sha256"] != sha256(body):
                return None
            return [json.loads(line) for line in body.splitlines()]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begun(self, shard: Shard) -> dict[str | int, Group]:
        """Groups of a shard that is not done, by their keys, of whatever process.

        Raises:
            LoadError: a journal is damaged.
        """
        groups: dict[str | int, Group] = {}
        for path in sorted(self.path.glob(f"{shard.number:05}.*.journal")):
            try:
                listed, _ = journals.read(path)
            except FileNotFoundError:  # another process has come to the shard's end
                continue
            for group in listed:
                groups.setdefault(group[0], group)
        return groups
