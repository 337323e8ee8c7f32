"""Probes of several image modes beside each other: gain over blind images, nulls, rules that make a number count.

    gain        accuracy in mode `original` minus accuracy in a blind mode, on the same folds; paired bootstrap over
                samples (clusters: groups), and the corrected error of repeated folds beside it
    after       mean over layers from the cliff on, of each sample, then over samples: never a bootstrap over layers
    rules       fewer than 100 samples, 10 of a class in a test fold, or 100 shuffled labelings: "inconclusive"
                mean accuracy below the band of shuffled labels (of several modes, of all of them together): "error",
                a fault of the setup and no finding

Probes show that something can be decoded, not that the model uses it: for that, change the state at the same position
(`INTERPRETATION`, in every report).

Source: Belinkov (2022), Probing Classifiers: Promises, Shortcomings, and Advances (what probes show); study.py.
Cost: one `decode` per mode; intervals are of numbers that are there.
Must equal: of a mode compared with itself the gain is 0; of labels that are noise, significance at the level asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

import interp_core as ic
from interp_core import stats

from .decoding import Decoding, corrected_error
from .folds import Folds, make_folds, numbered, plain_list
from .nulls import bag_of_words, seen_types
from .study import Decoder, decode

ORIGINAL = "original"
INTERPRETATION = (
    "Probes show that the label can be decoded from these states, not that the model uses them; for that, change the "
    "state at the same position and see what the answer does."
)
SAMPLES, PER_CLASS, SHUFFLES = 100, 10, 100
"""Below which numbers are inconclusive: samples, samples of a class in a test fold, shuffled labelings."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What probes read from states of one position.

    Attributes:
        modes: per image mode, what was decoded; `original` is among them.
        words: from the question's words alone; None where no texts were given.
        folds: of all of them.
        collisions: share of samples whose donor image has the label of the sample; None without donors' labels.
        leaky: of a position that has seen the answer.
        level: of intervals and tests.
        ceiling: share of test samples whose type occurs in train, which is the most that memorising types can reach on
            the control task beyond chance; None without types.
    """

    modes: Mapping[str, Decoding]
    words: Decoding | None
    folds: Folds
    collisions: float | None = None
    leaky: bool = False
    level: float = 0.95
    ceiling: float | None = None

    @property
    def original(self) -> Decoding:
        """With the image as it is; of texts, the only mode."""
        return self.modes[ORIGINAL]

    def _boot(self) -> stats.Bootstrap:
        return stats.Bootstrap(clusters=self.folds.groups, level=self.level)

    def _classes(self) -> Float[np.ndarray, "sample class"]:
        labels = self.original.labels
        return np.eye(int(labels.max()) + 1)[labels]

    def accuracy(self, mode: str = ORIGINAL) -> stats.Band:
        """Balanced accuracy over layers, with its interval over samples.

        Raises:
            PlanError: no such mode.
        """
        correct = self._mode(mode).correct
        return self._boot().band(
            correct, self._classes(), axes=("layer",), statistic=class_mean, name=f"accuracy, {mode}"
        )

    def gain(self, over: str = "blind_random", *, simultaneous: bool = False) -> stats.Band:
        """Accuracy with the image minus that without, over layers; paired.

        Raises:
            PlanError: no such mode.
        """
        difference = self.original.correct - self._mode(over).correct
        return self._boot().band(
            difference, self._classes(), axes=("layer",), statistic=class_mean, simultaneous=simultaneous,
            name=f"gain over {over}",
        )  # fmt: skip

    def gain_error(self, over: str = "blind_random") -> Float[np.ndarray, " layer"]:
        """Standard error of the gain by repeated folds (Nadeau and Bengio): what other train samples change, too."""
        return corrected_error(self.original.by_split - self._mode(over).by_split, self.original.ratio)

    def after(self, cliff: int = 0, mode: str = ORIGINAL, minus: str = "") -> stats.Interval:
        """Mean accuracy of layers from the cliff on, or its difference to another mode, with its interval over samples.

        Args:
            cliff: the first layer after it; 0 for all layers.
            mode: whose accuracy.
            minus: a mode to subtract, paired; "words" for the question's words; none if empty.

        Raises:
            PlanError: no such mode or layer.
        """
        values = self._layers(self._mode(mode).correct, cliff).mean(1)
        name = f"accuracy, {mode}, mean of layers from {cliff} on"
        if minus:
            other = self.words if minus == "words" else self._mode(minus)
            if other is None:
                raise ic.PlanError("no words were given: compare(…, questions=…)")
            values = values - (other.correct[:, 0] if minus == "words" else self._layers(other.correct, cliff).mean(1))
            name = f"gain over {minus}, mean of layers from {cliff} on"
        return self._boot().of(class_mean, values, self._classes(), name=name)

    def p(self, cliff: int = 0, mode: str = ORIGINAL) -> float:
        """p of the mean accuracy from the cliff on against shuffled labels.

        Raises:
            PlanError: there are no shuffled labels, or no such mode.
        """
        decoded = self._mode(mode)
        null = self._shuffled(decoded, cliff)
        return stats.p_value(float(decoded.accuracy[cliff:].mean()), null, alternative="greater")

    def p_by_layer(self, mode: str = ORIGINAL) -> Float[np.ndarray, " layer"]:
        """p of each layer, all layers taken account of: against the largest accuracy of each shuffle.

        Raises:
            PlanError: there are no shuffled labels, or no such mode.
        """
        decoded = self._mode(mode)
        self._shuffled(decoded, 0)
        # of each shuffle the best layer: what a search over layers finds where there is nothing
        largest = decoded.null.max(1)
        return np.array([stats.p_value(float(value), largest, alternative="greater") for value in decoded.accuracy])

    def band(self, mode: str = ORIGINAL) -> Float[np.ndarray, "end layer"]:
        """The band of shuffled labels at each layer: its lower and its upper end.

        Raises:
            PlanError: there are no shuffled labels, or no such mode.
        """
        decoded = self._mode(mode)
        self._shuffled(decoded, 0)
        return np.quantile(decoded.null, [(1 - self.level) / 2, (1 + self.level) / 2], axis=0)

    def _shuffled(self, decoded: Decoding, cliff: int) -> Float[np.ndarray, " shuffle"]:
        if not decoded.shuffles:
            raise ic.PlanError(f"this needs shuffled labels: shuffles={SHUFFLES} at least")
        return self._layers(decoded.null, cliff).mean(1)

    def _mode(self, mode: str) -> Decoding:
        if mode not in self.modes:
            raise ic.PlanError(f"no mode {mode!r} here. {ic.errors.nearest(mode, self.modes)}")
        return self.modes[mode]

    def _layers(self, values: Float[np.ndarray, "n layer"], cliff: int) -> Float[np.ndarray, "n layer"]:
        if isinstance(cliff, bool) or not isinstance(cliff, (int, np.integer)) or not 0 <= cliff < values.shape[1]:
            raise ic.PlanError(ic.errors.wrong("probe: cliff", f"a layer, 0 to {values.shape[1] - 1}", cliff))
        return values[:, cliff:]

    def flags(self, cliff: int = 0) -> list[str]:
        """What makes the numbers not count; each begins with "inconclusive" or "error"."""
        out = []
        n, fewest = len(self.original.labels), self.folds.fewest(self.original.labels)
        if n < SAMPLES:
            out.append(f"inconclusive: {n} samples, {SAMPLES} at least are needed")
        if fewest < PER_CLASS:
            out.append(f"inconclusive: a test fold has {fewest} samples of a class, {PER_CLASS} at least are needed")
        if self.original.shuffles < SHUFFLES:
            out.append(f"inconclusive: {self.original.shuffles} shuffled labelings, {SHUFFLES} at least are needed")
        for mode, decoded in self.modes.items():
            if decoded.shuffles:
                # Bonferroni over modes: one of several is below its own band by chance more often
                low = float(np.quantile(self._shuffled(decoded, cliff), (1 - self.level) / 2 / len(self.modes)))
                mean = float(decoded.accuracy[cliff:].mean())
                if mean < low:
                    out.append(
                        f"error: {mode}: mean accuracy {mean:.3f} lies below that of shuffled labels ({low:.3f}); "
                        "something in the setup is wrong (folds, labels, positions), this is no finding"
                    )
        if self.leaky:
            out.append("error: leaky: the position has seen the answer; its accuracy says nothing of the model")
        return out

    def verdict(self, cliff: int = 0, over: str = "blind_random") -> str:
        """ "error", "inconclusive", "decodable beyond the blind image", "decodable" or "not significant"."""
        flags = self.flags(cliff)
        for kind in ("error", "inconclusive"):
            if any(flag.startswith(kind) for flag in flags):
                return kind
        if self.p(cliff) > 1 - self.level:
            return "not significant"
        if over in self.modes and self.after(cliff, minus=over).low > 0:
            return "decodable beyond the blind image"
        return "decodable"

    def table(self, cliff: int = 0) -> list[dict[str, Any]]:
        """One row per mode: the mean of layers from the cliff on, its interval, p, and the gain of the original."""
        rows = []
        for mode, decoded in self.modes.items():
            row = {"mode": mode} | self.after(cliff, mode).row()
            row |= {"auroc": float(decoded.auroc[cliff:].mean())}
            row |= {"p": self.p(cliff, mode)} if decoded.shuffles else {}
            row |= {"selectivity": float(decoded.selectivity[cliff:].mean())} if decoded.controls else {}
            row |= {} if np.isnan(decoded.inner).any() else {"layer_chosen_inside": decoded.chosen()[0]}
            if mode != ORIGINAL:
                gain = self.after(cliff, minus=mode)
                row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            rows.append(row)
        if self.words is not None:
            gain = self.after(cliff, minus="words")
            rows.append({"mode": "words", "value": float(self.words.accuracy[0]), "auroc": float(self.words.auroc[0]),
                         "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high})  # fmt: skip
        return rows

    def curves(self, name: str = "", places: Sequence[str] = ()) -> ic.report.Curves:
        """Accuracy over layers (or `places`) in each mode, with the shuffled labels' band of the original, and the
        control task's accuracy."""
        lines = [ic.report.Line.of(mode, self.accuracy(mode)) for mode in self.modes]
        if self.original.shuffles:
            lines.append(ic.report.Line("shuffled labels", self.original.null.mean(0), self.band().T))
        if self.original.controls:
            lines.append(ic.report.Line("control task", self.original.control.mean(0)))
        return ic.report.Curves(
            lines, list(places) or [str(layer) for layer in range(self.original.n_layers)],
            title=name or "What probes decode", xlabel="" if places else "layer", ylabel="balanced accuracy",
            caption=f"{name or 'Balanced accuracy'}: {INTERPRETATION}",
        )  # fmt: skip

    def text(self, cliff: int = 0) -> str:
        """The table, flags and interpretation, of the layers from the cliff on."""
        decoded = self.original
        lines = [f"{decoded.decoder}, {len(decoded.labels)} samples of {len(decoded.classes)} classes, "
                 f"{len(self.folds)} splits, {decoded.shuffles} shuffles: {self.verdict(cliff)}"]  # fmt: skip
        for row in self.table(cliff):
            ends = f" [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
            above = (f"  original above it {row['gain']:+.3f} [{row['gain_low']:.3f}, {row['gain_high']:.3f}]"
                     if "gain" in row else "")  # fmt: skip
            lines.append(f"  {row['mode']:<14} {row['value']:.3f}{ends}{above}")
        if self.collisions is not None:
            lines.append(f"  {100 * self.collisions:.0f} % of the donors' images have the sample's own label")
        if self.ceiling is not None:
            selectivity = float(decoded.selectivity[cliff:].mean())
            lines.append(f"  selectivity {selectivity:+.3f}; {self.ceiling:.0%} of test samples have a type of the "
                         "train samples, which a probe can memorise")  # fmt: skip
        return "\n".join([*lines, *(f"  {flag}" for flag in self.flags(cliff)), f"  {INTERPRETATION}"])

    def __str__(self) -> str:
        return self.text()


