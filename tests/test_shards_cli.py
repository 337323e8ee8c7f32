"""`interp run … --shards` and what follows: plan, work, status, resume, collect, sbatch."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import Result
from interp_recipes.attribution_eval import AttributionEvalConfig, attribution_eval
from typer.testing import CliRunner

import interp_core as ic
from interp_core import runs
from interp_core.cli import app
from interp_core.cli.planned import planned_command
from interp_core.cli.shards import numbers, script
from interp_core.launch import Job, Outcome
from interp_core.launch.local import Local

DATA = Path(__file__).parent / "data/attribution"
COUNT = 4


def interp(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with four needles."""
    monkeypatch.chdir(tmp_path)
    line = (DATA / "traces/tiny_gen_ruler.jsonl").read_text()
    Path("needles.jsonl").write_text(line * COUNT)
    return tmp_path


SETTINGS: dict[str, Any] = {
    "datasets": "needles", "data_root": ".", "model": "label", "model_path": str(DATA / "models/llama"),
    "num_examples": COUNT, "mode": "recovery_ruler", "attr_funcs": "random,ifr_span",
}  # fmt: skip
WORDS = [word for name, held in SETTINGS.items() for word in (f"--{name}", str(held))]


def scores(tree: Path) -> dict[str, list[dict[str, str]]]:
    """All tables, without how long things took."""
    tables = {}
    for path in sorted(tree.rglob("*.csv")):
        with path.open() as file:
            rows = [{k: v for k, v in row.items() if "econds" not in k} for row in csv.DictReader(file)]
        tables[str(path.relative_to(tree))] = [
            r for r in rows if r.get("metric") != "seconds" and "Time" not in r.get("Method", "")
        ]
    return tables


def test_a_run_in_shards(folder: Path) -> None:
    planned = interp("run", "attribution_eval", *WORDS, "--output_root", "out", "--shards", 2, "--workers", 0)
    assert planned.exit_code == 0 and "planned, 2 shards" in planned.output, planned.output
    assert "attribution_eval, planned" in interp("status", "out").output
    refused = interp("work", "out", "--shards", "2")
    assert isinstance(refused.exception, ic.PlanError) and "there are 2, 0 to 1" in str(refused.exception)
    part = interp("work", "out", "--shards", "0")
    assert part.exit_code == 0 and "shard 1 are left to others" in part.output
    refused = interp("collect", "out")
    assert isinstance(refused.exception, ic.PlanError) and "1 of 2 shards of" in str(refused.exception)
    shown = json.loads(interp("status", "out", "--json").output)
    assert [table["done"] for table in shown["tables"]] == [1]
    # what a cluster would run, as the shell of this machine runs it
    script = interp("sbatch", "out", "--at-once", 3, "--option", "partition=gpu").output
    assert "#SBATCH --array=0-1%3\n" in script and "#SBATCH --partition=gpu\n" in script
    assert subprocess.run(["bash"], input=script, text=True, check=False, capture_output=True).returncode == 0
    assert runs.status("out").state == "done"
    assert interp("collect", "out").exit_code == 0
    expected = attribution_eval(AttributionEvalConfig(output_root=folder / "plain", **SETTINGS))
    assert scores(Path("out")) == scores(expected) and len(scores(expected)) == 4


class Elsewhere(Local):
    """A cluster, as far as whoever gives the command can see: other processes; notes how many jobs it was given."""

    name = "elsewhere"
    given_out: ClassVar[list[int]] = []

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        self.given_out.append(len(jobs))
        return super().run(jobs)


def test_a_launcher_plans_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the command is given no model is opened."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is opened where the command was given")

    ic.registry("launchers").register("elsewhere", Elsewhere)
    monkeypatch.setattr(ic, "load", refuse)
    monkeypatch.setattr("interp_core.model.load", refuse)
    words = ["run", "attribution_eval", *WORDS, "--output_root", "out", "--shards", 2, "--launcher", "elsewhere"]
    planned = interp(*words, "--workers", 0)
    assert planned.exit_code == 0 and "planned, 2 shards" in planned.output, planned.output
    assert Elsewhere.given_out == [1] and runs.status("out").state == "planned"


