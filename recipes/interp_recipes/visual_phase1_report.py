"""Figures, sentences and page of the recipe `visual_phase1`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from interp_plugins.attribution.over_image import overlays
from interp_plugins.visual.gates import Judgement
from interp_plugins.visual.threshold import histogram

import interp_core as ic
from interp_core import report, runs

from .visual_data import Row
from .visual_phase1_findings import Causal, Geometry, Truncation
from .visual_phase1_plan import Plan
from .visual_phase1_samples import Samples

PAGE = "visual_phase1.html"
VERDICTS = {
    "FULL": "the image is used, its use ends at a layer, taking it away there tells hard from easy questions, and "
    "depth or geometry bear it out",
    "PARTIAL": "the image is used and its use ends at a layer; not all that should follow from it holds",
    "STOP": "the study does not carry a statement about depth",
    "INCOMPLETE": "nothing speaks against it, but numbers are missing",
}


def files_of(plan: Plan) -> list[str]:
    """Names of files that may be written, to be claimed before any work."""
    names = ["effects", "share", "populations", "pilots"]
    return [
        PAGE, "thresholds.json", "samples.json", "sanity.json", "causal/records.jsonl", "causal/causal.json",
        *(f"causal/{name}.png" for name in names), "truncation/truncation.json", "truncation/drops.png",
        "geometry/geometry.json", "geometry/effective_rank.png", "geometry/anisotropy.png",
        "checkpoint/checkpoint.json", "checkpoint/checkpoint.md", "overlay/overlay.json",
    ]  # fmt: skip


def write_all(
    run: runs.RunFolder, model: ic.Model, plan: Plan, data: Samples, checks: Mapping[str, Any], cause: Causal,
    cut: Truncation, shape: Geometry, judged: Judgement, seen: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Every figure as a file, and the page."""
    charts: dict[str, report.Chart] = {f"causal/{name}": chart for name, chart in causal_charts(cause, plan).items()}
    if cut.drops is not None:
        charts["truncation/drops"] = cut.drops.chart()
    if shape.result is not None:
        charts |= {f"geometry/{name}": shape.result.curves(name) for name in ("effective_rank", "anisotropy")}
    over = overlay_charts(seen)
    charts |= {f"overlay/{name.replace(', ', '_').replace(' ', '_')}": chart for name, chart in over.items()}
    inputs = {"records": [cause.records.hash, cut.records], "boundary": cause.cliff}
    for name, chart in charts.items():
        if not run.kept(f"{name}.png", inputs=inputs):
            _figure(run, f"{name}.png", chart, inputs)
    skipped = [*data.skipped, *cause.skipped, *cut.skipped, *shape.skipped]
    page = _page(model, data, checks, charts, judged, seen, skipped, (cause, cut, shape), plan)
    run.put({PAGE: page})
    return run.path / PAGE


def _figure(run: runs.RunFolder, name: str, chart: report.Chart, inputs: Mapping[str, Any]) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        run.put({name: chart.png(Path(folder) / "figure.png").read_bytes()}, inputs=inputs)


# Charts


def causal_charts(cause: Causal, plan: Plan) -> dict[str, report.Chart]:
    """Curves with bands, E, both populations, and the pilots' distribution."""
    charts: dict[str, report.Chart] = {"pilots": pilots_chart(cause, plan)}
    if cause.stopped:
        return charts
    one = cause.main
    places = list(map(str, one.layers.numbers))
    lines = [report.Line.of(name, each.band) for name, each in cause.curves.items()]
    lines.append(report.Line("τ", [one.tau] * len(places)))
    charts["effects"] = report.Curves(
        lines, places, title="What the answer loses", xlabel="decoder layer", ylabel="nats",
        caption=f"Mean loss of the answer's log-probability, bands of whole curves (95 %), n = {one.mean.n} in "
        f"{one.mean.units} images.",
    )  # fmt: skip
    shares = [report.Line.of(name, each.share) for name, each in cause.curves.items() if each.share is not None]
    if shares:
        charts["share"] = report.Curves(
            shares, places, title="Share of the effect of blinding", xlabel="decoder layer", ylabel="E",
            caption="1: the layer needs the image as much as the input does; 0: not any more. 95 % intervals.",
        )  # fmt: skip
    if cause.dependent is not None:
        both = [("all samples", one), ("image-dependent samples", cause.dependent)]
        charts["populations"] = report.Curves(
            [report.Line.of(f"{name} (n = {each.mean.n})", each.band) for name, each in both], places,
            title=f"{one.name}, two populations", xlabel="decoder layer", ylabel="nats",
            caption="Image-dependent: right with the image, wrong with the random one.",
        )  # fmt: skip
    return charts


def pilots_chart(cause: Causal, plan: Plan) -> report.Bars:
    """The distribution of the pilots' effects, with the bin that τ lies in."""
    tau = plan.tau if cause.threshold is None else cause.threshold.tau
    bars = []
    rows = histogram(cause.pilots.values)
    for i, row in enumerate(rows):
        last = i == len(rows) - 1
        holds = row["low"] <= tau < row["high"] or (last and tau == row["high"])
        name = f"{row['low']:.3g} to {row['high']:.3g}"
        bars.append(report.Bar(f"{name}  ← τ = {tau:.3g}" if holds else name, float(row["count"]), None))
    said = str(cause.threshold) if cause.threshold is not None else cause.stopped
    inside = rows[0]["low"] <= tau <= rows[-1]["high"]
    more = "" if inside else f" τ = {tau:.3g} lies outside."
    return report.Bars(
        bars, title="Effects on the pilots", xlabel="pilots times layers",
        caption=f"Δ in nats of {len(cause.pilots.samples)} pilots at {len(cause.pilots.layers.numbers)} layers under "
        f"{cause.pilots.name}. {said}.{more}",
    )  # fmt: skip


