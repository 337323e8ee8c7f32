"""Probes of the recipe `visual_probing`: fitted position by position, and kept as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from interp_plugins.attribution.files.arrays import npz_bytes
from interp_plugins.probe.compare import Comparison, compare
from interp_plugins.probe.decoding import Decoding
from interp_plugins.probe.folds import Folds, make_folds, merged
from interp_plugins.probe.study import Decoder
from torch import Tensor

import interp_core as ic
from interp_core import runs

from .samples import MODES, Sample, Shown, states_at

Grouping = Literal["image", "image_and_question"]
SAME = 1e-4
"""How far states of the largest size lie apart that differ by rounding alone."""
Kept = tuple[Comparison, tuple[str, ...]]
"""Fitted probes, and the modes in which all samples have the same states."""


@dataclass(frozen=True)
class Probing:
    """Settings of the probes.

    Attributes:
        decoder, shuffles, n_folds, repeats, seed: as of `compare`.
        group_by: what is never on both sides of a fold: an image, or also a question's text.
    """

    decoder: Decoder
    shuffles: int
    n_folds: int
    repeats: int
    group_by: Grouping
    seed: int


def probed(
    run: runs.RunFolder, data: Shown, kept: Sequence[int], place: str, files: Mapping[str, Sequence[str]],
    probing: Probing,
) -> tuple[Comparison | None, str, tuple[str, ...]]:  # fmt: skip
    """The probes of a position in all modes; or none, and why there are too few samples for them. Last, the modes in
    which all samples have the same states."""
    samples = [data.samples[number] for number in kept]
    groups, donors = _groups(data, kept, probing)
    folds, why = _folds(samples, groups, donors, probing)
    if folds is None:
        return None, why, ()
    names, labels = [sample.name for sample in samples], [sample.label for sample in samples]
    questions: list[str] | None = [sample.question.question for sample in samples]
    if len(set(questions or ())) < len(set(labels)):
        questions = None  # too few texts to tell apart: neither words nor control tasks say anything

    def make() -> Kept:
        states = {mode: states_at([run.path / name for name in files[mode]], place, names) for mode in MODES}
        constant = tuple(mode for mode, values in states.items() if _same(values))
        comparison = compare(
            states, labels, groups=groups, donors=donors, questions=questions, folds=folds,
            donor_labels=[data.samples[sample.donor].label for sample in samples], decoder=probing.decoder,
            shuffles=probing.shuffles, seed=probing.seed,
        )  # fmt: skip
        return comparison, constant

    after = [name for of in files.values() for name in of]
    comparison, constant = run.stage(
        probes_file(place), make, inputs={"kept": names}, after=after, read=lambda path: _read(path, folds), data=_bytes
    )
    return comparison, "", constant


def probes_file(place: str) -> str:
    """Where the probes of a position are kept."""
    return f"probes/{runs.safe_name(place)}.npz"


def _same(states: Tensor) -> bool:
    """Whether states differ between samples by rounding alone."""
    return bool((states - states[:1]).abs().max() <= SAME * states.abs().max())


def _folds(
    samples: Sequence[Sample], groups: Sequence[int], donors: Sequence[int], probing: Probing
) -> tuple[Folds | None, str]:
    """Folds, fewer than asked for where a class is rare; or none, and why."""
    labels = [sample.label for sample in samples]
    counts = [len({g for g, own in zip(groups, labels, strict=True) if own == label}) for label in set(labels)]
    n_folds = min(probing.n_folds, *counts, len(samples))
    if len(counts) < 2 or n_folds < 2:
        few = f"{len(samples)} samples of {len(counts)} class(es), the rarest in {min(counts)} group(s) of images"
        return None, few
    deals: dict[str, int] = {"n_folds": n_folds, "repeats": probing.repeats, "seed": probing.seed}
    try:
        folds = make_folds(labels, groups, donors=donors, **deals)
    except ic.PlanError as error:
        return None, str(error)
    numbers = np.array([sorted(set(labels)).index(label) for label in labels])
    if any(len(np.unique(numbers[train])) < len(counts) for train in folds.train):
        return None, f"{len(samples)} samples leave a train fold without one of {len(counts)} classes"
    return folds, ""


def _groups(data: Shown, kept: Sequence[int], probing: Probing) -> tuple[list[int], list[int]]:
    """What is never on both sides of a fold, of each sample and of its donor; numbered over all samples, since a donor
    may have been left out."""
    labelings = [[sample.image for sample in data.samples]]
    if probing.group_by == "image_and_question":
        labelings.append([sample.question.question for sample in data.samples])
    groups = merged(*labelings).tolist()
    return [groups[number] for number in kept], [groups[data.samples[number].donor] for number in kept]


ARRAYS = ("hits", "counts", "inner", "correct", "ranking", "penalty", "repeat", "labels", "groups")
PLAIN = ("shuffles", "controls", "ratio", "classes", "decoder")


def _bytes(kept: Kept) -> bytes:
    """A comparison as a file of arrays; folds are dealt again."""
    comparison, constant = kept
    decoded = {**comparison.modes, **({} if comparison.words is None else {"words": comparison.words})}
    arrays = {f"{mode}/{name}": getattr(of, name) for mode, of in decoded.items() for name in ARRAYS}
    about = {mode: {name: getattr(of, name) for name in PLAIN} for mode, of in decoded.items()}
    text = json.dumps({"modes": about, "collisions": comparison.collisions, "constant": constant})
    return npz_bytes({**arrays, "about": np.frombuffer(text.encode(), np.uint8)})


def _read(path: Path, folds: Folds) -> Kept:
    with np.load(path) as file:
        about = json.loads(file["about"].tobytes())
        decoded = {mode: _decoding(file, mode, plain) for mode, plain in about["modes"].items()}
    words = decoded.pop("words", None)
    return Comparison(decoded, words, folds, about["collisions"]), tuple(about["constant"])


def _decoding(file: Any, mode: str, plain: Mapping[str, Any]) -> Decoding:
    arrays = {name: file[f"{mode}/{name}"] for name in ARRAYS}
    return Decoding(**arrays, **{**plain, "classes": tuple(plain["classes"])})
