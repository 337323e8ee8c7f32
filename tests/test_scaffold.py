"""What `interp plugins new` writes, kind by kind: put where Python finds it, as pip would, it passes its check."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import interp_core as ic
from interp_core import testing
from interp_core.cli import app
from interp_core.plugins import refresh
from interp_core.scaffold import KINDS, write_package

Install = Callable[..., Path]
CHECKERS = importlib.util.find_spec("mypy") is not None and importlib.util.find_spec("ruff") is not None


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes a package by the command line and installs it: its source on the path, with the metadata of a wheel."""
    names = []

    def write(name: str, *options: str) -> Path:
        names.append(name)
        folder = tmp_path / name
        done = CliRunner().invoke(app, ["plugins", "new", name, "--out", str(folder), *options])
        assert done.exit_code == 0, done.output
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        info = folder / f"src/{name}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
            + "".join(f"Requires-Dist: {line}\n" for line in project["dependencies"])
        )
        ((group, points),) = project["entry-points"].items()
        (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
        monkeypatch.syspath_prepend(str(folder / "src"))
        monkeypatch.chdir(folder)
        refresh()
        return folder

    yield write
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        del sys.modules[module]
    refresh()


def check(name: str, *options: str) -> tuple[int, str]:
    """Exit status of, and what is printed by, `interp plugins check`."""
    done = CliRunner().invoke(app, ["plugins", "check", name, *options])
    raised = done.exception if isinstance(done.exception, ic.InterpError) else ""
    return done.exit_code, f"{done.stdout}{raised}"


def written_tests(folder: Path) -> ModuleType:
    """The test module that was written."""
    (path,) = (folder / "tests").glob("test_*.py")
    spec = importlib.util.spec_from_file_location(f"written_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        (("--minimal",), 19),  # the larger method is built, installed and run in test_thirdparty
        (("--kind", "recipe"), 7),
        (("--kind", "family"), 10),
        (("--kind", "engine"), 8),
        (("--kind", "launcher"), 7),
    ],
    ids=lambda x: "-".join(x).strip("-") if isinstance(x, tuple) else "",
)
def test_what_is_written_passes_its_check(
    install: Install, options: tuple[str, ...], passed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = install("what_it_is", *options)
    status, printed = check("what_it_is")
    assert status == 0, printed
    lines = printed.splitlines()
    assert lines[-1] == f"{passed} checks passed", printed
    assert " 'what_it_is' of what-it-is 0.1.0 (what_it_is:" in lines[0]
    assert len(lines) == passed + 2 and all(re.fullmatch(r"ok    .*\(\d+\.\d s\)", line) for line in lines[1:-1])
    if "--kind" in options:
        written = written_tests(folder)
        tests = [test for name, test in vars(written).items() if name.startswith("test_")]
        assert tests.pop(0).__name__ == "test_conforms"  # what the command line has just done
        for test in tests:
            test(**({"tmp_path": tmp_path} if "tmp_path" in test.__annotations__ else {}))
    readme = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.S)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out or (folder / "out/what_it_is/DONE").is_file()


@pytest.mark.parametrize("name", ["a", "a_rather_long_name_of_some_method"])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_the_readme_are_aligned(kind: str, name: str, tmp_path: Path) -> None:
    readme = (write_package(name, tmp_path / "x", kind) / "README.md").read_text()
    columns = {line.index("  # ") for line in readme.splitlines() if "  # " in line and "=" not in line}
    assert len(columns) == 1, readme


def test_the_minimal_method_is_one_tensor_and_one_read(tmp_path: Path) -> None:
    text = (write_package("few_lines", tmp_path / "x", minimal=True) / "src/few_lines/__init__.py").read_text()
    assert text.count(": Tensor") == 1 and text.count("model.run(") == 1 and text.count("\n") < 40
    with pytest.raises(ic.PluginError, match="the template for an engine is the smallest already"):
        write_package("few_lines", tmp_path / "y", "engine", minimal=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_called_one(kind: str, tmp_path: Path) -> None:
    """The name that a user gave does not stand before what another plugin does."""
    page = (write_package("my_name", tmp_path / "x", kind) / "src/my_name/__init__.py").read_text()
    assert page.startswith('"""My name: say here ') and "What stands here is an example, to be replaced: " in page


def test_a_name_that_another_of_its_kind_has_is_refused(tmp_path: Path) -> None:
    for kind, name in {"recipe": "demo", "family": "gpt_neox", "launcher": "local", "engine": "nnsight"}.items():
        with pytest.raises(ic.PluginError, match=f"interp-core has an? {kind} {name!r} already"):
            write_package(name, tmp_path / "x", kind)


@pytest.mark.slow  # mypy knows nothing of torch yet
@pytest.mark.skipif(not CHECKERS, reason="mypy and ruff come with the dev extra: make check")
@pytest.mark.parametrize("options", [("--minimal",), *(("--kind", kind) for kind in KINDS)], ids="".join)
def test_what_is_written_passes_type_check_and_lint(install: Install, options: tuple[str, ...]) -> None:
    folder = install("what_writes", *options)
    cache = Path(__file__).parent.parent / ".mypy_cache/written"  # its settings are its own
    for command in (
        ["mypy", "--cache-dir", str(cache)],
        ["ruff", "check", "--extend-select", "I,B,UP", "--isolated", "--line-length", "120"],
        ["ruff", "format", "--check", "--isolated", "--line-length", "120"],
    ):
        out = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=folder)
        assert out.returncode == 0, out.stdout


def test_before_it_is_installed_a_plugin_is_checked_by_its_place(install: Install) -> None:
    """`MODULE:ATTRIBUTE --kind`, by the word that `new` has for the kind."""
    folder = install("not_yet", "--kind", "launcher")
    next((folder / "src").glob("*.dist-info/entry_points.txt")).unlink()
    refresh()
    status, printed = check("not_yet:NotYet", "--kind", "launcher")
    assert status == 0 and printed.startswith("launcher not_yet:NotYet\n"), printed
    assert printed.endswith("\n7 checks passed\n"), printed
    assert (
        "no kind of plugin is called 'launchr'. Did you mean 'launchers'"
        in check("not_yet:NotYet", "--kind", "launchr")[1]
    )


def test_a_wrong_path_is_the_family_files_fault(install: Install) -> None:
    folder = install("astray", "--kind", "family")
    file = folder / "src/astray/__init__.py"
    file.write_text(file.read_text().replace('"squeeze"', '"sqeeze"'))
    report = testing.check_family("astray")
    said = "the family file of 'astray' says that blocks.mlp.out is at 'sqeeze', where this model has no module. "
    assert report.failed == ["paths"] and f"{said}Did you mean 'squeeze'?" in str(report)
