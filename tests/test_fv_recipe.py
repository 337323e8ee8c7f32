"""The recipe `function_vectors`: files of the published script, pages, going on; and what relations of the toy share."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import answered
import pytest
import torch
from conftest import toy_model
from interp_plugins import function_vectors as fv
from interp_plugins.function_vectors.files.published import read_effects, read_means
from interp_plugins.function_vectors.related import Related, by_word, choose, extract, related, vectors_of
from interp_recipes import function_vectors as recipe
from typer.testing import CliRunner

import interp_core as ic
from interp_core.cli import app
from interp_core.toys.text import relations

QUICK = {"n_shots": 4, "n_mean_trials": 8, "n_trials": 4, "n_top_heads": 4, "examples": 3}
FILES = {
    "antonym_mean_head_activations.pt", "antonym_indirect_effect.pt", "fs_results_layer_sweep.json",
    "zs_results_layer_sweep.json", "fs_shuffled_results_layer_sweep.json", "model_baseline.json", "fv_eval_args.txt",
    "fs_results_validation.json", "report.html", "heads.png", "heads.csv", "accuracy_by_layer.csv", "decoded.csv",
    "examples.csv", "baseline.csv", "function_vector",
}  # fmt: skip
STEERED = ("zs_results", "fs_shuffled_results")


@cache
def shared() -> Related:
    """All relations, 4 prompts of 10 shots each."""
    return related(toy_model(), extract(toy_model(), by_word(relations()), trials=4), counts=(2, 4), draws=3, words=5)


def test_no_test_word_is_in_an_extraction_prompt() -> None:
    tasks = by_word(relations())
    held = {task.pairs[row].input for task in tasks for row in task.test}
    assert len(held) >= 50
    for task in tasks:
        used = [task.pairs[row] for row in (*task.train, *task.valid)]
        assert not held & {word for pair in used for word in pair}
        assert sorted((*task.train, *task.valid, *task.test)) == list(range(len(task)))
        assert len(task.train) >= 10 and len(task.valid) >= 3 and len(task.test) >= 8
    drawn = fv.fixed_trials(tasks[0], toy_model().tokenizer, n_trials=20)
    assert not held & {word for trial in drawn for pair in (*trial.demos, trial.query) for word in pair}
    with pytest.raises(ic.PlanError, match="leave some words for training"):
        by_word(relations(), valid=0.5, test=0.5)


def test_vectors_do_every_relation_on_new_words_and_random_ones_none() -> None:
    found = shared()
    clean, accuracy, noise = (float(share.mean()) for share in (found.clean, found.accuracy, found.random))
    assert clean <= 0.40 and accuracy >= 0.90 and noise <= clean + 0.05
    assert float(found.accuracy.min()) >= 0.7 and found.validation >= 0.95
    assert found.table()[-1] == {
        "task": "mean", "test words": 282, "without": clean, "with vector": accuracy, "random": noise,
    }  # fmt: skip


def test_differences_turn_the_answers_of_most_pairs() -> None:
    found = shared()
    turned, tried = found.turned
    assert tried == 62 and turned > tried / 2 and float(found.swap.nanmean()) >= 0.8
    assert float(found.shown.nan_to_num().max()) <= 0.2
    assert found.swap.isnan().diagonal().all() and torch.equal(found.swap.isnan(), found.swap.isnan().T)


def test_similarities_and_saving(tmp_path: Path) -> None:
    found = shared()
    alike = found.similarity
    torch.testing.assert_close(alike.diagonal(), torch.ones(12), rtol=0, atol=1e-5)
    torch.testing.assert_close(alike[2, 5], torch.cosine_similarity(found.vector[2], found.vector[5], 0))
    assert Related.load(found.save(tmp_path)) == found
    assert "62 pairs" in str(found) and "∅: too few words" in found.html()


def test_accuracies_are_those_of_evaluate() -> None:
    """Chosen and measured anew by the plain functions."""
    model, tasks = toy_model(), by_word(relations())
    some = [task for task in tasks if task.name in ("gerund", "past")]
    found = extract(model, some, trials=3, shots=5)
    result = related(model, found, counts=(3, 99), whose="own", draws=2, words=3)
    choice, shares = choose(model, found, [3], "own")
    vectors = vectors_of(model, found, 3, "own")
    valid = [
        fv.evaluate(model, fv.questions(t, model.tokenizer, split="valid"), v)
        for t, v in zip(some, vectors, strict=True)
    ]
    assert shares[0].tolist() == pytest.approx(torch.tensor([one.accuracies() for one in valid]).mean(0).tolist())
    assert (result.top, result.layer, result.validation) == choice and result.counts == (3,)
    for number, (task, vector) in enumerate(zip(some, vectors, strict=True)):
        again = fv.evaluate(model, fv.questions(task, model.tokenizer), vector)
        assert result.curve[number].tolist() == again.accuracies() and float(result.clean[number]) == again.accuracy()
    with pytest.raises(ic.PlanError, match="at least two"):
        related(model, found[:1])


def test_files_are_those_of_the_published_script(tmp_path: Path) -> None:
    page = recipe.function_vectors(recipe.TasksConfig(out=tmp_path, **QUICK))
    folder, model = page.parent, toy_model()
    assert {path.name for path in folder.iterdir()} == FILES
    mean = read_means(folder / "antonym_mean_head_activations.pt", model)
    aie = fv.average(read_effects(folder / "antonym_indirect_effect.pt", model))
    vector = fv.FunctionVector.load(folder / "function_vector")
    assert torch.equal(vector.vector, fv.function_vector(model, mean, fv.top_heads(aie, 4)).vector)
    zero = json.loads((folder / "zs_results_layer_sweep.json").read_text())
    assert list(zero) == [str(layer) for layer in range(model.n_layers)]
    assert set(zero["0"]) == {"clean_topk", "clean_rank_list", "intervention_topk", "intervention_rank_list"}
    assert list(json.loads((folder / "model_baseline.json").read_text())) == [str(n) for n in range(5)]
    task = next(task for task in by_word(relations()) if task.name == "antonym")
    again = fv.evaluate(model, fv.questions(task, model.tokenizer, seed=42), vector, layers=[2])
    assert zero["2"]["intervention_rank_list"] == again.rank[0].tolist()
    assert_published_bytes(folder, ("dataset_name", "dataset_source", "model_name", "n_shots"))
    said = page.read_text()
    assert "makes the model do antonym" in answered.finding_of(page)
    for title in ("Which heads carry the task", "Accuracy by layer", "Before and after", "What the vector says"):
        assert title in said
    assert "http" not in said


def assert_published_bytes(folder: Path, first: tuple[str, ...]) -> None:
    """The form of every file to the byte, written here a second time by other means than the recipe's."""
    args = (folder / "fv_eval_args.txt").read_text()
    assert tuple(json.loads(args))[:4] == first and args == json.dumps(json.loads(args), indent=2, ensure_ascii=False)
    for path in folder.glob("*.json"):
        assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=2), path.name
    for path in folder.glob("*.pt"):
        again = io.BytesIO()
        torch.save(torch.load(path, weights_only=True), again)
        assert path.read_bytes() == again.getvalue(), path.name
    heads = [line.split(",") for line in (folder / "heads.csv").read_bytes().decode().split("\n")]
    assert heads[0] == ["layer", "head", "score", "in vector"] and heads[-1] == [""] and len(heads) == 1 + 24 + 1
    assert all(repr(float(score)) == score and flag in ("True", "False") for _, _, score, flag in heads[1:-1])


