"""What launchers share whose jobs go to other processes."""

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


def packed(
    jobs: Iterable[Job], dumps: Callable[[Job], bytes], where: str = "another machine", advice: str = ""
) -> list[bytes]:
    """Jobs as bytes.

    Args:
        where: they go, and what to do about one that cannot; for the message.

    Raises:
        PlanError: one that cannot be.
    """
    calls = []
    for i, job in enumerate(jobs):
        try:
            calls.append(dumps(job))
        except Exception as error:  # pickle raises many kinds
            what = getattr(job.call, "__qualname__", repr(job.call))
            raise PlanError(f"job {i} ({what}) cannot be sent to {where}: {first_line(error)}{advice}") from error
    return calls
