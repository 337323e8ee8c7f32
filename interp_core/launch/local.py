"""Launcher `local`: every job in a process of its own, a few at a time. A job that dies takes nothing with it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

from ..errors import PlanError
from . import Job, Outcome
from .sending import packed

BEGUN = b""
"""What a process says first, when it has come as far as its job."""
REREAD = (
    'which is read again for it. Put what the script starts under `if __name__ == "__main__":`, or the job\'s function '
    "into a module"
)
_STARTING = threading.Lock()


@dataclass
class Worker:
    """A process with its job.

    Attributes:
        job: its number.
        rereads: the process reads the running script first, where the job's function is.
        begun: it has come as far as the job.
    """

    job: int
    process: SpawnProcess
    rereads: bool
    begun: bool = False

    @property
    def end(self) -> str:
        """How a process ended that brought nothing."""
        status = f"its process ended with exit status {self.process.exitcode}"
        if self.begun or not self.rereads:
            return f"{status} and no result"
        return f"{status} before it came to the job, whose function is in the script that is running, {REREAD}"


class Local:
    """Processes on this machine.

    Args:
        cap: how many run at once (default: one per CPU core).
    """

    name = "local"

    def __init__(self, cap: int | None = None) -> None:
        self.cap = (os.cpu_count() or 1) if cap is None else cap
        if self.cap < 1:
            raise PlanError(f"cap={cap}: at least one job must run at a time")

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """See `Launcher.run`. A script whose own functions are jobs needs `if __name__ == "__main__":`, since every
        process reads the script again to find them; jobs from modules need nothing."""
        calls = packed(jobs, pickle.dumps, "a process", ". Use a module's function")
        spawn = multiprocessing.get_context("spawn")
        outcomes: dict[int, Outcome] = {}
        running: dict[Connection, Worker] = {}
        try:
            for i, call in enumerate(calls):
                while len(running) == self.cap:
                    _collect(running, outcomes)
                ours, theirs = spawn.Pipe(duplex=False)
                process = spawn.Process(target=_work, args=(call, theirs), daemon=True)
                rereads = b"__main__" in call
                _start(process, rereads)
                theirs.close()
                running[ours] = Worker(i, process, rereads)
            while running:
                _collect(running, outcomes)
        finally:
            for pipe, worker in running.items():
                worker.process.terminate()
                worker.process.join()
                pipe.close()
        return [outcomes[i] for i in range(len(jobs))]


def _start(process: SpawnProcess, rereads: bool) -> None:
    """Start a process, which reads the script that is running again only where its job needs it: that would run all of
    a script that has no `if __name__ == "__main__":`.

    Raises:
        PlanError: such a script is being read again, for a job that is one of its own functions.
    """
    with _STARTING:
        script = sys.modules["__main__"]
        if not rereads:
            sys.modules["__main__"] = ModuleType("__main__")  # multiprocessing looks there for what is to be read
        try:
            process.start()
        except RuntimeError as error:  # multiprocessing's, in a process that is not ready to start others
            raise PlanError(f"this process is about to do a job of the script that is running, {REREAD}") from error
        finally:
            sys.modules["__main__"] = script


def _collect(running: dict[Connection, Worker], outcomes: dict[int, Outcome]) -> None:
    """Wait until a process says something, and take what came of each job that has ended."""
    for pipe in wait(list(running)):
        assert isinstance(pipe, Connection)
        worker = running[pipe]
        try:
            said = pipe.recv_bytes()
            if said == BEGUN:
                worker.begun = True
                continue
            outcome: Any = pickle.loads(said)
        except (EOFError, OSError):
            worker.process.join()
            outcome = Outcome(error=f"job {worker.job}: {worker.end}")
        except Exception:  # a value that only the other process can make
            outcome = Outcome(error=traceback.format_exc())
        del running[pipe]
        worker.process.join()
        pipe.close()
        outcomes[worker.job] = outcome


def _work(call: bytes, pipe: Connection) -> None:
    """What the other process does."""
    pipe.send_bytes(BEGUN)
    try:
        job = pickle.loads(call)
        sent = pickle.dumps(Outcome(job.call(*job.args)))
    except BaseException:  # also SystemExit: the job ended without a value
        sent = pickle.dumps(Outcome(error=traceback.format_exc()))
    pipe.send_bytes(sent)
    pipe.close()
