"""Figures, tables and page of the recipe `moe_experts`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from interp_plugins.attribution.files.arrays import npz_bytes
from interp_plugins.pairs.pair import SIDES
from interp_plugins.pairs.routing import VIEWS, View

import interp_core as ic
from interp_core import report, runs

from ..figures import png_bytes
from .findings import CURVES, LISTS, Curve, Findings

FIGURES, TABLES, PAGE = "figures/expert_core", "tables", "expert_core_report.html"
SUMMARY = f"{TABLES}/expert_core_summary.json"
CURVE_NAMES: dict[Curve, str] = {
    "tv": "total variation of weights", "jaccard": "Jaccard index of sets", "intersection": "experts in common",
}  # fmt: skip
MAPS = tuple(f"expert_usage_{view}_{which}" for view in VIEWS for which in (*SIDES, "diff", "diff_thresholded"))
FILES = (
    *(f"{FIGURES}/{name}.png" for name in (*MAPS, *(f"routing_{name}_curve" for name in CURVES))),
    *(f"{TABLES}/last_token_{name}_points.json" for name in LISTS),
    *(f"{TABLES}/expert_core_{name}" for name in (
        "layer_metrics.csv", "matrices.npz", "top_experts.csv", "dropped.csv", "summary.json",
    )),
)  # fmt: skip
"""All that is written beside the page and the samples' sums."""
VIEW_NAMES: dict[View, str] = {"all": "all targets", "last": "the last target"}


def write(run: runs.RunFolder, model: ic.Model, findings: Findings, after: Sequence[str]) -> Path:
    """Write everything that is not there yet; returns the page's path.

    Args:
        after: the stages that the findings are made of.
    """
    inputs = {"dropped": runs.digest([dict(row) for row in findings.dropped]), "source": findings.source}
    top = [row for view in VIEWS for row in findings.top_rows(view)]
    said, charts = sentences(findings, top), figures(findings)
    if not run.kept(SUMMARY, inputs=inputs, after=after):
        files: dict[str, str | bytes] = {f"{FIGURES}/{name}.png": png_bytes(chart) for name, chart in charts.items()}
        files |= {f"{TABLES}/last_token_{name}_points.json": points.text() for name, points in findings.points.items()}
        files |= {
            f"{TABLES}/expert_core_layer_metrics.csv": runs.csv_text(findings.layer_rows()),
            f"{TABLES}/expert_core_matrices.npz": npz_bytes(findings.arrays()),
            f"{TABLES}/expert_core_top_experts.csv": runs.csv_text(top),
            f"{TABLES}/expert_core_dropped.csv": runs.csv_text(findings.dropped, ["sample", "targets", "reason"]),
            SUMMARY: runs.json_text(summary(findings, model)),
        }
        assert set(files) == set(FILES)
        run.put(files, stage=SUMMARY, inputs=inputs, after=after)
    run.page(PAGE, answer_of(findings, charts, top, said), model)
    print("", *said, "", sep="\n")
    return run.path / PAGE


# Figures


def figures(findings: Findings) -> dict[str, report.Chart]:
    """Every chart by the published name of its file."""
    charts: dict[str, report.Chart] = {}
    for view in VIEWS:
        most = max(float(findings.matrix(view, side).max()) for side in SIDES)
        for side in SIDES:
            title = f"Usage of experts, {side}, {VIEW_NAMES[view]}"
            charts[f"expert_usage_{view}_{side}"] = _map(
                findings, view, findings.matrix(view, side), title, limits=(0.0, most), colorbar="share of the weight"
            )
        title = f"Usage of experts, agentic minus assisted, {VIEW_NAMES[view]}"
        charts[f"expert_usage_{view}_diff"] = _map(
            findings, view, findings.difference(view), title, diverging=True, colorbar="difference of shares"
        )
        t, cells = findings.thresholded[view]
        title = (
            f"Differences of {t:.4g} and more, {VIEW_NAMES[view]}: {int((cells > 0).sum())} cells agentic (red), "
            f"{int((cells < 0).sum())} assisted (blue), of {cells.size}"
        )
        charts[f"expert_usage_{view}_diff_thresholded"] = _map(
            findings, view, cells.astype(float), title, diverging=True, limits=(-1.0, 1.0), colorbar="sign"
        )
    return charts | {f"routing_{name}_curve": _curve(findings, name) for name in CURVES}


