"""Pages of runs: made by `run.page`, kept while they say the same; and findings that say what the numbers say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import answered
import pytest
import torch
from conftest import DATA, toy_model
from interp_plugins import function_vectors as fv
from interp_plugins.function_vectors import report as task_report
from interp_plugins.function_vectors.related import Choice, by_word
from interp_plugins.function_vectors.relation import page as relation_page
from interp_plugins.function_vectors.report import Findings as TaskFindings
from interp_plugins.visual.gates import Gate, Judgement
from interp_recipes import demo
from interp_recipes.attribution_eval import AttributionEvalConfig, attribution_eval, winner
from interp_recipes.moe_mask_sweep import report as masks
from interp_recipes.visual_phase1 import report as phase1

import interp_core as ic
from interp_core import report, runs
from interp_core.files import without_folders
from interp_core.toys.text import relations

ANSWER = report.Answer(
    "Heads", "Which head?", "L1H2 does it.", [{"prompt": "a <b>"}], "<p>drawn</p>", further=["And L0H1 a little."],
    sections=[report.Section("More", "text", "<p>below</p>")], left_out=[{"reason": "cannot read /srv/ada/x.png"}],
    rows=[{"head": i} for i in range(20)], whole="heads.csv",
)  # fmt: skip


def write(out: Path, answer: report.Answer = ANSWER, say: list[str] | None = None) -> Path:
    settings = {"data": str(out / "x.json"), "digest": "0f" * 32, "n": 3}
    lines = [] if say is None else say
    with runs.open(out, settings, recipe="heads", model=toy_model(), say=lines.append) as run:
        run.page("page.html", answer, toy_model())
    return out / "page.html"


def test_a_run_writes_pages_as_results_do(tmp_path: Path) -> None:
    page = write(tmp_path / "out")
    assert answered.finding_of(page) == "L1H2 does it."
    text = page.read_text()
    order = [
        "Which head?",
        "a &lt;b&gt;",
        "drawn",
        "<li>And L0H1",
        ">More</h2>",
        "cannot read x.png",
        "All numbers (20 rows)",
        "seconds in",
    ]
    places = [text.find(part) for part in [*order, "x.json</td>", "fingerprint", ">date<"]]
    assert -1 not in places and places == sorted(places)
    assert ">0f0f0f0f0f0f0f0f<" in text  # of a digest the beginning
    model = runs.manifest(tmp_path / "out")["model"]
    assert model["parts"]["weights"][:16] in text  # read for the run, whatever its size


def test_a_page_that_says_the_same_is_kept_with_its_date_and_cost(tmp_path: Path) -> None:
    said: list[str] = []
    before = write(tmp_path / "out").read_bytes()
    assert write(tmp_path / "out", say=said).read_bytes() == before and said == ["  kept page.html"]
    other = write(tmp_path / "out", ANSWER._replace(finding="L0H0 does it."), said)
    assert "in 3 sessions" in other.read_text() and said[1:] == ["  page.html is made again: other content"]


def test_a_result_gives_its_page_to_a_run(tmp_path: Path) -> None:
    """With the result's own settings and prompts, more sections, and the cost of the run."""
    lens = ic.method("logit_lens")(toy_model(), "Q: hot\nA:", at=-1)
    page = write(tmp_path / "out", lens.page()._replace(sections=ANSWER.sections))
    text = page.read_text()
    assert answered.finding_of(page) == lens.finding and ">below<" in text and "1 of 4 tokens, digest" in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/srv/ada/x.jsonl", "x.jsonl"), ("a,/srv/ada/x.jsonl", "a,x.jsonl"), ("~/a/b", "b"), ("../up/x", "x"),
        ("cannot read '/tmp/a/c.png'", "cannot read 'c.png'"), ("/data/models/", "models/"), ("C:\\Ada\\x", "x"),
        ("and/or 3/4", "and/or 3/4"), ("https://x.org/y/z", "https://x.org/y/z"), ("/no_think", "/no_think"),
        ("results/a/b.json", "results/a/b.json"),
    ],
)  # fmt: skip
def test_paths_lose_their_folders(text: str, told: str) -> None:
    assert without_folders(text) == told