def test_a_second_run_goes_on_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {**QUICK, "compute_baseline": False}
    folder = recipe.function_vectors(recipe.TasksConfig(out=tmp_path, **quick)).parent
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pt", ".json", ".csv")}
    (folder / "zs_results_layer_sweep.json").write_text('{"0": ')  # as a disk that was full leaves it
    (folder / "antonym_indirect_effect.pt").unlink()
    capsys.readouterr()
    recipe.function_vectors(recipe.TasksConfig(out=tmp_path, **quick))
    said = capsys.readouterr().out
    assert "kept antonym_mean" in said and "made antonym_indirect" in said and "sweep.json is made again" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before
    with pytest.raises(ic.PlanError, match="holds another run: n_trials was 4, is 5; give another folder"):
        recipe.function_vectors(recipe.TasksConfig(out=tmp_path, **{**quick, "n_trials": 5}))
    shutil.rmtree(tmp_path / "record")  # as a folder of the versions before run folders
    with pytest.raises(ic.PlanError, match=r"fv_eval_args.txt is there, and this run did not write it; move it away"):
        recipe.function_vectors(recipe.TasksConfig(out=tmp_path, **quick))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before


def test_stopping_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the indirect effects; the run after it goes on and ends as one that was never stopped."""
    quick = {**QUICK, "compute_baseline": False}
    effects = fv.indirect_effect

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fv, "indirect_effect", stopped)
    with pytest.raises(KeyboardInterrupt):
        recipe.function_vectors(recipe.TasksConfig(out=tmp_path / "a", **quick))
    names = {path.name for path in (tmp_path / "a/antonym").iterdir()}
    assert ic.runs.parts(tmp_path / "a")[0]["reason"] == "stopped at antonym_indirect_effect.pt"
    assert "antonym_mean_head_activations.pt" in names and "antonym_indirect_effect.pt" not in names
    assert not any("tmp" in name for name in names)
    monkeypatch.setattr(fv, "indirect_effect", effects)
    for name in ("a", "b"):
        recipe.function_vectors(recipe.TasksConfig(out=tmp_path / name, **quick))
    for path in (tmp_path / "b/antonym").iterdir():
        read = answered.without_cost if path.suffix == ".html" else Path.read_bytes
        if path.is_file():
            assert read(tmp_path / "a/antonym" / path.name) == read(path), path.name


def test_one_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers as those of a sweep at that layer, under the published names, in their form of one layer."""
    quick = {**QUICK, "compute_baseline": False}
    swept = recipe.function_vectors(recipe.TasksConfig(out=tmp_path, **quick)).parent
    sweep = {name: json.loads((swept / f"{name}_layer_sweep.json").read_text()) for name in STEERED}
    capsys.readouterr()
    with pytest.raises(ic.PlanError, match="edit_layer was -1, is 4"):
        recipe.function_vectors(recipe.TasksConfig(out=tmp_path, edit_layer=4, **quick))
    folder = recipe.function_vectors(recipe.TasksConfig(out=tmp_path / "one", edit_layer=4, **quick)).parent
    for name in STEERED:
        assert json.loads((folder / f"{name}_editlayer_4.json").read_text()) == sweep[name]["4"]
        assert not (folder / f"{name}_layer_sweep.json").exists()
    assert fv.FunctionVector.load(folder / "function_vector").layer == 4
    assert len((folder / "accuracy_by_layer.csv").read_text().splitlines()) == 3  # columns, without, layer 4
    page = (folder / "report.html").read_text()
    assert "layer 4, the only one evaluated" in page and "best layer" not in page
    recipe.function_vectors(recipe.TasksConfig(out=tmp_path / "one", edit_layer=4, **quick))
    assert "kept zs_results_editlayer_4.json" in capsys.readouterr().out


