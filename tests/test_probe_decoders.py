"""Probes by their definitions: direct solves in the states, optimality, scikit-learn's numbers, capacity.

tests/data/probe.json is what scikit-learn says (scripts/probe_reference.py, run in an environment of its own).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import probing
import pytest
import torch
from interp_plugins.probe import decoders, logistic, mlp
from interp_plugins.probe.gram import Split, Standardised

import interp_core as ic

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data/probe.json").read_text())["cases"]


def split(x: np.ndarray, other: np.ndarray, inner: np.ndarray | None = None) -> Split:
    n = len(x)
    train = torch.arange(n + len(other)) < n
    states = torch.from_numpy(np.concatenate([x, other]))[:, None]
    rows = torch.arange(n) % 5 if inner is None else torch.from_numpy(inner)
    return Standardised(states, train[None]).split(0, torch.arange(n), torch.arange(n, n + len(other)), rows)


def drawn(n: int = 50, d: int = 80, seed: int = 0, shift: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % 3 == 0).astype(int)
    x = rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d) + 5 + shift * y[:, None]
    return x, y, x[:20] + rng.normal(size=(20, d))


def standardised(x: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (x - x.mean(0)) / x.std(0), (other - x.mean(0)) / x.std(0)


def columns(y: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(y)[:, None]


def solved(z: np.ndarray, target: np.ndarray, other: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge in the states themselves, with an intercept that is not penalised."""
    design = np.c_[z, np.ones(len(z))]
    weights = np.linalg.solve(design.T @ design + penalty * np.diag(np.r_[np.ones(z.shape[1]), 0]), design.T @ target)
    return np.c_[other, np.ones(len(other))] @ weights


@pytest.mark.parametrize("d", [10, 80])
def test_ridge_is_a_direct_solve(d: int) -> None:
    """Scores, held-out scores of inner folds, penalty and threshold, each fitted anew in the states."""
    x, y, other = drawn(d=d)
    z, z_other = standardised(x, other)
    target, inner, penalties = 2.0 * y - 1, np.arange(50) % 5, (0.01, 1.0, 100.0)
    tries = []
    for penalty in penalties:
        held = np.zeros(50)
        for fold in range(5):
            inside = inner != fold
            held[~inside] = solved(z[inside], target[inside], z[~inside], penalty * d)
        error = sum(((held - target)[y == k] ** 2).mean() for k in (0, 1))
        middle = sum(held[y == k].mean() for k in (0, 1)) / 2
        tries.append((error, penalty, solved(z, target, z_other, penalty * d) - middle, held - middle))
    _, penalty, scores, held = min(tries, key=lambda one: one[0])
    mine = decoders.ridge(split(x, other, inner), columns(y), 2, penalties)
    np.testing.assert_allclose(mine.test[0, :, 0, 0], scores, atol=1e-8)
    assert mine.held is not None
    np.testing.assert_allclose(mine.held[0, :, 0, 0], held, atol=1e-8)
    assert float(mine.penalty[0, 0]) == penalty


def test_labelings_share_the_matrices() -> None:
    x, y, other = drawn()
    several = np.stack([y, 1 - y, y[::-1]], 1)
    together = decoders.ridge(split(x, other), torch.from_numpy(several), 2, (0.1, 1.0))
    for column in range(3):
        alone = decoders.ridge(split(x, other), columns(several[:, column].copy()), 2, (0.1, 1.0))
        torch.testing.assert_close(together.test[:, :, column], alone.test[:, :, 0], atol=1e-10, rtol=0)
    torch.testing.assert_close(together.test[:, :, 0], -together.test[:, :, 1], atol=1e-10, rtol=0)


def test_three_classes_by_ridge_and_means_and_lda() -> None:
    rng = np.random.default_rng(1)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 40)) + 6 * np.eye(3, 40)[y]
    other, truth = rng.normal(size=(30, 40)) + 6 * np.eye(3, 40)[np.arange(30) % 3], np.arange(30) % 3
    for name, scores in {
        "ridge": decoders.ridge(split(x, other), columns(y), 3, (0.1,)),
        "means": decoders.difference_of_means(split(x, other), columns(y), 3),
        "lda": decoders.lda(split(x, other), columns(y), 3),
        "logistic": logistic.logistic(split(x, other), columns(y), 3, (0.1,)),
        "mlp": mlp.mlp(split(x, other), columns(y), 3, 0),
    }.items():
        assert scores.test.shape == (1, 30, 1, 3), name
        assert (decoders.predicted(scores.test)[0, :, 0].numpy() == truth).mean() > 0.85, name


def test_means_and_lda_by_their_definitions() -> None:
    x, y, other = drawn()
    z, z_other = standardised(x, other)
    means = np.stack([z[y == k].mean(0) for k in (0, 1)])
    wanted = (z_other - means.mean(0)) @ (means[1] - means[0])
    mine = decoders.difference_of_means(split(x, other), columns(y), 2)
    np.testing.assert_allclose(mine.test[0, :, 0, 0], wanted, atol=1e-8)


