"""Jobs to try a launcher with: small, and of a module that every process can import."""

from __future__ import annotations

import time


def timed(number: int, seconds: float) -> tuple[int, float, float]:
    """The number, and when the job began and ended."""
    began = time.time()
    time.sleep(seconds)
    return number, began, time.time()


def failing() -> None:
    """Raise an error that a launcher must tell of."""
    raise ArithmeticError("raised by the conformance kit")
