"""Calls that are timed against each other: they take turns, so that what else the machine does meets them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def shortest(rounds: int, *calls: Callable[[], Any]) -> list[float]:
    """Seconds of each call, the least of so many rounds."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
