"""Run folders: nothing is lost or half-written wherever a run is stopped, and no other run enters a folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_model
from safetensors.torch import load_file
from typer.testing import CliRunner

import interp_core as ic
from interp_core import runs, testing
from interp_core.cli import app
from interp_core.identity import tokenizer_digest
from interp_core.runs import session

KILLED = Path(__file__).parent / "killed_runs.py"


def work(out: Path, n: int = 3, say: Any = lambda line: None, **more: Any) -> list[str]:
    """A run of two stages, rows and a part; gives what was worked out."""
    made: list[str] = []

    def make(name: str, value: Any) -> Any:
        made.append(name)
        return value

    with runs.open(out, {"n": n, "seed": 7, **more}, recipe="work", free=("threads",), say=say) as run:
        first = run.stage("first.json", lambda: make("first", {"x": [1, 2.5]}))
        run.stage("second.json", lambda: make("second", {"sum": sum(first["x"])}), after=["first.json"])
        with run.rows("rows.csv", key="item") as rows:
            for item in range(n):
                if item not in rows:
                    rows.add(*({"item": item, "side": s, "v": make(f"row {item}{s}", item / 3)} for s in "ab"))
        with run.part("a/b").attempt() as part:
            part.put({"c.txt": "text"})
    return made


def content(folder: Path) -> dict[str, bytes]:
    """All files but those that tell of the runs themselves."""
    kept = [path for path in folder.rglob("*") if path.is_file() and "record" not in path.relative_to(folder).parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.name not in ("manifest.json", "DONE")}


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


# going on


@pytest.mark.parametrize("kind", ["own", "tree"])
def test_killed_at_every_point_a_run_goes_on(kind: str, tmp_path: Path) -> None:
    """In a process without torch, which forks: `kill -9` before each flush, rename, link and deletion, and in the middle of
    each line."""
    out = subprocess.run([sys.executable, str(KILLED), kind], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr[-3000:]
    killed, points = map(int, out.stdout.split())
    assert killed == points >= 35


def test_a_full_disk_at_every_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the disk, no file is half there, and with room the run ends as if nothing had been."""
    monkeypatch.setattr(session, "surroundings", dict)
    work(tmp_path / "whole")
    whole, fsync, write, failed = content(tmp_path / "whole"), os.fsync, os.write, 0
    for point in range(60):
        left = point

        def full(call: Any, *args: Any) -> Any:
            nonlocal left
            left -= 1
            if left >= 0:
                return call(*args)
            if call is write:
                write(args[0], args[1][: len(args[1]) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        out = tmp_path / str(point)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", lambda *args: full(fsync, *args))
            patched.setattr(os, "write", lambda *args: full(write, *args))
            ended = raised(lambda: work(out))  # noqa: B023
        assert ended is None or (isinstance(ended, OSError) and ended.errno == errno.ENOSPC)
        failed += ended is not None
        there = content(out) if out.exists() else {}
        assert {name: whole.get(name) for name in there} == there and not (left < -1 and (out / "DONE").exists())
        assert not list(out.rglob("*.tmp"))
        work(out)
        assert content(out) == whole and (out / "DONE").exists()
        if left >= 0:
            break
    assert failed == point >= 15


def test_ctrl_c_is_noted_and_what_was_done_is_kept(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), runs.open(tmp_path, {}, recipe="r") as run:
        run.stage("a.json", lambda: 1)
        with run.part("p").attempt() as part:
            part.stage("b.json", stop)
    told = runs.manifest(tmp_path)
    assert told["state"] == "stopped" and told["parts"] == {"stopped": 1} and not (tmp_path / "DONE").exists()
    assert runs.parts(tmp_path)[0]["reason"] == "stopped at b.json"


def test_nothing_is_done_twice_and_reasons_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    assert work(tmp_path) == ["first", "second", *(f"row {i}{s}" for i in range(3) for s in "ab")]
    assert work(tmp_path, say=said.append, threads=4) == [] and said == ["  kept first.json", "  kept second.json"]
    (tmp_path / "second.json").write_text("{")
    (tmp_path / "rows.csv").unlink()
    said.clear()
    assert work(tmp_path, say=said.append) == ["second"]
    assert "  second.json is made again: second.json is not as it was written" in said
    with runs.open(tmp_path / "b", {}, recipe="r", say=said.append) as run:
        for seen in (1, 2):
            run.stage("x.json", lambda seen=seen: seen, inputs={"pairs": seen})
            run.stage("y.json", lambda seen=seen: seen, after=["x.json"])
    assert "  x.json is made again: pairs was 1, is 2" in said
    assert "  y.json is made again: other what x.json made" in said and (tmp_path / "b/y.json").read_text() == "2\n"
    note = json.loads((tmp_path / "b/record/stages/x.json.json").read_text())
    assert note["why"] == "pairs was 1, is 2" and note["inputs"] == {"pairs": 2}


def test_every_kind_of_file(tmp_path: Path) -> None:
    """Read back they are what was written, a second time of the same bytes."""
    tensors = {name: torch.arange(6.0).view(2, 3) * factor for factor, name in enumerate("dcba")}
    axes = dict.fromkeys("abcd", "layer head")
    lens = ic.method("logit_lens")(toy_model(), "Q: big", at=-1)
    for out in (tmp_path / "a", tmp_path / "b"):
        with runs.open(out, {}, recipe="r", model=toy_model()) as run:
            run.tensors("t.safetensors", tensors, axes)
            run.table("t.csv", [{"a": 0.1, "b": "x,y"}, {"a": float("nan"), "b": None}])
            run.result("lens", lens)
            run.figure("drawn.png", lambda path: path.write_bytes(b"png"))
            for name in ("v.safetensors", "v.pt"):
                value = run.stage(name, lambda: {"m": torch.ones(2)})
                assert torch.equal(run.stage(name, lambda: {})["m"], value["m"])
    assert (tmp_path / "a/t.csv").read_bytes() == b'a,b\n0.1,"x,y"\nnan,\n'
    assert load_file(tmp_path / "a/t.safetensors")["a"].tolist() == tensors["a"].tolist()
    assert type(lens).load(tmp_path / "a/lens") == lens
    assert content(tmp_path / "a") == content(tmp_path / "b")


# whose it is


def test_other_settings_are_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    work(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ic.PlanError, match="holds another run: n was 3, is 4; give another folder"):
        work(tmp_path, n=4)
    with pytest.raises(ic.PlanError, match="holds another run: of 'work', not of 'other'; give another folder"):
        runs.open(tmp_path, {"n": 3, "seed": 7}, recipe="other")
    with pytest.raises(ic.PlanError, match=r"settings\.fn is a function, which a run's manifest cannot hold"):
        runs.open(tmp_path / "new", {"fn": work}, recipe="work")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_long_settings_are_told_by_name(tmp_path: Path) -> None:
    """A message stays readable where a setting has thousands of numbers."""
    with runs.open(tmp_path, {"n": 1, "points": [[0, i] for i in range(6000)]}, recipe="r") as run:
        run.put({"a.txt": "a"})
    with pytest.raises(
        ic.PlanError, match="holds another run: n was 1, is 2; other points; give another folder"
    ) as told:
        runs.open(tmp_path, {"n": 2, "points": [[0, i] for i in range(1, 6001)]}, recipe="r")
    assert len(str(told.value)) < len(str(tmp_path)) + 100


def test_a_folder_in_which_nothing_was_made_is_nobodys(tmp_path: Path) -> None:
    with runs.open(tmp_path, {"n": 1}, recipe="r") as run:
        run.put({"draft.txt": "1"}, binds=False)
    with runs.open(tmp_path, {"n": 2}, recipe="r") as run:
        run.put({"draft.txt": "2"})
    assert runs.manifest(tmp_path)["settings"] == {"n": 2}
    with pytest.raises(ic.PlanError, match="n was 2, is 1"):
        runs.open(tmp_path, {"n": 1}, recipe="r")


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    hf = testing.tiny("llama")
    with runs.open(tmp_path, {}, recipe="r") as run:
        run.bind(ic.load(hf))  # loaded after the folder was opened
        run.put({"a.txt": "a"})
    with torch.no_grad():
        hf.model.layers[2].mlp.down_proj.weight[-1, -1] += 1
    with pytest.raises(ic.PlanError, match="holds another run: other weights; give another folder"):
        runs.open(tmp_path, {}, recipe="r", model=ic.load(hf))
    with runs.open(tmp_path, {}, recipe="r") as run, pytest.raises(ic.PlanError, match="other weights"):
        run.bind(ic.load(hf))
    assert not (set(runs.manifest(tmp_path)) & {"weights"}) and runs.manifest(tmp_path)["dtype"] == "float32"


def test_a_tokenizer_is_told_by_what_it_does_not_by_its_last_call() -> None:
    tokenizer = toy_model().tokenizer
    first = tokenizer_digest(tokenizer)
    tokenizer(["Q:", "Q: big"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == first
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages }}"
    try:
        assert tokenizer_digest(tokenizer) != first
    finally:
        tokenizer.chat_template = template


def test_a_file_that_the_run_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "first.json").write_text("mine")
    with pytest.raises(ic.PlanError, match=r"first.json is there, and this run did not write it; move it away"):
        work(tmp_path)
    assert (tmp_path / "first.json").read_text() == "mine" and runs.manifest(tmp_path)["state"] == "failed"
    for name in ("../x", "/x", "a/../../x", ""):
        with (
            runs.open(tmp_path / "b", {}, recipe="r") as run,
            pytest.raises(ic.PlanError, match="does not name a file"),
        ):
            run.put({name: "x"})
    with pytest.raises(ic.PlanError, match="is not open: write in the block of"):
        runs.open(tmp_path / "b", {}, recipe="r").put({"x": "x"})
    with pytest.raises(ic.LoadError, match="holds no run"):
        runs.manifest(tmp_path / "nowhere")
    with pytest.raises(ic.PlanError, match="is a file; give a folder"):
        runs.open(tmp_path / "first.json", {}, recipe="r")
    with pytest.raises(ic.PlanError, match="first.json is a file, and .* would lie below it"):
        runs.open(tmp_path / "first.json" / "a" / "b", {}, recipe="r")


# published trees


def publish(tree: Path, by: str, text: str, *, overwrite: bool = False) -> list[str]:
    with runs.publish(tree, {"by": by}, recipe="golden", overwrite=overwrite) as run:
        run.claim(["task/a.csv"])
        return run.put({"task/a.csv": text, f"task/{by}.csv": by}, stage="tables")


def test_a_tree_takes_several_runs_and_no_clash(tmp_path: Path) -> None:
    tree = tmp_path / "out"
    (tree / "task").mkdir(parents=True)
    (tree / "task/other.csv").write_text("of another program")
    with runs.publish(tree, {"by": "x"}, recipe="golden") as run:
        run.put({"task/a.csv": "1", "task/x.csv": "x"})
    with pytest.raises(
        ic.PlanError, match=r"a.csv is there, written by golden-\w{8} \(by was 'x', is 'y'\); give --ov"
    ):
        publish(tree, "y", "2")
    with runs.publish(tree, {"by": "y"}, recipe="golden") as run:
        with pytest.raises(ic.PlanError, match="a.csv is there"):
            run.put({"task/y.csv": "y", "task/a.csv": "2"})
        assert not (tree / "task/y.csv").exists()  # all of a stage or nothing
        assert run.put({"task/a.csv": "1"}) == [f"{tree / 'task/a.csv'}  same as before"]
    assert publish(tree, "z", "3", overwrite=True)[0].endswith("replaced")
    with pytest.raises(ic.PlanError, match=r"a.csv is there, written by golden"):  # x's file is not x's any more
        publish(tree, "x", "1")
    assert content(tree) == {
        "task/a.csv": b"3",
        "task/x.csv": b"x",
        "task/z.csv": b"z",
        "task/other.csv": b"of another program",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.runs"]
    assert all((home / "manifest.json").is_file() for home in (tmp_path / "out.runs").iterdir())
    (tree / "task/new.csv").write_text("unknown")
    with (
        runs.publish(tree, {}, recipe="r") as run,
        pytest.raises(ic.PlanError, match="and no run of this tree wrote it"),
    ):
        run.put({"task/new.csv": "mine"})


def test_the_same_run_replaces_what_it_published(tmp_path: Path) -> None:
    for text in ("1", "2"):
        with runs.publish(tmp_path / "out", {}, recipe="r") as run:
            run.put({"a.csv": text})
    assert (tmp_path / "out/a.csv").read_text() == "2" and len(list((tmp_path / "out.runs").iterdir())) == 1


# what is on record


def test_the_manifest_says_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["run", "logit_lens", "--text", "Q: big", "--top_k", "3"]
    assert CliRunner().invoke(app, args, catch_exceptions=False).exit_code == 0
    (folder,) = (tmp_path / "results/toy-text/text").iterdir()
    told = json.loads((folder / "manifest.json").read_text())
    assert folder.name.endswith(f"-logit_lens-{told['hash']}") and told["state"] == "done"
    assert told["passed"] == {"top_k": "3", "text": ["Q: big"]} and told["settings"]["top_k"] == 3
    assert told["model"]["fingerprint"] == toy_model().fingerprint() and len(told["model"]["tokenizer"]) == 64
    assert (told["dtype"], told["attention_implementation"]) == ("float32", "sdpa")
    (session_,) = told["sessions"]
    assert (
        session_["packages"]["torch"] == torch.__version__ and session_["torch"]["threads"] == torch.get_num_threads()
    )
    assert session_["peak_memory"]["resident"] > 1e7 and session_["ended"] > session_["started"]
    assert {"system", "machine", "cpu", "cores", "memory_bytes", "gpus"} == set(session_["host_class"])
    assert (folder / "result.safetensors").is_file() and (folder / "result.html").is_file()


def test_without_a_folder_an_unfinished_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), runs.open(None, {"seed": 1}, recipe="a b", dataset="x/y") as run:
        assert runs.open(None, {"seed": 1}, recipe="a b", dataset="x/y").path != run.path  # a process is at work there
        run.put({"a.txt": "a"})
        raise ZeroDivisionError
    said: list[str] = []
    with runs.open(None, {"seed": 1}, recipe="a b", dataset="x/y", say=said.append) as again:
        assert again.path == run.path and again.path.parent == Path("results/no-model/x-y") and said
    assert [told["state"] for told in runs.manifest(run.path)["sessions"]] == ["failed", "finished"]
    assert runs.manifest(run.path)["seeds"] == {"seed": 1}
    assert runs.open(None, {"seed": 1}, recipe="a b", dataset="x/y").path != run.path  # that one is done


def test_git_state_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert session.git_state(tmp_path) is None
    done = subprocess.run(["git", "init", "-q", str(tmp_path)], check=False)
    if done.returncode:
        pytest.skip(reason="there is no git here")
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "a").write_text("1")
    for words in (["add", "a"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = session.git_state(tmp_path)
    (tmp_path / "a").write_text("2")
    changed = session.git_state(tmp_path)
    assert clean is not None and changed is not None and len(clean["commit"]) == 40
    assert (clean["changed"], changed["changed"]) == (False, True) and clean["commit"] == changed["commit"]


def test_a_part_that_fails_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("no such row")

    with runs.open(tmp_path, {}, recipe="r") as run:
        for name in ("bad", "good"):
            with run.part(name, {"pairs": 1}).attempt() as part:
                part.stage("x.json", fails if name == "bad" else (lambda: 1))
    states = {part["name"]: (part["state"], part["reason"]) for part in run.parts()}
    assert states == {"bad": ("failed", "x.json: no such row"), "good": ("completed", "")} and not run.done
    assert "ValueError: no such row" in run.parts()[0]["error"]["traceback"]
    with pytest.raises(ic.PlanError, match="holds 'good' of other inputs: pairs was 1, is 2"):
        run.part("good", {"pairs": 2})
    with pytest.raises(ValueError, match="no such row"), run, run.part("bad").attempt(strict=True):
        fails()
    with run, run.part("bad").attempt():
        pass
    assert run.done and "error" not in run.parts()[0]


def test_rows_of_a_group_are_there_together(tmp_path: Path) -> None:
    with runs.open(tmp_path, {}, recipe="r") as run:
        with run.rows("a.jsonl", key="k") as rows:
            rows.add({"k": 1, "v": 0.1}, {"k": 1, "v": 0.2})
            rows.add({"k": 2, "v": float("inf")})
            rows.add({"k": 1, "v": 0.3})
            with pytest.raises(ic.PlanError, match="one value under 'k'"):
                rows.add({"k": 1}, {"k": 2})
        assert (tmp_path / "a.jsonl").read_text() == '{"k": 1, "v": 0.3}\n{"k": 2, "v": Infinity}\n'
        with pytest.raises(ic.PlanError, match=r"rows of other inputs: seed was None, is 1"):
            run.rows("a.jsonl", key="k", inputs={"seed": 1}).__enter__()
        journal = tmp_path / "record/rows/a.jsonl.journal"
        journal.write_bytes(journal.read_bytes().replace(b'"v": 0.2}]', b'"v": 0.', 1))
        with pytest.raises(ic.LoadError, match=r"a.jsonl.journal, line 2, is not what was written"):
            run.rows("a.jsonl", key="k").__enter__()
