"""The method `function_vectors`: a vector of a task's heads, and what it makes of texts that do not show the task.

    mean[l, a]    heads at the last token, over prompts that show the task
    AIE[l, a]     how far they bring the answer back, one by one, where the prompt's answers are shuffled
    v             Σ over the heads of largest AIE of what they add to the residual stream
    text, layer   the likeliest next tokens with v added at the text's last token, after that layer

The task comes with the settings, as pairs of words; the text that the method is called on is where the vector acts. A
few rows of the task are held back: how often they are answered without shots, and under shuffled ones, with and without
the vector.

Source: Todd et al. (2024), "Function Vectors in Large Language Models", arXiv:2310.15213.
Cost, for T-token prompts, L layers and H heads: trials × (2·L·T + H·L(L + 1)/2) token-layers for the vector, questions
× (L·T + L(L + 1)/2) for accuracies, L + 1 forward passes of the text.
Must equal: the published code's means, effects, heads, vectors and ranks (tests/data/fv).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .effects import average, gap, indirect_effect, top_heads
from .evaluate import Evaluation, evaluate, questions
from .files.trials import Trials
from .inject import injection
from .means import BATCH, mean_head_activations
from .page import accuracy_curves, heads_map, strongest
from .tasks import Pair, Task, load_task
from .template import Template
from .trials import fixed_trials
from .vectors import FunctionVector, function_vector
from .vocab import decoded, words

_OPPOSITES = (
    "big small, small big, hot cold, cold hot, old young, young old, fast slow, slow fast, rich poor, poor rich, hard "
    "soft, soft hard, dark light, light dark, strong weak, weak strong, long short, short long, high low, low high, "
    "clean dirty, full empty, happy sad, wet dry, dry wet, early late, late early, quiet loud"
)
ANTONYMS = tuple(Pair(*pair.split()) for pair in _OPPOSITES.split(", "))
"""The task without a task: opposites that every English model knows."""


class FunctionVectorsConfig(ic.Config):
    """Settings of function vectors.

    Attributes:
        task: pairs of input and output (a list, a mapping, or a `Task`), or the path of a task file; None: a few
            antonyms.
        template: how pairs become prompts, a `Template`; None: "Q: x", "A: y".
        trials: prompts to extract from.
        shots: demonstrations in each.
        top: how many heads make the vector.
        seed: of the draw and of the task's split.
        layers: where to inject (None: after every layer).
        strength: factor of the vector.
        questions: held-out rows to measure accuracies on, at most (0: none).
        by: "sweep", or "replay": one full forward pass per head.
        top_k: tokens to show of each text.
    """

    task: Any = None
    template: Any = None
    trials: int = 10
    shots: int = 10
    top: int = 10
    seed: int = 0
    layers: list[int] | None = None
    strength: float = 1.0
    questions: int = 24
    by: Literal["sweep", "replay"] = "sweep"
    top_k: int = 5

    def cost(self, work: ic.Work) -> ic.Cost:
        """Means, effects of heads, held-out questions, and the texts. Prompts with shots are taken to be as long as the
        texts, and questions without shots to lack the other pairs, and an answer of a token."""
        heads = {(layer, work.tokens - 1): count for layer, count in enumerate(work.heads) if count}
        cost = work.forward(self.trials, read_out=0, batch=BATCH if self.by == "sweep" else 1)
        if self.by == "sweep":
            cost += work.swept(heads, self.trials)
        else:
            cost += work.forward(self.trials * (1 + sum(heads.values())), batch=1)
        layers = range(work.layers) if self.layers is None else self.layers
        if questions := min(self.questions, len(_task(self).test)):
            for tokens in (max((work.tokens + 1) // (self.shots + 1) - 1, 1), work.tokens):
                of_length = replace(work, tokens=tokens, target=0)
                begins = Counter((min(layer + 1, work.layers - 1), tokens - 1) for layer in layers)
                cost += of_length.swept(begins, questions)
        return sum((work.forward() for _ in layers), cost + work.forward())


@dataclass(frozen=True, eq=False)
class FunctionVectorsResult(ic.Result):
    """A task's function vector, and what it does.

    Attributes:
        aie: average indirect effect of every head (probability); not a number where a layer has no heads.
        vector: the function vector.
        zero_shot, zero_shot_clean: ranks of held-out answers without shots, with the vector by layer and without it.
        shuffled, shuffled_clean: the same after shots with shuffled answers. None if there were no questions.
        top_ids, top_logprob: likeliest next tokens of the texts (nats): without the vector, then by layer.
        task, model: names.
        heads: `(layer, head, AIE)` of those that make the vector.
        gap: AIE of the last of them minus that of the next one.
        edit_layers: where the vector was added.
        words: what the vector decodes to, with probabilities.
        texts: the texts' last tokens.
        vocab: text of the ids.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "aie": ("layer", "head"), "vector": ("d_model",), "zero_shot": ("edit", "question"),
        "zero_shot_clean": ("question",), "shuffled": ("edit", "question"), "shuffled_clean": ("question",),
        "top_ids": ("batch", "run", "k"), "top_logprob": ("batch", "run", "k"),
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("aie", "vector", "zero_shot", "zero_shot_clean", "shuffled", "shuffled_clean"), "same"),
        "texts": "rows", "vocab": "union",
    }  # fmt: skip
    aie: Float[Tensor, "layer head"]
    vector: Float[Tensor, " d_model"]
    zero_shot: Int[Tensor, "edit question"] | None
    zero_shot_clean: Int[Tensor, " question"] | None
    shuffled: Int[Tensor, "edit question"] | None
    shuffled_clean: Int[Tensor, " question"] | None
    top_ids: Int[Tensor, "batch run k"]
    top_logprob: Float[Tensor, "batch run k"]
    task: str
    model: str
    heads: tuple[tuple[int, int, float], ...]
    gap: float
    edit_layers: tuple[int, ...]
    words: tuple[tuple[str, float], ...]
    texts: tuple[str, ...]
    vocab: dict[str, str]

    @property
    def function_vector(self) -> FunctionVector:
        """The vector with its origin, to be injected, added to others, saved. `layer` is where it answers most of the
        held-out questions, if there were any."""
        evaluations = self.evaluations
        layer = evaluations["zero-shot"].best_layer if evaluations else None
        return FunctionVector(self.vector, "resid", self.task, self.model, self.heads, layer)

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """`zero-shot` and `shuffled` accuracies; empty if there were no questions."""
        ranks = {"zero-shot": (self.zero_shot_clean, self.zero_shot), "shuffled": (self.shuffled_clean, self.shuffled)}
        return {
            name: Evaluation(clean, rank, None, self.edit_layers, name)
            for name, (clean, rank) in ranks.items()
            if clean is not None
        }

    @property
    def runs(self) -> tuple[str, ...]:
        """Names along the axis `run`."""
        return ("without", *(f"layer {layer}" for layer in self.edit_layers))

    def answers(self, row: int = 0) -> list[str]:
        """The likeliest next token of a text, without the vector and by layer."""
        return [self.vocab[str(i)] for i in self.top_ids[row, :, 0].tolist()]

    def table(self) -> list[dict[str, Any]]:
        """One row per layer (the first: without the vector): accuracies, and what follows each text."""
        rows = []
        for number, name in enumerate(self.runs):
            row: dict[str, Any] = {"vector": name}
            for kind, evaluation in self.evaluations.items():
                row[kind] = evaluation.accuracies()[number - 1] if number else evaluation.accuracy()
            row |= {f"text {i}": self.answers(i)[number] for i in range(len(self.texts))}
            rows.append(row)
        return rows

    def __str__(self) -> str:
        heads = ", ".join(f"z[{layer},{head}] {aie:+.4f}" for layer, head, aie in self.heads)
        lines = [f"function vector of {self.task}: norm {self.vector.norm():.2f}", f"  heads: {heads}"]
        lines += [
            f"  {name}: {ranks.accuracy():.0%} without, {max(ranks.accuracies()):.0%} at layer {ranks.best_layer}"
            for name, ranks in self.evaluations.items()
        ]
        return "\n".join(lines)

    @property
    def finding(self) -> str:
        """What the vector does to held-out questions; without questions, which head carries most."""
        if not self.evaluations:
            layer, head, aie = self.heads[0]
            return f"Head {head} of layer {layer} carries most of {self.task} (average indirect effect {aie:.3f})."
        name, ranks = next(iter(self.evaluations.items()))
        best = max(ranks.accuracies())
        return (
            f"The vector of {self.task} raises {name} accuracy from {ranks.accuracy():.0%} to {best:.0%}, added after "
            f"layer {ranks.best_layer}."
            if best > ranks.accuracy()
            else f"The vector of {self.task} does not raise {name} accuracy: {ranks.accuracy():.0%} without, "
            f"{best:.0%} with it."
        )

    def html(self) -> str:
        """Map of heads, accuracies by layer, what the vector says, and the texts before and after."""
        said = ic.report.table([{"token": ic.report.visible(word), "probability": p} for word, p in self.words])
        texts = [
            ic.report.Heatmap(
                self.top_logprob[row].exp(), self.runs, [str(i + 1) for i in range(self.top_ids.shape[2])],
                texts=[[self.vocab[str(i)] for i in line] for line in self.top_ids[row].tolist()],
                limits=(0.0, 1.0), caption=f"Likeliest tokens after … {text}",
            ).html()
            for row, text in enumerate(self.texts)
        ]  # fmt: skip
        heads = ic.report.table(strongest(self.aie, self.heads))
        gap = ic.report.escape(f"AIE of the vector's last head minus that of the largest it leaves out: {self.gap:.3g}")
        first, *curves = (chart.html() for chart in self.charts())
        return f"{first}{heads}<p>{gap}</p>{''.join(curves)}{said}{''.join(texts)}"

    def charts(self) -> list[ic.report.Chart]:
        """The map of heads and, if there were questions, accuracies by layer of injection."""
        note = f"Average indirect effect of {self.task}: probability that each head's mean gives back."
        charts: list[ic.report.Chart] = [heads_map(self.aie, f"Heads of {self.task}", note)]
        if evaluations := self.evaluations:
            note = "Accuracy by layer of injection, 95 % bands."
            charts.append(accuracy_curves(evaluations.values(), self.edit_layers, note))
        return charts


