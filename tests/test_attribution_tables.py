"""Tables of evaluations: published files to the letter, our own with intervals, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from evaluation_golden import HERE, example
from interp_plugins.attribution.evaluation.comparing import compare, example_rows, examples_csv
from interp_plugins.attribution.evaluation.tables import faithfulness_table, read_table, recovery_table, table_path

import interp_core as ic


@pytest.mark.parametrize("path", sorted(HERE.glob("*.csv")), ids=lambda path: path.stem)
def test_published_tables_are_written_to_the_letter(path: Any) -> None:
    content = path.read_bytes().decode()
    table = read_table(content)
    assert table.text() == content
    assert (table.used is None) == path.stem.endswith("faithfulness")


def test_tables_are_those_that_the_published_command_writes() -> None:
    of = [example(f"llama/ex{k}") for k in (3, 4)]
    rows = [[list(one["names"]).index(f"ifr_all_positions/{form}") for form in ("seq", "row", "rec")] for one in of]
    scores = np.stack([one["scores"][index].numpy() for one, index in zip(of, rows, strict=True)])
    wanted = read_table((HERE / "tiny_gen_faithfulness.csv").read_text())
    table = faithfulness_table(scores, [0.1, 0.2])
    for ours, theirs in ((table.mean, wanted.mean), (table.spread, wanted.spread)):
        np.testing.assert_allclose(ours, theirs, atol=1e-12, rtol=0)
    assert table.text().splitlines()[0] == "Method,RISE,MAS,RISE+AP" and table.seconds == pytest.approx(0.15)
    theirs = (HERE / "tiny_gen_recovery.csv").read_text()
    recovered = [of[0]["recovery"][rows[0]].tolist()]
    assert recovery_table(recovered, [read_table(theirs).seconds]).text() == theirs
    with pytest.raises(ic.PlanError, match="no examples"):
        recovery_table([], [], skipped=3)


def test_paths_are_those_of_the_published_tree() -> None:
    path = table_path("faithfulness", "math", "qwen-8B", "ifr_multi_hop_both", 100)
    assert path == "faithfulness/math/qwen-8B/ifr_multi_hop_both_100_examples.csv"
    path = table_path("recovery", "/data/x/niah.jsonl", "some/model", "IG", 5)
    assert path == "recovery/data/x/niah.jsonl/some/model/IG_5_examples.csv"
    for bad in ("../up", "a/../b", "", "a\\b"):
        with pytest.raises(ic.PlanError, match=r"data set .* cannot be a place"):
            table_path("faithfulness", bad, "m", "IG", 5)
    with pytest.raises(ic.PlanError, match=r"model '\.\.' cannot be"):
        table_path("faithfulness", "math", "..", "IG", 5)


def test_damaged_tables_are_refused_by_line() -> None:
    good = (HERE / "tiny_gen_faithfulness.csv").read_text()
    for damaged, said in (
        ("", "begins with nothing"),
        (good.replace("Method,RISE", "Method,RICE"), "begins with"),
        (good.replace("Row Attr Scores Mean", "Row Scores"), "line 3 of the table"),
        ("\n".join(good.splitlines()[:5]), "line 6 of the table"),
        (good.replace("0.45942171601916837", "much"), "no number"),
    ):
        with pytest.raises(ic.LoadError, match=said):
            read_table(damaged)
    with pytest.raises(ic.PlanError, match=r"takes \[example, 3, 3\], not \[2, 3\]"):
        faithfulness_table(np.zeros((2, 3)), [1.0])
    with pytest.raises(ic.PlanError, match="example 1 has numbers that are not finite"):
        recovery_table([[0.1, 0.2, 0.3], [0.1, math.nan, 0.3]], [1.0, 1.0])


def some_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(8):
        faith = [{"vector": form, "RISE": 0.3 + 0.01 * number, "degenerate": number == 7} for form in ("seq", "row")]
        found = [
            {"vector": form, "recovery": math.nan if number == 2 else 0.5 + number / 100} for form in ("seq", "row")
        ]
        rows += example_rows(number, "ifr", faith, found, more={"seconds": 0.5})
        chance_row = [{"vector": "row", "RISE": 0.5, "degenerate": False, "recovery": 0.1 + number / 50}]
        rows += example_rows(number, "random", chance_row)
    return rows


def test_methods_are_compared_on_the_examples_that_both_have() -> None:
    rows = some_rows()
    lines = {(x["method"], x["form"], x["metric"]): x for x in compare(rows, ("RISE", "recovery"), baseline="random")}
    assert len(lines) == 6
    rise = lines["ifr", "row", "RISE"]
    assert rise["examples"] == 7 and rise["degenerate"] == 1 and rise["pairs"] == 7
    assert abs(rise["mean"] - 0.33) < 1e-12 and rise["low"] < 0.33 < rise["high"]
    assert abs(rise["difference"] + 0.17) < 1e-12 and rise["difference_high"] < 0
    found = lines["ifr", "seq", "recovery"]
    numbers = [0.5 + n / 100 for n in range(8) if n != 2]
    wanted = ic.stats.Bootstrap().difference(numbers, [0.1 + n / 50 for n in range(8) if n != 2])
    assert (found["difference"], found["difference_low"]) == (wanted.value, wanted.low)
    assert math.isnan(lines["random", "row", "RISE"]["difference"])
    all_of_them = compare(rows, ("RISE",), degenerate=True)[0]
    assert all_of_them["examples"] == 8 and all_of_them["degenerate"] == 1
    table = examples_csv(rows).splitlines()
    assert table[0] == "example,method,form,RISE,degenerate,recovery,seconds" and len(table) == 1 + 8 * 3


def test_what_cannot_be_compared_is_refused() -> None:
    rows = some_rows()
    with pytest.raises(ic.PlanError, match="no method 'ifrr'.*Did you mean 'ifr'"):
        compare(rows, ("RISE",), baseline="ifrr")
    with pytest.raises(ic.PlanError, match="no example has a number 'rise'.*RISE"):
        compare(rows, ("rise",))
    with pytest.raises(ic.PlanError, match="example 0 is there twice for ifr"):
        compare([*rows, rows[0]], ("RISE",))
    with pytest.raises(ic.PlanError, match="one row per form"):
        example_rows(0, "ifr", [{"vector": "seq"}], [{"vector": "row"}])
