"""Launcher `slurm`: jobs as an array of Slurm's, through submitit. What became of a job is told by its own file.

Slurm is asked for one thing alone, whether it still has a job, and `squeue` says that on every site: `sacct` knows
nothing without accounting. A job that Slurm has no more and that left no file is submitted again, a few times: so jobs
must bear to be begun twice, as Slurm's own requeueing demands too.
"""

from __future__ import annotations

import getpass
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time as clock
import traceback
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CapabilityError, PlanError, PluginError
from . import AGAIN, Job, Outcome
from .sending import at_least, packed

NEEDED = "jobs go to Slurm through submitit, which is not installed: pip install 'interp-core[slurm]'"
ARRAY = 1000
"""Tasks of an array at most: Slurm's own limit, where a site has not changed it."""
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED"}
    | {"TIMEOUT"}
)
"""States in which Slurm is through with a job; it may take one back for a moment after some of them."""
LOOK, ASK, GRACE = 0.5, (1.0, 30.0), 5.0
"""Seconds: between two looks at files; between two questions to Slurm, at first and at most; for which Slurm must have
been through with a job, since a file may be seen late on another machine, and a job requeued."""
PATIENCE = 120
"""Seconds that a task waits to be ended by Slurm, once it is back in the queue."""


@dataclass
class Sent:
    """A job in Slurm's hands.

    Attributes:
        number: of the job.
        task: submitit's.
        tries: how often it was submitted.
        ended: since when Slurm is through with it; None: it is not.
        state: the last that Slurm said of it; "" when it has forgotten it.
    """

    number: int
    task: Any
    tries: int
    ended: float | None = None
    state: str = ""

    @property
    def id(self) -> str:
        """As Slurm writes it: 12, or 12_3 in an array."""
        return str(self.task.job_id)


