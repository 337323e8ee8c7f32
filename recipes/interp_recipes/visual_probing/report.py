"""Tables, figures and page of the recipe `visual_probing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import interp_core as ic
from interp_core import report, runs

from .findings import Findings, Position, Row
from .samples import BLIND

PAGE, RECORD = "visual_probing.html", "probing.json"
TABLES = tuple(f"tables/{name}.csv" for name in ("probing", "curves", "behaviour", "skipped"))
ANSWERS = "figures/behaviour.png"


def files_of(positions: Sequence[str]) -> list[str]:
    """What `write_all` writes."""
    return [PAGE, RECORD, *TABLES, ANSWERS, *(f"figures/{name}.png" for place in positions for name in _names(place))]


def _names(place: str) -> tuple[str, str]:
    return f"{runs.safe_name(place)}_curves", f"{runs.safe_name(place)}_gain"


def write_all(run: runs.RunFolder, model: ic.Model, findings: Findings) -> Path:
    """Everything that the findings say, as files; returns the page."""
    charts = charts_of(findings)
    for name, chart in charts.items():
        run.figure(name, chart.png)
    skipped = findings.skipped or [dict.fromkeys(("sample", "where", "reason"), "")][:0]
    run.table("tables/probing.csv", findings.table)
    run.table("tables/curves.csv", findings.curves(), CURVES)
    run.table("tables/behaviour.csv", findings.behaviour_table())
    run.table("tables/skipped.csv", skipped, ["sample", "where", "reason"])
    run.json(RECORD, findings.record())
    run.page(PAGE, answer_of(findings, charts), model)
    print("", *findings.sentences, "", sep="\n")
    return run.path / PAGE


CURVES = (
    "position", "mode", "layer", "accuracy", "low", "high", "auroc", "null_low", "null_high", "control", "gain",
    "gain_low", "gain_high",
)  # fmt: skip


def charts_of(findings: Findings) -> dict[str, report.Chart]:
    """Every figure by the name of its file."""
    charts: dict[str, report.Chart] = {}
    for position in findings.positions:
        if position.comparison is None:
            continue
        curves, gains = (f"figures/{name}.png" for name in _names(position.name))
        charts[curves] = _curves(position)
        charts[gains] = _gains(position)
    charts[ANSWERS] = report.Bars.of(
        findings.behaviour.means, percent=True, xlabel="score of its answers",
        title="Answers with the image and without",
        caption=f"{len(findings.labels)} samples, 95 % intervals, images drawn whole; scorer: "
        f"{findings.behaviour.scorer}.",
    )  # fmt: skip
    return charts


def _curves(position: Position) -> report.Curves:
    lines = [report.Line.of(mode, band) for mode, band in position.accuracies.items()]
    comparison = position.comparison
    if comparison is not None and comparison.original.shuffles:
        lines.append(report.Line("shuffled labels", comparison.original.null.mean(0), comparison.band().T))
    return report.Curves(
        lines, _layers(position), xlabel=_xlabel(position), ylabel="balanced accuracy",
        title=f"What probes decode at {position.name}",
        caption=f"{position.name}: accuracy in each mode with 95 % intervals over samples.{_constant(position)}",
    )  # fmt: skip


def _gains(position: Position) -> report.Curves:
    name, gains = position.name, position.gains
    lines = [report.Line.of(f"original - {mode}", band) for mode, band in gains.items()]
    return report.Curves(
        lines, _layers(position), xlabel=_xlabel(position), ylabel="gain in balanced accuracy",
        title=f"What the image adds at {name}",
        caption=f"{name}: paired differences with bands that hold the whole curve in 95 % of studies."
        f"{_constant(position)}",
    )  # fmt: skip


def _layers(position: Position) -> list[str]:
    return [str(layer) for layer in range(position.cliff.n_layers)]


def _xlabel(position: Position) -> str:
    """Names the layers that the table's means are of."""
    return f"layer (means are of {position.cliff.layers})"


def _constant(position: Position) -> str:
    """Names the modes whose curves say nothing, and lie on each other."""
    which = " and ".join(position.constant)
    return f" In {which} all samples have the same states: there is nothing to decode." if which else ""


