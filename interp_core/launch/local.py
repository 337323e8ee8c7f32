"""Launcher `local`: every job in a process of its own, a few at a time. A job that dies takes nothing with it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from ..errors import PlanError
from . import Job, Outcome


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
        """See `Launcher.run`. A script that calls this needs `if __name__ == "__main__":`, as ever with processes."""
        calls = [_packed(i, job) for i, job in enumerate(jobs)]
        spawn = multiprocessing.get_context("spawn")
        outcomes: dict[int, Outcome] = {}
        running: dict[Connection, tuple[int, SpawnProcess]] = {}
        try:
            for i, call in enumerate(calls):
                if len(running) == self.cap:
                    _collect(running, outcomes)
                ours, theirs = spawn.Pipe(duplex=False)
                process = spawn.Process(target=_work, args=(call, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = i, process
            while running:
                _collect(running, outcomes)
        finally:
            for pipe, (_, process) in running.items():
                process.terminate()
                process.join()
                pipe.close()
        return [outcomes[i] for i in range(len(jobs))]


def _collect(running: dict[Connection, tuple[int, SpawnProcess]], outcomes: dict[int, Outcome]) -> None:
    """Wait until at least one job has ended, and take what came of it."""
    for pipe in wait(list(running)):
        assert isinstance(pipe, Connection)
        i, process = running[pipe]
        try:
            outcome: Any = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process.join()
            outcome = Outcome(error=f"job {i}: its process ended with exit status {process.exitcode} and no result")
        except Exception:  # a value that only the other process can make
            outcome = Outcome(error=traceback.format_exc())
        del running[pipe]
        process.join()
        pipe.close()
        outcomes[i] = outcome


def _packed(i: int, job: Job) -> bytes:
    try:
        return pickle.dumps(job)
    except Exception as error:  # pickle raises many kinds
        what = getattr(job.call, "__qualname__", repr(job.call))
        raise PlanError(f"job {i} ({what}) cannot be sent to a process: {error}. Use a module's function") from error


def _work(call: bytes, pipe: Connection) -> None:
    """What the other process does."""
    try:
        job = pickle.loads(call)
        sent = pickle.dumps(Outcome(job.call(*job.args)))
    except BaseException:  # also SystemExit: the job ended without a value
        sent = pickle.dumps(Outcome(error=traceback.format_exc()))
    pipe.send_bytes(sent)
    pipe.close()
