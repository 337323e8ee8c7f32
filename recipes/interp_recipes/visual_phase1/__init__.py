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

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from interp_plugins.questions import Questions
from interp_plugins.visual.gates import GATES, Thresholds
from interp_plugins.visual.horizon import SUBSETS

import interp_core as ic
from interp_core import runs

from .. import visual_data
from ..visual_data import Asking, Dataset
from .horizon import removals
from .plan import Plan
from .report import files_of, write_all
from .samples import Mode, Samples, drawn
from .stages import causal, checkpoint, geometry, overlay, sanity, truncation

PROFILES: Mapping[str, Mapping[str, int]] = {
    "smoke": {"pilots": 8, "samples": 10, "horizon_samples": 10, "resamples": 500},
    "full": {"pilots": 20, "samples": 100, "horizon_samples": 40, "resamples": 2000},
}
"""What is not set by its flag."""
INTERVENTIONS = ("replace:blind", "knockout:text", "truncation", "band", "text:blind")
KEEP = (0.75, 0.5, 0.25)
"""Shares of visual tokens that subsets keep."""


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


def visual_phase1(
    model: str = visual_data.TOY, profile: Literal["smoke", "full"] = "full", out: Path | None = None,
    dataset: Dataset | None = None, data_path: Path | None = None, images: Path | None = None, split: str | None = None,
    kinds: list[str] | None = None, pilots: int | None = None, samples: int | None = None,
    interventions: list[str] | None = None, blind: list[Mode] | None = None,
    null_image: Literal["jpeg", "none"] = "jpeg", layers: list[int] | None = None, window: int = 1, tau: float = 0.01,
    adaptive_tau: bool = False, tau_ratio: float = 0.1, cliff_boundary: int | None = None,
    causal_record: str | None = None, truncation_layers: list[int] | None = None,
    horizon_samples: int | None = None, horizon_tokens: int | None = 16, keep_fractions: list[float] | None = None,
    random_subsets: int = 5, gate_images: int = 30,
    share_at_start: float = 0.9, cliff_width: float = 1 / 6, drop_easy: float = 0.01, drop_hard: float = 0.05,
    resamples: int | None = None, scorer: str | None = None, prompt: str | None = None, max_new_tokens: int = 16,
    max_model_len: int | None = None, batch_size: int = 8, tp_size: int = 1, device: str | None = None,
    dtype: str | None = None, seed: int = 0, strict: bool = False,
) -> Phase1:  # fmt: skip
    """Find the layer from which on a model no longer needs its image, and hold it against gates; returns the verdict.

    Args:
        model, device, dtype, tp_size: toy:vision, a folder or a hub id; where it lies, over how many CUDA devices.
        profile: smoke (8 pilots, 10 further samples: gates that need more are inconclusive) or full (20 and 100).
        out: folder of the run; the same command goes on there.
        dataset, data_path, images, split, kinds: chartqa, docvqa, vqav2, pope, plain or toy (drawn); its file or
            folder, and that of its images; split of chartqa; only questions of these kinds.
        pilots, samples, seed, strict: how many; of the selection; whether a sample that cannot be used ends the run.
        interventions: of the method `visual`; replace:blind is always among them, and the cliff is its.
        blind: images that stand in (None: random; black and mean are the others); the cliff is of the first.
        null_image: what leaves what the image shows, for the noise floor: jpeg, or none (a floor of 0).
        layers, window: of the causal curves (None: all); how many layers a knockout hits together.
        tau, adaptive_tau, tau_ratio: the threshold in nats, or tau_ratio of the peak of the pilots' mean effect, not
            below the noise floor.
        cliff_boundary, causal_record: a cliff known from another study, and its file or hash (None: of this one).
        truncation_layers: from which the image is taken away for answers (None: 13 at most; the boundary is added).
        horizon_samples, horizon_tokens: how many further samples lose visual tokens one by one and in subsets (0: none,
            and no gate G7); how many tokens of each, spread over the image (0: all).
        keep_fractions, random_subsets: shares kept (None: 0.75, 0.5, 0.25); random subsets against each ranked one.
        gate_images, share_at_start, cliff_width, drop_easy, drop_hard: thresholds of the gates, hashed before the run;
            with fewer images they are inconclusive.
        resamples: of intervals.
        scorer, prompt, max_new_tokens: of answers (None: the data set's); the prompt has {question} in it.
        max_model_len, batch_size: longer samples are left out; prompts that run together.

    Raises:
        PlanError, LoadError: settings or files that cannot be used, before the model is loaded where they tell.
        CapabilityError: a model that reads no images, or in which images do not do what all this takes for granted.
    """
    which = visual_data.dataset_of(dataset, data_path, model)
    sizes = _sizes(profile, pilots, samples, horizon_samples, resamples)
    words = visual_data.PROMPTS[which] if prompt is None else prompt
    asking = Asking(words, max_model_len, max_new_tokens, batch_size, visual_data.scorer_of(which, scorer), strict)
    limits = {"images": gate_images, "share_at_start": share_at_start, "width": cliff_width, "drop_easy": drop_easy,
              "drop_hard": drop_hard, "gates": _gates(sizes)}  # fmt: skip
    plan = Plan(
        tuple(dict.fromkeys(("replace:blind", *(interventions or INTERVENTIONS)))), tuple(blind or ("random",)),
        null_image, _tuple(layers), window, tau, adaptive_tau, tau_ratio, cliff_boundary, causal_record,
        _tuple(truncation_layers), sizes["horizon_samples"], horizon_tokens or None,
        tuple(keep_fractions or KEEP), random_subsets, sizes["resamples"], seed, Thresholds.of(limits),
    )  # fmt: skip
    _check(asking, plan, sizes)
    chosen = _selected(which, data_path, images, split, kinds, sizes, seed, strict)
    loaded = visual_data.visual_model(model, device=device, dtype=dtype, tp_size=tp_size)
    return _open(out, which, loaded, chosen, asking, plan, sizes)


