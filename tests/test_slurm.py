"""Runs as arrays on a real Slurm of one node, which `scripts/slurm-up` starts: whatever it does to workers, every row is
there once. `pytest -m slurm`; four minutes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_plugins import distribution
from test_shards_cli import COUNT, DATA, WORDS, files, scores

from interp_core import runs, testing
from interp_core.launch import Job, make_launcher
from interp_core.launch.slurm import ENDED, in_queue

ROOT = Path(__file__).parent.parent
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
LACKING = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name, path=SBIN)] + (
    [] if importlib.util.find_spec("submitit") else ["submitit"]
)
ROOT_USER = os.name == "posix" and os.getuid() == 0
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(LACKING != [], reason=f"not installed: {', '.join(LACKING)}"),
    pytest.mark.skipif(not ROOT_USER, reason="slurm-up must be root to start jobs"),
]
ITEMS = 60
SQUARES = """
import time
from pathlib import Path

from interp_core import runs

def squares(items: int = 40, seconds: float = 0.25, out: Path | None = None) -> None:
    def square(number: int) -> dict[str, int]:
        time.sleep(seconds)
        return {"number": number, "square": number**2}

    with runs.open(out, {"items": items}, recipe="squares", say=lambda line: None) as run:
        rows = run.map("squares.jsonl", square, range(items), by=lambda number: number)
        run.table("total.csv", [{"total": sum(row["square"] for row in rows)}])
