"""Studies with function vectors: other templates, more or fewer heads, natural text, the mean hidden state.

Source: Todd et al. (2024), section 3 and appendices; each must equal the evaluations that it is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .effects import top_heads
from .evaluate import Evaluation, evaluate, questions, wilson
from .inject import continued, injection, scored
from .prompts import Prompt
from .tasks import Pair, Task
from .template import PREFIXES, SEPARATORS, Template
from .vectors import Bias, FunctionVector, function_vector

TEXTS = ('The word "{}" means', "Another way to say {} is", "When people say {}, what they mean is")
"""Natural sentences that end where an answer about a word may begin."""


def templates(n: int = 15, seed: int = 0) -> list[Template]:
    """Templates drawn without repetition from all pairs of published prefixes and separators.

    Raises:
        PlanError: more than there are.
    """
    every = list(product(PREFIXES, SEPARATORS))
    if not 1 <= n <= len(every):
        raise ic.PlanError(f"{n} templates; there are {len(every)}")
    chosen = np.random.RandomState(seed).choice(len(every), n, replace=False).tolist()
    return [Template.of(*every[i]) for i in chosen]


def portability(
    model: ic.Model,
    task: Task,
    vector: FunctionVector,
    layer: int,
    *,
    over: Iterable[Template],
    shots: int = 10,
    filtered: bool = True,
    rows: Sequence[int] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy under templates that the vector was not made with, one row each: few-shot, zero-shot with and without
    the vector, shuffled few-shot with and without.

    Args:
        filtered: zero-shot and shuffled on the questions that the model answers with shots, as published; templates
            under which it answers none have not-a-number there.
    """
    table = []
    for template in over:
        drawn: dict[str, Any] = {"rows": rows, "seed": seed, "template": template}
        few = evaluate(model, questions(task, model.tokenizer, shots=shots, **drawn))
        chosen = list(range(len(task.test))) if rows is None else list(rows)
        kept = [row for row, rank in zip(chosen, few.clean_rank.tolist(), strict=True) if rank == 0 or not filtered]
        row: dict[str, Any] = {"template": str(template), "questions": len(kept), "few-shot": few.accuracy()}
        for name, n in (("zero-shot", 0), ("shuffled", shots)):
            base = steered = float("nan")
            if kept:
                prompts = questions(
                    task, model.tokenizer, shots=n, shuffled=name == "shuffled", filter_set=kept, **drawn
                )
                evaluation = evaluate(model, prompts, vector, layers=[layer])
                base, steered = evaluation.accuracy(), evaluation.accuracies()[0]
            row |= {name: base, f"{name} + vector": steered}
        table.append(row)
    return table


def heads_curve(
    model: ic.Model,
    mean: Float[Tensor, "layer head slot d_head"],
    aie: Float[Tensor, "layer head"],
    prompts: Sequence[Prompt],
    layer: int,
    *,
    counts: Iterable[int] = range(41),
    bias: Bias = "per_head",
) -> list[dict[str, Any]]:
    """Accuracy with vectors of the best k heads, for each k, in one sweep; k = 0 is the model as it is.

    Args:
        counts: which k; those beyond the model's heads are left out.
    """
    ks = [k for k in counts if 0 <= k <= len(model.heads)]
    vectors = {k: function_vector(model, mean, top_heads(aie, k), bias=bias) for k in ks if k}
    edits = [injection(model, vector, layer) for vector in vectors.values()]
    ranked = scored(model, prompts, edits)["rank"]
    ranks = {0: ranked.clean, **dict(zip(vectors, ranked.values, strict=True))}
    rows = []
    for k in ks:
        share = float((ranks[k] < 1).double().mean())
        low, high = wilson(share, len(prompts))
        norm = vectors[k].norm if k else 0.0
        rows.append({"heads": k, "accuracy": share, "low": low, "high": high, "norm": norm})
    return rows


def hidden_state_baseline(
    model: ic.Model, prompts: Sequence[Prompt], means: Float[Tensor, "layer d_model"], task: str = ""
) -> Evaluation:
    """Accuracy with each layer's mean hidden state added at that layer: what function vectors are compared with."""
    vectors: Mapping[int, FunctionVector] = {
        layer: FunctionVector(means[layer], task=f"mean hidden state of {task}", model=model.source, layer=layer)
        for layer in range(model.n_layers)
    }
    return evaluate(model, prompts, vectors, name=f"mean hidden state of {task}")


def natural_text(
    model: ic.Model,
    pairs: Iterable[Pair],
    vector: FunctionVector,
    layer: int,
    *,
    texts: Sequence[str] = TEXTS,
    strength: float = 1.0,
    steps: int | None = None,
    max_new_tokens: int = 5,
) -> list[dict[str, Any]]:
    """Greedy completions of sentences about each input, with and without the vector; a hit is a completion that holds
    the output.

    Args:
        texts: sentences with `{}` for the input.
        steps: how many new tokens come under the vector (None: all).

    Raises:
        PlanError: a sentence without a place for the input.
    """
    for text in texts:
        if "{}" not in text:
            raise ic.PlanError(f"the sentence {text!r} has no {{}} for the input")
    edit = injection(model, vector, layer, strength=strength)
    rows = []
    for text, pair in product(texts, pairs):
        sentence = text.replace("{}", pair.input)
        plain = continued(model, sentence, max_new_tokens=max_new_tokens).texts[0]
        steered = continued(model, sentence, edit, steps=steps, max_new_tokens=max_new_tokens).texts[0]
        rows.append(
            {
                "text": sentence, "target": pair.output, "plain": plain, "with vector": steered,
                "plain hit": pair.output in plain, "hit": pair.output in steered,
            }
        )  # fmt: skip
    return rows