def class_mean(values: Any, classes: Any) -> Any:
    """The mean over classes of the mean of their samples: `[sample …]` and one-hot `[sample class]`."""
    sums = classes.T @ values.reshape(len(values), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / classes.sum(0)[:, None]
    return means.mean(0).reshape(values.shape[1:])


def compare(
    states: Mapping[str, Any],
    labels: Any,
    *,
    groups: Any = None,
    donors: Any = None,
    questions: Any = None,
    types: Any = None,
    donor_labels: Any = None,
    folds: Folds | None = None,
    n_folds: int = 5,
    repeats: int = 5,
    decoder: Decoder = "ridge",
    penalties: tuple[float, ...] | None = None,
    shuffles: int = SHUFFLES,
    controls: int = 10,
    leaky: bool = False,
    seed: int = 0,
) -> Comparison:
    """Fit probes of every image mode on the same folds.

    Args:
        states: per mode `[sample layer d]`; `original` must be among them. All of the same samples.
        labels: of the samples, in all modes those of the original image.
        groups: what samples share (an image): never on both sides of a fold. Of several, `merged(images, scenes)`.
        donors: the group whose image each sample was shown in mode `blind_random`.
        questions: the samples' texts, for the probe of their words alone.
        types: of the questions, for control tasks; None: the questions themselves, if given.
        donor_labels: the labels of the donors, to say how often they are the sample's own.
        folds: of `make_folds`; None: made here, `n_folds`, `repeats` times.
        decoder, penalties, shuffles, controls, seed: as of `decode`.
        leaky: the position has seen the answer.

    Raises:
        PlanError: modes without `original`, or what does not fit.
    """
    if not isinstance(states, Mapping) or ORIGINAL not in states:
        raise ic.PlanError(ic.errors.wrong("compare: states", f"states by mode, {ORIGINAL!r} among them", states))
    folds = folds or make_folds(labels, groups, donors=donors, n_folds=n_folds, repeats=repeats, seed=seed)
    kinds = questions if types is None else types
    how: dict[str, Any] = {
        "decoder": decoder, "penalties": penalties, "shuffles": shuffles, "types": kinds, "controls": controls,
        "seed": seed,
    }  # fmt: skip
    modes = {mode: decode(values, labels, folds, **how) for mode, values in states.items()}
    words = None if questions is None else decode(bag_of_words(questions), labels, folds, **how)
    collisions = None
    if donor_labels is not None:
        own = [modes[ORIGINAL].classes[number] for number in numbered(labels)[0]]
        collisions = float(np.mean([a == b for a, b in zip(own, plain_list(donor_labels), strict=True)]))
    ceiling = None if kinds is None else seen_types(kinds, folds)
    return Comparison(modes, words, folds, collisions, leaky, ceiling=ceiling)
