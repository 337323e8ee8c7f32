"""How well the toy does its tasks: `python -m interp_core.toys.evaluate [FOLDER]` prints the table of docs/toys.md.

Examples are drawn with seeds of their own, which training never uses. Words and pairs are those of training; what is
new is which of them meet in a prompt.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..model import Model, load
from . import text as tasks
from .text import Example


def accuracy(model: Model, examples: Sequence[Example], batch: int = 50) -> float:
    """Share of last answers that come first in the model's prediction."""
    hits = 0
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        logits = model.run([example.prompt for example in part], logits=-1).logits
        answers = torch.cat([model.tokens(example.answer).ids[0] for example in part])
        hits += int((logits.argmax(-1).cpu() == answers).sum())
    return hits / len(examples)


def _retrieval(rng: random.Random, hops: int, most: int) -> Example:
    return tasks.needle_example(rng, rng.randint(2, most), hops)


def _induction(rng: random.Random, pool: tuple[str, ...]) -> Example:
    return tasks.induction_example(rng, rng.randint(3, 20), 48, pool)


def battery() -> dict[str, Callable[[random.Random], Example]]:
    """Every task of the table by its name."""
    tests: dict[str, Callable[[random.Random], Example]] = {}
    for shots in (0, 1, 2, 3, 5, 10):
        tests[f"in-context relation, {shots} shots"] = partial(tasks.relation_example, shots=shots)
    for relation in tasks.relations():
        tests[f"{relation}, 5 shots"] = partial(tasks.relation_example, relation=relation, shots=5)
    for hops, most in ((0, 8), (1, 5), (2, 4)):
        tests[f"retrieval, {hops} hops, 2 to {most} chains"] = partial(_retrieval, hops=hops, most=most)
    for name, pool in (("numbers", tasks.NUMBERS), ("words", tasks.words())):
        tests[f"induction over {name}, period 3 to 20"] = partial(_induction, pool=pool)
    return tests


def table(model: Model, n: int = 1000) -> str:
    """Accuracies as Markdown."""
    lines = ["| task | accuracy |", "|---|---|"]
    for name, make in battery().items():
        rng = random.Random(f"evaluate {name}")
        lines.append(f"| {name} | {accuracy(model, [make(rng) for _ in range(n)]):.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(load(sys.argv[1] if len(sys.argv) > 1 else "toy:text")))