def _map(findings: Findings, view: View, values: np.ndarray, title: str, **how: Any) -> report.Heatmap:
    a, b = (findings.matrix(view, side) for side in SIDES)
    tips = [
        [
            f"layer {layer}, expert {expert}\nagentic {a[i, expert]:.4f}, assisted {b[i, expert]:.4f}, "
            f"difference {a[i, expert] - b[i, expert]:+.4f}"
            for expert in range(values.shape[1])
        ]
        for i, layer in enumerate(findings.layers)
    ]
    experts = [str(expert) for expert in range(values.shape[1])]
    return report.Heatmap(
        values, [f"layer {layer}" for layer in findings.layers], experts, tips=tips, title=title, xlabel="expert",
        ylabel="decoder layer", **how,
    )  # fmt: skip


def _curve(findings: Findings, name: Curve) -> report.Curves:
    band, chance = findings.bands.get(name), findings.chance.get(name)
    said = f"{CURVE_NAMES[name]}, top {findings.top_k} of {findings.shape.n_experts}"
    line = (
        report.Line(said, findings.curve(name), base=chance) if band is None else report.Line.of(said, band, chance)
    )  # fmt: skip
    random = "random sets of equal weights" if name == "tv" else "random sets"
    dashed = "" if chance is None else f" (dashed: {random})"
    return report.Curves(
        [line], [str(layer) for layer in findings.layers], base=random, xlabel="decoder layer",
        ylabel=CURVE_NAMES[name],
        title=f"Routing of the same tokens: {CURVE_NAMES[name]}{dashed}",
        caption=f"Means over samples of each one's mean over its targets, 95 % intervals over samples{dashed}. "
        + findings.few,
    )  # fmt: skip


# Words


def sentences(findings: Findings, top: Sequence[dict[str, Any]]) -> list[str]:
    """What came out, in words that the numbers support."""
    shape, n = findings.shape, len(findings.names)
    said = [
        f"{n} {'sample' if n == 1 else 'samples'}, {sum(findings.targets):,} targets, assisted context "
        f"{' and '.join(findings.layouts)}; {len(findings.layers)} layers of {shape.n_experts} experts."
    ]
    if findings.executed:
        said.append(f"Sets are the {findings.top_k} experts that the model executes; weights are normalised over them.")
    else:
        said.append(
            f"Sets are the {findings.top_k} experts of largest probability; the model executes {shape.top_k}. This is "
            "a statistic of its router, not what it computes."
        )
    said += [*_where_most(findings), *_against_chance(findings)]
    for view in VIEWS:
        t, cells = findings.thresholded[view]
        more, less = int((cells > 0).sum()), int((cells < 0).sum())
        said.append(
            f"At {VIEW_NAMES[view]}, {more + less} of {cells.size} cells differ by {t:.4g} or more: {more} are used "
            f"more by the agentic context, {less} by the assisted one."
        )
    said += [_largest(next(row for row in top if row["view"] == view)) for view in VIEWS]
    return [*said, *filter(None, [findings.few, _left_out(findings)])]


def _where_most(findings: Findings) -> list[str]:
    """The layer that differs most and the one that differs least, and whether that is more than chance."""
    curve, layers = findings.curve("tv"), findings.layers
    most, least = int(curve.argmax()), int(curve.argmin())
    if not findings.bands or most == least:
        return [f"Routing differs most in layer {layers[most]} (total variation {curve[most]:.3f})."]
    band = findings.bands["tv"]
    values = findings.sums["curve_tv"].numpy()
    gap = findings.boot.difference(values[:, most], values[:, least])
    chance = f"; random sets of equal weights give {findings.chance['tv']:.3f}" if findings.chance else ""
    sure = "" if gap.excludes() else "; these samples do not tell one from the other"
    return [
        f"Routing differs most in layer {layers[most]} (total variation {curve[most]:.3f}, 95 % interval "
        f"{band.low[most]:.3f} to {band.high[most]:.3f}) and least in layer {layers[least]} ({curve[least]:.3f}, "
        f"{band.low[least]:.3f} to {band.high[least]:.3f}){chance}{sure}.",
        f"The gap between these layers is {gap.value:.3f} (95 % interval {gap.low:.3f} to {gap.high:.3f}), and both "
        "were picked by these numbers.",
    ]


def _against_chance(findings: Findings) -> list[str]:
    if not findings.bands or not findings.chance:
        return []
    band, chance, count = findings.bands["jaccard"], findings.chance["jaccard"], len(findings.layers)
    above, below = int((band.low > chance).sum()), int((band.high < chance).sum())
    rest = f", in {below} below it" if below else ""
    return [
        f"Sets of the same token have a Jaccard index above that of random sets ({chance:.3f}) in {above} of {count} "
        f"layers{rest}, by intervals of single layers."
    ]


