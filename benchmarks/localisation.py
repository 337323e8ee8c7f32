"""Do maps over an image lie on what is asked about? Knockout and attribution on `toy:vision`, beside two baselines.

    python benchmarks/localisation.py [N] [--perturbed M]

N questions (400) that training does not use, of the kinds that the toy is held to; those that ask about something have
evidence: the boxes of what is asked about. The answer is teacher-forced. Maps have a number per visual token, 4 × 4:

    knockout            |Δ|: how far the answer's log-probability moves when no text sees the token, in all layers
    knockout, signed    Δ: how far it falls; below 0 where the answer is surer without the token
    knockout, 2 × 2     |Δ| of blocks of four tokens
    ifr, attnlrp, input_x_gradient   as they come; |attnlrp|, |input_x_gradient| without signs

random and centre are 32 × 32. Tied patches count by the rules of `hits`; "tied" is the share of questions in which
several patches share the maximum. Intervals are a bootstrap over questions, paired where methods are held against a
baseline. Deletion and insertion are of the first M questions (40) that have evidence, without those that the model
answers as well from the blurred image.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from interp_plugins.localisation import (
    Regions,
    centre_map,
    compare,
    evidence,
    hits,
    perturbation_curves,
    perturbed,
    random_map,
    regions,
)
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import interp_core as ic
from interp_core.toys.evaluate_vision import HELD, auroc, decides
from interp_core.toys.vision import GRID, SIZE, Question, questions

Map = Float[Tensor, "row col"]
METRICS = ("rank_auc", "pointing", "energy", "R@0.1", "iou", "deletion", "insertion")
BASELINES = ("random", "centre")


def asked_row(model: ic.Model, question: Question, image: object) -> ic.Tokens:
    """The question with its answer as target."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question.question}]
    return model.chat([{"role": "user", "content": parts}], question.answers[0])


def maps_of(model: ic.Model, question: Question, tokens: ic.Tokens) -> dict[str, Map]:
    """Every method's map."""
    knockout = ic.method("visual_map")
    lost = knockout(model, tokens).map()
    blocks = knockout(model, tokens, block=2).map()
    out = {"knockout": lost.abs(), "knockout, signed": lost, "knockout, 2 × 2": blocks.abs()}
    for name in ("ifr", "attnlrp", "input_x_gradient"):
        scores = ic.method(name)(model, tokens).map()
        out[name] = scores
        if name != "ifr":  # which has no negative numbers
            out[f"|{name}|"] = scores.abs()
    out |= {"random": torch.from_numpy(random_map(question.name)), "centre": torch.from_numpy(centre_map())}
    return out


def curves(model: ic.Model, question: Question, order: Regions) -> dict[str, float]:
    """Deletion and insertion under a map's order."""
    pairs = list(perturbed(Image.fromarray(question.images[0]), order))
    batch = ic.Tokens.stack([asked_row(model, question, image) for kind in zip(*pairs, strict=True) for image in kind])
    logits = model.run(batch).logits.plain.log_softmax(-1)
    at = torch.tensor(batch.columns("target")[0])  # the same text, so the same in every row
    values = logits[:, at - 1].gather(-1, batch.ids[:, at, None]).mean((1, 2)).tolist()
    half = len(values) // 2
    curve = perturbation_curves(order, values[:half], values[half:])
    return {} if curve.degenerate else curve.record()


def tokens_found(scores: Map, question: Question) -> float:
    """AUROC of the visual tokens asked about against the others."""
    inside = torch.zeros(GRID**2, dtype=torch.bool)
    inside[list(question.meta["tokens"])] = True
    return auroc(scores.flatten()[inside], scores.flatten()[~inside])


def judged(
    model: ic.Model, several: list[Question], most: int
) -> Iterator[tuple[Question, str, dict[str, float | None]]]:
    """Numbers of each question and method."""
    with ic.Progress("questions", len(several)) as told:
        for number, question in enumerate(several):
            tokens = asked_row(model, question, question.images[0])
            for name, scores in maps_of(model, question, tokens).items():
                where = evidence(question.meta["boxes"], tuple(scores.shape), (SIZE, SIZE))
                hit = hits(scores, where)
                row = hit.record() | {"tied": float(hit.tied > 1)}
                if name not in BASELINES:
                    row["tokens"] = tokens_found(scores, question)
                if number < most:
                    row |= curves(model, question, regions(scores, (SIZE, SIZE)))
                yield question, name, row
            told.add()


def table(values: Mapping[str, Mapping[str, Mapping[str, float | None]]], kept: set[str]) -> str:
    """Means with intervals as Markdown; a star where a method is better than both baselines."""
    names = list(values)
    lines = ["| map | " + " | ".join(METRICS) + " | tied |", "|---" * (len(METRICS) + 2) + "|"]
    cells: dict[str, list[str]] = defaultdict(list)
    for metric in METRICS:
        column = {name: {s: row.get(metric) for s, row in values[name].items() if s in kept and metric in row}
                  for name in names}  # fmt: skip
        if not any(column.values()):
            continue
        for row in compare(metric, column).table():
            better = row["method"] not in BASELINES and all(row[f"better than {base}"] for base in BASELINES)
            cells[row["method"]].append(f"{row[metric]:.3f} [{row['low']:.3f}, {row['high']:.3f}]{'*' * better}")
    for name in names:
        tied = np.mean([row["tied"] for s, row in values[name].items() if s in kept])
        lines.append(f"| {name} | " + " | ".join([*cells[name], f"{tied:.2f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", default=400)
    parser.add_argument("--perturbed", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ic.load("toy:vision")
    drawn = questions(random.Random("evaluate vision, traced"), options.number, HELD)
    several = [q for q in drawn if q.meta["boxes"]]
    values: dict[str, dict[str, dict[str, float | None]]] = defaultdict(dict)
    for question, name, row in judged(model, several, options.perturbed):
        values[name][question.name] = row
    parts = {"all": {q.name for q in several}, "each thing decides": {q.name for q in several if decides(q)}}
    for name, kept in parts.items():
        curved = sum("deletion" in row for s, row in values["knockout"].items() if s in kept)
        print(f"\n{name}: {len(kept)} questions, deletion and insertion of {curved}\n\n{table(values, kept)}\n")
        means = {how: np.mean([row["tokens"] for s, row in rows.items() if s in kept])
                 for how, rows in values.items() if how not in BASELINES}  # fmt: skip
        print("AUROC of the tokens asked about: " + ", ".join(f"{how} {mean:.3f}" for how, mean in means.items()))
    for kind in HELD:
        rows = [
            row["tokens"] for s, row in values["knockout"].items() for q in several if q.name == s and q.kind == kind
        ]
        print(f"knockout, {kind}: {np.mean(rows):.3f} of {len(rows)}")


if __name__ == "__main__":
    main()
