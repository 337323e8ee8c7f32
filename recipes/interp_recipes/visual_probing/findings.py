"""What the recipe `visual_probing` finds: numbers, what of them is significant, and sentences made of the numbers.

A gain over the random image is called significant where its interval (paired bootstrap over samples, images drawn
whole) excludes 0 and its sign-flip test, by Holm over the positions, has p <= 0.05; nothing is where a rule of the
probes makes it inconclusive or an error. Layers and folds are never resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from interp_plugins.probe.compare import INTERPRETATION, Comparison
from interp_plugins.probe.decoding import corrected_error
from jaxtyping import Float

from interp_core import stats

from .samples import BLIND, MODES, ORIGINAL, RANDOM

LEVEL = 0.05
FEWEST = 10
"""Images below which intervals are too narrow to speak of significance."""

NUMBERS = (
    "delta", "low", "high", "p", "p_holm", "fold_error", "detectable", "delta_black", "delta_mean", "shuffled_95",
    "p_shuffled", "selectivity", "words",
)  # fmt: skip
"""Columns of the table beside the modes."""
ENDS = tuple(f"{mode}_{end}" for mode in MODES for end in ("low", "high"))
"""Columns of the ends of the modes' intervals."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Cliff:
    """Which layers are averaged.

    Attributes:
        boundary: the first layer after the cliff; None: all layers.
        record: of the causal study that found it: its path, or its hash.
        hash: of that record; of a file, its sha256.
        n_layers: of the states: the model's layers and its output.
    """

    boundary: int | None
    record: str
    hash: str
    n_layers: int

    @property
    def first(self) -> int:
        """The first layer that is averaged."""
        return self.boundary or 0

    @property
    def layers(self) -> str:
        """The layers, in words."""
        return f"{self.first}-{self.n_layers - 1}"

    def sentence(self) -> str:
        """Where they come from."""
        if self.boundary is None:
            return (
                f"Means are over all layers, {self.layers}: no --cliff_boundary was given. (Layer {self.n_layers - 1} "
                "is the model's output.)"
            )
        whose = f"of the causal record {self.record} (hash {self.hash[:16]})".replace("record  (", "record (")
        whose = whose if self.hash else "whose causal record was not named"
        return (
            f"Means are over layers {self.layers}, after the cliff: --cliff_boundary {self.boundary}, {whose}. "
            f"(Layer {self.n_layers - 1} is the model's output.)"
        )


def _significance(p: float, gain: stats.Interval) -> str:
    """Both must hold: sign flips know nothing of how far a mean is from 0, an interval nothing of many positions."""
    if p > LEVEL or not gain.excludes(0):
        return "not significant"
    return "significant" if gain.value > 0 else "significant (below)"


@dataclass(frozen=True, eq=False)
class Position:
    """What probes read at one position.

    Attributes:
        name: of the position.
        comparison: of all modes; None where no probe could be fitted.
        why: why not; empty if one could.
        cliff: which layers are averaged.
        constant: modes in which the states of all samples are the same, so that there is nothing to decode.
    """

    name: str
    comparison: Comparison | None
    why: str
    cliff: Cliff
    constant: tuple[str, ...] = ()

    @property
    def fitted(self) -> Comparison:
        """The comparison, where there is one."""
        assert self.comparison is not None
        return self.comparison

    @cached_property
    def means(self) -> dict[str, stats.Interval]:
        """Mean accuracy after the cliff, by mode."""
        return {mode: self.fitted.after(self.cliff.first, mode) for mode in MODES}

    @cached_property
    def gain(self) -> stats.Interval:
        """Mean accuracy with the image minus that with a random one."""
        return self.fitted.after(self.cliff.first, minus=RANDOM)

    @cached_property
    def accuracies(self) -> dict[str, stats.Band]:
        """Accuracy over layers, by mode."""
        return {mode: self.fitted.accuracy(mode) for mode in MODES}

    @cached_property
    def gains(self) -> dict[str, stats.Band]:
        """Accuracy with the image minus that of each blind mode, over layers; the bands hold the whole curve."""
        return {mode: self.fitted.gain(mode, simultaneous=True) for mode in BLIND}

    @cached_property
    def test(self) -> Any:
        """Sign flips of the same difference, images flipped whole; classes weigh alike."""
        modes, start = self.fitted.modes, self.cliff.first
        difference = (modes[ORIGINAL].correct - modes[RANDOM].correct)[:, start:].mean(1)
        # balanced accuracy is what is reported, so each class weighs the same here too
        labels = modes[ORIGINAL].labels
        counts = np.bincount(labels)
        weights = len(labels) / (len(counts) * counts[labels])
        return stats.sign_flip(difference * weights, clusters=self.fitted.folds.groups)

    @property
    def fold_error(self) -> float:
        """Standard error of the gain over other train samples, by repeated folds (Nadeau and Bengio 2003)."""
        modes, start = self.fitted.modes, self.cliff.first
        by_split = (modes[ORIGINAL].by_split - modes[RANDOM].by_split)[:, start:].mean(1, keepdims=True)
        return float(corrected_error(by_split, modes[ORIGINAL].ratio)[0])

    @cached_property
    def flags(self) -> list[str]:
        """What makes the numbers not count. Where all states are the same, accuracy below that of shuffled labels comes
        of stratified folds, and is no error."""
        if self.comparison is None:
            return [f"inconclusive: {self.why}"]
        empty = tuple(f"error: {mode}:" for mode in self.constant)
        return [flag for flag in self.comparison.flags(self.cliff.first) if not flag.startswith(empty)]

    def verdict(self, adjusted: float) -> str:
        """Of the gain: error, inconclusive, significant, significant (below), not significant."""
        for kind in ("error", "inconclusive"):
            if any(flag.startswith(kind) for flag in self.flags):
                return kind
        return _significance(adjusted, self.gain)


