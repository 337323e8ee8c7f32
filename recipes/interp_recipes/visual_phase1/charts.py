"""Figures of the recipe `visual_phase1`, by the names of their files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from interp_plugins.attribution.over_image import overlays
from interp_plugins.visual.gates import Judgement
from interp_plugins.visual.threshold import histogram

from interp_core import report

from .findings import Causal, Geometry, Truncation
from .plan import Plan

WORDS = {
    "G0": "sanity", "G1": "image", "G2": "cliff", "G3": "truncation", "G4": "depth", "G5": "geometry", "G7": "ranking",
}  # fmt: skip
"""What gates ask."""


def causal_charts(causal: Causal, plan: Plan) -> dict[str, report.Chart]:
    """Curves with bands, E, both populations, and the pilots' distribution."""
    charts: dict[str, report.Chart] = {"causal/pilots": pilots_chart(causal, plan)}
    if causal.stopped:
        return charts
    main = causal.main
    places = list(map(str, main.layers.numbers))
    lines = [report.Line.of(name, each.band) for name, each in causal.curves.items()]
    lines.append(report.Line("τ", [main.tau] * len(places)))
    charts["causal/effects"] = report.Curves(
        lines, places, title="What the answer loses", xlabel="decoder layer", ylabel="nats",
        caption=f"Mean loss of the answer's log-probability, bands of whole curves (95 %), n = {main.mean.n} in "
        f"{main.mean.units} images.",
    )  # fmt: skip
    shares = [report.Line.of(name, each.share) for name, each in causal.curves.items() if each.share is not None]
    if shares:
        charts["causal/share"] = report.Curves(
            shares, places, title="Share of the effect of blinding", xlabel="decoder layer", ylabel="E",
            caption="1: the layer needs the image as much as the input does; 0: not any more. 95 % intervals.",
        )  # fmt: skip
    if causal.dependent is not None:
        both = [("all samples", main), ("image-dependent samples", causal.dependent)]
        charts["causal/populations"] = report.Curves(
            [report.Line.of(f"{name} (n = {each.mean.n})", each.band) for name, each in both], places,
            title=f"{main.name}, two populations", xlabel="decoder layer", ylabel="nats",
            caption=f"Image-dependent: right with the image, wrong with the {causal.blind} one.",
        )  # fmt: skip
    if causal.gap is not None:
        evds = {f"{kind} samples": interval for kind, interval in causal.evds.items()}
        charts["causal/evd_gap"] = report.Bars.of(
            evds | {"gap, hard - easy": causal.gap}, title="EVD of hard and easy samples", xlabel="decoder layers",
            caption=f"Last layer with an effect of τ or more, -1: none; {causal.kinds}; 95 % intervals over images.",
        )  # fmt: skip
    return charts


def pilots_chart(causal: Causal, plan: Plan) -> report.Bars:
    """The distribution of the pilots' effects, with the bin that τ lies in."""
    tau = plan.tau if causal.threshold is None else causal.threshold.tau
    bars = []
    rows = histogram(causal.pilots.values)
    for i, row in enumerate(rows):
        last = i == len(rows) - 1
        holds = row["low"] <= tau < row["high"] or (last and tau == row["high"])
        name = f"{row['low']:.3g} to {row['high']:.3g}"
        bars.append(report.Bar(f"{name}  ← τ = {tau:.3g}" if holds else name, float(row["count"]), None))
    said = str(causal.threshold) if causal.threshold is not None else causal.stopped
    inside = rows[0]["low"] <= tau <= rows[-1]["high"]
    more = "" if inside else f" τ = {tau:.3g} lies outside."
    return report.Bars(
        bars, title="Effects on the pilots", xlabel="pilots times layers",
        caption=f"Δ in nats of {len(causal.pilots.samples)} pilots at {len(causal.pilots.layers.numbers)} layers under "
        f"{causal.pilots.name}. {said}.{more}",
    )  # fmt: skip


def truncation_charts(truncation: Truncation) -> dict[str, report.Chart]:
    """Scores lost from each layer on, by difficulty, and in bands alone."""
    if truncation.drops is None:
        return {}
    charts: dict[str, report.Chart] = {"truncation/drops": truncation.drops.chart()}
    if len(truncation.kinds) == 2:
        charts["truncation/difficulty"] = report.Curves(
            [report.Line.of(f"{name} (n = {band.n})", band) for name, band in truncation.kinds.items()],
            list(map(str, truncation.drops.layers.numbers)), title="Score lost by hard and easy samples",
            xlabel="gone from layer", ylabel="score", caption="Clean score minus score; 95 % intervals over images.",
        )  # fmt: skip
    charts["truncation/bands"] = report.Bars.of(
        {f"layers {start} to {stop - 1}": drop for (start, stop), drop in truncation.bands.items()},
        title="Score lost with the image gone in a band alone", xlabel="score",
        caption="Clean score minus score, the image hidden in these layers and there in all others.",
    )  # fmt: skip
    return charts


def geometry_charts(geometry: Geometry) -> dict[str, report.Chart]:
    """Curves of the rows' geometry, and ratios of effective ranks at the cut beside random cuts."""
    if geometry.result is None:
        return {}
    charts: dict[str, report.Chart] = {
        f"geometry/{name}": geometry.result.curves(name) for name in ("effective_rank", "anisotropy")
    }
    bars = []
    for name, ratio in (("visual rows", geometry.ratio), ("text rows", geometry.text)):
        if ratio is not None:
            others = report.Bar(f"{name}, other cuts", float(np.median(ratio.cuts)), (ratio.low, ratio.high))
            bars += [report.Bar.of(f"{name}, from layer {ratio.cut} on", ratio.log), others]
    if bars:
        charts["geometry/er_ratio"] = report.Bars(
            bars, title="Effective rank after over before the cut", xlabel="mean ln ratio",
            caption="95 % intervals over images; of other cuts the median, and the middle 95 % of them.",
        )  # fmt: skip
    return charts


def gates_chart(judgement: Judgement) -> report.Heatmap:
    """Which gate says what, with its number and interval."""
    colours = {"pass": -1.0, "inconclusive": 0.0, "fail": 1.0, "missing": float("nan")}
    words = {"inconclusive": "unclear"}

    def written(number: float | None) -> str:
        return "–" if number is None else f"{number:.3g}"

    return report.Heatmap(
        [[colours[gate.status]] * 4 for gate in judgement.gates],
        [f"{gate.name} {WORDS[gate.name]}" for gate in judgement.gates], ["status", "number", "from", "to"],
        texts=[[words.get(gate.status, gate.status), *map(written, (gate.number, gate.low, gate.high))]
               for gate in judgement.gates],
        diverging=True, limits=(-1, 1), title=f"Verdict {judgement.verdict}",
        colorbar="blue: pass, white: inconclusive, red: fail, grey: missing",
    )  # fmt: skip


def overlay_charts(maps: Mapping[str, Any]) -> dict[str, report.Chart]:
    """The sample's image with its visual tokens, for each kind of number."""
    places = [tuple(place) for place in maps["places"]]
    if not places:
        return {}
    tiles = {place[2] for place in places}
    pictures = [np.asarray(maps["picture"])] if len(tiles) == 1 else None
    charts: dict[str, report.Chart] = {}
    for name, values in maps["values"].items():
        scale = "nats lost" if name == "visual_map" else "share of flow"
        for image, chart in overlays({name: values}, places, pictures, scale=scale).items():
            charts[f"overlay/{name}_{image.replace(', ', '_').replace(' ', '_')}"] = chart
    return charts
