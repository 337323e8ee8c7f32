"""Statistics of results: intervals, tests, correlations, corrections for many tests.

    from interp_core import stats

    boot = stats.Bootstrap(clusters=images, seed=0)
    boot.mean(accuracy)                          # 0.712, 95 % interval 0.655 to 0.762 (BCa bootstrap, n = 240 in 60 …)
    boot.difference(original, blind)             # paired: both arms from the same resamples
    boot.band(drop, axes=("layer",))             # a curve with its band
    stats.sign_flip(original - blind)            # p, and whether it is exact or drawn

Everything takes lists, numpy arrays and tensors, works in float64, and refuses numbers that are empty, unequal in
length or not finite before it computes. What only colours a result (ties, constant input, resamples without a number)
stands in its `note`. The mathematics is numpy's and the standard library's; docs/statistics.md says why not scipy.
"""

from .association import auroc, correlation_test, kendall, pearson, ranks, spearman
from .bootstrap import Bootstrap
from .intervals import Band, Interval, wilson
from .many import benjamini_hochberg, holm
from .permutations import PermutationTest, PermutationTests, p_value, permutation, sign_flip, sign_flips

__all__ = [
    "Band", "Bootstrap", "Interval", "PermutationTest", "PermutationTests", "auroc", "benjamini_hochberg",
    "correlation_test", "holm", "kendall", "p_value", "pearson", "permutation", "ranks", "sign_flip", "sign_flips",
    "spearman", "wilson",
]  # fmt: skip
