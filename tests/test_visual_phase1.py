"""Recipe visual_phase1 on a tiny Qwen3-VL: files, resuming, missing layers, bad samples, no dependence, exit codes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import answered
import numpy as np
import pytest
import torch
from interp_plugins.questions import Question, write_questions
from interp_plugins.visual import gates
from interp_plugins.visual.gates import Thresholds
from interp_plugins.visual.records import Records
from interp_recipes.visual_data import question_tokens
from interp_recipes.visual_phase1 import Phase1, VisualPhase1Config, visual_phase1
from interp_recipes.visual_phase1 import stages as stages
from interp_recipes.visual_phase1.plan import Plan
from typer.testing import CliRunner

import interp_core as ic
from interp_core import cli, runs, vision

LAYERS = 3
WORDS = ("red", "yes", "square", "left", "two", "blue", "no", "circle")
QUICK: dict[str, Any] = {
    "profile": "smoke", "dataset": "plain", "pilots": 2, "samples": 5, "blind": ["black"], "tau": 1.0,
    "null_image": "none", "max_new_tokens": 2, "resamples": 100, "interventions": ["truncation", "band", "text:blind"],
    "horizon_samples": 3, "horizon_tokens": 2, "keep_fractions": [0.5],
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("rough_figures")


@pytest.fixture(scope="module")
def data(tiny_vl: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answer is the word that loses most by a black picture: a random model depends on them; and two
    that cannot be used, by a picture that is cut off and one that is gone."""
    model = ic.load(tiny_vl)
    folder = tmp_path_factory.mktemp("questions")
    pictures = ic.testing.pictures(9, seed=3)
    asks = [Question(f"q{i}", (image,), "what is on the left ?", ("red",), "drawn") for i, image in enumerate(pictures)]
    black = vision.blind_images(pictures, "black").images
    ids = [model.tokens(word, bos=False).ids[0, 0].item() for word in WORDS]
    questions = []
    for question, other in zip(asks, black, strict=True):
        seen, dark = (
            model.run(question_tokens(model, question, [image]))
            .logits.as_subclass(torch.Tensor)[0, -1]
            .log_softmax(-1)[ids]
            for image in (question.images[0], other)
        )
        best = WORDS[int((seen - dark).argmax())]
        questions.append(Question(question.name, question.images, question.question, (best,), "drawn"))
    write_questions(folder, questions)
    files = {path.stem: path for path in folder.rglob("*.png")}
    cut, gone = (next(path for name, path in files.items() if which in name) for which in ("q7", "q8"))
    cut.write_bytes(cut.read_bytes()[:60])
    gone.unlink()
    return folder


@pytest.fixture(scope="module")
def measured() -> list[str]:
    """Samples whose curves were begun, in this order."""
    return []


