"""What results say of themselves: their page, where they come from, and that they can be shown again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_model
from typer.testing import CliRunner

import interp_core as ic
from interp_core import provenance
from interp_core.cli import app
from interp_core.loading import toy_folder

CLEAN, CORRUPTED = "Q: big\nA: small\n\nQ: hot\nA:", "Q: big\nA: small\n\nQ: old\nA:"


@pytest.fixture(scope="module")
def patched() -> Any:
    return ic.method("activation_patching")(toy_model(), CLEAN, corrupted=CORRUPTED, site="resid_pre", at="each")


def test_a_result_says_where_it_comes_from(toy: ic.Model, patched: Any) -> None:
    record = patched.provenance
    assert record["name"] == "activation_patching" and record["what"].startswith("Which layers, heads and positions")
    assert record["model"]["source"] == "toy:text" and record["model"]["class"] == type(toy.hf).__name__
    assert re.fullmatch("[0-9a-f]{16}", record["model"]["fingerprint"]) and record["model"]["revision"] is None
    assert record["settings"]["site"] == "resid_pre" and record["settings"]["corrupted"] == CORRUPTED
    assert record["prompts"]["count"] == 1 and record["prompts"]["texts"] == [CLEAN]
    assert record["versions"]["torch"] == torch.__version__ and re.match(r"\d{4}-\d\d-\d\dT", record["date"])
    assert json.loads(json.dumps(record)) == record


def test_it_tells_models_and_prompts_apart(toy: ic.Model) -> None:
    def told(model: ic.Model, text: Any) -> tuple[Any, Any]:
        record = ic.method("logit_lens")(model, text, at=-1).provenance
        return record["model"]["fingerprint"], record["prompts"]["digest"]

    other = ic.load("toy:text")
    assert told(toy, CLEAN) == told(other, CLEAN)
    assert told(toy, CORRUPTED)[1] != told(toy, CLEAN)[1] != told(toy, [CLEAN, CLEAN])[1]
    with torch.no_grad():
        other.hf.lm_head.weight[0, 0] += 1
    assert told(other, CLEAN)[0] != told(toy, CLEAN)[0]


def test_large_weights_are_not_read_for_it(toy: ic.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "WEIGHTS", 1000)
    monkeypatch.setattr(provenance, "weights", lambda module: pytest.fail("read"))
    lens = ic.method("logit_lens")(toy, CLEAN, at=-1)
    assert lens.provenance["model"]["fingerprint"] is None
    assert "not fingerprinted" in lens.to_html(tmp_path / "page.html").read_text()


def test_the_record_is_saved_and_no_part_of_the_numbers(toy: ic.Model, patched: Any, tmp_path: Path) -> None:
    loaded = type(patched).load(patched.save(tmp_path))
    assert loaded == patched == patched.with_provenance(None) and loaded.provenance == patched.provenance
    assert ic.Result.load(tmp_path) == patched  # the class is found by the method's name
    whole = ic.method("logit_lens")(toy, [CLEAN, CORRUPTED], at=-1, batch_size=1, out=tmp_path / "run")
    assert whole.provenance["prompts"]["count"] == 2
    assert ic.Result.load(tmp_path / "run").provenance == whole.provenance


def test_sweeps_are_results_too(toy: ic.Model, tmp_path: Path) -> None:
    heads = {head: ic.sites.z[head].at(-1).zero() for head in toy.heads}
    sweep = toy.sweep(CLEAN, heads, ic.score.logit_diff(" cold", " young"))
    best = sweep.top(1)[0]
    said = f"{best.effect:+.4g} by z[{best.key[0]},{best.key[1]}]@-1 zero (the last position, 'A:'), from"
    assert said in sweep.finding
    page = sweep.to_html(tmp_path / "page.html").read_text()
    for part in (
        f"<h1>Sweep of {len(heads)} variants</h1>",
        "What each of the changes does to the logit of &#x27; cold&#x27; minus that of &#x27; young&#x27;.",
        "Q: hot",
        "The largest change of the logit of",
        "What it cost",
    ):
        assert part in page
    alone = "import interp_core as ic, sys; s = ic.Result.load(sys.argv[1]); print(type(s).__name__, s.finding)"
    done = subprocess.run(
        [sys.executable, "-c", alone, sweep.save(tmp_path / "s")], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"Sweep {sweep.finding}\n"


def test_weights_are_read_once_for_a_method_and_what_it_sweeps(toy: ic.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps that a method makes are parts of its result, and have no record of their own; those of a user have one."""
    read = []
    weights = provenance.weights
    monkeypatch.setattr(provenance, "weights", lambda module: read.append(module) or weights(module))
    assert ic.method("ablations")(toy, CLEAN).provenance["name"] == "ablations" and len(read) == 1
    sweep = toy.sweep(CLEAN, [ic.sites.z[2, 1].at(-1).zero()], ic.score.logprob(" cold"))
    assert sweep.provenance["name"] == "sweep" and len(read) == 2
    with pytest.raises(ic.PlanError):
        ic.method("ablations")(toy, CLEAN, score="logit_diff")  # refused inside of run
    assert ic.method("logit_lens")(toy, CLEAN, at=-1).provenance is not None


