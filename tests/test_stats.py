"""Statistics: those of scipy on hundreds of random samples, known closed forms, and what they refuse and say."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statistical
import torch

import interp_core as ic
from interp_core import stats

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "data/stats.json").read_text())
"""What scipy says; see scripts/stats_reference.py."""
CLOSE = 1e-11
"""Sums of some dozens of float64 numbers in another order, and roots of their differences."""
boot = stats.Bootstrap()


def same(found: float, wanted: float | None) -> bool:
    return math.isnan(found) if wanted is None else found == pytest.approx(wanted, abs=CLOSE)


def test_correlations_and_auroc_are_scipys() -> None:
    for case, wanted in zip(statistical.pairs(), REFERENCE["pairs"], strict=True):
        x, y = case["x"], case["y"]
        found = [stats.pearson(x, y), stats.spearman(x, y), stats.kendall(x, y), stats.auroc(x, case["labels"])]
        assert all(map(same, found, wanted)), (case, found, wanted)


def test_exact_tests_are_scipys() -> None:
    for case, wanted in zip(statistical.tests(), REFERENCE["tests"], strict=True):
        first, second, other, side = (case[key] for key in ("first", "second", "other", "alternative"))
        found = [
            stats.sign_flip(first, alternative=side),
            stats.permutation(first, second, alternative=side),
            *(stats.correlation_test(first, other, k, alternative=side) for k in ("pearson", "spearman", "kendall")),
        ]
        assert all(test.exact for test in found)
        for test, p in zip(found, wanted, strict=True):
            assert p is None or test.p == pytest.approx(p, abs=CLOSE), (case, test, p)
            assert p is not None or (test.p == 1 and "same everywhere" in test.note)


def test_wilson_is_scipys() -> None:
    for case, wanted in zip(statistical.shares(), REFERENCE["shares"], strict=True):
        found = stats.wilson(**case)
        assert [found.low, found.high] == pytest.approx(wanted, abs=CLOSE), case


def test_corrections() -> None:
    """Benjamini and Hochberg's are scipy's, Holm's those of the definition."""
    for p, wanted in zip(statistical.families(), REFERENCE["families"], strict=True):
        assert stats.benjamini_hochberg(p).tolist() == pytest.approx(wanted, abs=CLOSE)
        rising = sorted(p)
        holm = {v: min(1.0, max(rising[j] * (len(p) - j) for j in range(len(p)) if rising[j] <= v)) for v in p}
        assert stats.holm(p).tolist() == pytest.approx([holm[v] for v in p], abs=CLOSE)
    grid = np.array([[0.01, 0.04], [0.03, 0.005]])
    assert stats.holm(grid).tolist() == [[0.03, 0.06], [0.06, 0.02]]
    assert stats.benjamini_hochberg(grid) == pytest.approx(np.array([[0.02, 0.04], [0.04, 0.02]]))


def test_bootstrap_intervals_are_scipys() -> None:
    """On the same draws, which a seed fixes: percentiles and BCa, of a mean, a quantile, and a function of two arrays."""
    for case, wanted in zip(statistical.resampled(), REFERENCE["resampled"], strict=True):
        x, y = case["x"], case["y"]
        found = []
        for method in ("percentile", "bca"):
            b = stats.Bootstrap(level=case["level"], method=method, resamples=statistical.RESAMPLES, seed=case["seed"])
            found.append([b.mean(x), b.quantile(x, 0.5), b.of(stats.pearson, x, y)])
        for i, (percentile, bca) in enumerate(zip(*found, strict=True)):
            assert [percentile.low, percentile.high, percentile.error] == pytest.approx(wanted[2 * i], abs=1e-9)
            assert [bca.low, bca.high, bca.error] == pytest.approx(wanted[2 * i + 1], abs=1e-9), (case, i)


