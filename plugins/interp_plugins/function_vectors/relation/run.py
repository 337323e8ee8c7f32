"""A run over the questions of a relation: everything is read and checked, then the model loaded, then one by one.

    out/questions/<Q>/    files of a question, see `stages`; <Q> is its id where that is a plain name
    out/summary.csv       a row per question
    out/failures.json     what went wrong, by stage and class of error
    out/summary.html      both, with layers and heads

The summary is of all questions that the folder holds, and is written after each. Questions that are completed are left
alone, and the model is not loaded for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import interp_core as ic

from .draws import BadRows, Skipped, Work, draw
from .page import write_summary
from .settings import RelationSettings
from .source import Question, chosen, read_relation
from .stages import is_complete, run_question, write_trials
from .status import QUESTIONS, Status, refuse_changes
from .tables import Row

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
    refuse_changes(settings.out, {question.q_id: settings.config(question) for question in questions})
    listed = [_drawn(question, settings, tokenizer, say) for question in picked]
    todo = [(work, status) for work, status in listed if work is not None]
    if todo and not settings.dry_run:
        model = load()
        layers = settings.check_model(model)
        for work, status in todo:
            _run(model, work, status, settings, layers, say)
            write_summary(settings.out)
    page = write_summary(settings.out)
    failed = [status for _, status in listed if status.name == "failed"]
    if failed and len(failed) == len(listed):
        raise ic.PlanError(f"no question could be run: {failed[0].data['reason']}. All of them are in {page}")
    return page


def _drawn(question: Question, settings: RelationSettings, tokenizer: Any, say: Say) -> tuple[Work | None, Status]:
    """What there is to do for a question, if anything, and its state."""
    folder = settings.out / QUESTIONS / question.folder
    status = Status.of(folder, question.q_id, len(question), settings.config(question))
    if status.name == "completed" and is_complete(folder, status.data["expected_layers"]):
        say(f"{question.q_id}: completed before")
        return None, status
    try:
        work = draw(question, settings, tokenizer, folder)
        dropped: Row = {"dropped_rows": [str(problem) for problem in work.dropped]} if work.dropped else {}
        if settings.dry_run:
            write_trials(work)
        status.data["expected_layers"] = settings.layers
        status.set("dry_run" if settings.dry_run else "pending", **dropped)
    except Skipped as few:
        work = None
        status.set("skipped", str(few))
    except Exception as error:
        work, status.stage = None, "rows" if isinstance(error, BadRows) else "trials"
        _failed(status, error, settings, say)
    if status.name in ("skipped", "dry_run"):
        say(f"{question.q_id}: {status.name} {status.data['reason']}".rstrip())
    return work, status


def _run(
    model: ic.Model, work: Work, status: Status, settings: RelationSettings, layers: Sequence[int], say: Say
) -> None:
    """A question from where it is to its end, noted in its status."""
    kept: Row = {"dropped_rows": status.data["dropped_rows"]} if "dropped_rows" in status.data else {}
    status.set("running", **kept, expected_layers=list(layers))
    try:
        found = run_question(model, work, settings, layers, status)
    except KeyboardInterrupt:
        status.set("pending", f"stopped at {status.stage}", **kept)
        raise
    except Exception as error:
        _failed(status, error, settings, say)
        return
    status.set("completed", **kept)
    best = found["per_layer"][str(found["best_layer"])]
    say(
        f"{work.question.q_id}: completed, best layer {found['best_layer']}, {settings.score_key} "
        f"{found['best_score']:+.3f}, accuracy {best['acc_base']:.0%} → {best['acc_with']:.0%}"
    )


def _failed(status: Status, error: Exception, settings: RelationSettings, say: Say) -> None:
    status.fail(error)
    say(f"{status.data['q_id']}: failed, {status.data['reason']}")
    if settings.on_error == "stop":
        raise error
