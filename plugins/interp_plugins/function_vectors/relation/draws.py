"""What a question asks: its rows checked against the tokenizer, trials drawn, and the prompts of the evaluation.

Trials are those of `relation_trials`, from a `random.Random(seed)` of the question's own, so that a question gets the
same whichever others are run. The evaluation asks the trials' queries without demonstrations ("Q: x", "A:"), in the
trials' order; with `held_out`, pairs that no trial shows, drawn by another stream.

Everything here needs the tokenizer alone, and happens before a model runs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import interp_core as ic

from ..files.trials import Trial, Trials
from ..files.trials_json import prompt_data, spaced
from ..prompts import Prompt, build, target_ids
from ..tasks import Task
from ..template import Template
from ..trials import relation_trials
from .settings import RelationSettings
from .source import Problem, Question
from .tables import Row


class Skipped(Exception):
    """A question has too few rows."""


class BadRows(ic.PlanError):
    """A question has rows that cannot be used.

    Attributes:
        problems: which, and why.
    """

    def __init__(self, question: Question, problems: Sequence[Problem]) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(
            f"question {question.q_id!r}: {problems[0]}{more}. Correct the table, or leave bad rows out with "
            "bad_rows=drop"
        )
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Work:
    """A question ready to be run.

    Attributes:
        question: whose work it is.
        trials: clean and corrupted prompts.
        asked: prompts without demonstrations.
        sources: which row of the question each row of the trials' task is.
        asked_sources: which row of the question each asked prompt is.
        folder: where its files go.
        dropped: rows that were left out.
    """

    question: Question
    trials: Trials
    asked: tuple[Prompt, ...]
    sources: tuple[int, ...]
    asked_sources: tuple[int, ...]
    folder: Path
    dropped: tuple[Problem, ...] = ()

    @cached_property
    def sampled(self) -> Row:
        """`sampled_trials.json`."""
        assert self.trials.slots is not None
        template, front = self.trials.slots.template, self.trials.slots.front.text
        return self._file([self._trial(trial, template, front) for trial in self.trials])

    @cached_property
    def zeroshot(self) -> Row:
        """`sampled_trials_zeroshot.json`."""
        return self._file(
            [
                {
                    "q_id": self.question.q_id, "trial_id": number, "query_source_index": source,
                    "query": self.question.pairs[source]._asdict(), "prompt_str": prompt.text, **_answer(prompt),
                }
                for number, (prompt, source) in enumerate(zip(self.asked, self.asked_sources, strict=True))
            ]
        )  # fmt: skip

    def _file(self, trials: list[Row]) -> Row:
        meta = self.trials.meta
        kept = (
            "seed", "rng", "prefixes", "separators", "model_name_for_tokenizer", "model_prepend_bos",
            "prepend_bos_token_used",
        )  # fmt: skip
        named = {
            "csv_path": meta["dataset_json"], "q_list": [self.question.q_id], "n_trials_per_q": len(self.trials),
            "n_demos_requested": meta["n_shots"], "n_demos": meta["n_shots"], "csv_rows": list(self.question.rows),
        }  # fmt: skip
        return {"meta": named | {key: meta[key] for key in kept}, "trials": trials}

    def _trial(self, trial: Trial, template: Template, front: str) -> Row:
        row: Row = {
            "q_id": self.question.q_id, "trial_id": trial.number,
            "query_source_index": self.sources[trial.query_index],
            "demo_source_indices": [self.sources[row] for row in trial.demo_indices],
            "demo_order": list(range(len(trial.demos))), "query": trial.query._asdict(),
        }  # fmt: skip
        kinds = {"clean": (trial.demos, trial.clean), "corrupted": (trial.corrupted_demos, trial.corrupted)}
        for kind, (demos, prompt) in kinds.items():
            row[f"demos_{kind}"] = [pair._asdict() for pair in demos]
            row[f"{kind}_prompt_str"] = prompt.text
            row[f"prompt_data_{kind}"] = prompt_data(
                template, front, [spaced(template, pair) for pair in demos], spaced(template, trial.query)
            )
        return row | _answer(trial.clean)


def _answer(prompt: Prompt) -> Row:
    return {
        "target_str": prompt.target, "answer_ids": list(prompt.target_ids),
        "target_first_token_id": prompt.target_ids[0],
    }  # fmt: skip


def draw(question: Question, settings: RelationSettings, tokenizer: Any, folder: Path) -> Work:
    """Trials and prompts of a question.

    Raises:
        BadRows: rows that cannot be used, and are not to be left out.
        Skipped: fewer rows than demonstrations, a query and held-out pairs need.
        TextError: slots of a prompt do not align, or it is too long.
    """
    template = settings.template(tokenizer)
    problems = (*question.problems, *_unanswerable(question, template, tokenizer))
    if problems and settings.bad_rows == "fail":
        raise BadRows(question, problems)
    bad = {problem.row for problem in problems}
    kept = [index for index, row in enumerate(question.rows) if row not in bad]
    needed = settings.n_demos + 1 + settings.held_out
    if len(kept) < needed:
        without = f" without {len(question) - len(kept)} bad ones" if len(kept) < len(question) else ""
        held = f" and {settings.held_out} held out" if settings.held_out else ""
        raise Skipped(f"{len(kept)} rows{without}; {settings.n_demos} demonstrations, a query{held} need {needed}")
    # a stream of its own: trials of the rows that are left are drawn as if nothing were held out
    held_out = sorted(random.Random(f"held out {settings.seed}").sample(kept, settings.held_out))
    sources = tuple(index for index in kept if index not in held_out)
    task = Task.of(question.q_id, [question.pairs[i] for i in sources], source=str(settings.relation_csv))
    trials = relation_trials(
        task, tokenizer, template=template, n_trials=settings.n_trials, n_demos=settings.n_demos, seed=settings.seed
    )
    trials = replace(trials, meta={**trials.meta, "model_name_for_tokenizer": settings.model})
    asked_sources = tuple(held_out or (sources[trial.query_index] for trial in trials))
    zeroshot_prompts = tuple(build(tokenizer, template, [], question.pairs[i], None) for i in asked_sources)
    return Work(question, trials, zeroshot_prompts, sources, asked_sources, folder, problems)


def _unanswerable(question: Question, template: Template, tokenizer: Any) -> list[Problem]:
    """Outputs that do not continue their prompt."""
    front, problems = template.front(tokenizer), []
    bad = {problem.row for problem in question.problems}
    for pair, row in zip(question.pairs, question.rows, strict=True):
        if row in bad:
            continue
        prompt = "".join(part.text for part in template.parts([], pair.input, front.text))
        try:
            target_ids(tokenizer, prompt, template.spaced(pair.output), special=front.added, where=repr(pair.input))
        except ic.TextError as error:
            problems.append(Problem(row, question.columns[1], str(error)))
    return problems
