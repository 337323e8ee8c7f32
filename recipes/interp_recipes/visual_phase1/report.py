"""Sentences and page of the recipe `visual_phase1`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_plugins.visual.gates import Judgement

import interp_core as ic
from interp_core import report, runs

from ..figures import png_bytes
from ..visual_data import Row
from .charts import WORDS, causal_charts, gates_chart, geometry_charts, overlay_charts, truncation_charts
from .findings import Causal, Geometry, Truncation
from .horizon import Removals
from .plan import Plan
from .samples import Samples

PAGE = "visual_phase1.html"
HORIZON = (
    "Of the model's own greedy answer: “single” is the log-probability of its first token, “generated” the mean over "
    "all its tokens. Visual tokens are ranked by what the predicting token pays to them in the layer itself."
)
VERDICTS = {
    "FULL": "the image is used, its use ends at a layer, behind which hard questions alone still need it, and "
    "depth or geometry bear it out",
    "PARTIAL": "the image is used and its use ends at a layer; hard questions do not go on needing it there (G3), or "
    "neither depth nor geometry bear it out (G4, G5)",
    "STOP": "the study does not carry a statement about depth",
    "INCOMPLETE": "nothing speaks against it, but numbers are missing",
}


def files_of(plan: Plan) -> list[str]:
    """Names of files that may be written, to be claimed before any work."""
    causal = ["effects", "share", "populations", "pilots", "evd_gap", "information"]
    cut = ["drops", "difficulty", "bands", "ranked_random", "keep_fractions", "answers_that_stay"]
    return [
        PAGE, "thresholds.json", "samples.json", "sanity.json", "causal/records.jsonl", "causal/causal.json",
        "causal/horizon.json", *(f"causal/{name}.png" for name in causal),
        "truncation/truncation.json", "truncation/keep_fractions.json", *(f"truncation/{name}.png" for name in cut),
        "geometry/geometry.json", *(f"geometry/{name}.png" for name in ("effective_rank", "anisotropy", "er_ratio")),
        "checkpoint_eval/checkpoint_eval.json", "checkpoint_eval/checkpoint_eval.md", "checkpoint_eval/gates.png",
        "overlay/overlay.json",
    ]  # fmt: skip


def write_all(
    run: runs.RunFolder, model: ic.Model, plan: Plan, data: Samples, checks: Mapping[str, Any], causal: Causal,
    truncation: Truncation, geometry: Geometry, removals: Removals, judgement: Judgement, maps: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Every figure as a file, and the page."""
    charts: dict[str, report.Chart] = {
        **causal_charts(causal, plan), **truncation_charts(truncation), **removals.charts(),
        **geometry_charts(geometry), "checkpoint_eval/gates": gates_chart(judgement), **overlay_charts(maps),
    }  # fmt: skip
    for name, chart in charts.items():
        inputs = {"chart": runs.digest(chart.html())[:16]}  # what it shows: others are left alone
        if not run.kept(f"{name}.png", inputs=inputs):
            run.put({f"{name}.png": png_bytes(chart)}, inputs=inputs)
    skipped = [*data.skipped, *causal.skipped, *truncation.skipped, *removals.skipped, *geometry.skipped]
    answer = _answer(data, checks, charts, judgement, maps, skipped, (causal, truncation, removals, geometry), plan)
    run.page(PAGE, answer, model)
    return run.path / PAGE


# The page


def summary(
    data: Samples, causal: Causal, truncation: Truncation, removals: Removals, geometry: Geometry, judgement: Judgement,
    skipped: Sequence[Row],
) -> list[str]:  # fmt: skip
    """What came out; nothing is said that the numbers do not carry."""
    counts = f"{len(data.pilots)} pilots and {len(data.others)} further samples"
    left = f"; {len(skipped)} left out or failed, listed below" if skipped else ""
    unsure = [gate.name for gate in judgement.gates if gate.status == "inconclusive"]
    said = [f"{counts}{left}."]
    if unsure:
        said.append(f"{', '.join(unsure)}: too few samples, or an interval that includes the threshold, to tell.")
    if data.collisions:
        said.append(f"{data.collisions} samples got a random image whose own answer is the same, which makes blinding "
                    "look weaker.")  # fmt: skip
    if data.resized:
        said.append(f"{len(data.resized)} random images had no partner of their own grid and were resized.")
    return [*said, *causal.sentences(), *truncation.sentences(), *removals.sentences(), *geometry.sentences()]


