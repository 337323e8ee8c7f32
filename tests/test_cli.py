"""The command line: light, and its errors are sentences."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DATA

INTERP = [sys.executable, "-m", "interp_core.cli"]


def interp(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*INTERP, *args], capture_output=True, text=True)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from interp_core.cli import app; from typer.testing import CliRunner;"
        "out = CliRunner().invoke(app, ['--help']); assert out.exit_code == 0 and 'bench' in out.output, out.output;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_importing_the_package_is_light() -> None:
    code = "import sys, interp_core; print(sorted(m for m in sys.modules if m.startswith('interp_core')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['interp_core']"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["demo", "--model", "/no/such/folder"], "interp: there is no folder /no/such/folder"),
        (["demo", "--model", "toy:txt"], "interp: there is no toy 'toy:txt'"),
        (["sites", str(DATA)], "interp: "),
        (["plugins", "methodz"], "Did you mean 'methods'"),
        (["bench", "toy:text", "--extra", "nowhere:nothing", "--rounds", "1"], "give module:function"),
    ],
)
def test_errors_are_one_sentence(args: list[str], says: str) -> None:
    out = interp(*args)
    assert out.returncode == 2 and says in out.stderr and "Traceback" not in out.stderr


def test_sites() -> None:
    out = interp("sites", "toy:text")
    assert out.returncode == 0 and "resid_post" in out.stdout and "ok    pattern" in out.stdout


def test_stopping_leaves_nothing_half_written(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*INTERP, "demo", "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and b"Traceback" not in err
    assert not list(tmp_path.rglob("*.tmp"))
