"""What a parity suite reports, as files.

    parity_suite_report.json    the gate: prompt, slot, fv, injection; where it first failed
    parity_suite_stages.csv     its stages
    parity_suite.log            every finding, in words
    injection_parity_trials.csv, injection_parity_report.json
    src_vs_fv_diff_report.json, src_vs_fv_diff_report.md      the six stages and the first divergence

The last two go to the task's folder, the others to that of the fixed trials.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from interp_core import runs

from ..files.fixed_run import Files
from .findings import STAGES, Finding, Stage, plain
from .stages import Comparison

GATE = {
    "prompt": ("prompt_boundary",),
    "slot": ("slot_map",),
    "fv": ("mean_activations", "top_heads", "fv_vector"),
    "injection": ("injection_output",),
}
"""Stages of the gate, with those of the comparison that they are made of."""
REPORT = "parity_suite_report.json"
STAGE_COLUMNS = ("name", "status", "exit_code", "mismatch_count", "max_abs_diff", "duration_sec", "cmd")
TRIAL_COLUMNS = (
    "trial_idx", "target_id", "clean_src_logprob", "clean_fv_logprob", "with_src_logprob", "with_fv_logprob",
    "delta_src_logprob", "delta_fv_logprob", "clean_equal", "with_equal", "delta_equal", "trial_match",
    "clean_logits_max_abs_diff", "with_logits_max_abs_diff", "prompt_kind", "edit_layer",
)  # fmt: skip
SHOWN = 20
"""Findings of a stage that reports list; all are counted."""
FAILED = 2
"""What `interp run` exits with when a recipe raises."""


@dataclass(frozen=True)
class Suite:
    """A finished comparison.

    Attributes:
        stages: of the comparison, in order.
        comparison: what was compared; None if the trials themselves failed.
        dataset_name, fixed_trials_id, model_name, seed: of the run.
        root: where folders of tasks lie.
        options: of the command that repeats the comparison.
        trials: the file of fixed trials, if there is one.
        trials_command: the command that checks the fixed trials alone, if there is a file of them.
        profile: of the model, if one was loaded.
        worked_out: how, of the sides that were worked out here.
    """

    stages: Sequence[Stage]
    comparison: Comparison | None
    dataset_name: str
    fixed_trials_id: str
    model_name: str | None
    seed: int | None
    root: Path
    options: Mapping[str, Any]
    trials: Path | None = None
    trials_command: str = ""
    profile: Mapping[str, Any] | None = None
    worked_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Of the reports on these trials."""
        return self.root / self.dataset_name / self.fixed_trials_id

    @property
    def status(self) -> str:
        """PASS if every stage did."""
        return "PASS" if all(stage.status == "PASS" for stage in self.stages) else "FAIL"

    @property
    def first(self) -> Finding | None:
        """The first divergence."""
        return next((finding for stage in self.stages for finding in stage.findings), None)

    def command(self, stages: Iterable[str] = ()) -> str:
        """One line that repeats the comparison, or stages of it."""
        words = ["interp", "run", "fv_parity"]
        for key, value in {**self.options, "stages": ",".join(stages)}.items():
            if value not in (None, ""):
                words += [f"--{key}", str(value)]
        return shlex.join(words)

    def reproduction(self, finding: Finding) -> str:
        """One line that shows a finding again."""
        return self.trials_command if self.trials in finding.files else self.command((finding.stage,))

    @property
    def remarks(self) -> list[str]:
        """What a reader of PASS has to know."""
        if self.comparison is None:
            return []
        folder_a, folder_b = self.comparison.a.folder, self.comparison.b.folder
        said = (
            [f"a and b are the same folder, {folder_a}: nothing was held against another side"]
            if folder_a.samefile(folder_b)
            else []
        )
        return said + [f"logits {stage.notes['logits']}" for stage in self.stages if "logits" in stage.notes]

    def gate(self) -> list[dict[str, Any]]:
        """Stages of the gate."""
        rows = []
        for name, parts in GATE.items():
            stages = [stage for stage in self.stages if stage.name in parts]
            if not stages:
                continue
            states = {stage.status for stage in stages}
            status = "FAIL" if "FAIL" in states else "SKIPPED" if "SKIPPED" in states else "PASS"
            first = next((finding for stage in stages for finding in stage.findings), None)
            rows.append({
                "name": name, "status": status,
                "cmd": self.reproduction(first) if first else self.command(parts),
                "exit_code": {"PASS": 0, "FAIL": FAILED, "SKIPPED": None}[status],
                "mismatch_count": sum(stage.mismatch_count for stage in stages),
                "max_abs_diff": max(stage.max_abs_diff for stage in stages),
                "duration_sec": round(sum(stage.seconds for stage in stages), 3),
            })  # fmt: skip
        return rows

    def about(self) -> dict[str, Any]:
        """Which run this is."""
        names = ("dataset_name", "fixed_trials_id", "model_name", "seed")
        return {"status": self.status, **{name: getattr(self, name) for name in names}}

    def setting(self) -> dict[str, Any]:
        """How it was compared."""
        if self.comparison is None:
            return {}
        comparison = self.comparison
        return {
            "mode": comparison.mode, "tolerances": asdict(comparison.within),
            "a": str(comparison.a.folder), "b": str(comparison.b.folder),
            "worked_out": dict(self.worked_out), "remarks": self.remarks,
            "profile": self.profile or comparison.b.settings.get("profile"),
            "settings_that_differ": {key: list(pair) for key, pair in comparison.settings().items()},
        }  # fmt: skip

    def files(self) -> tuple[Files, Files]:
        """Files of the trials' folder, and of the task's."""
        names = {"log": "parity_suite.log", "csv": "parity_suite_stages.csv", "report": REPORT}
        gate, first = self.gate(), self.first
        failed = next((row["name"] for row in gate if row["status"] != "PASS"), None)
        report = {
            **self.about(), "earliest_failed_stage": failed, "stages": gate,
            "paths": {key: str(self.folder / name) for key, name in names.items()},
            "first_divergence": first.json() if first else None, **self.setting(),
        }  # fmt: skip
        trials = [row for stage in self.stages for row in stage.rows]
        diff = {
            **self.about(), **self.setting(), "stages": [self._stage(stage) for stage in self.stages],
            "first_divergence": {**first.json(), "command": self.reproduction(first)} if first else None,
        }  # fmt: skip
        own: dict[str, str | bytes] = {
            names["log"]: self.log(),
            names["csv"]: runs.csv_text(gate, STAGE_COLUMNS),
            names["report"]: runs.json_text(report),
            "injection_parity_trials.csv": runs.csv_text(trials, TRIAL_COLUMNS),
            "injection_parity_report.json": runs.json_text(self._injection(trials)),
        }
        return own, {"src_vs_fv_diff_report.json": runs.json_text(diff), "src_vs_fv_diff_report.md": self.markdown()}

    def _stage(self, stage: Stage) -> dict[str, Any]:
        return {
            "stage": stage.name, "title": STAGES[stage.name], "status": stage.status, "skipped": stage.skipped,
            "files": [[str(file) for file in pair] for pair in stage.files], "compared": stage.compared,
            "asked": stage.asked, "mismatch_count": stage.mismatch_count, "max_abs_diff": stage.max_abs_diff,
            "notes": {key: plain(value) for key, value in stage.notes.items()},
            "findings": [finding.json() for finding in stage.findings[:SHOWN]],
            "command": self.command((stage.name,)), "duration_sec": round(stage.seconds, 3),
        }  # fmt: skip

    def _injection(self, trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The report of the injection alone."""
        stage = next((stage for stage in self.stages if stage.name == "injection_output"), Stage("injection_output"))
        sides = [] if self.comparison is None else [self.comparison.a, self.comparison.b]
        heads = [part.value for part in (side.parts["heads"] for side in sides) if part.value]
        settings = sides[1].settings if sides else {}

        def largest(key: str) -> float | None:
            return max((row[key] for row in trials if row[key] is not None), default=None)

        return {
            **self.about(), "status": stage.status, "checked_trials": len(trials),
            "edit_layer": _one(row["edit_layer"] for row in trials),
            "prompt_kind": _one(row["prompt_kind"] for row in trials),
            "n_top_heads": len(heads[0]) if heads else None,
            "token_class_idx": self.comparison.token_class_idx if self.comparison else None,
            "alpha": settings.get("alpha"), "top_heads": [list(head) for head in heads[0]] if heads else [],
            "mismatch_count": stage.mismatch_count, "max_abs_diff": stage.max_abs_diff,
            "max_abs_diff_clean_logits": largest("clean_logits_max_abs_diff"),
            "max_abs_diff_with_logits": largest("with_logits_max_abs_diff"),
            "trials_csv": str(self.folder / "injection_parity_trials.csv"),
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The stages, and the first divergence, for a terminal."""
        shown = [f"{'stage':18} {'status':8} {'compared':>9} {'mismatches':>10} {'max_abs_diff':>12}  {'seconds':>7}"]
        for stage in self.stages:
            shown.append(
                f"{stage.name:18} {stage.status:8} {stage.compared:9,} {stage.mismatch_count:10,} "
                f"{stage.max_abs_diff:12.3g}  {stage.seconds:7.2f}"
            )
        shown += [f"note: {remark}" for remark in self.remarks]
        if (first := self.first) is not None:
            shown += ["", f"first divergence: {first}", f"again: {self.reproduction(first)}"]
        return shown

    def log(self) -> str:
        """Everything, in words."""
        out = [f"{datetime.now().astimezone().isoformat(timespec='seconds')}  {self.command()}"]
        out += [f"{key}: {value}" for key, value in {**self.about(), **self.setting()}.items()]
        out += ["", *self.lines()]
        for stage in self.stages:
            out += ["", f"{stage.name}: {stage.skipped or stage.status}"]
            out += [
                f"  {file_a} against {file_b}" if file_a != file_b else f"  {file_a}" for file_a, file_b in stage.files
            ]
            out += [f"  {key}: {value}" for key, value in stage.notes.items()]
            out += [f"  {finding}" for finding in stage.findings]
        return "\n".join(out) + "\n"

    def markdown(self) -> str:
        """The diff report."""
        out = [f"# {self.dataset_name}, {self.fixed_trials_id}: {self.status}", ""]
        if self.comparison is not None:
            comparison = self.comparison
            out += [f"a: `{comparison.a.folder}`, b: `{comparison.b.folder}`, compared by *{comparison.mode}*.", ""]
            out += [f"{remark[0].upper()}{remark[1:]}.\n" for remark in self.remarks]
        out += ["| stage | status | compared | mismatches | max_abs_diff |", "|---|---|---|---|---|"]
        out += [
            f"| {n}. {STAGES[s.name]} | {s.status} | {s.compared:,} | {s.mismatch_count:,} | {s.max_abs_diff:.3g} |"
            for n, s in enumerate(self.stages, 1)
        ]
        out += ["", "## First divergence", ""]
        if (first := self.first) is None:
            out.append("None." if self.status == "PASS" else "None, but not everything was compared.")
        else:
            out += [
                f"- stage: {STAGES[first.stage]}", f"- file: `{first.file}`", f"- key: `{first.key}`",
                f"- what: {_cell(first)}", "", "```bash", self.reproduction(first), "```",
            ]  # fmt: skip
        if self.comparison is not None and (differing := self.comparison.settings()):
            out += ["", "## Settings that differ", "", "| setting | a | b |", "|---|---|---|"]
            out += [f"| {key} | {a} | {b} |" for key, (a, b) in differing.items()]
        return "\n".join(out) + "\n"


def _one(values: Iterable[Any]) -> Any:
    """The value, where there is one; else all of them."""
    distinct = sorted(set(values))
    return distinct[0] if len(distinct) == 1 else distinct


def _cell(finding: Finding) -> str:
    return " ".join(str(finding).partition(f"{finding.key}: ")[2].split())
