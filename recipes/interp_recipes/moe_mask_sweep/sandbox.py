"""Runs programs that a model wrote, each in a process of its own with limits. This is no security boundary.

A program gets a temporary folder that is deleted afterwards, an environment without variables of yours, no standard
input, and limits of time, memory, file size and number of files. Where the system lets ordinary users make network
namespaces (Linux, `unshare`), it has no network; where not, it has, and `describe` says so. It can still read what you
can read: run code that you would not trust with that in a container.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import interp_core as ic

UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--")
SHOWN = 300
"""Characters of an error that are kept."""


class Outcome(NamedTuple):
    """How a program ended.

    Attributes:
        passed: it ended by itself with exit code 0.
        why: what it said last, or which limit it met; empty if it passed.
    """

    passed: bool
    why: str


@cache
def has_no_network() -> bool:
    """Whether programs are run without a network."""
    if shutil.which(UNSHARE[0]) is None:
        return False
    # a system may have the command and not let people use it
    return subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=10, check=False).returncode == 0


def describe(seconds: float, megabytes: int) -> str:
    """What `run_program` does, for people who are about to let it."""
    network = "no network" if has_no_network() else "WITH NETWORK (this system does not let it be taken away)"
    return (
        f"each program in a process of its own: {sys.executable} -I, at most {seconds:g} s and {megabytes} MB, a "
        f"temporary folder, no environment, {network}; it can read what you can read"
    )


def run_program(text: str, seconds: float = 10.0, megabytes: int = 1024) -> Outcome:
    """Run a Python program.

    Raises:
        CapabilityError: a system without resource limits (Windows).
    """
    if os.name != "posix":
        raise ic.CapabilityError("the sandbox needs resource limits of a POSIX system; give a scorer of your own")
    with tempfile.TemporaryDirectory(prefix="interp-program-") as folder:
        path = Path(folder) / "program.py"
        # whole seconds of CPU time, no fewer than the clock gives
        path.write_text(_LIMITS.format(seconds=int(seconds) + 1, bytes=megabytes << 20) + text, encoding="utf-8")
        command = [*(UNSHARE if has_no_network() else ()), sys.executable, "-I", str(path)]
        env = {"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8"}
        with subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,  # a process group of its own, so that what the program starts ends with it
        ) as process:  # fmt: skip
            try:
                _, error = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"took more than {seconds:g} s")
            finally:
                _end(process)
    lines = error.decode("utf-8", "replace").strip().splitlines()
    code = process.returncode
    return Outcome(code == 0, "" if code == 0 else (lines[-1][:SHOWN] if lines else f"exit code {code}"))


_LIMITS = """import resource as _r
for _what, _most in ((_r.RLIMIT_CPU, {seconds}), (_r.RLIMIT_AS, {bytes}), (_r.RLIMIT_FSIZE, 16 << 20),
                     (_r.RLIMIT_NOFILE, 64), (_r.RLIMIT_CORE, 0)):
    _r.setrlimit(_what, (_most, _most))
del _r, _what, _most
"""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
