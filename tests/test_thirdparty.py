"""Packages of others, built and installed for real: one that brings one of each kind, one that `interp plugins new`
wrote, and three that are broken, clashing and too new, which harm nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import DATA
from typer.testing import CliRunner

import interp_core as ic
from interp_core import testing
from interp_core.cli import app
from interp_core.plugins import KINDS, find, refresh
from interp_core.scaffold import write_package

ROOT = Path(__file__).parent.parent
THEIRS = Path(__file__).parent / "thirdparty"
CHECKERS = find_spec("mypy") is not None and find_spec("ruff") is not None
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of them installed."""
    folder = tmp_path_factory.mktemp("site")
    written = write_package("what_writes", tmp_path_factory.mktemp("new") / "what_writes")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    packages = [str(path) for path in (written, *sorted(THEIRS.iterdir()))]
    run = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *packages]
    subprocess.run(run, check=True, capture_output=True)
    (folder / "written").symlink_to(written)
    return folder


@pytest.fixture
def python(site: Path, tmp_path: Path) -> Run:
    """Python with these packages on its path, in an empty folder."""

    def run(*args: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(site)}
        return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, cwd=cwd)

    return run


@pytest.fixture
def interp(python: Run) -> Run:
    return lambda *args: python("-m", "interp_core.cli", *args)


@pytest.fixture
def here(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, str]]]:
    """The command line in this process: exit status, and what it printed or raised."""
    monkeypatch.syspath_prepend(str(site))
    refresh()

    def run(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, list(args))
        raised = done.exception if isinstance(done.exception, ic.InterpError) else ""
        return 2 if raised else done.exit_code, f"{done.stdout}{raised}"

    yield run
    refresh()


def test_listed(interp: Run) -> None:
    out = interp("plugins", "--json")
    assert out.returncode == 0, out.stderr
    rows = {(row["kind"], row["dist"], row["name"]): row for row in json.loads(out.stdout)}
    hello = {key: row for key, row in rows.items() if key[1] == "interp-hello"}
    assert {kind for kind, _, _ in hello} == set(KINDS)
    assert all(
        (row["status"], row["version"], row["needs"]) == ("unloaded", "1.2", "interp-core>=0.1")
        for row in hello.values()
    )
    assert rows["methods", "interp-broken", "crash"]["status"] == "unloaded"
    later = rows["methods", "interp-later", "future"]
    assert later["status"] == "incompatible" and "it needs interp-core>=99, this is" in later["error"]
    lens = {dist: row["status"] for (_, dist, name), row in rows.items() if name == "logit_lens"}
    assert lens == {"interp-core": "unloaded", "interp-later": "incompatible", "interp-zclash": "shadowed"}
    assert rows["methods", "interp-zclash", "resid_norm"]["error"].startswith("interp-hello has a method of this name")
    assert rows["methods", "what-writes", "what_writes"]["target"] == "what_writes:WhatWrites"


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["resid_norm"], 0, "ok    padding_right"),
        (["logit_lens", "--set", "at=-1"], 0, "19 checks passed"),
        (["interp-zclash:resid_norm"], 1, "has name = 'logit_lens' but is registered as 'resid_norm'"),
        (["crash"], 1, "RuntimeError: no luck"),
        (["future"], 1, "it needs interp-core>=99"),
        (["longest"], 0, "ok    config          3 settings"),
        (["longest", "--set", 'text=["Q: big", "Q: hot"]'], 0, "ok    again           the same value"),
        (["hello"], 0, "ok    documented"),
        (["inline"], 0, "6 checks passed; 1 could not be reached: cap"),
        (["resid_nrm"], 2, "Did you mean 'resid_norm'"),
    ],
)
def test_checked(here: Callable[..., tuple[int, str]], args: list[str], status: int, says: str) -> None:
    found, printed = here("plugins", "check", *args)
    assert found == status and says in printed, printed


