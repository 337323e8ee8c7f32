"""What launchers share whose jobs go to other machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import PlanError, first_line
from . import Job


def at_least(low: int, **options: float | None) -> None:
    """Refuse options below a number; None is one that was not said.

    Raises:
        PlanError: one is less.
    """
    for option, number in options.items():
        if number is not None and number < low:
            raise PlanError(f"{option}={number}: it must be at least {low}")


def packed(jobs: Iterable[Job], dumps: Callable[[Job], bytes]) -> list[bytes]:
    """Jobs as bytes, with their functions where these are of the script that is running.

    Raises:
        PlanError: one that cannot be.
    """
    calls = []
    for i, job in enumerate(jobs):
        try:
            calls.append(dumps(job))
        except Exception as error:  # pickle raises many kinds
            what = getattr(job.call, "__qualname__", repr(job.call))
            raise PlanError(f"job {i} ({what}) cannot be sent to another machine: {first_line(error)}") from error
    return calls