"""


@dataclass
class Cluster:
    """A private Slurm, and a recipe without a model that its jobs can import."""

    environment: dict[str, str]
    released: set[str] = field(default_factory=set)

    def shell(self, *words: Any) -> str:
        """What a program of Slurm's prints."""
        done = subprocess.run([str(w) for w in words], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def interp(self, *words: Any) -> subprocess.Popen[str]:
        """A command of ours, begun. Ctrl-C ends it, also where a shell runs these tests in the background."""
        command = [sys.executable, "-m", "interp_core.cli", *map(str, words)]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def squares(self, out: Path, *words: Any, items: int = ITEMS, seconds: float = 0.25) -> subprocess.Popen[str]:
        """Four workers on a run, begun."""
        study = ("--out", out, "--items", items, "--seconds", seconds)
        return self.interp("run", "squares", *study, "--shards", 12, "--workers", 4, "--launcher", "slurm", *words)

    def task(self, out: Path, rows: int = 6) -> str:
        """The number of a task that is at work, once the run has rows."""
        until(lambda: done_of(out) >= rows)
        return self.shell("squeue", "-hr", "-t", "R", "-o", "%i").splitlines()[0]

    def make_room(self) -> None:
        """Let a job of the partition `urgent` take the whole node for a moment."""
        self.shell("sbatch", "--wait", "-p", "urgent", "-n1", "-c4", "--output=/dev/null", "--wrap", "true")

    def ask_to_stop(self, *words: str) -> None:
        """Signal a task, which puts itself back into the queue."""
        # scancel goes on for two minutes after a task has stopped so soon
        signals = subprocess.Popen(["scancel", *words], env=self.environment, stderr=subprocess.DEVNULL)
        until(lambda: "Restarts=1" in self.shell("scontrol", "show", "job", words[-1]))
        signals.kill()
        signals.wait()

    def release(self) -> None:
        """Let jobs that were put back into the queue wait three seconds instead of two minutes. One that is started in
        the second in which it was ended fails: its node still refuses it (Job credential revoked).
        """
        for line in self.shell("squeue", "-hr", "-t", "PD", "-O", "JobArrayID,RestartCnt,Reason").splitlines():
            if "BeginTime" in line and line not in self.released:
                self.shell("scontrol", "update", f"jobid={line.split()[0]}", "StartTime=now+3")
                self.released.add(line)

    def until_empty(self) -> None:
        until(lambda: not self.shell("squeue", "-h"), 120, self.release)


def until(holds: Callable[[], Any], seconds: float = 120, meanwhile: Callable[[], None] = lambda: None) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to this"
        meanwhile()
        time.sleep(0.1)


def done_of(out: Path) -> int:
    """How many rows a run has."""
    try:
        return sum(table.items_done for table in runs.status(out).tables)
    except OSError:
        return 0


def ended(process: subprocess.Popen[str], code: int = 0, meanwhile: Callable[[], None] = lambda: None) -> str:
    """What a command printed, which ends with this exit status."""
    until(lambda: process.poll() is not None, 240, meanwhile)
    printed = process.communicate()[0]
    assert process.returncode == code, printed
    return printed


def again(printed: str) -> int:
    """How many jobs were submitted again."""
    return sum(int(count) for count in re.findall(r"(\d+) of \d+ jobs ended .*submitted again", printed))


def started(*options: str) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    code = folder / "recipes"
    distribution(code, "squares", {"recipes": {"squares": "squares:squares"}}, SQUARES)
    try:
        up = subprocess.run(
            [str(ROOT / "scripts/slurm-up"), str(folder / "slurm"), *options], capture_output=True, text=True
        )
        if up.returncode == 3:
            pytest.skip(reason=up.stderr.strip())
        assert up.returncode == 0, up.stderr
        more = {"SLURM_CONF": up.stdout.strip().partition("=")[2], "PYTHONPATH": str(code)}
        yield Cluster(os.environ | more)
    finally:
        subprocess.run([str(ROOT / "scripts/slurm-down"), str(folder / "slurm")], check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def plain() -> Iterator[Cluster]:
    yield from started()


@pytest.fixture(scope="session")
def with_accounting() -> Iterator[Cluster]:
    yield from started("--accounting")


@pytest.fixture(params=["plain", "with_accounting"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def surroundings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The cluster of a test is this process's too, and has no jobs when it is over."""
    kinds = set(request.fixturenames) & {"plain", "cluster"}
    slurm: Cluster = request.getfixturevalue(kinds.pop())
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("HOME", str(tmp_path))
    slurm.environment["HOME"] = str(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    slurm.shell("scancel", "--user=root")
    until(lambda: not slurm.shell("squeue", "-h"))


def check(out: Path, items: int = ITEMS) -> None:
    """Every row exactly once, the table of an undivided run, nothing left behind.

    Raises:
        AssertionError: a row is lost or doubled.
    """
    assert runs.status(out).state == "done"
    rows = [json.loads(line) for line in (out / "squares.jsonl").read_text().splitlines()]
    assert rows == [{"number": number, "square": number**2} for number in range(items)]
    assert (out / "total.csv").read_text() == f"total\n{sum(n**2 for n in range(items))}\n"
    left = [path for kind in ("*.tmp", "*.journal", "*.lease") for path in out.rglob(kind)]
    assert not left, left


# Jobs


def test_the_kit(cluster: Cluster) -> None:
    testing.check_launcher("slurm").raise_if_failed()


def test_outcomes(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs that die leave nothing, on whose absence alone they are begun again, so and so often."""
    jobs = [
        Job(divmod, (7, 2)), Job(divmod, (1, 0)), Job(os._exit, (7,)), Job(os.kill, (0, signal.SIGKILL)),
        Job(exit, (2,)), Job(os.getenv, ("CUDA_VISIBLE_DEVICES",)), Job(os.getenv, ("SLURM_CPUS_PER_TASK",)),
    ]  # fmt: skip
    launcher = make_launcher("slurm", gpus=1, cpus=2, restarts=1, memory="100M", sbatch=["comment=a b", "exclusive"])
    outcomes = launcher.run(jobs)
    assert outcomes[0].value == (3, 1)
    for number, says in {1: "ZeroDivisionError", 2: "submitted 2 times", 3: "submitted 2 times", 4: "exit: 2"}.items():
        assert not outcomes[number].ok and says in outcomes[number].error.replace("SystemE", "e"), outcomes[number]
    assert "ended in Slurm as FAILED without a result" in outcomes[2].error
    assert outcomes[5].value == "0" and outcomes[6].value == "2"
    assert again(capsys.readouterr().err) == 2
    kept = list((tmp_path / ".cache/interp_core/slurm").iterdir())
    assert len(kept) == 1 and str(kept[0]) in outcomes[2].error


def test_a_job_is_refused(plain: Cluster) -> None:
    with pytest.raises(ImportError, match="Slurm refused the jobs: .*invalid partition"):
        make_launcher("slurm", partition="nowhere").run([Job(divmod, (7, 2))])


def test_tasks_of_a_throttled_array_are_all_there(plain: Cluster) -> None:
    """squeue writes those that wait as `12_[2-5%2]`, and sacct knows them as nothing at all."""
    said = plain.shell("sbatch", "--array=0-5%2", "--output=/dev/null", "--wrap", "sleep 20")
    job = said.split()[-1]
    until(lambda: "[2-5%2]" in plain.shell("squeue", "-h", "-o", "%i"))
    states = in_queue()
    assert states is not None
    ours = {name: state for name, state in states.items() if name.startswith(f"{job}_")}
    assert sorted(ours) == [f"{job}_{task}" for task in range(6)] and not set(ours.values()) & ENDED
    plain.shell("scancel", job)
    until(lambda: {(in_queue() or {}).get(name, "") for name in ours} == {"CANCELLED"})


def test_a_slurm_that_does_not_answer(plain: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says nothing about jobs."""
    text = Path(plain.environment["SLURM_CONF"]).read_text()
    (tmp_path / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", text) + "MessageTimeout=5\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert in_queue() is None
    monkeypatch.setenv("PATH", "")
    assert in_queue() is None


# Workers


def test_a_worker_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    run = cluster.squares(tmp_path / "out")
    until(lambda: done_of(tmp_path / "out") >= 6)
    sessions = [json.loads(path.read_text()) for path in (tmp_path / "out/record/sessions").glob("*.json")]
    os.kill(next(session["pid"] for session in sessions if session["state"] == "running"), signal.SIGKILL)
    printed = ended(run)
    assert again(printed) == 1, printed
    check(tmp_path / "out")


def test_workers_make_room_and_come_back(plain: Cluster, tmp_path: Path) -> None:
    """Preemption that requeues: SIGTERM, the item at hand is finished, then back into the queue."""
    run = plain.squares(tmp_path / "out", seconds=1)
    task = plain.task(tmp_path / "out")
    plain.make_room()
    before = done_of(tmp_path / "out")
    assert 6 <= before < ITEMS
    assert not again(ended(run, meanwhile=plain.release))
    assert "Restarts=1" in plain.shell("scontrol", "show", "job", task)
    check(tmp_path / "out")


def test_workers_that_are_cancelled_to_make_room_are_submitted_again(plain: Cluster, tmp_path: Path) -> None:
    """An item of four seconds is not finished in the two that Slurm lets them; else they would put themselves back."""
    run = plain.squares(tmp_path / "out", "--launcher-option", "partition=spot", items=12, seconds=4)
    plain.task(tmp_path / "out", rows=1)
    plain.make_room()
    assert 1 <= done_of(tmp_path / "out") < 12
    printed = ended(run, meanwhile=plain.release)
    assert again(printed) >= 1 and "(PREEMPTED)" in printed, printed
    check(tmp_path / "out", 12)


def test_a_task_that_somebody_cancels_stays_so(plain: Cluster, tmp_path: Path) -> None:
    """Others do its shard; if all are cancelled, the run says so, and resume goes on."""
    run = plain.squares(tmp_path / "out")
    plain.shell("scancel", plain.task(tmp_path / "out"))
    printed = ended(run)
    assert "ended in Slurm as CANCELLED without a result" in printed and not again(printed)
    check(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    run = plain.squares(tmp_path / "out")
    plain.shell("scancel", plain.task(tmp_path / "out").partition("_")[0])
    assert "squares, unfinished" in ended(run, 1)
    assert done_of(tmp_path / "out") >= 6
    ended(plain.interp("resume", "out", "--launcher", "slurm"))
    check(tmp_path / "out")


def test_detached_workers(plain: Cluster, tmp_path: Path) -> None:
    """Nobody waits for them; at a signal before the time limit they put themselves back."""
    printed = ended(plain.squares(tmp_path / "out", "--detach", "--launcher-option", "cap=2"))
    job = printed.strip().splitlines()[-1].partition("given to slurm as ")[2].partition(";")[0]
    task = plain.task(tmp_path / "out")
    assert task.startswith(f"{job}_") and "squares, running" in ended(plain.interp("status", "out"))
    plain.ask_to_stop("--signal=USR2", task)
    plain.until_empty()
    check(tmp_path / "out")


def test_the_waiting_process_is_stopped(plain: Cluster, tmp_path: Path) -> None:
    run = plain.squares(tmp_path / "out")
    plain.task(tmp_path / "out")
    run.send_signal(signal.SIGINT)
    assert "interp resume" in ended(run, 130)
    until(lambda: not plain.shell("squeue", "-h"))


def test_the_printed_script(plain: Cluster, tmp_path: Path) -> None:
    """As it is printed. A signal to the script is handed on to the worker, and the task goes back into the queue."""
    ended(plain.interp("run", "squares", "--out", "out", "--items", ITEMS, "--shards", 4, "--workers", 0))
    (tmp_path / "job.sh").write_text(ended(plain.interp("sbatch", "out")))
    plain.shell("sbatch", "job.sh")
    job = plain.task(tmp_path / "out").partition("_")[0]
    plain.ask_to_stop("--signal=USR1", "--batch", f"{job}_3")  # whose number is the array's too
    assert "Restarts=0" in plain.shell("scontrol", "show", "job", f"{job}_1")
    plain.until_empty()
    check(tmp_path / "out")


def test_the_printed_script_at_its_time_limit(plain: Cluster, tmp_path: Path) -> None:
    """Slurm's own signal before a minute is over: the task ends with its item, comes back, and is cut off nowhere."""
    study = ("--out", "out", "--items", ITEMS, "--seconds", 1)
    ended(plain.interp("run", "squares", *study, "--shards", 4, "--workers", 0))
    (tmp_path / "job.sh").write_text(ended(plain.interp("sbatch", "out", "--tasks", 1, "--option", "time=1")))
    job = plain.shell("sbatch", "job.sh").split()[-1]
    until(lambda: "Restarts=1" in plain.shell("scontrol", "show", "job", job), 90)
    assert done_of(tmp_path / "out") < ITEMS  # none yet, where Slurm looks at the clock right after the start
    until(lambda: not plain.shell("squeue", "-h"), 300, plain.release)
    until(lambda: "JobState=COMPLETED" in plain.shell("scontrol", "show", "job", job), 60)  # after COMPLETING
    assert "stopped by SIGUSR1" in (tmp_path / f"out/record/logs/{job}_0.log").read_text()
    check(tmp_path / "out")


# Recipes with a model


def test_the_attribution_evaluation(plain: Cluster, tmp_path: Path) -> None:
    """Killed in the middle, it ends with the scores of one process."""
    line = (DATA / "traces/tiny_gen_ruler.jsonl").read_text()
    Path("needles.jsonl").write_text(line * COUNT)
    ended(plain.interp("run", "attribution_eval", *WORDS, "--output_root", "whole"))
    words = ["run", "attribution_eval", *WORDS, "--output_root", "out", "--shards", COUNT, "--workers", 2]
    run = plain.interp(*words, "--launcher", "slurm")
    tree = tmp_path / "out"
    until(lambda: list(tmp_path.glob("out.runs/*/record/sessions/*.json")))
    until(lambda: done_of(tree) >= 1)
    (home,) = tmp_path.glob("out.runs/*")
    pids = [json.loads(path.read_text())["pid"] for path in (home / "record/sessions").glob("*.json")]
    os.kill(pids[0], signal.SIGKILL)
    assert again(ended(run)) == 1
    assert runs.status(tree).state == "done"
    assert scores(tree) == scores(tmp_path / "whole") and len(scores(tree)) == 4


@pytest.mark.slow
def test_the_visual_pipeline(plain: Cluster, tmp_path: Path) -> None:
    """Killed in the middle, it ends with the files of one process, to the bit."""
    words = ["run", "visual_phase1", "--model", "toy:vision", "--profile", "smoke"]
    ended(plain.interp(*words, "--out", "whole"), 4)  # so few samples come to no verdict
    run = plain.interp(*words, "--out", "out", "--shards", 4, "--workers", 2, "--launcher", "slurm")
    until(lambda: list(tmp_path.glob("out/record/sessions/*.json")))
    until(lambda: done_of(tmp_path / "out") >= 1)
    pids = [json.loads(path.read_text())["pid"] for path in tmp_path.glob("out/record/sessions/*.json")]
    os.kill(pids[0], signal.SIGKILL)
    assert again(ended(run, 4)) == 1
    one, other = (files(tmp_path / name) for name in ("whole", "out"))
    assert list(one) == list(other) and [name for name in one if one[name] != other[name]] == []
