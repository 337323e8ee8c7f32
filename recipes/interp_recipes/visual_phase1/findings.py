"""What the records of the recipe `visual_phase1` come to: curves, boundary, drops, ratios.

boundary   that of the first blind mode's replacement, over all further samples; truncation and gates use it
other half the geometry gate asks the ratio at a boundary that was found on other samples: those of every second image
           find it, the others are measured. A boundary that was given comes from other samples anyway
hard, easy of the source's own difficulty where both are there, else thirds of the loss by blinding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from interp_plugins.geometry.ratios import CutRatio, cut_ratio
from interp_plugins.geometry.result import GeometryResult
from interp_plugins.visual import depth
from interp_plugins.visual.curves import Curve, crossing, curve, depth_gap, terciles
from interp_plugins.visual.depth import LayerEstimate, Layers
from interp_plugins.visual.records import BLIND, Effects, Records
from interp_plugins.visual.threshold import Threshold, histogram, noise_floor, threshold
from interp_plugins.visual.truncation import Drops, drops

import interp_core as ic
from interp_core import runs, stats

from ..visual_data import Row
from .plan import Plan
from .samples import REENCODED, Sample

MAIN = "replace:blind"


@dataclass(frozen=True, eq=False)
class Causal:
    """What the causal stage found.

    Attributes:
        records: of pilots and further samples.
        threshold: τ; None where there is no dependence.
        stopped: why the study ends here; empty if it goes on.
        pilots: effects of the main replacement on them.
        floor: noise floor.
        n_layers: of the model.
        curves: by intervention and mode, the main one first.
        dependent: the main one over image-dependent samples; None with fewer than two images of them.
        n_dependent: how many samples are.
        crossing: of text and visual rows; None where text rows were not replaced.
        gap: EVD of hard minus easy samples; None without both.
        evds: mean EVD of each kind.
        hard, easy: which further samples are, by name; `kinds` says by what.
        cliff: the boundary that is passed on; None: there is none inside the model.
        other: that of every second image, and the samples of the others, on which it is used.
        skipped: samples that the model did not run.
    """

    records: Records
    threshold: Threshold | None
    stopped: str
    pilots: Effects
    floor: float
    n_layers: int
    curves: Mapping[str, Curve] = field(default_factory=dict)
    dependent: Curve | None = None
    n_dependent: int = 0
    crossing: LayerEstimate | None = None
    gap: stats.Interval | None = None
    evds: Mapping[str, stats.Interval] = field(default_factory=dict)
    hard: tuple[str, ...] = ()
    easy: tuple[str, ...] = ()
    kinds: str = ""
    cliff: int | None = None
    other: tuple[int | None, tuple[str, ...]] = (None, ())
    skipped: tuple[Row, ...] = ()

    @staticmethod
    def of_pilots(records: Records, plan: Plan, n_layers: int, skipped: Sequence[Row]) -> Causal:
        """τ, or why there is none."""
        main = records.effects(MAIN, plan.blind[0], pilot=True)
        floor = 0.0
        if plan.null_image == "jpeg":
            floor = noise_floor(records.effects("replace:swap", REENCODED, pilot=True).values)
        tau, why = None, ""
        try:
            tau = threshold(
                main.values, blind=records.blind(main, plan.blind[0]), tau=plan.tau, adaptive=plan.adaptive_tau,
                ratio=plan.tau_ratio, floor=floor, boot=main.boot(plan.resamples, plan.seed),
            )  # fmt: skip
        except ic.EffectError as error:
            why = str(error)
        return Causal(records, tau, why, main, floor, n_layers, skipped=tuple(skipped))

    def with_samples(
        self, records: Records, plan: Plan, difficulty: Mapping[str, str | None], skipped: Sequence[Row]
    ) -> Causal:
        """Curves of the further samples, and the boundary."""
        assert self.threshold is not None
        mode, tau = plan.blind[0], self.threshold.tau
        main = records.effects(MAIN, mode)
        boot = main.boot(plan.resamples, plan.seed)
        curves = {}
        for name, blind_mode in [(MAIN, mode), *(pair for pair in records.interventions if pair != (MAIN, mode))]:
            if name == BLIND or (name, blind_mode) == ("replace:swap", REENCODED):
                continue
            effects = records.effects(name, blind_mode)
            blind = records.blind(effects, blind_mode if name == MAIN else mode)
            curves[effects.name] = curve(effects.name, effects.values, effects.layers, tau, blind=blind, boot=boot)
        first = curves[main.name]
        # text rows are where the answer goes on once the image is done with: their effect rises as the cliff's falls
        text = next((records.effects(*pair) for pair in records.interventions if pair == ("text:blind", mode)), None)
        hard, easy, kinds = _kinds(main, records.blind(main, mode), difficulty)
        cliff = plan.cliff_boundary if plan.cliff_boundary is not None else _inside(first.cliff.value, self.n_layers)
        dependent, count = _dependent(records, main, mode, tau, plan)
        gap, evds = _evds(main, first, hard, easy, plan)
        return replace(
            self, records=records, curves=curves, dependent=dependent, n_dependent=count,
            crossing=None if text is None else crossing(main.values, text.values, main.layers, boot),
            gap=gap, evds=evds, hard=hard, easy=easy, kinds=kinds, cliff=cliff,
            other=_other_half(main, tau, plan), skipped=tuple(skipped),
        )  # fmt: skip

    @property
    def main(self) -> Curve:
        """The curve of the cliff."""
        return next(iter(self.curves.values()))

    @property
    def blind(self) -> str:
        """Which blind image the main replacement is of."""
        return self.pilots.name.removeprefix(MAIN).strip()

    @property
    def samples(self) -> tuple[str, ...]:
        """Further samples with records."""
        return tuple(dict.fromkeys(row["sample"] for row in self.records.rows if not row["pilot"]))

    def header(self) -> Row:
        """What later stages say of where their boundary is from."""
        return {"cliff_boundary": self.cliff, "causal_record": self.records.hash}

    def row(self) -> Row:
        """As JSON."""
        base: Row = {
            "records": self.records.hash, "stopped": self.stopped, "noise_floor": self.floor,
            "threshold": None if self.threshold is None else self.threshold.row(),
            "pilots": {"samples": list(self.pilots.samples), "mean": self.pilots.values.mean(0).tolist(),
                       "layers": list(self.pilots.layers.numbers), "histogram": histogram(self.pilots.values)},
            "skipped": list(self.skipped),
        }  # fmt: skip
        if self.stopped:
            return base
        return base | {
            "samples": list(self.samples),
            "curves": {name: curve.row() | {"layers": curve.table()} for name, curve in self.curves.items()},
            "image_dependent": {"n": self.n_dependent, "of": len(self.samples),
                                "curve": None if self.dependent is None else self.dependent.row()},
            "crossing": None if self.crossing is None else self.crossing.row(),
            "evd_gap": None if self.gap is None else self.gap.row(),
            "evd_by_difficulty": {name: interval.row() for name, interval in self.evds.items()},
            "hard": list(self.hard), "easy": list(self.easy), "difficulty_from": self.kinds,
            "cliff_of_other_half": self.other[0], "other_half": list(self.other[1]),
        }  # fmt: skip

    def sentences(self) -> list[str]:
        """What came out."""
        if self.stopped:
            return [self.stopped + "."]
        main, tau = self.main, self.threshold
        assert tau is not None
        said = [f"{tau}."]
        if tau.tau < self.floor:
            said.append(f"τ lies below the noise floor of {self.floor:.3g} nats: what is between them may be noise.")
        if main.no_cliff:
            said.append(f"There is no cliff: {main.name} takes {main.mean.value[-1]:.3g} nats at the last layer.")
        elif main.cliff.value == main.layers.numbers[0]:
            said.append(f"{main.name} has no effect of τ or more at any layer.")
        else:
            said.append(
                f"From layer {main.cliff.value} on, of {self.n_layers}, {main.name} takes less than τ on average (95 % "
                f"of resamples: {main.cliff.low} to {main.cliff.high}; n = {main.mean.n} in {main.mean.units} images)."
            )
        if main.soft is not None:
            said.append(f"Soft depth is {main.soft:.3f} of the layers.")
        if self.gap is not None:
            tells = "which tells them apart" if self.gap.excludes(0) else "which does not tell them apart"
            said.append(f"EVD of hard minus easy samples ({self.kinds}) is {self.gap:+.2f} layers, {tells}.")
        said.append(f"{self.n_dependent} of {len(self.samples)} samples are right with the image and wrong with the "
                    f"{self.blind} one.")  # fmt: skip
        return [*said, *(f"{note[0].upper()}{note[1:]}." for note in main.notes)]

    def shown_sample(self, names: Sequence[str]) -> str:
        """The sample whose image is shown: of those that were run, the one that loses most by blinding."""
        rows = [row for row in self.records.rows if row["intervention"] == BLIND and row["sample"] in set(names)]
        shown = [row for row in rows if not row["pilot"]] or rows
        return str(max(shown, key=lambda row: (row["clean_right"], row["delta"]))["sample"])


def _inside(cliff: int, n_layers: int) -> int | None:
    return cliff if 0 < cliff < n_layers else None


def _dependent(records: Records, main: Effects, mode: str, tau: float, plan: Plan) -> tuple[Curve | None, int]:
    names = records.image_dependent(mode) & set(main.samples)
    images = {image for sample, image in zip(main.samples, main.images, strict=True) if sample in names}
    if len(images) < 2:
        return None, len(names)
    effects = records.effects(MAIN, mode, where=lambda row: row["sample"] in names)
    blind = records.blind(effects, mode)
    boot = effects.boot(plan.resamples, plan.seed)
    return curve("image-dependent samples", effects.values, effects.layers, tau, blind=blind, boot=boot), len(names)


def _kinds(
    main: Effects, blind: np.ndarray, difficulty: Mapping[str, str | None]
) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Hard and easy samples, and by what."""
    said = {word: tuple(name for name in main.samples if difficulty.get(name) == word) for word in ("hard", "easy")}
    if said["hard"] and said["easy"]:
        return said["hard"], said["easy"], "as the data set says"
    # with many equal effects a sample can lie in the upper and the lower third; it is of neither
    hard, easy = terciles(blind)
    both = hard & easy
    names = np.array(main.samples)
    thirds = [tuple(map(str, names[part & ~both])) for part in (hard, easy)]
    return thirds[0], thirds[1], "thirds by what blinding takes"


