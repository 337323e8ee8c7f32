"""The gates of the recipe `visual_phase1`, from what its stages found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from interp_plugins.visual import depth, gates
from interp_plugins.visual.gates import Gate
from interp_plugins.visual.records import Effects

import interp_core as ic
from interp_core import stats

from .findings import MAIN, Causal, Geometry, Truncation
from .horizon import Removals
from .plan import Plan


def gate_rows(causal: Causal, truncation: Truncation, geometry: Geometry, removals: Removals, plan: Plan) -> list[Gate]:
    """G1 to G5, and G7."""
    demands = plan.thresholds
    if causal.stopped or truncation.drops is None:
        why = f"no visual dependence measurable, {causal.records.hash}"
        low = None if causal.threshold is None else causal.threshold.blind_low
        fail = Gate("G1", "fail", None, low, None, "lower ends > 0", causal.records.hash, causal.stopped)
        return [fail, *(gates.missing(name, f"not run: {why}") for name in demands.gates[2:])]
    boot = plan.boot(truncation.images)
    effects = causal.records.effects(MAIN, plan.blind[0])
    whole = causal.records.blind(effects, plan.blind[0])
    gap = boot.mean(truncation.clean - truncation.random, name="score with the image minus with a random one")
    blind = effects.boot(plan.resamples, plan.seed).mean(whole, name="effect of blinding")
    return [
        gates.image_gate(gap, blind, demands, truncation.records),
        gates.cliff_gate(causal.main, demands, causal.records.hash),
        _truncation_gate(causal, truncation, plan),
        _depth_gate(causal, truncation, effects, whole, plan),
        _geometry_gate(geometry, plan, causal),
        *([_ranking_gate(removals, plan)] if "G7" in demands.gates else []),
    ]


def _truncation_gate(causal: Causal, truncation: Truncation, plan: Plan) -> Gate:
    assert truncation.drops is not None
    if causal.cliff is None:
        return gates.missing("G3", "there is no cliff inside the model to truncate at")
    lost, kinds = truncation.drops, {*causal.hard, *causal.easy}
    named = [i for i, name in enumerate(truncation.samples) if name in kinds]

    def at(layer: int) -> Gate:
        values = lost.at(layer)
        return gates.truncation_gate(
            None if values is None else values[named], [truncation.samples[i] in set(causal.hard) for i in named],
            [truncation.images[i] for i in named], layer, plan.thresholds, truncation.records, resamples=plan.resamples,
            seed=plan.seed,
        )  # fmt: skip

    gate = at(causal.cliff)
    if gate.status != "fail":
        return gate
    elsewhere = [str(layer) for layer in lost.layers.numbers if at(layer).status == "pass"]
    where = f"layer {', '.join(elsewhere)}" if elsewhere else "no layer of the grid"
    return replace(gate, why=f"{gate.why}; all three demands hold at {where}")


def _depth_gate(causal: Causal, truncation: Truncation, effects: Effects, whole: np.ndarray, plan: Plan) -> Gate:
    """Soft depth of the samples that lose anything by blinding, with their scores."""
    place = {name: i for i, name in enumerate(effects.samples)}
    assert causal.threshold is not None
    used = [
        i for i, name in enumerate(truncation.samples) if name in place and whole[place[name]] > causal.threshold.tau
    ]
    rows = [place[truncation.samples[i]] for i in used]
    scores, images = truncation.clean[used], [truncation.images[i] for i in used]
    if len(set(images)) < 3 or len(set(scores.tolist())) < 2:
        said = f"all score {scores[0]:g}" if len(set(scores.tolist())) == 1 else f"{len(set(images))} images"
        why = f"no correlation of depth and score: {said} ({len(used)} samples that lose τ or more by blinding)"
        return Gate("G4", "inconclusive", None, None, None, "the interval excludes 0", causal.records.hash, why)
    soft = depth.soft_depth(effects.values[rows] / whole[rows][:, None])
    try:
        rho = plan.boot(images).of(stats.spearman, soft, scores, name="Spearman's ρ")
    except ic.InterpError as error:
        why = f"no interval: {error}"
        return Gate("G4", "inconclusive", None, None, None, "the interval excludes 0", causal.records.hash, why)
    return gates.depth_gate(rho, plan.thresholds, causal.records.hash)


def _geometry_gate(geometry: Geometry, plan: Plan, causal: Causal) -> Gate:
    if geometry.ratio is None:
        return gates.missing("G5", geometry.why)
    half = plan.cliff_boundary is None  # half of the images find the boundary, the others are measured
    demands = replace(plan.thresholds, images=max(1, plan.thresholds.images // 2)) if half else plan.thresholds
    return gates.geometry_gate(
        geometry.ratio.log, (geometry.ratio.low, geometry.ratio.high), demands, causal.records.hash
    )


def _ranking_gate(removals: Removals, plan: Plan) -> Gate:
    """Whether a cliff may be claimed, by generated answers."""
    gate = gates.ranking_gate(removals.claims.get("generated"), plan.thresholds, removals.records)
    return replace(gate, why=removals.why or gate.why) if gate.status == "missing" else gate
