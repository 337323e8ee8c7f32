"""Being asked to stop: SIGTERM, SIGUSR1 and SIGUSR2 let the item at hand be finished, then the process ends with a code
that means "start me again".

Schedulers send them before a time limit or when another job needs the place. Between two items nothing is at hand, and
the process ends at once; so it does at a second signal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = 75
"""The exit status of a process that was asked to stop and has work left: EX_TEMPFAIL of sysexits.h."""
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class Stop(SystemExit):
    """The process was asked to stop; what is done is kept."""

    def __init__(self, name: str) -> None:
        super().__init__(REQUEUE)
        self.signal = name

    def __str__(self) -> str:
        return f"stopped by {self.signal}"


_busy = False
_asked = ""


@contextmanager
def stoppable() -> Iterator[None]:
    """For a while, signals that ask to stop do it as this module says. Nothing changes in threads but the main one."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        _asked = ""
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def item() -> Iterator[None]:
    """One item of work, which is finished before the process stops.

    Raises:
        Stop: the process was asked to, meanwhile.
    """
    global _busy
    before, _busy = _busy, True
    try:
        yield
    finally:
        _busy = before
    if _asked and not before:
        raise Stop(_asked)


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    name = signal.Signals(number).name
    if _busy and not _asked:
        _asked = name
        return
    raise Stop(name)