@pytest.fixture(scope="module")
def done(
    tiny_vl: str, data: Path, measured: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Phase1]:
    """A run that was stopped at its fourth sample, and went on."""
    out = tmp_path_factory.mktemp("runs") / "phase1"
    measure = stages._measured

    def until(model: ic.Model, sample: Any, *args: Any) -> Any:
        measured.append(sample.name)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(model, sample, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_measured", until)
        with pytest.raises(KeyboardInterrupt):
            visual_phase1(VisualPhase1Config(model=tiny_vl, data_path=data, out=out, **QUICK))
        assert not (out / "DONE").exists()
        return out, visual_phase1(VisualPhase1Config(model=tiny_vl, data_path=data, out=out, **QUICK))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_file_is_there(done: tuple[Path, Phase1]) -> None:
    out, found = done
    assert (out / "DONE").is_file() and found.page == out / "visual_phase1.html"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names >= {
        "thresholds.json", "samples.json", "sanity.json", "causal/records.jsonl", "causal/causal.json",
        "causal/effects.png", "causal/share.png", "causal/pilots.png", "truncation/answers.jsonl",
        "truncation/truncation.json", "truncation/drops.png", "geometry/result/result.json", "geometry/geometry.json",
        "geometry/effective_rank.png", "geometry/anisotropy.png", "checkpoint_eval/checkpoint_eval.json",
        "checkpoint_eval/checkpoint_eval.md", "overlay/overlay.json", "overlay/visual_map_image_0.png",
        "causal/evd_gap.png", "causal/horizon.jsonl", "causal/horizon.json", "causal/information.png",
        "truncation/keep_fractions.json", "truncation/ranked_random.png", "truncation/keep_fractions.png",
        "truncation/answers_that_stay.png", "truncation/difficulty.png", "truncation/bands.png",
        "geometry/er_ratio.png", "checkpoint_eval/gates.png",
    }  # fmt: skip
    page = found.page.read_text()
    assert answered.finding_of(found.page).startswith(f"Verdict {found.verdict}: ")
    for word in (
        "inconclusive",
        "← τ",
        "visual_map",
        "ifr",
        "Left out",
        "Information horizon",
        "G7 ranking",
    ):
        assert word in page, word
    assert "http" not in page and not runs.manifest(out)["parts"]


def test_later_stages_name_the_record_that_their_boundary_is_from(done: tuple[Path, Phase1]) -> None:
    out, found = done
    records = Records.read(out / "causal/records.jsonl")
    causal = read(out / "causal/causal.json")
    curve = records.effects("replace:blind", "black").values.mean(0)
    above = np.flatnonzero(curve >= QUICK["tau"])
    cliff = int(above[-1]) + 1
    assert causal["records"] == records.hash and causal["threshold"]["tau"] == QUICK["tau"]
    assert causal["curves"]["replace:blind black"]["cliff"]["value"] == cliff
    assert causal["cliff_boundary"] == (cliff if 0 < cliff < LAYERS else None)
    for file in ("truncation/truncation.json", "geometry/geometry.json", "checkpoint_eval/checkpoint_eval.json",
                 "causal/horizon.json", "truncation/keep_fractions.json"):  # fmt: skip
        said = read(out / file)
        assert (said["cliff_boundary"], said["causal_record"]) == (causal["cliff_boundary"], records.hash)
    judged = read(out / "checkpoint_eval/checkpoint_eval.json")
    assert judged["thresholds"] == read(out / "thresholds.json")["hash"]
    assert judged["thresholds"] == Thresholds.of({"gates": [g for g in gates.GATES if g != "G6"]}).hash
    assert (judged["verdict"], judged["exit_code"]) == (found.verdict, found.exit_code) == ("STOP", 4)
    by_name = {gate["name"]: gate["status"] for gate in judged["gates"]}
    assert by_name["G0"] == "pass" and {by_name["G1"], by_name["G2"]} == {"inconclusive"}  # five images


def test_records_are_those_of_the_method(done: tuple[Path, Phase1], tiny_vl: str, data: Path) -> None:
    """One sample by itself, with its black picture."""
    from interp_plugins.questions import read_questions

    out, _ = done
    model, records = ic.load(tiny_vl), rows(out / "causal/records.jsonl")
    name = next(row["sample"] for row in records if not row["pilot"])
    question = next(question for question in read_questions("plain", data) if question.name == name)
    picture = question.pictures()[0]
    shown = [picture, vision.blind_images([picture], "black").images[0]]
    clean, blind = (question_tokens(model, question, [image], question.answers[0]) for image in shown)
    result = ic.method("visual")(model, clean, blind={"black": blind}, interventions=["replace:blind"])
    stored = [row["delta"] for row in records if row["sample"] == name and row["intervention"] == "replace:blind"]
    np.testing.assert_allclose(stored, result.delta[0, 0].tolist(), rtol=0, atol=1e-6)
    assert stored[0] > 0


def test_the_horizon_is_of_what_the_model_itself_says(done: tuple[Path, Phase1], tiny_vl: str, data: Path) -> None:
    """One sample by itself; first token and whole answer are two curves, and both files say whose they are."""
    from interp_plugins.questions import read_questions

    out, _ = done
    model, cells = ic.load(tiny_vl), rows(out / "causal/horizon.jsonl")
    assert len(cells) == 3 * LAYERS and {row["layer"] for row in cells} == set(range(LAYERS))
    name, text = cells[0]["sample"], cells[0]["answer"]
    said = {row["cell"]: row.get("text") for row in rows(out / "truncation/answers.jsonl")}
    assert text == said[f"{name} @ {LAYERS}"]
    question = next(question for question in read_questions("plain", data) if question.name == name)
    tokens = question_tokens(model, question, question.pictures(), text)
    found = ic.method("information_horizon")(
        model, tokens, keep=[0.5], ranking="attention", tokens=2, layers=[cells[0]["layer"]]
    )
    for i, score in enumerate(found.scores):
        stored = [cells[0]["whole"][score], *cells[0]["lost"][score], *cells[0]["kept"][score][0]]
        lost = found.lost[0, i, 0]
        alone = [found.whole[0, i].item(), *lost[~lost.isnan()].tolist(), *found.kept[0, i, 0, 0].tolist()]
        np.testing.assert_allclose(stored, alone, rtol=0, atol=1e-5)
    assert len(cells[0]["lost"]["mean"]) == 2 and len(cells[0]["kept"]["mean"][0]) == 6
    horizon = read(out / "causal/horizon.json")
    several = {row["sample"] for row in cells if row["m"] > 1}
    assert set(horizon["answers"]) == {"single", "generated"} and horizon["of_several_tokens"] == len(several) > 0
    assert horizon["answers"]["single"]["layers"] != horizon["answers"]["generated"]["layers"]
    keep = read(out / "truncation/keep_fractions.json")
    left = np.array([row["kept"]["mean"] for row in cells]).reshape(3, LAYERS, 1, 6)
    gains = (left[..., 0] - left[..., 1:].mean(-1)).mean((0, 2))
    told = [row["advantage_0.5"] for row in keep["advantage"]["generated"]]
    np.testing.assert_allclose(told, gains, rtol=0, atol=1e-9)


def test_bad_samples_are_counted_and_left_out(done: tuple[Path, Phase1]) -> None:
    out, _ = done
    said = read(out / "samples.json")
    assert sum(row["pilot"] for row in said["samples"]) == 2
    assert {row["where"] for row in said["skipped"]} == {"image"} and len(said["skipped"]) >= 1
    assert not {"q7", "q8"} & {row["sample"] for row in said["samples"]}


def test_a_second_run_keeps_everything_and_adds_a_layer_that_is_asked_for(
    done: tuple[Path, Phase1], tiny_vl: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(done[0], tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "record" not in path.parts}
    told: list[tuple[str, Any]] = []
    monkeypatch.setattr(stages, "_measured", lambda *args: told.append(("causal", args)) or [])
    answers = stages._answers
    monkeypatch.setattr(stages, "_answers", lambda *args: told.append(("answers", args[3])) or answers(*args))
    visual_phase1(VisualPhase1Config(model=tiny_vl, data_path=data, out=out, **QUICK))
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert not told and changed <= {"manifest.json", "DONE"}
    causal = read(out / "causal/causal.json")
    asked_for = 1 if causal["cliff_boundary"] != 1 else 2
    more = visual_phase1(
        VisualPhase1Config(
            model=tiny_vl, data_path=data, out=out, cliff_boundary=asked_for, causal_record="0" * 64, **QUICK
        )
    )
    assert not told and more.verdict == "STOP"  # the grid has all layers of this model
    again = read(out / "causal/causal.json")
    assert again["cliff_boundary"] == asked_for and again["records"] == causal["records"]
    keep = read(out / "truncation/keep_fractions.json")
    assert keep["cliff_boundary"] == keep["claims"]["generated"]["cliff"] == asked_for
    assert again["cliff_boundary_from"] == {"given": True, "record": "0" * 64}
    assert read(out / "truncation/truncation.json")["cliff_boundary"] == asked_for


def test_layers_that_the_grid_lacks_are_run(tiny_vl: str) -> None:
    plan = Plan(
        ("replace:blind",), ("random",), "none", None, 1, 0.01, False, 0.1, None, None, (0, 2), 4, None, (0.5,), 5, 100,
        0, Thresholds(),
    )  # fmt: skip
    assert plan.bands(8) == [(0, 2), (2, 4), (4, 6), (6, 8)] and plan.bands(3) == [(0, 1), (1, 2), (2, 3)]
    assert plan.grid(4, None) == [0, 2, 4] and plan.grid(4, 3) == [0, 2, 3, 4]
    whole = replace(plan, truncation_layers=None)
    assert len(whole.grid(48, 23)) == 14 and {0, 23, 48} <= set(whole.grid(48, 23))
    for bad in (0, 3):
        with pytest.raises(ic.PlanError, match=r"--cliff_boundary .: 1 to 2"):
            replace(plan, cliff_boundary=bad).check(ic.load(tiny_vl))


def test_a_stopped_run_goes_on(done: tuple[Path, Phase1], measured: list[str]) -> None:
    """The run of all these tests was stopped at its fourth sample, which alone was begun twice."""
    names = [row["sample"] for row in read(done[0] / "samples.json")["samples"]]
    assert measured == [*names[:4], *names[3:]]
    records = Records.read(done[0] / "causal/records.jsonl")
    assert len(records.rows) == len(names) * (1 + 4 * LAYERS)


def test_no_visual_dependence_ends_with_its_message(
    tiny_vl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that the black picture makes likelier, from the command line with a file of settings."""
    model = ic.load(tiny_vl)
    pictures = ic.testing.pictures(7, seed=3)
    black = vision.blind_images(pictures, "black").images
    ids = [model.tokens(word, bos=False).ids[0, 0].item() for word in WORDS]
    questions = []
    for i, (image, other) in enumerate(zip(pictures, black, strict=True)):
        question = Question(f"q{i}", (image,), "what is on the left ?", ("red",), "drawn")
        seen, dark = (
            model.run(question_tokens(model, question, [x]))
            .logits.as_subclass(torch.Tensor)[0, -1]
            .log_softmax(-1)[ids]
            for x in (image, other)
        )
        questions.append(Question(f"q{i}", (image,), question.question, (WORDS[int((seen - dark).argmin())],), "drawn"))
    write_questions(tmp_path / "data", questions)
    settings = QUICK | {"data_path": str(tmp_path / "data"), "max_model_len": 60, "batch_size": 2, "tp_size": 1}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    out = tmp_path / "run"
    words = ["run", "visual_phase1", "--model", tiny_vl, "--config", f"{tmp_path}/settings.json", "--out", str(out)]
    outcome = CliRunner().invoke(cli.app, words)
    assert outcome.exit_code == 4, outcome.output
    assert "no visual dependence measurable" in outcome.output and "verdict STOP" in outcome.output
    judged = read(out / "checkpoint_eval/checkpoint_eval.json")
    by_name = {gate["name"]: gate["status"] for gate in judged["gates"]}
    assert by_name == {"G0": "pass", "G1": "fail"} | {f"G{i}": "missing" for i in (2, 3, 4, 5, 7)}
    for file in ("truncation/truncation.json", "geometry/geometry.json"):
        assert read(out / file)["status"] == stages.NO_DEPENDENCE
    assert "no visual dependence measurable" in (out / "visual_phase1.html").read_text() and (out / "DONE").is_file()


def test_the_battery_refuses_to_go_on(
    tiny_vl: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose visual rows are not what the tower gives."""
    load = ic.load

    def broken(*args: Any, **more: Any) -> ic.Model:
        model = load(*args, **more)
        block = model.module("block", 0)
        block.register_forward_pre_hook(lambda _m, args: (args[0] * 1.5, *args[1:]))
        return model

    monkeypatch.setattr(ic, "load", broken)
    with pytest.raises(ic.CapabilityError, match="the run stops here"):
        visual_phase1(VisualPhase1Config(model=tiny_vl, data_path=data, out=tmp_path / "run", **QUICK))
    assert not read(tmp_path / "run/sanity.json")["ok"] and not (tmp_path / "run/causal").exists()


def test_settings_that_cannot_be(tiny_vl: str, data: Path) -> None:
    for more, said in [
        ({"adaptive_tau": True}, "pilots is 2: give at least 8"),
        ({"tau_ratio": 2.0}, "tau_ratio 2"),
        ({"prompt": "Answer!"}, "once, where the question goes"),
        ({"causal_record": "0" * 64}, "--cliff_boundary"),
        ({"samples": 40}, "42 questions are asked for"),
        ({"layers": [9]}, "--layers 9: 0 to 2"),
        ({"keep_fractions": [0.5, 1.0]}, "each lies between 0 and 1"),
        ({"random_subsets": 4}, "random_subsets is 4: give at least 5"),
    ]:
        with pytest.raises(ic.PlanError, match=said):
            visual_phase1(VisualPhase1Config(model=tiny_vl, data_path=data, out=None, **QUICK | more))


@pytest.mark.slow
def test_the_toy_has_a_cliff(tmp_path: Path) -> None:
    """Profile smoke on toy:vision: a boundary inside the model whose interval is two layers wide at most."""
    words = ["run", "visual_phase1", "--model", "toy:vision", "--profile", "smoke", "--adaptive_tau", "--out"]
    outcome = CliRunner().invoke(cli.app, [*words, str(tmp_path / "toy")])
    assert outcome.exit_code == 4, outcome.output  # eighteen images: nothing passes but the battery
    causal = read(tmp_path / "toy/causal/causal.json")
    cliff = causal["curves"]["replace:blind random"]["cliff"]
    assert 0 < causal["cliff_boundary"] < 8 and cliff["high"] - cliff["low"] <= 2
    assert 0 <= causal["noise_floor"] < causal["threshold"]["tau"]
    keep = read(tmp_path / "toy/truncation/keep_fractions.json")
    assert keep["claims"]["generated"]["holds"] and keep["claims"]["generated"]["cliff"] == causal["cliff_boundary"]
    information = [
        row["information"] for row in read(tmp_path / "toy/causal/horizon.json")["answers"]["single"]["layers"]
    ]
    assert max(np.abs(information[causal["cliff_boundary"] :])) < 0.01 < 0.1 < information[0]
    statuses = {gate["status"] for gate in read(tmp_path / "toy/checkpoint_eval/checkpoint_eval.json")["gates"][1:]}
    assert statuses <= {"inconclusive", "missing"}
