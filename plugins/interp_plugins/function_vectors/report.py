"""Tables, pictures and pages of what the recipe `function_vectors` works out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import interp_core as ic
from interp_core import report

from .effects import gap, ranking
from .evaluate import Evaluation
from .page import accuracy_curves, heads_map
from .related import Choice, Related
from .tasks import Task
from .vectors import FunctionVector


@dataclass(frozen=True)
class Findings:
    """What came out for one task.

    Attributes:
        task: the task.
        aie: average indirect effect.
        mean: mean activations.
        vector: the vector, with its layer.
        choice: that layer, and the validation accuracy there.
        few: accuracy with shots.
        zero, shuffled: accuracies without and with the vector, on rows that it answers with shots.
        baseline: the published form, by number of shots.
        words: what the vector decodes to.
        examples: what the model said, without and with the vector.
    """

    task: Task
    aie: Tensor
    mean: Tensor
    vector: FunctionVector
    choice: Choice
    few: float
    zero: Evaluation
    shuffled: Evaluation
    baseline: Mapping[str, Mapping[str, Any]]
    words: Sequence[tuple[str, float]]
    examples: Sequence[Mapping[str, Any]]


def sentences(found: Findings) -> list[str]:
    """What came out, in words."""
    layer, zero, shuffled = found.choice.layer, found.zero, found.shuffled
    at, swept = zero.layers.index(layer), len(zero.layers) > 1
    why = "chosen on validation rows" if swept else "the only one evaluated"
    heads = ", ".join(f"L{a}H{b}" for a, b, _ in found.vector.heads[:5])
    words = ", ".join(word.strip() or repr(word) for word, _ in found.words[:5])
    said = [
        f"With shots the model answers {found.few:.0%} of {len(found.task.test)} test rows; what follows is on those.",
        f"Without shots {zero.accuracy():.0%}; with the vector after layer {layer}, {why}, {zero.accuracies()[at]:.0%}"
        + (f" (the best layer here is {zero.best_layer}: {max(zero.accuracies()):.0%})." if swept else "."),
        f"After shots with shuffled answers {shuffled.accuracy():.0%}; with the vector {shuffled.accuracies()[at]:.0%}"
        + (f" (best layer {shuffled.best_layer}: {max(shuffled.accuracies()):.0%})." if swept else "."),
        f"Heads of largest AIE: {heads}; the vector sums {len(found.vector.heads)}, its length is "
        f"{found.vector.norm:.2f}, and it decodes to {words}.",
    ]
    if shuffled.accuracy() >= 0.9:
        said.append(
            "Shuffled answers do not hide this task from the model, so that AIE, which measures what is given back, "
            "has little to measure: heads shared by several tasks are a better choice."
        )
    return said


def layers_table(found: Findings) -> list[dict[str, Any]]:
    """Accuracies without the vector, then after each layer, with 95 % intervals."""
    rows: list[dict[str, Any]] = [
        {"layer": "none", "zero-shot": found.zero.accuracy(), "shuffled": found.shuffled.accuracy()}
    ]
    for i, layer in enumerate(found.zero.layers):
        row: dict[str, Any] = {"layer": layer}
        for name, one in (("zero-shot", found.zero), ("shuffled", found.shuffled)):
            low, high = one.bands()[i]
            row |= {name: one.accuracies()[i], f"{name} low": low, f"{name} high": high}
        rows.append(row)
    columns = rows[-1]
    return [{key: row.get(key, "") for key in columns} for row in rows]


def heads_table(found: Findings) -> list[dict[str, Any]]:
    """All heads, the largest AIE first, and whether the vector has them."""
    chosen = {(layer, head) for layer, head, _ in found.vector.heads}
    return [{**one._asdict(), "in vector": (one.layer, one.head) in chosen} for one in ranking(found.aie)]


def shots_table(baseline: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracies by number of shots, without a vector."""
    return [
        {"shots": int(n), **{f"top-{k}": share for k, share in one["clean_topk"]}, "perplexity": one["clean_ppl"]}
        for n, one in baseline.items()
    ]


