#!/usr/bin/env python
"""Write what scipy says of the samples in tests/statistical.py into tests/data/stats.json.

python scripts/stats_reference.py            # with numpy and scipy; nothing else of this project is needed
python scripts/stats_reference.py --check    # only say whether the file is still what scipy says
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy import stats

ROOT = Path(__file__).parent.parent
FILE = ROOT / "tests/data/stats.json"
sys.path.insert(0, str(ROOT / "tests"))

import statistical  # noqa: E402


def rounded(statistic: Callable[..., Any]) -> Callable[..., float]:
    """A statistic to ten decimals: what is equal but for rounding counts as equal, where scipy compares to the bit."""
    return lambda *data: round(float(statistic(*data)), 10)


def number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


def of_pair(case: dict[str, Any]) -> list[float | None]:
    """Pearson, Spearman, Kendall's tau-b, area under the ROC curve."""
    x, y, labels = np.array(case["x"]), np.array(case["y"]), np.array(case["labels"])
    positive, negative = x[labels == 1], x[labels == 0]
    area = stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
    numbers = stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0], stats.kendalltau(x, y)[0], area
    return [number(value) for value in numbers]


def of_test(case: dict[str, Any]) -> list[float | None]:
    """p of sign flips, of two groups, and of Pearson's, Spearman's and Kendall's correlation, all exact."""
    first, second, other = (np.array(case[key]) for key in ("first", "second", "other"))
    how = {"alternative": case["alternative"], "n_resamples": np.inf, "vectorized": False}

    def p(data: tuple[np.ndarray, ...], statistic: Any, kind: str) -> float | None:
        return number(stats.permutation_test(data, rounded(statistic), permutation_type=kind, **how).pvalue)

    p_values = [
        p((first,), np.mean, "samples"),
        p((first, second), lambda a, b: np.mean(a) - np.mean(b), "independent"),
    ]
    if min(np.ptp(first), np.ptp(other)) == 0:
        return [*p_values, None, None, None]
    kinds = (stats.pearsonr, stats.spearmanr, stats.kendalltau)
    return p_values + [p((other,), lambda b, of=of: of(first, b)[0], "pairings") for of in kinds]


def of_resamples(case: dict[str, Any]) -> list[list[float]]:
    """Intervals of the mean, the median and Pearson's correlation: percentile, then BCa; and the standard error."""
    x, y = np.array(case["x"]), np.array(case["y"])
    kinds = [((x,), np.mean), ((x,), np.median), ((x, y), lambda a, b: stats.pearsonr(a, b)[0])]
    intervals = []
    for data, statistic in kinds:
        for method in ("percentile", "BCa"):
            done = stats.bootstrap(
                data, rounded(statistic), method=method, confidence_level=case["level"],
                n_resamples=statistical.RESAMPLES, rng=np.random.default_rng(case["seed"]),
                paired=len(data) > 1, vectorized=False,
            )  # fmt: skip
            intervals.append([*map(float, done.confidence_interval), float(done.standard_error)])
    return intervals


def wilson(case: dict[str, Any]) -> list[float]:
    ends = stats.binomtest(case["hits"], case["n"]).proportion_ci(case["level"], method="wilson")
    return [float(ends.low), float(ends.high)]


def reference() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant sides, and gives NaN
        return {
            "scipy": scipy.__version__,
            "pairs": [of_pair(case) for case in statistical.pairs()],
            "tests": [of_test(case) for case in statistical.tests()],
            "shares": [wilson(case) for case in statistical.shares()],
            "families": [stats.false_discovery_control(p).tolist() for p in statistical.families()],
            "resampled": [of_resamples(case) for case in statistical.resampled()],
        }


def near(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    return a == b or (None not in (a, b) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12))


if __name__ == "__main__":
    computed = reference()
    if "--check" in sys.argv:
        kept = json.loads(FILE.read_text())
        wrong = [key for key in computed if key != "scipy" and not near(computed[key], kept[key])]
        sys.exit(f"{FILE.name} is not what scipy {scipy.__version__} says of {', '.join(wrong)}" if wrong else 0)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in computed.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