def test_another_template_is_that_of_every_stage(tmp_path: Path) -> None:
    """Every file made again by the plain functions, of prompts that the default template does not make."""
    given = {"separators": {"input": "\n", "output": "\n"}, "instructions": "Answer the question.\n"}
    folder = recipe.function_vectors(recipe.TasksConfig(out=tmp_path, **given, **QUICK)).parent
    with pytest.raises(ic.PlanError, match="holds another run: other template; give another folder"):
        recipe.function_vectors(recipe.TasksConfig(out=tmp_path, **QUICK))
    args = json.loads((folder / "fv_eval_args.txt").read_text())
    assert args["separators"]["output"] == "\n" and args["prefixes"]["input"] == "Q:"

    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text())

    model, template = toy_model(), fv.Template.filled(None, **given)
    task = next(task for task in by_word(relations()) if task.name == "antonym")
    mine = {"template": template, "seed": 42}

    def asked(**how: Any) -> list[fv.Prompt]:
        return fv.questions(task, model.tokenizer, **{**mine, **how})

    for name, split, seed in (("fs_results_validation.json", "valid", 84), ("fs_results_layer_sweep.json", "test", 42)):
        found = fv.evaluate(model, asked(shots=4, split=split, seed=seed), likelihood=True)
        assert read(name) == json.loads(json.dumps(found.published()))
    right = [row for row, rank in enumerate(read("fs_results_validation.json")["clean_rank_list"]) if rank == 0]
    kept = [row for row, rank in enumerate(read("fs_results_layer_sweep.json")["clean_rank_list"]) if rank == 0]
    drawn = {"n_shots": 4, "filter_set": right, **mine}
    shown = fv.legacy_trials(task, model.tokenizer, n_trials=8, shuffle=False, **drawn)
    mean = fv.mean_head_activations(model, [trial.clean for trial in shown])
    assert torch.equal(read_means(folder / "antonym_mean_head_activations.pt", model), mean)
    corrupted = [trial.corrupted for trial in fv.legacy_trials(task, model.tokenizer, n_trials=4, **drawn)]
    effects = fv.indirect_effect(model, corrupted, mean)
    assert torch.equal(read_effects(folder / "antonym_indirect_effect.pt", model), effects)
    vector = fv.FunctionVector.load(folder / "function_vector")
    for name, shots in (("zs_results", 0), ("fs_shuffled_results", 4)):
        found = fv.evaluate(model, asked(shots=shots, shuffled=shots > 0, filter_set=kept), vector, layers=[2])
        assert read(f"{name}_layer_sweep.json")["2"] == json.loads(json.dumps(found.published(2)))
    found = fv.baseline(model, task, shots=range(5), likelihood=True, **mine)
    assert read("model_baseline.json") == json.loads(json.dumps({n: one.published() for n, one in found.items()}))


