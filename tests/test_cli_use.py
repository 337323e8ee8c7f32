"""The command line in use: where the model stands, where results go, what is said meanwhile, narrow terminals."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import toy_model
from interp_plugins.logit_lens import LogitLens
from interp_plugins.logit_lens.method import LogitLensResult
from typer.testing import CliRunner

import interp_core as ic
from interp_core import bench, cli, progress
from interp_core.batteries import sites
from interp_core.cli import outputs, run
from interp_core.columns import aligned, shortened, wrapped

TWO = ("--text", "Q: big\nA:", "Q: hot\nA: cold\n\nQ: wet\nA:")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> None:
    """Standard output and error as terminals."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)


def interp(*args: str) -> int:
    """The exit code of `interp …`, run in this process by `main`."""
    sys.argv, before = ["interp", *args], sys.argv
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line with which a command ends."""
    assert interp(*args) == 2
    said = capsys.readouterr().err
    assert said.startswith("interp: ") and said.count("\n") == 1
    return said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert interp("--version") == 0
    assert capsys.readouterr().out == f"interp_core {ic.__version__}\n"


@pytest.mark.parametrize(
    "command", [["sites"], ["check"], ["bench"], ["demo"], ["attribute", "--prompt", "x"], ["run", "logit_lens", *TWO]]
)
def test_a_model_is_named_with_and_without_its_option(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = command
    words = command[:2] if name == "run" else [name]
    rest = command[len(words) :]
    for args in ([*words, "toy:txt", *rest], [*command, "--model", "toy:txt"], [*words, "--model", "toy:txt", *rest]):
        assert "there is no toy 'toy:txt'" in refused(capsys, *args)
    said = refused(capsys, *words, "toy:txt", *rest, "--model", "toy:tex")
    assert "the model is named twice, 'toy:txt' and --model 'toy:tex'" in said
    if name in ("sites", "check"):
        assert "which model?" in refused(capsys, name)


@pytest.mark.parametrize("command", [["run", "logit_lens", *TWO], ["demo"], ["check"], ["bench"]])
def test_the_folder_is_tried_before_the_model(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("mine")
    said = refused(capsys, *command, "--model", "toy:txt", "--out", "file/below")
    assert "--out file/below: file is a file; give a" in said and Path("file").read_text() == "mine"


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    said = refused(capsys, "run", "logit_lens", "toy:txt", *TWO, "--out", "out")
    assert said.startswith("interp: --out out: nothing can be written in /")
    assert said.endswith(": no space left on device; make room, or give another --out\n")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "out/x"),
            "out/x: read-only file system; give an --out that can",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: permission denied; give an --out"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "x: no such file or directory"),
        (OSError(), "OSError"),
        (ic.LoadError("two\nlines"), "two lines"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "not in range"), "'ascii' codec can't encode"),
    ],
)
def test_errors_of_the_system_are_one_line(error: Exception, says: str) -> None:
    assert outputs.sentence(error).startswith(says) and "\n" not in outputs.sentence(error)


def test_what_was_worked_out_is_saved_before_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Any) -> None:
        raise OSError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("interp_plugins.logit_lens.method.LogitLensResult.show", fails)
    assert interp("run", "logit_lens", "--text", "Q: big", "--out", "out") in (1, 2)
    assert {"result.json", "result.safetensors", "result.html"} <= {path.name for path in Path("out").iterdir()}
    assert "Traceback" not in capsys.readouterr().err


def test_letters_that_a_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert interp("run", "logit_lens", "--text", "Q: big", "--at", "-1", "--out", "out") == 0
    stream.seek(0)
    assert "out/result.html" in stream.read() and Path("out/result.html").is_file()


def test_a_package_that_is_written_and_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert interp("plugins", "new", "my_lens") == 0
    capsys.readouterr()
    said = refused(capsys, "plugins", "check", "my_lens")
    assert "my_lens is a folder here whose plugin is not installed: pip install -e my_lens" in said


def test_what_came_out_is_printed_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert interp("run", "logit_lens", "--text", "Q: big", "--out", "out") == 0
    finding = ic.Result.load("out").finding
    assert finding and capsys.readouterr().out.endswith(f"\n\n{finding}\n\n{Path('out/result.html')}\n")


def test_another_runs_result_is_replaced_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    lens, knocked = ["run", "logit_lens", "--text", "Q: big", "--out", "out"], ["run", "ablations", "--text", "Q: big"]
    assert interp(*lens) == 0
    Path("out/notes.txt").write_text("mine")
    before = json.loads(Path("out/result.json").read_text())["class"]
    said = refused(capsys, *knocked, "--model", "toy:txt", "--out", "out")
    assert (
        "out holds another run: of 'logit_lens', not of 'ablations'; give another folder, or" in said
        and "--overwrite" in said
    )
    assert json.loads(Path("out/result.json").read_text())["class"] == before
    assert interp(*knocked, "--out", "out", "--overwrite") == 0
    assert json.loads(Path("out/result.json").read_text())["class"] != before
    assert Path("out/notes.txt").read_text() == "mine" and Path("out/DONE").is_file()


def test_a_result_of_no_run_is_replaced_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/result.json").write_text("{}")
    command = ["run", "logit_lens", "--text", "Q: big", "--out", "out"]
    assert "this run did not write it; move it away, give another folder, or --overwrite" in refused(capsys, *command)
    assert interp(*command, "--overwrite") == 0 and json.loads(Path("out/result.json").read_text())["fields"]


def test_stopping_says_what_is_kept_and_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, ran = LogitLens.run, []

    def stopped(self: LogitLens, *args: Any) -> LogitLensResult:
        ran.append(1)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(LogitLens, "run", stopped)
    command = ["run", "logit_lens", *TWO, "--at", "-1", "--batch_size", "1", "--out", "out"]
    assert interp(*command) == 130
    assert "interp: stopped: what is done is kept in out, and the same command goes on" in capsys.readouterr().err
    assert interp(*command) == 0 and len(ran) == 3
    ran.clear()
    assert interp(*command[:-1], "new") == 130 and len(ran) == 2
    ran[:] = [1]
    assert interp("run", "logit_lens", "--text", "Q: big", "--out", "none") == 130
    assert capsys.readouterr().err.endswith("interp: stopped: nothing was done yet in none\n")


def test_stopping_what_writes_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How far it came, and how to go on; of checks those that are printed."""
    counted = {sites: "_cell", bench: "_seconds"}
    for module, name in counted.items():
        whole, calls = getattr(module, name), []

        def third(*args: Any, whole: Any = whole, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return whole(*args)

        monkeypatch.setattr(module, name, third)
    assert interp("check", "toy:text") == 130
    said = capsys.readouterr().err
    assert re.search(r"^interp: stopped: \d+ of \d+ uses of sites were checked, none of them failed; ", said, re.M)
    assert "nothing is written, and the same command begins anew; --engine NAME checks one engine alone" in said
    assert interp("bench", "--rounds", "7", "--tokens", "4") == 130
    assert "stopped: 0 of 7 rounds were timed; nothing is written, and the same" in capsys.readouterr().err

    def stopped(*args: Any) -> LogitLensResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(LogitLens, "run", stopped)
    assert interp("plugins", "check", "logit_lens") == 130
    shown = capsys.readouterr()
    passed = re.search(r"interp: stopped: (\d+) checks? passed so far; the same command begins anew", shown.err)
    assert passed and int(passed[1]) == shown.out.count("\nok ") > 0


def test_how_far_work_is_on_terminals_alone_and_not_with_q(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Loading takes a second: it counts as long here. transformers' own bar is nowhere."""
    monkeypatch.setattr(progress, "SILENT", 0.0)
    told = []
    for tty, words in ((True, []), (True, ["-q"]), (False, [])):
        monkeypatch.setattr(sys.stderr, "isatty", lambda tty=tty: tty, raising=False)
        assert interp("sites", *words, "toy:text") == 0
        told.append(capfd.readouterr().err)
    assert "loading toy:text" in told[0] and not told[1] and not told[2] and not progress.hushed
    assert "Loading weights" not in "".join(told)
    ic.load("toy:text")
    assert "Loading weights" not in capfd.readouterr().err


def test_what_is_printed_stands_above_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch)
    with progress.above(), progress.Progress("texts", 2, shown=True) as told:
        told.add()
        print("in between")
        told.add()
    written = capsys.readouterr()
    assert written.out == "in between\n"
    assert re.search(r"\rtexts 1 of 2[^\r]*\r +\r\rtexts 2 of 2[^\r]*\n$", written.err)


def test_columns_are_shortened_with_an_ellipsis() -> None:
    rows = [["name", "what it is", "where"], ["a", "b" * 30, "d" * 20], ["long" * 5, "c", "e"]]
    assert aligned(rows)[1] == "a" + " " * 21 + "b" * 30 + "  " + "d" * 20 and shortened("abcdef", 4) == "abc…"
    assert aligned(rows, 50) == [
        f"{'name':20}  {'what it is':13}  where", f"{'a':20}  {'b' * 12}…  {'d' * 12}…",
        f"{'long' * 5}  {'c':13}  e"]  # fmt: skip
    assert aligned(rows, 35)[1] == f"{'a':20}  {'b' * 12}…" and aligned(rows, 25)[1:] == ["a", "long" * 5]
    assert max(map(len, aligned(rows, 30, keep=3))) <= 30 and aligned([]) == [] and aligned(rows, 10)[2] == "longlongl…"
    assert wrapped("one two three\nfour", 8) == "one two\n  three\nfour" and wrapped("one two") == "one two"


@pytest.mark.parametrize("width", [40, 80])
def test_narrow_terminals(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on_a_terminal(monkeypatch, width)
    lens = ["run", "logit_lens", "--text", "Q: big\nA: small\n\nQ: hot\nA: cold<|endoftext|>", "--out", "out"]
    for args in (["plugins"], ["sites", "toy:text"], ["run", "demo", "--help"], lens, ["show", "out"]):
        assert interp(*args) == 0
        said = capsys.readouterr().out
        long = [line for line in said.splitlines() if len(line) > width]
        assert len(said) > 400 and not long, (args, long)
    assert "<|endofte…" in said and "<|endoftex " not in said


def test_the_battery_in_a_narrow_terminal_has_engines_as_headings() -> None:
    from interp_core.batteries.sites import USES, Battery, Cell

    cells = [
        Cell(engine, site, use, None, "ok") for engine in ("torch", "nnsight") for site in ("z", "q") for use in USES
    ]
    whole, narrow = Battery(tuple(cells)).text(80).splitlines(), Battery(tuple(cells)).text(30).splitlines()
    assert whole[0].split() == ["engine", "site", *USES] and len(whole) == 5
    assert [line.split()[0] for line in narrow] == ["site", "engine", "z", "q", "engine", "z", "q"]
    assert narrow[1] == "engine torch" and narrow[4] == "engine nnsight" and max(map(len, narrow)) <= 30


def test_the_listing_stands_in_groups_and_leaves_our_families_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert interp("plugins") == 0
    said = capsys.readouterr().out
    heads = [line for line in said.splitlines() if re.fullmatch(r"[a-z]+", line)]
    assert heads == ["methods", "recipes", "engines", "architectures", "launchers"]
    assert re.search(
        r"architectures\n  \d{2,} model families of interp-core: interp plugins architectures, or -v", said
    )
    assert interp("plugins", "architectures") == 0
    assert "  gpt_neox " in capsys.readouterr().out


def test_long_commands_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The battery, counted without its cells; and the benchmark, of one operation."""
    from interp_core.batteries import sites
    from interp_core.bench import benchmark

    for name in ("SILENT", "EVERY"):
        monkeypatch.setattr(progress, name, 0.0)
    monkeypatch.setattr(sites, "USES", ())
    sites.check_model(toy_model(), ["torch"])
    assert f"sites {len(list(toy_model().sites))} of {len(list(toy_model().sites))}" in capfd.readouterr().err
    benchmark(toy_model(), rounds=2, n_tokens=4, operations=["plain"])
    assert "rounds 2 of 2" in capfd.readouterr().err


def test_checks_are_printed_as_they_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from interp_core.testing import checks, kit

    lines: list[str] = []
    monkeypatch.setattr(kit, "CHECKS", {name: checks.CHECKS[name] for name in ("class", "config")})
    monkeypatch.setitem(kit.CHECKS, "last", lambda case: f"{len(lines)} lines before")
    report = kit.check_method(LogitLens, toy_model(), tell=lambda row: lines.append(str(row)))
    assert [line.split()[1] for line in lines] == ["class", "config", "last"] and "2 lines before" in lines[2]
    assert str(report) == "\n".join([report.title, *lines, "3 checks passed"])


def test_names_are_completed_without_torch() -> None:
    assert run.completed("logit") == ["logit_lens"] and "demo" in run.completed("")
    assert CliRunner().invoke(cli.app, ["--help"]).output.count("completion") >= 2


def test_discarding_what_a_run_made(tmp_path: Path) -> None:
    with ic.runs.open(tmp_path / "a", {"x": 1}, recipe="one") as held:
        held.put({"a.txt": "a"})
        held.part("p").put({"b.txt": "b"})
        with pytest.raises(ic.PlanError, match="a process is at work"):
            ic.runs.discard(tmp_path / "a")
    (tmp_path / "a/mine.txt").write_text("mine")
    ic.runs.discard(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").rglob("*") if path.is_file()] == ["mine.txt"]
    ic.runs.discard(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