def _gates(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Of this study: G6 is of probes, G7 of samples whose visual tokens are removed."""
    return tuple(gate for gate in GATES if gate != "G6" and (gate != "G7" or sizes["horizon_samples"]))


def _tuple(layers: list[int] | None) -> tuple[int, ...] | None:
    return None if layers is None else tuple(layers)


def _sizes(
    profile: str, pilots: int | None, samples: int | None, horizon: int | None, resamples: int | None
) -> dict[str, int]:
    """How many of each: the profile's, where nothing else is said."""
    chosen = {"pilots": pilots, "samples": samples, "horizon_samples": horizon, "resamples": resamples}
    return {**PROFILES[profile], **{name: value for name, value in chosen.items() if value is not None}}


def _open(
    out: Path | None, which: str, loaded: ic.Model, chosen: tuple[Questions, Questions], asking: Asking, plan: Plan,
    sizes: dict[str, int],
) -> Phase1:  # fmt: skip
    """The run's folder, which knows what its numbers depend on, and the run in it."""
    plan.check(loaded)
    first, rest = chosen
    settings = {
        "dataset": which, "questions": visual_data.digest_of([*first, *rest]), **sizes,
        **{k: v for k, v in vars(asking).items() if k not in ("strict", "scorer")}, "scorer": str(asking.scorer),
        **{k: v for k, v in vars(plan).items() if k != "thresholds"}, "thresholds": asdict(plan.thresholds),
    }  # fmt: skip
    free = ("batch_size", "cliff_boundary", "causal_record")
    with runs.open(out, settings, recipe="visual_phase1", model=loaded, dataset=which, free=free) as run:
        run.claim(files_of(plan))  # before any work
        return _run(run, loaded, first, rest, asking, plan)


def _run(
    run: runs.RunFolder, model: ic.Model, pilots: Questions, others: Questions, asking: Asking, plan: Plan
) -> Phase1:
    """Stage by stage."""
    run.json("thresholds.json", {"hash": plan.thresholds.hash, **asdict(plan.thresholds)})
    print(f"thresholds {plan.thresholds.hash}, written down before the run")
    data: Samples = drawn(model, pilots, others, plan.blind, asking, plan.seed)
    run.json("samples.json", data.record())
    checks = sanity(run, model, data, asking)
    cause = causal(run, model, data, asking, plan)
    cut = truncation(run, model, data, asking, plan, cause)
    gone = removals(run, model, data, asking, plan, cause, cut)
    shape = geometry(run, model, data, asking, plan, cause)
    judged = checkpoint(run, checks, cause, cut, shape, gone, plan)
    seen = overlay(run, model, data, asking, cause)
    page = write_all(run, model, plan, data, checks, cause, cut, shape, gone, judged, seen)
    return Phase1(page, judged.verdict, judged.exit_code)


def _check(asking: Asking, plan: Plan, sizes: Mapping[str, int]) -> None:
    """Raises:
    PlanError: settings out of range, before anything is loaded.
    """
    visual_data.check_prompt(asking.prompt)
    if len(set(plan.blind)) < len(plan.blind):
        raise ic.PlanError(f"blind: {', '.join(plan.blind)}; give each once")
    least = {
        "pilots": (sizes["pilots"], 8 if plan.adaptive_tau else 2), "samples": (sizes["samples"], 4),
        "max_new_tokens": (asking.max_new_tokens, 1), "batch_size": (asking.batch_size, 1),
        "resamples": (sizes["resamples"], 100), "gate_images": (plan.thresholds.images, 1),
        "horizon_samples": (sizes["horizon_samples"], 0), "horizon_tokens": (plan.horizon_tokens or 1, 1),
        "random_subsets": (plan.random_subsets, SUBSETS),
    }  # fmt: skip
    for name, (value, low) in least.items():
        if value < low:
            raise ic.PlanError(f"{name} is {value}: give at least {low}")
    if not (plan.tau > 0 and 0 < plan.tau_ratio <= 1):
        raise ic.PlanError(f"tau {plan.tau:g}, tau_ratio {plan.tau_ratio:g}: they are above 0, and in (0, 1]")
    if not all(0 < share < 1 for share in plan.keep_fractions):
        raise ic.PlanError(f"keep_fractions {', '.join(map(str, plan.keep_fractions))}: each lies between 0 and 1")
    if plan.causal_record is not None and plan.cliff_boundary is None:
        raise ic.PlanError("--causal_record says where a cliff was found; give the layer too: --cliff_boundary")


def _selected(
    dataset: Dataset, data_path: Path | None, images: Path | None, split: str | None, kinds: list[str] | None,
    sizes: Mapping[str, int], seed: int, strict: bool,
) -> tuple[Questions, Questions]:  # fmt: skip
    """Pilots and further questions, whose images can be decoded."""
    count = sizes["pilots"] + sizes["samples"]
    every = visual_data.questions_of(dataset, data_path, images, count=count, seed=seed, kinds=kinds, split=split)
    pilots, others = every.split(sizes["pilots"], sizes["samples"], seed=seed)
    checked = Questions((*pilots, *others), every.skipped, every.source).checked()
    if strict and checked.skipped:
        raise ic.LoadError(f"{checked.skipped[0].where}: {checked.skipped[0].detail}")
    for reason, number in checked.counts.items():
        print(f"{number} rows skipped: {reason}")
    first = Questions(checked.questions[: len(pilots)], checked.skipped, every.source)
    return first, Questions(checked.questions[len(pilots) :], (), every.source)