def write_task(folder: ic.runs.Part, model: ic.Model, found: Findings, args: Mapping[str, Any]) -> None:
    """Vector, tables, picture and page of one task."""
    folder.result("function_vector", found.vector)
    folder.table("heads.csv", heads_table(found))
    folder.table("accuracy_by_layer.csv", layers_table(found))
    folder.table("decoded.csv", [{"token": word, "probability": p} for word, p in found.words])
    folder.table("examples.csv", found.examples)
    if found.baseline:
        folder.table("baseline.csv", shots_table(found.baseline))
    folder.figure("heads.png", _map(found).png)
    made = report.Section("How it was made", "", f"<pre>{report.escape(json.dumps(args, indent=2))}</pre>")
    page = report.page(f"Function vector: {found.task.name}", repr(model), [*sections(found), made])
    folder.put({"report.html": page})


def sections(found: Findings) -> list[report.Section]:
    """The page of one task."""
    said = "".join(f"<li>{report.escape(line)}</li>" for line in sentences(found))
    top = report.table([{"layer": a, "head": b, "AIE": aie} for a, b, aie in found.vector.heads[:20]])
    last_gap = f"AIE of the last chosen head minus that of the next one: {gap(found.aie, len(found.vector.heads)):.3g}."
    note = "Layer after which the vector is added; bands of 95 %; dashed: without it."
    chart = accuracy_curves((found.zero, found.shuffled), found.zero.layers, note).html()
    if len(found.zero.layers) == 1:
        chart = report.table(percents(layers_table(found)))
    pages = [
        report.Section("What came out", str(found.task), f"<ul>{said}</ul>"),
        report.Section("Which heads carry the task", last_gap, _map(found).html() + top),
        report.Section("Accuracy by layer", "Test rows that the model answers with shots.", chart),
        report.Section(
            "Before and after",
            f"What the model says without the vector, and with it after layer {found.choice.layer}: with no shots, and "
            "after shots with shuffled answers.",
            report.table([{**row, "hit": "✓" * (row["with vector"] == row["answer"])} for row in found.examples]),
        ),
        report.Section(
            "What the vector says", "Likeliest tokens when it is read out alone.",
            report.table([{"token": report.visible(word), "probability": p} for word, p in found.words]),
        ),
    ]  # fmt: skip
    if found.baseline:
        pages.append(report.Section("With shots, without a vector", "", report.table(shots_table(found.baseline))))
    return pages


def write_all(folder: ic.runs.RunFolder, model: ic.Model, done: Sequence[Findings], found: Related) -> Path:
    """Table, picture and page of several tasks."""
    folder.table("tasks.csv", found.table())
    names, ends = found.tasks, (-1, 1)
    alike = report.Heatmap(found.similarity, names, names, diverging=True, limits=ends, title="Similarity")
    folder.figure("similarity.png", alike.png)
    rows = [
        {
            "task": one.task.name, "test rows": len(one.task.test), "with shots": one.few,
            "without": one.zero.accuracy(),
            "with vector": one.zero.accuracies()[one.zero.layers.index(one.choice.layer)], "layer": one.choice.layer,
            "shuffled": one.shuffled.accuracy(),
            "shuffled with vector": one.shuffled.accuracies()[one.shuffled.layers.index(one.choice.layer)],
        }
        for one in done
    ]  # fmt: skip
    links = " · ".join(f"<a href='{report.escape(one.task.name)}/report.html'>{one.task.name}</a>" for one in done)
    pages = [
        report.Section(
            "Each task with its own heads",
            "The layer is chosen on validation rows.",
            report.table(percents(rows)) + links,
        ),
        report.Section("One set of heads for all, differences, similarities", "", f"{_pre(found)}{found.html()}"),
    ]
    folder.put({"report.html": report.page(f"Function vectors of {len(done)} tasks", repr(model), pages)})
    return folder.path / "report.html"


def percents(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a page: shares as percents."""
    return [{key: f"{v:.0%}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]


def _pre(found: Related) -> str:
    return f"<pre>{report.escape(chr(10).join(str(found).splitlines()[-2:]))}</pre>"


def _map(found: Findings) -> report.Heatmap:
    note = "Probability of the answer that each head's mean gives back, where the shots' answers are shuffled; the mean"
    return heads_map(found.aie, f"Heads of {found.task.name}", f"{note} over prompts (AIE).")