def answer_of(findings: Findings, charts: Mapping[str, report.Chart]) -> report.Answer:
    """All of it on one page: the gain at the first position that has one, then position by position, then answers."""
    pictures = {p.name: [f"figures/{name}.png" for name in _names(p.name)] for p in findings.positions}
    drawn = {name: [report.titled([charts[key]]) for key in keys if key in charts] for name, keys in pictures.items()}
    answers = report.titled([charts[ANSWERS]]) + report.table([_answered(row) for row in findings.behaviour_table()])
    first = next((name for name, pieces in drawn.items() if pieces), "")
    sections = [
        report.Section(
            "Decodable with the image and without",
            f"Balanced accuracy of probes, mean of layers {findings.cliff.layers}. Delta is original minus "
            "blind_randomimage, with its 95 % interval by a paired bootstrap over images; p by Holm.",
            report.table([_probed(row) for row in findings.table])
            + "<p>What to hold that against: the 95th percentile of shuffled labels, a probe of the question's words, "
            "the accuracy above that of a random label per question (selectivity), the error of the gain by repeated "
            "folds, and the gain that would have been seen in 80 % of cases.</p>"
            + report.table([_against(row) for row in findings.table]),
        ),
        report.Section("The model's own answers", "", answers if first else ""),
    ]  # fmt: skip
    for position in findings.positions:
        flags = "".join(f"<p>{report.escape(flag)}</p>" for flag in position.flags)
        body = "".join(drawn[position.name][position.name == first :]) + flags
        sections += [report.Section(position.name, "", body)] if body else []
    labels = {label: findings.labels.count(label) for label in sorted(set(findings.labels))}
    conclusion = findings.conclusion()
    return report.Answer(
        "Probes with the image and without",
        "Can the answer be read off the model's states with the image better than with another one in its place, and "
        "does the model answer better with it?",
        conclusion, [{"answer": label, "questions": count} for label, count in labels.items()],
        drawn[first][0] if first else answers,
        further=[sentence for sentence in findings.sentences if sentence != conclusion],
        sections=[section for section in sections if section.body], left_out=findings.skipped,
    )  # fmt: skip


def _probed(row: Row) -> Row:
    """What probes read at a position, and what the gain is worth."""
    kept = {key: _number(row[key]) for key in ("position", "original", *BLIND)}
    gain = dict.fromkeys(("delta", "95 % interval", "p"), "–")
    if row["delta"] == row["delta"]:
        ends = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
        gain = dict(zip(gain, (f"{row['delta']:+.3f}", ends, f"{row['p_holm']:.2g}"), strict=True))
    return kept | gain | {"verdict": row["verdict"]}


def _against(row: Row) -> Row:
    """What the numbers of a position are to be held against."""
    names = {"shuffled_95": "shuffled labels", "words": "words", "selectivity": "selectivity",
             "fold_error": "fold error", "detectable": "detectable"}  # fmt: skip
    shown = {name: _number(row[key]) for key, name in names.items()}
    return {"position": row["position"]} | shown | {"samples": row["n"], "images": row["images"]}


def _answered(row: Row) -> Row:
    """A mode's score, and the original's paired gain over it; of the original itself, none."""
    score = {"mode": row["mode"], "score": f"{row['value']:.1%}"}
    score |= {"95 % interval": f"[{row['low']:.1%}, {row['high']:.1%}]"}
    gain = dict.fromkeys(("original's gain", "its interval", "p", "verdict"), "")
    if row["delta"] != "":
        ends = f"[{row['delta_low']:+.1%}, {row['delta_high']:+.1%}]"
        gain = dict(zip(gain, (f"{row['delta']:+.1%}", ends, f"{row['p']:.2g}", row["verdict"]), strict=True))
    return score | gain | {"unreadable": row["unparsable"], "cut off": row["cut"]}


def _number(value: object) -> str:
    """Three digits of a number; a dash where there is none."""
    return str(value) if not isinstance(value, float) else "–" if value != value else f"{value:.3f}"