class Slurm:
    """Jobs on a cluster.

    Args:
        cap: how many run at once (default: as many as the cluster lets).
        partition: of the jobs (default: the cluster's).
        account: that pays for them (default: yours).
        time: minutes that each may take; before, it is asked to stop, and a worker goes back into the queue.
        gpus: of each job.
        cpus: of each job.
        memory: of each job, as 16G (default: the cluster's).
        signal_delay: seconds before its time is over at which a job is asked to stop.
        setup: lines of the shell before each job, as 'module load cuda'.
        sbatch: other options of sbatch, as 'qos=long' or 'exclusive'.
        restarts: how often a job that left no result is submitted again.
        folder: for jobs and results, seen by all nodes (default: one of its own below ~/.cache/interp_core/slurm,
            deleted if all jobs returned).
    """

    name = "slurm"

    def __init__(
        self, cap: int | None = None, partition: str = "", account: str = "", time: int = 60, gpus: int = 0,
        cpus: int = 1, memory: str = "", signal_delay: int = 120, setup: Sequence[str] = (),
        sbatch: Sequence[str] = (), restarts: int = 3, folder: str | Path | None = None,
    ) -> None:  # fmt: skip
        at_least(1, cap=cap, time=time, cpus=cpus)
        at_least(0, gpus=gpus, restarts=restarts)
        if not 0 < signal_delay < time * 60:
            raise PlanError(
                f"signal_delay={signal_delay}: jobs of {time} minutes are asked to stop that many seconds before their "
                f"end; give between 1 and {time * 60 - 1}"
            )
        lines = [line.removeprefix("--").partition("=") for line in sbatch]
        self.cap, self.restarts, self.folder = cap, restarts, folder
        self.parameters: dict[str, Any] = {
            "job_name": "interp", "time": time, "cpus_per_task": cpus, "signal_delay_s": signal_delay, "wckey": None,
            "array_parallelism": cap or ARRAY, "partition": partition or None, "account": account or None,
            "gpus_per_node": gpus or None, "mem": memory or None,
            "setup": ['export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"', *setup],
            "srun_args": [f"--cpus-per-task={cpus}"],  # which Slurm no longer hands on to srun, since 22.05
            "additional_parameters": {"requeue": True} | {key: text if sign else True for key, sign, text in lines},
        }  # fmt: skip

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """See `Launcher.run`."""
        calls = _packed(jobs)
        place = self._folder()
        outcomes: list[Outcome] = []
        for start in range(0, len(calls), ARRAY):
            outcomes += self._carry_out(calls[start : start + ARRAY], place)
        if self.folder is None and all(outcome.ok for outcome in outcomes):
            shutil.rmtree(place, ignore_errors=True)
        return outcomes

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Submit all jobs and wait for none; Slurm's numbers of their arrays. Nobody submits one again that is lost.

        Raises:
            PlanError: a job that cannot be sent.
            PluginError: Slurm refused them.
        """
        calls = _packed(jobs)
        place = self._folder()
        arrays = [self._sent(calls[start : start + ARRAY], place) for start in range(0, len(calls), ARRAY)]
        return [str(tasks[0].job_id).partition("_")[0] for tasks in arrays]

    def _folder(self) -> Path:
        root = Path.home() / ".cache/interp_core/slurm" / uuid.uuid4().hex[:12] if self.folder is None else self.folder
        place = Path(root).absolute()
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _sent(self, calls: Sequence[bytes], place: Path) -> list[Any]:
        """An array of jobs in Slurm's hands, as submitit's.

        Raises:
            CapabilityError: no submitit.
            PluginError: no Slurm, or it refused.
        """
        try:
            from submitit import SlurmExecutor
            from submitit.core.utils import FailedJobError
        except ImportError as error:
            raise CapabilityError(NEEDED) from error
        if shutil.which("sbatch") is None:
            raise PluginError("there is no `sbatch` here: launcher 'slurm' runs on a machine that submits to Slurm")
        executor = SlurmExecutor(place)
        executor.update_parameters(**self.parameters)
        try:
            with executor.batch():
                tasks = [executor.submit(work, call) for call in calls]
        except (FailedJobError, subprocess.CalledProcessError) as error:
            raise PluginError(f"Slurm refused the jobs: {error}") from error
        first = tasks[0].job_id.partition("_")[0]
        sys.stderr.write(f"Slurm job {first}, {len(tasks)} task{'s' * (len(tasks) > 1)}; its files: {place}\n")
        return tasks

    def _carry_out(self, calls: Sequence[bytes], place: Path) -> list[Outcome]:
        """Outcomes of jobs that fit into an array."""
        pending = [Sent(i, task, 1) for i, task in enumerate(self._sent(calls, place))]
        outcomes: dict[int, Outcome] = {}
        began = clock.monotonic()
        asked = began
        try:
            while pending:
                clock.sleep(LOOK)
                there = set(os.listdir(place))  # a look at the folder is fresher than one at a file of it
                for sent in pending:
                    if sent.task.paths.result_pickle.name in there:
                        outcomes[sent.number] = _read(sent)
                pending = [sent for sent in pending if sent.number not in outcomes]
                now = clock.monotonic()
                if not pending or now - asked < min(max((now - began) / 10, ASK[0]), ASK[1]):
                    continue
                asked = now
                pending = self._without_lost(pending, calls, place, outcomes)
        except BaseException:
            cancel(sent.id for sent in pending)
            raise
        return [outcomes[i] for i in range(len(calls))]

    def _without_lost(
        self, pending: list[Sent], calls: Sequence[bytes], place: Path, outcomes: dict[int, Outcome]
    ) -> list[Sent]:
        """Jobs to wait for, those submitted again among them that left nothing; of the others that did, the outcome."""
        states = in_queue()
        if states is None:
            return pending  # it did not answer, which says nothing about jobs
        lost = [sent for sent in pending if _is_over(sent, states)]
        again = [sent for sent in lost if sent.tries <= self.restarts and sent.state != "CANCELLED"]
        for sent in lost:
            if sent not in again:
                outcomes[sent.number] = Outcome(error=_end(sent, place))
        kept = [sent for sent in pending if sent not in lost]
        if again:
            states_told = ", ".join(sorted({sent.state or "forgotten" for sent in again}))
            sys.stderr.write(
                f"{len(again)} of {len(calls)} jobs ended without a result ({states_told}); submitted again\n"
            )
            tasks = self._sent([calls[sent.number] for sent in again], place)
            kept += [Sent(sent.number, task, sent.tries + 1) for sent, task in zip(again, tasks, strict=True)]
        return kept


def _is_over(sent: Sent, states: dict[str, str]) -> bool:
    """Whether Slurm has been through with a job for long enough that its result would be seen."""
    state = states.get(sent.id, "")
    if state and state not in ENDED:
        sent.ended, sent.state = None, state
        return False
    if sent.ended is None:
        sent.ended = clock.monotonic()
    sent.state = state or (sent.state if sent.state in ENDED else "")
    return clock.monotonic() - sent.ended >= GRACE


def _end(sent: Sent, place: Path) -> str:
    """What is known of a job that left no result."""
    how = f"as {sent.state}" if sent.state else "and was forgotten by it"
    tries = f", submitted {sent.tries} times," if sent.tries > 1 else ""
    log = sent.task.paths.stderr
    last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
    return f"job {sent.number}{tries} ended in Slurm {how} without a result ({sent.id}; {place}): {' '.join(last)}"


def _read(sent: Sent) -> Outcome:
    """The outcome that a task has written."""
    try:
        kind, written = pickle.loads(sent.task.paths.result_pickle.read_bytes())
    except Exception:  # an answer that only the other machine can make
        return Outcome(error=traceback.format_exc())
    if kind == "success" and isinstance(written, Outcome):
        return written
    return Outcome(error=str(written))


def _packed(jobs: Iterable[Job]) -> list[bytes]:
    """See `packed`."""
    try:
        from cloudpickle import dumps
    except ImportError as error:
        raise CapabilityError(NEEDED) from error
    return packed(jobs, dumps)


def in_queue() -> dict[str, str] | None:
    """State of every job of this user that Slurm knows, by its number (12, or 12_3 in an array); None if it does not
    answer. Every task of an array has a line of its own (`-r`): 12_[4-7%2] is never read."""
    command = ["squeue", "--noheader", "-r", "--states=all", f"--user={_user()}", "--format=%F|%K|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    states = {}
    for line in done.stdout.splitlines():
        job, task, state = line.strip().split("|")
        states[f"{job}_{task}" if task.isdigit() else job] = state
    return states


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name in a container
        return str(os.getuid())


def cancel(ids: Iterable[str]) -> None:
    """Take jobs out of the queue, or end them."""
    listed = list(ids)
    if listed:
        subprocess.run(["scancel", *listed], capture_output=True, timeout=60, check=False)


def work(call: bytes) -> Outcome:
    """What a task does. A job that ends with status 75 goes back into the queue, and leaves nothing."""
    # submitit lets SIGTERM pass, and at SIGUSR2 gives up or starts anew: signals are the job's own business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        job = pickle.loads(call)
        return Outcome(job.call(*job.args))
    except SystemExit as stop:
        if stop.code == AGAIN:
            if put_back():
                clock.sleep(PATIENCE)
            raise
        return Outcome(error=traceback.format_exc())
    except BaseException:  # the job's own
        return Outcome(error=traceback.format_exc())


def put_back() -> bool:
    """Put the job of this process back into the queue, from which Slurm takes it two minutes later at the soonest;
    whether Slurm will. One that it is ending already, since somebody cancelled it or another needs the place, is left
    to it."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    if array is not None:  # the number of an array's last task alone is that of the array, and would mean all of them
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if (in_queue() or {}).get(job, "RUNNING") != "RUNNING":
        return False
    return subprocess.run(["scontrol", "requeue", job], timeout=60, check=False).returncode == 0
