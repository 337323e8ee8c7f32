"""What dividing a run costs and brings: two workers against one, bookkeeping against work, a plan of 100,000 items.

    OMP_NUM_THREADS=1 python benchmarks/shards.py [examples that are made up; a sixth of them is kept]

Workers are processes as users start them (`interp run … --shards`), so their times hold imports and loading; the items
alone are told beside them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import interp_core as ic
from interp_core import runs
from interp_core.runs.mapping import sharing


def two_against_one(folder: Path, examples: int) -> None:
    """The attribution evaluation of independent examples, by one worker and by two."""
    cache = folder / "needles.jsonl"
    interp = [sys.executable, "-m", "interp_core.cli"]
    made = ["--source", "toy_needles", "--count", str(examples), "--name", "needles", "--out", str(folder / "cache")]
    subprocess.run([*interp, "run", "build_cache", *made], check=True, capture_output=True)
    (folder / "cache/needles.jsonl").rename(cache)
    seconds = {}
    for workers in (1, 2):
        tree = folder / f"out{workers}"
        run = [
            *interp, "run", "attribution_eval", "--datasets", "needles", "--data_root", str(folder), "--output_root",
            str(tree), "--model", "toy:text", "--num_examples", str(examples), "--mode",
            "faithfulness_gen,recovery_ruler", "--attr_funcs", "IG,attnlrp_per_token,ifr_multi_hop_both",
            "--shards", "16",
        ]  # fmt: skip
        subprocess.run([*run, "--workers", "0"], check=True, capture_output=True)
        began = time.perf_counter()
        subprocess.run([*interp, "resume", str(tree), "--workers", str(workers)], check=True, capture_output=True)
        seconds[workers] = time.perf_counter() - began
    ratio = seconds[1] / seconds[2]
    print(f"one worker    {seconds[1]:7.1f} s\ntwo workers   {seconds[2]:7.1f} s   {ratio:.2f} times as fast")


def bookkeeping(folder: Path) -> None:
    """Seconds beside the items' own, in a run of a minute's work: 600 items that take no time."""
    items, each = 600, 0.1
    plan(folder, 16)
    began = time.perf_counter()
    with runs.open(folder, {}, recipe="bookkeeping", say=lambda line: None) as run:
        run.map("rows.jsonl", lambda n: {"number": n, "text": "x" * 2000}, range(items), by=lambda n: n)
    spent = time.perf_counter() - began
    print(f"600 items in 16 shards: {spent:.2f} s of bookkeeping, {spent / (items * each):.2%} of a run of 60 s")


def plans(folder: Path) -> None:
    """Seconds to plan 100,000 items in 1,000 shards, and to tell how far such a run is."""
    count = 100_000
    plan(folder, 1000)

    def mapped() -> None:
        with runs.open(folder, {}, recipe="plans", say=lambda line: None) as run:
            run.map("rows.jsonl", lambda n: {"number": n}, range(count), by=lambda n: n)

    began = time.perf_counter()
    try:
        with sharing(frozenset()):
            mapped()
    except ic.PlanError:
        planned = time.perf_counter() - began
    mapped()
    began = time.perf_counter()
    assert runs.status(folder).tables[0].items_done == count
    print(f"100,000 items in 1,000 shards: planned in {planned:.2f} s, status in {time.perf_counter() - began:.2f} s")


def plan(folder: Path, shards: int) -> None:
    runs.write(folder / "record/command.json", json.dumps({"shards": shards, "folder": os.getcwd(), "command": {}}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        plans(Path(place) / "plans")
        bookkeeping(Path(place) / "bookkeeping")
        two_against_one(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 3000)
