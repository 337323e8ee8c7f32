"""Runs that several processes carry out: planned by their own command, which is noted in the run's folder, and which
every process carries out. What of it is to be done next is told by files (docs/cluster.md)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import typer

from .. import settings
from ..columns import aligned, terminal_width, wrapped
from ..errors import InterpError, ItemError, LoadError, PlanError, PluginError
from ..plugins import SESSION, Plugin, registry
from ..progress import Progress
from ..runs import RunStatus, TableStatus, status
from ..runs.folder import COMMAND, PLANNING, RECORD, WORKING, Planned, RunFolder
from ..runs.mapping import sharing
from ..runs.stopping import REQUEUE, stoppable
from . import outputs

if TYPE_CHECKING:
    from ..launch import Launcher

Command = Callable[..., None]
"""`interp run`, with what it was given by name."""
LOGS = "logs"
MOST = 1000
"""Workers in a queue, if nobody says how many."""
_GPU = re.compile(r"nvidia\d+")


# Planning


def planned(command: Command, plugin: Plugin, arguments: Mapping[str, Any], shards: int, launcher: Launcher) -> Path:
    """Plan a run: as a job, which opens the model and the run's folder and ends there, so that this process holds
    neither a model nor a GPU, and a model may be larger than this machine. The run's folder.

    Raises:
        PluginError: a plugin that another process does not have, or one that opens no run folder.
        InterpError: what the run itself refused.
    """
    from ..launch import Job

    if plugin.dist == SESSION:
        raise PluginError(f"{plugin.label} is registered in this process alone; workers need one that is installed")
    with Progress("plan", 0):
        (outcome,) = launcher.run([Job(_plan, (command, os.getcwd(), dict(arguments), shards))])
    if not outcome.ok:
        raise PluginError(f"{plugin.label} could not be planned: {outcome.error.strip()}")
    home, refusal = outcome.value
    if refusal:
        raise InterpError(refusal)
    if home is None:
        raise PluginError(f"{plugin.label} opens no run folder (ic.runs.open), so it cannot be divided")
    return Path(home)


def _plan(command: Command, folder: str, arguments: Mapping[str, Any], shards: int) -> tuple[str | None, str]:
    """The folder of the run that a command opens, or the error that it ends with."""
    noted = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
    token = PLANNING.set({"shards": shards, "folder": folder, "command": noted})
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(None):
            command(**arguments)
    except Planned as plan:
        return str(plan.home), ""
    except (InterpError, OSError) as error:
        return None, outputs.sentence(error)
    finally:
        PLANNING.reset(token)
    return None, ""


# Working


@contextlib.contextmanager
def planned_command(home: Path) -> Iterator[dict[str, Any]]:
    """What a run's command was given, to be carried out in this block, in which paths mean what they did then.

    Raises:
        LoadError: the run was not planned.
    """
    planned = RunFolder.read(home / RECORD / COMMAND)
    if planned is None:
        raise LoadError(
            f"{home} was not planned in shards; its own command goes on with it. `interp run … --shards N` plans one"
        )
    arguments: dict[str, Any] = dict(planned["command"])
    arguments |= {name: Path(arguments[name]) for name in ("out", "config") if arguments[name]}
    arguments["words"] = [word for word in arguments["words"] if word != "--overwrite"]  # that was for who planned it
    home = home.resolve()
    if not Path(planned["folder"]).is_dir():
        raise LoadError(f"{home} was planned in {planned['folder']}, which is not there; paths are relative to it")
    token = WORKING.set(home)
    try:
        with contextlib.chdir(planned["folder"]):
            yield arguments
    finally:
        WORKING.reset(token)


def worked(command: Command, home: Path, share: frozenset[int] | None = None) -> int:
    """Carry out a run's command in this process, as one of its workers; the exit status."""
    with planned_command(home) as arguments, stoppable(), sharing(share):
        try:
            command(**arguments)
        except typer.Exit as verdict:
            return int(verdict.exit_code)
        except SystemExit as stop:
            print(stop, file=sys.stderr)
            return int(stop.code or 0)
    return 0


def work_elsewhere(command: Command, home: str, environment: Mapping[str, str], log: str) -> tuple[int, str]:
    """What a worker's process does: its exit status, and the error that it ended with. What it prints goes into a
    file."""
    os.environ.update(environment)
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            return worked(command, Path(home)), ""
        except ItemError as error:
            return 1, outputs.sentence(error)
        except (InterpError, OSError) as error:
            return 2, outputs.sentence(error)


def work_again(command: Command, home: str, environment: Mapping[str, str], log: str) -> tuple[int, str]:
    """The same of a worker in some queue, which may come late: a run that is done needs none. One that is asked to stop
    ends with a status that its launcher knows."""
    if status(home).state == "done":
        return 0, ""
    code, error = work_elsewhere(command, home, environment, log)
    if code == REQUEUE:
        raise SystemExit(REQUEUE)
    return code, error


