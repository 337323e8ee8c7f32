"""Recipes that share their rows among workers: two of them leave the files of one, and both did rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import toy_model
from fv_relations import table, toy_pairs
from interp_plugins.function_vectors.relation.settings import RelationSettings
from interp_recipes.build_cache import BuildCacheConfig, build_cache
from interp_recipes.function_vectors import TasksConfig, function_vectors
from interp_recipes.fv_fixed_trials import FixedTrialsConfig, fv_fixed_trials
from interp_recipes.fv_golden import GoldenConfig, fv_golden
from interp_recipes.fv_parity import ParityConfig, fv_parity
from interp_recipes.fv_relation import fv_relation
from interp_recipes.fv_runtime import RuntimeConfig, fv_runtime
from interp_recipes.visual_phase1 import visual_phase1
from interp_recipes.visual_phase1.config import VisualPhase1Config
from interp_recipes.visual_probing import visual_probing
from interp_recipes.visual_probing.config import VisualProbingConfig

from interp_core import runs
from interp_core.runs.folder import PLANNING, Planned
from interp_core.runs.shards import ShardFolder
from interp_core.toys.text import relations

Run = Callable[[Path], Any]
"""A recipe, whose files go into a folder."""
pytestmark = pytest.mark.usefixtures("rough_figures")
QUICK: dict[str, Any] = {"n_shots": 4, "n_mean_trials": 8, "n_trials": 8, "n_top_heads": 4, "examples": 2}
SOON: dict[str, Any] = {"source": "toy_needles", "hops": 1, "count": 12, "max_new_tokens": 1, "keep_unfinished": True}
VISION: dict[str, Any] = {"model": "toy:vision", "profile": "smoke"}


def fixed(folder: Path) -> Path:
    """Fixed trials of the toy."""
    task = folder / "antonym.json"
    task.write_text(json.dumps([{"input": word, "output": said} for word, said in relations()["antonym"].items()]))
    return fv_fixed_trials(FixedTrialsConfig(dataset_json=task, out_path=folder / "trials", n_trials=8, n_shots=3))


def on_trials(recipe: Callable[[Any], Any], kind: type[Any], **more: Any) -> Callable[[Path], Run]:
    def made(folder: Path) -> Run:
        trials = fixed(folder)
        return lambda out: recipe(
            kind(fixed_trials_path=trials, model_name="toy:text", n_top_heads=4, save_path_root=out, **more)
        )

    return made


def on_relation(folder: Path) -> Run:
    path = table(folder / "relation.csv", {"Q1": toy_pairs("antonym"), "Q2": toy_pairs("french")})
    return lambda out: fv_relation(RelationSettings(relation_csv=path, out=out, n_trials=4, n_demos=5))


slow = pytest.mark.slow
CASES: dict[str, tuple[Callable[[Path], Run], list[str]]] = {
    "function_vectors": (
        lambda _: lambda out: function_vectors(TasksConfig(out=out, **QUICK)),
        ["baseline", "effects-", "shuffled-", "test", "valid", "zero-"],
    ),
    "build_cache": (lambda _: lambda out: build_cache(BuildCacheConfig(out=out, batch_size=3, **SOON)), ["answers"]),
    "fv_runtime": (on_trials(fv_runtime, RuntimeConfig), ["effects-"]),
    "fv_golden": (on_trials(fv_golden, GoldenConfig), ["effects-"]),
    "fv_parity": (on_trials(fv_parity, ParityConfig), ["effects-"]),
    "fv_relation": (on_relation, ["effects-"]),
    "visual_phase1": (
        lambda _: lambda out: visual_phase1(VisualPhase1Config(out=out, **VISION)), ["sanity", "rows_pilots"]
    ),
    "visual_probing": (
        lambda _: lambda out: visual_probing(VisualProbingConfig(out=out, **VISION)), ["states", "probes"]
    ),
}  # fmt: skip
"""Of each recipe, how it is called, and how the tables begin at which both workers are to be seen."""
FAST = ("function_vectors", "build_cache")


@pytest.mark.parametrize(
    ("recipe", "tables"),
    [pytest.param(*case, id=name, marks=() if name in FAST else slow) for name, case in CASES.items()],
)
def test_two_workers_leave_the_files_of_one(
    recipe: Callable[[Path], Run], tables: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_model()  # the workers fork from this process, and have it
    run, out = recipe(tmp_path), tmp_path / "out"
    run(out)
    one = files(out)
    clear(out)
    home = planned(run, out, shards=4)
    rows = worked(run, out, tables, tmp_path / "journals", monkeypatch)
    assert runs.status(home).state == "done"
    two = files(out)
    assert list(two) == list(one) and [name for name in one if one[name] != two[name]] == []
    assert set(rows) == set(tables) and all(len(by_worker) == 2 for by_worker in rows.values()), rows
    assert not list(home.rglob("*.journal")) and not list(home.rglob("*.lease"))


def clear(out: Path) -> None:
    for folder in (out, out.with_name(f"{out.name}.runs")):
        shutil.rmtree(folder, ignore_errors=True)


def files(home: Path) -> dict[str, bytes]:
    """What a run wrote, but for pages and what says when it was."""
    named = {str(path.relative_to(home)): path for path in sorted(home.rglob("*")) if path.is_file()}
    apart = ("record/", "manifest.json", "DONE", "geometry/result/result.json")
    timed = (".html", "_report.json", "qid_status.json", "parity_suite.log", "parity_suite_stages.csv")
    kept = [name for name in named if not name.startswith(apart) and not name.endswith(timed)]
    return {name: named[name].read_bytes() for name in kept}


def planned(run: Run, out: Path, shards: int) -> Path:
    """Plan a run, as `interp run --shards` does; returns its folder."""
    token = PLANNING.set({"shards": shards, "folder": os.getcwd(), "command": {}})
    try:
        with pytest.raises(Planned) as stopped:
            run(out)
    finally:
        PLANNING.reset(token)
    home: Path = stopped.value.home
    return home


def worked(
    run: Run, out: Path, tables: list[str], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Counter[str]]:
    """Let two processes carry out a run; rows of each table by worker, as their journals have them. Both take a shard of
    each of these tables before one is whole: so neither can have done all of it."""
    meet = {name: multiprocessing.Barrier(2) for name in tables}
    publish = ShardFolder.publish

    def published(self: ShardFolder, shard: Any, groups: Any) -> None:
        own = next((name for name in tables if self.path.name.startswith(name)), None)
        if own is not None:
            for journal in self.path.glob(f"{shard.number:05}.*.journal"):
                kept.mkdir(exist_ok=True)
                shutil.copy(journal, kept / f"{own}@{self.path.name}@{journal.name}")
            if own in meet:
                meet.pop(own).wait(60)
        publish(self, shard, groups)

    monkeypatch.setattr(ShardFolder, "publish", published)
    children = [forked(run, out, kept.with_name(f"failed-{number}")) for number in range(2)]
    for child in children:
        os.waitpid(child, 0)
    failed = [file.read_text() for file in kept.parent.glob("failed-*")]
    assert not failed, "\n".join(failed)
    rows: dict[str, Counter[str]] = {}
    for journal in kept.iterdir():
        own, _, name = journal.name.split("@")
        rows.setdefault(own, Counter())[name.partition(".")[2]] += journal.read_bytes().count(b"\n")
    return rows


def forked(run: Run, out: Path, failed: Path) -> int:
    """A worker; what goes wrong stands in a file."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # the process ends with it
        run(out)
    except BaseException:
        failed.write_text(traceback.format_exc())
    finally:
        os._exit(0)