@pytest.mark.slow
def test_two_commands_plan_and_work_at_once(folder: Path) -> None:
    """On a folder that nobody has planned, in other numbers of shards: each row is there once, in the end."""
    words = [sys.executable, "-m", "interp_core.cli", "run", "attribution_eval", *WORDS, "--output_root", "out"]
    commands = [subprocess.Popen([*words, "--shards", str(count), "--workers", "1"]) for count in (2, 3)]
    assert [command.wait() for command in commands] == [0, 0]
    expected = attribution_eval(AttributionEvalConfig(output_root=folder / "plain", **SETTINGS))
    assert scores(Path("out")) == scores(expected) and runs.status("out").state == "done"


def test_a_task_that_is_asked_to_stop_before_its_worker_listens_goes_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Slurm's notice is as long as the task's time: Python imports, and the signal ends it."""
    programs = {
        "python": f"echo $$ > {tmp_path}/begun; exec sleep 60", "scontrol": f"echo $* > {tmp_path}/requeued",
        "squeue": "echo RUNNING",
    }  # fmt: skip
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    (tmp_path / "out/record").mkdir(parents=True)
    (tmp_path / "out/record/command.json").write_text(json.dumps({"folder": str(tmp_path)}))
    text = script(tmp_path / "out", 1, None, ())
    shell = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "17"}
    process = subprocess.Popen(["bash", "-c", text], env=shell | {"SLURM_ARRAY_TASK_ID": "0"})
    while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75 and (tmp_path / "requeued").read_text() == "requeue 17_0\n"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("60", 120),
        ("1", 30),
        ("2:30", 75),
        ("0:00:50", 25),
        ("1-0", 120),
        ("0-0:2", 60),
        ("UNLIMITED", 120),
        ("0", 120),
    ],
)
def test_a_task_is_asked_to_stop_no_sooner_than_at_half_of_its_time(limit: str, seconds: int, tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record/command.json").write_text(json.dumps({"folder": str(tmp_path)}))
    assert f"#SBATCH --signal=B:USR1@{seconds}\n" in script(tmp_path, 1, None, ["qos=long", f"--time={limit}"])
    with pytest.raises(ic.PlanError, match="--option time=1h: write minutes"):
        script(tmp_path, 1, None, ["time=1h"])


@pytest.mark.slow
def test_two_workers_and_a_scheduler_that_stops_them(folder: Path) -> None:
    done = interp("run", "attribution_eval", *WORDS, "--output_root", "out", "--shards", 3, "--workers", 2)
    assert done.exit_code == 0 and ": done; what the workers printed is in" in done.output, done.output
    assert "done" in interp("resume", "out").output
    home = runs.status("out").home
    assert list((home / "record/logs").glob("*.log"))
    # a script whose worker is asked to stop puts itself back into the queue
    shutil.rmtree("out")
    shutil.rmtree(home / "record/rows")
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, line in {"scontrol": f"echo $* > {folder}/requeued", "squeue": "echo RUNNING"}.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_folder / name).chmod(0o755)
    script = interp("sbatch", "out", "--tasks", 1).output
    shell = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "17"}
    shell["SLURM_ARRAY_TASK_ID"] = "0"
    process = subprocess.Popen(["bash", "-c", script], env=shell)
    while not list((home / "record/rows").rglob("*.lease")):
        assert process.poll() is None
    process.terminate()
    assert process.wait() == 75 and Path("requeued").read_text() == "requeue 17_0\n"
    assert runs.status("out").state == "unfinished"
    assert interp("resume", "out", "--workers", 1).exit_code == 0 and runs.status("out").state == "done"


@pytest.mark.slow
def test_workers_with_a_model_are_killed(folder: Path) -> None:
    """Twenty rounds of two workers, one or both of them killed at a random moment."""
    draw, kills = random.Random(0), 0
    expected = attribution_eval(AttributionEvalConfig(output_root=folder / "plain", **SETTINGS))
    for number in range(20):
        tree = f"out{number}"
        planned = interp("run", "attribution_eval", *WORDS, "--output_root", tree, "--shards", 3, "--workers", 0)
        assert planned.exit_code == 0
        work = [sys.executable, "-m", "interp_core.cli", "work", tree]
        workers = [subprocess.Popen(work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
        while not any((runs.status(tree).home / "record").rglob("*.lease")):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        for worker in workers[: draw.choice([1, 2])]:
            worker.kill()
        codes = [worker.wait() for worker in workers]
        assert set(codes) <= {0, -signal.SIGKILL}
        kills += codes.count(-signal.SIGKILL)
        assert subprocess.run(work, check=False).returncode == 0
        assert scores(Path(tree)) == scores(expected) and runs.status(tree).state == "done"
    assert kills >= 15


@pytest.mark.slow
def test_the_visual_pipeline_in_shards(folder: Path) -> None:
    """Killed in the middle and resumed, it ends with the files of one process, to the bit."""
    words = ["run", "visual_phase1", "--model", "toy:vision", "--profile", "smoke"]
    assert interp(*words, "--out", "plain").exit_code == 4  # so few samples come to no verdict
    assert interp(*words, "--out", "shared", "--shards", 4, "--workers", 0).exit_code == 0
    for kill in range(2):
        process = subprocess.Popen([sys.executable, "-m", "interp_core.cli", "resume", "shared", "--workers", "2"])
        done, before = 0, sum(table.items_done for table in runs.status("shared").tables)
        while done <= before + kill or len(runs.status("shared").workers) < 2:
            assert process.poll() is None
            done = sum(table.items_done for table in runs.status("shared").tables)
        for worker in runs.status("shared").workers:
            os.kill(int(worker.split("-")[2]), signal.SIGKILL)
        assert process.wait() == 1 and runs.status("shared").state == "unfinished"
    assert interp("resume", "shared", "--workers", 2).exit_code == 4
    one, other = (files(Path(name)) for name in ("plain", "shared"))
    assert list(one) == list(other) and len(one) > 15
    assert [name for name in one if one[name] != other[name]] == []


def files(home: Path) -> dict[str, bytes]:
    """What a run wrote, but for pages and what says when it was."""
    named = {str(path.relative_to(home)): path for path in sorted(home.rglob("*")) if path.is_file()}
    apart = ("record/", "manifest.json", "DONE", "geometry/result/result.json")
    return {n: path.read_bytes() for n, path in named.items() if not n.startswith(apart) and not n.endswith(".html")}


def test_what_cannot_be_divided(folder: Path) -> None:
    refused = interp("run", "logit_lens", "--text", "Q: big", "--workers", 2)
    assert isinstance(refused.exception, ic.PlanError) and "comes with --shards N" in str(refused.exception)
    refused = interp("resume", "nothing")
    assert isinstance(refused.exception, ic.LoadError) and "holds no run" in str(refused.exception)
    with runs.open("mine", {}, recipe="mine", say=lambda line: None) as run:
        run.json("a.json", 1)
    refused = interp("resume", "mine")
    assert isinstance(refused.exception, ic.LoadError) and "was not planned in shards" in str(refused.exception)
    for words in ("1-", "a", "", "7"):
        with pytest.raises(ic.PlanError, match="--shards"):
            numbers(words, 7)
    assert numbers("0-2,5", 6) == {0, 1, 2, 5}


def test_a_plan_whose_settings_have_changed(folder: Path) -> None:
    """A worker that would open another run than the planned one is refused, also before anything was made."""
    from interp_core.runs.folder import PLANNING, WORKING, Planned

    def opened(settings: dict[str, Any]) -> None:
        with runs.open("out", settings, recipe="mine", say=lambda line: None):
            pass

    token = PLANNING.set({"shards": 2, "folder": str(folder), "command": {"out": None, "config": None, "words": []}})
    with pytest.raises(Planned):
        opened({"seed": 1})
    PLANNING.reset(token)
    with planned_command(Path("out")) as arguments:
        assert arguments["words"] == [] and WORKING.get() == folder / "out"
        opened({"seed": 1})
        with pytest.raises(ic.PlanError, match="holds another run: seed was 1, is 2"):
            opened({"seed": 2})
        with (
            pytest.raises(ic.PlanError, match="was planned for another run: seed was 1, is 3; plan it anew"),
            runs.open("elsewhere", {"seed": 3}, recipe="mine", say=lambda line: None),
        ):
            pass
