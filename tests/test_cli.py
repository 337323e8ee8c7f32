"""The command line: light, and its errors are sentences."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file

import interp_core as ic
from interp_core import cli, settings
from interp_core.cli.flags import pairs
from interp_core.plugins import Plugin
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
        (["run", "logit_lens", "toy:text", "3"], "logit_lens: '3' belongs to no setting: write --setting value"),
        (["run", "logit_lens", "--text", "x", "--top_k", "many"], "logit_lens: setting top_k: "),
        (["run", "demo", "--modle", "x"], "recipe demo has no setting 'modle'. Did you mean 'model'"),
        (["run", "demo", "--text", "x"], "recipe demo has no --text; its settings: model, out"),
    ],
)
def test_errors_are_one_sentence(
    args: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["interp", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and says in shown and "Traceback" not in shown


def test_a_process_ends_with_that_sentence() -> None:
    out = interp("demo", "--model", "toy:txt")
    assert out.returncode == 2 and out.stderr.startswith("interp: there is no toy") and "Traceback" not in out.stderr


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
            read("one", Config, pairs("one", Config, words, None))
        return
    assert pairs("one", Config, words, None) == given
    assert pairs("one", Config, words, ["top_k=9"]) == [*given, "top_k=9"]
    assert read("one", Config, pairs("one", Config, words, ["top_k=9"]))["top_k"] == 9


class Several(ic.Config):
    """Settings that take several values."""

    in_jsonl: list[Path] | None = None
    layers: list[int] | list[str] | None = None
    at: Any = None
    words: str | list[str] = ""
    top_k: int = 1
    quiet: bool = False


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--in_jsonl", "A", "B", "C", "--top_k", "3"], {"in_jsonl": ["A", "B", "C"], "top_k": 3}),
        (["--in_jsonl", "A"], {"in_jsonl": ["A"]}),
        (["--in-jsonl", '["A", "B"]'], {"in_jsonl": ["A", "B"]}),
        (["--layers", "1", "-2", "--at", "0", "-1"], {"layers": [1, -2], "at": [0, -1]}),
        (["--layers", "1", "all"], {"layers": ["1", "all"]}),
        (["--layers", "3"], {"layers": [3]}),
        (["--layers", "null", "--at", "last"], {"layers": None, "at": "last"}),
        (["--words", "a b", "3", "--quiet"], {"words": ["a b", "3"], "quiet": True}),
        (["--words", "7"], {"words": "7"}),
        (["--top_k", "3", "4"], "one: --top_k takes one value, not 2: 3 4"),
        (["--quiet", "false", "true"], "one: --quiet takes one value, not 2: false true"),
        (["--topk", "3", "4"], "one has no setting 'topk'. Did you mean 'top_k'"),
        (["--top_k=3", "4"], "'4' belongs to no setting"),
    ],
)
def test_several_values_after_one_flag(words: list[str], values: Any) -> None:
    if isinstance(values, str):
        with pytest.raises(ic.PlanError, match=values):
            read("one", Several, pairs("one", Several, words, None))
        return
    found = read("one", Several, pairs("one", Several, words, None))
    assert found == values
    Several(**found)


def invoked(*args: str) -> Any:
    """`interp run` in this process; an error of ours is raised."""
    from typer.testing import CliRunner

    from interp_core.cli import app

    done = CliRunner().invoke(app, ["run", *args])
    if done.exception is not None:
        raise done.exception
    return done


def test_a_file_of_settings(tmp_path: Path) -> None:
    """JSON and TOML give the same; flags and options win; several texts after one flag; batches in the run's folder."""
    held = {"at": -1, "top-k": 3, "text": ["Q: big", "Q: hot\nA:"], "batch_size": 1, "out": str(tmp_path / "file")}
    (tmp_path / "a.json").write_text(json.dumps(held))
    lines = "at = -1\ntop_k = 3\ntext = ['Q: big', \"Q: hot\\nA:\"]\nbatch_size = 1\n"
    (tmp_path / "a.toml").write_text(lines)
    invoked("logit_lens", "--config", str(tmp_path / "a.json"))
    invoked("logit_lens", "--config", str(tmp_path / "a.toml"), "--out", str(tmp_path / "toml"), "--top_k", "2")
    invoked(
        "logit_lens", "--at", "-1", "--text", "Q: big", "Q: hot\nA:", "--top_k", "3", "--out", str(tmp_path / "flags")
    )
    ids = {name: load_file(tmp_path / name / "result.safetensors")["top_ids"] for name in ("file", "toml", "flags")}
    assert ids["file"].shape == (2, 7, 1, 3) and torch.equal(ids["file"], ids["flags"])
    assert torch.equal(ids["toml"], ids["flags"][..., :2])
    assert len(list((tmp_path / "file/parts").iterdir())) == 2 and not (tmp_path / "flags/parts").exists()
    manifest = json.loads((tmp_path / "toml/manifest.json").read_text())
    assert manifest["settings"]["top_k"] == 2 and manifest["settings"]["text"] == held["text"]