def finding_of(causal: Causal, judgement: Judgement) -> str:
    """The verdict; with the boundary where the gates let it stand, else with the gates that are not passed."""
    verdict = f"Verdict {judgement.verdict}: {VERDICTS[judgement.verdict]}"
    if judgement.verdict in ("FULL", "PARTIAL"):
        return f"{verdict}; the boundary is layer {causal.main.cliff.value} of {causal.n_layers}."
    left: dict[str, list[str]] = {}
    for gate in judgement.gates:
        left.setdefault(gate.status, []).append(f"{gate.name} {WORDS[gate.name]}")
    return f"{verdict}; " + "; ".join(f"{status}: {', '.join(names)}" for status, names in left.items()) + "."


def _answer(
    data: Samples, checks: Mapping[str, Any], charts: Mapping[str, report.Chart], judgement: Judgement,
    maps: Mapping[str, Any], skipped: Sequence[Row], findings: tuple[Causal, Truncation, Removals, Geometry],
    plan: Plan,
) -> report.Answer:  # fmt: skip
    causal, truncation = findings[:2]
    rows = [
        {"gate": f"{gate.name} {WORDS[gate.name]}", "status": gate.status,
         "number": "" if gate.number is None else gate.number,
         "interval": "" if gate.low is None or gate.high is None else f"{gate.low:.4g} to {gate.high:.4g}",
         "demanded": gate.threshold, "why": gate.why, "records": gate.records}
        for gate in judgement.gates
    ]  # fmt: skip

    def drawn(*names: str) -> str:
        return report.titled(charts[name] for name in names if name in charts)

    effects, pilots = drawn("causal/effects"), drawn("causal/pilots")
    sections = [
        report.Section("Gates", f"Thresholds {judgement.thresholds}, hashed before the run.", report.table(rows)),
        report.Section("τ", "Pilots take no part in what follows.", pilots if effects else ""),
        report.Section(
            "Causal curves", "", drawn(*(f"causal/{name}" for name in ("share", "populations", "evd_gap")))
            + (report.table(_depths(causal)) if effects else ""),
        ),
    ]  # fmt: skip
    if truncation.drops is not None:
        body = drawn(*(f"truncation/{name}" for name in ("drops", "difficulty", "bands")))
        sections.append(report.Section("Answers without the image", "", body + report.table(truncation.drops.table())))
    names = ("causal/information", "truncation/ranked_random", "truncation/keep_fractions")
    sections += [
        report.Section("Information horizon", HORIZON, drawn(*names, "truncation/answers_that_stay")),
        report.Section(
            "Geometry", "Rows at the input of each layer.",
            drawn(*(f"geometry/{name}" for name in ("effective_rank", "anisotropy", "er_ratio"))),
        ),
        _image(charts, maps),
    ]  # fmt: skip
    records = f"boundary {causal.cliff}\ncausal record {causal.records.hash}\nanswers {truncation.records}"
    return report.Answer(
        "From which layer on the image is not needed",
        "Does the model use its image, and is there a layer from which on it answers as well without the image's rows? "
        f"{len(data.pilots)} pilots give the threshold τ, {len(data.others)} further samples the curves.",
        finding_of(causal, judgement),
        [{"sample": s.name, "question": s.question.question, "answer": s.answer} for s in data.others],
        effects or pilots, further=summary(data, *findings, judgement, skipped),
        sections=[section for section in sections if section.body], left_out=skipped,
        details={"Sanity battery, sample by sample": "\n".join(checks["table"]), "Records": records},
    )  # fmt: skip


def _depths(causal: Causal) -> list[dict[str, Any]]:
    """What each curve says of depth; of text rows nothing, as their effect rises."""
    rows = []
    for name, curve in causal.curves.items():
        if name.startswith("text:"):
            continue
        window = "" if curve.l90 is None or curve.l10 is None else f"{curve.l90.value} to {curve.l10.value}"
        soft = "" if curve.soft is None else f"{curve.soft:.3f}"
        rows.append({
            "intervention": name, "cliff": "none" if curve.no_cliff else str(curve.cliff),
            "first crossing": curve.first, "steepest drop": curve.drop, "EVD": curve.evd, "median EVD": curve.median,
            "window": window, "soft depth": soft,
        })  # fmt: skip
    return rows


def _image(charts: Mapping[str, report.Chart], maps: Mapping[str, Any]) -> report.Section:
    sample = maps["of"]
    words = (
        f"{sample.name}: “{sample.question.question}” “{sample.answer}”. visual_map: what the answer loses when no "
        "text sees the token in any layer. ifr: share of the information flow into the answer."
    )
    drawn = [chart.html() for name, chart in charts.items() if name.startswith("overlay/")]
    notes = "".join(f"<p class='soft'>{report.escape(note)}</p>" for note in maps["notes"])
    return report.Section("Which part of the image", words, "".join(drawn) + notes)
