"""`interp work`, `status`, `resume`, `collect` and `sbatch`: what is done with a run that `interp run … --shards N`
planned."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import PlanError
from ..runs import status
from ..runs.folder import COMMAND, RECORD, RunFolder
from ..runs.stopping import REQUEUE
from .planned import LOGS, carry_out, planned_command, shard_count, shown, worked
from .run import run as command

NOTICE = 120
"""Seconds before its time is over at which a task of a script is asked to stop."""
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
Run = Annotated[Path, typer.Argument(help="the folder of the run, or the tree that it writes into")]
Workers = Annotated[int | None, typer.Option(min=1, help="processes at once (default: one per GPU, else per core)")]
LauncherName = Annotated[str, typer.Option(help="what starts the workers (`interp plugins launchers`)")]
LauncherOptions = Annotated[
    list[str] | None, typer.Option("--launcher-option", help="of the launcher, as 'time=60'; as often as needed")
]
Detach = Annotated[bool, typer.Option("--detach", help="submit the workers, and do not wait for them")]


def work(
    run: Run,
    shards: Annotated[
        str | None, typer.Option(help="only these, as 0-9 or 3,5 (default: any that nobody has, until all are done)")
    ] = None,
) -> None:
    """Be one of a run's workers, in this process. SIGTERM, SIGUSR1 and SIGUSR2 end it after the item at hand with exit
    status 75: start it again."""
    home = status(run).home
    if code := worked(command, home, None if shards is None else numbers(shards, shard_count(home))):
        raise typer.Exit(code)


def show_status(run: Run, as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """How far a run is, told by its files."""
    now = status(run)
    print(json.dumps(asdict(now), indent=1, default=str) if as_json else shown(now))


def resume(
    run: Run, workers: Workers = None, launcher: LauncherName = "local", launcher_option: LauncherOptions = None,
    detach: Detach = False,
) -> None:  # fmt: skip
    """Start workers on what is left of a run."""
    home = status(run).home
    with planned_command(home):  # refuses one that was not planned
        pass
    carry_out(command, home, workers, launcher, launcher_option or (), detach)


def collect(run: Run) -> None:
    """Make the tables and pages of a run whose shards are all done; refuse one of which a shard is missing."""
    now = status(run)
    if now.missing:
        first = next(table for table in now.tables if table.done < table.shards)
        raise PlanError(
            f"{first.shards - first.done} of {first.shards} shards of {first.name} are missing; `interp resume "
            f"{now.home}` makes them"
        )
    if now.state == "running":
        raise PlanError(f"{len(now.workers)} processes may be at work on {now.home}; wait until they have ended")
    if code := worked(command, now.home, frozenset()):
        raise typer.Exit(code)
    print(f"{now.home}: done")


def sbatch(
    run: Run,
    tasks: Annotated[int | None, typer.Option(min=1, help="tasks of the array (default: as many as shards)")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="at most so many of them at once")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="a line for sbatch, as 'partition=gpu'; as often as needed")
    ] = None,
) -> None:
    """Print a script for `sbatch` that works on a run: to be read, changed and submitted by you."""
    home = status(run).home
    with planned_command(home):
        pass
    print(script(home, tasks or shard_count(home), at_once, options or ()), end="")


def script(home: Path, tasks: int, at_once: int | None, options: Sequence[str]) -> str:
    """The script of an array of workers on a run. A task that is asked to stop puts itself back into the queue."""
    home = home.resolve()
    planned = RunFolder.read(home / RECORD / COMMAND) or {}
    limit = "" if at_once is None else f"%{at_once}"
    lines = [
        f"job-name={home.name[:40]}", f"array=0-{tasks - 1}{limit}", "requeue", "open-mode=append",
        f"signal=B:USR1@{_notice(options)}", f"output={home / RECORD / LOGS}/%A_%a.log", *options,
    ]  # fmt: skip
    for line in lines:
        if "\n" in line:
            raise PlanError(f"--option {line!r}: one line each")
    quoted = {"folder": planned["folder"], "python": sys.executable, "home": str(home)}
    folder, python, place = (shlex.quote(text) for text in quoted.values())
    (home / RECORD / LOGS).mkdir(exist_ok=True)
    return "\n".join([
        "#!/bin/bash", *(f"#SBATCH --{line.removeprefix('--')}" for line in lines),
        "# the scheduler's signals come to this script: hand them on, then wait for the item at hand",
        "worker= asked= status=0",
        "trap 'asked=yes; kill -USR1 $worker 2>/dev/null' USR1 USR2 TERM",
        f"cd {folder} || exit 1",
        f"{python} -m interp_core.cli work {place} &",
        "worker=$!",
        "if [ -n \"$asked\" ]; then kill -USR1 $worker; fi  # before its number was known",
        "while kill -0 $worker 2>/dev/null; do wait $worker; status=$?; done",
        "# a worker that was asked before it could listen was ended by that",
        f'if [ -n "$asked" ] && [ $status -gt 128 ]; then status={REQUEUE}; fi',
        'task="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        "# Slurm requeues what it ends itself, or cancels it: then submit this again, or twice, the second to begin",
        "# after the first (sbatch --dependency=afterany:JOB); what is done is kept",
        f"# {REQUEUE}: asked to stop with work left",
        f'if [ $status -eq {REQUEUE} ] && [ "$(squeue -h -j "$task" -o %T)" = RUNNING ]; then',
        '  scontrol requeue "$task"', "fi",
        "exit $status", "",
    ])  # fmt: skip


def _notice(options: Sequence[str]) -> int:
    """Seconds before its time is over at which a task is asked to stop: two minutes, or half of the time that it has.
    Slurm may ask a minute sooner, so that a task of less would be asked before it has begun.

    Raises:
        PlanError: a time that is none of Slurm's.
    """
    times = [line.partition("=")[2] for line in options if line.removeprefix("--").partition("=")[0] == "time"]
    if not times or times[-1].lower() in ("infinite", "unlimited"):
        return NOTICE
    if not (match := TIME.fullmatch(times[-1])):
        raise PlanError(f"--option time={times[-1]}: write minutes, or hours:minutes:seconds, or days-hours")
    days, clock = match.group("days"), [int(part) for part in match.group("clock").split(":")]
    # the parts begin with hours after days, and where there are three, else with minutes
    units = (3600, 60, 1) if days or len(clock) == 3 else (60, 1)
    total = int(days or 0) * 86400 + sum(part * unit for part, unit in zip(clock, units, strict=False))
    return max(1, min(NOTICE, total // 2)) if total else NOTICE  # no time at all is no limit


def numbers(text: str, count: int) -> frozenset[int]:
    """Shards as 0-9 or 3,5.

    Raises:
        PlanError: no such numbers.
    """
    chosen: set[int] = set()
    try:
        for part in text.split(","):
            first, to, last = part.partition("-")
            chosen |= set(range(int(first), int(last if to else first) + 1))
    except ValueError:
        raise PlanError(f"--shards {text!r}: write 0-9, or 3,5, or 0-3,7") from None
    if not chosen or max(chosen) >= count:
        raise PlanError(f"--shards {text}: there are {count}, 0 to {count - 1}")
    return frozenset(chosen)
