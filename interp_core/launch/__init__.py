"""Launchers run jobs: calls that do not depend on each other. Found by entry points, like every plugin.

outcomes = make_launcher("local", cap=2).run([Job(work, (0,)), Job(work, (1,))])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..errors import PluginError
from ..plugins import name_fault, registry

__all__ = ["AGAIN", "Job", "Launcher", "Outcome", "make_launcher"]

AGAIN = 75
"""The exit status of a job that was asked to stop and has work left; launchers that can start it again do."""


@dataclass(frozen=True)
class Job:
    """One call; `call` and `args` must be picklable (a function of a module, plain data)."""

    call: Callable[..., Any]
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its value, or why there is none.

    Attributes:
        value: what the call returned.
        error: its traceback, or how its process ended; empty if it returned.
    """

    value: Any = None
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the call returned."""
        return not self.error


@runtime_checkable
class Launcher(Protocol):
    """Runs jobs somewhere. Made with options of its own, all with defaults.

    Attributes:
        name: as registered.
    """

    name: str

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run all jobs and wait; one outcome per job, in their order. A job that fails does not stop the others.

        Raises:
            PlanError: a job that cannot be sent; before any has begun.
        """


def make_launcher(name: str, **options: Any) -> Launcher:
    """A launcher of that name.

    Raises:
        PluginError: unknown, broken, or options that it does not have.
    """
    kind = registry("launchers").get(name)
    try:
        launcher: Launcher = kind(**options)
    except TypeError as error:
        raise PluginError(f"launcher {name!r} cannot be made with {options}: {error}") from error
    return launcher


def fault(name: str, value: Any) -> str:
    """What is wrong with an imported value as a launcher of this name."""
    if not (isinstance(value, type) and callable(getattr(value, "run", None))):
        return f"is {value!r:.60}, not a launcher: a class with `run` (interp_core.launch.Launcher)"
    return name_fault(name, value)