def _largest(row: dict[str, Any]) -> str:
    known = row["low"] != ""
    interval = f", 95 % interval {row['low']:+.4f} to {row['high']:+.4f}" if known else ""
    picked = ", so that the interval flatters it" if known else ""
    return (
        f"The largest difference at {VIEW_NAMES[row['view']]} is that of expert {row['expert']} in layer "
        f"{row['layer']}: {row['difference']:+.4f}{interval} (agentic {row['agentic']:.4f}, assisted "
        f"{row['assisted']:.4f}); it was picked by this number{picked}."
    )


def _left_out(findings: Findings) -> str:
    samples = sum(row["targets"] == "" for row in findings.dropped)
    targets = sum(row["targets"] for row in findings.dropped if row["targets"] != "")
    counts = ((samples, "sample"), (targets, "target"))
    said = " and ".join(f"{n:,} {word}{'s' * (n > 1)}" for n, word in counts if n)
    return f"Left out: {said}; the list is at the end." if said else ""


def summary(findings: Findings, model: ic.Model) -> dict[str, Any]:
    """Settings, counts, what was left out, and versions."""
    shape, few = findings.shape, findings.few
    return {
        "format": "expert-core/1",
        "model": {"source": model.source, "weights": shape.weights, "dtype": str(model.dtype)},
        "n_layers": shape.n_layers, "moe_layers": list(findings.layers), "n_experts": shape.n_experts,
        "model_top_k": shape.top_k, "top_k": findings.top_k, "sets": "executed" if findings.executed else "re-ranked",
        "weights": "normalised over the set; usage averaged over targets, curves over samples", "data": findings.source,
        "settings": findings.settings.identity, "layouts": list(findings.layouts), "samples": list(findings.names),
        "n_samples": len(findings.names), "n_targets": sum(findings.targets),
        "threshold": {view: findings.thresholded[view].threshold for view in VIEWS},
        "cells": {
            view: {"agentic": int((t.map > 0).sum()), "assisted": int((t.map < 0).sum()), "all": int(t.map.size)}
            for view, t in findings.thresholded.items()
        },
        "chance": dict(findings.chance), "mean": {name: float(findings.curve(name).mean()) for name in CURVES},
        "intervals": {name: band.method for name, band in findings.bands.items()}, "note": few,
        "dropped": [dict(row) for row in findings.dropped],
        "versions": {name: version(name) for name in ("interp-core", "torch", "transformers", "numpy")},
    }  # fmt: skip


# Page


def answer_of(
    findings: Findings, charts: dict[str, report.Chart], top: Sequence[dict[str, Any]], said: list[str]
) -> report.Answer:
    """All of it on one page: where the same tokens are routed differently, then which experts differ."""
    n, targets = len(findings.names), findings.targets
    experts = (
        "Share of the routers' normalised weight, layer by layer; rows sum to 1. Point at a cell for its layer, expert "
        "and numbers. In differences red is more agentic, blue more assisted, white neither."
    )
    sections = [
        report.Section(
            "Sets of experts of the same tokens", findings.few,
            report.titled(charts[f"routing_{name}_curve"] for name in CURVES[1:]),
        )
    ]  # fmt: skip
    for view in VIEWS:
        names = [f"expert_usage_{view}_{which}" for which in (*SIDES, "diff", "diff_thresholded")]
        drawn = report.titled(charts[name] for name in names)
        sections.append(report.Section(f"Usage of experts at {VIEW_NAMES[view]}", experts, drawn))
    for view in VIEWS:
        rows = [{key: value for key, value in row.items() if key != "view"} for row in top if row["view"] == view]
        sections.append(
            report.Section(
                f"The {len(rows)} largest differences at {VIEW_NAMES[view]}",
                f"With 95 % intervals over samples, each by itself. Picked out of {findings.difference(view).size} "
                "cells by their size, they are on average smaller in other samples.",
                report.table(rows),
            )
        )
    finding = _where_most(findings)[0]
    return report.Answer(
        "Experts in two contexts",
        "Do the routers send the same target tokens to other experts in the agentic context than in the assisted one, "
        f"and where? {n} {'sample' if n == 1 else 'samples'} of {Path(findings.source).name}.",
        finding,
        [{"sample": name, "targets": count} for name, count in zip(findings.names, targets, strict=True)],
        report.titled([charts["routing_tv_curve"]]), further=[sentence for sentence in said if sentence != finding],
        sections=sections, left_out=findings.dropped, rows=findings.layer_rows(),
        whole=f"{TABLES}/expert_core_layer_metrics.csv",
    )  # fmt: skip