@dataclass(frozen=True, eq=False)
class Behaviour:
    """The model's own answers.

    Attributes:
        scores: by mode `[sample]`.
        unparsable: by mode, answers that could not be read; they score 0.
        cut: by mode, answers that did not come to their end.
        images: of the samples.
        scorer: in words.
    """

    scores: Mapping[str, Float[np.ndarray, " sample"]]
    unparsable: Mapping[str, int]
    cut: Mapping[str, int]
    images: Sequence[str]
    scorer: str

    @cached_property
    def means(self) -> dict[str, stats.Interval]:
        """By mode."""
        boot = stats.Bootstrap(clusters=self.images)
        return {mode: boot.mean(values, name=f"score, {mode}") for mode, values in self.scores.items()}

    @cached_property
    def gains(self) -> dict[str, stats.Interval]:
        """Original minus each blind mode, paired."""
        boot = stats.Bootstrap(clusters=self.images)
        return {mode: boot.difference(self.scores[ORIGINAL], self.scores[mode]) for mode in BLIND}

    @cached_property
    def tests(self) -> dict[str, Any]:
        """Sign flips of the same differences."""
        return {
            mode: stats.sign_flip(self.scores[ORIGINAL] - self.scores[mode], clusters=self.images) for mode in BLIND
        }

    def verdict(self, mode: str = RANDOM) -> str:
        """Of the gain over a blind mode: inconclusive, significant, significant (below), not significant."""
        if self.gains[mode].units < FEWEST:
            return "inconclusive"
        return _significance(self.tests[mode].p, self.gains[mode])


