"""Evaluation: how often the model answers, with and without a function vector, layer by layer.

    rank        how many tokens have a larger logit than the answer's first one; accuracy at k: share of ranks below k
    perplexity  mean over prompts of exp(mean negative log-likelihood of the answer's tokens)

Prompts are zero-shot, few-shot, or few-shot with shuffled answers; `questions` draws them with the random numbers of
the published code, one stream of numpy's per evaluation. A filter set keeps the rows that the model answers with ten
shots.

Source: Todd et al. (2024), section 3. Must equal: its rank lists exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic

from .inject import Vectors, by_layer, continued
from .metrics import METRICS, answer_in
from .prompts import Prompt
from .rows import batches, targets, tokens
from .tasks import Task
from .template import Template
from .trials import legacy_trials

Z95 = 1.959964


@dataclass(frozen=True, eq=False)
class Evaluation(ic.Result):
    """Ranks of answers.

    Attributes:
        clean_rank: without a vector.
        rank: with it, per layer; None where there was none.
        clean_nll: mean negative log-likelihood of the answer's tokens (nats); None if not asked for.
        layers: where the vector was added.
        name: what was evaluated, in words.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "clean_rank": ("example",), "rank": ("layer", "example"), "clean_nll": ("example",),
    }  # fmt: skip
    clean_rank: Int[Tensor, " example"]
    rank: Int[Tensor, "layer example"] | None = None
    clean_nll: Float[Tensor, " example"] | None = None
    layers: tuple[int, ...] = ()
    name: str = ""

    def accuracy(self, k: int = 1) -> float:
        """Share of answers among the k likeliest tokens, without a vector."""
        return float((self.clean_rank < k).double().mean())

    def accuracies(self, k: int = 1) -> list[float]:
        """The same with the vector, per layer."""
        return [] if self.rank is None else (self.rank < k).double().mean(-1).tolist()

    def bands(self, k: int = 1) -> list[tuple[float, float]]:
        """95 % intervals of `accuracies` (Wilson)."""
        return [wilson(p, len(self.clean_rank)) for p in self.accuracies(k)]

    @property
    def best_layer(self) -> int:
        """Where accuracy with the vector is highest (the lowest such layer).

        Raises:
            PlanError: evaluated without a vector.
        """
        accuracies = self.accuracies()
        if not accuracies:
            raise ic.PlanError(f"{self.name or 'this evaluation'} has no vector, and so no best layer")
        return self.layers[accuracies.index(max(accuracies))]

    @property
    def perplexity(self) -> float | None:
        """Mean over examples of exp(negative log-likelihood); None if likelihoods were not asked for."""
        return None if self.clean_nll is None else float(self.clean_nll.double().exp().mean())

    def published(self, layer: int | None = None) -> dict[str, Any]:
        """The form of the published result files: top-1 to top-3 accuracies and rank lists, of one layer.

        Raises:
            PlanError: a layer that was not evaluated.
        """
        out: dict[str, Any] = {"clean_topk": _top(self.clean_rank), "clean_rank_list": self.clean_rank.tolist()}
        if layer is not None:
            if self.rank is None or layer not in self.layers:
                raise ic.PlanError(f"layer {layer} was not evaluated; layers {list(self.layers)} were")
            rank = self.rank[self.layers.index(layer)]
            out |= {"intervention_topk": _top(rank), "intervention_rank_list": rank.tolist()}
        if self.clean_nll is not None:
            out["clean_ppl"] = self.perplexity
        return out

    def table(self) -> list[dict[str, Any]]:
        """Accuracies without the vector, then with it layer by layer."""
        ranks: list[tuple[str, Tensor]] = [("none", self.clean_rank)]
        if self.rank is not None:
            ranks += [(str(layer), rank) for layer, rank in zip(self.layers, self.rank, strict=True)]
        return [
            {"layer": layer, **{f"top-{k}": float((rank < k).double().mean()) for k in (1, 2, 3)},
             "mean rank": float(rank.double().mean())}
            for layer, rank in ranks
        ]  # fmt: skip