@pytest.mark.parametrize(
    ("name", "content", "kind", "says"),
    [
        ("a.toml", "topk = 3", ic.PlanError, r"a\.toml: logit_lens has no setting 'topk'. Did you mean 'top_k'"),
        ("a.json", '{"top_k": 1, "top-k": 2}', ic.PlanError, "has the setting top_k twice"),
        ("a.json", "[1]", ic.PlanError, "holds a list, not settings by name"),
        ("a.json", "{", ic.LoadError, r"cannot be read as \.json: "),
        ("a.toml", "a = = 3", ic.LoadError, r"cannot be read as \.toml: "),
        ("a.json", '{"top_k": "many", "text": "x"}', ic.PlanError, "setting top_k: "),
        ("a.json", '{"batch_size": "many", "text": "x"}', ic.PlanError, "setting batch_size: "),
        ("", "", ic.LoadError, r"there is no file .*; --config takes a \.json or \.toml file of settings"),
    ],
)
def test_a_bad_file_of_settings(tmp_path: Path, name: str, content: str, kind: Any, says: str) -> None:
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(kind, match=says):
        invoked("logit_lens", "--config", str(tmp_path / (name or "none.json")))


def test_a_file_of_settings_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"modle": "toy:text"}')
    with pytest.raises(ic.PlanError, match="recipe demo has no setting 'modle'. Did you mean 'model'"):
        invoked("demo", "--config", str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(json.dumps({"model": "toy:txt", "out": str(tmp_path)}))
    with pytest.raises(ic.LoadError, match="there is no toy 'toy:txt'"):
        invoked("demo", "--config", str(tmp_path / "a.json"))
    with pytest.raises(ic.LoadError, match="there is no toy 'toy:tex'"):
        invoked("demo", "--config", str(tmp_path / "a.json"), "--model", "toy:tex")


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


def helped(*args: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what `interp run … --help` writes."""
    monkeypatch.setattr(sys, "argv", ["interp", "run", *args, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    written = capsys.readouterr()
    return int(ended.value.code or 0), written.out + written.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["demo"], ["recipe 'demo' of interp-core", "--corrupted  str = 'Once upon", "a prompt of as many tokens"]),
        (["demo", "--model"], ["--answer  str = ' cat'"]),
        (["logit_lens"], ["--text TEXT", "--top_k  int = 5\n      how many tokens", "--batch_size  int | None = None"]),
        (["logit_lens", "--kind", "methods"], ["method 'logit_lens'"]),
        (["attribute"], ["--prompt  str = (needed)"]),
    ],
)
def test_help_of_a_name_lists_its_settings(
    args: list[str], says: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, written = helped(*args, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and all(text in written for text in says), written
    assert max(map(len, written.splitlines())) < 160


def test_help_without_a_name_is_that_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, written = helped(monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and "--config" in written and "--top_k" not in written


def test_our_recipes_take_one_config_whose_settings_are_all_described() -> None:
    for plugin in (plugin for plugin in ic.registry("recipes") if plugin.dist == "interp-core"):
        recipe = plugin.load()
        config = settings.of_function(recipe)
        arguments = inspect.signature(recipe, eval_str=True).parameters.values()
        assert [argument.annotation for argument in arguments] == [config], plugin.name
        assert not [row["setting"] for row in settings.rows(config) if not row["description"]], plugin.name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("logit_lenz", "no method or recipe is called 'logit_lenz'. Did you mean 'logit_lens'"),
        ("lost", "interp: recipe 'lost' of session is broken: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_help_of_what_cannot_run_is_one_line(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = Plugin("recipes", "lost", "nowhere:lost", "session", "")
    monkeypatch.setattr(ic.registry("recipes"), "rows", [*ic.registry("recipes"), lost])
    code, written = helped(name, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and says in written and written.count("\n") == 1


def test_help_of_a_wrong_name_is_quick() -> None:
    code = (
        "import sys; from interp_core.cli import main; sys.argv = ['interp', 'run', 'longset', '--help']\n"
        "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False" and "is called 'longset'" in out.stderr
