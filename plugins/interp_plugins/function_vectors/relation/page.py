"""The summary of a run, from the files of its questions: a table, what went wrong, and a page with layers and heads."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import interp_core as ic
from interp_core import runs
from interp_core.report import Answer, Heatmap, Section, short, table

from ..._json_files import json_rows
from .injected import SUMMARY
from .question import STAGES
from .tables import Row, csv_table, read_json

QUESTIONS = "questions"
COLUMNS = (
    "q_id", "status", "rows", "trials", "acc_clean", "acc_corrupted", "acc_base", "acc_with", "delta_acc", "best_layer",
    "score_key", "best_score", "top_head", "folder", "reason",
)  # fmt: skip
"""Of `summary.csv`. Accuracies are shares of prompts whose first answer token is the likeliest: with demonstrations, as
they are and with shuffled answers (where the two are near, effects of heads have little to restore); without
demonstrations, without the vector (`acc_base`) and with it at the best layer (`acc_with`)."""
_SHOWN = {
    "q_id": "question", "status": "status", "rows": "rows", "trials": "trials", "acc_clean": "with demonstrations",
    "acc_corrupted": "shuffled", "acc_base": "without", "acc_with": "with vector", "best_layer": "best layer",
    "best_score": "score", "top_head": "first head",
}  # fmt: skip


def write_summary(run: runs.RunFolder, model: ic.Model | None = None) -> Path:
    """Write `summary.csv`, `failures.json` and `summary.html`; returns the page.

    Args:
        model: None where it was not loaded.
    """
    out, parts = run.path, sorted(run.parts(), key=_natural)
    rows = [_row(out, part) for part in parts]
    groups = classified(parts)
    failures = {"n_failed": sum(group["count"] for group in groups), "classes": groups}
    files: dict[str, str | bytes] = {"summary.csv": csv_table(rows)} if rows else {}
    files |= {"failures.json": runs.json_text(failures)}
    for name, content in files.items():
        run.put({name: content}, binds=False)
    run.page("summary.html", _answer(out, parts, rows, groups), model, binds=False)
    return out / "summary.html"


def _natural(part: Mapping[str, Any]) -> list[tuple[int, str]]:
    """For sorting: Q2 before Q10."""
    pieces = re.split(r"(\d+)", part["name"])
    return [(int(piece) if piece.isdecimal() else -1, piece) for piece in pieces]


def classified(parts: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Failures by stage and class of error, in the order of the stages.

    Args:
        parts: records of the run's parts.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for part in parts:
        if part["state"] == "failed":
            error = part["error"]
            groups.setdefault((error["stage"], error["error_class"]), []).append(part)
    return [
        {
            "stage": stage, "error_class": kind, "count": len(group), "q_ids": [part["name"] for part in group],
            "messages": [part["error"]["message"] for part in group],
            "rows": [f"{part['name']}: {row}" for part in group for row in part["error"].get("rows", ())],
            "fix": group[0]["error"]["fix"],
        }
        for (stage, kind), group in sorted(groups.items(), key=lambda item: (STAGES.index(item[0][0]), item[0][1]))
    ]  # fmt: skip


def _row(out: Path, part: Mapping[str, Any]) -> Row:
    """A question in the summary; what it has no numbers for is empty."""
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {"q_id": part["name"], "status": state_of(part), "rows": part["q_row_count"]}
    row |= {"folder": part["folder"], "reason": part["reason"]}
    if part["state"] != "completed":
        return row
    folder = out / part["folder"]
    summary = read_json(folder / SUMMARY)
    best, first = summary["per_layer"][str(summary["best_layer"])], read_json(folder / "top_heads.json")["heads"][0]
    lines = [line for _, line in json_rows(folder / "trial_metrics.jsonl")]
    row |= {key: summary[key] for key in ("best_layer", "score_key", "best_score")}
    row |= {key: best[key] for key in ("acc_base", "acc_with", "delta_acc")}
    row |= {f"acc_{kind}": fmean(line[f"accuracy_{kind}"] for line in lines) for kind in ("clean", "corrupted")}
    return row | {"trials": len(lines), "top_head": f"z[{first['layer']},{first['head']}]"}


def state_of(part: Mapping[str, Any]) -> str:
    """As the published files call it: a question that was stopped is still to be done."""
    return "pending" if part["state"] == "stopped" else str(part["state"])


def finding_of(rows: Sequence[Row]) -> str:
    """At how many questions the vector helps, and at which most; from the table."""
    done = [row for row in rows if row["status"] == "completed"]
    if not done:
        return "No question is completed yet."
    helped, best = sum(row["delta_acc"] > 0 for row in done), max(done, key=lambda row: row["delta_acc"])
    said = "With its vector the model answers more prompts right without demonstrations at "
    said += f"{helped} of {len(done)} questions"
    if not helped:
        return f"{said}."
    which = f"{short(best['q_id'], 40)}, from {best['acc_base']:.0%} to {best['acc_with']:.0%}"
    return f"{said}, most at {which} after layer {best['best_layer']}; the layer was chosen on the same prompts."


def _answer(out: Path, statuses: Sequence[Mapping[str, Any]], rows: Sequence[Row], groups: Sequence[Row]) -> Answer:
    done = [status for status in statuses if status["state"] == "completed"]
    counts = Counter(map(state_of, statuses))
    said = f"{len(statuses)} questions: {', '.join(f'{count} {name}' for name, count in counts.items()) or 'none'}."
    about = (
        "Share of prompts whose answer's first token is the likeliest: with demonstrations, with their answers "
        "shuffled, without demonstrations, and with the vector added at the best layer, which is that of the largest "
        f"score ({done[0]['config']['score_key'] if done else 'none yet'})."
    )
    shown = [{name: _text(key, row[key]) for key, name in _SHOWN.items()} for row in rows]
    sections = [Section("Questions", about, table(shown))]
    sections += [Section("Heads", "", _head_map(out, done))] if done else []
    failed = [
        {"stage": group["stage"], "error": group["error_class"], "questions": ", ".join(map(short, group["q_ids"])),
         "what": "\n".join(group["rows"] or group["messages"]), "fix": group["fix"]}
        for group in groups
    ]  # fmt: skip
    skipped = [{"question": short(s["name"], 40), "why": s["reason"]} for s in statuses if s["state"] == "skipped"]
    dropped = [
        {"question": short(status["name"], 40), "rows": "\n".join(status["dropped_rows"])}
        for status in statuses
        if status.get("dropped_rows")
    ]
    listed = {"Failures": failed, "Skipped": skipped, "Rows left out": dropped}
    sections += [Section(title, "", table(lines)) for title, lines in listed.items() if lines]
    return Answer(
        "Function vectors of a relation",
        "Does the vector of each question's best heads make the model answer prompts without demonstrations, and after "
        f"which layer best? {said}",
        finding_of(rows),
        [{"question": short(status["name"], 40), "rows": status["q_row_count"]} for status in statuses],
        f"<h3>Layers</h3>{_layers(out, done)}" if done else "", sections=sections,
    )  # fmt: skip


def _text(key: str, value: Any) -> str:
    """A cell of the table on the page."""
    if key.startswith("acc_") and value != "":
        return f"{100 * value:.0f}%"
    return f"{value:+.4f}" if isinstance(value, float) else short(str(value), 40)


def _layers(out: Path, done: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of every question without the vector and with it at each layer."""
    summaries = [read_json(out / status["folder"] / SUMMARY) for status in done]
    layers = list(summaries[0]["per_layer"])
    values, tips = [], []
    for summary in summaries:
        evaluations = [summary["per_layer"][layer] for layer in layers]
        key = summary["score_key"]
        values.append([evaluations[0]["acc_base"], *(layer["acc_with"] for layer in evaluations)])
        tips.append(["without the vector", *(f"{key} {layer[key]:+.4f}" for layer in evaluations)])
    texts = [[f"{100 * value:.0f}%" for value in row] for row in values]
    names = [short(status["name"], 40) for status in done]
    note = "Accuracy on prompts without demonstrations: without the vector, and with it added after each layer."
    columns = ["without", *layers]
    return Heatmap(values, names, columns, texts=texts, tips=tips, limits=(0.0, 1.0), caption=note).html()


def _head_map(out: Path, done: Sequence[Mapping[str, Any]]) -> str:
    """Each head's average effect, the mean over questions."""
    key = done[0]["config"]["score_key"]
    scores: dict[tuple[int, int], list[float]] = {}
    for status in done:
        with (out / status["folder"] / "aie_scores.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                scores.setdefault((int(row["layer"]), int(row["head"])), []).append(float(row[key]))
    layers, heads = (sorted({place[axis] for place in scores}) for axis in (0, 1))
    values = [[fmean(scores.get((layer, head), [0.0])) for head in heads] for layer in layers]
    note = (
        f"{key} of every head, patched alone at the last token of corrupted prompts: mean over {len(done)} questions."
    )
    rows, columns = [f"layer {layer}" for layer in layers], [f"{head}" for head in heads]
    return Heatmap(values, rows, columns, diverging=True, caption=note).html()
