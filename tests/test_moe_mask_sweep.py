"""The mask sweep: the golden numbers through the recipe's own code, orders, guards, scopes, files, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import answered
import numpy as np
import pytest
import torch
from interp_plugins.pairs import read_pairs
from interp_plugins.router.points import Point, Points, Shape
from interp_recipes.moe_mask_sweep import MoeMaskSweepConfig, moe_mask_sweep
from interp_recipes.moe_mask_sweep.measures import edits_of, measured, positions_of
from interp_recipes.moe_mask_sweep.orders import guard, modes_of, orders, sizes_of, variants
from interp_recipes.moe_mask_sweep.sandbox import has_no_network, run_program
from interp_recipes.moe_mask_sweep.scores import Answer

import interp_core as ic
from interp_core import runs
from interp_core.settings import configured

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


def config_of(points: Path, out: Path, **settings: Any) -> MoeMaskSweepConfig:
    """Checked as the command line checks it."""
    fixed = {
        "model_path": str(HERE / "model"),
        "points": points,
        "pair_tokens_json": HERE / "pairs.json",
        "out_dir": out,
    }
    return configured("moe_mask_sweep", MoeMaskSweepConfig, fixed | settings)


def sweep(tmp_path: Path, cells: Sequence[tuple[int, int]] | None = None, **settings: Any) -> Path:
    points = points_file(tmp_path / "points.json", cells or order_of("replace", "a_minus_b"))
    out = tmp_path / "out"
    settings = {"sizes": SIZES, "order": "descending", "layout": "packed", "resamples": 200} | settings
    page = moe_mask_sweep(config_of(points, out, **settings))
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
    assert order_of("replace", "random") == order_of("keep", "random")
    (tmp_path / "random").mkdir()
    drawn = table(sweep(tmp_path / "random", order_of("keep", "random"), mode="replace,keep"))
    rows += [row | {"order": "random"} for row in drawn if row["n"]]
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


def test_random_orders_ban_as_many_per_layer() -> None:
    cells = [(3, 1), (0, 2), (3, 4), (2, 2), (0, 5), (3, 0), (1, 1)]
    points = Points(tuple(Point(layer, e, 1 - i / 10) for i, (layer, e) in enumerate(cells)), shape=SHAPE)
    usage = np.random.default_rng(0).random((4, 8))
    listed = orders(points, SHAPE, ["descending", "reversed", "random", "usage_random"], 5, 0, usage)
    assert [order.kind for order in listed] == ["descending", "reversed"] + ["random"] * 5 + ["usage_random"] * 5
    assert list(listed[0].cells) == cells and list(listed[1].cells) == cells[::-1]
    for order in listed[2:]:
        for n in range(1, len(cells) + 1):
            assert [cell[0] for cell in order.cells[:n]] == [cell[0] for cell in cells[:n]]
            assert len(set(order.cells[:n])) == n
    assert len({order.cells for order in listed}) == len(listed)
    ranks = (-usage).argsort(-1).argsort(-1)
    for order in listed[7:]:
        blocks = [(ranks[a] // 4, ranks[b] // 4) for a, b in zip(cells, order.cells, strict=True)]
        assert all(was == now for was, now in blocks)
    assert orders(points, SHAPE, ["random"], 5, 0)[2].cells == listed[4].cells  # by seed, whatever else is asked for
    assert orders(points, SHAPE, ["random"], 5, 1)[2].cells != listed[4].cells


def test_the_guard_leaves_out_masks_that_leave_too_few(tmp_path: Path) -> None:
    assert guard({2: (0, 1, 2, 3, 4, 5)}, "replace", SHAPE) == ""
    assert guard({2: (0, 1, 2, 3, 4, 5, 6)}, "replace", SHAPE) == (
        "layer 2 would have 1 of 8 experts left, a token takes 2"
    )
    assert guard({2: tuple(range(8))}, "keep", SHAPE) == ""
    cells = [(2, e) for e in range(8)] + [(1, 0)]
    out = sweep(tmp_path, cells, sizes="6,7,8", mode="replace,drop", max_samples=1)
    rows = {(row["mode"], row["n"]): row for row in table(out)}
    assert "1 of 8 experts left" in rows["replace", 7]["skipped"] and rows["replace", 7]["nll_all_agentic"] is None
    assert not rows["replace", 6]["skipped"] and rows["replace", 6]["nll_all_agentic"] is not None
    assert not rows["drop", 8]["skipped"] and rows["drop", 8]["tokens_unmasked_agentic"] > 0
    assert rows["drop", 8]["slots_changed_agentic"] == 0  # a token whose whole set is banned keeps it
    assert rows["drop", 6]["slots_changed_agentic"] > 0
    page = (out / "mask_sweep_report.html").read_text()
    assert "left out by the guard" in page and "2 of 3 masks (replace) were left out" in page


@pytest.mark.parametrize(("scope", "segment"), [("predicting", None), ("targets", None), ("segment", [2, 5])])
def test_narrow_scopes_are_what_forward_passes_give(scope: Any, segment: list[int] | None) -> None:
    """Through the sweep, held against a pass with the mask at these positions, in each mode."""
    model = ic.load(str(HERE / "model"), check=False)
    pair = read_pairs(HERE / "pairs.json", layout="packed", max_samples=1)[0]
    points = Points(tuple(Point(layer, e, 0.0) for layer, e in order_of("replace", "a_minus_b")))
    masks = variants(orders(points, SHAPE, ["descending"], 0, 0), modes_of(["replace", "keep", "drop"]), [2, 8], SHAPE)
    at = positions_of(pair, "agentic", scope, segment)
    assert at == {"predicting": [p - 1 for p in pair.agentic_positions], "targets": list(pair.agentic_positions)}.get(
        scope, [2, 3, 4]
    )
    rows = list(measured(model, pair, "agentic", masks, at, check=False))
    assert len(rows) == 6
    for mask, row in zip(masks, rows, strict=True):
        logits = model.run(pair.agentic, edits=edits_of(mask, at), allow_noop=True).logits.plain[0]
        nll = -logits.log_softmax(-1)[[p - 1 for p in pair.agentic_positions], pair.target_ids()]
        assert row["nll_all"] == pytest.approx(float(nll.mean()), abs=2e-5)
        assert row["nll_last"] == pytest.approx(float(nll[-1]), abs=2e-5)
        assert row["slots"] is None
    (proved, *_) = measured(model, pair, "agentic", masks, at, check=True)
    assert proved["slots"] == len(at) * 2 * len(masks[0].banned) and proved["slots_changed"] > 0


def test_a_second_run_measures_nothing_and_a_stopped_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import interp_recipes.moe_mask_sweep as recipe

    calls: list[int] = []

    def counted(model: Any, pair: Any, side: Any, masks: Any, at: Any, check: bool) -> Any:
        for row in measured(model, pair, side, masks, at, check):
            calls.append(len(calls))
            yield row
            if stop_at is not None and len(calls) >= stop_at:
                raise KeyboardInterrupt

    settings: dict[str, Any] = {"sizes": [2], "order": "descending,random", "max_samples": 1}
    whole = sweep(tmp_path, **settings)
    monkeypatch.setattr(recipe, "measured", counted)
    stop_at: int | None = None
    sweep(tmp_path, **settings)
    assert not calls and runs.manifest(whole)["state"] == "done"
    rows = (whole / "tables/mask_sweep_samples.jsonl").read_text().splitlines()
    assert len(rows) == 2 * (1 + 1 + 5)
    (other := tmp_path / "other").mkdir()
    stop_at = 9
    with pytest.raises(KeyboardInterrupt):
        sweep(other, **settings)
    assert runs.manifest(other / "out")["state"] == "stopped"
    stop_at = None
    out = sweep(other, **settings)
    assert len(calls) - len(rows) == 9 - 7  # of the context in which it was stopped, and no other, masks ran twice
    assert (out / "tables/mask_sweep_samples.jsonl").read_text().splitlines() == rows
    assert (out / "tables/mask_sweep.csv").read_text() == (whole / "tables/mask_sweep.csv").read_text()
    with pytest.raises(ic.PlanError, match="holds another run: scope was"):
        sweep(other, **settings, scope="targets")


def moe_pairs(path: Path, domain: str, count: int, other: str = "brackets") -> Path:
    """A fact after lines of its own domain, and after lines of another; targets are its answer."""
    import random

    from interp_core.toys import domains

    tokenizer = toy_moe().tokenizer
    rows = {}
    for i in range(count):
        rng = random.Random(f"{domain} {i}")
        fact = domains.document(rng, domain, 1)
        row: dict[str, Any] = {}
        for name, at in (("agentic", domain), ("assisted", other)):
            before = domains.document(rng, at, 3).text
            encoded = tokenizer(before + fact.text, return_offsets_mapping=True)
            answers = {(a + len(before), b + len(before)) for a, b in fact.answers}
            offsets = list(map(tuple, encoded["offset_mapping"]))
            positions = [j for j, chars in enumerate(offsets) if chars in answers]
            key = "canonical_non_ws_positions" if name == "agentic" else "assisted_canonical_non_ws_positions"
            row |= {f"{name}_ids": encoded["input_ids"], key: positions}
        rows[f"{domain}_{i}"] = row
    path.write_text(json.dumps(rows))
    return path


def toy_moe() -> ic.Model:
    from test_moe_toy import toy

    return toy()


def domain_points(path: Path, domain: str) -> Path:
    """Cells by how much more a domain uses them than the others do."""
    from test_moe_toy import documents

    from interp_core.toys import evaluate_moe

    used = {name: evaluate_moe.usage(toy_moe(), docs) for name, docs in documents().items()}
    beyond = used[domain] - torch.stack([u for name, u in used.items() if name != domain]).mean(0)
    cells = [(layer, e, float(beyond[layer, e])) for layer in range(3) for e in range(16)]
    path.write_text(json.dumps([{"layer": layer, "router": e, "diff": d} for layer, e, d in cells if d > 0]))
    return path


def half(answer: Answer) -> float:
    assert answer.side in ("agentic", "assisted") and answer.sample.startswith("chemistry_")
    return 0.5


def test_on_the_toy_a_domains_cells_cost_more_than_chance(tmp_path: Path) -> None:
    """The page says so, with an interval; and what the model then writes is wrong."""
    points = domain_points(tmp_path / "points.json", "arithmetic")
    pairs = moe_pairs(tmp_path / "pairs.json", "arithmetic", 3, "geography")
    settings = {"sizes": "5", "order": "descending,random", "scorer": "exact_match", "resamples": 200}
    page = moe_mask_sweep(config_of(points, tmp_path / "out", model_path="toy:moe", pair_tokens_json=pairs, **settings))
    data = json.loads((tmp_path / "out/tables/mask_sweep.json").read_text())
    rows = {(row["order"], row["draw"], row["n"]): row for row in data["rows"]}
    clean, masked = rows["none", 0, 0], rows["descending", 0, 5]
    assert clean["nll_all_agentic"] < 0.1 and clean["score_agentic"] == 1 and clean["exact_agentic"] == 1
    assert masked["nll_all_agentic"] > 1 and masked["score_agentic"] < 0.5
    drawn = [rows["random", draw, 5] for draw in range(5)]
    assert len({json.dumps(row["banned"]) for row in drawn}) == 5
    assert np.mean([row["nll_all_agentic"] for row in drawn]) < masked["nll_all_agentic"] / 3
    (area,) = [a for a in data["areas"] if a["context"] == "agentic" and a["metric"] == "nll_all"]
    assert area["low"] > 0 and area["excludes_0"]
    said = "agentic, replace: over all N, descending costs more than random, matched per layer"
    assert any(sentence.startswith(said) for sentence in data["summary"]) and said in page.read_text()
    finding = "In the agentic context, banning the listed experts (descending, replace) costs more than banning as many"
    assert answered.finding_of(page).startswith(finding)
    with (tmp_path / "out/tables/mask_sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) == 7 and float(table[1]["nll_all_agentic"]) == masked["nll_all_agentic"]
    figures = sorted(p.name for p in (tmp_path / "out/figures/mask_sweep").iterdir())
    curves = [f"{m}_{s}_replace.png" for m in ("nll_all", "nll_last", "score") for s in ("agentic", "assisted")]
    assert figures == sorted([*curves, "points.png"])
    best = max(json.loads(points.read_text()), key=lambda row: row["diff"])
    assert f"layer {best['layer']}, expert {best['router']}: {best['diff']:.4g}, rank 1" in page.read_text()


def test_own_scorers_and_super_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = domain_points(tmp_path / "points.json", "chemistry")
    best = json.loads(points.read_text())
    best.sort(key=lambda row: -row["diff"])
    supers = tmp_path / "super.json"
    supers.write_text(json.dumps([[best[0]["layer"], best[0]["router"]], [0, 99]]))
    pairs = moe_pairs(tmp_path / "pairs.json", "chemistry", 1)
    settings = {"sizes": [2], "order": "descending", "scorer": "test_moe_mask_sweep:half", "super_experts": supers}
    moe_mask_sweep(config_of(points, tmp_path / "out", model_path="toy:moe", pair_tokens_json=pairs, **settings))
    assert f"super experts [[{best[0]['layer']}, {best[0]['router']}]]" in capsys.readouterr().out
    data = json.loads((tmp_path / "out/tables/mask_sweep.json").read_text())
    assert {row["score_agentic"] for row in data["rows"]} == {0.5}
    assert any("Among the points are super experts" in sentence for sentence in data["summary"])


CODE = "def add(a, b):\n"


def test_programs_run_within_limits(tmp_path: Path) -> None:
    assert run_program("print(1)").passed
    assert run_program("assert 1 == 2, 'no'") == (False, "AssertionError: no")
    assert run_program("while True: pass", seconds=0.5) == (False, "took more than 0.5 s")
    assert "MemoryError" in run_program("x = bytearray(1 << 31)", megabytes=256).why
    mark = tmp_path / "here.txt"
    program = (
        "import os\nassert os.getcwd() == os.environ['HOME'] and 'PYTHONPATH' not in os.environ\nopen('a','w').close()"
    )
    assert run_program(program).passed and not mark.exists()
    if has_no_network():
        assert not run_program("import socket\nsocket.create_connection(('127.0.0.1', 1), 1)").passed


def test_code_is_run_only_with_leave(tmp_path: Path) -> None:
    from interp_recipes.moe_mask_sweep.scores import scorer_of

    problems = tmp_path / "problems.jsonl"
    test = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    problems.write_text(json.dumps({"task_id": "T/0", "prompt": CODE, "test": test, "entry_point": "add"}))
    with pytest.raises(
        ic.PlanError, match="runs programs that the model writes, on this machine, and is off by default"
    ):
        scorer_of("code", problems, False, 5, 512)
    said: list[str] = []
    scorer = scorer_of("code", problems, True, 5, 512, said.append)
    assert "runs code that the model writes" in said[0] and "512 MB" in said[0]
    scores = [
        scorer(Answer("t_0", "agentic", text, "", {})) for text in ("    return a + b\n", "    return a\n", "```")
    ]
    assert scores == [1.0, 0.0, 0.0]
    with pytest.raises(ic.PlanError, match="is none of the 1 problems"):
        scorer(Answer("t_9", "agentic", "", "", {}))


def no_run(*_args: Any, **_kwargs: Any) -> None:
    raise AssertionError("the model ran")


BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"cells": []}, ic.PlanError, "holds no points"),
    ({"cells": [(7, 0)]}, ic.PlanError, "layer 7 of model has no experts"),
    ({"cells": [(1, 8)]}, ic.PlanError, "expert 8 in layer 1; model has 8 experts"),
    ({"sizes": "3,40"}, ic.PlanError, "size 40: the points file holds 12 points"),
    ({"sizes": [0]}, ic.PlanError, "sizes are whole numbers from 1"),
    ({"sizes": "few"}, ic.PlanError, "sizes are whole numbers from 1"),
    ({"mode": "replaced"}, ic.PlanError, "no mode 'replaced'. .*replace"),
    ({"order": "descend"}, ic.PlanError, "no order 'descend'. .*descending"),
    ({"order": "random", "random_orders": 3}, ic.PlanError, "random_orders is 3: give 5 at least"),
    ({"seed": -1}, ic.PlanError, "seed is -1: give 0 at least"),
    ({"max_new_tokens": 0}, ic.PlanError, "max_new_tokens is 0: give 1 at least"),
    ({"code_seconds": float("nan")}, ic.PlanError, "code_seconds is nan: give more than 0"),
    ({"scope": "target"}, ic.PlanError, "setting scope: .*'targets'.*got 'target'"),
    ({"scope": "segment"}, ic.PlanError, "scope segment takes --segment START STOP"),
    ({"scope": "segment", "segment": [900, 901]}, ic.PlanError, "segment 900 to 901 is none of its"),
    ({"scorer": "exact_match"}, ic.TextError, "a scorer reads text"),
    ({"scorer": "exact_match", "scope": "targets"}, ic.PlanError, "a scorer reads what the model writes"),
    ({"scorer": "nowhere:nothing"}, ic.PlanError, "No module named 'nowhere'"),
    ({"scorer": "code"}, ic.PlanError, "needs --problems"),
    (
        {"cells": [(2, e) for e in range(8)], "sizes": [8]},
        ic.PlanError,
        "no mask can be run: layer 2 would have 0 of 8",
    ),
]


@pytest.mark.parametrize(("settings", "error", "says"), BAD, ids=[says[:24] for _, _, says in BAD])
def test_what_cannot_be_done_is_said_before_the_model_runs(
    settings: dict[str, Any], error: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interp_recipes.moe_mask_sweep.measured", no_run)
    monkeypatch.setattr("interp_recipes.moe_mask_sweep.routed_targets", no_run)
    cells = settings.get("cells")
    rest = {name: value for name, value in settings.items() if name != "cells"}
    points = points_file(tmp_path / "points.json", order_of("replace", "a_minus_b") if cells is None else cells)
    with pytest.raises(error, match=says):
        moe_mask_sweep(config_of(points, tmp_path / "out", **{"sizes": [2]} | rest))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_samples_that_the_model_cannot_read_are_listed(layout: str, tmp_path: Path) -> None:
    """They end neither the run nor a stopped run that goes on; a strict one names them before the model runs."""
    data = json.loads((HERE / "pairs.json").read_text())
    data["pairs"] = data["pairs"][:2]
    data["pairs"][0]["a_ids"][0] = 600
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps(data))
    points = points_file(tmp_path / "points.json", [(0, 1), (1, 2)])
    settings: dict[str, Any] = {"pair_tokens_json": pairs, "sizes": [1], "order": "descending", "layout": layout}
    says = "sample 'pair_0', agentic: token id 600 does not exist"
    with pytest.raises(ic.TextError, match=says):
        moe_mask_sweep(config_of(points, tmp_path / "strict", **settings, strict=True))
    assert not (tmp_path / "strict").exists()
    page = moe_mask_sweep(config_of(points, tmp_path / "out", **settings)).read_text()
    assert "1 sample could not be used: " in page and "token id 600" in page and "There are 1" not in page
    assert {row["sample"] for row in runs_rows(tmp_path / "out")} == {"pair_1"}


def runs_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "tables/mask_sweep_samples.jsonl").read_text().splitlines()]


def test_dense_models_and_points_of_another_model_are_refused(tmp_path: Path) -> None:
    points = points_file(tmp_path / "points.json", [(0, 1)])
    with pytest.raises(ic.CapabilityError, match="needs a mixture of experts; toy:text"):
        moe_mask_sweep(config_of(points, tmp_path / "out", model_path="toy:text", sizes=[1]))
    other = Shape("other", 4, (0, 1, 2, 3), 16, 2)
    Points((Point(0, 1, 0.5),), "usage", other).write(points)
    with pytest.raises(ic.PlanError, match="of other, n_experts 16; model has 8"):
        moe_mask_sweep(config_of(points, tmp_path / "out", sizes=[1]))
    assert sizes_of(None, Points(tuple(Point(0, e, 0.0) for e in range(31)))) == [15, 20, 25, 30]
