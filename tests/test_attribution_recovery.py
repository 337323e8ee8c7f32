"""Recovery: published numbers, ties over all orders, chance, and what is skipped."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from evaluation_golden import drawn, example
from interp_plugins.attribution.evaluation.recovery import chance, recovery, top_count

import interp_core as ic


@pytest.mark.parametrize("name", ["llama/ex0", "llama/ex3", "qwen3/ex0"])
def test_recovery_is_the_published_one(name: str) -> None:
    """To the bit where nothing is tied at the threshold, within the range of ties elsewhere."""
    of, settled, open_ones = example(name), 0, 0
    for weights, steps, wanted in zip(of["weights"], of["steps"], of["recovery"].tolist(), strict=True):
        found = recovery(weights, of["gold"], kept=steps >= 0)
        low, high = float(found.low), float(found.high)
        assert low - 1e-12 <= wanted <= high + 1e-12 and low <= float(found.recovery) <= high
        settled, open_ones = settled + (low == high), open_ones + (low < high)
        assert low < high or abs(float(found.recovery) - wanted) < 1e-12
    assert settled >= 15


def test_expected_recovery_is_the_mean_over_all_orders() -> None:
    weights, gold = torch.tensor([[3.0, 1, 1, 1, 0, 1, -2]]), torch.tensor([0, 2, 5])
    found = recovery(weights, gold, share=0.4)
    assert found.chosen == 3
    candidates = [c for c in permutations(range(7)) if all(weights[0, list(c)].clamp(min=0).diff() <= 0)]
    hits = [len({*order[:3]} & {0, 2, 5}) / 3 for order in candidates]
    assert len(set(hits)) > 1
    for one, wanted in ((found.expected, np.mean(hits)), (found.low, min(hits)), (found.high, max(hits))):
        assert abs(float(one) - wanted) < 1e-12
    assert float(found.recovery) == 2 / 3  # positions 0, 1, 2
    assert abs(float(found.mass) - 5 / 7) < 1e-12
    assert abs(float(found.rank_auc) - ic.stats.auroc(weights[0], [1, 0, 1, 0, 0, 1, 0])) < 1e-12


def test_recovery_by_chance_is_hypergeometric() -> None:
    assert [top_count(n, 0.1) for n in (1, 10, 11, 30, 104, 110)] == [1, 1, 2, 3, 11, 11]
    assert top_count(1000, 0.07) == 70  # in floats, 70.00000000000001
    every = [recovery(torch.tensor(order).double(), [1, 4], share=0.3) for order in permutations(range(5))]
    assert abs(np.mean([float(one.recovery) for one in every]) - chance(5, 0.3)) < 1e-12
    assert every[0].chance == chance(5, 0.3) == 2 / 5


def test_recovery_says_why_it_skips() -> None:
    none = recovery(drawn(2, 9), [])
    assert none.skipped == "no gold tokens in the prompt" and none.recovery.isnan().all() and math.isnan(none.chance)
    left_out = recovery(drawn(9), [2, 3], kept=[0, 1, 5])
    assert left_out.skipped == "all 2 gold tokens are left out of the ranking"
    part = recovery(drawn(9), [2, 3], kept=[0, 2, 5])
    assert not part.skipped and part.gold == 1 and part.ranked == 3
    assert recovery(torch.zeros(4), [1]).mass.isnan().all() and recovery(drawn(4), [0, 1, 2, 3]).rank_auc.isnan().all()
