"""Runs of several processes: every row exactly once, whoever is killed; what is done is told by files."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sharded
from interp_plugins.logit_lens import LogitLens, LogitLensResult

import interp_core as ic
from interp_core import runs
from interp_core import sites as S
from interp_core.files import host
from interp_core.runs import leases, mapping
from interp_core.runs.mapping import Left, sharing
from interp_core.runs.shards import ShardFolder, units_of

HERE = Path(__file__).parent
ITEMS = 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the run in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    sharded.study(folder, ITEMS, 1)
    return sharded.tables(folder)


def worker(home: Path, seconds: float = 0.003) -> subprocess.Popen[str]:
    words = [sys.executable, str(HERE / "sharded.py"), str(home), str(ITEMS), "4", str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status, and what it said of errors."""
    said = process.communicate()[1]
    return process.returncode, said


def rounds(count: int, seed: int, folder: Path, whole: dict[str, bytes]) -> tuple[int, int]:
    """Two workers at a time, one or both of them killed at a random moment; how many kills there were, and whole runs,
    each of which was looked at."""
    draw, home, kills, ended = random.Random(seed), folder / "run", 0, 0
    for number in range(count):
        workers = [worker(home), worker(home)]
        time.sleep(draw.uniform(0.1, 0.8))
        for each in workers[: draw.choice([1, 2, 2])]:
            if each.poll() is None:
                each.send_signal(signal.SIGKILL)
        ends = [end(each) for each in workers]
        assert all(code in (0, -signal.SIGKILL) for code, _ in ends), ends
        kills += sum(code != 0 for code, _ in ends)
        if number + 1 == count or all(code == 0 for code, _ in ends):
            assert end(worker(home, 0)) == (0, "")
            sharded.check(home, whole, ITEMS)
            shutil.rmtree(home)
            ended += 1
    return kills, ended


def test_workers_are_killed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    kills, ended = rounds(8, 0, tmp_path, whole)
    assert kills and ended


@pytest.mark.slow
def test_workers_are_killed_many_times(tmp_path: Path, whole: dict[str, bytes]) -> None:
    kills, ended = rounds(500, 1, tmp_path, whole)
    assert kills >= 250 and ended >= 50