def overlay_charts(seen: Mapping[str, Any]) -> dict[str, report.Overlay]:
    """The sample's image with its visual tokens."""
    places = [tuple(place) for place in seen["places"]]
    if not places or not seen["values"]:
        return {}
    tiles = {place[2] for place in places}
    pictures = [np.asarray(seen["picture"])] if len(tiles) == 1 else None
    return overlays(seen["values"], places, pictures, title="visual tokens", scale="nats lost, or share of flow")


# The page


def summary(
    data: Samples, cause: Causal, cut: Truncation, shape: Geometry, judged: Judgement, skipped: Sequence[Row]
) -> list[str]:
    """What came out; nothing is said that the numbers do not carry."""
    counts = f"{len(data.pilots)} pilots and {len(data.others)} further samples"
    left = f"; {len(skipped)} left out or failed, listed below" if skipped else ""
    unsure = [gate.name for gate in judged.gates if gate.status == "inconclusive"]
    said = [f"Verdict {judged.verdict}: {VERDICTS[judged.verdict]}.", f"{counts}{left}."]
    if unsure:
        said.append(f"{', '.join(unsure)}: too few samples, or an interval that includes the threshold, to tell.")
    if data.collisions:
        said.append(f"{data.collisions} samples got a random image whose own answer is the same, which makes blinding "
                    "look weaker.")  # fmt: skip
    if data.resized:
        said.append(f"{len(data.resized)} random images had no partner of their own grid and were resized.")
    return [*said, *cause.sentences(), *cut.sentences(), *shape.sentences()]


def _page(
    model: ic.Model, data: Samples, checks: Mapping[str, Any], charts: Mapping[str, report.Chart], judged: Judgement,
    seen: Mapping[str, Any], skipped: Sequence[Row], found: tuple[Causal, Truncation, Geometry], plan: Plan,
) -> str:  # fmt: skip
    cause, cut, shape = found
    words = "".join(f"<li>{report.escape(line)}</li>" for line in summary(data, *found, judged, skipped))
    gates = [
        {"gate": gate.name, "status": gate.status, "number": "" if gate.number is None else gate.number,
         "interval": "" if gate.low is None or gate.high is None else f"{gate.low:.4g} to {gate.high:.4g}",
         "demanded": gate.threshold, "why": gate.why, "records": gate.records}
        for gate in judged.gates
    ]  # fmt: skip
    sections = [
        report.Section(f"Verdict {judged.verdict}", "", f"<ul>{words}</ul>"),
        report.Section("Gates", f"Thresholds {judged.thresholds}, hashed before the run.", report.table(gates)),
        report.Section("τ", "Pilots take no part in what follows.", charts["causal/pilots"].html()),
    ]
    drawn = [chart.html() for name, chart in charts.items() if name.startswith("causal/") and "pilots" not in name]
    if drawn:
        sections.append(report.Section("Causal curves", "", "".join(drawn) + report.table(_depths(cause))))
    if cut.drops is not None:
        table = report.table(cut.drops.table())
        sections.append(report.Section("Answers without the image", "", charts["truncation/drops"].html() + table))
    if shape.result is not None:
        drawn = [chart.html() for name, chart in charts.items() if name.startswith("geometry/")]
        sections.append(report.Section("Geometry", "Rows at the input of each layer.", "".join(drawn)))
    sections.append(_image(charts, seen))
    if skipped:
        sections.append(report.Section("Left out", "", report.table(list(skipped))))
    where = {"boundary": cause.cliff, "causal record": cause.records.hash, "answers": cut.records}
    battery = report.copyable("sanity battery, sample by sample", "\n".join(checks["table"]))
    shown = {name: str(value) for name, value in {**vars(plan), **where}.items()}
    sections.append(
        report.Section("Settings", "", battery + report.table([{"name": k, "value": v} for k, v in shown.items()]))
    )
    return report.page("Visual tokens, phase 1", repr(model), sections)


def _depths(cause: Causal) -> list[dict[str, Any]]:
    """What each curve says of depth; of text rows nothing, as their effect rises."""
    rows = []
    for name, one in cause.curves.items():
        if name.startswith("text:"):
            continue
        window = "" if one.l90 is None or one.l10 is None else f"{one.l90.value} to {one.l10.value}"
        soft = "" if one.soft is None else f"{one.soft:.3f}"
        rows.append({
            "intervention": name, "cliff": "none" if one.no_cliff else str(one.cliff), "first crossing": one.first,
            "steepest drop": one.drop, "EVD": one.evd, "median EVD": one.median, "window": window, "soft depth": soft,
        })  # fmt: skip
    return rows


def _image(charts: Mapping[str, report.Chart], seen: Mapping[str, Any]) -> report.Section:
    sample = seen["of"]
    words = (
        f"{sample.name}: “{sample.question.question}” “{sample.answer}”. visual_map: what the answer loses when no "
        "text sees the token in any layer. ifr: share of the information flow into the answer."
    )
    drawn = [chart.html() for name, chart in charts.items() if name.startswith("overlay/")]
    notes = "".join(f"<p class='soft'>{report.escape(note)}</p>" for note in seen["notes"])
    return report.Section("Which part of the image", words, "".join(drawn) + notes)