def test_a_class_that_no_method_has(patched: Any, tmp_path: Path) -> None:
    """Nothing is imported because a file names it."""
    patched.save(tmp_path)
    head = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(head | {"class": "os.system"}))
    with pytest.raises(ic.LoadError, match=r"holds a os\.system, which no method here returns; install the package"):
        ic.Result.load(tmp_path)


def test_no_folder_of_the_machine_gets_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model in a folder, settings and commands the last part of a path is told, on pages and in files."""
    folder = shutil.copytree(toy_folder("text"), tmp_path / "home-of-ada" / "my-model")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "run.py"), f"--out={tmp_path / 'x'}", "--text", "a b", "~/y"])
    model = ic.load(str(folder))
    lens = ic.method("logit_lens")(model, CLEAN, at=-1)
    assert lens.provenance["command"] == "run.py --out=x --text 'a b' y"
    page = lens.to_html(tmp_path / "page.html").read_text()
    lens.save(tmp_path / "saved")
    for text in (page, (tmp_path / "saved" / "result.json").read_text(), repr(model)):
        assert "my-model" in text and str(tmp_path) not in text and "home-of-ada" not in text


def test_the_page_answers_in_order(patched: Any, tmp_path: Path) -> None:
    page = patched.to_html(tmp_path / "page.html").read_text()
    order = [
        "<h1>Activation patching</h1>", "toy:text (Qwen3ForCausalLM, 6 layers)", "What was asked",
        "Which layers, heads and positions", "answer</th>", "rival</th>", "&#x27; cold&#x27;", "&#x27; young&#x27;",
        "What came out", "The largest effect: resid_pre of layer 0 at position 7, &#x27; hot&#x27; gives back 100%", "<table class='grid'",
        "All numbers (60 rows)", "What it cost", "Settings", "How it was made", "attention sdpa, engine torch",
    ]  # fmt: skip
    places = [page.find(text) for text in order]
    assert -1 not in places and places == sorted(places)
    assert "PatchingResult" not in page


def test_findings_are_what_the_numbers_say(toy: ic.Model) -> None:
    both = ic.method("activation_patching")(toy, [CLEAN, CORRUPTED], corrupted=[CORRUPTED, CLEAN])
    best = max(both.table(), key=lambda row: abs(row["effect"]))
    assert f"layer {best['layer']} head {best['head']}" in both.finding and f"{best['effect']:.0%}" in both.finding
    assert both.finding.endswith("in the mean of 2 prompts.") and len(both.prompt_rows()) == 2
    loss = ic.method("ablations")(toy, CLEAN)
    best = max(loss.table(), key=lambda row: abs(row["effect"]))
    assert f"changes logprob by {best['effect']:+.3g}" in loss.finding
    lens = ic.method("logit_lens")(toy, CLEAN)
    first = next(i for i in range(7) if not lens.target_rank[0, i:, -1].any())
    assert lens.finding == f"' cold' comes first from layer {lens.layers[first]} on, after 'A:'."
    wrong = ic.method("logit_lens")(toy, CLEAN, at=[-1], targets=[[5]])
    assert f"it has rank {int(wrong.target_rank[0, -1, -1])}." in wrong.finding
    several = ic.method("logit_lens")(toy, [CLEAN, CORRUPTED], at=-1)
    assert several.finding.startswith("In 2 of 2 prompts the target comes first")


def test_tables_for_pandas(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frames:
        DataFrame = staticmethod(list)

    monkeypatch.setitem(sys.modules, "pandas", Frames)
    assert patched.to_dataframe() == patched.table()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ic.CapabilityError, match="pip install pandas"):
        patched.to_dataframe()


def test_a_batch_shows_all_its_rows(toy: ic.Model, tmp_path: Path) -> None:
    from matplotlib.image import imread

    lens = ic.method("logit_lens")(toy, [CLEAN, CORRUPTED])
    heights = [imread(lens.png(tmp_path / f"{row}", row)).shape[0] for row in (None, 0, 1)]
    assert heights[0] == pytest.approx(heights[1] + heights[2], abs=2)
    assert lens.plot(row=1).get_title() == "Logit lens, prompt 1"
    with pytest.raises(ic.PlanError, match="there is no picture 2: LogitLensResult has 2, from 0 on"):
        lens.png(tmp_path / "c.png", 2)


@dataclass(frozen=True, eq=False)
class Bare(ic.Result):
    """A result of a class that says nothing more than it must."""

    AXES = {"a": ("batch",)}
    a: torch.Tensor


def test_a_bare_result_has_a_page_and_no_picture(tmp_path: Path) -> None:
    page = Bare(torch.ones(2)).to_html(tmp_path / "page.html").read_text()
    assert "<h1>Bare</h1>" in page and "What came out" in page and "How it was made" not in page
    with pytest.raises(ic.PlanError, match="Bare has no picture; its numbers are in table"):
        Bare(torch.ones(2)).png(tmp_path / "bare.png")


def test_show(toy: ic.Model, patched: Any, tmp_path: Path) -> None:
    def shown(*words: str) -> str:
        done = CliRunner().invoke(app, ["show", *words])
        assert done.exit_code == 0, done.exception
        return done.output

    saved = str(patched.save(tmp_path / "saved"))
    out = shown(saved)
    assert patched.finding in out and str(patched) in out and "fingerprint" in out
    assert shown(saved, "--html", str(tmp_path / "again.html")).strip() == str(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == patched.to_html(tmp_path / "first.html").read_text()
    assert shown(saved, "--png", str(tmp_path / "map"), "--width", "3.3").strip() == str(tmp_path / "map.png")
    assert "Run" in shown(str(toy.run(CLEAN).save(tmp_path / "run")))
    ic.method("logit_lens")(toy, CLEAN, at=-1, out=tmp_path / "folder")
    (tmp_path / "folder" / "result.json").unlink()
    assert "logit_lens of toy:text: done" in shown(str(tmp_path / "folder"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no folder .*nowhere; give one that a method, a recipe or run.save wrote"),
        (["."], r"holds nothing that was saved here \(nothing\); give a folder with a result.json"),
        ([".", "--png", "a.png"], "holds no result.json, and only results are drawn; leave --html and --png out"),
    ],
)
def test_show_of_something_else(words: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["show", str(tmp_path / words[0]), *words[1:]])
    assert isinstance(done.exception, ic.InterpError) and re.search(message, str(done.exception))
