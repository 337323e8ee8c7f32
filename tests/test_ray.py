"""Runs on a real Ray cluster of two nodes, each started as its users start theirs: whatever becomes of workers and nodes,
every row is there once. `pytest -m ray`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_plugins import distribution
from test_slurm import ITEMS, SQUARES, check, done_of, ended, until

import interp_core as ic
from interp_core import runs, testing
from interp_core.launch import Job, make_launcher
from interp_core.launch.ray import work

LACKING = importlib.util.find_spec("ray") is None
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(LACKING, reason="not installed: ray (the extra `ray`)"),
]


def parent_of(pid: int) -> int:
    """0 of a process that is gone, or is only waited for."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent)


def running(out: Path) -> list[int]:
    """Processes that are at work on a run."""
    sessions = [json.loads(path.read_text()) for path in (out / "record/sessions").glob("*.json")]
    return [session["pid"] for session in sessions if session["state"] == "running" and parent_of(session["pid"])]


@dataclass
class Cluster:
    """A private Ray, and a recipe without a model that its jobs can import."""

    folder: Path
    environment: dict[str, str]
    address: str
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *words: str) -> int:
        """A node with two CPUs; the process of its raylet."""
        common = ["--block", "--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *common, *words]
        log = (self.folder / f"{len(self.nodes)}.log").open("w")
        self.nodes.append(node := subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
        log.close()
        until(lambda: "--block" in Path(log.name).read_text() or node.poll() is not None, 60)
        assert node.poll() is None, Path(log.name).read_text()
        children = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        (raylet,) = [pid for pid in children if parent_of(pid) == node.pid and self.is_raylet(pid)]
        return raylet

    def is_raylet(self, pid: int) -> bool:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"raylet/raylet")

    @contextlib.contextmanager
    def second(self, *words: str) -> Iterator[int]:
        """Another node, in this block."""
        raylet = self.start(f"--address={self.address}", *words)
        yield raylet
        self.stop(self.nodes[-1])

    def stop(self, node: subprocess.Popen[bytes]) -> None:
        if node.poll() is None:
            node.terminate()
        node.wait(60)

    def squares(self, out: Path, *words: Any, workers: int = 2, seconds: float = 0.25) -> subprocess.Popen[str]:
        """Some workers on a run, begun."""
        study = ("--out", out, "--items", ITEMS, "--seconds", seconds, "--shards", 12, "--workers", workers)
        return self.interp("run", "squares", *study, "--launcher", "ray", *words)

    def interp(self, *words: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "interp_core.cli", *map(str, words)]
        return subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )


