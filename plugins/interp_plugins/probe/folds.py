"""Folds for probes: stratified by label, whole groups, repeated, the same for every layer and image mode.

Groups are dealt one by one, the largest first, in random order among equals: each goes to the fold where the classes'
counts stay most even. Samples of one group (questions about one image) are never on both sides. Where samples were
shown another's image (`donors`), no train sample has been shown an image that a test sample is about or was shown.

Source: ours; Kaufman et al. (2012), Leakage in data mining, for the rules.
Must equal: every sample is tested once per repeat; train and test share no group and no shown image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

import interp_core as ic


@dataclass(frozen=True, eq=False)
class Folds:
    """Which samples are fitted and which are tested, split by split.

    Attributes:
        train, test: `[split sample]`.
        inner: number of the inner fold of each train sample, -1 of the others; of whole groups, too.
        repeat: which repeat each split belongs to.
        groups: of the samples, numbered from 0.
        seed: of the deal.

    Raises:
        PlanError: a group is on both sides of a split, or a sample not tested once per repeat.
    """

    train: Bool[np.ndarray, "split sample"]
    test: Bool[np.ndarray, "split sample"]
    inner: Int[np.ndarray, "split sample"]
    repeat: Int[np.ndarray, " split"]
    groups: Int[np.ndarray, " sample"]
    seed: int = 0

    def __post_init__(self) -> None:
        for number in range(len(self.test)):
            both = np.intersect1d(self.groups[self.train[number]], self.groups[self.test[number]])
            if len(both):
                raise ic.PlanError(
                    f"split {number} leaks: group {int(both[0])} is in train and test; deal whole groups (make_folds)"
                )
        for repeat in np.unique(self.repeat):
            if not (self.test[self.repeat == repeat].sum(0) == 1).all():
                raise ic.PlanError(f"repeat {int(repeat)} does not test every sample once; make folds with make_folds")

    def __len__(self) -> int:
        return len(self.test)

    @property
    def ratio(self) -> float:
        """Test samples over train samples, mean of the splits."""
        return float((self.test.sum(1) / self.train.sum(1)).mean())

    def fewest(self, labels: Int[np.ndarray, " sample"]) -> int:
        """The smallest number of samples of a class in a test fold."""
        classes = int(labels.max()) + 1
        return min(int(np.bincount(labels[test], minlength=classes).min()) for test in self.test)


def numbered(labels: Sequence[Any] | Any, what: str = "labels") -> tuple[Int[np.ndarray, " sample"], tuple[Any, ...]]:
    """Labels as numbers from 0, and the labels themselves, sorted by how they print.

    Raises:
        PlanError: none.
    """
    items = list(labels.tolist() if hasattr(labels, "tolist") else ic.errors.several(what, "one per sample", labels,
                                                                                    ic.PlanError))  # fmt: skip
    if not items:
        raise ic.PlanError(f"{what}: there are none")
    names = tuple(sorted(set(items), key=lambda item: (str(type(item)), item if isinstance(item, (int, float)) else 0,
                                                       str(item))))  # fmt: skip
    number_of = {name: number for number, name in enumerate(names)}
    return np.array([number_of[item] for item in items]), names


def merged(*labelings: Any) -> Int[np.ndarray, " sample"]:
    """Groups of samples that share a label in any of several labelings: an image, a scene, a template.

    Raises:
        PlanError: labelings of different lengths.
    """
    numbers = [numbered(labeling, "groups")[0] for labeling in labelings]
    if len({len(labeling) for labeling in numbers}) != 1:
        raise ic.PlanError(f"groups: labelings of {[len(labeling) for labeling in numbers]} samples")
    group = np.arange(len(numbers[0]))
    while True:
        before = group.copy()
        for labeling in numbers:
            least = np.full(labeling.max() + 1, len(group))
            np.minimum.at(least, labeling, group)
            group = least[labeling]
        if (before == group).all():
            return np.unique(group, return_inverse=True)[1]


def make_folds(
    labels: Any, groups: Any = None, *, donors: Any = None, n_folds: int = 5, repeats: int = 5, seed: int = 0
) -> Folds:
    """Stratified folds of whole groups, repeated with other deals.

    Args:
        labels: one per sample.
        groups: one per sample (its image); None: each by itself.
        donors: the group whose image each sample was shown instead of its own (mode `random`); train samples that were
            shown an image of a test sample are left out, in all modes.
        n_folds, repeats, seed: how many, and of the deals.

    Raises:
        PlanError: fewer than two classes, or a class in fewer groups than folds.
    """
    y, names = numbered(labels)
    group_of = np.arange(len(y)) if groups is None else numbered(groups, "groups")[0]
    shown = group_of if donors is None else _shown(groups, donors, group_of)
    if len(group_of) != len(y) or len(shown) != len(y):
        raise ic.PlanError(f"folds: {len(y)} labels, {len(group_of)} groups, {len(shown)} donors; give one per sample")
    if len(names) < 2 or n_folds < 2 or repeats < 1:
        raise ic.PlanError(f"{n_folds} folds, {repeats} times, of {len(names)} classes ({names[:3]}); two classes, two "
                           "folds and one repeat at least")  # fmt: skip
    for number, name in enumerate(names):
        if (count := len(np.unique(group_of[y == number]))) < n_folds:
            raise ic.PlanError(
                f"class {name!r} is in {count} group(s), {n_folds} folds need {n_folds}; take fewer folds, more "
                "samples, or leave the class out"
            )
    splits: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
    rng = np.random.default_rng(seed)
    for number in range(repeats):
        fold = _deal(y, group_of, n_folds, rng)
        for k in range(n_folds):
            tested = fold == k
            # images that a test sample is about or was shown; whoever was shown one of them may not train
            seen = np.union1d(group_of[tested], shown[tested]) if donors is not None else group_of[tested]
            keep = ~tested & ~np.isin(shown, seen)
            inside = np.full(len(y), -1)
            inside[keep] = _deal(y[keep], group_of[keep], n_folds, rng)
            splits.append((keep, tested, inside, number))
    train, test, inner, repeat = map(np.array, zip(*splits, strict=True))
    return Folds(train, test, inner, repeat, group_of, seed)


def _shown(groups: Any, donors: Any, group_of: Int[np.ndarray, " sample"]) -> Int[np.ndarray, " sample"]:
    """Donors by the numbers of the groups; a donor that is no sample's own image gets a number of its own."""
    own = range(len(group_of)) if groups is None else plain_list(groups)
    known = dict(zip(own, group_of.tolist(), strict=True))
    return np.array([known.setdefault(donor, len(known) + len(group_of)) for donor in plain_list(donors)])