def test_every_prompt_that_the_model_gets_is_of_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of layers, examples and what tasks share included."""
    seen: dict[str, list[str]] = {"run": [], "sweep": [], "generate": []}

    def watch(name: str, method: Callable[..., Any]) -> None:
        def watched(self: ic.Model, x: ic.Tokens, *args: Any, **more: Any) -> Any:
            seen[name] += self.tokenizer.batch_decode(x.ids)
            return method(self, x, *args, **more)

        monkeypatch.setattr(ic.Model, name, watched)

    for name in seen:
        watch(name, getattr(ic.Model, name))
    quick = {**QUICK, "compute_baseline": False}
    recipe.function_vectors(
        recipe.TasksConfig(tasks="gerund,past", out=tmp_path, instructions="Answer the question.\n", **quick)
    )
    asked = {name: [text for text in texts if "Q:" in text] for name, texts in seen.items()}  # else probes of a sweep
    assert all(len(texts) > 10 for texts in asked.values())
    assert [text for texts in asked.values() for text in texts if "Answer the question.\nQ:" not in text] == []


def test_several_tasks_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"input": word, "output": past} for word, past in relations()["past"].items()]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(pairs))
    quick = {**QUICK, "compute_baseline": False}
    page = recipe.function_vectors(recipe.TasksConfig(tasks=f"gerund, {file}", out=tmp_path / "out", **quick))
    assert page == tmp_path / "out/report.html" and (tmp_path / "out/mine/report.html").is_file()
    made = Related.load(tmp_path / "out/related")
    assert made.tasks == ("gerund", "mine") and "of 2 pairs of tasks" in capsys.readouterr().out
    assert {"tasks.csv", "similarity.png", "report.html", "manifest.json", "DONE"} <= {
        path.name for path in page.parent.iterdir()
    }
    assert "mine/report.html" in page.read_text() and answered.finding_of(page).startswith("Without shots the vectors")
    assert "mine" in answered.finding_of(tmp_path / "out/mine/report.html")
    before = page.read_bytes()
    recipe.function_vectors(recipe.TasksConfig(tasks=f"gerund, {file}", out=tmp_path / "out", **quick))
    said = capsys.readouterr().out
    assert "kept related" in said and "made" not in said and page.read_bytes() == before


def test_by_name_a_recipe_with_text_the_method(tmp_path: Path) -> None:
    """Both are called function_vectors."""
    run = CliRunner().invoke
    quick = [f"--set={key}={value}" for key, value in QUICK.items()]
    made = run(app, ["run", "function_vectors", *quick, "--out", str(tmp_path / "a")], catch_exceptions=False)
    assert made.exit_code == 0 and "antonym/report.html" in made.output
    some = ["--text", "Q: big\nA:", "--set", "trials=2", "--set", "questions=0", "--out", str(tmp_path / "b")]
    assert run(app, ["run", "function_vectors", *some], catch_exceptions=False).exit_code == 0
    assert (tmp_path / "b/result.html").is_file()


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"tasks": "antonmy"}, ic.PlanError, "Did you mean 'antonym'"),
        ({"tasks": "nowhere.json"}, ic.LoadError, "no task file nowhere.json"),
        ({"tasks": "french,french"}, ic.PlanError, "each once"),
        ({"n_shots": 30}, ic.PlanError, "24 training rows"),
        ({"n_top_heads": 25}, ic.PlanError, "has 24 heads"),
        ({"n_trials": 0}, ic.PlanError, "n_trials is at least 1"),
        ({"model": "toy:txet"}, ic.LoadError, "Did you mean 'text'"),
        ({"edit_layer": 6}, ic.PlanError, "edit_layer is 6; toy:text has layers 0 to 5. Give one of them, or -1"),
        ({"edit_layer": -2}, ic.PlanError, "edit_layer is -2"),
        ({"prefixes": {"inptu": "Q:", "output": "A:"}}, ic.PlanError, "Did you mean 'input'"),
        ({"separators": {"input": " ", "output": ""}}, ic.TextError, "do not align.*output separator is empty"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(
    settings: dict[str, object], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        recipe.function_vectors(recipe.TasksConfig(out=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()
