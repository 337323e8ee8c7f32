"""Gates G0 to G7 and the verdict: each number against a threshold that was written down, and hashed, before the run.

    G0 sanity      every check of the battery holds
    G1 image       score(original) - score(random) > 0 and Δ̄(blind) > 0, by the lower ends of their intervals
    G2 cliff       E(0) ≥ 0.9, or Δ̄(0)'s lower end above τ; c < L; c's interval no wider than L / 6
    G3 truncation  at c: upper end of Drop_easy ≤ δ_easy, lower ends of Drop_hard > δ_hard and of their difference > 0
    G4 depth       Spearman's ρ of a sample's soft depth and its score: its interval excludes 0
    G5 geometry    the interval of mean ln ρ_ER excludes 0, and the mean lies outside the band of random cuts
    G6 probes      lower end of the gain over the blind image > 0, and the nulls are valid
    G7 ranking     keeping the best-ranked visual tokens beats as many random ones below c, and does not from c on
    verdict        FULL: G0 to G3, G7 and one of G4 to G6;  PARTIAL: G0 to G2, G7;  else STOP;  any missing: INCOMPLETE
                   at best. G7 counts as G2 does, since a cliff is claimed only where it holds

pass: it holds. inconclusive: the study is too small to tell (fewer images than `images`, or an interval that includes
the threshold). fail: the interval lies on the other side. missing: there are no numbers. A gate is never skipped.

Source: specification of this project. Cost: arithmetic. Must equal: tables by hand (tests/test_visual_gates.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

import interp_core as ic
from interp_core import runs, stats

from .curves import Curve
from .horizon import Claim

Status = Literal["pass", "fail", "inconclusive", "missing"]
Verdict = Literal["FULL", "PARTIAL", "STOP", "INCOMPLETE"]
GATES = ("G0", "G1", "G2", "G3", "G4", "G5", "G6", "G7")
EXIT: Mapping[Verdict, int] = {"FULL": 0, "PARTIAL": 3, "STOP": 4, "INCOMPLETE": 5}
"""Exit codes; 1 and 2 are those of errors."""


@dataclass(frozen=True)
class Thresholds:
    """What gates demand; hashed before anything runs.

    Attributes:
        images: independent images below which nothing passes or fails.
        share_at_start: E(0) of G2.
        width: c's interval may be at most this share of all layers wide.
        drop_easy: δ_easy, the most that truncation at c may take from easy questions.
        drop_hard: δ_hard, what it must take from hard ones.
        gates: of this study; phase 1 has no probes, so that G6 is none of its gates rather than missing.
    """

    images: int = 30
    share_at_start: float = 0.9
    width: float = 1 / 6
    drop_easy: float = 0.01
    drop_hard: float = 0.05
    gates: tuple[str, ...] = GATES

    @property
    def hash(self) -> str:
        """Sixteen digits of these numbers."""
        return runs.digest(asdict(self))[:16]

    @staticmethod
    def of(values: Mapping[str, Any]) -> Thresholds:
        """From a config block.

        Raises:
            PlanError: a threshold that there is not.
        """
        names = [field.name for field in fields(Thresholds)]
        for name in values:
            if name not in names:
                raise ic.PlanError(f"no threshold {name!r}. {ic.errors.nearest(name, names)}")
        for name in (gates := tuple(values.get("gates", GATES))):
            if name not in GATES:
                raise ic.PlanError(f"no gate {name!r}. {ic.errors.nearest(name, GATES)}")
        return Thresholds(**{**values, "gates": gates})


@dataclass(frozen=True)
class Gate:
    """What one gate says.

    Attributes:
        name: "G0" to "G7".
        status: pass, fail, inconclusive or missing.
        number, low, high: what was measured, and its interval; None where there is none.
        threshold: in words.
        records: hash of the records that it came from.
        why: in words.
    """

    name: str
    status: Status
    number: float | None
    low: float | None
    high: float | None
    threshold: str
    records: str
    why: str

    def row(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """All gates and what they come to."""

    gates: tuple[Gate, ...]
    verdict: Verdict
    thresholds: str

    @property
    def exit_code(self) -> int:
        """Of a command that ends with this verdict."""
        return EXIT[self.verdict]

    def row(self) -> dict[str, Any]:
        """As JSON."""
        gates = [gate.row() for gate in self.gates]
        return {"verdict": self.verdict, "exit_code": self.exit_code, "thresholds": self.thresholds, "gates": gates}

    def __str__(self) -> str:
        lines = [f"{gate.name}  {gate.status:<12} {gate.why}" for gate in self.gates]
        return "\n".join([*lines, f"verdict {self.verdict} (thresholds {self.thresholds})"])


def above(interval: stats.Interval, threshold: float, images: int) -> Status:
    """Whether a true value lies above a threshold, as far as the study can tell."""
    if interval.units < images:
        return "inconclusive"
    if interval.low > threshold:
        return "pass"
    return "fail" if interval.high <= threshold else "inconclusive"


def below(interval: stats.Interval, threshold: float, images: int) -> Status:
    """Whether a true value lies at or below a threshold, as far as the study can tell (non-inferiority)."""
    if interval.units < images:
        return "inconclusive"
    if interval.high <= threshold:
        return "pass"
    return "fail" if interval.low > threshold else "inconclusive"


def worst(*statuses: Status) -> Status:
    """Of several demands that must all hold."""
    # missing first: a demand without numbers is not known to hold, whatever the others say
    order: tuple[Status, ...] = ("missing", "fail", "inconclusive", "pass")
    return min(statuses, key=order.index)


def missing(name: str, why: str, threshold: str = "") -> Gate:
    """A gate without numbers."""
    return Gate(name, "missing", None, None, None, threshold, "", why)


def sanity_gate(checks: Mapping[str, bool], records: str = "") -> Gate:
    """G0, from the battery's checks by name."""
    if not checks:
        return missing("G0", "no check was made", "every check holds")
    failed = [name for name, holds in checks.items() if not holds]
    why = f"{len(checks) - len(failed)} of {len(checks)} checks hold" + (f"; not {', '.join(failed)}" if failed else "")
    share = 1 - len(failed) / len(checks)
    return Gate("G0", "fail" if failed else "pass", share, None, None, "every check holds", records, why)


