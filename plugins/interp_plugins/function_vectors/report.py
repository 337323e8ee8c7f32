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
from .page import accuracy_curves, heads_map, strongest
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

    def chosen(self, evaluation: Evaluation) -> float:
        """Accuracy with the vector after the layer that was chosen."""
        return evaluation.accuracies()[evaluation.layers.index(self.choice.layer)]


def sentences(findings: Findings) -> list[str]:
    """What came out, in words."""
    layer, zero, shuffled = findings.choice.layer, findings.zero, findings.shuffled
    swept = len(zero.layers) > 1
    why = "chosen on validation rows" if swept else "the only one evaluated"
    heads = ", ".join(f"z[{a},{b}]" for a, b, _ in findings.vector.heads[:5])
    words = ", ".join(word.strip() or repr(word) for word, _ in findings.words[:5])
    said = [
        f"With shots the model answers {findings.few:.0%} of {len(findings.task.test)} test rows; what follows is on "
        "those.",
        f"Without shots {zero.accuracy():.0%}; with the vector after layer {layer}, {why}, {findings.chosen(zero):.0%}"
        + (f" (the best layer here is {zero.best_layer}: {max(zero.accuracies()):.0%})." if swept else "."),
        f"After shots with shuffled answers {shuffled.accuracy():.0%}; with the vector {findings.chosen(shuffled):.0%}"
        + (f" (best layer {shuffled.best_layer}: {max(shuffled.accuracies()):.0%})." if swept else "."),
        f"Of the heads that the vector sums, those of largest AIE are {heads}; it sums "
        f"{len(findings.vector.heads)}, its length is {findings.vector.norm:.2f}, and it decodes to {words}.",
    ]
    if shuffled.accuracy() >= 0.9:
        said.append(
            "Shuffled answers do not hide this task from the model, so that AIE, which measures what is given back, "
            "has little to measure: heads shared by several tasks are a better choice."
        )
    return said


def layers_table(findings: Findings) -> list[dict[str, Any]]:
    """Accuracies without the vector, then after each layer, with 95 % intervals."""
    rows: list[dict[str, Any]] = [
        {"layer": "none", "zero-shot": findings.zero.accuracy(), "shuffled": findings.shuffled.accuracy()}
    ]
    for i, layer in enumerate(findings.zero.layers):
        row: dict[str, Any] = {"layer": layer}
        for name, evaluation in (("zero-shot", findings.zero), ("shuffled", findings.shuffled)):
            low, high = evaluation.bands()[i]
            row |= {name: evaluation.accuracies()[i], f"{name} low": low, f"{name} high": high}
        rows.append(row)
    columns = rows[-1]
    return [{key: row.get(key, "") for key in columns} for row in rows]


def heads_table(findings: Findings) -> list[dict[str, Any]]:
    """All heads, the largest AIE first, and whether the vector has them."""
    chosen = {(layer, head) for layer, head, _ in findings.vector.heads}
    return [{**head._asdict(), "in vector": (head.layer, head.head) in chosen} for head in ranking(findings.aie)]


