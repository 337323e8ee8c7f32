"""The tutorial, from an empty folder and in an environment of its own: shell blocks run, files are written, Python blocks
run, and what it says that a command prints is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs/tutorial.md"
Done = subprocess.CompletedProcess[str]


def environment(folder: Path) -> dict[str, str]:
    """A new environment that sees the packages of this one, with the commands of the tutorial."""
    venv.create(folder, with_pip=False)
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "ours.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})")
    python = folder / "bin/python"
    for name, call in {"interp": "interp_core.cli", "pip": "pip", "pytest": "pytest"}.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {python} -m {call} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    pip = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return os.environ | pip | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.skipif(sys.platform == "win32", reason="its commands are those of a Unix shell")
def test_the_tutorial(tmp_path: Path) -> None:
    env = environment(tmp_path / "env")
    folder = tmp_path / "empty"
    folder.mkdir()
    printed = ""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 8
    for i, (kind, text) in enumerate(blocks):
        if kind == "text":
            for line in text.strip().splitlines():
                assert line.removesuffix("…") in printed, printed
        elif target := re.match(r"# (\S+\.py)\n", text):
            (folder / target[1]).write_text(text[target.end() :])
        else:
            run = ["bash", "-e", "-c", text] if kind == "bash" else ["python", "-c", text]
            done = subprocess.run(run, capture_output=True, text=True, env=env, cwd=folder)
            fails = i + 1 < len(blocks) and "FAIL" in blocks[i + 1][1]
            assert (done.returncode != 0) == fails, f"{text}\n{done.stdout}\n{done.stderr}"
            printed = done.stdout
    assert (folder / "out/surprise/result.html").is_file()
