"""What `toy:vision` can do and how it needs the picture: `python -m interp_core.toys.evaluate_vision [FOLDER]`.

Three tables, over questions drawn with seeds that training does not use:

    accuracy   by kind of question, with the picture, a black one, one of the mean colour, another question's picture of
               the same sort (so that a bar chart stays one), and of the best answer without a look at the question
    curve      Δ(l): by how many nats the log-probability of the answer falls when the visual rows at `resid_pre[l]` are
               those of a blind run, DeepStack following
    objects    AUROC of visual tokens that see a thing asked about against the others, by how far the log-probability
               falls (Δ), or moves (|Δ|), when all later positions are kept from seeing that one token, in all layers

An answer counts if it is right to the letter and ended by `<|im_end|>`.

What stands before a picture does not see it, and visual rows see no text after it. So a run whose visual rows from
layer l on are those of a blind run is the blind run whose rows after the picture are the clean run's at layer l.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import sites as S
from ..model import Model, load
from ..text import Tokens
from .vision import BARS, GRID, KINDS, Picture, Question, questions

BLIND = ("black", "mean", "random")
FIRST = 4
"""Position of the first visual token."""
AFTER = slice(FIRST + GRID**2, None)
HELD = tuple(kind for kind in KINDS if kind != "where")
"""The kinds that the toy is held to."""


def prompts(model: Model, questions: Sequence[Question]) -> Tokens:
    """A conversation of one turn a row, ready for an answer."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.question}]} for q in questions]
    write = partial(model.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    return model.tokens([write([turn]) for turn in turns], images=[list(q.images) for q in questions])


def blinded(questions: Sequence[Question], how: str) -> list[Question]:
    """The same questions about other pictures; `random`: of the next question about the same sort of picture."""
    pictures = [q.images[0] for q in questions]
    mean = np.mean(pictures, (0, 1, 2)).round().astype(np.uint8)
    plain = np.broadcast_to(np.zeros(3, np.uint8) if how == "black" else mean, pictures[0].shape)
    others: list[Picture] = [plain] * len(questions)
    if how == "random":
        for sort in (True, False):
            rows = [i for i, q in enumerate(questions) if (q.kind in BARS) == sort]
            for row, other in zip(rows, [*rows[1:], *rows[:1]], strict=True):
                others[row] = pictures[other]
    return [replace(q, images=(other,)) for q, other in zip(questions, others, strict=True)]


def right(model: Model, questions: Sequence[Question], rows: int = 64) -> list[bool]:
    """Which questions are answered by the right word and nothing after it."""
    out = []
    for start in range(0, len(questions), rows):
        part = questions[start : start + rows]
        generation = model.generate(prompts(model, part), max_new_tokens=3)
        out += [
            text == q.answers[0] and bool(ended)
            for text, ended, q in zip(generation.texts, generation.ended, part, strict=True)
        ]
    return out


def accuracies(model: Model, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """By pictures (original, black, mean, random, constant), by kind, `all` (of those held to) last."""
    hits = {"original": right(model, questions)} | {how: right(model, blinded(questions, how)) for how in BLIND}
    kinds = [kind for kind in KINDS if any(q.kind == kind for q in questions)]
    best = {kind: Counter(q.answers[0] for q in questions if q.kind == kind).most_common(1)[0][0] for kind in kinds}
    hits["constant"] = [q.answers[0] == best[q.kind] for q in questions]
    out = {}
    for how, answered in hits.items():
        rows = list(zip(answered, questions, strict=True))
        out[how] = {kind: float(np.mean([hit for hit, q in rows if q.kind == kind])) for kind in kinds}
        out[how]["all"] = float(np.mean([hit for hit, q in rows if q.kind in HELD]))
    return out


def _alike(model: Model, questions: Sequence[Question], rows: int = 64) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of questions of as many tokens: their numbers, and the ids of their answers."""
    by_length = defaultdict(list)
    for i, length in enumerate(prompts(model, questions).lengths):
        by_length[length].append(i)
    for same in by_length.values():
        for start in range(0, len(same), rows):
            part = same[start : start + rows]
            yield part, torch.cat([model.tokens(questions[i].answers[0]).ids[0] for i in part])


def _logprobs(logits: Tensor, answers: Tensor) -> Float[Tensor, " row"]:
    return logits.as_subclass(Tensor).log_softmax(-1).gather(-1, answers[:, None])[:, 0]


def curve(model: Model, questions: Sequence[Question], how: str) -> Float[Tensor, "question layer"]:
    """Δ(l) of every question; at layer 0 that is the blind run itself."""
    layers = model.atlas.shape.n_layers
    rest = S.resid_pre.at(AFTER)
    out = torch.zeros(len(questions), layers)
    blind = blinded(questions, how)
    for part, answers in _alike(model, questions):
        clean = model.run(prompts(model, [questions[i] for i in part]), read=rest, logits=-1)
        tokens = prompts(model, [blind[i] for i in part])
        base = _logprobs(clean.logits, answers)
        for layer in range(layers):
            edit = S.resid_pre[layer].at(AFTER).set(clean[S.resid_pre[layer].at(AFTER)])
            run = model.run(tokens, edits=edit, logits=-1, allow_noop=True)
            out[part, layer] = base - _logprobs(run.logits, answers)
    return out


def importance(model: Model, questions: Sequence[Question]) -> Float[Tensor, "question token"]:
    """By how many nats the answer's log-probability falls when no later position sees this visual token or that."""
    out = torch.zeros(len(questions), GRID**2)
    for part, answers in _alike(model, questions):
        tokens = prompts(model, [questions[i] for i in part])
        base = _logprobs(model.run(tokens, logits=-1).logits, answers)
        for cell in range(GRID**2):
            at = FIRST + cell
            hidden = S.pattern.knockout(query=slice(at + 1, None), key=at)
            out[part, cell] = base - _logprobs(model.run(tokens, edits=hidden, logits=-1).logits, answers)
    return out


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive value lies above a negative one, ties half."""
    apart = positive[:, None] - negative[None]
    return float(((apart > 0).float() + 0.5 * (apart == 0).float()).mean())


def decides(q: Question) -> bool:
    """Whether each thing that is asked about decides the answer: not where another like it says the same, nor where
    heights are compared, which the rest of a bar tells too."""
    return q.kind not in ("tallest", "compare") and (q.kind != "exist" or len(q.meta["boxes"]) == 1)


def localisation(
    effects: Float[Tensor, "question token"], questions: Sequence[Question]
) -> dict[str, tuple[float, int]]:
    """The mean over questions of the AUROC of tokens asked about against the others, and how many questions there are
    that have both: of every kind, of `all`, and of those where each thing `decides`."""
    scores = defaultdict(list)
    for row, q in zip(effects, questions, strict=True):
        inside = torch.zeros(GRID**2, dtype=torch.bool)
        inside[list(q.meta["tokens"])] = True
        if inside.any() and not inside.all():
            score = auroc(row[inside], row[~inside])
            for name in (q.kind, "all", *["decides"] * decides(q)):
                scores[name].append(score)
    order = [*(kind for kind in KINDS if kind in scores), "all", "decides"]
    return {name: (float(np.mean(scores[name])), len(scores[name])) for name in order if name in scores}


def accuracy_table(accuracies: Mapping[str, Mapping[str, float]]) -> str:
    """Accuracies as Markdown."""
    columns = ["all", *KINDS]
    lines = ["| picture | all but where |" + "".join(f" {kind} |" for kind in KINDS), "|---" * (1 + len(columns)) + "|"]
    for how, shares in accuracies.items():
        lines.append(f"| {how} | " + " | ".join(f"{shares[kind]:.3f}" for kind in columns) + " |")
    return "\n".join(lines)


def curve_table(curves: Mapping[str, Float[Tensor, "question layer"]]) -> str:
    """Means of Δ over questions as Markdown, with the half-width of their 95 % interval, and the cliff."""
    layers = next(iter(curves.values())).shape[1]
    lines = ["| visual rows of | " + " | ".join(f"l={layer}" for layer in range(layers)) + " | cliff |"]
    lines.append("|---" * (layers + 2) + "|")
    for how, effects in curves.items():
        half = 1.96 * effects.std(0) / len(effects) ** 0.5
        cells = [f"{mean:.2f} ± {wide:.2f}" for mean, wide in zip(effects.mean(0).tolist(), half.tolist(), strict=True)]
        lines.append(f"| {how} | " + " | ".join(cells) + f" | {cliff(effects.mean(0))} |")
    return "\n".join(lines)


def cliff(mean: Float[Tensor, " layer"], ratio: float = 0.1) -> int:
    """First layer from which on Δ stays below a tenth of its largest value; the number of layers if there is none."""
    high = torch.nonzero(mean >= ratio * mean.max()).flatten()
    return int(high[-1]) + 1


def localisation_table(rows: Mapping[str, Mapping[str, tuple[float, int]]]) -> str:
    """AUROCs of several measures as Markdown."""
    first = next(iter(rows.values()))
    lines = ["| | " + " | ".join(first) + " |", "|---" * (1 + len(first)) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{score:.3f}" for score, _ in row.values()) + " |" for name, row in rows.items()
    ]
    lines.append("| questions | " + " | ".join(str(count) for _, count in first.values()) + " |")
    return "\n".join(lines)


def tables(model: Model, number: int = 2048, traced: int = 400) -> str:
    """All three, of `number` questions, the last two of `traced`."""
    scored = questions(random.Random("evaluate vision"), number)
    held = questions(random.Random("evaluate vision, traced"), traced, HELD)
    effects = importance(model, held)
    parts = [
        accuracy_table(accuracies(model, scored)),
        curve_table({how: curve(model, held, how) for how in BLIND}),
        localisation_table({"Δ": localisation(effects, held), "|Δ|": localisation(effects.abs(), held)}),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(tables(load(sys.argv[1] if len(sys.argv) > 1 else "toy:vision")))
