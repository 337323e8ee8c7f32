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


def gate_rows(cause: Causal, cut: Truncation, shape: Geometry, gone: Removals, plan: Plan) -> list[Gate]:
    """G1 to G5, and G7."""
    demands = plan.thresholds
    if cause.stopped or cut.drops is None:
        why = f"no visual dependence measurable, {cause.records.hash}"
        low = None if cause.threshold is None else cause.threshold.blind_low
        fail = Gate("G1", "fail", None, low, None, "lower ends > 0", cause.records.hash, cause.stopped)
        return [fail, *(gates.missing(name, f"not run: {why}") for name in demands.gates[2:])]
    boot = cut.boot(plan)
    effects = cause.records.effects(MAIN, plan.blind[0])
    whole = cause.records.blind(effects, plan.blind[0])
    gap = boot.mean(cut.clean - cut.random, name="score with the image minus with a random one")
    blind = effects.boot(plan.resamples, plan.seed).mean(whole, name="effect of blinding")
    return [
        gates.image_gate(gap, blind, demands, cut.records),
        gates.cliff_gate(cause.main, demands, cause.records.hash),
        _truncation_gate(cause, cut, plan),
        _depth_gate(cause, cut, effects, whole, plan),
        _geometry_gate(shape, plan, cause),
        *([_ranking_gate(gone, plan)] if "G7" in demands.gates else []),
    ]


def _truncation_gate(cause: Causal, cut: Truncation, plan: Plan) -> Gate:
    assert cut.drops is not None
    if cause.cliff is None:
        return gates.missing("G3", "there is no cliff inside the model to truncate at")
    lost, named = cut.drops, [i for i, name in enumerate(cut.samples) if name in {*cause.hard, *cause.easy}]

    def at(layer: int) -> Gate:
        values = lost.at(layer)
        return gates.truncation_gate(
            None if values is None else values[named], [cut.samples[i] in set(cause.hard) for i in named],
            [cut.images[i] for i in named], layer, plan.thresholds, cut.records, resamples=plan.resamples,
            seed=plan.seed,
        )  # fmt: skip

    found = at(cause.cliff)
    if found.status != "fail":
        return found
    elsewhere = [str(layer) for layer in lost.layers.numbers if at(layer).status == "pass"]
    where = f"layer {', '.join(elsewhere)}" if elsewhere else "no layer of the grid"
    return replace(found, why=f"{found.why}; all three demands hold at {where}")


def _depth_gate(cause: Causal, cut: Truncation, effects: Effects, whole: np.ndarray, plan: Plan) -> Gate:
    """Soft depth of the samples that lose anything by blinding, with their scores."""
    place = {name: i for i, name in enumerate(effects.samples)}
    assert cause.threshold is not None
    used = [i for i, name in enumerate(cut.samples) if name in place and whole[place[name]] > cause.threshold.tau]
    rows = [place[cut.samples[i]] for i in used]
    scores, images = cut.clean[used], [cut.images[i] for i in used]
    if len(set(images)) < 3 or len(set(scores.tolist())) < 2:
        said = f"all score {scores[0]:g}" if len(set(scores.tolist())) == 1 else f"{len(set(images))} images"
        why = f"no correlation of depth and score: {said} ({len(used)} samples that lose τ or more by blinding)"
        return Gate("G4", "inconclusive", None, None, None, "the interval excludes 0", cause.records.hash, why)
    soft = depth.soft_depth(effects.values[rows] / whole[rows][:, None])
    boot = stats.Bootstrap(images, resamples=plan.resamples, seed=plan.seed)
    try:
        rho = boot.of(stats.spearman, soft, scores, name="Spearman's ρ")
    except ic.InterpError as error:
        why = f"no interval: {error}"
        return Gate("G4", "inconclusive", None, None, None, "the interval excludes 0", cause.records.hash, why)
    return gates.depth_gate(rho, plan.thresholds, cause.records.hash)


def _geometry_gate(shape: Geometry, plan: Plan, cause: Causal) -> Gate:
    if shape.ratio is None:
        return gates.missing("G5", shape.why)
    half = plan.cliff_boundary is None  # half of the images find the boundary, the others are measured
    demands = replace(plan.thresholds, images=max(1, plan.thresholds.images // 2)) if half else plan.thresholds
    return gates.geometry_gate(shape.ratio.log, (shape.ratio.low, shape.ratio.high), demands, cause.records.hash)


def _ranking_gate(gone: Removals, plan: Plan) -> Gate:
    """Whether a cliff may be claimed, by generated answers."""
    found = gates.ranking_gate(gone.claims.get("generated"), plan.thresholds, gone.records)
    return replace(found, why=gone.why or found.why) if found.status == "missing" else found