def _top(rank: Tensor) -> list[tuple[int, float]]:
    return [(k, float((rank < k).double().mean())) for k in (1, 2, 3)]


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share out of n (Wilson, 1927)."""
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return middle - half, middle + half


def questions(
    task: Task,
    tokenizer: Any,
    *,
    shots: int = 0,
    shuffled: bool = False,
    split: str = "test",
    rows: Iterable[int] | None = None,
    filter_set: Iterable[int] | None = None,
    seed: int = 0,
    template: Template | None = None,
) -> list[Prompt]:
    """Prompts that ask rows of a split in order, demonstrations drawn from the training rows.

    Args:
        shuffled: the demonstrations' answers in another order.
        rows: which rows (None: all).
        filter_set: rows outside it are left out, and draw nothing.
        seed: of the stream; the same for evaluations that should see the same prompts.

    Raises:
        PlanError, TextError: as `legacy_trials`.
    """
    trials = legacy_trials(
        task, tokenizer, template=template, n_shots=shots, seed=seed, shuffle=shuffled, split=split,
        filter_set=filter_set, queries=range(len(task.rows(split))) if rows is None else rows, slots=False,
    )  # fmt: skip
    return [trial.corrupted if shuffled else trial.clean for trial in trials]


def evaluate(
    model: ic.Model,
    prompts: Sequence[Prompt],
    vectors: Vectors | None = None,
    *,
    layers: Sequence[int] | None = None,
    strength: float = 1.0,
    likelihood: bool = False,
    batch: int = 1,
    name: str = "",
    progress: bool = False,
) -> Evaluation:
    """Ranks of the answers, without a vector and with it at each layer.

    Args:
        vectors: one for all layers, or one per layer; None: only without.
        layers: where to add it (None: everywhere).
        strength: factor.
        likelihood: also the answers' negative log-likelihoods, for perplexity.
        batch: prompts per pass without a vector; more than one may swap tokens whose logits are the same but for
            rounding.

    Raises:
        PlanError: prompts without answers, or a vector that does not fit.
    """
    nll = torch.cat([_nll(model, prompt) for prompt in prompts]) if likelihood else None
    if vectors is None:
        return Evaluation(_ranks(model, prompts, batch), None, nll, (), name)
    chosen = list(range(model.n_layers)) if layers is None else list(layers)
    ranks = by_layer(model, prompts, vectors, layers=chosen, strength=strength, progress=progress)
    return Evaluation(ranks.clean.long(), ranks.values.long(), nll, tuple(chosen), name)


def _ranks(model: ic.Model, prompts: Sequence[Prompt], batch: int) -> Int[Tensor, " example"]:
    targets(prompts)
    judged = ((part, ic.score.rank(targets(part))) for part in batches(prompts, batch))
    return torch.cat([rank(model.run(tokens(part), logits=-1)).long().cpu() for part, rank in judged])


def _nll(model: ic.Model, prompt: Prompt) -> Float[Tensor, " one"]:
    """Mean over the answer's tokens, in one pass under the answer."""
    text = tokens([prompt], answered=True)
    return (ic.score.nll(text)(model.run(text)) / len(prompt.target_ids)).float().cpu()


def filter_set(model: ic.Model, prompts: Sequence[Prompt], *, batch: int = 1) -> list[int]:
    """Numbers of the prompts that the model answers: the answer's first token comes first."""
    return torch.nonzero(_ranks(model, prompts, batch) == 0).flatten().tolist()


def baseline(
    model: ic.Model,
    task: Task,
    *,
    shots: Iterable[int] = range(11),
    seed: int = 0,
    batch: int = 1,
    likelihood: bool = False,
    **drawn: Any,
) -> dict[int, Evaluation]:
    """Evaluations without a vector, by number of shots.

    Args:
        drawn: further arguments of `questions`.
    """
    return {
        n: evaluate(
            model, questions(task, model.tokenizer, shots=n, seed=seed, **drawn),
            likelihood=likelihood, batch=batch, name=f"{n} shots",
        )
        for n in shots
    }  # fmt: skip


def generated(
    model: ic.Model,
    prompts: Sequence[Prompt],
    edits: ic.Edit | Sequence[ic.Edit] = (),
    *,
    max_new_tokens: int = 16,
    batch: int = 1,
) -> list[dict[str, Any]]:
    """Greedy answers, one row per prompt: what was generated, the answer read from it, and every string metric."""
    rows: list[dict[str, Any]] = []
    for part in batches(prompts, batch):
        continuation = continued(model, tokens(part), edits, max_new_tokens=max_new_tokens)
        for prompt, text in zip(part, continuation.texts, strict=True):
            answer, target = answer_in(text), (prompt.target or "").strip()
            scores = {name: metric(answer, target) if answer else 0.0 for name, metric in METRICS.items()}
            rows.append({"prompt": prompt.text, "target": target, "generated": text, "answer": answer, **scores})
    return rows