def test_shown(here: Callable[..., tuple[int, str]]) -> None:
    status, printed = here("plugins", "show", "resid_norm")
    assert status == 0, printed
    for line in ("method 'resid_norm' of interp-hello 1.2 (interp-core>=0.1)", "norm[layer] = ", "requires resid_post"):
        assert line in printed
    assert "power    int   1        of the norm." in printed
    schema = json.loads(here("plugins", "show", "longest", "--json")[1])["schema"]
    assert schema["required"] == ["text"] and schema["properties"]["power"]["type"] == "integer"
    status, printed = here("plugins", "show", "crash")
    assert status == 1 and "no luck" in printed
    assert "method 'future' of interp-later 1.0: incompatible\nit needs" in here("plugins", "show", "future")[1]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["resid_norm", "--set", "powr=2", "--text", "Q:"], "resid_norm has no setting 'powr'. Did you mean 'power'"),
        (["resid_norm", "--set", "power=x", "--text", "Q:"], "setting power: Input should be a valid integer"),
        (["resid_norm", "--set", "power", "--text", "Q:"], "'power' is not a setting: write key=value"),
        (["resid_norm"], "resid_norm is a method and runs on text: --text"),
        (["resid_norm", "--text", "Q:", "--model", "toy:txt"], "there is no toy 'toy:txt'"),
        (["longest", "--out", "x"], "recipe longest has no --out; its settings: text, model, power"),
        (["longest"], "recipe longest: setting text is missing; it has no default"),
        (["torch", "--kind", "engines"], "engine 'torch' of interp-core 0.1.0 cannot be run"),
        (["longset"], "no method or recipe is called 'longset'. Did you mean 'longest'"),
        (["crash", "--text", "Q:"], "no luck"),
        (["future", "--text", "Q:"], "is incompatible: it needs interp-core>=99"),
    ],
)
def test_what_cannot_be_run_says_why(here: Callable[..., tuple[int, str]], args: list[str], says: str) -> None:
    status, printed = here("run", *args)
    assert status == 2 and says in printed, printed


def test_a_method_runs(interp: Run, tmp_path: Path) -> None:
    out = interp(
        "run", "resid_norm", "--set", "power=2", "--text", "Q: big\nA:", "--text", "Q: hot\nA:", "--out", "norms"
    )
    assert out.returncode == 0, out.stderr
    files = {"result.json", "result.safetensors", "result.html", "manifest.json", "record", "DONE"}
    assert {path.name for path in (tmp_path / "norms").iterdir()} == files
    assert out.stdout.endswith("norms/result.html\n")


def test_a_recipe_runs(interp: Run) -> None:
    out = interp(
        "run",
        "longest",
        "--text",
        "Q: big",
        "--text",
        "Q: hot",
        "--set",
        "power=2",
        "--model",
        str(DATA / "stories260K"),
    )
    assert out.returncode == 0 and out.stdout.startswith("longest: Q: "), out.stderr
    assert (
        "recipe longest has no --out; its settings: text, model, power" in interp("run", "longest", "--out", "x").stderr
    )


USE = """
import interp_core as ic
from interp_core import sites as S
from interp_core.launch import Job, make_launcher

if __name__ == "__main__":
    from interp_hello.model import make

    model = ic.load(make(), engine="counting")
    assert model.atlas.family.name == "hello" and {"mlp_act", "z"} <= set(model.sites), model.sites
    assert model.check.ok, model.check
    run = model.run({"input_ids": __import__("torch").tensor([[1, 2, 3]])}, read=S.mlp_act)
    assert run[S.mlp_act].shape == (2, 1, 3, 48) and model.engine.plans >= 1
    for name in ("inline", "local"):
        outcomes = make_launcher(name).run([Job(divmod, (7, 2)), Job(divmod, (1, 0))])
        assert outcomes[0].value == (3, 1) and "ZeroDivisionError" in outcomes[1].error, outcomes
    assert ic.method("logit_lens").__class__.__module__ == "interp_plugins.logit_lens.method"
    try:
        ic.method("future")
    except ic.PluginError as error:
        print(error)
"""


def test_engine_family_and_launcher(python: Run, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(USE)
    out = python("use.py")
    assert out.returncode == 0, out.stderr
    assert "method 'future' of interp-later 1.0 is incompatible: it needs interp-core>=99" in out.stdout


def test_what_new_wrote_passes_its_tests(python: Run, site: Path) -> None:
    out = python("-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=site / "written")
    assert out.returncode == 0 and "6 passed" in out.stdout, out.stdout


@pytest.mark.slow  # a minute, where mypy knows nothing of torch yet
@pytest.mark.skipif(not CHECKERS, reason="mypy and ruff come with the dev extra: make check")
def test_what_new_wrote_passes_type_check_and_lint(python: Run, site: Path) -> None:
    cache = ROOT / ".mypy_cache/written"  # its settings are its own
    out = python("-m", "mypy", "--cache-dir", str(cache), cwd=site / "written")
    assert out.returncode == 0, out.stdout
    for command in (["check", "--extend-select", "I,B,UP,ANN"], ["format", "--check"]):
        out = python("-m", "ruff", *command, "--isolated", "--line-length", "120", cwd=site / "written")
        assert out.returncode == 0, out.stdout


def test_a_plugin_that_hangs_is_named(here: object) -> None:
    report = testing.check_plugin(find("hang"), limit=1.0)
    assert report.failed == ["class"] and "took more than 1 s" in str(report)
    with pytest.raises(ic.PluginError, match="class failed"):
        report.raise_if_failed()
