"""A session: one process that works on a run. What it ran on, when, and how it ended; a file that it alone writes."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .._version import version_of
from ..files import host, is_running, write

PACKAGES = (
    "interp-core", "torch", "transformers", "tokenizers", "safetensors", "numpy", "transformer-lens", "nnsight",
)  # fmt: skip
PASSED: ContextVar[Mapping[str, str] | None] = ContextVar("passed", default=None)
"""Settings as the command line had them, while a command runs."""


SILENT = 600.0
"""After so many seconds without a sign of life, a process of another machine, which cannot be asked, counts as gone:
more than clocks of machines differ."""
_COUNT = itertools.count()


def now() -> str:
    """The time, as records have it: UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class RunSession:
    """One process at work on a run; not to be taken for an open model, `interp_core.session.Session`.

    Attributes:
        id: start, machine and process; sorts by time.
        file: its record.
        data: what the record says.
    """

    def __init__(self, folder: Path) -> None:
        started = now()
        stamp = started.translate(dict.fromkeys(map(ord, "-:.Z")))
        self.id = f"{stamp}-{host()}-{os.getpid()}-{next(_COUNT)}"
        self.file = folder / f"{self.id}.json"
        self._clock = time.perf_counter()
        self.data: dict[str, Any] = {
            "id": self.id, "state": "running", "started": started, "ended": None, "seconds": None,
            "host": host(), "pid": os.getpid(), "argv": sys.argv, **surroundings(),
        }  # fmt: skip
        write(self.file, json.dumps(self.data, indent=1))

    def cost(self) -> str:
        """What this run has cost up to now, in words: earlier sessions too, as far as they came to an end."""
        before = [data for data in sessions(self.file.parent) if data["id"] != self.id]
        seconds = time.perf_counter() - self._clock + sum(data["seconds"] or 0 for data in before)
        lines = [f"{seconds:,.1f} seconds in {len(before) + 1} session{'s' * bool(before)}; see manifest.json"]
        lines += [f"{at} memory: at most {peak / 2**30:.2f} GiB" for at, peak in peak_memory().items()]
        machine, torch = self.data["host_class"], torch_settings()
        threads = f", {torch['threads']} thread{'s' * (torch['threads'] > 1)}" if torch else ""
        return "\n".join([*lines, f"on {', '.join([*machine['gpus'], machine['cpu']])}{threads}"])

    def end(self, state: str, reason: str = "") -> None:
        """Note how it ended: finished, stopped or failed."""
        self.data |= {"state": state, "reason": reason, "ended": now(), "peak_memory": peak_memory()}
        self.data |= {"seconds": round(time.perf_counter() - self._clock, 3), "torch": torch_settings()}
        write(self.file, json.dumps(self.data, indent=1))


def sessions(folder: Path) -> list[dict[str, Any]]:
    """All sessions of a run, in the order of their starts. One whose process is gone has been `killed`."""
    listed = []
    for path in sorted(folder.glob("*.json")):
        session = json.loads(path.read_text(encoding="utf-8"))
        gone = not is_running(session["host"], session["pid"])
        silent = session["host"] != host() and time.time() - path.stat().st_mtime > SILENT
        if session["state"] == "running" and (gone or silent):
            session["state"] = "killed"
        listed.append(session)
    return listed


def surroundings() -> dict[str, Any]:
    """Versions, machine and state of the code."""
    return {
        "python": platform.python_version(),
        "packages": packages(),
        "host_class": host_class(),
        "git": {name: state for name, path in _places().items() if (state := git_state(path))},
        "torch": torch_settings(),
    }


def packages() -> dict[str, str]:
    """Versions of the packages that numbers depend on, of those that are installed."""
    return {name: version for name in PACKAGES if (version := version_of(name))}


def host_class() -> dict[str, Any]:
    """What kind of machine this is; not which."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        memory = None
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "system": platform.system(), "machine": platform.machine(), "cpu": cpu, "cores": os.cpu_count(),
        "memory_bytes": memory, "gpus": gpus,
    }  # fmt: skip


def torch_settings() -> dict[str, Any] | None:
    """What of torch's state numbers may depend on; None while nothing has imported it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return {
        "seed": torch.initial_seed(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
    }


def peak_memory() -> dict[str, int]:
    """The most that this process has held so far, in bytes: of memory, and of each CUDA device."""
    peaks = {}
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks["resident"] = peak if sys.platform == "darwin" else peak * 1024
    except ImportError:  # Windows
        pass
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            peaks[f"cuda:{number}"] = torch.cuda.max_memory_allocated(number)
    return peaks


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of a folder's repository, and whether files that it tracks were changed; None outside of one, or without
    git."""

    def git(*words: str) -> str | None:
        # fsmonitor off: a repository's own setting could name a program to run
        command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "branch": git("rev-parse", "--abbrev-ref", "HEAD"), "changed": bool(changed)}


def _places() -> dict[str, Path]:
    """Where code may be under version control: here, and this package where it is a checkout."""
    package = Path(__file__).parent
    installed = {"site-packages", "dist-packages"} & set(package.parts)
    return {"working_folder": Path.cwd()} | ({} if installed else {"interp_core": package})