def test_closed_forms() -> None:
    """All of one sign: two of 2^n flips are as far; one group above the other: two of C(n + m, n) divisions."""
    for n in range(2, 13):
        test = stats.sign_flip(np.arange(1, n + 1))
        assert (test.p, test.exact, test.arrangements) == (2 / 2**n, True, 2**n)
        assert stats.sign_flip(np.arange(1, n + 1), alternative="less").p == 1
    assert stats.permutation([5, 6, 7], [1, 2, 3, 4]).p == pytest.approx(2 / math.comb(7, 3))
    assert stats.correlation_test(range(6), range(6), alternative="greater").p == pytest.approx(1 / math.factorial(6))
    # Spearman without ties: 1 - 6 Σ d² / (n (n² - 1)); Kendall: pairs counted by hand
    assert stats.spearman([1, 2, 3, 4], [2, 4, 3, 1]) == pytest.approx(-0.4)
    assert stats.kendall([1, 2, 3, 4], [2, 4, 3, 1]) == pytest.approx((2 - 4) / 6)
    assert stats.kendall([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(4 / 5)
    assert stats.ranks([3.0, 1.0, 3.0, -math.inf]).tolist() == [3.5, 2.0, 3.5, 1.0]
    # Wilson at none of n: z² / (n + z²)
    z2 = 1.959963984540054**2
    assert stats.wilson(0, 10).high == pytest.approx(z2 / (10 + z2)) and stats.wilson(0, 10).low == 0
    # The standard error of a mean: √(Σ (x - x̄)²) / n, of n samples drawn from themselves
    x = np.arange(40.0)
    assert boot.mean(x).error == pytest.approx(x.std() / math.sqrt(40), rel=5 / math.sqrt(2 * 2000))
    assert boot.mean(x).detectable == pytest.approx(2.8016 * boot.mean(x).error, rel=1e-4)


def test_kendall_counts_every_pair_at_any_size() -> None:
    rng = np.random.default_rng(0)
    for n, values in product((2, 3, 7, 8, 9, 33, 100), (2, 5, 1000)):
        x, y = rng.integers(0, values, (2, n))
        signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
        over = np.count_nonzero(x[:, None] - x) * np.count_nonzero(y[:, None] - y)
        found = stats.kendall(x, y)
        assert found == pytest.approx(signs.sum() / math.sqrt(over)) if over else math.isnan(found)


def test_auroc_of_parts() -> None:
    """A map of patches against a box that covers some of their pixels: pixel by pixel it is the same."""
    scores, inside = [0.5, 0.5, 0.1, -0.3], [1, 0, 0, 1]
    assert stats.auroc(scores, inside) == 0.375
    covered, pixels = np.array([3, 0, 1, 4]), np.array([4, 4, 2, 4])
    whole = np.repeat(scores, pixels), np.concatenate([np.arange(n) < k for k, n in zip(covered, pixels, strict=True)])
    assert stats.auroc(scores, covered / pixels, pixels) == pytest.approx(stats.auroc(*whole))
    assert stats.auroc([-math.inf, 1.0], [False, True]) == 1


def test_quantiles_of_resamples() -> None:
    """Those of numpy on the resamples written out."""
    x = np.random.default_rng(1).normal(size=23)
    for q in (0.0, 0.1, 0.5, 0.99, 1.0):
        drawn = boot.draws(lambda values, q=q: np.quantile(values, q), x)
        wanted = np.quantile(drawn, [0.025, 0.975])
        found = stats.Bootstrap(method="percentile").quantile(x, q)
        assert found.value == pytest.approx(np.quantile(x, q)) and [found.low, found.high] == pytest.approx(wanted)


def test_pairs_share_their_resamples() -> None:
    """One seed, one set of draws: an interval of a difference is that of the differences; ratios and maps too."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 30))
    assert boot.difference(a, b).row() == boot.mean(a - b).row()
    both = boot.draws(lambda x, y: [x.mean(), y.mean()], a, b)
    assert both[:, 0] - both[:, 1] == pytest.approx(boot.draws(lambda d: d.mean(), a - b))
    assert boot.ratio(a + 5, b + 5).row() == pytest.approx(boot.of(lambda x, y: x.sum() / y.sum(), a + 5, b + 5).row())
    band = boot.band(np.stack([a, b], 1), axes=("arm",))
    assert band[0].row() == pytest.approx(boot.mean(a).row()) and band[1].low == pytest.approx(boot.mean(b).low)
    assert [row["arm"] for row in band.table()] == [0, 1] and len(band) == 2 and len(list(band)) == 2
    tensors = boot.difference(torch.tensor(a), torch.tensor(b).tolist())
    assert tensors.row() == boot.difference(a, b).row()


def test_clusters_are_drawn_whole() -> None:
    """Samples of a cluster that say the same: the interval is that of one per cluster; strata keep their numbers."""
    values = np.random.default_rng(3).normal(size=24)
    names = [f"image {i}" for i in range(24)]
    many = stats.Bootstrap(clusters=np.repeat(names, 5)).mean(np.repeat(values, 5))
    alone = boot.mean(values)
    assert [many.low, many.high, many.error] == pytest.approx([alone.low, alone.high, alone.error])
    assert (many.n, many.units, alone.units) == (120, 24, 24) and "n = 120 in 24 clusters" in str(many)
    assert (
        stats.sign_flip(np.repeat(values[:9], 5), clusters=np.repeat(names[:9], 5)).p == stats.sign_flip(values[:9]).p
    )
    tasks = np.repeat(["a", "b"], [4, 20])
    counted = stats.Bootstrap(strata=tasks).draws(
        lambda task: [(task == 0).sum(), len(task)], np.repeat([0, 1], [4, 20])
    )
    assert (counted == [4, 24]).all()
    groups = boot.difference(values[:4], values[4:], paired=False)
    wanted = stats.Bootstrap(strata=tasks).of(
        lambda v, t: v[t == 0].mean() - v[t == 1].mean(), values, np.repeat([0, 1], [4, 20])
    )
    assert [groups.low, groups.high] == pytest.approx([wanted.low, wanted.high])


def test_bca_of_strata_by_its_formula() -> None:
    """Ends from the draws by the formula written out, the acceleration from each group's jackknife (scipy's sum)."""
    rng = np.random.default_rng(4)
    a, b = rng.exponential(size=9), rng.exponential(size=14)
    found = boot.difference(a, b, paired=False)
    draws = stats.Bootstrap(strata=[0] * 9 + [1] * 14).draws(
        lambda v, g: v[g == 0].mean() - v[g == 1].mean(), [*a, *b], [0] * 9 + [1] * 14
    )
    u = [(x - x.mean()) / len(x) for x in (a, -b)]  # of a mean, the jackknife's deviations are the samples' own
    acceleration = sum((d**3).sum() for d in u) / (6 * sum((d**2).sum() for d in u) ** 1.5)
    from statistics import NormalDist

    normal = NormalDist()
    z0 = normal.inv_cdf((draws < found.value).mean())
    z = [z0 + normal.inv_cdf(tail) for tail in (0.025, 0.975)]
    wanted = np.quantile(draws, [normal.cdf(z0 + part / (1 - acceleration * part)) for part in z])
    assert [found.low, found.high] == pytest.approx(wanted.tolist())


def test_coverage_of_intervals() -> None:
    """How many of 600 studies of 20 skewed samples hold the true value: BCa more than percentiles, neither 95 %.

    1,500 other studies, of 1,000 resamples each, gave 0.701 and 0.754; a share of 600 is within three standard errors.
    """
    studies, inside = np.random.default_rng(5).exponential(size=(600, 20)), {"percentile": 0, "bca": 0}
    for method in inside:
        b = stats.Bootstrap(method=method, resamples=300)
        # The mean of squares about the known mean 1 is the variance, 1
        inside[method] = sum(not b.mean((study - 1) ** 2).excludes(1.0) for study in studies)
    shares = {method: count / len(studies) for method, count in inside.items()}
    for method, expected in (("percentile", 0.701), ("bca", 0.754)):
        assert shares[method] == pytest.approx(expected, abs=3 * math.sqrt(0.25 / 600)), shares
    assert shares["bca"] > shares["percentile"] + 0.02


def refused(message: str, call: Any) -> None:
    with pytest.raises(ic.PlanError, match=message):
        call()


def test_what_is_refused() -> None:
    """Before anything is computed, with what was given and what to do."""
    nan = [1.0, math.nan, 3.0]
    for call in (boot.mean, stats.sign_flip, stats.ranks, stats.holm, lambda x: stats.pearson(x, x)):
        refused("1 of 3 are not finite, the first at \\[1\\]: nan", lambda call=call: call(nan))
        refused("is empty", lambda call=call: call([]))
        refused("takes numbers, not str", lambda call=call: call("abc"))
    refused("are not finite", lambda: boot.mean([1.0, math.inf]))
    refused("numbers of 1 axis, these have shape \\(2, 2\\)", lambda: boot.mean([[1, 2], [3, 4]]))
    refused("first has 3, second has 2", lambda: boot.difference([1, 2, 3], [1, 2]))
    refused("x has 3, y has 2", lambda: stats.kendall([1, 2, 3], [1, 2]))
    refused("two samples at least", lambda: stats.spearman([1], [2]))
    refused("1 sample\\(s\\) in 1 unit", lambda: boot.mean([1.0]))
    refused("in 1 unit", lambda: stats.sign_flip([1.0, 2.0], clusters=["a", "a"]))
    refused("3 labels for 2 samples", lambda: stats.Bootstrap(clusters=[1, 2, 3]).mean([1, 2]))
    refused("a cluster has samples in two strata", lambda: stats.Bootstrap([0, 0, 1], [0, 1, 1]).mean([1, 2, 3]))
    refused("not a number on the 3 samples themselves", lambda: boot.of(stats.spearman, [1, 1, 1], [1, 2, 3]))
    refused("one number is wanted, not \\(2,\\)", lambda: boot.of(lambda x: x.mean(0), [[1, 2], [3, 5]]))
    refused("axes \\('layer', 'head'\\) do not name", lambda: boot.band([[1, 2], [3, 5]], axes=("layer", "head")))
    refused("give a statistic of them", lambda: boot.band([1, 2], [1, 2], axes=()))
    refused("do not name those after sample", lambda: stats.sign_flips([1, 2], axes=("layer",)))
    refused("all 2 samples are positives", lambda: stats.auroc([1, 2], [1, 1]))
    refused("labels are between 0 and 1", lambda: stats.auroc([1, 2], [0, 2]))
    refused("takes probabilities", lambda: stats.holm([0.1, 1.2]))
    refused("between 0 and n = 3", lambda: stats.wilson(4, 3))
    refused("at least 1", lambda: stats.wilson(0, 0))
    for settings in ({"level": 95}, {"method": "best"}, {"resamples": 10}, {"seed": -1}):
        refused("stats.Bootstrap: ", lambda settings=settings: stats.Bootstrap(**settings))
    values = list(range(30))
    for test in (stats.permutation, stats.correlation_test):
        refused("seed takes a whole number, at least 0", lambda test=test: test(values, values, seed=-1))
    refused("'two-sided' or 'greater' or 'less'", lambda: stats.permutation([1], [2], alternative="more"))


def test_what_is_said() -> None:
    """Constant input, ties, few units, resamples without a number, exact or drawn."""
    still = boot.mean([0.1] * 12)
    assert (still.low, still.high, still.error) == (still.value,) * 2 + (0,) and "do not vary" in still.note
    assert "only 5 units" in str(boot.mean(range(5)))
    rare = boot.ratio([1.0] * 12, [0.0] * 11 + [1.0])
    assert "resamples give no number and are left out" in rare.note
    assert "x has ties (2 values in 4 samples)" in stats.correlation_test([1, 1, 2, 2], [1, 2, 3, 4]).note
    assert stats.sign_flip([0.0, 0.0]).p == 1 and "all differences are 0" in str(stats.sign_flip([0.0, 0.0]))
    drawn = stats.sign_flip(np.arange(20) - 3.0)
    assert not drawn.exact and (drawn.arrangements, drawn.seed) == (9999, 0) and "9,999 random sign flips" in str(drawn)
    assert "exact, all 16 sign flips, two-sided, n = 4" in str(stats.sign_flip([1, 2, 3, 4]))
    assert f"{stats.wilson(5, 10):.2f}" == "0.50 [0.24, 0.76]"
    assert str(stats.wilson(5, 10)) == "share 0.5, 95 % interval 0.2366 to 0.7634 (Wilson, n = 10)"
    edge = stats.Bootstrap(method="bca").quantile(np.arange(30.0), 1.0)
    assert edge.high == 29 and edge.low < 29  # ties of the largest with itself: half of them count as below


def test_drawn_tests_come_near_exact_ones() -> None:
    """Random arrangements give the exact p within four standard errors, and never 0."""
    rng = np.random.default_rng(6)
    for _ in range(5):
        d = rng.normal(0.4, 1, size=16)
        exact = stats.sign_flip(d)
        few = stats.sign_flip([*d, 0.0, 0.0])  # zeros change no flip
        assert exact.exact and few.p == exact.p
        signs = rng.choice((-1, 1), size=(4000, 16))
        assert stats.p_value(d.mean(), signs @ d / 16) == pytest.approx(exact.p, abs=4 * math.sqrt(2 * 0.25 / 4000))
    far = stats.sign_flip(np.arange(1, 40))
    assert far.p == 1 / 10_000
    null = np.arange(99.0)
    assert stats.p_value(1000, null) == 0.02 and stats.p_value(1000, null, "greater") == 0.01


def test_a_maximum_keeps_the_chance_of_any_false_claim() -> None:
    """In 200 studies of 12 layers without an effect, any adjusted p is below 0.1 in a tenth of them, any p alone in most."""
    rng = np.random.default_rng(7)
    any_max, any_alone = 0, 0
    for _ in range(200):
        found = stats.sign_flips(rng.normal(size=(10, 12)) * np.arange(1, 13), axes=("layer",))
        any_max, any_alone = any_max + found.below(0.1).any(), any_alone + (found.p <= 0.1).any()
        assert (found.adjusted >= found.p).all() and found.exact and found.p.shape == (12,)
    assert any_max / 200 == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 200)) and any_alone > 100
    strong = rng.normal(size=(10, 12)) + 9 * (np.arange(12) == 4)
    tests_of_max = stats.sign_flips(strong, axes=("layer",))
    assert tests_of_max.below().nonzero()[0].tolist() == [4]
    for adjust in ("holm", "bh", "none"):
        found = stats.sign_flips(strong, axes=("layer",), adjust=adjust)
        assert found.adjusted[4] <= 0.05 and found.p.tolist() == tests_of_max.p.tolist()
    assert "layer 4" in str(found).splitlines()[1]


def test_a_simultaneous_band_holds_whole_curves() -> None:
    """Of 150 studies, the band of a level holds all 8 true values at once in about so many; single intervals in fewer."""
    rng = np.random.default_rng(8)
    b = stats.Bootstrap(resamples=300, level=0.9)
    whole = alone = 0
    for _ in range(150):
        study = rng.normal(size=(60, 8))
        together, each = (b.band(study, axes=("layer",), simultaneous=kind) for kind in (True, False))
        whole += bool(((together.low <= 0) & (together.high >= 0)).all())
        alone += bool(((each.low <= 0) & (each.high >= 0)).all())
    assert whole / 150 == pytest.approx(0.88, abs=4 * math.sqrt(0.1 / 150)) and alone / 150 < 0.6