def carry_out(
    command: Command, home: Path, workers: int | None, launcher: str, options: Sequence[str] = (), detach: bool = False
) -> None:
    """Start workers on a run, wait for them unless it is to `detach`, and say what became of it.

    Raises:
        PluginError: no such launcher, or one that cannot detach.
        PlanError: workers refused the run.
        Exit: the verdict of the recipe; 1 where items raised errors or workers died; 75 where they were stopped.
    """
    from ..launch import Job

    here = launcher == "local"
    count = workers or min(_places() if here else MOST, max(1, shard_count(home)))
    starter = starter_of(launcher, options, cap=count, folder=home / RECORD / "launcher")
    before = len(list((home / RECORD / LOGS).glob("*.log")))
    logs = [home / RECORD / LOGS / f"{before + number:03}.log" for number in range(count)]
    jobs = [
        Job(work_elsewhere if here else work_again, (command, str(home.resolve()), environment, str(log.resolve())))
        for environment, log in zip(_environments(count) if here else [{}] * count, logs, strict=True)
    ]
    if detach:
        numbers = ", ".join(_detachable(starter).submit(jobs))
        print(f"{home}: given to {launcher} as {numbers}; how far it is: interp status {home}")
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(home, over), daemon=True)
    watcher.start()
    try:
        outcomes = starter.run(jobs)
    except KeyboardInterrupt as stop:
        stop.add_note(f"what is done is kept in {home}; `interp resume {home}` goes on")
        raise
    finally:
        over.set()
        watcher.join()
    ended = [outcome.value if outcome.ok else (1, outcome.error.strip().splitlines()[-1]) for outcome in outcomes]
    for error in dict.fromkeys(error for _, error in ended if error):
        print(f"interp: {error}", file=sys.stderr)
    now = status(home)
    if now.state == "done":
        print(f"{now.home}: done; what the workers printed is in {home / RECORD / LOGS}")
        code = next((code for code, error in ended if code not in (0, REQUEUE) and not error), 0)
    else:
        print(shown(now))
        code = REQUEUE if all(code in (0, REQUEUE) for code, _ in ended) else max(code for code, _ in ended)
    if code:
        raise typer.Exit(code)


def starter_of(launcher: str, options: Sequence[str], **own: Any) -> Launcher:
    """A launcher with options from a command line, `name=value`; those of them that several are given of are lists.

    Args:
        own: what the command says, of options that the launcher has and the line does not name.

    Raises:
        PluginError: no such launcher.
        PlanError: no such option, or not of its kind.
    """
    from ..launch import make_launcher

    kind = registry("launchers").get(launcher)
    config = settings.of_function(MethodType(kind.__init__, kind))
    several: dict[str, list[str]] = {}
    for pair in options:
        name, sign, text = pair.partition("=")
        name = name.replace("-", "_")
        if not sign or name not in config.model_fields:
            raise PlanError(
                f"launcher {launcher} has no option {pair!r}: write --launcher-option name=value; it has "
                f"{', '.join(config.model_fields) or 'none'}"
            )
        several.setdefault(name, []).append(text)
    pairs = [f"{name}={texts[0] if len(texts) == 1 else json.dumps(texts)}" for name, texts in several.items()]
    chosen = settings.configured(f"launcher {launcher}", config, settings.read(launcher, config, pairs))
    passed = {name: getattr(chosen, name) for name in several}
    return make_launcher(launcher, **{name: own[name] for name in own if name in config.model_fields} | passed)


def _detachable(launcher: Launcher) -> Any:
    if not callable(getattr(launcher, "submit", None)):
        raise PluginError(
            f"launcher {launcher.name!r} cannot start workers and leave them (--detach); slurm and ray can"
        )
    return launcher


def _watch(home: Path, over: threading.Event) -> None:
    """Say how far a run is until it is over."""
    shown: Progress | None = None
    try:
        while not over.wait(1.0):
            tables = status(home).tables
            if not tables:
                continue
            total, done = sum(table.items for table in tables), sum(table.items_done for table in tables)
            if shown is None:
                shown = Progress(home.name, total)
                shown.__enter__()
            shown.total = total
            shown.add(max(0, done - shown.count))
    finally:
        if shown is not None:
            shown.__exit__(None, None, None)


def shard_count(home: Path) -> int:
    """In how many shards a run is planned."""
    return int((RunFolder.read(home / RECORD / COMMAND) or {"shards": 1})["shards"])


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    return sorted(
        path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*") if _GPU.fullmatch(path.name)
    )


def _places() -> int:
    return len(_gpus()) or len(os.sched_getaffinity(0))


def _environments(count: int) -> list[dict[str, str]]:
    """Of each of so many workers: one GPU, or its part of the cores."""
    gpus = _gpus()
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    shared = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
    return [shared | ({"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} if gpus else {}) for n in range(count)]


# Showing


def shown(now: RunStatus) -> str:
    """A status in lines."""
    width = terminal_width()
    lines = [f"{now.home}: {now.recipe}, {now.state}"]
    if now.tables:
        heads = ("table", "shards", "items", "at work", "failed")
        cells = [
            (t.name, f"{t.done:,} of {t.shards:,}", f"{t.items_done:,} of {t.items:,}", _who(t), f"{len(t.failed):,}")
            for t in now.tables
        ]
        lines += ["", *aligned([heads, *cells], width)]
    for table in now.tables:
        lines += [wrapped(f"{table.name}, {key}: {error}", width) for key, error in list(table.failed.items())[:5]]
    if now.state != "done" and now.command is not None:
        ways = {"running": "", "planned": "starts it"}.get(now.state, "goes on")
        lines += ["", f"interp resume {now.home}  {ways}"] if ways else []
    return "\n".join(lines)


def _who(table: TableStatus) -> str:
    if not table.at_work:
        return "0"
    return f"{len(table.at_work)}, last sign {min(table.at_work.values()):.0f} s ago"
