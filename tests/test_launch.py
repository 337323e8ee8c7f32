"""Launchers: jobs in processes of their own, a few at a time, none of which can take the others with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from test_plugins import distribution
from typer.testing import CliRunner

import interp_core as ic
from interp_core.cli import app
from interp_core.cli.planned import starter_of
from interp_core.launch import Job, Launcher, Outcome, make_launcher
from interp_core.launch.local import Local
from interp_core.launch.ray import Ray
from interp_core.launch.slurm import Slurm, in_queue
from interp_core.plugins import refresh


def mark(folder: str, name: str, seconds: float) -> str:
    """Leave when it began and ended."""
    began = time.time()
    time.sleep(seconds)
    (Path(folder) / name).write_text(f"{began} {time.time()}")
    return name


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lock() -> object:
    import threading

    return threading.Lock()


def test_local_is_capped_and_keeps_the_order(tmp_path: Path) -> None:
    jobs = [Job(mark, (str(tmp_path), str(i), 0.3 - 0.1 * i)) for i in range(3)]
    launcher = make_launcher("local", cap=2)
    assert isinstance(launcher, Launcher)
    assert launcher.run(jobs) == [Outcome("0"), Outcome("1"), Outcome("2")]
    spans = [tuple(map(float, path.read_text().split())) for path in tmp_path.iterdir()]
    at_once = max(sum(a <= moment < b for a, b in spans) for moment, _ in spans)
    assert at_once <= 2


def test_jobs_that_fail_are_outcomes() -> None:
    jobs = [Job(divmod, (1, 0)), Job(os._exit, (7,)), Job(kill_myself), Job(exit, (2,)), Job(lock), Job(divmod, (7, 2))]
    found = Local(cap=2).run(jobs)
    says = ["ZeroDivisionError", "exit status 7 and no result", "exit status -9", "SystemExit: 2", "cannot pickle"]
    for outcome, text in zip(found, says, strict=False):
        assert not outcome.ok and text in outcome.error, outcome.error
    assert found[-1].ok and found[-1].value == (3, 1)


SCRIPT = """
from interp_core.launch import Job, make_launcher

def seven():
    return 7

print("read")
print(make_launcher("local").run([Job({job})])[0])
"""


def test_a_script_without_a_guard_works_or_is_told_what_it_needs(tmp_path: Path) -> None:
    """Jobs of modules run, and the script is not read again; for one of its own functions it needs a guard."""
    script = tmp_path / "script.py"

    def run(job: str) -> subprocess.CompletedProcess[str]:
        script.write_text(SCRIPT.format(job=job))
        return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)

    assert run("divmod, (7, 2)").stdout == "read\nOutcome(value=(3, 1), error='')\n"
    own = run("seven")
    assert "job 0: its process ended with exit status 1 before it came to the job" in own.stdout, own.stdout
    assert own.stdout.count('Put what the script starts under `if __name__ == "__main__":`') == 1
    assert "PlanError: this process is about to do a job of" in own.stderr
    script.write_text(SCRIPT.format(job="seven").replace("print(make", 'if __name__ == "__main__": print(make'))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert "Outcome(value=7, error='')" in done.stdout, done.stderr


class Here:
    """Runs jobs in this process."""

    name = "here"

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        return [Outcome(job.call(*job.args)) for job in jobs]


class Gone(Here):
    """Never brings a result."""

    name = "gone"

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        return [Outcome(error="Traceback …\nOSError: the machine is gone") for _ in jobs]


RECIPE = """
import os
from pathlib import Path

def pid(fails: bool = False, out: Path | None = None) -> str:
    if fails:
        raise OSError("no luck")
    return f"{os.getpid()} {os.getcwd()} {out}"
"""


@pytest.fixture
def interp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., tuple[int, str]]]:
    """`interp run` with these launchers, and a recipe that is installed: exit status, output and error."""
    distribution(tmp_path, "pid", {"recipes": {"pid": "pid:pid"}}, RECIPE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    refresh()
    ic.registry("launchers").register("here", Here)
    ic.registry("launchers").register("gone", Gone)

    def run(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["run", *args])
        return done.exit_code, f"{done.stdout}{done.exception or ''}"

    yield run
    refresh()


def test_a_run_is_a_job_of_a_launcher(interp: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Same words, same folder, another process; what it prints is printed here."""
    status, printed = interp("pid", "--launcher", "local", "--out", "x")
    pid, *rest = printed.split()
    assert status == 0 and int(pid) != os.getpid() and rest == [str(tmp_path), "x"]
    assert int(interp("pid", "--launcher", "here")[1].split()[0]) == os.getpid()
    status, _ = interp("logit_lens", "--text", "Q: big", "Q: hot", "--at=-1", "--launcher", "here", "--out", "lens")
    assert status == 0 and (tmp_path / "lens/DONE").is_file()