@pytest.mark.parametrize("number", range(len(probing.CASES)))
def test_scikit_learns_numbers(number: int) -> None:
    """Logistic regression to its own tolerance, ridge and discriminant analysis to rounding."""
    case = probing.case(number)
    part, labels = split(np.array(case["x"]), np.array(case["other"])), columns(np.array(case["labels"]))
    regression = logistic.logistic(part, labels, 2, (case["c"],)).test[0, :, 0, 0]
    np.testing.assert_allclose(regression, GOLDEN[number]["logistic"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(decoders.lda(part, labels, 2).test[0, :, 0, 0], GOLDEN[number]["lda"], atol=1e-8)
    ridge = decoders.ridge(part, labels, 2, (case["c"],))
    apart = ridge.test[0, :, 0, 0].numpy() - np.array(GOLDEN[number]["ridge"])  # but for the threshold
    np.testing.assert_allclose(apart, apart[0], atol=1e-9)


@pytest.mark.parametrize("c", [1e-4, 1.0, 100.0])
def test_logistic_is_at_its_optimum(c: float) -> None:
    """The gradient by weights and bias, in the states themselves."""
    x, y, other = drawn(shift=2.0)
    z, _ = standardised(x, other)
    gram = torch.from_numpy(z @ z.T)[None]
    fitted = logistic.fit(gram, torch.from_numpy(y).bool()[None], c)
    weights, bias = z.T @ fitted.dual[0].numpy(), float(fitted.bias[0])
    balance = c * len(y) / 2 * np.where(y == 1, 1 / y.sum(), 1 / (1 - y).sum())
    pull = balance * (y - 1 / (1 + np.exp(-(z @ weights + bias))))
    start = np.abs(z.T @ (balance * (y - 0.5))).max()
    assert np.abs(weights - z.T @ pull).max() < 1e-7 * start
    assert abs(pull.sum()) < 1e-7 * start


def test_logistic_chooses_c_inside() -> None:
    """The C of the best balanced accuracy over inner folds, each fitted by itself."""
    x, y, other = drawn(shift=0.3)
    inner, grid = np.arange(50) % 5, (1e-3, 1e-1, 10.0)
    whole = split(x, other, inner)
    accuracies = []
    for c in grid:
        right = np.zeros(50)
        for fold in range(5):
            rows, others = np.flatnonzero(inner == fold), np.flatnonzero(inner != fold)
            gram = whole.train[:, others[:, None], others]
            fitted = logistic.fit(gram, torch.from_numpy(y[others] == 1)[None], c)
            scores = whole.train[0][rows[:, None], others] @ fitted.dual[0] + fitted.bias[0]
            right[rows] = (scores.numpy() > 0) == (y[rows] == 1)
        accuracies.append(sum(right[y == k].mean() for k in (0, 1)) / 2)
    mine = logistic.logistic(whole, columns(y), 2, grid)
    assert float(mine.penalty[0, 0]) == grid[int(np.argmax(accuracies))]


def test_a_network_decodes_what_no_line_does() -> None:
    """Exclusive or; and the same numbers again from the same seed."""
    rng = np.random.default_rng(0)
    x, other = rng.normal(size=(200, 5)), rng.normal(size=(200, 5))
    y, truth = ((rows[:, 0] > 0) ^ (rows[:, 1] > 0) for rows in (x, other))
    part, labels = split(x, other), columns(y.astype(int))
    accuracy = {
        name: float((decoders.predicted(scores.test)[0, :, 0].numpy() == truth).mean())
        for name, scores in {
            "ridge": decoders.ridge(part, labels, 2, (0.1,)), "mlp": mlp.mlp(part, labels, 2, 0),
        }.items()
    }  # fmt: skip
    assert accuracy["mlp"] > 0.8 > 0.65 > accuracy["ridge"]
    state = torch.random.get_rng_state()
    assert torch.equal(mlp.mlp(part, labels, 2, 0).test, mlp.mlp(part, labels, 2, 0).test)
    assert torch.equal(state, torch.random.get_rng_state())


def test_inner_products_are_of_standardised_states() -> None:
    """Also of float32 states with a large offset, a constant column, and one that varies by rounding alone."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2, 12)).astype(np.float32) + 300
    x[:, :, 3], x[:, 1, 4] = 7.0, 7.0 * (1 + 1.2e-7 * (np.arange(30) % 2))
    train = torch.arange(30) % 3 > 0
    rows, others = train.nonzero().flatten(), (~train).nonzero().flatten()
    part = Standardised(torch.from_numpy(x), train[None]).split(0, rows, others, rows % 5)
    fitted, rest = (x[at.numpy()].astype(np.float64) for at in (rows, others))
    keep = np.ones((2, 12), dtype=bool)
    keep[:, 3] = keep[1, 4] = False
    for layer in range(2):
        z, z_other = standardised(fitted[:, layer, keep[layer]], rest[:, layer, keep[layer]])
        np.testing.assert_allclose(part.train[layer], z @ z.T, atol=1e-8)
        np.testing.assert_allclose(part.test[layer], z_other @ z.T, atol=1e-8)


def test_states_that_are_all_the_same_say_nothing() -> None:
    """Scores are all the same; nothing is decoded from rounding, and nothing fails."""
    y = np.arange(40) % 2
    part = split(np.full((40, 6), 1 / 3), np.full((10, 6), 1 / 3))
    for scores in (
        decoders.ridge(part, columns(y), 2, (0.1,)), decoders.difference_of_means(part, columns(y), 2),
        decoders.lda(part, columns(y), 2), logistic.logistic(part, columns(y), 2, (1.0,)),
        mlp.mlp(part, columns(y), 2, 0),
    ):  # fmt: skip
        assert bool((scores.test == scores.test[:, :1]).all()) and bool(scores.test.isfinite().all())


def test_logistic_that_cannot_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "STEPS", 1)
    x, y, other = drawn()
    with pytest.raises(ic.PlanError, match="did not converge in 1 steps .C 100, .* take a smaller C"):
        logistic.logistic(split(x, other), columns(y), 2, (100.0,))