def image_gate(score: stats.Interval, blind: stats.Interval, thresholds: Thresholds, records: str = "") -> Gate:
    """G1.

    Args:
        score: original minus random image, paired, of what the model answers.
        blind: mean Δ of replacing the whole image.
    """
    status = worst(*(above(interval, 0.0, thresholds.images) for interval in (score, blind)))
    seen = f"{score.detectable:.3f} of the score would be seen"
    why = f"the image is worth {score:.3f} of the score and {blind:.3f} nats; {score.units} images, {seen}"
    return Gate("G1", status, score.value, score.low, score.high, "lower ends > 0", records, why)


def cliff_gate(curve: Curve, thresholds: Thresholds, records: str = "") -> Gate:
    """G2."""
    layers, cliff = curve.layers, curve.cliff
    demand = (
        f"E(0) ≥ {thresholds.share_at_start:g} or Δ̄(0) > τ; cliff below {layers.count}, interval ≤ "
        f"{thresholds.width:.3g} of the layers wide"
    )
    share = None if curve.share is None or layers.numbers[0] != 0 else float(curve.share.value[0])
    starts = (share is not None and share >= thresholds.share_at_start) or float(curve.mean.low[0]) > curve.tau
    holds = {
        f"E(0) is {'unknown' if share is None else format(share, '.2f')}": starts,
        f"cliff {cliff}": 0 < cliff.value < layers.count,
        f"interval {cliff.width} of {layers.count} layers wide": cliff.width <= thresholds.width * layers.count,
    }
    status: Status = "pass" if all(holds.values()) else "fail"
    if curve.mean.units < thresholds.images:
        status = "inconclusive"
    why = "; ".join(text if ok else f"{text} (not as demanded)" for text, ok in holds.items())
    return Gate("G2", status, float(cliff.value), float(cliff.low), float(cliff.high), demand, records, why)