class FunctionVectors(ic.Method):
    """Extracts a task's function vector, and injects it into prompts without examples; see the module."""

    name = "function_vectors"
    requires = frozenset({"causal", "z", "resid_post", "readout"})
    Config = FunctionVectorsConfig

    def run(self, model: ic.Model, tokens: ic.Tokens, config: FunctionVectorsConfig) -> FunctionVectorsResult:
        """Extract, measure, inject."""
        return next(self.run_batches(model, [(tokens, config)], config))

    def run_batches(
        self, model: ic.Model, batches: Iterable[tuple[ic.Tokens, Any]], config: FunctionVectorsConfig
    ) -> Iterator[FunctionVectorsResult]:
        """Extract and measure once, inject into every batch of texts."""
        task = _task(config)
        template = config.template or Template()
        if model.tokenizer is None:
            raise ic.TextError("function_vectors builds prompts of its task: load the model with its tokenizer")
        trials = fixed_trials(
            task, model.tokenizer, template=template, n_trials=config.trials, n_shots=config.shots, seed=config.seed
        )
        site = S.resid_post if config.layers is None else S.resid_post[config.layers]
        layers = model.layers(site)
        extracted: tuple[FunctionVector, Tensor, dict[str, Tensor | None]] | None = None
        for tokens, _ in batches:
            if extracted is None:
                vector, aie = self._extracted(model, trials, task.name, config)
                extracted = vector, aie, self._accuracies(model, task, template, vector, layers, config)
            vector, aie, ranks = extracted
            ids, logprob = self._answers(model, tokens, vector, layers, config)
            yield FunctionVectorsResult(
                aie=aie, vector=vector.vector, **ranks, top_ids=ids, top_logprob=logprob, task=task.name,
                model=model.source, heads=vector.heads, gap=gap(aie, config.top), edit_layers=tuple(layers),
                words=tuple(words(model, decoded(model, vector))),
                texts=tuple("".join(row[-12:]) for row in tokens.labels),
                vocab={str(i): model.word(i) for i in ids.unique().tolist()},
            )  # fmt: skip

    def _extracted(
        self, model: ic.Model, trials: Trials, task: str, config: FunctionVectorsConfig
    ) -> tuple[FunctionVector, Tensor]:
        clean = [trial.clean for trial in trials]
        mean = mean_head_activations(model, clean, batch=1 if config.by == "replay" else BATCH)
        effects = indirect_effect(model, [trial.corrupted for trial in trials], mean, by=config.by)
        aie = average(effects)
        return function_vector(model, mean, top_heads(aie, config.top), task=task), aie

    def _accuracies(
        self, model: ic.Model, task: Task, template: Template, vector: FunctionVector, layers: Sequence[int],
        config: FunctionVectorsConfig,
    ) -> dict[str, Tensor | None]:  # fmt: skip
        """Ranks zero-shot and shuffled, on rows that the vector was not made of."""
        rows = range(min(config.questions, len(task.test)))
        ranks: dict[str, Tensor | None] = {}
        for name, shots in (("zero_shot", 0), ("shuffled", config.shots)):
            ranks |= {name: None, f"{name}_clean": None}
            if rows:
                prompts = questions(
                    task, model.tokenizer, shots=shots, shuffled=shots > 0, rows=rows, seed=config.seed,
                    template=template,
                )  # fmt: skip
                evaluation = evaluate(model, prompts, vector, layers=layers, strength=config.strength)
                ranks |= {name: evaluation.rank, f"{name}_clean": evaluation.clean_rank}
        return ranks

    def _answers(
        self, model: ic.Model, tokens: ic.Tokens, vector: FunctionVector, layers: Sequence[int],
        config: FunctionVectorsConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Likeliest next tokens of the texts, without the vector and by layer: ids and log-probabilities."""
        k = min(config.top_k, model.d_vocab)
        edits = [(), *((injection(model, vector, layer, strength=config.strength),) for layer in layers)]
        tops = []
        for edit in edits:
            logits = model.run(tokens, edits=edit, logits=-1).logits.plain
            tops.append(torch.log_softmax(logits.float(), -1).topk(k))
        return torch.stack([top.indices for top in tops], 1).cpu(), torch.stack([top.values for top in tops], 1).cpu()


def _task(config: FunctionVectorsConfig) -> Task:
    task = config.task
    if task is None:
        return Task.of("antonym", ANTONYMS, seed=config.seed)
    if isinstance(task, Task):
        return task
    if isinstance(task, (str, Path)):
        return load_task(task, seed=config.seed)
    pairs = list(task.items()) if isinstance(task, Mapping) else task
    for row, pair in enumerate(pairs if isinstance(pairs, Sequence) else [pairs]):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ic.PlanError(f"function_vectors: task is pairs of input and output, or a file; row {row} is {pair!r}")
    return Task.of("task", [(x, y) for x, y in pairs], seed=config.seed)
