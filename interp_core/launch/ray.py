"""Launcher `ray`: jobs on a Ray cluster that is there already. Where a job runs, and that it is begun again when its
process or its node dies, is Ray's: so jobs must bear to be begun twice.

Ray's own workers are processes of the nodes: they have the variables of the shell in which `ray start` was called.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import re
import socket
import sys
import textwrap
import traceback
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import CapabilityError, PlanError, PluginError, first_line
from . import AGAIN, Job, Outcome
from .sending import at_least, packed

NEEDED = "jobs go to Ray, which is not installed: pip install 'interp-core[ray]'"
START = "`ray start --head --disable-usage-stats` starts one, `ray start --address=HOST:PORT` adds this machine to one"
NAMESPACE = "interp"
"""Of the actors that see to detached jobs."""
REACHED = 5.0
"""Seconds in which the head of a cluster answers; Ray itself would try for minutes."""
COLOURS = re.compile("\x1b\\[[0-9;]*m")


class Ray:
    """Jobs on a Ray cluster of which this machine is a node.

    Args:
        address: of the cluster's head, as host:port ("auto": RAY_ADDRESS, or the cluster that runs on this machine).
        cap: how many jobs run at once (default: as many as the cluster has room for).
        cpus: of each job, and its threads.
        gpus: of each job; Ray says which in CUDA_VISIBLE_DEVICES.
        memory: GB that Ray sets aside for each job, which it counts and does not enforce (0: it does not count them).
        restarts: how often Ray begins a job again whose process or node died.
    """

    name = "ray"

    def __init__(
        self, address: str = "auto", cap: int | None = None, cpus: int = 1, gpus: int = 0, memory: float = 0.0,
        restarts: int = 3,
    ) -> None:  # fmt: skip
        at_least(1, cap=cap, cpus=cpus)
        at_least(0, gpus=gpus, memory=memory, restarts=restarts)
        if address != "auto" and not _host_and_port(address):
            raise PlanError(
                f"address={address!r}: jobs go to a cluster of which this machine is a node; give its head as "
                "host:port, or 'auto'"
            )
        self.address, self.cap, self.restarts = address, cap, restarts
        self.wants: dict[str, float] = {"CPU": cpus, "GPU": gpus, "memory": memory * 1e9}

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """See `Launcher.run`."""
        calls = self._packed(jobs)
        with self._connected():
            return self._carry_out(calls, os.getcwd()) if calls else []

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Submit all jobs and wait for none; the name of the actor that sees to them, in the namespace `interp`. It
        goes with its last job; if its process dies before, so do they.

        Raises:
            PlanError: a job that cannot be sent.
            PluginError: no cluster.
        """
        calls = self._packed(jobs)
        with self._connected() as ray:
            name = f"interp-{uuid.uuid4().hex[:8]}"
            kind = ray.remote(num_cpus=0, max_restarts=0)(Overseer)
            actor = kind.options(name=name, namespace=NAMESPACE, lifetime="detached").remote(self)
            ray.get(actor.there.remote())
            actor.carry_out.remote(calls, os.getcwd())
        return [name]

    def _packed(self, jobs: Sequence[Job]) -> list[bytes]:
        return packed(jobs, _ray().cloudpickle.dumps)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """Ray, connected to the cluster in this block; a connection that this process has already is kept.

        Raises:
            PluginError: no cluster, or one of another Ray or Python.
        """
        ray = _ray()
        with contextlib.redirect_stdout(Aside()):
            if ray.is_initialized():
                yield ray
                return
            address = self.address
            if address == "auto":
                address = os.environ.get("RAY_ADDRESS") or address
            try:
                if place := _host_and_port(address):
                    socket.create_connection(place, REACHED).close()
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, RuntimeError, ValueError) as error:
                at = "here" if address == "auto" else f"at {address}"
                why = "" if isinstance(error, ConnectionError) else f" ({first_line(error)})"
                raise PluginError(f"there is no Ray cluster {at} to join{why}: {START}") from error
            try:
                yield ray
            finally:
                ray.shutdown()

    def _carry_out(self, calls: Sequence[bytes], folder: str) -> list[Outcome]:
        """Outcomes of jobs, by a process that is connected."""
        ray = _ray()
        self._tell_of_room(ray)
        task = ray.remote(
            num_cpus=self.wants["CPU"], num_gpus=self.wants["GPU"] or None, memory=self.wants["memory"] or None,
            max_retries=self.restarts, max_calls=1,  # a process of its own for each job
        )(work)  # fmt: skip
        outcomes: dict[int, Outcome] = {}
        sent: dict[Any, int] = {}
        waiting = list(enumerate(calls))[::-1]
        try:
            while waiting or sent:
                while waiting and (self.cap is None or len(sent) < self.cap):
                    i, call = waiting.pop()
                    sent[task.remote(call, int(self.wants["CPU"]), folder)] = i
                (ended, *_), _ = ray.wait(list(sent), num_returns=1)
                i = sent.pop(ended)
                outcomes[i] = self._outcome(ray, ended, i)
        finally:
            for running in sent:
                ray.cancel(running, force=True)
        return [outcomes[i] for i in range(len(calls))]

    def _outcome(self, ray: Any, ended: Any, number: int) -> Outcome:
        """What became of a job that is over."""
        try:
            outcome: Outcome = pickle.loads(ray.get(ended))
        except ray.exceptions.RayError as error:
            tries = f", begun {self.restarts + 1} times at most," if self.restarts else ""
            return Outcome(error=f"job {number}{tries} ended in Ray without a result: {first_line(error)}")
        except Exception:  # a value that only the other process can make
            return Outcome(error=traceback.format_exc())
        return outcome

    def _tell_of_room(self, ray: Any) -> None:
        """Say that jobs will wait, if no node that is there now could ever take them."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(kind, 0) >= count for kind, count in self.wants.items()) for node in nodes):
            wanted = _resources(self.wants)
            there = "; ".join(sorted({_resources(node) for node in nodes}))
            sys.stderr.write(f"no node of the Ray cluster has {wanted}: jobs wait until one comes. There is: {there}\n")


class Aside(io.TextIOBase):
    """Where Ray's thread prints that processes died, and logs of dead nodes: stderr gets a line of each."""

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        if first := next(filter(str.strip, text.splitlines()), ""):
            sys.stderr.write(f"{textwrap.shorten(COLOURS.sub('', first), 160, placeholder=' …')}\n")
        return len(text)