def plain_list(values: Any) -> list[Any]:
    """A list, an array or a tensor as plain values, which are equal and hashed by what they say."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _deal(
    y: Int[np.ndarray, " sample"], groups: Int[np.ndarray, " sample"], n_folds: int, rng: np.random.Generator
) -> Int[np.ndarray, " sample"]:
    """The fold of each sample."""
    _, group_of = np.unique(groups, return_inverse=True)
    counts = np.zeros((group_of.max() + 1, y.max() + 1))
    np.add.at(counts, (group_of, y), 1)
    total = counts.sum(0).clip(1)
    order = rng.permutation(len(counts))
    # large groups first, while every fold still has room; equal ones in the random order
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    folds, fold = np.zeros((n_folds, counts.shape[1])), np.zeros(len(counts), dtype=np.int64)
    # a hair of randomness, so that repeats deal otherwise where folds are equally good
    ties = rng.random((len(counts), n_folds)) * 1e-9
    for group in order:
        # what putting it there adds to the sum of squared shares, of classes and, less, of sizes
        cost = ((2 * folds + counts[group]) * counts[group] / total**2).sum(1)
        # sizes decide where classes are as even either way
        cost += 1e-3 * folds.sum(1) / len(y) + ties[group]
        fold[group] = cost.argmin()
        folds[fold[group]] += counts[group]
    return fold[group_of]
