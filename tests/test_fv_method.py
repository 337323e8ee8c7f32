"""The method `function_vectors`: the kit, what it is made of, what it does to the toy, and bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import fv_golden as golden
import pytest
import torch
from conftest import tiny_model, toy_model
from interp_plugins.function_vectors import (
    Pair,
    Task,
    average,
    evaluate,
    fixed_trials,
    function_vector,
    indirect_effect,
    injection,
    mean_head_activations,
    questions,
    top_heads,
)

import interp_core as ic
from interp_core import testing

TEXT = "Q: wet\nA:"


def run(x: Any = TEXT, model: ic.Model | None = None, **settings: Any) -> Any:
    return ic.method("function_vectors")(model or toy_model(), x, **settings)


def test_it_passes_the_kit() -> None:
    few = {"trials": 1, "shots": 2, "top": 2, "questions": 1}
    testing.check_method("function_vectors", settings=few).raise_if_failed()
    for family in ("gpt2-xl", "tiny-pythia"):
        testing.check_method("function_vectors", golden.model(family), settings=few).raise_if_failed()
    model = ic.load(testing.tiny("gemma2", vocab_size=1500), tokenizer=golden.model("gpt2-xl").tokenizer)
    testing.check_method("function_vectors", model, settings={**few, "questions": 0}).raise_if_failed()


def test_it_is_made_of_its_parts() -> None:
    """Vector, heads, ranks and answers are those of the functions by themselves."""
    model = toy_model()
    found = run(["Q: wet\nA:", "Q: big\nA:"], trials=3, shots=4, top=2, layers=[1, 3], questions=3, strength=0.5)
    pairs = Task.of("antonym", [Pair(*pair) for pair in _default_pairs()])
    trials = fixed_trials(pairs, model.tokenizer, n_trials=3, n_shots=4)
    mean = mean_head_activations(model, [trial.clean for trial in trials])
    aie = average(indirect_effect(model, [trial.corrupted for trial in trials], mean))
    vector = function_vector(model, mean, top_heads(aie, 2))
    assert torch.equal(found.aie, aie) and torch.equal(found.vector, vector.vector)
    asked = questions(pairs, model.tokenizer, rows=range(3))
    alone = evaluate(model, asked, vector, layers=[1, 3], strength=0.5)
    assert torch.equal(found.zero_shot, alone.rank) and torch.equal(found.zero_shot_clean, alone.clean_rank)
    steered = model.run(TEXT, edits=injection(model, vector, 3, strength=0.5), logits=-1).logits[0]
    assert found.top_ids[0, 2, 0] == steered.argmax() and found.top_ids.shape == (2, 3, 5)
    assert found.answers(0)[2] == model.word(int(steered.argmax()))


def _default_pairs() -> tuple[Pair, ...]:
    from interp_plugins.function_vectors.method import ANTONYMS

    return ANTONYMS


def test_the_toy_answers_by_the_vector_alone() -> None:
    """Opposites that no prompt shows, of words that it was not made of."""
    found = run(["Q: wet\nA:", "Q: big\nA:"])
    before, after = found.evaluations["zero-shot"].accuracy(), max(found.evaluations["zero-shot"].accuracies())
    assert before < 0.4 and after >= 0.9
    layer = found.function_vector.layer
    assert layer == found.evaluations["zero-shot"].best_layer and found.function_vector.task == "antonym"
    assert found.answers(0)[0] != " dry" and found.answers(0)[-1] == " dry"
    assert "zero-shot" in str(found) and len(found.table()) == 7 and found.table()[3]["text 0"] == " dry"


def test_the_task_comes_in_several_forms(tmp_path: Path) -> None:
    pairs = [list(pair) for pair in _default_pairs()]
    path = tmp_path / "opposites.json"
    path.write_text(json.dumps([{"input": x, "output": y} for x, y in pairs]))
    settings = {"trials": 2, "shots": 3, "top": 2, "questions": 0}
    made = [run(task=task, **settings) for task in (pairs, dict(pairs), str(path), None)]
    assert all(torch.equal(one.vector, made[0].vector) for one in made)
    assert [one.task for one in made] == ["task", "task", "opposites", "antonym"]
    assert made[0].zero_shot is None and made[0].evaluations == {} and made[0].function_vector.layer is None
    replayed = run(task=pairs, by="replay", **settings)
    torch.testing.assert_close(replayed.aie, made[0].aie, atol=1e-6, rtol=1e-3)


def test_pages_and_pictures(tmp_path: Path) -> None:
    found = run(["Q: <b>wet</b>\nA:"], trials=2, questions=3)
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "<svg" in page and "95 % bands" in page and "<b>wet" not in page and "layer 5" in page
    row = re.search(r"<tr><td>(z.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    largest = int(found.aie.abs().nan_to_num().argmax())
    assert row and row[1] == "z[{},{}]".format(*divmod(largest, found.aie.shape[1])) and row[2][0] in "+-"
    assert page.count("<td>✓</td>") == len(found.heads) and "z[" in str(found)
    turned = replace(found, aie=-found.aie)  # the strongest is below zero
    below = re.search(r"<tr><td>(z.*?)</td><td>(.*?)</td>", turned.html())
    assert below and below[1] == row[1] and below[2][0] != row[2][0]
    assert found.png(tmp_path / "heads.png").stat().st_size > 5_000
    assert found.png(tmp_path / "curve.png", row=1).stat().st_size > 5_000 and len(found.charts()) == 2
    assert type(found).load(found.save(tmp_path)) == found
    bare = run(trials=2, questions=0).html()
    assert "<svg" not in bare and "Likeliest tokens after" in bare


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": [["a", "b"], ["c"]]}, r"row 1 is \['c'\]"),
        ({"task": 5}, "row 0 is 5"),
        ({"task": "no/such.json"}, "there is no task file"),
        ({"task": [["a", ""]]}, "output is empty"),
        ({"task": [["a", "b"]] * 5}, "3 training rows .* for 10 demonstrations"),
        ({"top": 99}, "k is 99, this model has 24 heads"),
        ({"layers": [7]}, "7"),
        ({"trails": 3}, "has no setting 'trails'. Did you mean 'trials'"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ic.InterpError, match=message):
        run(**settings)


def test_without_a_tokenizer() -> None:
    with pytest.raises(ic.TextError, match="load the model with its tokenizer"):
        run(torch.tensor([[5, 6]]), tiny_model("llama"))