# Another winner gives another sentence


def test_the_demo_names_the_heads_that_the_map_and_the_control_name() -> None:
    effect = torch.zeros(6, 4)
    effect[4, 1] = 0.8

    def rows(without: float, others: float) -> list[dict[str, Any]]:
        gaps = {"none": 10.0, "z[4,1]": without, "others": others}
        return [{"ablated": key, "answer is first": gap / 10, "logit difference": gap} for key, gap in gaps.items()]

    def said(ablated: list[dict[str, Any]]) -> str:
        heads = demo.named_heads(effect)
        return demo.Findings(None, effect, (10.0, -9.0), heads, ablated, 0, [], [], None).finding  # type: ignore[arg-type]

    assert said(rows(1.0, 9.0)).startswith("Head z[4,1] carries the answer") and "gives back 80% of" in said(rows(1, 9))
    assert "first in 10% of the clean prompts, without as many random heads in 90%" in said(rows(1.0, 9.0))
    for without, others in ((9.0, 9.0), (6.0, 7.0), (11.0, 10.0)):
        assert said(rows(without, others)).startswith("No head is shown to carry the answer")


def scored(means: dict[str, float], count: int = 12) -> list[dict[str, Any]]:
    """Examples whose numbers lie around means, the same way for all methods."""
    return [
        {"example": i, "method": method, "form": "row", "RISE": mean + 0.01 * (i % 3), "recovery": mean}
        for method, mean in means.items()
        for i in range(count)
    ]


def test_the_best_method_is_the_one_of_the_table() -> None:
    rows = scored({"ifr": 0.4, "attnlrp": 0.3, "random": 0.6})
    assert winner(rows, "RISE").startswith("attnlrp has the lowest mean RISE, 0.310 over 12 examples, before ifr")
    assert "tell them apart (difference -0.100" in winner(rows, "RISE")
    assert winner(rows, "recovery").startswith("random has the highest mean recovery, 0.600")
    swapped = scored({"ifr": 0.2, "attnlrp": 0.3})
    assert winner(swapped, "RISE").startswith("ifr has the lowest mean RISE, 0.210 over 12 examples, before attnlrp")
    noisy = [row | {"RISE": row["RISE"] + (row["method"] == "ifr") * 0.3 * (-1) ** row["example"]} for row in swapped]
    assert "do not tell them apart" in winner(noisy, "RISE")
    assert "so few examples do not tell" in winner(scored({"ifr": 0.2, "attnlrp": 0.3}, 4), "RISE")
    assert "no other method was asked for" in winner(scored({"ifr": 0.2}), "RISE")
    assert winner([row | {"RISE": None} for row in rows], "RISE") == "No example has a RISE that counts."


def test_the_page_of_an_evaluation(tmp_path: Path) -> None:
    here = DATA / "attribution"
    out = attribution_eval(
        AttributionEvalConfig(
            datasets=str(here / "traces/tiny_gen.jsonl"), output_root=tmp_path / "o", model="tiny", n_hops=1,
            model_path=str(here / "models/llama"), attr_funcs="ifr_all_positions,random",
        )
    )  # fmt: skip
    (page,) = out.rglob("all_100_examples.html")
    rows = [
        json.loads(line) for path in out.glob("examples/**/*_100_*.jsonl") for line in path.read_text().splitlines()
    ]
    assert answered.finding_of(page) == winner([form for row in rows for form in row["forms"]], "RISE")
    text = page.read_text()
    assert "examples of tiny_gen.jsonl depend?" in text and text.count("RISE (lower is better)") == 1


