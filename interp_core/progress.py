"""How far long work is, as a line on standard error.

    with ic.Progress("texts", len(texts)) as progress:
        for text in texts:
            …
            progress.add()

From three seconds on every work says where it stands, asked or not: nothing long is silent. Work that runs inside of
other work stands behind it in the same line: `attribution_eval 3 of 20, … · integrated_gradients, gradients 64 of 160`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["Progress"]

SILENT = 3.0
"""Seconds after which work says where it stands, though nobody asked."""
EVERY = 1.0
"""Seconds between two lines."""
EVERY_SHOWN = 0.1
"""The same, of work that is shown from its beginning."""
hushed = False
"""Whether work says where it stands only if it was asked to: on a command line with `-q`, or into a file."""
clock: Callable[[], float] = time.monotonic

_INNERMOST: ContextVar[Progress | None] = ContextVar("innermost", default=None)


@contextmanager
def hushing(quiet: bool) -> Iterator[None]:
    """For a while, `hushed` is this."""
    global hushed
    before, hushed = hushed, quiet
    try:
        yield
    finally:
        hushed = before


@contextmanager
def stopping(said: Callable[[], str]) -> Iterator[None]:
    """For a while, Ctrl-C says this: how far work came, what is kept of it, how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(said())
        raise


_LINE: list[Progress] = []
"""The work whose line stands on the terminal, if any."""


class _Above:
    """Standard output of a terminal on which a line says how far work is: what is written wipes that out first."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> Any:
        """Write the text where the line was; it is drawn again below."""
        for work in _LINE:
            sys.stderr.write(f"\r{'':{work._width}}\r")
            sys.stderr.flush()
            work._width = 0
        _LINE.clear()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def above() -> Iterator[None]:
    """For a while, what is printed on a terminal stands above the line, not behind it."""
    stream = sys.stdout
    if stream.isatty() and sys.stderr.isatty():
        sys.stdout = _Above(stream)
    try:
        yield
    finally:
        sys.stdout = stream


class Progress:
    """How much of some work is done, how fast, and how long the rest will take.

    Attributes:
        what: the work, in a few words.
        total: how much there is of it; None where nobody knows, 0 where it is one piece.
        count: how much is done.
    """

    def __init__(self, what: str, total: int | None = None, *, shown: bool = False) -> None:
        """Work that begins when it is entered by `with`.

        Args:
            shown: from the beginning, not from three seconds on.
        """
        self.what, self.total, self.shown, self.count = what, total, shown, 0
        self._began, self._drawn, self._width = clock(), float("-inf"), 0
        self._outer: Progress | None = None
        self._inner: Progress | None = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Progress:
        self._began, self._outer = clock(), _INNERMOST.get()
        _INNERMOST.set(self)
        if self._outer is not None:
            self._outer._inner = self
            first = self._first()
            if self.total == 0 and first._drawn > float("-inf"):  # one piece has no `add` that would say it
                first._draw()
        elif self.shown or not hushed:  # what does not come to its first `add` is not silent either
            self._timer = threading.Timer(SILENT, self._draw)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        _INNERMOST.set(self._outer)
        if self._outer is not None:
            self._outer._inner = None
        if self._timer is not None:
            self._timer.cancel()
            # It may be drawing now, and nothing may follow the end of the line.
            self._timer.join()
        if self._width:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._width = 0
        if self in _LINE:
            _LINE.clear()

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        if not count:
            return
        self.count += count
        first, now = self._first(), clock()
        if not self.shown and (hushed or now - first._began < SILENT):
            return
        last = self.count == self.total and (self.shown or self is first)
        if last or now - first._drawn >= (EVERY_SHOWN if self.shown else EVERY):
            first._draw()

    def _first(self) -> Progress:
        """The outermost work, whose line it is."""
        return self if self._outer is None else self._outer._first()

    def _draw(self) -> None:
        """Write the line over the one before."""
        self._drawn = clock()
        line = self._line()
        sys.stderr.write(f"\r{line:<{self._width}}")
        sys.stderr.flush()
        self._width = len(line)
        _LINE[:] = [self]

    def _line(self) -> str:
        """Where this work stands, and what runs inside of it."""
        own = self.what
        if self.total != 0:
            own += f" {self.count:,}" + ("" if self.total is None else f" of {self.total:,}")
        took = clock() - self._began
        if self.total != 0 and self.count and took > 0:
            rate = self.count / took
            own += f", {rate:,.0f} per second" if rate >= 1 else f", {1 / rate:,.1f} s each"
            own += "" if self.total is None else f", {(self.total - self.count) / rate:,.0f} s left"
        inner = self._inner
        return own if inner is None else f"{own} · {inner._line()}"
