"""From fixed trials to a parity suite: the trials are checked, sides that are missing are worked out, folders compared.

Fixed trials are checked with their tokenizer alone, before a model is loaded; where they fail, nothing is worked out.
Side a is worked out by replay, in the order of operations of the published code, with hooks written by hand (`plain`);
side b by this package's means, effects, vector and injection, by sweep, or by replay too where the comparison is one of
replays. So no stage holds one piece of code against itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import interp_core as ic

from ..effects import CLASSES
from ..files.answers import answers
from ..files.checks import prompt_parity, slot_parity, verify_answers
from ..files.extraction import By, Clock, extract
from ..files.fixed_run import FixedRun, PromptKind, fixed_run, folder_name, profile, put_in
from ..files.folders import Combination, read_folder
from ..files.golden import source_files
from ..files.runtime import runtime_files
from ..prompts import Prompt
from .derived import MODES
from .findings import STAGES, Mode, Stage, chosen
from .reports import Suite
from .stages import Comparison

CHECKS = {"prompt_boundary": (prompt_parity, verify_answers), "slot_map": (slot_parity,)}
"""Checks of a file of fixed trials, by the stage that they belong to."""
SPENT = {"mean": "mean_activations", "effects": "top_heads", "vector": "fv_vector", "injection": "injection_output"}
"""Stages, by what `Clock` calls the work for them."""


@dataclass
class Sides:
    """Two folders on the way to a comparison.

    Attributes:
        a, b: the folders; None until they are worked out.
        mode: of the comparison.
        root: where reports go.
        names: dataset_name, fixed_trials_id and model_name, as far as they are known.
        trials: the file of fixed trials, if there is one.
        run: what was read from it; None if it failed.
        early: stages of the file alone.
        seconds: spent on each stage before the comparison.
        profile: of the model, if one was loaded.
        worked_out: how, of the sides that were.
        tokenizer: that the trials were checked with.
    """

    a: Path | None
    b: Path | None
    mode: Mode
    root: Path
    names: dict[str, str | None]
    trials: Path | None = None
    run: FixedRun | None = None
    early: list[Stage] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    profile: dict[str, Any] | None = None
    worked_out: dict[str, str] = field(default_factory=dict)
    tokenizer: Any = None

    def check(
        self, path: Path, data: Mapping[str, Any], tokenizer: Any, fixed_trials_model: str | None, seed: int | None
    ) -> None:
        """Fixed trials against their tokenizer.

        Args:
            path, data: the file, and what it holds.
            fixed_trials_model, seed: as `fixed_run`.

        Raises:
            TextError, PlanError: as `fixed_run`; prompts, answers and slots that do not agree are stages' findings.
        """
        self.trials, self.tokenizer, self.early = path, tokenizer, checked(path, data, tokenizer)
        model_name = self.names["model_name"] or data["meta"]["model_name_for_tokenizer"]
        if not any(stage.findings for stage in self.early):
            self.run = fixed_run(
                path, tokenizer, model_name=model_name, dataset_name=self.names["dataset_name"],
                fixed_trials_id=self.names["fixed_trials_id"], fixed_trials_model=fixed_trials_model, seed=seed,
            )  # fmt: skip
        known = {"dataset_name": Path(data["meta"]["dataset_json"]).stem, "fixed_trials_id": path.stem}
        self.names = {key: self.names[key] or value for key, value in {**known, "model_name": model_name}.items()}

    def work_out(
        self,
        model: ic.Model,
        k: int,
        token_class: int,
        layer: int,
        kind: PromptKind,
        record: ic.runs.RunFolder,
    ) -> list[str]:
        """The sides that are not given, in folders beside the reports; returns what became of their files."""
        assert self.run is not None
        clock, said = Clock(), list[str]()
        self.profile = profile(model)
        last = token_class % len(CLASSES) == len(CLASSES) - 1
        for side, name in (("a", "src"), ("b", "fv")):
            if getattr(self, side) is None:
                by: By = "replay" if side == "a" or self.mode == "replay" else "sweep"
                by_hand = side == "a"
                extraction = extract(
                    model, self.run, by=by, by_hand=by_hand, n_top_heads=k, token_class_idx=token_class,
                    last_token_only=last, clock=clock, record=record,
                )  # fmt: skip
                answered = answers(
                    model, self.run, extraction.vector, layer, kind=kind, by=by, by_hand=by_hand, clock=clock
                )
                self.worked_out[side] = f"{by}, by hand" if by_hand else by
                write = source_files if side == "a" else runtime_files
                folder = self.run.folder(self.root) / name
                said += put_in(record, folder, write(model, self.run, extraction, answered))
                setattr(self, side, folder)
        self.seconds = {SPENT[name]: spent for name, spent in clock.seconds.items()}
        return said

    def suite(self, stages: str, of: Combination | None, max_trials: int | None, token_class: int) -> Suite:
        """The comparison, as far as it goes; arguments as `Comparison` has them."""
        options: dict[str, Any] = {"a": self.a, "b": self.b, "compare": self.mode, "max_trials": max_trials}
        options |= {} if of is None else {"prompt_kind": of[0], "edit_layer": of[1]}
        options |= {} if token_class == -1 else {"token_class_idx": token_class}
        names, comparison = chosen(stages), None
        compared = stopped(self.early, names)
        if self.a is not None and self.b is not None:
            a, b = (read_folder(folder, self.names["dataset_name"]) for folder in (self.a, self.b))
            prompts = self._prompts(None if of is None else of[0])
            comparison = Comparison(a, b, self.mode, of, max_trials, token_class, prompts=prompts)
            compared = merged(self.early, comparison.stages(names), self.seconds)
        checks = f"interp run fv_fixed_trials --out_path {self.trials}" if self.trials else ""
        return Suite(
            compared, comparison, **self._named(comparison), root=self.root, options=options, trials=self.trials,
            trials_command=checks, profile=self.profile, worked_out=self.worked_out,
        )  # fmt: skip

    def _prompts(self, kind: str | None) -> dict[str, list[Prompt]]:
        """What the folders' prompts must be, where the file of fixed trials was given."""
        if self.run is None:
            return {}
        kinds: tuple[PromptKind, ...] = ("clean", "corrupted", "zeroshot")
        return {name: self.run.prompts(name, self.tokenizer) for name in kinds if name in MODES or name == kind}

    def _named(self, comparison: Comparison | None) -> dict[str, Any]:
        """Names for the reports: as given, else as the folders say."""
        said = [] if comparison is None else [comparison.b.settings, comparison.a.settings]
        fallback = {} if self.b is None else {"dataset_name": "task", "fixed_trials_id": self.b.resolve().name}
        known = [self.names, *said, fallback]
        names = ("dataset_name", "fixed_trials_id", "model_name", "seed")
        by_name = {name: next((said[name] for said in known if said.get(name) is not None), None) for name in names}
        for name in names[:2]:
            folder_name(name, str(by_name[name]))
        return by_name


