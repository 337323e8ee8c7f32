"""Rows of many items, made by every process that is at work on a run, shard by shard; see `Folder.map`."""

from __future__ import annotations

import errno
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..errors import ItemError, PlanError, first_line
from ..files import write
from ..progress import Progress
from . import stopping
from .identity import digest, plain
from .journals import Journal, Row
from .shards import ENDING, Group, Plan, Shard, ShardFolder, units_of
from .stages import Stages, csv_text, json_lines, json_text

Made = Mapping[str, Any] | Sequence[Any]
"""A row, or rows; of several items, as many of these."""
Beside = Callable[[Any, list[Row]], Iterable[str]] | None
"""Files that an item's work writes beside its rows, by both."""
POLL = 0.2
"""Seconds between two looks at what others do."""
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""Errors of the system that every other item would meet too."""


SHARE: ContextVar[frozenset[int] | None] = ContextVar("share", default=None)
"""Numbers of the shards that this process works at; None: any that nobody else has, until all are done."""


class Left(SystemExit):
    """This process has done its share, and other shards are left to others."""

    def __init__(self, text: str) -> None:
        super().__init__(0)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Table:
    """Rows of a run's items, and this process's work on them.

    Attributes:
        folder: where the rows' file goes.
        file: whether there is one.
        place: where shards are.
    """

    def __init__(
        self, folder: Stages, name: str, inputs: Mapping[str, Any] | None, strict: bool, beside: Beside, file: bool
    ) -> None:
        if file and Path(name).suffix not in (".jsonl", ".csv"):
            raise PlanError(f"rows are written as .jsonl or .csv, not as {name}")
        self.inputs: Row = plain(dict(inputs or {}), "inputs")
        if self.inputs and not file:  # no file of this name can be taken for that of other inputs
            name = f"{name}-{digest(self.inputs)[:8]}"
        self.folder, self.name, self.strict, self.beside, self.file = folder, name, strict, beside, file
        self.root = folder.root
        self.place = ShardFolder(self.root.record / "rows" / folder.prefix / f"{name}{ENDING}")

    def map(
        self,
        make: Callable[[Any], Made],
        items: list[Any],
        by: Callable[[Any], str | int],
        batch: int | None,
        alike: Callable[[Any], Any] | None,
    ) -> list[Row]:
        """See `Folder.map`."""
        if self.file:
            self.folder.last = self.name
        keys = [by(item) for item in items]
        if len(set(keys)) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise PlanError(f"{self.name}: two items are called {twice!r}; their rows are told apart by it")
        if self.file:
            self.folder.claim([self.name])
        self.root.begin_change()
        depends = {**self.root.depends(), "inputs": self.inputs}
        self.plan = self.place.enter(Plan.of(depends, keys, units_of(items, batch, alike), self.root.shards or 1))
        self.items, self.keys = items, keys
        self.found_failed = {s.number: _stamp(self.place.failures(s.number)) for s in self.plan.shards}
        every: dict[str | int, list[Row]] = {}
        with Progress(self.name, len(items)) as told:

            def made(numbers: range) -> list[Group]:
                some = [items[number] for number in numbers]
                values = make(some) if batch else [make(some[0])]
                if len(values) != len(some):
                    raise PlanError(f"{self.name}: {len(some)} items were to be made, and rows of {len(values)} came")
                return [self._group(keys[n], value) for n, value in zip(numbers, values, strict=True)]

            for groups in self._turns(made, told):
                every |= {key: rows for key, *rows in groups}
        self.place.sweep()
        rows = [row for key in keys for row in every[key]]
        if self.file:
            text = csv_text(rows) if self.name.endswith(".csv") else json_lines(rows)
            self.folder.put({self.name: text}, stage=self.name, inputs=self.inputs)
        return rows

    def _group(self, key: str | int, made: Any) -> Group:
        """An item's rows as they are kept."""
        rows = [made] if isinstance(made, Mapping) else list(made)
        return [key, *(plain(dict(row), f"a row of {self.name}") for row in rows)]

    def _turns(self, made: Callable[[range], list[Group]], told: Progress) -> Iterator[list[Group]]:
        """Groups of every shard when it is done, by this process or another.

        Raises:
            ItemError: all has been tried, and items raised errors.
            Left: this process has done its share.
            PlanError: it may do none, and some are missing.
        """
        share = SHARE.get()
        failed: dict[Any, str] = {}
        left = list(self.plan.shards)
        waited = False
        while left:
            before, todo = len(left), left
            left = []
            for shard in todo:
                if (groups := self._whole(shard)) is not None:
                    told.add(len(shard.items))
                    yield groups
                elif not self._may_try(shard, failed):
                    continue
                elif (share is None or shard.number in share) and self.root.leases.take(self._lease(shard)):
                    try:
                        groups = self._whole(shard)  # another process may have done it just now
                        if groups is None:
                            groups = self._work(shard, made, told, failed)
                    finally:
                        self.root.leases.give_back(self._lease(shard))
                    if groups is not None:
                        yield groups
                else:
                    left.append(shard)
            if share is not None and not any(shard.number in share for shard in left) and left:
                self._leave(left, share)
            if left and len(left) == before:
                if not waited:
                    self.root.say(f"  waits for {_numbers(left)} of {self.name}, at which others work")
                    waited = True
                time.sleep(POLL)
        if failed:
            self._tell(failed)

    def _leave(self, left: Sequence[Shard], share: frozenset[int]) -> None:
        if not share:
            raise PlanError(
                f"{_numbers(left)} of {len(self.plan.shards)} of {self.name} are not done; interp resume "
                f"{self.root.record.parent} does them"
            )
        raise Left(f"this share of {self.name} is done; {_numbers(left)} are left to others")

    def _lease(self, shard: Shard) -> Path:
        return self.place.lease(shard.number)

    def _whole(self, shard: Shard) -> list[Group] | None:
        """Groups of a shard that is done. Of one whose file, or a file beside it, is not as it was written, what is
        lost is made again, and that is said."""
        groups = self.place.groups(shard)
        if groups is None and self.place.is_done(shard):
            self.root.say(f"  shard {shard.number} of {self.name} is made again: its file is not as it was written")
            self.place.file(shard.number).unlink(missing_ok=True)
        if groups is None or self.beside is None:
            return groups
        kept = [g for g, n in zip(groups, shard.items, strict=True) if self._has_files(n, g)]
        if len(kept) == len(groups):
            return groups
        self.root.say(f"  {len(groups) - len(kept)} of {self.name} are made again: files are not as they were written")
        journal = Journal(self.place.journal(shard.number, self.root.session.id))
        for group in kept:
            journal.append(group)
        journal.close()
        self.place.file(shard.number).unlink(missing_ok=True)
        return None

    def _has_files(self, number: int, group: Group) -> bool:
        """Whether the files are there that the item's work wrote beside its rows."""
        return self.beside is None or all(map(self.folder.has_made, self.beside(self.items[number], group[1:])))

    def _may_try(self, shard: Shard, failed: dict[Any, str]) -> bool:
        """Whether a shard is to be worked at: neither this process nor, since it began, another found that items of it
        raise errors. If one did, these are noted."""
        file = self.place.failures(shard.number)
        stamp = _stamp(file)
        if stamp == self.found_failed[shard.number]:
            return True
        noted = self.root.read(file)
        if noted is None:  # another process has mended it
            return True
        failed |= {key: entry["error"] for key, entry in noted.items()}
        return False

    def _work(
        self, shard: Shard, made: Callable[[range], list[Group]], told: Progress, failed: dict[Any, str]
    ) -> list[Group] | None:
        """Make what is missing of a shard, and its file; None if items fail, which are noted."""
        numbers = {self.keys[number]: number for number in shard.items}
        begun = self.place.begun(shard)
        groups = {key: g for key, g in begun.items() if key in numbers and self._has_files(numbers[key], g)}
        failures: dict[Any, dict[str, str]] = {}
        journal: Journal | None = None
        try:
            for unit in self.plan.units_of(shard):
                if all(self.keys[n] in groups for n in unit):
                    told.add(len(unit))
                    continue
                with stopping.item(), self.root.item():
                    try:
                        new = made(unit)
                    except Exception as error:
                        self._demand_noted(error)
                        failures |= {self.keys[n]: _noted(error) for n in unit}
                        self._say_failed(self.keys[unit[0]], len(unit), error)
                    else:
                        if journal is None:
                            journal = Journal(self.place.journal(shard.number, self.root.session.id))
                        for group in new:
                            journal.append(group)
                            groups[group[0]] = group
                told.add(len(unit))
        finally:
            if journal is not None:
                journal.close(sync=len(groups) < len(numbers))  # else the shard's file is what lasts
        if failures:
            write(self.place.failures(shard.number), json_text({str(key): noted for key, noted in failures.items()}))
            failed |= {key: noted["error"] for key, noted in failures.items()}
            return None
        whole = [groups[self.keys[number]] for number in shard.items]
        self.place.publish(shard, whole)
        return whole

    def _demand_noted(self, error: Exception) -> None:
        """Raise an error again that is not an item's own."""
        if self.strict or (isinstance(error, OSError) and error.errno in OF_THE_DISK):
            raise error

    def _say_failed(self, key: Any, count: int, error: Exception) -> None:
        more = f" and {count - 1} more of its batch" if count > 1 else ""
        sys.stderr.write(f"  {key!r}{more} failed: {type(error).__name__}: {first_line(error)}\n")

    def _tell(self, failed: Mapping[Any, str]) -> None:
        first = next(iter(failed))
        rest = "" if len(failed) == 1 else f" and {len(failed) - 1} more"
        raise ItemError(
            f"{len(failed)} of {len(self.keys)} items of {self.name} raised errors: {first!r} "
            f"({failed[first]}){rest}. Tracebacks are in {self.place.path}/*.failed.json; the other items are done, "
            "and the same command tries these again"
        )


def _noted(error: Exception) -> dict[str, str]:
    trace = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {first_line(error)}", "traceback": trace}


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that stood there before."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_ino


def _numbers(shards: Sequence[Shard]) -> str:
    """Shards by their numbers: "shards 3, 4 and 17 more"."""
    shown = ", ".join(str(shard.number) for shard in shards[:5])
    more = f" and {len(shards) - 5} more" if len(shards) > 5 else ""
    return f"shard{'s' if len(shards) > 1 else ''} {shown}{more}"


@contextmanager
def sharing(share: frozenset[int] | None) -> Iterator[None]:
    """For a while, this is the process's share."""
    token = SHARE.set(share)
    try:
        yield
    finally:
        SHARE.reset(token)
