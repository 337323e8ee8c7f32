"""What function vectors do to the toy, as Markdown: python benchmarks/function_vectors_toy.py [trials] [questions]

First table: zero-shot accuracy on words that no extraction prompt held, for every relation of `toy:text`: as the model
is, with the relation's vector, with a random vector of its length, with the mean hidden state. Second: the vector of a
relation minus that of the one that the prompt shows, added: how often the answer is then the other relation's.
"""

from __future__ import annotations

import random
import sys
from typing import NamedTuple

import torch
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
    mean_layer_activations,
    questions,
    scored,
    top_heads,
    universal,
)
from interp_plugins.function_vectors.studies import hidden_state_baseline
from torch import Tensor

import interp_core as ic
from interp_core.toys.text import relations

HEADS, SHOTS, LAYER, ALGEBRA_LAYER = 4, 8, 1, 2


class Extracted(NamedTuple):
    """What a relation's prompts gave: mean heads and layers, effects, and questions about other words."""

    heads: Tensor
    layers: Tensor
    aie: Tensor
    asked: list[Prompt]


def extracted(model: ic.Model, name: str, trials: int, asked: int) -> Extracted:
    task = Task.of(name, relations()[name].items())
    drawn = fixed_trials(task, model.tokenizer, n_trials=trials, n_shots=SHOTS)
    clean = [trial.clean for trial in drawn]
    mean = mean_head_activations(model, clean)
    seen = {word for trial in drawn for pair in (*trial.demos, trial.query) for word in pair}
    rows = [i for i, row in enumerate(task.test) if task.pairs[row].input not in seen][:asked]
    aie = average(indirect_effect(model, [trial.corrupted for trial in drawn], mean))
    return Extracted(mean, mean_layer_activations(model, clean), aie, questions(task, model.tokenizer, rows=rows))


def turned(model: ic.Model, vectors: dict[str, FunctionVector], a: str, b: str, n: int) -> tuple[float, float]:
    """How often prompts that show b are answered by a, without and with vector a - vector b."""
    first, second = relations()[a], relations()[b]
    rng = random.Random(f"{a} {b}")
    prompts = []
    for word in rng.sample([w for w in second if w in first and first[w] != second[w]], n):
        demos = [Pair(w, second[w]) for w in rng.sample([w for w in second if w != word], 3)]
        prompts.append(build(model.tokenizer, Template(), demos, Pair(word, first[word]), None))
    edit = injection(model, vectors[a] - vectors[b], ALGEBRA_LAYER)
    found = scored(model, prompts, [edit])["rank"]
    return float((found.clean == 0).float().mean()), float((found.values[0] == 0).float().mean())


def shared(a: str, b: str, n: int) -> bool:
    """Whether enough words have both relations, with different answers."""
    first, second = relations()[a], relations()[b]
    return a != b and sum(w in first and first[w] != second[w] for w in second) >= n


def main(trials: str = "16", asked: str = "99") -> None:
    torch.set_num_threads(1)
    model = ic.load("toy:text")
    found = {name: extracted(model, name, int(trials), int(asked)) for name in relations()}
    heads = top_heads(universal([one.aie for one in found.values()]), HEADS)
    vectors = {name: function_vector(model, one.heads, heads, task=name) for name, one in found.items()}
    print(f"heads: {', '.join(f'L{layer}H{head}' for layer, head, _ in heads)}; after layer {LAYER}\n")
    print(
        "| relation | questions | without | function vector | random | mean hidden state |\n|---|---|---|---|---|---|"
    )
    total = torch.zeros(4)
    for name, one in found.items():
        own = evaluate(model, one.asked, vectors[name], layers=[LAYER])
        control = evaluate(model, one.asked, vectors[name].random(), layers=[LAYER])
        hidden = hidden_state_baseline(model, one.asked, one.layers).accuracies()[LAYER]
        shares = torch.tensor([own.accuracy(), own.accuracies()[0], control.accuracies()[0], hidden])
        total += shares
        print(f"| {name} | {len(one.asked)} | {' | '.join(f'{share:.0%}' for share in shares.tolist())} |")
    print(f"| mean | | {' | '.join(f'{share:.1%}' for share in (total / len(found)).tolist())} |")
    pairs = [(a, b) for a in found for b in found if shared(a, b, 8)]
    rows = [turned(model, vectors, a, b, 8) for a, b in pairs]
    before, after = torch.tensor(rows).mean(0).tolist()
    most = sum(with_vector > 0.5 for _, with_vector in rows)
    print(f"\nvector a - vector b after layer {ALGEBRA_LAYER} on prompts that show b, {len(pairs)} pairs (a, b):")
    print(f"a's answer {before:.1%} without, {after:.1%} with; in most prompts for {most} of {len(pairs)} pairs")


if __name__ == "__main__":
    main(*sys.argv[1:])
