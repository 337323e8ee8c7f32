"""Several relations between the same words: one set of heads for all, their vectors, differences and similarities.

    heads           the k of largest AIE, averaged over tasks (or each task's own); the vector is added after one layer.
                    k and layer: the best mean zero-shot accuracy on validation words; of equals, the largest mean
                    log-probability of the answers
    with vector     zero-shot accuracy on test words, after that layer; random: with vectors of the same lengths
    swap[a, b]      share of few-shot prompts showing b that are answered as a would with vector a - vector b, after the
                    layer that turns most of them on validation words
    similarity      cosines between the vectors

`by_word` splits words instead of rows, for all tasks alike: no test word is in an extraction prompt of any task, asked
or answered. Validation words are, as queries. Test words choose nothing.

Source: Todd et al. (2024), sections 2.3, 3.1 and 3.3, arXiv:2310.15213.
Cost: extraction as in `effects`, and forward passes of short prompts. Must equal: `evaluate` of the same vectors.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .effects import Head, average, indirect_effect, top_heads, universal
from .evaluate import questions
from .inject import injection, scored
from .means import mean_head_activations
from .prompts import Prompt, build
from .tasks import Pair, Task
from .template import Template
from .trials import fixed_trials
from .vectors import FunctionVector, function_vector, similarity

Whose = Literal["all", "own"]


def by_word(
    tables: Mapping[str, Mapping[str, str]], *, valid: float = 0.2, test: float = 0.3, seed: int = 0
) -> list[Task]:
    """Tasks of tables `{relation: {word: answer}}` whose words are of one part in all of them. A word that is the
    answer to another one goes where that goes.

    Args:
        valid, test: shares of words.

    Raises:
        PlanError: shares that leave nothing for training.
    """
    if not (valid > 0 and test > 0 and valid + test < 1):
        raise ic.PlanError(f"valid {valid} and test {test} are shares above 0 that leave some words for training")
    group = {word: word for table in tables.values() for word in table}

    def first(word: str) -> str:
        return word if group[word] == word else first(group[word])

    for table in tables.values():
        for word, answer in table.items():
            if answer in group:
                group[first(answer)] = first(word)
    groups = sorted({first(word) for word in group})
    random.Random(seed).shuffle(groups)
    place = {name: (number + 0.5) / len(groups) for number, name in enumerate(groups)}
    tasks = []
    for name, table in tables.items():
        rows: dict[str, list[int]] = {"test": [], "valid": [], "train": []}
        for row, word in enumerate(table):
            at = place[first(word)]
            rows["test" if at < test else "valid" if at < test + valid else "train"].append(row)
        parts = {part: tuple(numbers) for part, numbers in rows.items()}
        whole = Task.of(name, table.items(), seed=seed, test_split=valid + test)
        tasks.append(Task(name, whole.pairs, **parts, seed=seed, test_split=valid + test, source=name))
    return tasks


class Extracted(NamedTuple):
    """What a task's prompts gave, and their template."""

    task: Task
    mean: Float[Tensor, "layer head slot d_head"]
    aie: Float[Tensor, "layer head"]
    template: Template = Template()


class Choice(NamedTuple):
    """How vectors are made and where they go: the number of heads, the layer, and the validation accuracy there."""

    top: int
    layer: int
    accuracy: float


