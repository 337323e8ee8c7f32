"""Gates and verdicts: what passes, fails, cannot be told, or is missing; the exit code; thresholds hashed beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from interp_plugins.visual import gates
from interp_plugins.visual.curves import Curve, curve
from interp_plugins.visual.depth import Layers
from interp_plugins.visual.gates import Gate, Thresholds
from interp_plugins.visual.horizon import claim

import interp_core as ic
from interp_core import stats

DEMANDS = Thresholds()


def interval(value: float, half: float, units: int = 60) -> stats.Interval:
    return stats.Interval(value, value - half, value + half, half / 2, 0.95, "by hand", "x", units, units)


def planted(n: int = 40, cliff: int = 5, spread: float = 0.1) -> Curve:
    rng = np.random.default_rng(0)
    values = np.where(np.arange(12) < cliff, 2.0, 0.0) + rng.normal(0, spread, (n, 12))
    boot = stats.Bootstrap(resamples=200)
    return curve("replace:blind random", values, Layers(tuple(range(12)), 12), 0.5, blind=values[:, 0], boot=boot)


def every(**other: str) -> list[Gate]:
    """All gates, of the given statuses, else passed."""
    return [
        Gate(name, other.get(name, "pass"), 1.0, 0.5, 1.5, "", "", "")  # type: ignore[arg-type]
        for name in gates.GATES
    ]


@pytest.mark.parametrize(
    ("value", "half", "units", "above", "below"),
    [
        (1.0, 0.5, 60, "pass", "fail"), (-1.0, 0.5, 60, "fail", "pass"), (0.1, 0.5, 60, "inconclusive", "inconclusive"),
        (1.0, 0.5, 10, "inconclusive", "inconclusive"), (0.5, 0.5, 60, "inconclusive", "inconclusive"),
        (-0.5, 0.5, 60, "fail", "pass"),
    ],
)  # fmt: skip
def test_an_interval_passes_fails_or_cannot_tell(value: float, half: float, units: int, above: str, below: str) -> None:
    assert gates.above(interval(value, half, units), 0.0, 30) == above
    assert gates.below(interval(value, half, units), 0.0, 30) == below


def test_sanity_and_image() -> None:
    assert gates.sanity_gate({"a": True, "b": True}).status == "pass"
    broken = gates.sanity_gate({"a": True, "mask = deletion": False})
    assert broken.status == "fail" and "not mask = deletion" in broken.why and broken.number == 0.5
    assert gates.sanity_gate({}).status == "missing"  # nothing checked is no pass
    good, bad, small = interval(0.5, 0.2), interval(-0.5, 0.2), interval(0.5, 0.2, 8)
    for score, blind, wanted in [
        (good, good, "pass"), (good, bad, "fail"), (bad, good, "fail"), (small, good, "inconclusive"),
        (small, bad, "fail"), (interval(0.1, 0.3), good, "inconclusive"),
    ]:  # fmt: skip
        assert gates.image_gate(score, blind, DEMANDS, "abc").status == wanted
    assert gates.image_gate(good, good, DEMANDS, "abc").records == "abc"


def test_cliff() -> None:
    found = planted()
    gate = gates.cliff_gate(found, DEMANDS)
    assert (gate.status, gate.number, gate.low, gate.high) == ("pass", 5.0, 5.0, 5.0)
    assert gates.cliff_gate(planted(cliff=12), DEMANDS).status == "fail"  # no cliff
    assert gates.cliff_gate(planted(cliff=0), DEMANDS).status == "fail"  # nothing to fall from
    assert gates.cliff_gate(planted(10), DEMANDS).status == "inconclusive"
    wide = replace(found, cliff=replace(found.cliff, low=4, high=7))
    assert gates.cliff_gate(wide, DEMANDS).status == "fail" and "3 of 12" in gates.cliff_gate(wide, DEMANDS).why
    assert gates.cliff_gate(wide, Thresholds(width=0.25)).status == "pass"


def test_truncation() -> None:
    rng = np.random.default_rng(0)
    hard, images = [True] * 40 + [False] * 40, [f"i{i}" for i in range(80)]
    drop = np.array([0.3] * 40 + [0.0] * 40) + rng.normal(0, 0.01, 80)
    found = gates.truncation_gate(drop, hard, images, 5, DEMANDS, "abc", resamples=400)
    assert found.status == "pass" and found.number == pytest.approx(0.3, abs=0.01)
    assert gates.truncation_gate(drop[::-1], hard, images, 5, DEMANDS, resamples=400).status == "fail"
    flat = gates.truncation_gate(rng.normal(0, 0.2, 80), hard, images, 5, DEMANDS, resamples=400)
    assert flat.status in ("fail", "inconclusive")
    absent = gates.truncation_gate(None, hard, images, 23, DEMANDS)
    assert absent.status == "missing" and "no layer 23; run it there" in absent.why  # never skipped
    assert gates.truncation_gate(drop, [True] * 80, images, 5, DEMANDS).status == "missing"
    few = gates.truncation_gate(drop[30:50], hard[30:50], images[30:50], 5, DEMANDS, resamples=400)
    assert few.status == "inconclusive"


def test_truncation_passes_where_the_mean_hides_hard_questions_and_fails_where_the_cliff_is_for_all() -> None:
    """What G3 asks: both studies have a cliff at layer 5 of 8, by the mean over easy and hard samples."""
    rng, layers = np.random.default_rng(0), Layers(tuple(range(8)), 8)
    hard = np.arange(90) < 30
    images = [f"i{i}" for i in range(90)]
    for left, status in ((0.5, "pass"), (0.0, "fail")):  # nats that hard questions lose behind the cliff
        delta = np.where(np.arange(8) < 5, 2.0, 0.0) + rng.normal(0, 0.02, (90, 8))
        delta[hard, 5:] += left
        one = curve("replace:blind random", delta, layers, 0.3, blind=delta[:, 0], boot=stats.Bootstrap(resamples=200))
        assert one.cliff.value == 5 and gates.cliff_gate(one, DEMANDS).status == "pass"
        drop = (rng.random(90) < 0.6 * hard * (left > 0)).astype(float)
        assert gates.truncation_gate(drop, hard.tolist(), images, 5, DEMANDS, resamples=400).status == status


def test_a_cliff_needs_ranked_to_beat_random_before_it_alone() -> None:
    layers, rng = Layers(tuple(range(8)), 8), np.random.default_rng(0)
    gains = np.where(np.arange(8) < 5, 0.5, 0)[:, None] + rng.normal(0, 0.05, (40, 8, 3))
    gains[:, 5:] -= gains[:, 5:].mean(0)

    def gate(values: np.ndarray, cliff: int = 5) -> Gate:
        return gates.ranking_gate(claim(values, layers, cliff, resamples=200), DEMANDS, "abc")

    assert gate(gains).status == "pass" and gate(gains).number == pytest.approx(0.5, abs=0.02)
    assert gate(gains, 3).status == "fail"  # ranked is better from there on too
    assert gate(gains * 0).status == "fail"  # no better anywhere
    assert gate(gains[:10]).status == "inconclusive"
    for absent in (gate(gains, 8), gates.ranking_gate(None, DEMANDS)):
        assert absent.status == "missing"


def test_depth_geometry_and_probes() -> None:
    assert gates.depth_gate(interval(0.4, 0.1), DEMANDS).status == "pass"
    assert gates.depth_gate(interval(0.05, 0.1), DEMANDS).status == "inconclusive"
    assert gates.depth_gate(None, DEMANDS).status == "missing"
    ratio = interval(-0.5, 0.1)
    assert gates.geometry_gate(ratio, (-0.2, 0.2), DEMANDS).status == "pass"
    assert gates.geometry_gate(ratio, (-0.6, 0.2), DEMANDS).status == "fail"  # any cut would do
    assert gates.geometry_gate(interval(0.0, 0.1), (-0.2, 0.2), DEMANDS).status == "inconclusive"
    assert gates.geometry_gate(ratio, None, DEMANDS).status == "missing"
    assert gates.probe_gate(interval(0.2, 0.1), True, DEMANDS).status == "pass"
    assert gates.probe_gate(interval(0.2, 0.1), False, DEMANDS).status == "inconclusive"
    assert gates.probe_gate(None, True, DEMANDS).status == "missing"


@pytest.mark.parametrize(
    ("statuses", "verdict", "code"),
    [
        ({}, "FULL", 0), ({"G4": "fail", "G5": "fail"}, "FULL", 0), ({"G3": "fail"}, "PARTIAL", 3),
        ({"G4": "fail", "G5": "fail", "G6": "inconclusive"}, "PARTIAL", 3), ({"G2": "inconclusive"}, "STOP", 4),
        ({"G0": "fail"}, "STOP", 4), ({"G6": "missing"}, "INCOMPLETE", 5), ({"G3": "missing"}, "INCOMPLETE", 5),
        ({"G7": "fail"}, "STOP", 4), ({"G7": "inconclusive"}, "STOP", 4), ({"G7": "missing"}, "INCOMPLETE", 5),
        ({"G1": "missing"}, "INCOMPLETE", 5), ({"G1": "missing", "G2": "fail"}, "STOP", 4),
    ],
)  # fmt: skip
def test_verdicts(statuses: dict[str, str], verdict: str, code: int) -> None:
    found = gates.judge(every(**statuses), DEMANDS)
    assert (found.verdict, found.exit_code) == (verdict, code)
    assert [gate["name"] for gate in found.row()["gates"]] == list(gates.GATES)
    assert f"verdict {verdict}" in str(found)


def test_a_gate_that_was_not_evaluated_is_missing_and_one_not_planned_is_none() -> None:
    found = gates.judge([gate for gate in every() if gate.name != "G6"], DEMANDS)
    assert found.gates[6].status == "missing" and found.verdict == "INCOMPLETE"
    planned = Thresholds(gates=gates.GATES[:6])
    assert gates.judge(every()[:6], planned).verdict == "FULL"
    assert planned.hash != DEMANDS.hash == Thresholds().hash == gates.judge(every(), DEMANDS).thresholds


def test_thresholds_from_a_config() -> None:
    assert Thresholds.of({"images": 8, "gates": ["G0", "G1"]}) == Thresholds(images=8, gates=("G0", "G1"))
    with pytest.raises(ic.PlanError, match="no threshold 'drop_eazy'"):
        Thresholds.of({"drop_eazy": 1})
    with pytest.raises(ic.PlanError, match="no gate 'G8'"):
        Thresholds.of({"gates": ["G8"]})
