"""A run over the questions of a relation: everything is read and checked, then the model loaded, then one by one.

    out/questions/<Q>/    files of a question, see `question`; <Q> is its id where that is a plain name
    out/summary.csv       a row per question
    out/failures.json     what went wrong, by stage and class of error
    out/summary.html      both, with layers and heads

`out` is a run folder and every question a part of it (`interp_core.runs`), whose state `qid_status.json` tells in the
published form. The summary is of all questions that the folder holds, and is written after each. Questions that are
completed are left alone, and the model is not loaded for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import interp_core as ic
from interp_core import runs

from .draws import BadRows, Skipped, Work, draw
from .page import QUESTIONS, state_of, write_summary
from .question import fix, run_question, write_trials
from .settings import FREE, RelationSettings
from .source import Question, chosen, read_relation
from .tables import Row

STATUS = "qid_status.json"
Say = Callable[[str], None]


def run_relation(
    settings: RelationSettings, tokenizer: Any, load: Callable[[], ic.Model], say: Say = lambda line: None
) -> Path:
    """Run the questions that are asked for; returns the page.

    Args:
        tokenizer: the model's, for all that comes before the model.
        load: gives the model, when it is needed.
        say: gets a line about every question.

    Raises:
        LoadError, PlanError: a table, settings or folder that cannot be used; or no question could be run.
        InterpError: a question's, with `on_error="stop"`.
    """
    settings.check()
    questions = read_relation(
        settings.relation_csv, q_column=settings.q_column, a_column=settings.a_column, b_column=settings.b_column,
        numbers=settings.numbers,
    )  # fmt: skip
    picked = chosen(questions, settings.chosen, settings.max_questions)
    run = runs.open(
        settings.out, settings, recipe="fv_relation", dataset=settings.relation_csv.stem, free=FREE,
        say=lambda line: None,
    )  # fmt: skip
    parts = {question.q_id: _part(run, question, settings) for question in questions}
    with run:
        listed = [_drawn(question, parts[question.q_id], settings, tokenizer, say) for question in picked]
        todo = [work for work in listed if work is not None]
        model = load() if todo and not settings.dry_run else None
        if model is not None:
            layers = settings.check_model(model)
            run.bind(model)
            for work in todo:
                _run(model, work, parts[work.question.q_id], settings, layers, say)
                write_summary(run, model)
        page = write_summary(run, model)
        states = [parts[question.q_id] for question in picked]
        failed = [part for part in states if part.state == "failed"]
        if failed and len(failed) == len(states):
            raise ic.PlanError(f"no question could be run: {failed[0].data['reason']}. All of them are in {page}")
    return page


def _part(run: runs.RunFolder, question: Question, settings: RelationSettings) -> runs.Part:
    """A question as a part of the run, which depends on its pairs.

    Raises:
        PlanError: its numbers are of other pairs, or of a version that had no run folders.
    """
    config = settings.config(question)

    def tell(part: runs.Part) -> None:
        part.put({STATUS: runs.json_text(_status(part, config))}, binds=False)

    part = run.part(
        question.q_id, {"pairs": question.digest}, f"{QUESTIONS}/{question.folder}", watch=tell,
    )  # fmt: skip
    part.claim([STATUS])
    part.data |= {"q_row_count": len(question), "config": config}
    part.data.setdefault("expected_layers", None)
    return part


def _status(part: runs.Part, config: Row) -> Row:
    """The state of a question, as `qid_status.json` has it.

    pending → running → completed | failed        skipped (too few rows)        dry_run (trials drawn, no model)
    """
    data = part.data
    status: Row = {
        "q_id": part.name, "status": state_of(data), "reason": data["reason"], "created_at": data["created"],
        "updated_at": data["updated"], "config": config, "q_row_count": data["q_row_count"], "q_root": part.prefix,
        "expected_layers": data["expected_layers"],
    }  # fmt: skip
    if "error" in data:
        status["error"] = {key: value for key, value in data["error"].items() if key != "traceback"}
    return status | ({"dropped_rows": data["dropped_rows"]} if data.get("dropped_rows") else {})


def _drawn(question: Question, part: runs.Part, settings: RelationSettings, tokenizer: Any, say: Say) -> Work | None:
    """What there is to do for a question, if anything; its state is noted."""
    if part.state == "completed" and not part.damaged():
        say(f"{question.q_id}: completed before")
        return None
    work, part.doing = None, "rows"
    try:
        work = draw(question, settings, tokenizer, part.path)
        part.data["dropped_rows"] = [str(problem) for problem in work.dropped]
        part.doing = "trials"
        if settings.dry_run:
            write_trials(work, part, binds=part.has_files)
        part.set("dry_run" if settings.dry_run else "pending", expected_layers=settings.layers)
    except Skipped as few:
        part.set("skipped", str(few))
    except Exception as error:
        part.doing = "rows" if isinstance(error, BadRows) else "trials"
        part.fail(error, **_details(part, error))
        _failed(part, say)
        if settings.on_error == "stop":
            raise
    if part.state in ("skipped", "dry_run"):
        say(f"{question.q_id}: {part.state} {part.data['reason']}".rstrip())
    return work


def _run(
    model: ic.Model, work: Work, part: runs.Part, settings: RelationSettings, layers: Sequence[int], say: Say
) -> None:
    """A question from where it is to its end."""
    try:
        with part.attempt(
            strict=settings.on_error == "stop", details=lambda error: _details(part, error),
            expected_layers=list(layers),
        ):  # fmt: skip
            summary = run_question(model, work, settings, layers, part)
    finally:
        if part.state == "failed":
            _failed(part, say)
    if part.state == "completed":
        best = summary["per_layer"][str(summary["best_layer"])]
        say(
            f"{part.name}: completed, best layer {summary['best_layer']}, {settings.score_key} "
            f"{summary['best_score']:+.3f}, accuracy {best['acc_base']:.0%} → {best['acc_with']:.0%}"
        )


def _details(part: runs.Part, error: Exception) -> Row:
    """What is noted of an error: what to do about it, and of which rows it is."""
    problems = [str(problem) for problem in getattr(error, "problems", ())]
    return {"fix": fix(part.doing, error)} | ({"rows": problems} if problems else {})


def _failed(part: runs.Part, say: Say) -> None:
    say(f"{part.name}: failed, {part.data['reason']}")