@dataclass(frozen=True, eq=False)
class Related(ic.Result):
    """Vectors of several tasks, and what they do; shares of first-place answers.

    Attributes:
        vector: per task.
        aie: average indirect effect per task.
        clean, accuracy, random: zero-shot on test words: without, with the task's vector, with random vectors of its
            length (the mean over draws); after `layer`.
        curve: with the task's vector, after every layer.
        shown, swap: prompts that show the column's task, answered as the row's: without, and with the difference of
            vectors. Not a number where too few words have both.
        similarity: cosines.
        tasks, questions: names, and how many test words each has.
        heads: of the vectors, or of the first task's where each has its own.
        counts: numbers of heads that were tried.
        swap_layer: where differences are added.
        top, layer, validation: the choice, and its accuracy.
        validated: mean validation accuracy for every number of heads and layer.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vector": ("task", "d_model"), "aie": ("task", "layer", "head"), "clean": ("task",), "accuracy": ("task",),
        "random": ("task",), "curve": ("task", "layer"), "shown": ("task", "task"), "swap": ("task", "task"),
        "similarity": ("task", "task"), "validated": ("count", "layer"),
    }  # fmt: skip
    vector: Float[Tensor, "task d_model"]
    aie: Float[Tensor, "task layer head"]
    clean: Float[Tensor, " task"]
    accuracy: Float[Tensor, " task"]
    random: Float[Tensor, " task"]
    curve: Float[Tensor, "task layer"]
    shown: Float[Tensor, "task task"]
    swap: Float[Tensor, "task task"]
    similarity: Float[Tensor, "task task"]
    validated: Float[Tensor, "count layer"]
    tasks: tuple[str, ...]
    questions: tuple[int, ...]
    heads: tuple[tuple[int, int, float], ...]
    counts: tuple[int, ...]
    swap_layer: int
    top: int
    layer: int
    validation: float

    @property
    def turned(self) -> tuple[int, int]:
        """Pairs of tasks whose difference turns most answers, and pairs tried."""
        known = self.swap[~self.swap.isnan()]
        return int((known > 0.5).sum()), len(known)

    def table(self) -> list[dict[str, Any]]:
        """A row per task, then their mean."""
        columns = {"without": self.clean, "with vector": self.accuracy, "random": self.random}
        rows = [
            {"task": name, "test words": n, **{key: float(share[i]) for key, share in columns.items()}}
            for i, (name, n) in enumerate(zip(self.tasks, self.questions, strict=True))
        ]
        mean = {key: float(share.mean()) for key, share in columns.items()}
        return [*rows, {"task": "mean", "test words": sum(self.questions), **mean}]

    def __str__(self) -> str:
        lines = [f"{'':>12} {'words':>6} {'without':>8} {'vector':>8} {'random':>8}"]
        lines += [
            f"{a:>12} {n:>6} {b:>8.0%} {c:>8.0%} {d:>8.0%}" for a, n, b, c, d in (r.values() for r in self.table())
        ]
        heads = ", ".join(f"z[{layer},{head}]" for layer, head, _ in self.heads)
        done, tried = self.turned
        lines.append(f"{self.top} heads ({heads}), after layer {self.layer}; {self.validation:.1%} on validation words")
        lines.append(
            f"vector a - vector b, after layer {self.swap_layer}: {float(self.swap.nanmean()):.1%} of answers turned, "
            f"{float(self.shown.nanmean()):.1%} without; most answers of {done} of {tried} pairs of tasks"
            if tried
            else "vector a - vector b: no two tasks have words enough in common to tell what it turns"
        )
        return "\n".join(lines)

    def html(self) -> str:
        """Accuracies, answers turned, similarities."""

        def grid(values: Tensor, caption: str, **how: Any) -> str:
            texts = [["" if v != v else f"{v:.2f}" for v in row] for row in values.tolist()]
            return ic.report.Heatmap(values, self.tasks, self.tasks, texts=texts, caption=caption, **how).html()

        swap = "Prompts that show the column's task, with the row's vector minus the column's: answered as the row's."
        shown = f"Mean share without: {float(self.shown.nanmean()):.2g}. ∅: too few words have both."
        turned = grid(self.swap, f"{swap} {shown}", limits=(0.0, 1.0)) if self.turned[1] else ""
        alike = grid(self.similarity, "Cosines between vectors.", diverging=True, limits=(-1.0, 1.0))
        rows = [{key: f"{v:.0%}" if isinstance(v, float) else v for key, v in row.items()} for row in self.table()]
        return ic.report.table(rows) + turned + alike


def extract(
    model: ic.Model,
    tasks: Sequence[Task],
    *,
    template: Template | None = None,
    trials: int = 10,
    shots: int = 10,
    seed: int = 0,
) -> list[Extracted]:
    """Mean activations and AIE of every task, from its own prompts (training words asked of by validation words)."""
    extracted, template = [], template or Template()
    for task in tasks:
        drawn = fixed_trials(task, model.tokenizer, template=template, n_trials=trials, n_shots=shots, seed=seed)
        mean = mean_head_activations(model, [trial.clean for trial in drawn])
        effects = indirect_effect(model, [trial.corrupted for trial in drawn], mean)
        extracted.append(Extracted(task, mean, average(effects), template))
    return extracted


def heads_of(extracted: Sequence[Extracted], k: int, whose: Whose) -> list[tuple[Head, ...]]:
    """The k heads of each task: the same for all, or its own."""
    shared = top_heads(universal([task.aie for task in extracted]), k)
    return [shared if whose == "all" else top_heads(task.aie, k) for task in extracted]


def vectors_of(model: ic.Model, extracted: Sequence[Extracted], k: int, whose: Whose) -> list[FunctionVector]:
    """The vectors of k heads."""
    return [
        function_vector(model, task.mean, heads, task=task.task.name)
        for task, heads in zip(extracted, heads_of(extracted, k, whose), strict=True)
    ]


def choose(
    model: ic.Model,
    extracted: Sequence[Extracted],
    counts: Sequence[int],
    whose: Whose = "all",
    *,
    layers: Sequence[int] | None = None,
) -> tuple[Choice, Float[Tensor, "count layer"]]:
    """Number of heads and layer by mean zero-shot accuracy on validation words, and that accuracy for all of them.

    Args:
        layers: to choose from (None: all).
    """
    places = list(range(model.n_layers)) if layers is None else list(layers)
    shares, logprob = (torch.zeros(len(counts), len(places), dtype=torch.float64) for _ in range(2))
    vectors_by_count = [vectors_of(model, extracted, k, whose) for k in counts]
    for number, task in enumerate(extracted):
        prompts = questions(task.task, model.tokenizer, split="valid", template=task.template)
        edits = [injection(model, vectors[number], layer) for vectors in vectors_by_count for layer in places]
        judged = scored(model, prompts, edits, ("rank", "logprob"))
        shares += (judged["rank"].values == 0).double().mean(-1).view(shares.shape) / len(extracted)
        logprob += judged["logprob"].values.double().mean(-1).view(shares.shape) / len(extracted)
    # equal accuracies are common on few words: the log-probability decides, then the fewest heads, the lowest layer
    pairs = list(zip(shares.flatten().tolist(), logprob.flatten().tolist(), strict=True))
    at, place = divmod(pairs.index(max(pairs)), len(places))
    return Choice(counts[at], places[place], float(shares[at, place])), shares


def related(
    model: ic.Model,
    extracted: Sequence[Extracted],
    *,
    counts: Sequence[int] = (1, 2, 3, 4, 6, 8, 10),
    whose: Whose = "all",
    draws: int = 5,
    words: int = 12,
    context: int = 4,
    seed: int = 0,
) -> Related:
    """Choose heads and layer on validation words, measure on test words.

    Args:
        extracted: of two tasks or more, see `extract`.
        counts: numbers of heads to choose from.
        whose: heads of the largest AIE over all tasks, or each task's own.
        draws: random vectors per task.
        words: test words per pair of tasks, at most; pairs with fewer than 3 are left out.
        context: shots of the prompts whose answers are to be turned.
        seed: of the draw of words and shots.

    Raises:
        PlanError: fewer than two tasks, or tasks without test or validation words.
    """
    tasks = [each.task for each in extracted]
    if len(tasks) < 2:
        raise ic.PlanError(f"{len(tasks)} tasks; what is shared needs at least two")
    for task in tasks:
        for part in ("valid", "test"):
            if not task.rows(part):
                raise ic.PlanError(f"task {task.name} has no {part} rows; give more pairs or another seed")
    tried = tuple(k for k in counts if k <= len(model.heads))
    choice, validated = choose(model, extracted, tried, whose)
    vectors = vectors_of(model, extracted, choice.top, whose)
    prompts = [questions(each.task, model.tokenizer, template=each.template) for each in extracted]
    measured = [_measured(model, *pair, choice.layer, draws) for pair in zip(prompts, vectors, strict=True)]
    clean, accuracy, noise, curve = (torch.stack(column) for column in zip(*measured, strict=True))
    swap = _Swap(extracted, vectors, words, context, seed)
    layers = range(model.n_layers)
    turned = swap.measured(model, "valid", layers)[1].nanmean((1, 2))
    swap_layer = int(turned.nan_to_num().argmax())
    shown, swapped = swap.measured(model, "test", [swap_layer])
    return Related(
        torch.stack([vector.vector for vector in vectors]), torch.stack([each.aie for each in extracted]), clean,
        accuracy, noise, curve, shown, swapped[0], similarity(vectors), validated, tuple(task.name for task in tasks),
        tuple(map(len, prompts)), vectors[0].heads, tried, swap_layer, *choice,
    )  # fmt: skip


def _measured(
    model: ic.Model, prompts: Sequence[Prompt], vector: FunctionVector, layer: int, draws: int
) -> tuple[Tensor, ...]:
    """Shares without, with the vector, with random ones, and with the vector after every layer."""
    edits = [injection(model, vector, at) for at in range(model.n_layers)]
    edits += [injection(model, vector.random(seed), layer) for seed in range(draws)]
    ranks = scored(model, prompts, edits)["rank"]
    share = (ranks.values == 0).double().mean(-1)
    curve = share[: model.n_layers]
    return (ranks.clean == 0).double().mean(), curve[layer], share[model.n_layers :].mean(), curve


class _Swap(NamedTuple):
    """Prompts that show one task, to be answered as another."""

    extracted: Sequence[Extracted]
    vectors: Sequence[FunctionVector]
    words: int
    context: int
    seed: int

    def prompts(self, model: ic.Model, a: int, b: int, part: str) -> list[Prompt]:
        """Words of a part that both tasks have, with different answers, shown b; none if there are fewer than three."""
        wanted, shown, template = self.extracted[a].task, self.extracted[b].task, self.extracted[b].template
        rng, answers = random.Random(f"{self.seed} {shown.name} {wanted.name}"), dict(wanted.pairs)
        both = [pair for pair in (shown.pairs[row] for row in shown.rows(part)) if pair.input in answers]
        both = [Pair(word, answers[word]) for word, answer in both if answers[word] != answer]
        if len(both) < 3:
            return []
        return [
            build(
                model.tokenizer, template, [shown.pairs[row] for row in rng.sample(shown.train, self.context)], query,
                None,
            )
            for query in rng.sample(both, min(self.words, len(both)))
        ]  # fmt: skip

    def measured(self, model: ic.Model, part: str, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Shares answered as wanted: without `[to shown]`, and with the difference of vectors `[layer to shown]`."""
        n = len(self.extracted)
        clean = torch.full((n, n), torch.nan, dtype=torch.float64)
        turned = torch.full((len(layers), n, n), torch.nan, dtype=torch.float64)
        for a, b in ((a, b) for a in range(n) for b in range(n) if a != b):
            prompts = self.prompts(model, a, b, part)
            if prompts:
                edits = [injection(model, self.vectors[a] - self.vectors[b], layer) for layer in layers]
                ranks = scored(model, prompts, edits)["rank"]
                clean[a, b] = (ranks.clean == 0).double().mean()
                turned[:, a, b] = (ranks.values == 0).double().mean(-1)
        return clean, turned