def truncation_gate(
    drop: Float[np.ndarray, " sample"] | None,
    hard: Sequence[bool],
    images: Sequence[str],
    cliff: int,
    thresholds: Thresholds,
    records: str = "",
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Gate:
    """G3.

    Args:
        drop: each sample's score(L) - score(c); None where layer c was not run.
        hard: which samples are hard; all others are easy.
        images: of the samples.
        cliff: c.
    """
    demand = f"Drop_easy ≤ {thresholds.drop_easy:g}, Drop_hard > {thresholds.drop_hard:g}, their difference > 0"
    if drop is None:
        return missing("G3", f"truncation has no layer {cliff}; run it there", demand)
    mask, labels = np.asarray(hard, dtype=bool), np.asarray(images)
    if mask.all() or not mask.any():
        return missing(
            "G3", f"all {len(mask)} samples are {'hard' if mask.any() else 'easy'}; both kinds are needed", demand
        )
    values = np.asarray(drop, dtype=np.float64)
    pooled = {name: mask if name == "hard" else ~mask for name in ("easy", "hard")}
    if few := [name for name, chosen in pooled.items() if len(set(labels[chosen])) < 2]:
        return missing("G3", f"the {few[0]} samples are of one image; two or more are needed", demand)
    of = {
        name: stats.Bootstrap(labels[chosen], resamples=resamples, seed=seed).mean(values[chosen], name=name)
        for name, chosen in pooled.items()
    }
    both = stats.Bootstrap(labels, resamples=resamples, seed=seed).of(
        lambda x, h: x[h > 0].mean() - x[h == 0].mean() if 0 < h.sum() < len(h) else np.nan, values, mask.astype(float)
    )
    half = max(1, thresholds.images // 2)  # each kind is a part of the images
    status = worst(
        below(of["easy"], thresholds.drop_easy, half), above(of["hard"], thresholds.drop_hard, half),
        above(both, 0.0, thresholds.images),
    )  # fmt: skip
    why = f"at layer {cliff}: easy lose {of['easy']:.3f}, hard {of['hard']:.3f}, difference {both:.3f}"
    return Gate("G3", status, both.value, both.low, both.high, demand, records, why)


def depth_gate(rho: stats.Interval | None, thresholds: Thresholds, records: str = "") -> Gate:
    """G4, of Spearman's correlation."""
    demand = "the interval excludes 0"
    if rho is None:
        return missing("G4", "no correlation of depth and score", demand)
    small = rho.units < thresholds.images
    # never "fail": an interval that holds 0 does not show that there is no correlation
    status: Status = "pass" if rho.excludes(0.0) and not small else "inconclusive"
    return Gate("G4", status, rho.value, rho.low, rho.high, demand, records, f"ρ of depth and score {rho:.3f}")


def geometry_gate(
    log_ratio: stats.Interval | None, cuts: tuple[float, float] | None, thresholds: Thresholds, records: str = ""
) -> Gate:
    """G5.

    Args:
        log_ratio: mean ln ρ_ER at c.
        cuts: band of the same at random cut points.
    """
    demand = "the interval excludes 0, the mean lies outside the band of random cuts"
    if log_ratio is None or cuts is None:
        return missing("G5", "no ER ratio" if log_ratio is None else "no band of random cuts", demand)
    outside = not cuts[0] <= log_ratio.value <= cuts[1]
    status: Status = (
        "pass" if log_ratio.excludes(0.0) and outside else "fail" if log_ratio.excludes(0.0) else "inconclusive"
    )
    if log_ratio.units < thresholds.images:
        status = "inconclusive"
    side = "outside" if outside else "inside"
    why = f"mean ln ρ_ER {log_ratio:.3f}, {side} the random cuts' {cuts[0]:.3f} to {cuts[1]:.3f}"
    return Gate("G5", status, log_ratio.value, log_ratio.low, log_ratio.high, demand, records, why)


def probe_gate(gain: stats.Interval | None, nulls: bool, thresholds: Thresholds, records: str = "") -> Gate:
    """G6.

    Args:
        gain: of the probe over the blind image.
        nulls: whether shuffled labels, control task and question-only baseline are there and valid.
    """
    demand = "lower end > 0, nulls valid"
    if gain is None:
        return missing("G6", "no probes", demand)
    status = above(gain, 0.0, thresholds.images) if nulls else "inconclusive"
    why = f"gain over the blind image {gain:.3f}" + ("" if nulls else "; its nulls are not valid")
    return Gate("G6", status, gain.value, gain.low, gain.high, demand, records, why)


def ranking_gate(claim: Claim | None, thresholds: Thresholds, records: str = "") -> Gate:
    """G7, of ranked minus random subsets of the same size, pooled over the shares kept."""
    demand = "ranked - random: lower end > 0 below the cliff, and no better than random from it on"
    if claim is None or claim.before is None or claim.after is None:
        return missing("G7", "no subsets" if claim is None else "no layers on both sides of the cliff", demand)
    before, after = claim.before, claim.after
    later: Status = "pass" if claim.no_better else "fail" if after.low > claim.margin else "inconclusive"
    if after.units < thresholds.images:
        later = "inconclusive"
    status = worst(above(before, 0.0, thresholds.images), later)
    why = f"ranked - random {before:.3f} nats below layer {claim.cliff}, {after:.4f} from it on, {before.units} images"
    return Gate("G7", status, before.value, before.low, before.high, demand, records, why)


def judge(gates: Sequence[Gate], thresholds: Thresholds) -> Judgement:
    """The verdict. Gates of the study that were not given count as missing; where all that a verdict lacks is missing,
    it is INCOMPLETE, not STOP."""
    by_name = {gate.name: gate for gate in gates}
    every = tuple(by_name.get(name) or missing(name, "it was not evaluated") for name in thresholds.gates)
    passed = {gate.name for gate in every if gate.status == "pass"}
    lacking = {gate.name for gate in every if gate.status == "missing"}
    needed = {"G0", "G1", "G2"} | ({"G7"} & set(thresholds.gates))
    verdict: Verdict = "STOP"
    # none of the needed gates was looked at and found wanting
    if needed <= passed | lacking:
        verdict = "FULL" if "G3" in passed and passed & {"G4", "G5", "G6"} else "PARTIAL"
        verdict = "INCOMPLETE" if lacking or not needed <= passed else verdict
    return Judgement(every, verdict, thresholds.hash)
