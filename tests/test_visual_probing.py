"""Recipe visual_probing on a tiny Qwen3-VL: files, resuming, bad samples, rules; sentences made of numbers."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import answered
import numpy as np
import pytest
import torch
from interp_plugins.probe.compare import compare
from interp_plugins.questions import Question, write_questions
from interp_recipes.visual_data import question_tokens
from interp_recipes.visual_probing import VisualProbingConfig, visual_probing
from interp_recipes.visual_probing import samples as samples_of_recipe
from interp_recipes.visual_probing.findings import Behaviour, Cliff, Findings, Position
from interp_recipes.visual_probing.samples import MODES, ORIGINAL, RANDOM, label_of

import interp_core as ic
from interp_core import sites as S
from interp_core import stats

PLACES = ["text_instruction_token", "visual_token", "answer_token"]
QUICK: dict[str, Any] = {"profile": "smoke", "max_new_tokens": 2, "dataset": "plain", "shuffles": 5}
pytestmark = pytest.mark.usefixtures("rough_figures")


def asking(number: int, label: str, image: Any) -> Question:
    return Question(f"q{number}", (image,), "is it red ?" if number % 2 else "is the circle blue ?", (label,), "drawn")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions about twelve pictures, one about colour, one whose picture is cut off."""
    folder = tmp_path_factory.mktemp("questions")
    pictures = ic.testing.pictures(14, seed=3)
    questions = [asking(n, ("Yes", "no")[n // 2 % 2], pictures[n]) for n in range(12)]
    questions += [asking(12, "red", pictures[12]), asking(13, "yes", pictures[13])]
    write_questions(folder, questions)
    cut = next(path for path in folder.rglob("*.png") if "q13" in path.stem)
    cut.write_bytes(cut.read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def run(tiny_vl: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "probing"
    visual_probing(
        VisualProbingConfig(model=tiny_vl, data_path=data, out=out, cliff_boundary=2, causal_record="0" * 64, **QUICK)
    )
    return out


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_file_is_there(run: Path) -> None:
    assert (run / "DONE").is_file()
    figures = {f"{place}_{kind}.png" for place in PLACES for kind in ("curves", "gain")} | {"behaviour.png"}
    assert {path.name for path in (run / "figures").iterdir()} == figures
    page = (run / "visual_probing.html").read_text()
    finding = answered.finding_of(run / "visual_probing.html")
    assert finding.startswith("Of what can be decoded, at ")
    assert finding in json.loads((run / "probing.json").read_text())["sentences"]
    assert "http" not in page and "<svg" in page and "not that the model uses them" in page
    rows = table(run / "tables/probing.csv")
    assert [row["position"] for row in rows] == PLACES and {row["layers"] for row in rows} == {"2-3"}
    curves = table(run / "tables/curves.csv")
    assert len(curves) == len(PLACES) * len(MODES) * 4
    record = json.loads((run / "probing.json").read_text())
    assert record["causal_record_hash"] == "0" * 64 and record["cliff_boundary"] == 2
    assert all(record["verdicts"][place] in ("inconclusive", "error") for place in PLACES)
    assert all("12 samples, 100 at least" in record["flags"][place][0] for place in PLACES)
    assert sum(record["labels"].values()) == record["n"] == 12
    assert [row["mode"] for row in table(run / "tables/behaviour.csv")] == list(MODES)


def test_bad_rows_are_recorded_and_counted(run: Path) -> None:
    (row,) = table(run / "tables/skipped.csv")
    assert "q13" in row["sample"] and row["where"] == "image" and "no picture that can be read" in row["reason"]
    record = json.loads((run / "probing.json").read_text())
    assert record["not_asked"] == {"they are not answered by yes or no": 1}
    assert "1 questions could not be used" in record["sentences"][0]


def test_the_states_are_those_of_a_run(run: Path, tiny_vl: str) -> None:
    """At each position and in each mode, of the images that the record names."""
    from safetensors import safe_open

    model = ic.load(tiny_vl)
    made = json.loads((run / "samples.json").read_text())
    row = made["samples"][4]
    by_name = {r["sample"]: r for r in made["samples"]}
    for mode, image in ((ORIGINAL, row["image"]), (RANDOM, by_name[row["donor"]]["image"])):
        tokens = question_tokens(model, asking(0, row["label"], image), [image], prompt=row["question"])
        read = model.run(tokens, read=[S.resid_pre, S.resid_post[2]])
        columns = {
            "answer_token": [-1], "text_instruction_token": tokens.columns("user")[0][-1:],
            "visual_token": tokens.columns("vision")[0],
        }  # fmt: skip
        with safe_open(run / f"states/{mode}/0000.safetensors", "pt") as file:
            for place, where in columns.items():
                states = [read[S.resid_pre[layer]].plain for layer in range(3)] + [read[S.resid_post[2]].plain]
                wanted = torch.stack([x[0, where].mean(0) for x in states])
                torch.testing.assert_close(file.get_tensor(place)[4], wanted, atol=1e-5, rtol=1e-4)


def test_donors_are_a_derangement(run: Path) -> None:
    made = json.loads((run / "samples.json").read_text())
    assert sorted(r["donor"] for r in made["samples"]) == sorted(r["sample"] for r in made["samples"])
    assert all(r["donor"] != r["sample"] for r in made["samples"])
    labels = {r["sample"]: r["label"] for r in made["samples"]}
    record = json.loads((run / "probing.json").read_text())
    assert record["donors"]["same_label"] == sum(r["label"] == labels[r["donor"]] for r in made["samples"])


def test_a_stopped_run_goes_on_and_a_second_does_nothing_again(
    tiny_vl: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the third mode's states; then run over when one file is lost, and with another batch size."""
    worked: list[str] = []

    def noting(name: str, *stop: int) -> Any:
        call = getattr(samples_of_recipe, name)

        def noted(*args: Any) -> Any:
            worked.append(args[2] if name != "shown" else name)
            if len(worked) in stop:
                raise KeyboardInterrupt
            return call(*args)

        return noted

    for name, stop in (("read_block", (4,)), ("answer_rows", ()), ("shown", ())):
        monkeypatch.setattr(f"interp_recipes.visual_probing.{name}", noting(name, *stop))
    how = {**QUICK, "positions": ["answer_token"], "max_samples": 10}
    with pytest.raises(KeyboardInterrupt):
        visual_probing(VisualProbingConfig(model=tiny_vl, data_path=data, out=tmp_path, **how))
    assert worked == ["shown", *MODES[:3]] and not (tmp_path / "DONE").exists()
    visual_probing(VisualProbingConfig(model=tiny_vl, data_path=data, out=tmp_path, **how))
    assert worked[4:] == [*MODES[2:], *MODES] and (tmp_path / "DONE").is_file()

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "record" not in path.parts}
    (tmp_path / "states/blind_mean/0000.safetensors").unlink()
    worked.clear()
    capsys.readouterr()
    visual_probing(VisualProbingConfig(model=tiny_vl, data_path=data, out=tmp_path, **how))
    assert worked == ["blind_mean"]
    assert "kept samples.json" in capsys.readouterr().out
    answers = [path for path in before if path.parent.name in ("answers", "tables")]
    assert len(answers) == 8 and all(path.read_bytes() == before[path] for path in answers)
    visual_probing(VisualProbingConfig(model=tiny_vl, data_path=data, out=tmp_path, **how, batch_size=10))
    assert worked == ["blind_mean"]
    with pytest.raises(ic.PlanError, match="another run"):
        visual_probing(VisualProbingConfig(model=tiny_vl, data_path=data, out=tmp_path, **{**how, "seed": 1}))


def test_too_few_samples_for_probes_are_inconclusive(tiny_vl: str, data: Path, tmp_path: Path) -> None:
    """The files are complete, and the sentence says why."""
    page = visual_probing(
        VisualProbingConfig(
            model=tiny_vl, data_path=data, out=tmp_path, **{**QUICK, "max_samples": 3, "max_model_len": 40}
        )
    )
    record = json.loads((tmp_path / "probing.json").read_text())
    assert set(record["verdicts"].values()) == {"inconclusive"} and page.is_file()
    assert "remains inconclusive" in " ".join(record["sentences"])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"dataset": "plain"}, "needs --data_path"),
    ({"dataset": "toy", "data_path": "x"}, "leave it out"),
    ({"model": "other"}, "which questions"),
    ({"positions": ["answer_label"]}, "label itself"),
    ({"classes": ["yes"]}, "two different answers"),
    ({"causal_record": "x"}, "give the layer too"),
    ({"causal_record": "x", "cliff_boundary": 2}, "no such file, and no hash"),
    ({"prompt": "what?"}, "where the question goes"),
    ({"scorer": "chart"}, "no scorer 'chart'"),
    ({"n_folds": 1}, "n_folds is 1"),
    ({"tp_size": 0}, "tp_size"),
]


@pytest.mark.parametrize(("settings", "match"), BAD)
def test_settings_are_refused(settings: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ic, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(ic.PlanError, match=match):
        visual_probing(VisualProbingConfig(**settings))


def test_a_record_of_another_cliff_is_refused(tmp_path: Path) -> None:
    (tmp_path / "causal.json").write_text('{"cliff_boundary": 4}')
    with pytest.raises(ic.PlanError, match="found 4"):
        visual_probing(VisualProbingConfig(cliff_boundary=3, causal_record=str(tmp_path / "causal.json")))
    fitting: dict[str, Any] = {"cliff_boundary": 4, "causal_record": str(tmp_path / "causal.json")}
    with pytest.raises(ic.LoadError, match="there is no"):  # of the questions: the record is fine
        visual_probing(VisualProbingConfig(dataset="plain", data_path=tmp_path / "none", **fitting))


def test_a_text_model_and_a_cliff_behind_the_last_layer(tiny_vl: str, data: Path) -> None:
    with pytest.raises(ic.CapabilityError, match="reads no images"):
        visual_probing(VisualProbingConfig(model="toy:text", dataset="plain", data_path=data))
    with pytest.raises(ic.PlanError, match="layers 0 to 2"):
        visual_probing(VisualProbingConfig(model=tiny_vl, data_path=data, cliff_boundary=9, **QUICK))


def test_labels_are_read_without_case_and_by_majority() -> None:
    image = ic.testing.pictures(1)[0]
    many = Question("a", (image,), "?", ("Yes.", "no", " YES ", "maybe"))
    assert label_of(many, ("yes", "no")) == "yes" and label_of(many, ("red", "blue")) is None
    assert VisualProbingConfig().named_dataset() == "toy"


# Sentences


@functools.cache
def position(effect: float, seed: int = 0, n: int = 120) -> Position:
    """States that hold the label in mode original alone, by so much."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    states = {mode: rng.normal(size=(n, 3, 6)) for mode in MODES}
    states[ORIGINAL][:, 1:, 0] += effect * (2 * labels[:, None] - 1)
    return Position(
        "answer_token", compare(states, [("no", "yes")[i] for i in labels], repeats=1), "", Cliff(1, "", "", 3)
    )


def findings(effect: float, better: int, n: int = 120) -> Findings:
    """With so many samples answered right with the image alone."""
    scores = {mode: np.r_[np.zeros(n // 2), np.ones(n // 2)] for mode in MODES}
    scores[ORIGINAL] = np.where(np.arange(n) < better, 1.0, scores[ORIGINAL])
    none = dict.fromkeys(MODES, 0)
    behaviour = Behaviour(scores, none, none, [str(i) for i in range(n)], "exact")
    where = position(effect, n=n)
    return Findings([where], behaviour, where.cliff, ["yes", "no"] * (n // 2), [], {}, 0, 0, (0, 0, 0))


@pytest.mark.parametrize(
    ("effect", "better", "decoded", "behaves"),
    [(2.0, 2, "significant", "not significant"), (0.0, 30, "not significant", "significant")],
)
def test_the_sentence_says_what_is_significant(effect: float, better: int, decoded: str, behaves: str) -> None:
    """As in the seed's own case: decodable beyond the random image, and behaviour not told from it; and the reverse."""
    found = findings(effect, better)
    assert found.verdict(found.positions[0]) == decoded and found.behaviour.verdict() == behaves
    said = found.conclusion()
    assert ("significantly more with the image" in said) == (decoded == "significant")
    assert said.endswith(f"answers is {behaves}.")
    (row,) = found.table
    assert row["delta"] == pytest.approx(row["original"] - row[RANDOM])
    assert row["low"] <= row["delta"] <= row["high"] and row["n"] == 120


def test_the_interval_is_over_samples_and_not_over_layers() -> None:
    """Layers that say the same thing many times make no interval narrower."""
    once = position(2.0)
    comparison = once.comparison
    assert comparison is not None
    correct = comparison.modes[ORIGINAL].correct - comparison.modes[RANDOM].correct
    boot = stats.Bootstrap(clusters=comparison.folds.groups)
    by_hand = boot.of(lambda x: (x[::2].mean() + x[1::2].mean()) / 2, correct[:, 1:].mean(1))
    assert once.gain.value == pytest.approx(by_hand.value)
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    one = {mode: rng.normal(size=(120, 1, 6)) for mode in MODES}
    many = {mode: np.repeat(states, 6, 1) for mode, states in one.items()}
    words = [("no", "yes")[i] for i in labels]
    gains = [
        Position("x", compare(states, words, repeats=1, shuffles=0), "", Cliff(None, "", "", size)).gain
        for states, size in ((one, 1), (many, 6))
    ]
    assert gains[0].value == pytest.approx(gains[1].value) and gains[0].low == pytest.approx(gains[1].low)
    assert gains[0].high == pytest.approx(gains[1].high)


@pytest.mark.slow
def test_noise_is_seldom_called_significant() -> None:
    places = [position(0.0, seed) for seed in range(12)]
    calls = [place.verdict(float(place.test.p)) for place in places]
    assert calls.count("significant") + calls.count("significant (below)") <= 3


@pytest.mark.slow
def test_toy_vision_by_the_command_line(tmp_path: Path) -> None:
    """The smoke profile, and all the files."""
    from typer.testing import CliRunner

    from interp_core.cli import app

    out = tmp_path / "run"
    done = CliRunner().invoke(
        app, ["run", "visual_probing", "--model", "toy:vision", "--profile", "smoke", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert (out / "DONE").is_file() and "inconclusive" in done.output
