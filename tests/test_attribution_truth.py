"""Methods find what an answer of `toy:text` rests on: a value behind aliases, in the prompt or in written reasoning.

Prompts and methods are those of `benchmarks/attribution_truth.py`, whose tables are in docs/attribution_truth.md.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import attribution_truth as truth
import pytest
import torch
from attribution_truth import FLOWS_AND_GRADIENTS, METHODS, Prompt
from conftest import the_real_model, toy_model
from interp_plugins.attribution.data.building import build
from interp_plugins.attribution.data.sources import needles, two_steps

import interp_core as ic
from interp_core.stats import Bootstrap

SIZES = [6, pytest.param(60, marks=pytest.mark.slow)]


@cache
def asked(hops: int, count: int) -> list[Prompt]:
    return truth.needles(toy_model(), hops, count)


def found(prompts: list[Prompt], method: str, **settings: Any) -> list[float]:
    return [truth.found(truth.scored(toy_model(), prompt, method, settings), prompt) for prompt in prompts]


@cache
def recovered(name: str, hops: int, count: int) -> list[float]:
    method, settings = METHODS[name]
    return found(asked(hops, count), method, **settings)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_prompts_can_be_solved() -> None:
    """All gold tokens have room in a tenth of the prompt, and are the value and its aliases, each behind a name."""
    for hops in truth.MOST_CHAINS:
        for prompt in asked(hops, 6):
            labels, size = prompt.tokens.labels[0], prompt.tokens.lengths[0] - 1
            assert len(prompt.gold) == hops + 1 <= -(-size // 10)
            assert labels[prompt.gold[0]] == labels[-1] != prompt.other
            way = [labels[-2], *(labels[place] for place in reversed(prompt.gold))]
            assert [labels[place - 1] for place in reversed(prompt.gold)] == way[:-1]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("hops", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_flows_and_gradients_find_more_than_chance(hops: int, count: int) -> None:
    """By a paired interval: the same prompts, and what random weights find in each on average, which is exact."""
    prompts = asked(hops, count)
    by_chance = [truth.by_chance(prompt) for prompt in prompts]
    for name in FLOWS_AND_GRADIENTS:
        gap = Bootstrap().difference(recovered(name, hops, count), by_chance)
        assert gap.low > 0, f"{name}: {gap}"


@pytest.mark.parametrize("count", SIZES)
def test_a_value_that_is_stated_is_found(count: int) -> None:
    """Without an alias; in the reference profile the flow starts at the value itself, and does not find where it is
    from."""
    assert mean(recovered("ifr span", 0, count)) >= 0.9
    for name in ("attnlrp", "attnlrp, cp_lrp", "attnlrp, pa_lrp", "integrated_gradients"):
        assert mean(recovered(name, 0, count)) >= 0.95, name
    assert mean(recovered("ifr span, reference", 0, count)) <= 0.05


@pytest.mark.parametrize(
    ("hops", "count"),
    [(2, 3), pytest.param(1, 60, marks=pytest.mark.slow), pytest.param(2, 60, marks=pytest.mark.slow)],
)
def test_aliases_are_found_by_leaving_them_out(hops: int, count: int) -> None:
    assert mean(recovered("leave_out, logit", hops, count)) >= 0.8


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_hops_go_through_written_reasoning(steps: int, count: int) -> None:
    """The target states the aliases, the prompt the value: it takes a hop per alias to come to the value, if hops go
    on from the tokens that were read. The flow into the answer alone hardly comes there."""
    prompts = truth.written(toy_model(), steps, count)
    hop = [found(prompts, "ifr", variant="multi_hop", read_at="tokens", n_hops=hops) for hops in range(steps + 1)]
    assert mean(hop[steps]) >= 0.9
    assert all(mean(hop[hops]) <= 0.4 for hops in range(steps))
    assert found(prompts, "ifr", variant="span") == hop[0]


def test_where_hops_go_on() -> None:
    """A hop into one token of the reasoning is the flow into the position that predicts it, or into its own, which
    predicts the next."""
    prompt, model = truth.written(toy_model(), 1, 1)[0], toy_model()
    for at, shift in (("predictors", 0), ("tokens", 1)):
        hops = ic.method("ifr")(
            model, prompt.tokens, variant="multi_hop", sink=(6, 7), thinking=(2, 3), n_hops=1, read_at=at
        )
        direct = ic.method("ifr")(model, prompt.tokens, variant="span", sink=(2 + shift, 3 + shift))
        assert hops.mass[0, 0] > 0 and torch.allclose(hops.hops[0, 1], direct.hops[0, 0], rtol=1e-6, atol=1e-9)
        answer = ic.method("ifr")(model, prompt.tokens, variant="span", sink=(6, 7))
        assert torch.equal(hops.hops[0, 0], answer.hops[0, 0])


@cache
def real_prompts() -> list[Prompt]:
    """What the real model answers itself: a number that is hidden in 260 tokens."""
    model = the_real_model()
    built = list(build(model, needles(2, 40), max_new_tokens=24, batch_size=2))
    assert all(one.example for one in built), [one.answer for one in built]
    return [truth.cached(model, one.example, "sound") for one in built if one.example]


@pytest.mark.real
@pytest.mark.parametrize("name", ["ifr span", "ifr multi_hop_both, 1 hop", "attnlrp", "attnlrp, cp_lrp"])
def test_the_real_model_reads_the_sentence_with_the_number(name: str) -> None:
    method, settings = truth.REAL[name]
    for prompt in real_prompts():
        assert truth.found(truth.scored(the_real_model(), prompt, method, settings), prompt) >= 0.4
        assert truth.by_chance(prompt) < 0.11


@pytest.mark.real
def test_the_real_model_reads_its_own_reasoning() -> None:
    """A question of two steps, answered with written reasoning: most of the flow into the answer comes from what was
    written, little from the question, and a hop hands more on to it."""
    model = the_real_model()
    asked = next(example for example in two_steps(40) if example.prompt.startswith("Carol has 6 marbles."))
    (built,) = build(model, [asked], max_new_tokens=64)
    assert built.example is not None, built
    prompt = truth.cached(model, built.example, "sound")
    result = truth.scored(model, prompt, "ifr", {"variant": "multi_hop", "read_at": "tokens"})
    first, second = result.hops[0, :, prompt.tokens.columns("prompt")[0]].sum(-1) / result.hops[0].sum(-1)
    assert len(prompt.tokens.columns("thinking")[0]) > 30 and result.mass[0, 0] > 0.5
    assert first < 0.2 and second > 1.2 * first
