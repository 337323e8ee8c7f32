"""Geometry of rows by closed forms and by the definitions in numpy: ranks, directions, CKA, dimension, cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interp_plugins.geometry import ratios
from interp_plugins.geometry.dimension import two_nn
from interp_plugins.geometry.directions import anisotropy, mean_direction_share, modality_gap, separability
from interp_plugins.geometry.measured import MEASURES, How, measure_layer
from interp_plugins.geometry.ratios import cut_ratio, ratio_of_ratios
from interp_plugins.geometry.rows import VARIANTS, coordinates, equal_numbers, prepare, single, subsamples
from interp_plugins.geometry.similarity import Rows, cka, debiased_cka
from interp_plugins.geometry.spectrum import effective_rank, participation_ratio, stable_rank

import interp_core as ic

RNG = np.random.default_rng(0)


def gaussian(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def rotation(d: int) -> np.ndarray:
    return np.linalg.qr(gaussian(d, d, 9))[0]


def test_one_row_of_many_is_drawn_evenly() -> None:
    """The lesser of two draws, which it once was, has a mean of a third of the rows and is never the last."""
    for n in (2, 10, 31):
        places = [single(n, seed) for seed in range(600)]
        assert {min(places), max(places)} == {0, n - 1} and single(n, 3) == single(n, 3)
        assert np.mean(places) == pytest.approx((n - 1) / 2, abs=4 * n / np.sqrt(12 * 600))


def test_equal_directions_are_counted() -> None:
    """k orthogonal directions, each forth and back: k in all three, whatever they are embedded in."""
    for k in (1, 3, 7):
        rows = np.concatenate([np.eye(k), -np.eye(k)]) @ rotation(20)[:k]
        for measure in (effective_rank, participation_ratio, stable_rank):
            assert measure(rows + 5) == pytest.approx(k, abs=1e-9)
            assert measure(np.repeat(rows, 4, axis=0)) == pytest.approx(k, abs=1e-9)  # copies change nothing
    assert effective_rank(np.concatenate([np.eye(7), -np.eye(7)]), share=True) == pytest.approx(1)


def test_ranks_by_their_definitions() -> None:
    for n, d in ((30, 8), (8, 30)):
        rows = gaussian(n, d) * np.linspace(0.1, 3, d) + 2
        for centre in (True, False):
            sigma = np.sqrt(np.clip(np.linalg.eigvalsh((x := rows - centre * rows.mean(0)).T @ x), 0, None))
            p = (p := sigma / sigma.sum())[p > 1e-12]
            lam = sigma**2
            assert effective_rank(rows, centre=centre) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
            assert participation_ratio(rows, centre=centre) == pytest.approx(lam.sum() ** 2 / (lam**2).sum(), rel=1e-9)
            assert stable_rank(rows, centre=centre) == pytest.approx(lam.sum() / lam.max(), rel=1e-9)
        assert effective_rank(rows @ rotation(d)) == pytest.approx(effective_rank(rows), rel=1e-9)
        assert effective_rank(3 * rows + 1) == pytest.approx(effective_rank(rows), rel=1e-9)
        assert participation_ratio(rows) < effective_rank(rows) < min(n - 1, d)


def test_isotropic_rows_fill_their_space() -> None:
    """n ≫ d Gaussian rows: effective rank near d, participation ratio n d / (n + d + 1), low rank stays low."""
    rows = gaussian(4000, 10)
    assert effective_rank(rows) == pytest.approx(10, rel=1e-2)
    assert participation_ratio(rows) == pytest.approx(4000 * 10 / 4011, rel=5e-3)
    assert abs(anisotropy(rows)) < 2e-3
    low = gaussian(200, 3) @ gaussian(3, 50, 1)
    assert effective_rank(low) < 3 + 1e-6


def test_directions_by_their_definitions() -> None:
    rows = gaussian(25, 6) + 0.7
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert anisotropy(rows) == pytest.approx(cosines[~np.eye(25, dtype=bool)].mean(), abs=1e-12)
    assert mean_direction_share(rows) == pytest.approx((unit.mean(0) ** 2).sum(), abs=1e-12)
    assert anisotropy(np.tile(rows[:1], (9, 1))) == pytest.approx(1)
    other = gaussian(40, 6, 1) * 2
    within = [np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()) for x in (rows, other)]
    gap = np.linalg.norm(rows.mean(0) - other.mean(0)) / np.mean(within)
    assert modality_gap(rows, other) == pytest.approx(gap, abs=1e-12)


def test_separability_is_of_held_out_rows() -> None:
    """Fewer rows than numbers are always told apart by themselves; held out, equals are not."""
    same = [separability(gaussian(25, 60, seed), gaussian(20, 60, 100 + seed)) for seed in range(40)]
    assert abs(np.mean(same) - 0.5) < 4 * np.std(same) / 40**0.5
    assert separability(gaussian(40, 200), gaussian(30, 200, 1) + 0.5) > 0.95


def test_cka_by_its_definition_and_of_copies() -> None:
    x, y = gaussian(20, 12), gaussian(20, 7, 1) + gaussian(20, 12)[:, :7]
    keys = range(20)
    a, b = x - x.mean(0), y - y.mean(0)
    frobenius = np.linalg.norm
    wanted = frobenius(b.T @ a) ** 2 / (frobenius(a.T @ a) * frobenius(b.T @ b))
    assert cka(Rows(x, keys), Rows(y, keys)) == pytest.approx(wanted, abs=1e-12)
    for measure in (cka, debiased_cka):
        assert measure(Rows(x, keys), Rows(-3 * x @ rotation(12) + 5, keys)) == pytest.approx(1, abs=1e-12)
    n = 20
    hollow = [g - np.diag(np.diag(g)) for g in (a @ a.T, b @ b.T)]

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        """Song et al., sum by sum."""
        distinct = sum(k[i, j] * other[i, j] for i in range(n) for j in range(n))
        quarter = sum(k[i].sum() for i in range(n)) * sum(other[i].sum() for i in range(n)) / ((n - 1) * (n - 2))
        third = sum(k[i].sum() * other[i].sum() for i in range(n)) * 2 / (n - 2)
        return (distinct + quarter - third) / (n * (n - 3))

    ratio = hsic(*hollow) / np.sqrt(hsic(hollow[0], hollow[0]) * hsic(hollow[1], hollow[1]))
    assert debiased_cka(Rows(x, keys), Rows(y, keys)) == pytest.approx(ratio, abs=1e-9)


def test_debiased_cka_of_independent_rows_is_nothing() -> None:
    """50 draws of 12 rows of 200 numbers: the published one is near 1, the debiased one 0 on average."""
    draws = [[Rows(gaussian(12, 200, 2 * seed + side), range(12)) for side in (0, 1)] for seed in range(50)]
    assert np.mean([cka(*pair) for pair in draws]) > 0.9
    values = [debiased_cka(*pair) for pair in draws]
    assert abs(np.mean(values)) < 4 * np.std(values) / 50**0.5


def test_rows_are_paired_or_refused() -> None:
    visual = Rows.tokens(gaussian(6, 4), "sample 0", range(6), "visual rows")
    text = Rows.tokens(gaussian(6, 4), "sample 0", range(6, 12), "text rows")
    with pytest.raises(ic.PlanError, match="visual rows and text rows have 0 rows in common.*Rows.pooled"):
        debiased_cka(visual, text)
    shuffled = Rows(visual.values, visual.keys[::-1])
    with pytest.raises(ic.PlanError, match="the same rows in another order"):
        cka(visual, shuffled)
    with pytest.raises(ic.PlanError, match="CKA takes Rows"):
        cka(gaussian(6, 4), gaussian(6, 4))  # type: ignore[arg-type]
    with pytest.raises(ic.PlanError, match="5 keys for 6 rows"):
        Rows(gaussian(6, 4), range(5))
    with pytest.raises(ic.PlanError, match="two rows have the key 1"):
        Rows(gaussian(3, 4), (0, 1, 1))
    with pytest.raises(ic.PlanError, match="four rows at least"):
        debiased_cka(Rows(gaussian(3, 4), range(3)), Rows(gaussian(3, 4), range(3)))
    with pytest.raises(ic.PlanError, match="are all the same"):
        cka(Rows(np.full((6, 4), 1 / 3), range(6)), Rows(gaussian(6, 4), range(6)))
    samples = ["a", "b", "c", "d", "e"]
    pooled = [Rows.pooled([gaussian(n, 4, n + k) for n in (3, 4, 5, 6, 7)], samples) for k in (0, 1)]
    assert -1 <= debiased_cka(*pooled) <= 1 and pooled[0].values.shape == (5, 4)
    np.testing.assert_allclose(pooled[0].values[0], gaussian(3, 4, 3).mean(0))


def test_dimension_is_that_of_what_is_embedded() -> None:
    """Uniform rows in d dimensions of 30; copies count once; leaving ratios out instead of censoring would give a third
    too much."""
    for d in (1, 2, 5):
        found = [two_nn(np.random.default_rng(seed).uniform(size=(400, d)) @ rotation(30)[:d]) for seed in range(4)]
        assert np.mean(found) == pytest.approx(d, rel=0.12)
    rows = np.random.default_rng(0).uniform(size=(300, 2))
    assert two_nn(np.concatenate([rows, rows[:50]])) == pytest.approx(two_nn(rows))
    distances = np.sort(np.linalg.norm(rows[:, None] - rows, axis=-1), axis=1)
    ratios_ = np.log(distances[:, 2] / distances[:, 1])
    assert two_nn(rows, discard=0) == pytest.approx(299 / ratios_.sum(), rel=1e-9)
    with pytest.raises(ic.PlanError, match="49 different rows; 50 at least"):
        two_nn(rows[:49])
    with pytest.raises(ic.PlanError, match="as on a grid"):
        two_nn(np.stack(np.meshgrid(range(8), range(8)), -1).reshape(-1, 2))
    with pytest.raises(ic.PlanError, match="a share"):
        two_nn(rows, discard=1.0)


def test_variants_say_what_they_dropped() -> None:
    rows = gaussian(20, 6)
    rows[[3, 11]] *= 100
    assert prepare(rows, "sink_free").dropped == (3, 11) and len(prepare(rows, "sink_free").rows) == 18
    assert prepare(rows).dropped == () and prepare(rows, "raw").for_spectrum.shape == (20, 6)
    assert float(prepare(rows).for_spectrum.mean(0).abs().max()) < 1e-12
    np.testing.assert_allclose(prepare(rows, "row_normalised").rows.norm(dim=1), 1)
    ranks = {v: effective_rank(prepare(rows, v).for_spectrum, centre=False) for v in VARIANTS}
    assert ranks["centred"] < 3 < ranks["sink_free"] and ranks["row_normalised"] > 4  # two sinks hide the rest
    with pytest.raises(ic.PlanError, match="no variant 'centered' of rows. Did you mean 'centred'"):
        prepare(rows, "centered")  # type: ignore[arg-type]


def test_equal_numbers() -> None:
    drawn = equal_numbers([gaussian(30, 4), gaussian(8, 4, 1)], repeats=5)
    assert drawn[0].shape == (5, 8, 4) and drawn[1].shape == (1, 8, 4)
    picks = subsamples(30, 8, 20, 3)
    assert all(len(set(row.tolist())) == 8 for row in picks) and len({tuple(row.tolist()) for row in picks}) == 20
    assert torch.equal(picks, subsamples(30, 8, 20, 3)) and not torch.equal(picks, subsamples(30, 8, 20, 4))
    rows = torch.from_numpy(gaussian(6, 40))
    small = coordinates(rows)
    assert small.shape == (6, 6)
    torch.testing.assert_close(small @ small.T, rows @ rows.T, atol=1e-12, rtol=1e-12)


def test_a_layer_is_what_the_functions_say() -> None:
    """Every measure, variant and group, of all rows and of equal numbers of them."""
    groups = [torch.from_numpy(gaussian(60, 90) + 0.3), torch.from_numpy(gaussian(12, 90, 1) - 0.2)]
    groups[1][4] *= 50
    layer = measure_layer(groups, How(repeats=3, seed=2))
    assert layer.dropped == ((), (4,))
    functions = {
        "effective_rank": lambda s, t, c: effective_rank(s, centre=False),
        "effective_rank_share": lambda s, t, c: effective_rank(s, centre=False) / min(len(s) - c, 90),
        "participation_ratio": lambda s, t, c: participation_ratio(s, centre=False),
        "stable_rank": lambda s, t, c: stable_rank(s, centre=False),
        "anisotropy": lambda s, t, c: anisotropy(t), "mean_direction": lambda s, t, c: mean_direction_share(t),
    }  # fmt: skip
    for v, variant in enumerate(VARIANTS):
        for g, rows in enumerate(groups):
            for m, name in enumerate(MEASURES):
                ready = prepare(rows, variant)
                wanted = functions[name](ready.for_spectrum, ready.for_directions, ready.centre)
                assert float(layer.whole[g, v, m]) == pytest.approx(wanted, rel=1e-9), (variant, g, name)
    kept = [i for i in range(12) if i != 4]
    for g, rows in enumerate((groups[0], groups[1][kept])):
        drawn = [effective_rank(rows[pick]) for pick in subsamples(len(rows), 11, 3, 2)]
        assert float(layer.equal[g, VARIANTS.index("sink_free"), 0]) == pytest.approx(np.mean(drawn), rel=1e-9)
    assert float(layer.dimension[0]) == pytest.approx(two_nn(groups[0])) and layer.dimension[1].isnan()
    assert layer.gap == pytest.approx(modality_gap(*groups)) and layer.separability == separability(*groups)
    flat = measure_layer([torch.full((8, 5), 1 / 3, dtype=torch.float64)], How())
    assert bool(flat.whole[0, 1, :4].isnan().all()) and np.isnan(flat.gap)
    assert float(flat.whole[0, 0, MEASURES.index("anisotropy")]) == pytest.approx(1)


def test_a_cliff_stands_out_and_a_trend_does_not() -> None:
    rng = np.random.default_rng(0)
    step = np.where(np.arange(12) < 5, 8.0, 4.0) * np.exp(0.01 * rng.normal(size=(30, 12)))
    found = cut_ratio(step, 5)
    assert found.ratio.value == pytest.approx(0.5, abs=0.01) and found.stands_out and found.p == pytest.approx(1 / 11)
    assert int(np.abs(found.cuts).argmax()) == 4 and "against" in str(found) and found.row()["cut"] == 5
    trend = np.exp(-0.1 * np.arange(12)) * np.exp(0.01 * rng.normal(size=(30, 12)))
    across = cut_ratio(trend, 5)
    assert across.log.excludes(0) and not across.stands_out
    assert cut_ratio(np.full((5, 6), 3.0), 3).ratio.value == 1
    both = ratio_of_ratios(step, trend, 5)
    assert both.value == pytest.approx((found.per_sample / across.per_sample).mean())
    wanted = [row[5:].mean() / row[:5].mean() for row in step]
    np.testing.assert_allclose(found.per_sample, wanted)


def test_what_is_refused() -> None:
    rows = gaussian(6, 4)
    for call, message in (
        (lambda: effective_rank("rows"), "takes numbers"),
        (lambda: effective_rank(rows[0]), r"give rows \[n d\]"),
        (lambda: effective_rank(rows[:1]), "takes 2 at least"),
        (lambda: effective_rank(np.where(rows > 1, np.inf, rows)), "rows are not finite, the first is row"),
        (lambda: effective_rank(np.full((5, 4), 0.1)), "all the same"),
        (lambda: stable_rank(np.zeros((5, 4)), centre=False), "are zero"),
        (lambda: anisotropy(np.eye(4) * [0, 1, 1, 1]), "1 of 4 rows are zero"),
        (lambda: modality_gap(rows, gaussian(6, 5)), "rows of 4 numbers are compared with rows of 5"),
        (lambda: modality_gap(np.ones((3, 4)), np.zeros((3, 4))), "nothing to compare with"),
        (lambda: separability(rows, gaussian(3, 4)), "class 1 is in 3 group"),
        (lambda: subsamples(5, 6), "draw 2 to 5 rows"),
        (lambda: cut_ratio(np.ones((3, 5)), 5), "a layer, 1 to 4"),
        (lambda: cut_ratio(np.zeros((3, 5)), 2), "are not above 0"),
        (lambda: ratios.ratio_of_ratios(np.ones((3, 5)), np.ones((4, 5)), 2), "3 samples of visual rows, 4 of text"),
    ):  # fmt: skip
        with pytest.raises(ic.PlanError, match=message):
            call()