class Overseer:
    """Waits for detached jobs, on the cluster."""

    def __init__(self, launcher: Ray) -> None:
        self.launcher = launcher

    def there(self) -> None:
        """Answered as soon as it is."""

    def carry_out(self, calls: Sequence[bytes], folder: str) -> None:
        """See all jobs to their end, and go."""
        self.launcher._carry_out(calls, folder)
        _ray().actor.exit_actor()


def _ray() -> Any:
    """The package, which reports nothing of its use.

    Raises:
        CapabilityError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        import ray.cloudpickle
    except ImportError as error:
        raise CapabilityError(NEEDED) from error
    return ray


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    return (host, int(port)) if host and "/" not in host and port.isdecimal() else None


def _resources(amounts: dict[str, float]) -> str:
    """Of a job or a node, in words."""
    cpus, gpus, memory = (amounts.get(kind, 0) for kind in ("CPU", "GPU", "memory"))
    said = [f"{cpus:g} CPUs", f"{gpus:g} GPUs", f"{memory / 1e9:.1f} GB"]
    return ", ".join(said[: 3 if memory else 2])


def work(call: bytes, cpus: int, folder: str) -> bytes:
    """What a process of Ray's does. A job that ends with status 75 ends the process, and Ray begins it again."""
    os.environ["OMP_NUM_THREADS"] = str(cpus)
    dumps = _ray().cloudpickle.dumps
    try:
        if not Path(folder).is_dir():
            raise PluginError(f"{folder} is not there on {socket.gethostname()}: all nodes must see the working folder")
        os.chdir(folder)
        job = pickle.loads(call)
        return dumps(Outcome(job.call(*job.args)))
    except SystemExit as stop:
        if stop.code == AGAIN:
            raise
        return dumps(Outcome(error=traceback.format_exc()))
    except BaseException:  # the job's own
        return dumps(Outcome(error=traceback.format_exc()))