def _by_kind(
    samples: Sequence[str], images: Sequence[str], hard: Sequence[str], easy: Sequence[str]
) -> dict[str, tuple[list[int], list[str]]]:
    """Which samples are of each kind, and their images; of a kind with two images or more."""
    by_kind = {}
    for kind, names in (("hard", set(hard)), ("easy", set(easy))):
        chosen = [i for i, name in enumerate(samples) if name in names]
        labels = [images[i] for i in chosen]
        if len(set(labels)) > 1:
            by_kind[kind] = chosen, labels
    return by_kind


def _evds(
    main: Effects, cliff_curve: Curve, hard: Sequence[str], easy: Sequence[str], plan: Plan
) -> tuple[stats.Interval | None, dict[str, stats.Interval]]:
    """EVD of hard minus easy samples, and the mean EVD of each."""
    by_kind = _by_kind(main.samples, main.images, hard, easy)
    depths = {kind: cliff_curve.depths[chosen] for kind, (chosen, _) in by_kind.items()}
    evds = {
        kind: plan.boot(labels).mean(depths[kind].astype(float), name=f"EVD of {kind} samples")
        for kind, (_, labels) in by_kind.items()
    }
    if len(evds) < 2:
        return None, evds
    clusters = (by_kind["hard"][1], by_kind["easy"][1])
    gap = depth_gap(depths["hard"], depths["easy"], clusters=clusters, resamples=plan.resamples, seed=plan.seed)
    return gap, evds


