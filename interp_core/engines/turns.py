"""Turns: what runs on some modules runs alone.

Hooks, the attention's config and replaced forwards belong to modules, not to a `Model` or an engine: two models of
one module, a part of it loaded by itself and its copies on other engines meet there. So modules that were ever loaded
together have one turn. It is re-entrant: another thread waits, and what one thread does inside its own run is told
apart by whether it would meet that run's hooks.

A thread that runs one model inside another's run holds two turns. Where that would leave threads waiting for each other
in a circle, the one that would close it is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import PlanError

PATIENCE = 0.05
"""Seconds after which a thread that waits looks again whether others wait for it."""
_TURNS: WeakKeyDictionary[nn.Module, Turn] = WeakKeyDictionary()
_WAITING: dict[int, Turn] = {}
"""By thread, the turn that it waits for."""
_GUARD = threading.Lock()
"""Held while the tables above are read or changed; never while waiting for a turn."""


class _Me(threading.local):
    """This thread's number, at the price of an attribute."""

    def __init__(self) -> None:
        self.number = threading.get_ident()


_ME = _Me()


class Turn:
    """The right to run on some modules; a context that holds it.

    Attributes:
        running: modules of the runs that go on in this thread, by path, the innermost last; for whoever holds it.
    """

    __slots__ = ("_depth", "_into", "_joined", "_lock", "_owner", "running")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._into: Turn = self
        self._joined = [self]
        self._owner = self._depth = 0
        self.running: list[Mapping[str, nn.Module]] = []

    def __enter__(self) -> None:
        while True:
            turn = self._into
            if not turn._lock.acquire(False):
                turn._wait()
            if turn is self._into:
                break
            turn._lock.release()  # joined to another one meanwhile
        turn._owner = _ME.number
        turn._depth += 1

    def __exit__(self, *_: object) -> None:
        turn = self._into
        turn._depth -= 1
        turn._lock.release()

    def demand_idle(self, modules: Mapping[str, nn.Module]) -> None:
        """Refuse what would meet the hooks of a run that goes on.

        Raises:
            PlanError: one of the modules is part of it.
        """
        for others in self.running:
            if not {*map(id, others.values())}.isdisjoint(map(id, modules.values())):
                raise PlanError("the model is running: a run inside another run's edit would see its hooks")

    def _wait(self) -> None:
        """Wait until this thread has the turn.

        Raises:
            PlanError: whoever has it waits for what this thread has.
        """
        me = _ME.number
        try:
            while not self._lock.acquire(timeout=PATIENCE):
                with _GUARD:
                    _WAITING[me] = self
                    if self._in_circle(me):
                        del _WAITING[me]
                        raise PlanError(
                            "two threads would wait for each other: this one runs a model inside a run of another "
                            "model, a second thread does so the other way round; nest them in one order"
                        )
        finally:
            _WAITING.pop(me, None)

    def _in_circle(self, me: int) -> bool:
        turn: Turn | None = self
        for _ in range(len(_WAITING) + 1):
            if turn is None or not turn._depth:
                return False
            if turn._owner == me:
                return True
            turn = _WAITING.get(turn._owner)
        return False

    def join(self, other: Turn) -> None:
        """Make both one, while this thread holds both: what it holds of the other it then holds of this one."""
        self.running += other.running
        for turn in other._joined:
            turn._into, turn.running = self, self.running
        self._joined += other._joined
        for _ in range(other._depth):
            self._lock.acquire()
            other._lock.release()
        self._depth, other._depth = self._depth + other._depth, 0


def turn_of(*models: nn.Module) -> Turn:
    """The one turn of all modules in these models, and of all that were loaded together with any of them."""
    with _GUARD:
        modules = list({id(module): module for model in models for module in model.modules()}.values())
        known = [_TURNS[module] for module in modules if module in _TURNS]
        first = known[0] if known else Turn()
        for module in modules:
            _TURNS.setdefault(module, first)
    for other in {id(turn): turn for turn in known}.values():
        if other._into is not first._into:
            with first, other:
                if other._into is not first._into:  # another thread may have joined them meanwhile
                    first._into.join(other._into)
    return first._into
