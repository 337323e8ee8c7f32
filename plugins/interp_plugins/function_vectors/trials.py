"""Trials: a clean prompt, and one whose answers are shuffled.

Three ways to draw them, each with the random numbers of what it must equal:

* `fixed_trials`     `numpy.random.default_rng(seed)`: choice(train), choice(valid), permutation(answers), per trial
* `legacy_trials`    the reference's global numpy stream: choice(train), choice(filter set), permutation, per trial
* `relation_trials`  Python's `random.Random(seed)`: randrange for the query, shuffle of the rest for the
                     demonstrations, shuffle of the answers, once more if that changed nothing; at the end a shuffle of
                     all trials

A permutation may leave answers where they were. `Trials` themselves, and the file that holds them: `files.trials`.

Source: Todd et al. (2024), arXiv:2310.15213, and `ericwtodd/function_vectors`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

import interp_core as ic

from .files.trials import Trial, Trials, trial_of
from .prompts import dummy
from .tasks import Pair, Task
from .template import Template, name_of


class Draw(NamedTuple):
    """Which rows make a trial: demonstrations, query, and whose answer each demonstration has when corrupted."""

    demos: tuple[int, ...]
    query: int
    order: tuple[int, ...]


def fixed_trials(
    task: Task,
    tokenizer: Any,
    *,
    template: Template | None = None,
    n_trials: int = 10,
    n_shots: int = 10,
    seed: int = 0,
) -> Trials:
    """Trials of the M0 file, drawn from training (demonstrations) and validation rows (query).

    Raises:
        PlanError: fewer rows than demonstrations, or none for queries.
        TextError: a prompt whose slots do not align, or an answer that does not continue it; names trial and prompt.
    """
    n_train, n_valid = _sizes(task, "valid", n_trials, n_shots)
    rng = np.random.default_rng(seed)
    # arguments are drawn from left to right, and the file's random numbers are those of this order
    draws = [
        Draw(
            tuple(rng.choice(n_train, n_shots, replace=False).tolist()),
            int(rng.choice(n_valid, 1, replace=False)[0]),
            tuple(rng.permutation(n_shots).tolist()),
        )
        for _ in range(n_trials)
    ]
    return _built(task, tokenizer, template or Template(), n_shots, draws, "numpy.random.default_rng", seed)


def legacy_trials(
    task: Task,
    tokenizer: Any,
    *,
    template: Template | None = None,
    n_trials: int = 10,
    n_shots: int = 10,
    seed: int | np.random.RandomState = 0,
    shuffle: bool = True,
    split: str = "valid",
    filter_set: Iterable[int] | None = None,
    queries: Iterable[int] | None = None,
    slots: bool = True,
) -> Trials:
    """Trials as the reference's own scripts draw them.

    Args:
        seed: what `numpy.random.seed` gets, or a stream to go on with (mean activations and indirect effect from one).
        shuffle: False draws no permutation, as for mean activations and plain few-shot prompts: the corrupted prompt is
            then the clean one.
        split: where queries come from.
        filter_set: rows of the split that queries are drawn from (None: all).
        queries: rows of the split to ask in this order instead of drawing (evaluation); those outside `filter_set` are
            left out and draw nothing.
        slots: False builds prompts without labels and slots.

    Raises:
        PlanError: fewer rows than demonstrations, an empty filter set, or rows that the split does not have.
        TextError: as `fixed_trials`.
    """
    n_train, n_queries = _sizes(task, split, n_trials, n_shots)
    allowed = list(range(n_queries)) if filter_set is None else [int(row) for row in filter_set]
    query_rows = None if queries is None else [int(row) for row in queries]
    for name, rows in (("filter_set", allowed), ("queries", query_rows)):
        if rows is not None and (not rows or not 0 <= min(rows) <= max(rows) < n_queries):
            raise ic.PlanError(
                f"{name}: {rows[:5] or 'no rows'}; split {split} of {task.name} has rows 0 to {n_queries - 1}"
            )
    rng = seed if isinstance(seed, np.random.RandomState) else np.random.RandomState(seed)
    wanted: list[int | None] = (
        [None] * n_trials if query_rows is None else [row for row in query_rows if row in {*allowed}]
    )
    draws = []
    for row in wanted:
        demos = rng.choice(n_train, n_shots, replace=False).tolist() if n_shots else []
        query = int(rng.choice(allowed, 1, replace=False)[0]) if row is None else row
        # a query that is named is not drawn, as in the published evaluation
        order = rng.permutation(n_shots).tolist() if shuffle and n_shots else range(n_shots)
        draws.append(Draw(tuple(demos), query, tuple(order)))
    started = seed if isinstance(seed, int) else None
    named = "numpy.random.RandomState"
    return _built(task, tokenizer, template or Template(), n_shots, draws, named, started, split, slots)


def relation_trials(
    task: Task,
    tokenizer: Any,
    *,
    template: Template | None = None,
    n_trials: int = 25,
    n_demos: int = 9,
    seed: int | random.Random = 0,
) -> Trials:
    """Trials of one question of a relation, drawn from all rows: query and demonstrations are different rows.

    Args:
        seed: or a stream to go on with, over several questions.

    Raises:
        PlanError: fewer than `n_demos + 1` rows.
        TextError: as `fixed_trials`.
    """
    if len(task) < n_demos + 1:
        raise ic.PlanError(
            f"task {task.name} has {len(task)} rows; {n_demos} demonstrations and a query need {n_demos + 1}. Ask for "
            f"n_demos={len(task) - 1} or fewer"
        )
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    draws = []
    for _ in range(n_trials):
        query = rng.randrange(len(task))
        rest = [row for row in range(len(task)) if row != query]
        rng.shuffle(rest)
        demos = tuple(rest[:n_demos])
        draws.append(Draw(demos, query, _reordered(rng, [task.pairs[row].output for row in demos])))
    # part of the published stream, which goes on with the next question from here
    rng.shuffle(draws)
    started = seed if isinstance(seed, int) else None
    return _built(task, tokenizer, template or Template(), n_demos, draws, "random.Random", started, None)


def _reordered(rng: random.Random, answers: list[str]) -> tuple[int, ...]:
    """A shuffle of answers, once more if the texts come out the same."""
    order = list(range(len(answers)))
    rng.shuffle(order)
    if [answers[i] for i in order] == answers:
        rng.shuffle(order)
    return tuple(order)


def _sizes(task: Task, split: str, n_trials: int, n_shots: int) -> tuple[int, int]:
    """Rows for demonstrations and for queries, enough of both."""
    n_train, n_queries = len(task.train), len(task.rows(split))
    if n_shots < 0 or n_trials < 1:
        raise ic.PlanError(f"{n_trials} trials with {n_shots} demonstrations: at least one trial and 0 demonstrations")
    if n_train < n_shots:
        raise ic.PlanError(
            f"task {task.name} has {n_train} training rows (of {len(task)} pairs) for {n_shots} demonstrations; ask "
            f"for n_shots={n_train} or fewer, or for a smaller test_split than {task.test_split}"
        )
    if not n_queries:
        raise ic.PlanError(
            f"task {task.name} has no {split} rows ({len(task)} pairs, test_split {task.test_split}); give more pairs"
        )
    return n_train, n_queries


def _built(
    task: Task,
    tokenizer: Any,
    template: Template,
    n_shots: int,
    draws: Sequence[Draw],
    rng: str,
    seed: int | None,
    split: str | None = "valid",
    slots: bool = True,
) -> Trials:
    """Prompts for draws; rows count within the splits, or within the task where there is no split."""
    front = template.front(tokenizer)
    known = dummy(tokenizer, template, n_shots) if slots else None
    train = task.train if split else range(len(task))
    query_rows = task.rows(split) if split else range(len(task))

    def trial(number: int, draw: Draw) -> Trial:
        demos = [task.pairs[train[row]] for row in draw.demos]
        shuffled = [Pair(pair.input, demos[i].output) for pair, i in zip(demos, draw.order, strict=True)]
        query = task.pairs[query_rows[draw.query]]
        return trial_of(number, tokenizer, template, known, demos, shuffled, query, draw.demos, draw.query)

    settings = {
        "dataset_json": task.source,
        "seed": seed,
        "n_trials": len(draws),
        "n_shots": n_shots,
        "test_split": task.test_split,
        "prefixes": dict(template.prefixes),
        "separators": dict(template.separators),
        "model_name_for_tokenizer": name_of(tokenizer),
        "model_prepend_bos": front.added,
        "prepend_bos_token_used": bool(front.text),
        "rng": rng,
    } | ({} if split == "valid" else {"query_split": split or "all"})
    splits = {"train_indices": task.train, "valid_indices": task.valid, "test_indices": task.test}
    return Trials(tuple(trial(i, draw) for i, draw in enumerate(draws)), known, settings, splits)