@pytest.fixture(scope="session")
def ray_alone() -> Iterator[Cluster]:
    """A cluster of its head."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    distribution(folder / "recipes", "squares", {"recipes": {"squares": "squares:squares"}}, SQUARES)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = [str(folder / "recipes"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": ":".join(filter(None, places)), "HOME": str(folder)}
    environment["RAY_ADDRESS"] = address = f"127.0.0.1:{port}"
    cluster = Cluster(folder, environment, address)
    try:
        cluster.start(
            "--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false",
            "--node-ip-address=127.0.0.1",
        )  # fmt: skip
        yield cluster
    finally:
        for node in cluster.nodes[::-1]:
            cluster.stop(node)
        shutil.rmtree(folder)


@pytest.fixture
def cluster(ray_alone: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    """The same, which this process finds by itself."""
    monkeypatch.setenv("RAY_ADDRESS", ray_alone.address)
    monkeypatch.chdir(tmp_path)
    return ray_alone


# Jobs


def test_the_kit(cluster: Cluster) -> None:
    testing.check_launcher("ray").raise_if_failed()


def test_outcomes(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [
        Job(divmod, (7, 2)), Job(divmod, (1, 0)), Job(os._exit, (7,)), Job(os.kill, (0, signal.SIGKILL)),
        Job(exit, (2,)), Job(os.getenv, ("OMP_NUM_THREADS",)), Job(os.getcwd), Job(lambda: len(jobs)),
        Job(os.getenv, ("RAY_USAGE_STATS_ENABLED",)),
    ]  # fmt: skip
    outcomes = make_launcher("ray", cpus=2, restarts=1).run(jobs)
    assert [outcome.value for outcome in outcomes] == [(3, 1), *[None] * 4, "2", str(tmp_path), len(jobs), "0"]
    for number, says in {1: "ZeroDivisionError", 2: "begun 2 times", 3: "begun 2 times", 4: "exit: 2"}.items():
        assert not outcomes[number].ok and says in outcomes[number].error.replace("SystemE", "e"), outcomes[number]
    printed = capsys.readouterr()
    assert not printed.out and max(map(len, printed.err.splitlines())) <= 160


def test_refusals(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(ic.PluginError, match="no Ray cluster at 127.0.0.1:1 to join: `ray start --head"):
        make_launcher("ray").run([Job(divmod, (7, 2))])
    with pytest.raises(ic.PlanError, match=r"job 0 \(lock\) cannot be sent to another machine"):
        make_launcher("ray").run([Job(lock, (threading.Lock(),))])
    outcome = pickle.loads(work(pickle.dumps(Job(divmod, (7, 2))), 1, "nowhere"))
    assert "nowhere is not there on" in outcome.error and "all nodes must see the working folder" in outcome.error


def lock(held: object) -> None:
    raise AssertionError("never sent")


def test_jobs_wait_for_a_node_that_has_what_they_want(cluster: Cluster) -> None:
    code = (
        "import os; from interp_core.launch import Job, make_launcher;"
        "print(make_launcher('ray', gpus=1).run([Job(os.getenv, ('CUDA_VISIBLE_DEVICES',))] * 2))"
    )
    log = cluster.folder / "wait.log"
    with log.open("w") as file:
        jobs = subprocess.Popen([sys.executable, "-c", code], env=cluster.environment, stdout=file, stderr=file)
    until(lambda: "no node of the Ray cluster has 1 CPUs, 1 GPUs: jobs wait" in log.read_text())
    with cluster.second("--num-gpus=1"):
        assert jobs.wait(60) == 0
    assert "[Outcome(value='0', error=''), Outcome(value='0', error='')]" in log.read_text()


# Workers


def sessions(out: Path) -> int:
    """How many workers have begun."""
    return len(list((out / "record/sessions").glob("*.json")))


def test_a_node_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    """With half of the workers, in the middle of the run; another node takes its place, and Ray begins them there."""
    out = tmp_path / "out"
    raylet = cluster.start(f"--address={cluster.address}")
    run = cluster.squares(out, workers=4, seconds=1)
    until(lambda: done_of(out) >= 12 and len(running(out)) == 4)
    there = [pid for pid in running(out) if parent_of(pid) == raylet]
    assert len(there) == 2 and sessions(out) == 4
    os.kill(raylet, signal.SIGKILL)
    before = done_of(out)
    until(lambda: not any(map(parent_of, there)), 20)
    with cluster.second() as raylet:
        until(lambda: sum(parent_of(pid) == raylet for pid in running(out)) == 2, 20)
        ended(run)
    assert 12 <= before < ITEMS and sessions(out) == 6
    check(out)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_is_begun_again(cluster: Cluster, tmp_path: Path, number: int) -> None:
    """Killed, or asked to stop: then it ends with status 75 after the item at hand."""
    out = tmp_path / "out"
    run = cluster.squares(out)
    until(lambda: done_of(out) >= 6 and len(running(out)) == 2)
    os.kill(running(out)[0], number)
    until(lambda: sessions(out) == 3, 20)
    ended(run)
    check(out)


def test_detached_workers(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = ended(cluster.squares(out, "--detach"))
    assert re.search(r"given to ray as interp-\w{8};", printed), printed
    assert done_of(out) < ITEMS
    until(lambda: runs.status(out).state == "done")
    check(out)


def test_the_waiting_process_is_stopped(cluster: Cluster, tmp_path: Path) -> None:
    """Its workers end; resume goes on."""
    out = tmp_path / "out"
    run = cluster.squares(out)
    until(lambda: done_of(out) >= 6)
    run.send_signal(signal.SIGINT)
    assert "interp resume" in ended(run, 130)
    until(lambda: not running(out), 20)
    before = done_of(out)
    time.sleep(1)
    assert 6 <= before == done_of(out) < ITEMS
    ended(cluster.interp("resume", "out", "--launcher", "ray"))
    check(out)