def test_a_run_that_a_launcher_cannot_do_says_why(interp: Callable[..., tuple[int, str]]) -> None:
    assert "no launcher is called 'her'. Did you mean 'here'" in interp("pid", "--launcher", "her")[1]
    assert interp("pid", "--launcher", "local", "--fails") == (1, "no luck")
    assert "pid has no setting 'failz'. Did you mean 'fails'" in interp("pid", "--launcher", "here", "--failz")[1]
    gone = interp("pid", "--launcher", "gone")[1]
    assert "launcher 'gone' brought no end of recipe 'pid' of pid 1.2: OSError: the machine is gone\nTraceback" in gone
    ic.registry("recipes").register("mine", mark)
    assert "is registered in this process alone" in interp("mine", "--launcher", "here")[1]


def test_bad_jobs_and_options() -> None:
    with pytest.raises(
        ic.PlanError, match=r"job 1 \(.*<lambda>\) cannot be sent to a process: .*Use a module's function"
    ):
        Local().run([Job(divmod, (7, 2)), Job(lambda: 1)])
    with pytest.raises(ic.PlanError, match="cap=0"):
        make_launcher("local", cap=0)
    with pytest.raises(ic.PluginError, match="launcher 'local' cannot be made with {'caps': 2}"):
        make_launcher("local", caps=2)
    with pytest.raises(ic.PluginError, match="no launcher is called 'locale'. Did you mean 'local'"):
        make_launcher("locale")
    assert Local().run([]) == []


def test_options_of_a_launcher(interp: Callable[..., tuple[int, str]]) -> None:
    said = interp("pid", "--launcher", "slurm", "--launcher-option", "tim=2")[1]
    assert "launcher slurm has no option 'tim=2': write --launcher-option name=value; it has cap, partition," in said
    assert "it has none" in interp("pid", "--launcher", "here", "--launcher-option", "cap=2")[1]
    assert "launcher slurm: setting time: " in interp("pid", "--launcher", "slurm", "--launcher-option", "time=long")[1]
    twice = ["--launcher-option", "cap=2", "--launcher-option", "cap=3"]
    assert "launcher local: setting cap: " in interp("pid", "--launcher", "local", *twice)[1]
    assert "comes with --launcher NAME" in interp("pid", "--launcher-option", "cap=2")[1]
    assert "--detach comes with --shards N" in interp("pid", "--launcher", "slurm", "--detach")[1]
    assert interp("pid", "--launcher", "local", "--launcher-option", "cap=1")[0] == 0
    starter = starter_of("slurm", ["sbatch=qos=long", "sbatch=--exclusive", "memory=2G"], cap=3, nothing=1)
    assert isinstance(starter, Slurm)
    assert starter.parameters["additional_parameters"] == {"requeue": True, "qos": "long", "exclusive": True}
    assert (starter.parameters["mem"], starter.cap) == ("2G", 3)


def test_slurm_refuses_before_it_submits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for option, low in {"cap": 0, "time": 0, "gpus": -1, "restarts": -1}.items():
        with pytest.raises(ic.PlanError, match=f"{option}={low}: it must be at least"):
            make_launcher("slurm", **{option: low})
    with pytest.raises(ic.PlanError, match="signal_delay=120: jobs of 2 minutes .* give between 1 and 119"):
        make_launcher("slurm", time=2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ic.InterpError, match="there is no `sbatch` here|pip install 'interp-core\\[slurm\\]'"):
        make_launcher("slurm", folder=tmp_path).run([Job(divmod, (7, 2))])
    assert in_queue() is None


def test_ray_refuses_before_it_sends() -> None:
    for option, low in {"cap": 0, "cpus": 0, "gpus": -1, "memory": -1, "restarts": -1}.items():
        with pytest.raises(ic.PlanError, match=f"{option}={low}: it must be at least"):
            make_launcher("ray", **{option: low})
    for address in ("local", "", "ray://head:10001", "head"):
        with pytest.raises(ic.PlanError, match="give its head as host:port, or 'auto'"):
            make_launcher("ray", address=address)
    starter = starter_of("ray", ["gpus=1", "memory=2.5"], cap=3, folder="nothing")
    assert isinstance(starter, Ray) and (starter.cap, starter.wants) == (3, {"CPU": 1, "GPU": 1, "memory": 2.5e9})
    with pytest.raises(ic.InterpError, match="`ray start --head|pip install 'interp-core\\[ray\\]'"):
        make_launcher("ray", address="127.0.0.1:1").run([Job(divmod, (7, 2))])
