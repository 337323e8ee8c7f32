"""On the toy: the vectors of all relations answer questions about words that no extraction prompt held, random ones do
not, and the difference of two turns answers of the one relation into those of the other."""

from __future__ import annotations

import random
from functools import cache

import torch
from conftest import toy_model
from interp_plugins.function_vectors import (
    FunctionVector,
    Pair,
    Prompt,
    Task,
    Template,
    average,
    build,
    evaluate,
    fixed_trials,
    function_vector,
    indirect_effect,
    injection,
    mean_head_activations,
    questions,
    scored,
    top_heads,
    universal,
)

from interp_core.toys.text import relations


@cache
def study() -> tuple[dict[str, FunctionVector], dict[str, list[Prompt]]]:
    """Vectors of the heads that serve all relations best, and questions about other words."""
    model, means, aies, asked = toy_model(), {}, {}, {}
    for name, pairs in relations().items():
        task = Task.of(name, pairs.items())
        drawn = fixed_trials(task, model.tokenizer, n_trials=6, n_shots=6)
        seen = {pair.input for trial in drawn for pair in (*trial.demos, trial.query)}
        means[name] = mean_head_activations(model, [trial.clean for trial in drawn])
        aies[name] = average(indirect_effect(model, [trial.corrupted for trial in drawn], means[name]))
        rows = [i for i, row in enumerate(task.test) if task.pairs[row].input not in seen]
        asked[name] = questions(task, model.tokenizer, rows=rows[:8])
    heads = top_heads(universal(list(aies.values())), 4)
    return {name: function_vector(model, mean, heads, task=name) for name, mean in means.items()}, asked


def test_vectors_answer_for_every_relation() -> None:
    vectors, asked = study()
    before, after, control = [], [], []
    for name, vector in vectors.items():
        found = evaluate(toy_model(), asked[name], vector, layers=[1])
        before.append(found.accuracy())
        after.append(found.accuracies()[0])
        control += evaluate(toy_model(), asked[name], vector.random(), layers=[1]).accuracies()
    count = len(vectors)
    assert sum(before) / count <= 0.4 and sum(after) / count >= 0.9 and sum(control) / count <= 0.45
    assert min(after) >= 0.5


def test_differences_turn_answers() -> None:
    """Relations that share words, each way."""
    model, (vectors, _) = toy_model(), study()
    some = ("french", "german", "spanish", "capitalize", "plural")
    turned, before = [], []
    for a, b in ((a, b) for a in some for b in some if a != b):
        first, second = relations()[a], relations()[b]
        rng, prompts = random.Random(f"{a} {b}"), []
        for word in rng.sample([w for w in second if w in first and first[w] != second[w]], 3):
            demos = [Pair(w, second[w]) for w in rng.sample([w for w in second if w != word], 3)]
            prompts.append(build(model.tokenizer, Template(), demos, Pair(word, first[word]), None))
        found = scored(model, prompts, [injection(model, vectors[a] - vectors[b], 2)])["rank"]
        before.append(float((found.clean == 0).float().mean()))
        turned.append(float((found.values[0] == 0).float().mean()))
    assert max(before) <= 0.34 and sum(share > 0.5 for share in turned) > len(turned) / 2
    assert torch.tensor(turned).mean() >= 0.8
