"""The kit for recipes, families, engines and launchers: what is right passes, and every check catches what is wrong.

Source: these tests.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model

import interp_core as ic
from interp_core import testing
from interp_core.architectures.family import Family, Place, llama_like
from interp_core.engines.torch import TorchEngine, TorchProgram
from interp_core.launch import Job, Outcome

# Launchers


class Threads:
    """A right one."""

    name = "threads"

    def __init__(self, cap: int = 4) -> None:
        if cap < 1:
            raise ic.PlanError("at least one")
        self.cap = cap

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        with ThreadPoolExecutor(self.cap) as threads:
            return list(threads.map(self.outcome, jobs))

    def outcome(self, job: Job) -> Outcome:
        try:
            return Outcome(job.call(*job.args))
        except Exception:
            return Outcome(error=traceback.format_exc())


class Needy(Threads):
    def __init__(self, cap: int) -> None:
        super().__init__(cap)


class Values(Threads):
    def run(self, jobs: Sequence[Job]) -> Any:
        return [outcome.value for outcome in super().run(jobs)]


class AsTheyEnd(Threads):
    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        return [*reversed(super().run(jobs))]


class Passing(Threads):
    def outcome(self, job: Job) -> Outcome:
        return Outcome(job.call(*job.args))


class Silent(Threads):
    def outcome(self, job: Job) -> Outcome:
        outcome = super().outcome(job)
        return outcome if outcome.ok else Outcome(error="it failed")


class Uncapped(Threads):
    def __init__(self, cap: int = 4) -> None:
        super().__init__(8)


class Late(Threads):
    def __init__(self, cap: int = 4) -> None:
        super().__init__(max(cap, 1))


def test_right_launchers_pass() -> None:
    assert testing.check_launcher(Threads).summary == testing.check_launcher("local").summary == "5 checks passed"


@pytest.mark.parametrize(
    ("launcher", "check", "says"),
    [
        (type("Bare", (Threads,), {"name": ""}), "made", "it has no name: write name = … in class Bare"),
        (Needy, "made", r"Needy\(\) raised TypeError: .*; give every option a default"),
        (Values, "runs", "1 jobs gave 1 of tuple, not an Outcome each"),
        (AsTheyEnd, "order", r"outcomes came in the order \[2, 1, 0\]: keep that of the jobs"),
        (Passing, "exception", r"a job's error comes out of run \(ArithmeticError\): make an Outcome of it"),
        (Silent, "exception", "a job that raised ArithmeticError is 'it failed': keep its traceback"),
        (Uncapped, "cap", "with cap=2 4 jobs ran at once"),
        (Late, "cap", "cap=0 is taken: refuse it"),
    ],
)
def test_a_wrong_launcher_is_caught(launcher: Any, check: str, says: str) -> None:
    report = testing.check_launcher(launcher)
    row = next(row for row in report.rows if row.check == check)
    assert row.ok is False and re.search(says, row.detail), report


# Engines


class DropsEdits(TorchProgram):
    def execute(self, method: str, inputs: Any) -> Any:
        for hook, _ in self._hooks:
            hook.acting = ()
        return super().execute(method, inputs)


class Unmade(TorchEngine):
    """Needs more than a model."""

    name = "mine"

    def __init__(self, model: Any, key: str) -> None:
        super().__init__(model)


class Rounds(TorchProgram):
    def execute(self, method: str, inputs: Any) -> Any:
        out = super().execute(method, inputs)
        if method == "forward" and out is not None:
            out["logits"] = out["logits"].bfloat16().float()
        return out


def engine(program: Any, **members: Any) -> type[TorchEngine]:
    return type("Engine", (TorchEngine,), {"__doc__": "Mine.", "name": "mine", "program": program, **members})


def test_a_wrong_engine_is_caught() -> None:
    model = tiny_model("llama")
    right = testing.check_engine(engine(TorchProgram), model)
    assert right.ok and [row.check for row in right.rows] == ["made", "self_check", "read", "write", "grad", "generate"]
    report = testing.check_engine(engine(DropsEdits), model)
    assert "self_check" in report.failed and "an edit in layer 0 changes the logits' does not hold" in str(report), (
        report
    )
    report = testing.check_engine(engine(Rounds), model)
    assert "write" in report.failed and "differs by" in str(report), report
    unmade = testing.check_engine(Unmade, model)
    assert unmade.failed == ["made"] and "missing 1 required positional argument: 'key'" in str(unmade)
    bare = testing.check_engine(engine(TorchProgram, name=""), model)
    assert bare.failed == ["made"] and "it has no name: write name = … in class Engine" in str(bare)
    assert "mine" not in ic.registry("engines")  # it was lent for the check alone


# Families

LLAMA = Family("llama", paths={**llama_like("model"), "unembed": "lm_head"})


@pytest.mark.parametrize(
    ("family", "check", "says"),
    [
        (replace(LLAMA, name="lama"), "model", "the model's type is 'llama'; a family is looked up by that"),
        (
            replace(LLAMA, paths={**LLAMA.paths, "blocks.mlp.out": "squeeze"}),
            "paths",
            "the family file of 'llama' says that blocks.mlp.out is at 'squeeze', where this model has no module",
        ),
        (
            replace(LLAMA, paths={**LLAMA.paths, "blocks": "nowhere"}),
            "paths",
            "the family file of 'llama' says that blocks is at 'nowhere', where this model has no module",
        ),
        (replace(LLAMA, added=lambda block: {"mlp_out": 0.5}), "sums", "is resid_post' does not hold ("),
        (replace(LLAMA, places={"attn_in": Place("input_layernorm", "in")}), "", ""),
        (
            replace(LLAMA, paths={**LLAMA.paths, "ln_final": "model.layers.0.input_layernorm"}),
            "readout",
            "'gives the model's logits' does not hold",
        ),
    ],
    ids=["model", "paths", "blocks", "sums", "right", "readout"],
)
def test_a_wrong_family_is_caught(family: Family, check: str, says: str) -> None:
    report = testing.check_family(family, testing.tiny("llama", num_hidden_layers=1))
    if not check:
        assert report.ok and report.summary == "8 checks passed", report
    else:
        assert check in report.failed and says in str(report), report
    assert "llama" not in ic.registry("architectures")


def test_a_family_without_a_small_model_says_what_to_write() -> None:
    report = testing.check_family("mpt")
    assert report.ok and "write a function tiny() beside the Family in interp_core.architectures.bloom" in str(report)
    assert [row.detail for row in report.rows[1:3]] == ["needs a model", "needs a model that is open"]
    assert testing.check_family("gpt2").ok


# Recipes


class Settings(ic.Config):
    """Settings.

    Attributes:
        model: what `ic.load` takes.
        out: a folder.
    """

    model: str = "no:model"
    out: Path | None = None


def counting(config: Settings) -> None:
    """Writes how many layers there are."""
    assert config.out is not None
    config.out.mkdir(exist_ok=True)
    (config.out / "layers.txt").write_text(str(len(config.model)))


def again(config: Settings) -> None:
    """Adds to what is there."""
    counting(config)
    with open(config.out / "layers.txt", "a") as file:  # type: ignore[operator]
        file.write(str(torch.rand(1)))


def once(config: Settings) -> None:
    """Works in a new folder alone."""
    config.out.mkdir()  # type: ignore[union-attr]


def drawn(model: str) -> float:
    """Draws."""
    return float(torch.rand(1))


def crashing(config: Settings) -> None:
    """Crashes."""
    raise ZeroDivisionError(config.model)


@pytest.mark.parametrize(
    ("recipe", "check", "says"),
    [
        (again, "again", "a second run into the same folder differs in layers.txt"),
        (once, "again", "it raised FileExistsError"),
        (drawn, "again", "a second run gives something else: draw from a generator with a seed"),
        (crashing, "runs", "it raised ZeroDivisionError: toy:text\nTraceback"),
        (Settings, "function", "not a function"),
    ],
)
def test_a_wrong_recipe_is_caught(recipe: Callable[..., Any], check: str, says: str) -> None:
    assert testing.check_recipe(counting).summary == "4 checks passed"
    report = testing.check_recipe(recipe)
    row = next(row for row in report.rows if row.check == check)
    assert report.failed[0] == check and says in row.detail, report


def test_a_recipe_that_needs_more_is_run_with_it() -> None:
    def length(text: str) -> int:
        return len(text)

    def refusing(text: str = "") -> int:
        if not text:
            raise ic.PlanError("give a text")
        return len(text)

    for settings, ok in (({}, None), ({"text": ""}, False), ({"text": "Q"}, True)):
        assert testing.check_recipe(refusing, settings=settings).rows[2].ok is ok
    report = testing.check_recipe(length)
    assert report.ok and "it needs text, which have no default: give them, --set text=…" in str(report)
    assert report.summary == "2 checks passed; 2 could not be reached: runs, again"
    assert testing.check_recipe(length, settings={"text": "Q"}).summary == "4 checks passed"


# All of them


def test_checks_are_told_as_they_are_done() -> None:
    told: list[testing.Row] = []
    report = testing.check_launcher(Late, tell=told.append)
    assert tuple(told) == report.rows
    for row, line in zip(told, str(report).splitlines()[1:], strict=False):
        assert re.match(rf"(ok  |FAIL)  {row.check} .*\({row.seconds:.1f} s\)$", line), line
    assert str(report).endswith("\n4 checks passed; 1 failed: cap")


def test_every_check_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs/plugins.md").read_text()
    reports = {
        "A recipe": testing.check_recipe(Settings),  # no recipe: what is asked is only which checks there are
        "A family": testing.check_family("mpt"),
        "An engine": testing.check_engine(Unmade, tiny_model("llama")),
        "A launcher": testing.check_launcher(Needy),
    }
    for heading, report in reports.items():
        section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
        assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == [row.check for row in report.rows]


def test_a_setting_without_a_type_is_named() -> None:
    with pytest.raises(
        ic.PluginError, match=r"Mine: a setting needs a type. Write `power: int = 1`, `of: TYPE = None`"
    ):

        class Mine(ic.Config):
            """Settings."""

            rate: float = 0.1
            power = 1
            of = None

            def doubled(self) -> float:
                return 2 * self.rate
