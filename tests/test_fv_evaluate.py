"""Evaluations equal the published code's: rank lists exactly, accuracies, perplexities, filters, string metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fv_golden as golden
import pytest
import torch
from conftest import toy_model
from fv_golden import FAMILIES
from interp_plugins.function_vectors.evaluate import (
    Evaluation,
    baseline,
    evaluate,
    filter_set,
    generated,
    questions,
    wilson,
)
from interp_plugins.function_vectors.inject import by_layer, injection
from interp_plugins.function_vectors.metrics import answer_in, exact_match, f1, first_word, normalised
from interp_plugins.function_vectors.prompts import Prompt
from interp_plugins.function_vectors.tasks import Pair, Task
from interp_plugins.function_vectors.vectors import FunctionVector

import interp_core as ic

ROWS = range(24)


def asked(family: str, **how: Any) -> list[Prompt]:
    """The first 24 test questions as the reference drew them."""
    return questions(golden.task(), golden.model(family).tokenizer, **{"rows": ROWS, **how})


def same(
    found: dict[str, Any], wanted: dict[str, Any], family: str, made: list[Prompt], layer: int | None = None
) -> None:
    """Ranks are the published ones, but for ties; accuracies are those of the ranks."""
    model = golden.model(family)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if key == "clean_ppl":
            assert found[key] == pytest.approx(value, rel=1e-4)
        elif key.endswith("rank_list"):
            with_vector = key.startswith("intervention")
            edits = injection(model, golden.vector(family), layer) if with_vector else ()  # type: ignore[arg-type]
            golden.same_ranks(torch.tensor(found[key]), value, model, made, edits)
        else:
            ranks = [table[key.replace("topk", "rank_list")] for table in (found, wanted)]
            ties = sum(a != b for a, b in zip(*ranks, strict=True))
            for (k, share), (known, published) in zip(found[key], value, strict=True):
                assert k == known and abs(share - published) * len(made) <= ties + 1e-6, key


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_vector(family: str) -> None:
    wanted = golden.table(family, "eval_first24_test")
    for shots in (0, 1, 10):
        made = asked(family, shots=shots)
        found = evaluate(golden.model(family), made, likelihood=True)
        same(found.published(), wanted[f"no_intervention_{shots}shot"], family, made)
    made = asked(family, shots=10, shuffled=True)
    shuffled = evaluate(golden.model(family), made)
    same(shuffled.published(), wanted["no_intervention_10shot_shuffled"], family, made)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_vector_at_every_layer(family: str) -> None:
    model, wanted = golden.model(family), golden.table(family, "eval_first24_test")
    plain, few = asked(family), asked(family, shots=10, shuffled=True)
    zero, shuffled = (evaluate(model, made, golden.vector(family)) for made in (plain, few))
    for layer in range(4):
        same(zero.published(layer), wanted[f"zs_layer{layer}"], family, plain, layer)
        same(shuffled.published(layer), wanted[f"fs_shuffled_layer{layer}"], family, few, layer)
    even = asked(family, filter_set=range(0, 24, 2))
    found = evaluate(model, even, golden.vector(family), layers=[1])
    same(found.published(1), wanted["zs_layer1_filter_even"], family, even, 1)


def test_filter_set_and_batches() -> None:
    """On the toy, whose answers are certain: batches give the same ranks."""
    model = toy_model()
    made = [
        Prompt("", tuple(model.tokens(text).ids[0].tolist()), (), (), " cold", (int(model.tokens(" cold").ids[0, 0]),))
        for text in ("Q: big\nA: small\n\nQ: wet\nA: dry\n\nQ: hot\nA:", "Q: hot\nA:", "Q: big\nA: grand\n\nQ: hot\nA:")
    ]
    assert filter_set(model, made) == filter_set(model, made, batch=3) == [0]
    alone, together = (evaluate(model, made, batch=n).clean_rank for n in (1, 3))
    assert torch.equal(alone, together) and alone[0] == 0 and (alone[1:] > 0).all()


def test_what_an_evaluation_says() -> None:
    found = Evaluation(
        torch.tensor([5, 1, 0, 7]), torch.tensor([[0, 1, 0, 3], [0, 0, 0, 9]]), None, (1, 4), "zero-shot"
    )
    assert found.accuracy() == 0.25 and found.accuracy(2) == 0.5 and found.accuracies() == [0.5, 0.75]
    assert found.best_layer == 4 and found.perplexity is None
    assert [row["layer"] for row in found.table()] == ["none", "1", "4"] and found.table()[1]["top-2"] == 0.75
    low, high = found.bands()[1]
    assert 0.3 < low < 0.75 < high < 0.96
    assert wilson(0.0, 10)[0] == pytest.approx(0, abs=1e-12) and wilson(1.0, 10)[1] == pytest.approx(1, abs=1e-12)
    with pytest.raises(ic.PlanError, match=r"layer 2 was not evaluated; layers \[1, 4\] were"):
        found.published(2)
    with pytest.raises(ic.PlanError, match="has no vector"):
        _ = Evaluation(torch.tensor([1])).best_layer


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = Evaluation(torch.tensor([5, 1]), torch.tensor([[0, 1]]), torch.tensor([0.5, 1.0]), (3,), "x")
    assert Evaluation.load(found.save(tmp_path)) == found
    assert found.perplexity == pytest.approx((0.5**0 * 2.718281828**0.5 + 2.718281828) / 2)


def test_baseline_by_shots() -> None:
    """The toy answers better with shots than without."""
    pairs = [Pair(a, b) for a, b in (("big", "small"), ("hot", "cold"), ("wet", "dry"), ("old", "new"), ("rich", "poor"),
             ("fast", "slow"), ("hard", "soft"), ("dark", "light"), ("full", "empty"), ("high", "low"))]  # fmt: skip
    few = Task.of("antonym", pairs)
    found = baseline(toy_model(), few, shots=(0, 3), batch=4)
    assert list(found) == [0, 3] and found[3].name == "3 shots"
    assert found[3].accuracy() >= found[0].accuracy() and found[3].clean_rank.float().mean() < 5


def test_a_random_vector_is_evaluated_layer_by_layer() -> None:
    family = "gpt2-xl"
    model, made = golden.model(family), asked(family)[:3]
    control = golden.vector(family).random(3)
    found = evaluate(model, made, control, layers=[2], strength=2.0)
    assert found.layers == (2,) and found.rank is not None
    wanted = by_layer(model, made, control, layers=[2], strength=2.0).values
    assert torch.equal(found.rank, wanted.long())


@pytest.mark.parametrize(
    ("text", "target", "scores"),
    [
        ("The cat.", "cat", (1.0, 1.0, 1.0)),
        ("cat dog", "cat", (2 / 3, 0.0, 1.0)),
        ("dog  cat", "a cat", (2 / 3, 0.0, 0.0)),
        ("", "cat", (0.0, 0.0, 0.0)),
        ("the", "an", (0.0, 1.0, 1.0)),
        ("New York", "new-york", (0.0, 0.0, 0.0)),
    ],
)
def test_string_metrics(text: str, target: str, scores: tuple[float, float, float]) -> None:
    assert (f1(text, target), exact_match(text, target), first_word(text, target)) == pytest.approx(scores)


def test_answers_are_read_from_texts() -> None:
    assert (
        answer_in(" cold\n\nQ: wet") == " cold"
        and answer_in("\n?") == ""
        and answer_in("?! U.S. of A, b") == " U.S. of A"
    )
    assert normalised("The  Cat's, a DOG!") == "cats dog"


def test_generated_answers() -> None:
    model = toy_model()
    text = "Q: big\nA: small\n\nQ: wet\nA: dry\n\nQ: hot\nA:"
    made = [Prompt(text, tuple(model.tokens(text).ids[0].tolist()), (), (), " cold", (0,))]
    plain = generated(model, made, max_new_tokens=3)
    assert (
        plain[0]["answer"].strip() == "cold"
        and plain[0]["f1"] == plain[0]["exact_match"] == plain[0]["first_word"] == 1
    )
    push = injection(
        model, FunctionVector(torch.randn(128, generator=torch.Generator().manual_seed(1))), 5, strength=1000.0
    )
    assert generated(model, made, push, max_new_tokens=3)[0]["exact_match"] == 0