def test_a_mask_costs_more_or_less_as_the_area_says() -> None:
    findings: Any = SimpleNamespace(modes=["replace"], samples=["a"] * 12, kinds=["descending", "random"])

    def said(area: float, low: float | None, high: float | None) -> str:
        sure = None if low is None or high is None else low > 0 or high < 0
        row = {"mode": "replace", "order": "descending", "against": "random", "context": "agentic"}
        number = {"metric": "nll_all", "area": area, "low": low, "high": high, "excludes_0": sure}
        return masks.finding_of(findings, [row | number])

    assert "costs more than banning as many random experts of the same layers (+0.2000" in said(0.2, 0.1, 0.3)
    assert "costs less than" in said(-0.2, -0.3, -0.1) and "is not told from" in said(0.2, -0.1, 0.3)
    assert "one sample has no interval" in said(0.2, None, None) and "too narrow" not in said(0.2, 0.1, 0.3)
    findings.samples = ["a"] * 3
    assert "too narrow for 3 samples" in said(0.2, 0.1, 0.3)


def test_a_verdict_says_what_is_not_passed() -> None:
    gates = [
        Gate(f"G{i}", status, None, None, None, "", "", "") for i, status in enumerate(["pass", "fail", "missing"])
    ]  # type: ignore[arg-type]
    causal: Any = SimpleNamespace(main=SimpleNamespace(cliff=SimpleNamespace(value=5)), n_layers=8)
    stop = phase1.finding_of(causal, Judgement(tuple(gates), "STOP", ""))
    assert stop.endswith("; pass: G0 sanity; fail: G1 image; missing: G2 cliff.") and "layer 5" not in stop
    full = phase1.finding_of(causal, Judgement(tuple(gates), "FULL", ""))
    assert full.startswith("Verdict FULL: the image is used") and full.endswith("; the boundary is layer 5 of 8.")


def task_findings(name: str, clean: int, steered: int) -> TaskFindings:
    """Of twenty answers, so many right without and with the vector after layer 1."""
    task = next(task for task in by_word(relations()) if task.name == name)
    vector = fv.FunctionVector(torch.ones(4), heads=((2, 1, 0.5), (3, 0, 0.4)), layer=1)
    hits = [torch.tensor([0] * n + [5] * (20 - n)) for n in (clean, steered)]
    zero = fv.Evaluation(hits[0], torch.stack(hits), None, (0, 1), "zero-shot")
    return TaskFindings(task, torch.zeros(4, 4), torch.zeros(1), vector, Choice(2, 1, 0.9), 1.0, zero, zero, {}, [], [])


def test_a_vector_does_what_its_accuracies_say() -> None:
    def said(clean: int, steered: int) -> str:
        return task_report.finding_of(task_findings("antonym", clean, steered))

    assert said(2, 18) == (
        "The vector of 2 heads makes the model do antonym: after layer 1, without shots 90% of the answers are right "
        "(95 % interval 70% to 97%), 10% without the vector."
    )
    assert "keeps the model from doing antonym" in said(18, 2) and "is not shown to make" in said(9, 10)
    both = [task_findings("antonym", 2, 18), task_findings("capital", 10, 12)]
    said_of_both = "Without shots the vectors gain most at antonym (10% to 90%) and least at capital (50% to 60%)."
    assert task_report.finding_of_tasks(both) == said_of_both
    turned = [task_findings("antonym", 9, 10), task_findings("capital", 2, 16)]
    assert "most at capital (10% to 80%) and least at antonym" in task_report.finding_of_tasks(turned)


def test_the_questions_of_a_relation_that_gain_are_those_of_the_table() -> None:
    def said(**gains: float) -> str:
        rows = [
            {"q_id": name, "status": "completed", "delta_acc": gain, "acc_base": 0.5, "acc_with": 0.5 + gain}
            | {"best_layer": 3}
            for name, gain in gains.items()
        ]
        return relation_page.finding_of([*rows, {"q_id": "Q9", "status": "failed"}])

    assert "right without demonstrations at 1 of 2 questions, most at Q1, from 50% to 90% after" in said(Q1=0.4, Q2=0.0)
    assert "at 2 of 2 questions, most at Q2, from 50% to 70% after layer 3" in said(Q1=0.1, Q2=0.2)
    assert said(Q1=-0.1).endswith("at 0 of 1 questions.") and said() == "No question is completed yet."
