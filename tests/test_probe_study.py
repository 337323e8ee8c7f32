"""Folds, nulls and comparisons: what may not be on both sides, planted signals, noise, and the rules of what counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from interp_plugins.probe import gram
from interp_plugins.probe.compare import Comparison, compare
from interp_plugins.probe.decoding import corrected_error
from interp_plugins.probe.folds import Folds, make_folds, merged
from interp_plugins.probe.nulls import bag_of_words, control_labels, shuffled
from interp_plugins.probe.study import decode

import interp_core as ic
from interp_core import stats

ONE = (0.1,)
"""Of ridge probes, where the test is not about how strong a penalty is."""


def sample(n: int = 120, layers: int = 3, d: int = 30, *, seed: int = 0, shift: float = 0.0, start: int = 1):
    """States that tell the label from layer `start` on, and labels."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % 2)
    x = rng.normal(size=(n, layers, d))
    x[:, start:] += shift * y[:, None, None]
    return x, y


def test_folds_deal_whole_groups_evenly() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(80), 3)
    y = rng.permutation(np.arange(240) % 3 == 0).astype(int)
    folds = make_folds(y, groups, seed=3)
    assert len(folds) == 25 and (folds.test.reshape(5, 5, -1).sum(1) == 1).all()
    for train, test, inner in zip(folds.train, folds.test, folds.inner, strict=True):
        assert not set(groups[train]) & set(groups[test]) and (train | test).all()
        assert abs(y[test].sum() - 16) <= 2 and abs(test.sum() - 48) <= 6
        assert ((inner >= 0) == train).all()
        for k in range(5):
            assert not set(groups[inner == k]) & set(groups[train & (inner != k)])
            assert set(y[inner == k]) == {0, 1}
    assert (folds.test[:5] != folds.test[5:10]).any()
    again = make_folds(y, groups, seed=3)
    assert (folds.test == again.test).all() and (folds.inner == again.inner).all()
    assert folds.ratio == pytest.approx(0.25, abs=0.01) and folds.fewest(y) >= 14


def test_donors_carry_no_test_image_into_train() -> None:
    n = 60
    donors = (np.arange(n) + 7) % n
    folds = make_folds(np.arange(n) % 2, np.arange(n), donors=donors, repeats=2)
    for train, test in zip(folds.train, folds.test, strict=True):
        seen = {*np.flatnonzero(test), *donors[test]}
        assert not seen & set(donors[train]) and not set(np.flatnonzero(test)) & set(np.flatnonzero(train))
        assert 0.5 * n < train.sum() < 0.8 * n
    elsewhere = make_folds(np.arange(n) % 2, np.arange(n), donors=np.arange(n) + 1000)
    assert (elsewhere.train | elsewhere.test).all()


def test_labelings_merge_into_groups() -> None:
    assert merged(["a", "a", "b", "c"], [1, 2, 2, 3]).tolist() == [0, 0, 0, 1]


def test_images_on_both_sides_are_what_groups_prevent() -> None:
    """Ten questions about each of 20 images, whose label is the image's: without groups a probe knows the image again."""
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(20), 10)
    y = np.repeat(rng.permutation(np.arange(20) % 2), 10)
    x = rng.normal(size=(20, 1, 40))[image] + 0.1 * rng.normal(size=(200, 1, 40))
    assert decode(x, y, make_folds(y)).accuracy[0] > 0.95
    assert decode(x, y, make_folds(y, image)).accuracy[0] < 0.75
    everywhere = make_folds(y)
    with pytest.raises(ic.PlanError, match="split 0 leaks: group 0 is in train and test"):
        Folds(everywhere.train, everywhere.test, everywhere.inner, everywhere.repeat, image)