def shots_table(baseline: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracies by number of shots, without a vector."""
    return [
        {"shots": int(n), **{f"top-{k}": share for k, share in row["clean_topk"]}, "perplexity": row["clean_ppl"]}
        for n, row in baseline.items()
    ]


def write_task(folder: ic.runs.Part, model: ic.Model, findings: Findings, args: Mapping[str, Any]) -> None:
    """Vector, tables, picture and page of one task."""
    folder.result("function_vector", findings.vector)
    folder.table("heads.csv", heads_table(findings))
    folder.table("accuracy_by_layer.csv", layers_table(findings))
    folder.table("decoded.csv", [{"token": word, "probability": p} for word, p in findings.words])
    folder.table("examples.csv", findings.examples)
    if findings.baseline:
        folder.table("baseline.csv", shots_table(findings.baseline))
    folder.figure("heads.png", _map(findings).png)
    folder.page("report.html", answer_of(findings, args), model)


def finding_of(findings: Findings) -> str:
    """Whether the vector makes the model do the task without shots, in a sentence."""
    zero, layer = findings.zero, findings.choice.layer
    before, after = zero.accuracy(), findings.chosen(zero)
    low, high = zero.bands()[zero.layers.index(layer)]
    numbers = f"without shots {after:.0%} of the answers are right (95 % interval {low:.0%} to {high:.0%})"
    numbers += f", {before:.0%} without the vector"
    if low <= before <= high:
        return f"The vector is not shown to make the model do {findings.task.name}: after layer {layer}, {numbers}."
    does = "makes the model do" if after > before else "keeps the model from doing"
    return (
        f"The vector of {len(findings.vector.heads)} heads {does} {findings.task.name}: after layer {layer}, {numbers}."
    )


def answer_of(findings: Findings, args: Mapping[str, Any]) -> report.Answer:
    """The page of one task."""
    note = "Layer after which the vector is added; bands of 95 %; dashed: without it."
    layers = percents(layers_table(findings))
    picture = accuracy_curves((findings.zero, findings.shuffled), findings.zero.layers, note).html()
    return report.Answer(
        f"Function vector: {findings.task.name}",
        f"Do a few heads carry the task {findings.task.name}, so that the sum of what they write makes the model do it "
        f"without examples? {findings.task}.",
        finding_of(findings),
        [{"query": row["query"], "answer": row["answer"]} for row in findings.examples if row["prompt"] == "zero-shot"],
        "<h3>Accuracy by layer</h3>" + (picture if len(findings.zero.layers) > 1 else report.table(layers)),
        further=sentences(findings), sections=sections(findings), rows=layers,
        details={"Settings of the published script": json.dumps(args, indent=2)}, whole="accuracy_by_layer.csv",
    )  # fmt: skip


def sections(findings: Findings) -> list[report.Section]:
    """What the page of one task has below its picture."""
    top = report.table(strongest(findings.aie, findings.vector.heads[:20]))
    last_gap = gap(findings.aie, len(findings.vector.heads))
    pages = [
        report.Section("Which heads carry the task",
            f"AIE of the last chosen head minus that of the next one: {last_gap:.3g}.", _map(findings).html() + top),
        report.Section(
            "Before and after",
            f"What the model says without the vector, and with it after layer {findings.choice.layer}: with no shots, "
            "and after shots with shuffled answers.",
            report.table([{**row, "hit": "✓" * (row["with vector"] == row["answer"])} for row in findings.examples]),
        ),
        report.Section(
            "What the vector says", "Likeliest tokens when it is read out alone.",
            report.table([{"token": report.visible(word), "probability": p} for word, p in findings.words]),
        ),
    ]  # fmt: skip
    if findings.baseline:
        pages.append(report.Section("With shots, without a vector", "", report.table(shots_table(findings.baseline))))
    return pages


def write_all(folder: ic.runs.RunFolder, model: ic.Model, done: Sequence[Findings], related: Related) -> Path:
    """Table, picture and page of several tasks."""
    folder.table("tasks.csv", related.table())
    alike = report.Heatmap(
        related.similarity, related.tasks, related.tasks, diverging=True, limits=(-1, 1), title="Similarity"
    )
    folder.figure("similarity.png", alike.png)
    rows = [
        {
            "task": each.task.name, "test rows": len(each.task.test), "with shots": each.few,
            "without": each.zero.accuracy(), "with vector": each.chosen(each.zero), "layer": each.choice.layer,
            "shuffled": each.shuffled.accuracy(), "shuffled with vector": each.chosen(each.shuffled),
        }
        for each in done
    ]  # fmt: skip
    # the last two lines say what the table does not: heads and layer, and how many answers are turned
    shared = "<pre>" + report.escape("\n".join(str(related).splitlines()[-2:])) + "</pre>"
    names = [each.task.name for each in done]
    links = " · ".join(f"<a href='{report.escape(name)}/report.html'>{name}</a>" for name in names)
    answer = report.Answer(
        f"Function vectors of {len(done)} tasks",
        "Does each task's own vector make the model do the task without examples, and what do the tasks share? The "
        "layer of each is chosen on validation rows.",
        finding_of_tasks(done),
        [{"task": each.task.name, "test rows": len(each.task.test)} for each in done],
        report.table(percents(rows)) + links,
        sections=[
            report.Section("One set of heads for all, differences, similarities", "", f"{shared}{related.html()}")
        ],
    )  # fmt: skip
    folder.page("report.html", answer, model)
    return folder.path / "report.html"


def finding_of_tasks(done: Sequence[Findings]) -> str:
    """Which task gains most by its vector without shots, and which least."""
    gains = {each.task.name: each.chosen(each.zero) - each.zero.accuracy() for each in done}
    named = {each.task.name: f"{each.zero.accuracy():.0%} to {each.chosen(each.zero):.0%}" for each in done}
    best, worst = max(gains, key=lambda name: gains[name]), min(gains, key=lambda name: gains[name])
    return f"Without shots the vectors gain most at {best} ({named[best]}) and least at {worst} ({named[worst]})."


def percents(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a page: shares as percents."""
    return [{key: f"{v:.0%}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]


def _map(findings: Findings) -> report.Heatmap:
    note = "Probability of the answer that each head's mean gives back, where the shots' answers are shuffled; the mean"
    return heads_map(findings.aie, f"Heads of {findings.task.name}", f"{note} over prompts (AIE).")