def _other_half(main: Effects, tau: float, plan: Plan) -> tuple[int | None, tuple[str, ...]]:
    """A boundary, and samples that it does not come from."""
    if plan.cliff_boundary is not None:
        return plan.cliff_boundary, main.samples
    # by images, not by samples: questions about one image would put it on both sides
    order = {image: number for number, image in enumerate(dict.fromkeys(main.images))}
    finds = np.array([order[image] % 2 == 0 for image in main.images])
    if finds.all():
        return None, ()
    cliff = int(main.layers.at(depth.falls_below(main.values[finds].mean(0), tau)))
    names = tuple(name for name, used in zip(main.samples, finds, strict=True) if not used)
    return _inside(cliff, main.layers.count), names


@dataclass(frozen=True, eq=False)
class Truncation:
    """Answers without the image.

    Attributes:
        drops: over the grid without L; None where nothing was run.
        samples, images: of its rows.
        clean, random: scores with the image and with a random one.
        unparsable: texts that could not be read, by layer ("random image" too).
        skipped: samples that the model did not run at some layer.
        records: hash of the answers.
        texts: of the clean answers, by sample.
        kinds: what hard and easy samples lose, over the grid; those of two or more images.
        bands: what is lost with the image gone from some layers alone, by their first and the one behind the last.
    """

    drops: Drops | None
    samples: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    clean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    random: np.ndarray = field(default_factory=lambda: np.zeros(0))
    unparsable: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[Row, ...] = ()
    records: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, stats.Band] = field(default_factory=dict)
    bands: Mapping[tuple[int, int], stats.Interval] = field(default_factory=dict)

    @staticmethod
    def of(
        rows: Sequence[Row], grid: Sequence[int], samples: Sequence[Sample], n_layers: int, plan: Plan, cause: Causal
    ) -> Truncation:
        """From the rows of answers."""
        bad = [row for row in rows if "failed" in row]
        out = {row["sample"] for row in bad}
        kept = [sample for sample in samples if sample.name not in out]
        if len({sample.image for sample in kept}) < 2:
            first = f"; the first: {bad[0]['failed']}" if bad else ""
            raise ic.PlanError(f"{len(kept)} of {len(samples)} samples are answered, of fewer than two images{first}")
        # a row with `stop` has the image gone in a band alone; one without, from its layer on (None: a random image)
        cells = {(row["sample"], row["layer"]): row for row in rows if not row.get("stop")}
        parts = {(row["sample"], row["layer"], row["stop"]): row for row in rows if row.get("stop")}
        names = [sample.name for sample in kept]
        before = [layer for layer in grid if layer < n_layers]
        scores = np.array([[cells[name, layer]["score"] for layer in before] for name in names])
        clean = np.array([cells[name, n_layers]["score"] for name in names])
        images = tuple(sample.image for sample in kept)
        boot = plan.boot(images)
        lost = drops(scores, clean, Layers(tuple(before), n_layers), margin=plan.thresholds.drop_easy, boot=boot)
        unread: dict[str, int] = {}
        for (_, layer), row in cells.items():
            key = "random image" if layer is None else str(layer)
            unread[key] = unread.get(key, 0) + bool(row.get("problem"))
        bands = {
            (start, stop): boot.mean(
                clean - np.array([parts[name, start, stop]["score"] for name in names]), name=f"drop, {start} to {stop}"
            )
            for start, stop in plan.bands(n_layers)
        }
        kinds = {
            kind: plan.boot(labels).band(lost.per_sample[chosen], axes=("layer",), name=f"drop of {kind} samples")
            for kind, (chosen, labels) in _by_kind(names, images, cause.hard, cause.easy).items()
        }
        return Truncation(
            lost, tuple(names), images, clean, np.array([cells[name, None]["score"] for name in names]), unread,
            tuple({"sample": row["sample"], "where": row["cell"], "reason": row["failed"]} for row in bad),
            runs.digest(sorted((row["cell"], row.get("text", "")) for row in rows))[:16],
            {name: str(cells[name, n_layers]["text"]) for name in names}, kinds, bands,
        )  # fmt: skip

    def row(self) -> Row:
        """As JSON."""
        assert self.drops is not None
        return {
            "status": "run", "records": self.records, "n": len(self.samples), "score": float(self.clean.mean()),
            "score_random_image": float(self.random.mean()), "margin": self.drops.margin, "enough": self.drops.enough,
            "for_good": self.drops.for_good, "n_layers": self.drops.layers.count, "layers": self.drops.table(),
            "kinds": {name: band.table() for name, band in self.kinds.items()},
            "bands": [{"from": a, "before": b} | drop.row() for (a, b), drop in self.bands.items()],
            "unparsable": dict(self.unparsable), "skipped": list(self.skipped),
        }  # fmt: skip

    def sentences(self) -> list[str]:
        """What came out."""
        if self.drops is None:
            return []
        unread = sum(self.unparsable.values())
        return [
            f"Answers score {self.clean.mean():.3f} with the image and {self.random.mean():.3f} with a random one "
            f"(n = {len(self.samples)}; {unread} texts of all layers could not be read and score 0).",
            f"In the answers, {self.drops}.",
            *self._of_bands(),
        ]

    def _of_bands(self) -> list[str]:
        if not self.bands:
            return []
        (start, stop), most = max(self.bands.items(), key=lambda item: item[1].value)
        return [f"Gone from layers {start} to {stop - 1} alone the image is missed most: {most:.3f} of the score."]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Geometry of the further samples.

    Attributes:
        result: of the method; None where nothing was run.
        ratio: of visual rows at the boundary from other samples; None where there is none.
        text: the same of text rows.
        why: why there is no ratio.
        skipped: samples that the model did not run.
    """

    result: GeometryResult | None
    ratio: CutRatio | None = None
    text: CutRatio | None = None
    why: str = ""
    skipped: tuple[Row, ...] = ()

    @staticmethod
    def of(result: GeometryResult, noted: Row, cause: Causal, plan: Plan) -> Geometry:
        """Ratios at the boundary of the other half."""
        cut, names = cause.other
        chosen = np.array([name in set(names) for name in noted["samples"]])
        ratios: list[CutRatio | None] = []
        why = "" if cut is not None else "the other half of the samples has no boundary inside the model"
        for group in result.groups[:2]:
            ranks = result.per_sample("effective_rank", group)
            good = chosen & np.isfinite(ranks).all(1) & (ranks > 0).all(1)
            labels = [result.clusters[i] for i in np.flatnonzero(good)]
            if cut is None or len(set(labels)) < 2:
                ratios.append(None)
                why = why or f"{int(good.sum())} samples of the other half have effective ranks at every layer"
                continue
            ratios.append(cut_ratio(ranks[good], cut, plan.boot(labels)))
        return Geometry(result, ratios[0], ratios[1] if len(ratios) > 1 else None, why, tuple(noted["skipped"]))

    def row(self) -> Row:
        """As JSON."""
        assert self.result is not None
        return {
            "status": "run", "why": self.why, "er_ratio": None if self.ratio is None else self.ratio.row(),
            "er_ratio_text": None if self.text is None else self.text.row(),
            "n": len(self.result.rows), "groups": list(self.result.groups), "layers": self.result.table(),
            "sinks": sum(map(len, self.result.sinks)), "skipped": list(self.skipped),
        }  # fmt: skip

    def sentences(self) -> list[str]:
        """What came out."""
        if self.result is None:
            return []
        if self.ratio is None:
            return [f"There is no ratio of effective ranks: {self.why}."]
        tells = "stands out of" if self.ratio.stands_out else "does not stand out of"
        return [f"The visual rows' {self.ratio}, which {tells} what other cuts give; the cut comes from other samples."]
