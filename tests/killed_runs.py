"""For `test_runs.py`: a run that is killed at every point at which it touches the disk, and goes on. Nothing here
imports torch, so that the process may fork.

Prints how many were killed, and at how many points.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interp_core import runs
from interp_core.runs import session

CALLS = ("fsync", "replace", "link", "unlink", "write", "ftruncate")


def work(out: Path, kind: str, made: Path) -> None:
    """The run; what it works out it notes in a file, by system calls that are not counted."""

    def make(name: str, value: Any) -> Any:
        with made.open("a") as file:
            file.write(f"{name}\n")
        return value

    opened: Callable[..., Any] = runs.open if kind == "own" else runs.publish
    with opened(out, {"n": 3}, recipe="work", say=lambda line: None) as run:
        first = run.stage("first.json", lambda: make("first", [1, 2]))
        run.put({"x/a.txt": "a", "x/b.txt": "b"}, stage="two", after=["first.json"])
        with run.rows("rows.jsonl", key="item") as rows:
            for item in first:
                if item not in rows:
                    rows.add({"item": item, "v": make(f"row {item}", item / 3)}, {"item": item, "v": "second"})
        with run.part("part").attempt() as part:
            part.stage("p.json", lambda: make("part", "p"))


def child(call: Callable[[], None]) -> int:
    """Do something in a process of its own; how that ended."""
    pid = os.fork()
    if pid == 0:
        call()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killing(point: int) -> None:
    """From here on the process is killed at the n-th call: before it, and halfway through where it writes a line."""
    left = point

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **more: Any) -> Any:
            nonlocal left
            if left == 0:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **more)

        return called

    for name in CALLS:
        setattr(os, name, around(name, getattr(os, name)))


def content(out: Path) -> dict[str, bytes]:
    """The files of the run."""
    own = [
        p for p in out.rglob("*") if p.is_file() and "record" not in p.parts and p.name not in ("DONE", "manifest.json")
    ]
    return {str(path.relative_to(out)): path.read_bytes() for path in own}


def main(kind: str) -> None:
    """Kill at every point, go on, compare."""
    # What is not of use against kills, and takes as long as all the rest: asking git and pip, waiting for the disk.
    session.surroundings = dict
    os.fsync = lambda file: None
    work(Path("whole/out"), kind, Path("whole.txt"))
    whole, killed, point = content(Path("whole/out")), 0, 0
    everything = Path("whole.txt").read_text().split("\n")
    while True:
        out, made = Path(f"{point}/out"), Path(f"{point}.txt")

        def stopped(out: Path = out, made: Path = made, point: int = point) -> None:
            killing(point)
            work(out, kind, made)

        code = child(stopped)
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        killed += 1
        there = content(out)
        drafts = {name for name in there if name.endswith(".tmp")}
        assert all(whole[name] == there[name] for name in there.keys() - drafts), (point, there)
        assert child(lambda out=out, made=made: work(out, kind, made)) == 0, point  # type: ignore[misc]
        assert content(out) == whole, (point, sorted(content(out)))
        home = out if kind == "own" else next(Path(f"{point}/out.runs").iterdir())
        told = runs.manifest(home)
        assert told["state"] == "done", (point, told)
        assert {session["state"] for session in told["sessions"][:-1]} <= {"killed", "finished"}, point
        lines = made.read_text().split("\n")
        assert set(lines) == set(everything) and len(lines) <= len(everything) + 1, (point, lines)  # one is done again
        point += 1
    print(killed, point)


if __name__ == "__main__":
    main(sys.argv[1])
