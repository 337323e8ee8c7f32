"""The command line: light, and its errors are sentences."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DATA
from safetensors.torch import load_file

import interp_core as ic
from interp_core.cli_run import _pairs
from interp_core.settings import read

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
    assert out.stdout.strip() == "['interp_core', 'interp_core._version']"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["demo", "--model", "/no/such/folder"], "interp: there is no folder /no/such/folder"),
        (["demo", "--model", "toy:txt"], "interp: there is no toy 'toy:txt'"),
        (["sites", str(DATA)], "interp: "),
        (["plugins", "methodz"], "Did you mean 'methods'"),
        (["bench", "toy:text", "--extra", "nowhere:nothing", "--rounds", "1"], "give module:function"),
        (
            ["run", "--top_k", "3", "logit_lens"],
            "the name of a method or a recipe first, then its settings, not --top_k",
        ),
        (["run", "logit_lens", "--topk", "3"], "logit_lens has no setting 'topk'. Did you mean 'top_k'"),
        (["run", "logit_lens", "--topk=3"], "logit_lens has no setting 'topk'. Did you mean 'top_k'"),
        (["run", "logit_lens", "--top_k"], "logit_lens: --top_k has no value"),
        (["run", "logit_lens", "--top_k", "--at", "1"], "logit_lens: --top_k has no value"),
        (["run", "logit_lens", "3"], "logit_lens: '3' belongs to no setting: write --setting value"),
        (["run", "logit_lens", "--text", "x", "--top_k", "many"], "logit_lens: setting top_k: "),
        (["run", "demo", "--modle", "x"], "recipe demo has no setting 'modle'. Did you mean 'model'"),
        (["run", "demo", "--text", "x"], "recipe demo has no --text; its settings: model, out"),
    ],
)
def test_errors_are_one_sentence(args: list[str], says: str) -> None:
    out = interp(*args)
    assert out.returncode == 2 and says in out.stderr and "Traceback" not in out.stderr


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--top-k", "3", "--at", "-1"], ["top_k=3", "at=-1"]),
        (["--top_k=3", "--note=a=b", "--quiet"], ["top_k=3", "note=a=b", "quiet=true"]),
        (["--quiet", "false", "--note", ""], ["quiet=false", "note="]),
        (["--maybe", "--note", "two words"], ["maybe=true", "note=two words"]),
        (["--note=--at", "--set"], None),
    ],
)
def test_settings_as_options(words: list[str], given: list[str] | None) -> None:
    """`--name value`, `--name=value`, flags; `--set` comes after and wins."""

    class Config(ic.Config):
        top_k: int = 1
        at: int | None = None
        note: str = ""
        quiet: bool = False
        maybe: bool | None = None

    if given is None:
        with pytest.raises(ic.PlanError, match="one has no setting 'set'"):
            read("one", Config, _pairs("one", Config, words, None))
        return
    assert _pairs("one", Config, words, None) == given
    assert _pairs("one", Config, words, ["top_k=9"]) == [*given, "top_k=9"]
    assert read("one", Config, _pairs("one", Config, words, ["top_k=9"]))["top_k"] == 9


def test_run_takes_settings_by_name(tmp_path: Path) -> None:
    """Beside the options of `interp run` itself; the last position alone, two tokens of it."""
    settings = ["--at", "-1", "--set", "top_k=2"]
    out = interp("run", "logit_lens", "--text", "Q: big", *settings, "--out", str(tmp_path / "lens"))
    assert out.returncode == 0, out.stderr
    axes = {name: value.shape for name, value in load_file(tmp_path / "lens/result.safetensors").items()}
    assert axes["top_ids"] == (1, 7, 1, 2), axes


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
