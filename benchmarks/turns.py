"""Calls that are timed against each other: they take turns, so that what else the machine does meets them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def shortest(rounds: int, *calls: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each call, the least of so many rounds.

    Args:
        clock: `time.process_time` counts what this process works, whatever else the machine does.
    """
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = clock()
            call()
            best[i] = min(best[i], clock() - start)
    return best
