"""Samples for probes, drawn by `random.random`, whose numbers stay the same over versions of Python.

`scripts/probe_reference.py` computes what scikit-learn says of them, tests/test_probe_decoders.py what the plugin does.
Neither imports the other's library.
"""

from __future__ import annotations

from typing import Any

from statistical import Source

CASES = [(40, 6, 3, 0.01), (40, 60, 3, 1.0), (60, 20, 6, 100.0), (60, 100, 10, 1e-4)]
"""Samples, numbers of a state, one in how many is of the second class, and C."""


def case(number: int) -> dict[str, Any]:
    """States `x`, labels, states to predict, and C; labels lie along the first number, with noise."""
    n, d, odd, c = CASES[number]
    source = Source(number)
    labels = [int(i % odd == 0) for i in range(n)]
    x = [[source.normal() + (0.8 * label if k == 0 else 0) for k in range(d)] for label in labels]
    return {"x": x, "labels": labels, "other": [[source.normal() for _ in range(d)] for _ in range(5)], "c": c}
