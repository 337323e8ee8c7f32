"""Probes of any site, control tasks of word types, and selectivity against capacity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, toy_model
from interp_plugins.probe.capacity import by_rank
from interp_plugins.probe.folds import make_folds
from interp_plugins.probe.method import read_states
from interp_plugins.probe.nulls import seen_types
from interp_plugins.probe.result import ProbeResult
from interp_plugins.probe.sites import probed
from interp_plugins.probe.study import decode
from studying import IDS, tokens
from tolerances import close

import interp_core as ic

WORDS = ("big", "hot", "old", "wet", "small", "cold", "young", "dry")


def texts(n: int = 60) -> tuple[list[str], list[bool]]:
    picks = np.random.default_rng(0).integers(0, 8, (n, 2))
    return [f"Q: {WORDS[a]}\nA: {WORDS[a - 4]}\n\nQ: {WORDS[b]}\nA:" for a, b in picks], (picks[:, 1] < 4).tolist()


@pytest.mark.parametrize(
    ("site", "by", "names"),
    [
        ("mlp_out", "layer", ["mlp_out[0]", "mlp_out[1]", "mlp_out[2]"]),
        ("z[1]", "layer", ["z[1]"]),
        ("z[0:2]", "unit", [f"z[{layer},{head}]" for layer in (0, 1) for head in range(4)]),
        ("k[2]", "unit", ["k[2,0]", "k[2,1]"]),
        ("z[2,3]", "layer", ["z[2,3]"]),
        ("mlp_act[1]", "layer", ["mlp_act[1]"]),
    ],
)
def test_states_are_those_of_a_run(site: str, by: Any, names: list[str]) -> None:
    model = tiny_model("llama")
    sites = probed(model, site, by)
    assert list(map(str, sites)) == names
    states = read_states(model, tokens(IDS), ("all", "answer_token"), "mean", False, sites)
    run = model.run(tokens(IDS), read=sites)
    for k, each in enumerate(sites):
        read = run[each].plain.flatten(2)
        close(states[:, 0, k], read.mean(1), model)
        close(states[:, 1, k], read[:, -1], model)


def test_heads_that_know(tmp_path: Path) -> None:
    """Of the toy's heads of layer 2 two carry the relation to the last token, and nothing of the word asked about; the two
    beside them carry the word."""
    asked, labels = texts()
    found: ProbeResult = ic.method("probe")(
        toy_model(), asked, labels=labels, site="z[1:3]", by="unit", repeats=1, shuffles=5, batch_size=20
    )
    accuracy = dict(zip(found.sites, found.comparisons["answer_token"].original.accuracy.tolist(), strict=True))
    assert len(accuracy) == 8 and found.states.shape == (60, 1, 1, 8, 32)
    assert min(accuracy["z[2,0]"], accuracy["z[2,1]"]) > 0.95 > 0.7 > max(accuracy["z[2,2]"], accuracy["z[2,3]"])
    (chart,) = found.charts()
    assert list(chart.places) == list(found.sites)
    assert ProbeResult.load(found.save(tmp_path)) == found and "z[1,0]" in found.html()


def test_the_stream_is_as_it_was() -> None:
    model = tiny_model("gpt2")
    assert list(map(str, probed(model, None, "layer"))) == [*(f"resid_pre[{i}]" for i in range(3)), "resid_post[2]"]


def test_types_are_the_tokens_that_are_read() -> None:
    """At the word asked about: a probe can memorise a random label for each word, so selectivity is nothing."""
    asked, labels = texts(120)
    model = toy_model()
    named = model.tokens(asked).name(word=[text.split()[-2] for text in asked])
    found: ProbeResult = ic.method("probe")(
        model, named, labels=labels, types="token", positions=("word",), repeats=1, shuffles=0
    )
    assert set(found.types) == {f" {word}" for word in WORDS}
    comparison = found.comparisons["word"]
    assert comparison.original.accuracy.min() > 0.95 and comparison.original.control.min() > 0.95
    assert abs(comparison.original.selectivity).max() < 0.05 and comparison.ceiling == 1
    assert "selectivity" in str(found) and "100% of test samples" in str(found)
    assert [line.name for line in found.charts()[0].lines][-1] == "control task"
    parts = ic.method("probe")(model, named, labels=labels, types="token", positions=("word",), batch_size=50)
    assert parts.types == found.types
    capacity = found.by_capacity("word", [1, 64], repeats=1, controls=3)
    assert capacity.ceiling == 1 and capacity.accuracy.shape == (2, 7)


def test_the_ceiling_is_counted() -> None:
    types = ["a", "a", "b", "b", "c", "d", "e", "e", "a", "b"]
    labels = [0, 1] * 5
    folds = make_folds(labels, n_folds=2, repeats=3)
    shares = [
        np.mean([types[i] in {types[k] for k in np.flatnonzero(train)} for i in np.flatnonzero(test)])
        for train, test in zip(folds.train, folds.test, strict=True)
    ]
    assert seen_types(types, folds) == pytest.approx(np.mean(shares)) and 0.3 < np.mean(shares) < 1


def test_few_directions_cannot_memorise() -> None:
    """Labels along the widest direction, types in the many narrow ones: selectivity falls as the rank grows."""
    rng = np.random.default_rng(1)
    types = rng.integers(0, 12, 240)
    labels = rng.permutation(np.arange(240) % 2)
    x = 0.4 * rng.normal(size=(12, 24))[types] + 0.02 * rng.normal(size=(240, 24))
    x[:, 0] += 4.0 * labels
    states = np.stack([x, rng.normal(size=x.shape)], 1)
    found = by_rank(states, labels, types, [1, 4, 24], repeats=1, controls=4)
    assert found.accuracy[:, 0].min() > 0.95
    assert found.selectivity[0, 0] > 0.35 > 0.15 > found.selectivity[2, 0] and found.control[2, 0] > 0.85
    folds = make_folds(labels, n_folds=5, repeats=1)
    whole = decode(torch.from_numpy(states), labels, folds, types=types, controls=4)
    np.testing.assert_allclose(found.accuracy[2], whole.accuracy, atol=1e-9)
    np.testing.assert_allclose(found.control[2], whole.control.mean(0), atol=1e-9)
    assert [line.name for line in found.curves().lines] == ["accuracy", "control task", "selectivity"]
    assert len(found.table()) == 6


def test_what_is_refused() -> None:
    model, (asked, labels) = toy_model(), texts(20)
    for settings, message in (
        ({"site": "mlp_ou"}, "no site is called 'mlp_ou'"),
        ({"site": "pattern"}, "take a site of layers"),
        ({"site": "embed"}, "take a site of layers"),
        ({"site": "z[2]@-1"}, "positions=\\(…\\) say where"),
        ({"site": "mlp_out", "by": "unit"}, "has no heads or experts"),
        ({"site": "z[9]"}, "no layer 9"),
        ({"site": "z[1]", "cliff_boundary": 1}, "cliff_boundary 1 of 0 layers"),
        ({"types": "token", "positions": ("answer_token", "0")}, "tokens at one position"),
        ({"types": "word"}, "types has 4 items"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            ic.method("probe")(model, asked, labels=labels, **settings)
    found: ProbeResult = ic.method("probe")(model, asked, labels=labels)
    with pytest.raises(ic.PlanError, match="selectivity needs labels"):
        found.by_capacity("answer_token")
    with pytest.raises(ic.PlanError, match="1 or more"):
        by_rank(found.at("answer_token")["original"], labels, asked, [0])