def test_decoding_is_what_splits_give_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy, ranking and error by their definitions; the same in chunks of one layer."""
    x, y = sample(shift=0.4)
    folds = make_folds(y, repeats=2)
    whole = decode(x, y, folds, decoder="means", shuffles=3)
    right, areas, by_split = np.zeros((2, 120, 3)), [], []
    for number in range(len(folds)):
        train, test = folds.train[number], folds.test[number]
        z = (x - x[train].mean(0)) / x[train].std(0)
        means = [z[train & (y == k)].mean(0) for k in (0, 1)]
        scores = ((z[test] - (means[0] + means[1]) / 2) * (means[1] - means[0])).sum(-1)
        right[folds.repeat[number], test] = (scores > 0) == y[test, None]
        areas.append([stats.auroc(scores[:, layer], y[test]) for layer in range(3)])
        by_split.append([np.mean([((scores[:, layer] > 0) == y[test])[y[test] == k].mean() for k in (0, 1)])
                         for layer in range(3)])  # fmt: skip
    wanted = np.mean([right[:, y == k].mean((0, 1)) for k in (0, 1)], axis=0)
    np.testing.assert_allclose(whole.accuracy, wanted, atol=1e-12)
    np.testing.assert_allclose(whole.auroc, np.mean(areas, axis=0), atol=1e-12)
    np.testing.assert_allclose(whole.correct, right.mean(0), atol=1e-12)
    np.testing.assert_allclose(whole.by_split, by_split, atol=1e-12)
    variance = np.array(by_split).var(0, ddof=1)
    np.testing.assert_allclose(whole.error, np.sqrt((1 / 10 + 24 / 96) * variance), atol=1e-12)
    monkeypatch.setattr(gram, "CHUNK", 1)
    parts = decode(torch.from_numpy(x), y, folds, decoder="means", shuffles=3)
    np.testing.assert_allclose(parts.hits, whole.hits, atol=0)


def test_shuffles_are_fitted_to_and_scored_by_their_own_labels() -> None:
    x, y = sample(n=60, shift=0.4)
    folds = make_folds(y, repeats=1)
    together = decode(x, y, folds, shuffles=2, seed=5)
    for number in range(2):
        other = shuffled(y, folds.groups, 2, 5)[:, number]
        alone = decode(x, other, folds)
        np.testing.assert_allclose(together.null[number], alone.accuracy, atol=1e-12)


def test_planted_signal_is_found_where_it_is() -> None:
    x, y = sample(n=150, layers=4, shift=0.5, start=2)
    found = compare({"original": x}, y, repeats=2)
    assert (found.original.accuracy[2:] > 0.85).all() and (found.original.accuracy[:2] < 0.65).all()
    assert (found.p_by_layer()[2:] < 0.05).all() and (found.p_by_layer()[:2] > 0.05).all()
    assert found.verdict() == "decodable" and found.flags() == []
    accuracy, null, layers = found.original.chosen()
    assert set(layers) <= {2, 3} and accuracy > 0.85 and len(null) == 100 and null.mean() < 0.6


@pytest.mark.parametrize(("draws", "most"), [(20, 5), pytest.param(200, 22, marks=pytest.mark.slow)])
def test_noise_is_significant_as_often_as_the_level_says(draws: int, most: int) -> None:
    """In draws of pure noise p is uniform and seldom small (more often in less than 1 of 1,000 tries), and a layer chosen
    inside gains nothing."""
    p, best, chosen = [], [], []
    for seed in range(draws):
        x, y = sample(n=60, d=10, layers=3, seed=seed)
        found = Comparison(
            {"original": decode(x, y, folds := make_folds(y, repeats=1, seed=seed), shuffles=19, penalties=(0.1,))}, None,
            folds,
        )  # fmt: skip
        p.append(found.p())
        best.append(found.original.accuracy.max())
        chosen.append(found.original.chosen()[0])
    assert (np.array(p) <= 0.05).sum() <= most and abs(np.mean(p) - 0.5) < 1.1 / draws**0.5
    assert np.mean(best) > 0.53 and abs(np.mean(chosen) - 0.5) < 0.03


def test_gain_is_paired() -> None:
    x, y = sample(n=120, shift=0.3)
    blind, _ = sample(n=120, seed=9)
    found = compare({"original": x, "blind_random": blind, "blind_black": x}, y, repeats=2, penalties=ONE)
    assert found.flags(1) == [] and found.verdict(1) == "decodable beyond the blind image"
    same = found.gain("blind_black")
    assert not same.value.any() and not same.high.any() and not found.gain_error("blind_black").any()
    gain = found.gain(simultaneous=True)
    wanted = found.original.accuracy - found.modes["blind_random"].accuracy
    np.testing.assert_allclose(gain.value, wanted, atol=1e-12)
    after = found.after(1, minus="blind_random")
    assert after.value == pytest.approx(wanted[1:].mean()) and after.low > 0 and after.units == 120
    by_hand = found.original.by_split - found.modes["blind_random"].by_split
    np.testing.assert_allclose(found.gain_error(), corrected_error(by_hand, found.folds.ratio))
    assert "original above it +" in str(found) and "not that the model uses them" in str(found)
    assert "<svg" in found.curves().html()


def test_words_and_control_tasks() -> None:
    """Labels that the question tells need no image; a probe that memorises types is not selective."""
    rng = np.random.default_rng(0)
    words = rng.permutation(np.repeat(["is it red?", "is it blue?", "how many?", "where is it?"], 30))
    y = (words == "is it red?") | (words == "how many?")
    of = dict(zip(np.unique(words), rng.normal(size=(4, 1, 20)), strict=True))
    x = np.stack([of[word] for word in words]) + 0.1 * rng.normal(size=(120, 1, 20))
    found = compare({"original": x}, y, questions=list(words), repeats=2)
    assert found.words is not None and found.words.accuracy[0] == 1
    assert abs(found.original.selectivity[0]) < 0.05
    row = found.table()[-1]
    assert row["mode"] == "words" and abs(row["gain"]) < 0.05
    labels = control_labels(y.astype(int), words, 10)
    assert all({word: set(labels[words == word, k]) for word in words}[words[0]] for k in range(10))
    assert all(len(set(labels[words == word, k])) == 1 for word in np.unique(words) for k in range(10))
    assert all(len(set(labels[:, k])) == 2 for k in range(10))
    np.testing.assert_array_equal(bag_of_words(["A a b!", "c"])[:, 0], [[1, 2, 1, 0], [0, 0, 0, 1]])


def test_shuffles_keep_groups() -> None:
    groups = np.repeat(np.arange(10), 4)
    constant = np.repeat(np.arange(10) % 2, 4)
    drawn = shuffled(constant, groups, 20)
    assert all(len(set(drawn[groups == g, k])) == 1 for g in range(10) for k in range(20))
    assert (drawn.sum(0) == 20).all() and len({tuple(column) for column in drawn.T}) > 15
    mixed = np.arange(40) % 2
    free = shuffled(mixed, groups, 20)
    assert (free.sum(0) == 20).all() and any(len(set(free[groups == 0, k])) == 2 for k in range(20))


def test_rules_of_what_counts() -> None:
    x, y = sample(n=120, shift=0.3)
    few = compare({"original": x[:80]}, y[:80], repeats=1, penalties=ONE)
    assert [flag[:16] for flag in few.flags()] == [
        "inconclusive: 80",
        "inconclusive: a ",
    ] and few.verdict() == "inconclusive"
    unsure = compare({"original": x}, y, repeats=1, shuffles=20, penalties=ONE)
    assert "20 shuffled labelings, 100 at least" in unsure.flags()[0]
    fine = compare({"original": x}, y, repeats=1, penalties=ONE)
    below = replace(fine.original, hits=np.where(np.arange(fine.original.hits.shape[2])[:, None] == 0, 2.0,
                                                 fine.original.hits))  # fmt: skip
    wrong = Comparison({"original": below}, None, fine.folds)
    assert wrong.verdict() == "error" and "lies below that of shuffled labels" in wrong.flags()[0]
    leaky = replace(fine, leaky=True)
    assert leaky.verdict() == "error" and "leaky" in leaky.flags()[0]
    shown = compare({"original": x, "blind_random": x}, y, groups=np.arange(120), donors=(np.arange(120) + 2) % 120,
                    donor_labels=np.roll(y, -2), repeats=1, penalties=ONE)  # fmt: skip
    assert shown.collisions == pytest.approx((y == np.roll(y, -2)).mean()) and "of the donors' images" in str(shown)


def test_what_is_refused() -> None:
    x, y = sample()
    folds = make_folds(y)
    bare = compare({"original": x}, y, repeats=1, shuffles=0, penalties=ONE)
    for call, message in (
        (lambda: make_folds(np.zeros(20)), "of 1 classes"),
        (lambda: make_folds([0] * 20 + [1] * 3), r"class 1 is in 3 group\(s\), 5 folds need 5"),
        (lambda: make_folds([0, 1] * 10, [0] * 19), "20 labels, 19 groups"),
        (lambda: decode(x[:, 0], y, folds), r"states \[sample layer d\] are needed"),
        (lambda: decode(x[:50], y, folds), "50 states, 120 labels"),
        (lambda: decode(np.where(x > 3, np.nan, x), y, folds), "samples are not finite"),
        (lambda: decode("states", y, folds), "takes numbers|states"),
        (lambda: decode(x, y, folds, decoder="rigde"), "no probe 'rigde'. Did you mean 'ridge'"),
        (lambda: decode(x, y, folds, penalties=(0.0,)), "numbers above 0"),
        (lambda: decode(x, y, folds, decoder="lda", penalties=(1.0,)), "of ridge or logistic"),
        (lambda: decode(x, y, folds, shuffles=-1), "how many permuted labelings"),
        (lambda: decode(x, y, folds, types=["one"] * 120), r"1 type\(s\) of question for 2 classes"),
        (lambda: bare.original.selectivity, "needs a control task"),
        (lambda: decode(x, y, folds, decoder="means").chosen(), "without inner folds"),
        (lambda: compare({"blind_black": x}, y), "'original' among them"),
        (lambda: bare.p(), "needs shuffled labels"),
        (lambda: bare.gain(), "no mode 'blind_random' here"),
        (lambda: bare.after(7), "a layer, 0 to 2"),
        (lambda: bag_of_words(["", " "]), "no words"),
    ):  # fmt: skip
        with pytest.raises(ic.PlanError, match=message):
            call()
