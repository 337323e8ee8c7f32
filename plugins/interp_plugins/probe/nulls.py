"""Labelings that a probe must not read from states: shuffled, of the control task; and the question's words alone.

    shuffled       labels permuted over samples; over groups where every group has one label, since its samples are not
                   independent
    control task   each type of question gets a random label, the same on all its samples: what a probe can memorise.
                   Selectivity is accuracy on the labels minus accuracy on these
    bag of words   counts of the question's words, as states of one layer

Source: Hewitt and Liang (2019), Designing and Interpreting Probes with Control Tasks, arXiv:1909.03368; Ojala and
Garriga (2010), Permutation Tests for Studying Classifier Performance.
Must equal: every shuffle has the labels' own counts (permuted over groups, if these have one size).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import interp_core as ic

from .folds import Folds, numbered

WORD = re.compile(r"\w+|[^\w\s]")


def shuffled(
    labels: Int[np.ndarray, " sample"], groups: Int[np.ndarray, " sample"], count: int, seed: int = 0
) -> Int[np.ndarray, "sample shuffle"]:
    """Permuted labels."""
    # a stream of its own, as control tasks have: the one leaves the other, and the folds of this seed, as they are
    rng = np.random.default_rng([seed, 1])
    _, group_of = np.unique(groups, return_inverse=True)
    first = np.zeros(group_of.max() + 1, dtype=np.int64)
    first[group_of] = labels
    # where every group has one label, whole groups are what can be exchanged
    by_group = (first[group_of] == labels).all()
    drawn = [rng.permutation(first)[group_of] if by_group else rng.permutation(labels) for _ in range(count)]
    return np.stack(drawn, 1) if count else labels[:, None][:, :0]


def control_labels(
    labels: Int[np.ndarray, " sample"], types: Any, count: int, seed: int = 0
) -> Int[np.ndarray, "sample draw"]:
    """Labels of control tasks: drawn for each type from the labels' shares, every class at least once.

    Raises:
        PlanError: fewer types than classes.
    """
    type_of, names = numbered(types, "types")
    classes = int(labels.max()) + 1
    if len(type_of) != len(labels):
        raise ic.PlanError(f"types: {len(type_of)} for {len(labels)} samples; give one per sample")
    if len(names) < classes:
        raise ic.PlanError(
            f"control task: {len(names)} type(s) of question for {classes} classes; give finer types, such as the text "
            "of the question"
        )
    rng = np.random.default_rng([seed, 2])
    shares = np.bincount(labels, minlength=classes) / len(labels)
    drawn = np.stack([
        # every class once before the draws, or a task could lack one
        rng.permutation(np.r_[np.arange(classes), rng.choice(classes, len(names) - classes, p=shares)])
        for _ in range(count)
    ], 1)  # fmt: skip
    return np.asarray(drawn[type_of])


def seen_types(types: Any, folds: Folds) -> float:
    """Share of test samples whose type occurs in the train samples, mean over splits."""
    type_of, _ = numbered(types, "types")
    return float(np.mean([np.isin(type_of[test], type_of[train]).mean()
                          for train, test in zip(folds.train, folds.test, strict=True)]))  # fmt: skip


def bag_of_words(texts: Sequence[str]) -> Float[np.ndarray, "sample 1 word"]:
    """Counts of the words of lower-cased texts, as states of one layer.

    Raises:
        PlanError: no texts, or none with a word.
    """
    bags = [WORD.findall(str(text).lower()) for text in texts]
    words = {word: number for number, word in enumerate(sorted({word for bag in bags for word in bag}))}
    if not words:
        raise ic.PlanError("bag_of_words: the texts have no words")
    counts = np.zeros((len(bags), 1, len(words)))
    for row, bag in enumerate(bags):
        for word in bag:
            counts[row, 0, words[word]] += 1
    return counts
