"""The line that says how far long work is: from three seconds on, asked or not; work inside of work; what says it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from imports import modules

import interp_core as ic
from interp_core import progress

ROOT = Path(__file__).parent.parent


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "clock", made)
    return made


def lines(said: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]", said) if line.strip()]


def test_a_piece_within_work_is_named_as_it_begins(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the line of the work around it stands already."""
    with progress.Progress("outer", 2, shown=True) as outer:
        outer.add()
        assert "inner" not in capfd.readouterr().err
        with progress.Progress("inner", 0):
            assert "outer 1 of 2" in (err := capfd.readouterr().err) and "· inner" in err


def test_work_of_up_to_three_seconds_is_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ic.Progress("texts", 3) as told:
        for _ in range(3):
            clock.now += 0.9
            told.add()
    assert told.count == 3 and not capsys.readouterr().err


def test_longer_work_says_how_far_it_is_and_no_more_than_once_a_second(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ic.Progress("texts", 20) as told:
        for _ in range(20):
            clock.now += 0.5
            told.add()
    said = capsys.readouterr().err
    assert [line.split(",")[0] for line in lines(said)] == [f"texts {n} of 20" for n in (6, 8, 10, 12, 14, 16, 18, 20)]
    assert lines(said)[0] == "texts 6 of 20, 2 per second, 7 s left" and said.endswith("\n")


def test_slow_work_says_seconds_and_unknown_work_no_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ic.Progress("books") as told:
        clock.now += 8
        told.add(2)
    assert lines(capsys.readouterr().err) == ["books 2, 4.0 s each"]


def test_shown_from_the_beginning(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ic.Progress("texts", 4, shown=True) as told:
        for count in (1, 0, 1, 2):
            told.add(count)
    assert [line.split(",")[0] for line in lines(capsys.readouterr().err)] == ["texts 1 of 4", "texts 4 of 4"]


def test_work_inside_of_work_is_one_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ic.Progress("examples", 2) as told:
        for _ in range(2):
            with ic.Progress("passes", 4) as inner:
                for _ in range(4):
                    clock.now += 1
                    inner.add()
            told.add()
    said = capsys.readouterr().err
    counts = [re.sub(r",[^·]*(?= ·|$)", "", line) for line in lines(said)]
    assert counts == [
        "examples 0 of 2 · passes 3 of 4", "examples 0 of 2 · passes 4 of 4",
        *(f"examples 1 of 2 · passes {n} of 4" for n in (1, 2, 3, 4)), "examples 2 of 2",
    ]  # fmt: skip
    assert said.count("\n") == 1, "one line, over and over"
    written = [line for line in re.split(r"[\r\n]", said) if line]
    assert len(written[-1]) == len(written[-2]), "what a longer line left is wiped out"


def test_what_never_counts_is_not_silent(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One long pass: a timer says it; short work has no timer left behind."""
    before = threading.active_count()
    with ic.Progress("short", 0):
        pass
    assert threading.active_count() == before and not capfd.readouterr().err
    drawn = threading.Event()
    inner = progress.Progress._draw
    monkeypatch.setattr(progress.Progress, "_draw", lambda self: (inner(self), drawn.set())[0])
    monkeypatch.setattr(progress, "SILENT", 0.0)
    with ic.Progress("reading a file", 0):
        assert drawn.wait(60)
    assert lines(capfd.readouterr().err) == ["reading a file"]


def test_an_error_ends_the_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), ic.Progress("texts", 4) as told, ic.Progress("passes") as inner:
        clock.now += 5
        inner.add()
        raise KeyboardInterrupt
    assert capsys.readouterr().err.endswith("\n") and told.count == 0
    with ic.Progress("again", 1) as later:
        clock.now += 5
        later.add()
    assert lines(capsys.readouterr().err) == ["again 1 of 1, 5.0 s each, 0 s left"], "it stands inside of nothing"


def test_threads_have_lines_of_their_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with ic.Progress("thread", 1) as told:
            clock.now += 5
            told.add()

    with ic.Progress("main", 1):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert lines(capsys.readouterr().err) == ["thread 1 of 1, 5.0 s each, 0 s left"]


def test_nothing_else_writes_a_line_over_itself() -> None:
    """One piece of code says how far work is: no other file writes a carriage return."""
    packages = {"interp_core": ROOT / "interp_core", "interp_plugins": ROOT / "plugins/interp_plugins"}
    files = modules(packages | {"interp_recipes": ROOT / "recipes/interp_recipes"})
    assert len(files) > 100
    writing = [name for name, path in files.items() if re.search(r'["\']\\r[^\\n]', path.read_text())]
    assert writing == ["interp_core.progress"]


def bootstrap() -> object:
    return ic.stats.Bootstrap(resamples=200).mean([1.0, 2.0, 4.0])


def permutation() -> object:
    return ic.stats.permutation([1.0, 2.0, 4.0], [3.0, 5.0], resamples=99)


def sign_flip() -> object:
    return ic.stats.sign_flip([1.0, 2.0, -4.0], resamples=99)


def correlation() -> object:
    return ic.stats.correlation_test(range(20), [*range(10), *range(10)], resamples=99)


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (bootstrap, "bootstrap of mean 203 of 203"),
        (permutation, "permutations of mean difference 10 of 10"),
        (sign_flip, "sign flips 8 of 8"),
        (correlation, "permutations of spearman 99 of 99"),
    ],
)
def test_statistics_are_not_silent(
    work: Callable[[], object], what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENT", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    work()
    assert what in capfd.readouterr().err
