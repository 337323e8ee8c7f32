"""The mask sweep: the golden numbers through the recipe's own code, orders, guards, scopes, files, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import toy_model
from interp_plugins.pairs import read_pairs
from interp_plugins.router.points import Point, Points, Shape
from interp_recipes.mask_orders import guard, modes_of, orders, sizes_of, variants
from interp_recipes.mask_runs import edits_of, measured, positions_of
from interp_recipes.mask_scores import Answer
from interp_recipes.moe_mask_sweep import moe_mask_sweep
from interp_recipes.sandbox import has_no_network, run_program

import interp_core as ic
from interp_core import runs, testing

HERE = Path(__file__).parent / "data/moe"
GOLDEN = json.loads((HERE / "mask_sweep.json").read_text())
SHAPE = Shape("tiny", 4, (0, 1, 2, 3), 8, 2)
SIZES = [1, 2, 4, 6, 8, 12]


def banned(row: dict[str, Any]) -> dict[int, tuple[int, ...]]:
    return {int(layer): tuple(sorted(experts)) for layer, experts in row["banned"].items()}


def order_of(mode: str, name: str) -> list[tuple[int, int]]:
    """Cells in the order of a golden curve, as far as its growing sets tell."""
    cells: list[tuple[int, int]] = []
    for row in (r for r in GOLDEN if r["mode"] == mode and r["order"] == name):
        cells += [(layer, e) for layer, experts in banned(row).items() for e in experts if (layer, e) not in cells]
    return cells


def points_file(path: Path, cells: Sequence[tuple[int, int]]) -> Path:
    """Points whose order is that of the cells."""
    rows = [{"layer": layer, "router": e, "diff": 1.0 - i / 100} for i, (layer, e) in enumerate(cells)]
    path.write_text(json.dumps(rows))
    return path


def sweep(tmp_path: Path, cells: Sequence[tuple[int, int]] | None = None, **settings: Any) -> Path:
    points = points_file(tmp_path / "points.json", cells or order_of("replace", "a_minus_b"))
    out = tmp_path / "out"
    asked: dict[str, Any] = {"sizes": SIZES, "order": "descending", "layout": "packed", "resamples": 200} | settings
    page = moe_mask_sweep(str(HERE / "model"), points, HERE / "pairs.json", out, **asked)
    assert page == out / "mask_sweep_report.html" and page.is_file()
    return out


def table(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "tables/mask_sweep.json").read_text())["rows"]


def test_the_golden_sweep(tmp_path: Path) -> None:
    """All 37 rows, within what fp32 gives; the reverse of all cells is the golden reverse."""
    points = json.loads((HERE / "points.json").read_text())["all_a_minus_b"]
    cells = [(p["layer"], p["expert"]) for p in points]
    page = sweep(tmp_path, cells, order="descending,reversed", mode="replace_topk,keep_topk")
    rows = table(page)
    (tmp_path / "random").mkdir()
    for mode in ("replace", "keep"):
        (folder := tmp_path / "random" / mode).mkdir()
        rows += [r | {"order": "random"} for r in table(sweep(folder, order_of(mode, "random"), mode=mode)) if r["n"]]
    names = {"a_minus_b": "descending", "reversed": "reversed", "random": "random"}
    compared = 0
    for wanted in GOLDEN:
        mode, order = (wanted["mode"], names[wanted["order"]]) if wanted["n"] else ("none", "none")
        (row,) = [r for r in rows if (r["mode"], r["order"], r["n"]) == (mode, order, wanted["n"])]
        assert banned(row) == banned(wanted)
        assert row["nll_all_agentic"] == pytest.approx(wanted["nll_a"], abs=2e-5)
        assert row["nll_all_assisted"] == pytest.approx(wanted["nll_b"], abs=2e-5)
        compared += 1
    assert compared == 37