def checked(path: Path, data: Mapping[str, Any], tokenizer: Any) -> list[Stage]:
    """Prompt and slot stage of a file of fixed trials.

    Raises:
        TextError: a tokenizer whose BOS is not the file's.
    """
    stages = []
    for name, checks in CHECKS.items():
        began, stage = time.perf_counter(), Stage(name, [(path, path)])
        for check in checks:
            findings = check(data, tokenizer)
            stage.compared += findings.checked_trials
            stage.asked += data["meta"]["n_trials"]
            for line in findings.mismatches:
                stage.find((path, path), line.partition(" is ")[0][:80], why=f"{findings.name}: {line}")
        stage.counted((path, path), 0)
        stage.seconds = time.perf_counter() - began
        stages.append(stage)
    return stages


def merged(early: Iterable[Stage], late: Iterable[Stage], seconds: Mapping[str, float]) -> list[Stage]:
    """Stages of the trials and of the comparison as one list.

    Args:
        seconds: spent on working out what a stage compares.
    """
    before, stages = {stage.name: stage for stage in early}, list(late)
    for stage in stages:
        stage.seconds += seconds.get(stage.name, 0.0)
        if (first := before.get(stage.name)) is not None:
            stage.files[:0], stage.findings[:0] = first.files, first.findings
            stage.compared += first.compared
            stage.asked += first.asked
            stage.seconds += first.seconds
    return stages


def stopped(early: Sequence[Stage], names: Iterable[str]) -> list[Stage]:
    """Stages of the trials, and the others as skipped."""
    done = {stage.name: stage for stage in early}
    return [done.get(name) or Stage(name, skipped="the fixed trials failed") for name in STAGES if name in {*names}]