def test_shares_then_collect(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Workers of shards that were named leave the others alone, and only all together give the tables."""
    for share in ({0}, {2, 3}):
        with sharing(frozenset(share)), pytest.raises(Left, match="left to others"):
            sharded.study(tmp_path, ITEMS, 4)
    assert runs.status(tmp_path).missing == 1
    with sharing(frozenset()), pytest.raises(ic.PlanError, match=r"shard 1 of 4 of sizes.jsonl are not done; interp"):
        sharded.study(tmp_path, ITEMS, 4)
    with sharing(frozenset({1})), pytest.raises(Left):  # the second table's others
        sharded.study(tmp_path, ITEMS, 4)
    assert not (tmp_path / "summary.csv").exists()
    sharded.study(tmp_path, ITEMS, 4)
    sharded.check(tmp_path, whole, ITEMS)


@pytest.mark.parametrize("shards", [1, 3, 40, 1000])
def test_rows_do_not_depend_on_shards(tmp_path: Path, whole: dict[str, bytes], shards: int) -> None:
    sharded.study(tmp_path, ITEMS, shards)
    sharded.check(tmp_path, whole, ITEMS)
    sharded.study(tmp_path, ITEMS, shards)  # again
    sharded.check(tmp_path, whole, ITEMS)


def test_no_items(tmp_path: Path) -> None:
    assert sharded.study(tmp_path, 0, 4) == []
    assert runs.status(tmp_path).state == "done"


def test_units() -> None:
    assert units_of("aabbbb", 3, lambda kind: kind) == [range(2), range(2, 5), range(5, 6)]
    assert units_of("abc", None, None) == [range(1), range(1, 2), range(2, 3)]


# Items that fail


def squares(
    folder: Path, bad: Sequence[int] = (), shards: int | None = None, error: Exception | None = None, **more: Any
) -> list[dict[str, Any]]:
    if shards is not None:
        sharded.plan(folder, shards)

    def square(number: int) -> dict[str, int]:
        if number in bad:
            raise error or ValueError(f"{number} is bad\nand more")
        return {"square": number**2}

    with runs.open(folder, {}, recipe="squares", say=lambda line: None) as run:
        return run.map("squares.jsonl", square, range(10), by=lambda number: number, **more)


@pytest.mark.parametrize("shards", [None, 3])
def test_an_item_that_fails_is_noted_and_the_rest_goes_on(
    tmp_path: Path, shards: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ic.ItemError, match=r"2 of 10 items of squares.jsonl raised errors: 3 \(ValueError: 3 is bad\)"):
        squares(tmp_path, [3, 7], shards)
    assert "3 failed: ValueError: 3 is bad" in capsys.readouterr().err
    now = runs.status(tmp_path)
    assert now.state == "failed" and now.failed == 2 and now.tables[0].items_done == 8
    noted = [json.loads(path.read_text()) for path in tmp_path.rglob("*.failed.json")]
    assert any("in square" in entry["traceback"] for notes in noted for entry in notes.values())
    assert not (tmp_path / "squares.jsonl").exists()
    with pytest.raises(ic.ItemError, match="1 of 10"):
        squares(tmp_path, [7], shards)
    assert len(squares(tmp_path, [], shards)) == 10 and not list(tmp_path.rglob("*.failed.json"))


def test_a_part_that_fails_before_any_stage_is_noted(tmp_path: Path) -> None:
    """Whoever comes first leads, and writes the state of parts: no error is lost because nobody leads yet."""
    sharded.plan(tmp_path, 2)
    with runs.open(tmp_path, {}, recipe="parts", say=lambda line: None) as run, run.part("one").attempt():
        raise ValueError("it does not work")
    (part,) = runs.parts(tmp_path)
    assert part["state"] == "failed" and "it does not work" in part["reason"]


def test_strict_ends_at_the_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 is bad"):
        squares(tmp_path, [3, 7], strict=True)
    assert runs.status(tmp_path).tables[0].items_done == 3


def test_a_full_disk_is_no_items_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="No space"):
        squares(tmp_path, [3], error=OSError(errno.ENOSPC, "No space left"))
    real, count = os.write, 0

    def write(file: int, data: bytes) -> int:
        nonlocal count
        count += 1
        return real(file, data[: len(data) // 2]) if count == 3 else real(file, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="could be written"):
        squares(tmp_path)
    monkeypatch.undo()
    assert [row["square"] for row in squares(tmp_path)] == [number**2 for number in range(10)]


def test_a_folder_that_is_read_only_by_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's error, not that of an item; nothing changes, and it goes on once the folder can be written."""
    with sharing(frozenset({1})), pytest.raises(Left):
        sharded.study(tmp_path, ITEMS, 4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refused(path: Path, *_: Any) -> Path:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("interp_core.files._drafted", refused)
    with pytest.raises(OSError, match="Read-only"):
        sharded.study(tmp_path, ITEMS, 4)
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(sharded.study(tmp_path, ITEMS, 4)) == ITEMS


def test_wrong_items(tmp_path: Path) -> None:
    with (
        runs.open(tmp_path, {}, recipe="squares", say=lambda line: None) as run,
        pytest.raises(ic.PlanError, match="two items are called 1"),
    ):
        run.map("a.jsonl", lambda item: {}, [1, 2, 1], by=lambda item: item)
    with (
        runs.open(tmp_path, {}, recipe="squares", say=lambda line: None) as run,
        pytest.raises(ic.PlanError, match=r"rows are written as .jsonl or .csv, not as a.txt"),
    ):
        run.map("a.txt", lambda item: {}, [1], by=lambda item: item)


# Damage, and other plans


def test_a_damaged_shard_is_made_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    sharded.study(tmp_path, ITEMS, 4)
    shard = tmp_path / f"record/rows/{sharded.SIZES}.shards/00002.jsonl"
    for damage in (shard.read_bytes()[:-40], b"", shard.read_bytes().replace(b'"tenth": 2.', b'"tenth": 3.')):
        assert damage != shard.read_bytes()
        shard.write_bytes(damage)
        sharded.study(tmp_path, ITEMS, 4)
        sharded.check(tmp_path, whole, ITEMS)
    (tmp_path / "own/5.txt").unlink()
    (tmp_path / "own/6.txt").write_text("?")
    sharded.study(tmp_path, ITEMS, 4)
    sharded.check(tmp_path, whole, ITEMS)


def test_other_items_are_another_plan(tmp_path: Path) -> None:
    def mapped(items: Sequence[int], **inputs: Any) -> None:
        with runs.open(tmp_path, {}, recipe="squares", say=lambda line: None) as run:
            run.map("a.jsonl", lambda item: {"item": item}, items, by=lambda item: item, inputs=inputs)

    mapped([1, 2])
    with pytest.raises(ic.PlanError, match="rows of another plan: items was 2, is 3; other keys; delete that folder"):
        mapped([1, 2, 3])
    with pytest.raises(ic.PlanError, match="rows of another plan: inputs was {}, is {'data': 'x'}"):
        mapped([1, 2], data="x")


def test_batches_of_another_size_go_on(tmp_path: Path) -> None:
    sizes: list[int] = []

    def made(numbers: list[int]) -> list[dict[str, int]]:
        sizes.append(len(numbers))
        if len(sizes) == stop:
            raise KeyboardInterrupt
        return [{"square": number**2} for number in numbers]

    def mapped(batch: int) -> list[dict[str, int]]:
        with runs.open(tmp_path, {}, recipe="squares", say=lambda line: None) as run:
            return run.map("a.jsonl", made, range(10), by=lambda number: number, batch=batch)

    stop = 3
    with pytest.raises(KeyboardInterrupt):
        mapped(2)
    sizes.clear()
    stop = 0
    assert [row["square"] for row in mapped(4)] == [number**2 for number in range(10)]
    assert sizes == [4, 2]  # of 4 to 7 and 8, 9


# Leases


def test_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.lease"
    one, other = leases.Leases("one", seconds=0.3), leases.Leases("other", seconds=0.3)
    assert one.take(path) and one.take(path) and not other.take(path)
    time.sleep(0.5)
    assert not other.take(path)  # alive: its file's time changes
    one.give_back(path)
    assert other.take(path)
    one.give_back(path)  # not its own any more
    assert leases.holder(path) and not one.take(path)
    other.close()
    assert not path.exists()


def test_a_lease_of_a_process_that_is_gone(tmp_path: Path) -> None:
    path, mine = tmp_path / "a.lease", leases.Leases("mine", seconds=0.3)
    gone = subprocess.Popen(["true"])
    gone.wait()
    path.write_text(json.dumps({"session": "x", "host": host(), "pid": gone.pid}))
    assert mine.take(path)
    mine.give_back(path)
    for skew in (-1e6, 1e6):  # another machine, whose clock is wrong: nobody looks at it
        path.write_text(json.dumps({"session": "x", "host": "elsewhere", "pid": 1}))
        os.utime(path, (time.time() + skew,) * 2)
        assert not mine.take(path)
        time.sleep(0.2)
        os.utime(path, (time.time() + skew,) * 2)  # a sign of life
        assert not mine.take(path)
        time.sleep(0.2)
        assert not mine.take(path)
        time.sleep(0.2)
        assert mine.take(path)
        mine.give_back(path)
    path.write_text("{")
    assert not mine.take(path)
    time.sleep(0.4)
    assert mine.take(path)


def test_two_with_the_same_shard_do_no_harm(tmp_path: Path, whole: dict[str, bytes], monkeypatch: Any) -> None:
    """A lease is for speed alone: without any, two processes do everything twice, and every row is there once."""
    monkeypatch.setattr(leases.Leases, "take", lambda self, path: True)
    threads = [threading.Thread(target=sharded.study, args=(tmp_path, ITEMS, 4, 0.002)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    sharded.study(tmp_path, ITEMS, 4)
    sharded.check(tmp_path, whole, ITEMS)


# Being asked to stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_ends_it_after_the_item(tmp_path: Path, whole: dict[str, bytes], name: str) -> None:
    process = worker(tmp_path, 0.3)
    place = ShardFolder(tmp_path / f"record/rows/{sharded.SIZES}.shards")
    while not list(place.path.glob("*.journal")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    assert end(process)[0] == 75
    now = runs.status(tmp_path)
    assert now.state == "unfinished" and now.tables[0].items_done >= 2 and not now.tables[0].at_work
    assert len(list((tmp_path / "own").iterdir())) == now.tables[0].items_done  # no item was left half done
    assert end(worker(tmp_path, 0)) == (0, "")
    sharded.check(tmp_path, whole, ITEMS)


# Status


def test_status(tmp_path: Path) -> None:
    with pytest.raises(ic.LoadError, match="holds no run"):
        runs.status(tmp_path)
    with sharing(frozenset({1})), pytest.raises(Left):
        sharded.study(tmp_path / "a", ITEMS, 4)
    now = runs.status(tmp_path / "a")
    (table,) = now.tables
    assert (table.name, table.shards, table.done, table.items, table.items_done) == (sharded.SIZES, 4, 1, ITEMS, 10)
    assert now.state == "unfinished" and now.missing == 3 and not now.workers
    with pytest.raises(ic.LoadError, match=r"holds no run.*'a'"):
        runs.status(tmp_path / "b")
    with runs.publish(tmp_path / "tree", {"x": 1}, recipe="squares", say=lambda line: None) as run:
        run.json("a.json", 1)
    assert runs.status(tmp_path / "tree").state == "done"
    with runs.publish(tmp_path / "tree", {"x": 2}, recipe="squares", say=lambda line: None) as run:
        run.json("b.json", 1)
    with pytest.raises(ic.LoadError, match="several runs write into"):
        runs.status(tmp_path / "tree")


def test_a_session_elsewhere_that_is_silent_is_gone(tmp_path: Path) -> None:
    with runs.open(tmp_path, {}, recipe="squares", say=lambda line: None) as run:
        run.json("a.json", 1)
        file = run.session.file
        assert runs.status(tmp_path).workers == (run.session.id,)
        noted = json.loads(file.read_text()) | {"host": "elsewhere"}
        file.write_text(json.dumps(noted))
        assert runs.status(tmp_path).state == "running"
        os.utime(file, (time.time() - 700,) * 2)
        assert runs.status(tmp_path).state == "unfinished"


def test_a_session_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases.Leases.__init__, "__defaults__", (0.3, None))
    with runs.open(tmp_path, {}, recipe="squares", say=lambda line: None) as run:
        before = run.session.file.stat().st_mtime_ns
        time.sleep(0.2)
        assert run.session.file.stat().st_mtime_ns > before


# Methods and sweeps


def in_shares(folder: Path, count: int, work: Any) -> Any:
    """What `work` gives when processes take a shard each, one after another."""
    sharded.plan(folder, count)
    for share in range(count):
        with sharing(frozenset({share})):
            try:
                work()
            except Left:
                continue
    with sharing(frozenset()):
        return work()


def test_rows_of_a_shared_stage(tmp_path: Path) -> None:
    """They stand in the record alone; those of other inputs are others; the stage is made of them once all are there."""
    counted: list[int] = []

    def work(factor: int = 1) -> int:
        def square(number: int) -> dict[str, int]:
            counted.append(number)
            return {"square": factor * number**2}

        def total() -> int:
            of = {"factor": factor}
            rows = run.map("squares", square, range(6), by=lambda n: n, inputs=of, file=False)
            return sum(row["square"] for row in rows)

        with runs.open(tmp_path, {}, recipe="total", say=lambda line: None) as run:
            return run.stage("total.json", total, inputs={"factor": factor}, shared=True)

    assert in_shares(tmp_path, 3, work) == 55 and counted == list(range(6))
    assert set(sharded.tables(tmp_path)) == {"total.json"}
    assert work() == 55 and counted == list(range(6))
    (tmp_path / "total.json").unlink()
    assert work() == 55 and counted == list(range(6))
    assert work(2) == 110 and counted == [*range(6), *range(6)]
    assert len(runs.status(tmp_path).tables) == 2


def test_a_method_in_shards(tmp_path: Path) -> None:
    model = ic.load("toy:text")
    texts = ["Q: big\nA:", "Q: hot\nA:", "Q: up\nA:", "Q: big\nA: small\nQ: hot\nA:", "Q: up\nA: down\nQ: hot\nA:"]

    def work() -> LogitLensResult:
        with runs.open(tmp_path, {}, recipe="lens", model=model, say=lambda line: None) as run:
            return LogitLens()(model, texts, batch_size=2, out=run, at=-1)

    shared, plain = in_shares(tmp_path, 2, work), LogitLens()(model, texts, batch_size=2, at=-1)
    for (file, data), (name, expected) in zip(shared.files().items(), plain.files().items(), strict=True):
        assert file == name and (data == expected or file.endswith(".json"))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_sweep_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    monkeypatch.setattr("interp_core.sweep.shared.CHUNK", 7)
    model = ic.load("toy:text")
    variants = {place: S.z[place].zero() for place in model.heads}
    scores = [ic.score.logprob(" small"), ic.score.logit(" small")]

    def work() -> tuple[ic.Sweep, ...]:
        with runs.open(tmp_path, {}, recipe="knock_out", model=model, say=lambda line: None) as run:
            return model.sweep(["Q: big\nA:", "Q: hot\nA:"], variants, scores, out=run)

    for shared, plain in zip(
        in_shares(tmp_path, shards, work), model.sweep(["Q: big\nA:", "Q: hot\nA:"], variants, scores), strict=True
    ):
        assert shared.keys == plain.keys and shared.score == plain.score
        torch_close(shared.values, plain.values)
        torch_close(shared.clean, plain.clean)
        torch_close(shared.moved, plain.moved)


def torch_close(one: Any, other: Any) -> None:
    """Equal but for rounding: other variants stand in the same pass."""
    assert one.shape == other.shape and float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def test_waiting_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "POLL", 0.01)
    said: list[str] = []
    sharded.plan(tmp_path, 2)
    place = ShardFolder(tmp_path / "record/rows/a.jsonl.shards")
    held = leases.Leases("other")

    def free() -> None:
        time.sleep(0.1)
        held.close()

    with runs.open(tmp_path, {}, recipe="squares", say=said.append) as run:
        held.take(place.lease(1))
        thread = threading.Thread(target=free)
        thread.start()
        rows = run.map("a.jsonl", lambda item: {"item": item}, range(4), by=lambda item: item)
        thread.join()
    assert len(rows) == 4 and "  waits for shard 1 of a.jsonl, at which others work" in said