@dataclass(frozen=True, eq=False)
class Findings:
    """All of it.

    Attributes:
        positions: in their order.
        behaviour: of the same samples.
        cliff: which layers are averaged.
        labels: of the samples used.
        skipped: rows of samples that were left out.
        unused: questions that were not asked, by why.
        collisions: samples whose donor has their label.
        resized: samples whose donor was resized.
        colour: of blind_mean.
    """

    positions: Sequence[Position]
    behaviour: Behaviour
    cliff: Cliff
    labels: Sequence[str]
    skipped: Sequence[Row]
    unused: Mapping[str, int]
    collisions: int
    resized: int
    colour: Sequence[int]

    @cached_property
    def adjusted(self) -> dict[str, float]:
        """p of each position's gain, by Holm over positions."""
        fitted = [position for position in self.positions if position.comparison is not None]
        if not fitted:
            return {}
        return dict(zip((p.name for p in fitted), map(float, stats.holm([p.test.p for p in fitted])), strict=True))

    def verdict(self, position: Position) -> str:
        """Of a position's gain over the random image."""
        return position.verdict(self.adjusted.get(position.name, 1.0))

    # Tables

    @cached_property
    def table(self) -> list[Row]:
        """A row per position: means after the cliff, the gain over the random image, and what it is worth."""
        rows: list[Row] = []
        for position in self.positions:
            head: Row = {"position": position.name, "layers": self.cliff.layers}
            if position.comparison is None:
                empty = dict.fromkeys((*MODES, *ENDS, *NUMBERS), float("nan"))
                rows.append(head | empty | {"n": len(self.labels), "images": self.behaviour.means[ORIGINAL].units,
                                            "verdict": "inconclusive"})  # fmt: skip
                continue
            c, start, gain = position.comparison, self.cliff.first, position.gain
            means = {mode: position.means[mode].value for mode in MODES}
            null = c.modes[ORIGINAL].null[:, start:].mean(1)
            nan = float("nan")
            bounds = [end for mode in MODES for end in (position.means[mode].low, position.means[mode].high)]
            rows.append(head | means | dict(zip(ENDS, bounds, strict=True)) | {
                "delta": gain.value, "low": gain.low, "high": gain.high, "p": position.test.p,
                "p_holm": self.adjusted[position.name], "fold_error": position.fold_error,
                "detectable": gain.detectable,
                "delta_black": means[ORIGINAL] - means["blind_black"],
                "delta_mean": means[ORIGINAL] - means["blind_mean"],
                "shuffled_95": float(np.quantile(null, 0.95)) if len(null) else nan,
                "p_shuffled": c.p(start) if len(null) else nan,
                "selectivity": float(c.original.selectivity[start:].mean()) if c.original.controls else nan,
                "words": float(c.words.accuracy[0]) if c.words is not None else nan,
                "n": gain.n, "images": gain.units, "verdict": self.verdict(position),
            })  # fmt: skip
        return rows

    def curves(self) -> list[Row]:
        """A row per position, mode and layer."""
        rows = []
        for position in self.positions:
            if (c := position.comparison) is None:
                continue
            for mode in MODES:
                band, decoded = position.accuracies[mode], c.modes[mode]
                null = c.band(mode) if decoded.shuffles else np.full((2, decoded.n_layers), np.nan)
                gain = position.gains.get(mode)
                for layer in range(decoded.n_layers):
                    row: Row = {
                        "position": position.name, "mode": mode, "layer": layer, "accuracy": float(band.value[layer]),
                        "low": float(band.low[layer]), "high": float(band.high[layer]),
                        "auroc": float(decoded.auroc[layer]), "null_low": float(null[0, layer]),
                        "null_high": float(null[1, layer]),
                        "control": float(decoded.control[:, layer].mean()) if decoded.controls else float("nan"),
                    }  # fmt: skip
                    ends = {"gain": "value", "gain_low": "low", "gain_high": "high"}
                    row |= {
                        k: float("nan") if gain is None else float(getattr(gain, v)[layer]) for k, v in ends.items()
                    }
                    rows.append(row)
        return rows

    def behaviour_table(self) -> list[Row]:
        """A row per mode: the mean score, and the original's paired gain over it."""
        b, rows = self.behaviour, []
        for mode in MODES:
            row: Row = {"mode": mode} | b.means[mode].row()
            row |= {"unparsable": b.unparsable[mode], "cut": b.cut[mode]}
            gain = b.gains.get(mode)
            row |= {"delta": gain.value, "delta_low": gain.low, "delta_high": gain.high, "p": b.tests[mode].p,
                    "detectable": gain.detectable, "verdict": b.verdict(mode)} if gain is not None else dict.fromkeys(
                        ("delta", "delta_low", "delta_high", "p", "detectable", "verdict"), "")  # fmt: skip
            rows.append(row)
        return rows

    # Words

    @cached_property
    def sentences(self) -> list[str]:
        """What came out; nothing is said that the numbers do not carry."""
        said = [self._samples(), self.cliff.sentence()]
        said += [self._position(position) for position in self.positions]
        return [*said, self._behaviour(), self.conclusion(), INTERPRETATION]

    def _samples(self) -> str:
        n, images = len(self.labels), self.behaviour.means[ORIGINAL].units
        counts = ", ".join(f"{self.labels.count(label)} {label}" for label in sorted(set(self.labels)))
        text = f"{n} questions ({counts}) about {images} images."
        text += f" {self.collisions} donors ({self.collisions / n:.0%}) have the label of their host"
        text += f"; {self.resized} were resized." if self.resized else "."
        if self.skipped:
            text += f" {len({row['sample'] for row in self.skipped})} questions could not be used, listed below."
        for why, count in self.unused.items():
            text += f" {count} questions were not asked: {why}."
        return text

    def _position(self, position: Position) -> str:
        verdict, flags = self.verdict(position), position.flags
        if (c := position.comparison) is None:
            return f"{position.name}: inconclusive: {position.why}."
        start = self.cliff.first
        text = (
            f"{position.name}: probes read the label with balanced accuracy {position.means[ORIGINAL]:.3f} with the "
            f"image and {position.means[RANDOM]:.3f} with a random one; the gain is {position.gain:+.3f} "
            f"(paired bootstrap over {position.gain.units} images; p = {position.test.p:.2g}, "
            f"{self.adjusted[position.name]:.2g} by Holm): "
        )
        if verdict in ("error", "inconclusive"):
            why = next(flag for flag in flags if flag.startswith(verdict))
            return text + (f"{why}." if verdict == "inconclusive" else f"no finding. {why}.")
        if verdict == "significant":
            text += "significant."
        elif verdict == "significant (below)":
            text += "significant, in the other direction: the image makes the label harder to read."
        else:
            text += f"not significant (a gain of {position.gain.detectable:.3f} would have been seen in 80 % of cases)."
        if verdict.startswith("significant") and abs(position.gain.value) < 2 * position.fold_error:
            text += f" Other train samples could undo it: by repeated folds its error is {position.fold_error:.3f}."
        if c.original.shuffles:
            p = c.p(start)
            above = "above" if p <= LEVEL else "not told from"
            text += f" With the image it is {above} shuffled labels (p = {p:.2g})"
            text += f", the question's words alone give {c.words.accuracy[0]:.3f}." if c.words is not None else "."
        return text

    def _behaviour(self) -> str:
        b, gain, verdict = self.behaviour, self.behaviour.gains[RANDOM], self.behaviour.verdict()
        text = (
            f"The model's own answers ({b.scorer}): {b.means[ORIGINAL]:.1%} right with the image, "
            f"{b.means[RANDOM]:.1%} with a random one; the paired difference is {gain:+.1%} "
            f"(p = {b.tests[RANDOM].p:.2g}): "
        )
        text += {
            "significant": "significant.",
            "significant (below)": "significant, in the other direction: the model answers better without its image.",
            "not significant": "not significant: no sample scores otherwise."
            if not gain.error
            else f"not significant (a difference of {gain.detectable:.1%} would have been seen in 80 % "
            "of cases).",
            "inconclusive": f"inconclusive: {gain.units} images, {FEWEST} at least are needed.",
        }[verdict]  # fmt: skip
        worst = max(b.means[mode].value for mode in BLIND)
        if verdict != "significant" or b.means[ORIGINAL].value <= worst:
            text += f" The best of the blind modes scores {worst:.1%}."
        if b.unparsable[ORIGINAL]:
            text += f" {b.unparsable[ORIGINAL]} answers could not be read and count as wrong."
        if b.cut[ORIGINAL]:
            text += f" {b.cut[ORIGINAL]} answers did not come to their end within max_new_tokens."
        return text

    def conclusion(self) -> str:
        """The sentence that says what is significant and what is not."""
        by: dict[str, list[str]] = {}
        for position in self.positions:
            by.setdefault(self.verdict(position), []).append(position.name)
        words = {
            "significant": "is significantly more with the image than with a random one",
            "significant (below)": "is significantly less with the image than with a random one",
            "not significant": "is not told from that with a random image", "inconclusive": "remains inconclusive",
            "error": "is no finding, since its setup is wrong",
        }  # fmt: skip
        parts = [f"at {' and '.join(by[v])} it {text}" for v, text in words.items() if v in by]
        behaviour = {
            "significant": "the image's gain in the model's own answers is significant",
            "significant (below)": "the model's own answers are significantly worse with the image",
            "not significant": "the image's gain in the model's own answers is not significant",
            "inconclusive": "the gain in the model's own answers remains inconclusive",
        }[self.behaviour.verdict()]  # fmt: skip
        return f"Of what can be decoded, {'; '.join(parts)}; as to behaviour, {behaviour}."

    def record(self) -> Row:
        """As plain data."""
        verdicts = {position.name: self.verdict(position) for position in self.positions}
        return {
            "cliff_boundary": self.cliff.boundary, "causal_record": self.cliff.record,
            "causal_record_hash": self.cliff.hash, "layers": self.cliff.layers, "n": len(self.labels),
            "labels": {label: self.labels.count(label) for label in sorted(set(self.labels))},
            "images": self.behaviour.means[ORIGINAL].units, "probes": self.table, "behaviour": self.behaviour_table(),
            "verdicts": verdicts | {"behaviour": self.behaviour.verdict()},
            "flags": {position.name: position.flags for position in self.positions},
            "donors": {"same_label": self.collisions, "resized": self.resized}, "mean_colour": list(self.colour),
            "skipped": list(self.skipped), "not_asked": dict(self.unused), "scorer": self.behaviour.scorer,
            "sentences": self.sentences, "interpretation": INTERPRETATION,
        }  # fmt: skip
