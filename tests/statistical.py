"""Random samples for the statistics, drawn by `random.random`, whose numbers stay the same over versions of Python.

`scripts/stats_reference.py` computes what scipy says of them, tests/test_stats.py what `interp_core.stats` does. Neither
imports the other's library, so that the project does not depend on scipy, not even in its tests.
"""

from __future__ import annotations

import math
import random
from typing import Any

ALTERNATIVES = ("two-sided", "greater", "less")
RESAMPLES = 500


class Source:
    """Numbers of a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def below(self, n: int, start: int = 0) -> int:
        """A whole number from start to below n."""
        return start + int(self.random() * (n - start))

    def normal(self) -> float:
        return sum(self.random() for _ in range(12)) - 6

    def skewed(self) -> float:
        return -math.log(1 - self.random())

    def sample(self, n: int) -> list[float]:
        """So many numbers: normal, skewed, whole (with many ties), or of both signs with zeros."""
        kind = self.below(4)
        if kind < 2:
            return [self.skewed() if kind else self.normal() for _ in range(n)]
        if kind == 2:
            return [float(self.below(max(2, n // 2))) for _ in range(n)]
        return [float((-2, -1, 0, 0, 1, 3)[self.below(6)]) for _ in range(n)]


def pairs() -> list[dict[str, Any]]:
    """Two sides of a correlation, and of a ROC curve: 240 of 2 to 40 samples."""
    source, cases = Source(1), []
    for number in range(240):
        n = source.below(9, 2) if number % 2 else source.below(41, 9)
        x, noise = source.sample(n), source.sample(n)
        y = noise if source.random() < 0.5 else [a + b for a, b in zip(x, noise, strict=True)]
        labels = [0, 1, *(source.below(2) for _ in range(n - 2))]
        cases.append({"x": x, "y": y, "labels": labels})
    return cases


def tests() -> list[dict[str, Any]]:
    """Small samples, whose arrangements can all be gone through: 150."""
    source, cases = Source(2), []
    for number in range(150):
        n, m = source.below(7, 2), source.below(6, 2)
        first, second, other = source.sample(n), source.sample(m), source.sample(n)
        cases.append({"first": first, "second": second, "other": other, "alternative": ALTERNATIVES[number % 3]})
    return cases


def shares() -> list[dict[str, Any]]:
    """Hits out of n, at levels: 120."""
    source, levels = Source(3), (0.8, 0.95, 0.99)
    sizes = [source.below(60, 1) for _ in range(120)]
    return [
        {"hits": (0, n, source.below(n + 1))[source.below(3)], "n": n, "level": levels[i % 3]}
        for i, n in enumerate(sizes)
    ]


def families() -> list[list[float]]:
    """p-values of many tests, some of them equal: 60."""
    source = Source(4)
    return [[round(source.random() ** 3, 2) for _ in range(source.below(30, 1))] for _ in range(60)]


def resampled() -> list[dict[str, Any]]:
    """Samples to be drawn again by a seed: 30 of 4 to 30 samples."""
    source, cases = Source(5), []
    for number in range(30):
        n = source.below(31, 4)
        x = [source.skewed() if number % 2 else 1 + 2 * source.normal() for _ in range(n)]
        y = [a + source.normal() for a in x]
        cases.append({"x": x, "y": y, "seed": number, "level": (0.9, 0.95)[number % 3 == 0]})
    return cases
