"""Phase 1 of a study of visual tokens: causal curves, truncation, geometry, and gates that come to a verdict.

    interp run visual_phase1 --model toy:vision --profile smoke --out DIR
    interp run visual_phase1 --model PATH --dataset chartqa --data_path FOLDER --adaptive_tau --tau_ratio 0.1
    interp run visual_phase1 --config FILE

writes into DIR (none: results/{model}/{dataset}/{timestamp}-visual_phase1-{hash})

    visual_phase1.html      the page: verdict, gates, sentences, curves, an image with its visual tokens
    thresholds.json         what the gates demand, with its hash; written before anything runs
    samples.json            pilots and further samples with their donors; what could not be used, and why
    sanity.json             the battery of `ic.visual_check` on every sample
    causal/                 records.jsonl, causal.json (with cliff_boundary and the records' hash), horizon.jsonl,
                            horizon.json, *.png
    truncation/             answers.jsonl, truncation.json, keep_fractions.json, *.png
    geometry/               result/, geometry.json, *.png
    checkpoint_eval/        checkpoint_eval.json, checkpoint_eval.md, *.png
    overlay/                overlay.json, *.png

One resident model; the same command goes on where it was stopped, and keeps what is there. Exit code: that of the
verdict (0 FULL, 3 PARTIAL, 4 STOP, 5 INCOMPLETE; 1 and 2 are errors). What each stage measures: docs/visual_phase1.md.

Source: ours; stages and flags are named as in the GAP 2.0 studies, whose scores were read where the answer was not
predicted, and whose missing layers were passed over.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from interp_plugins.questions import Questions

import interp_core as ic
from interp_core import runs

from .. import visual_data
from ..visual_data import Asking
from . import horizon, stages
from .config import VisualPhase1Config
from .plan import Plan
from .report import files_of, write_all
from .samples import drawn


@dataclass(frozen=True)
class Phase1:
    """What came out.

    Attributes:
        page: the report.
        verdict: FULL, PARTIAL, STOP or INCOMPLETE.
        exit_code: of the process.
    """

    page: Path
    verdict: str
    exit_code: int

    def __str__(self) -> str:
        return f"{self.page}\nverdict {self.verdict} (exit code {self.exit_code})"


def visual_phase1(config: VisualPhase1Config) -> Phase1:
    """Find the layer from which on a model no longer needs its image, and hold it against gates; returns the verdict.

    Raises:
        PlanError, LoadError: settings or files that cannot be used, before the model is loaded where they tell.
        CapabilityError: a model that reads no images, or in which images do not do what all this takes for granted.
    """
    dataset, asking, plan = config.named_dataset(), config.asking(), config.plan()
    pilots, others = _selected(config)
    model = config.load()
    plan.check(model)
    settings = {
        "dataset": dataset, "questions": visual_data.digest_of([*pilots, *others]), **config.numbers,
        **{k: v for k, v in vars(asking).items() if k not in ("strict", "scorer")}, "scorer": str(asking.scorer),
        **{k: v for k, v in vars(plan).items() if k != "thresholds"}, "thresholds": asdict(plan.thresholds),
    }  # fmt: skip
    # neither of these changes a record: a cliff from elsewhere is held against the records that are there
    free = ("batch_size", "cliff_boundary", "causal_record")
    with runs.open(config.out, settings, recipe="visual_phase1", model=model, dataset=dataset, free=free) as run:
        run.claim(files_of(plan))  # before any work
        return _run(run, model, pilots, others, asking, plan)


def _run(
    run: runs.RunFolder, model: ic.Model, pilots: Questions, others: Questions, asking: Asking, plan: Plan
) -> Phase1:
    """Stage by stage."""
    run.json("thresholds.json", {"hash": plan.thresholds.hash, **asdict(plan.thresholds)})
    print(f"thresholds {plan.thresholds.hash}, written down before the run")
    samples = drawn(model, pilots, others, plan.blind, asking, plan.seed)
    run.json("samples.json", samples.record())
    checks = stages.sanity(run, model, samples, asking)
    causal = stages.causal(run, model, samples, asking, plan)
    truncation = stages.truncation(run, model, samples, asking, plan, causal)
    removals = horizon.removals(run, model, samples, asking, plan, causal, truncation)
    geometry = stages.geometry(run, model, samples, asking, plan, causal)
    judgement = stages.checkpoint(run, checks, causal, truncation, geometry, removals, plan)
    maps = stages.overlay(run, model, samples, asking, causal)
    page = write_all(run, model, plan, samples, checks, causal, truncation, geometry, removals, judgement, maps)
    return Phase1(page, judgement.verdict, judgement.exit_code)


def _selected(config: VisualPhase1Config) -> tuple[Questions, Questions]:
    """Pilots and further questions, whose images can be decoded."""
    n_pilots, n_samples = config.numbers["pilots"], config.numbers["samples"]
    every = config.questions(n_pilots + n_samples)
    pilots, others = every.split(n_pilots, n_samples, seed=config.seed)
    checked = Questions((*pilots, *others), every.skipped, every.source).checked()
    if config.strict and checked.skipped:
        raise ic.LoadError(f"{checked.skipped[0].where}: {checked.skipped[0].detail}")
    for reason, number in checked.counts.items():
        print(f"{number} rows skipped: {reason}")
    first = Questions(checked.questions[: len(pilots)], checked.skipped, every.source)
    return first, Questions(checked.questions[len(pilots) :], (), every.source)
