"""Leases: files that say which process is at work on what, so that no other begins the same.

A lease is for speed alone. Two processes that both believe to have one do the same work twice, and what they write
stays right: each writes files of its own, and the first whole one is kept.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import create, host, is_running

SECONDS = 60.0
"""After so long without a sign of life, the process of a lease counts as gone. Its clock is not asked: whoever waits
looks whether the file's time changes."""
BEATS = 6
"""Signs of life in that time."""


class Leases:
    """What one process has leased of a run.

    Args:
        owner: its session.
        seconds: after which a process without a sign of life counts as gone.
        file: of the session, whose time changes as those of leases do.
    """

    def __init__(self, owner: str, seconds: float = SECONDS, file: Path | None = None) -> None:
        self.owner, self.seconds, self.file = owner, seconds, file
        self._held: set[Path] = set()
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
        self._over = threading.Event()
        self._heart: threading.Thread | None = None
        if file is not None:
            self._begin()

    def take(self, path: Path) -> bool:
        """Take a lease if nobody has it, or one whose process is gone. Whether this process has it now."""
        if path in self._held:
            return True
        text = json.dumps({"session": self.owner, "host": host(), "pid": os.getpid()})
        if not create(path, text, lasting=False) and not (self._break(path) and create(path, text, lasting=False)):
            return False
        self._held.add(path)
        self._begin()
        return True

    def _begin(self) -> None:
        """Give signs of life from now on."""
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, daemon=True)
            self._heart.start()

    def has(self, path: Path) -> bool:
        """Whether this process has a lease."""
        return path in self._held

    def give_back(self, path: Path) -> None:
        """End a lease, if this process has it."""
        if path in self._held:
            self._held.discard(path)
            if (holder(path) or {}).get("session") == self.owner:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """End all leases."""
        self._over.set()
        for path in list(self._held):
            with suppress(OSError):
                self.give_back(path)

    def _break(self, path: Path) -> bool:
        """Take a lease out of the way whose process is gone; whether it is."""
        try:
            sign = _sign(path)
        except FileNotFoundError:
            return True
        held = holder(path)
        if held is None or is_running(held["host"], held["pid"]):
            before = self._seen.get(path)
            if before is None or before[0] != sign:
                self._seen[path] = sign, time.monotonic()
                return False
            if time.monotonic() - before[1] < self.seconds:
                return False
        aside = path.with_name(f".{path.name}.{host()}-{os.getpid()}-{threading.get_ident()}.tmp")
        with suppress(FileNotFoundError):  # another process was first
            os.rename(path, aside)
            if _sign(aside) != sign:  # which took it meanwhile
                with suppress(FileExistsError):
                    os.link(aside, path)
            aside.unlink()
        return not path.exists()

    def _beat(self) -> None:
        while not self._over.wait(self.seconds / BEATS):
            for path in (*list(self._held), *([self.file] if self.file else [])):
                with suppress(OSError):
                    os.utime(path)


def holder(path: Path) -> dict[str, Any] | None:
    """Session, machine and process of a lease; None where there is none that can be read."""
    with suppress(OSError, ValueError):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and {"session", "host", "pid"} <= set(data):
            return data
    return None


def at_work(paths: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """Leases whose process may be at work, as their files tell: its machine's is known to run or cannot be asked."""
    held = ((path, holder(path)) for path in paths)
    return {path: of for path, of in held if of is not None and is_running(of["host"], of["pid"])}


def _sign(path: Path) -> tuple[int, int]:
    """What changes with every sign of life, and with the holder."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ino
