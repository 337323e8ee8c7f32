"""The parity suite: golden folders are reproduced, runs agree with themselves, every seeded fault is found in its place."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import fv_golden as golden
import pytest
import torch
from fv_faults import DUMP, EVAL, FAULTS, HOLES, MEAN, put, swap
from fv_golden import FAMILIES
from interp_plugins.function_vectors.files.folders import read_folder
from interp_plugins.function_vectors.parity.findings import STAGES, Tolerances, chosen
from interp_plugins.function_vectors.parity.stages import Comparison
from interp_recipes.fv_fixed_trials import FixedTrialsConfig, fv_fixed_trials
from interp_recipes.fv_golden import GoldenConfig, fv_golden
from interp_recipes.fv_parity import ParityConfig, fv_parity
from interp_recipes.fv_runtime import RuntimeConfig, fv_runtime

import interp_core as ic
from interp_core.cli import main
from interp_core.toys.text import relations

FIXED = "fixed_trials_antonym_t10_s10_seed0.json"
GATE = ["prompt", "slot", "fv", "injection"]


def trials(family: str) -> dict[str, Any]:
    """Settings of a golden model and its trials."""
    folder = golden.FOLDER / family
    return {"fixed_trials_path": folder / FIXED, "model_name": str(folder / "model"), "fixed_trials_model": family}


@cache
def toy_trials(root: Path) -> Path:
    """Three antonym trials of the toy."""
    task = root / "antonym.json"
    task.write_text(json.dumps([{"input": x, "output": y} for x, y in relations()["antonym"].items()]))
    return fv_fixed_trials(FixedTrialsConfig(dataset_json=task, out_path=root, n_trials=3, n_shots=3, verify_n=0))


def some(family: str, n: int, folder: Path) -> dict[str, Any]:
    """Settings of a golden model and its first trials."""
    settings = trials(family)
    data = json.loads(settings["fixed_trials_path"].read_text())
    data["trials"], data["meta"]["n_trials"] = data["trials"][:n], n
    path = folder / "some.json"
    path.write_text(json.dumps(data))
    return {**settings, "fixed_trials_path": path}


@pytest.fixture(scope="session")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's golden folder by replay and its runtime folder by sweep; tests copy them."""
    root = tmp_path_factory.mktemp("sides")
    settings = some("tiny-llama2-7b", 3, root) | {"n_top_heads": 4, "edit_layer": 2}
    return (
        fv_golden(GoldenConfig(**settings, save_path_root=root / "results")),
        fv_runtime(RuntimeConfig(**settings, save_path_root=root / "results_fv")),
    )


@pytest.fixture
def copies(sides: tuple[Path, Path], tmp_path: Path) -> dict[str, Path]:
    """Both folders, to be spoilt."""
    return {name: shutil.copytree(side, tmp_path / name) for name, side in zip("ab", sides, strict=True)}


def report(root: Path, name: str = "src_vs_fv_diff_report.json") -> Any:
    (found,) = root.rglob(name)
    return json.loads(found.read_text())


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a command line."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


# Golden folders


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_folders_are_reproduced(family: str, tmp_path: Path) -> None:
    """The published code's folder against ours, worked out from the trials alone: all stages agree, at every value. The
    heads of one model end where their AIE fall by less than effects may differ, which is no pass."""
    settings = {**trials(family), "a": golden.FOLDER / family, "edit_layer": 1, "save_path_root": tmp_path}
    if family == "tiny-llama3-8b":
        with pytest.raises(ic.InterpError, match="gap at k=10: the AIE of head 10 lies 1.42e-08 above .*n_top_heads=9"):
            fv_parity(ParityConfig(**settings))
    else:
        assert fv_parity(ParityConfig(**settings)) == tmp_path / "antonym" / FIXED.removesuffix(".json")
    found = report(tmp_path)
    counts = {stage["stage"]: stage["mismatch_count"] for stage in found["stages"]}
    assert counts == dict.fromkeys(STAGES, 0) | {"top_heads": int(family == "tiny-llama3-8b")}
    slots = golden.tensors(family)["mean"].shape[2]
    compared = {stage["stage"]: stage["compared"] for stage in found["stages"]}
    assert compared == {
        "prompt_boundary": 20 + 20 + 10 * 5, "slot_map": 10 + 1 + 20 * 4, "mean_activations": 4 * 8 * slots * 16,
        "top_heads": 10 * 4 * 8 + 1 + 10, "fv_vector": 128, "injection_output": 10 * (5 + 3 + 2),
    }  # fmt: skip
    injection = report(tmp_path, "injection_parity_report.json")
    assert injection["checked_trials"] == 10 and injection["mismatch_count"] == 0 and injection["edit_layer"] == 1
    assert 0 < injection["max_abs_diff_with_logits"] <= 5e-5 and injection["n_top_heads"] == 10
    for column in ("clean", "with"):  # against the reference's table, not through the suite
        rows = [r for r in golden.table(family, "injection_trials") if r["prompt_kind"] == "corrupted"]
        wanted = [r["base_logprob" if column == "clean" else "with_logprob"] for r in rows if r["edit_layer"] == 1]
        lines = next(tmp_path.rglob("injection_parity_trials.csv")).read_text().splitlines()
        cells = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
        assert [float(cell[f"{column}_src_logprob"]) for cell in cells] == wanted
        for cell, value in zip(cells, wanted, strict=True):
            assert abs(float(cell[f"{column}_fv_logprob"]) - value) <= 5e-5 and cell["trial_match"] == "True"


def test_a_golden_folder_agrees_with_itself_at_every_layer_and_prompt() -> None:
    """Two readings of the published folder: replay, all prompts and layers that it has."""
    folder = read_folder(golden.FOLDER / "gpt2-xl")
    stages = Comparison(folder, folder, "replay").stages()
    assert [stage.status for stage in stages] == ["PASS"] * 6
    assert len(stages[-1].rows) == 3 * 10 * 4 and stages[3].notes["gap_at_k"] == [pytest.approx(4.26e-8, rel=1e-2)] * 2


@pytest.mark.parametrize("kind", ["clean", "zeroshot"])
def test_other_prompts_of_the_golden_folder(kind: str, tmp_path: Path) -> None:
    settings = {**trials("tiny-llama2-7b"), "prompt_kind": kind, "edit_layer": 2}
    b = fv_runtime(RuntimeConfig(**settings, save_path_root=tmp_path / "fv"))
    found = Comparison(read_folder(golden.FOLDER / "tiny-llama2-7b"), read_folder(b), of=(kind, 2)).stages()
    assert [stage.status for stage in found] == ["PASS"] * 6 and len(found[-1].rows) == 10
    measured = [row["with_logits_max_abs_diff"] is not None for row in found[-1].rows]
    assert measured == [True] * 3 + [False] * 7  # the golden folder has these prompts' logits of three trials


# A run against itself


def test_both_sides_worked_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By fast and by replay: PASS; a second run over the first finds its own bytes."""
    settings = some("tiny-llama2-7b", 2, tmp_path) | {"n_top_heads": 4, "save_path_root": tmp_path}
    folder = fv_parity(ParityConfig(**settings))
    fast = report(tmp_path)
    assert fast["status"] == "PASS" and fast["first_divergence"] is None and fast["mode"] == "fast"
    assert fast["worked_out"] == {"a": "replay, by hand", "b": "sweep"} and fast["remarks"] == []
    capsys.readouterr()
    with pytest.raises(
        ic.PlanError, match=r"report.json is there, written by fv_parity-\w{8} \(compare was 'fast', is 'rep"
    ):
        fv_parity(ParityConfig(**settings, compare="replay"))
    assert report(tmp_path) == fast
    assert fv_parity(ParityConfig(**settings, compare="replay", overwrite=True)) == folder
    said = capsys.readouterr().out
    assert re.findall(r"/src/\S+  (\w+)", said) == ["same"] * 8
    assert re.search(r"parity_suite_report.json  replaced", said)
    replay = report(tmp_path)
    assert replay["status"] == "PASS" and [stage["max_abs_diff"] for stage in replay["stages"]] == [0.0] * 6
    assert replay["worked_out"] == {"a": "replay, by hand", "b": "replay"}
    assert set(replay["tolerances"].values()) == {0.0} and replay["settings_that_differ"] == {}
    assert fast["settings_that_differ"] == {"by": ["replay", "sweep"]}
    profile = report(tmp_path, "parity_suite_report.json")["profile"]
    assert profile["dtype"] == "float32" and profile["attn_implementation"] == "sdpa" and profile["threads"] == 1
    assert profile["versions"]["torch"] == torch.__version__


def test_every_file_and_field(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """Of the gate and of the diff."""
    folder = fv_parity(ParityConfig(a=sides[0], b=sides[1], save_path_root=tmp_path))
    assert folder == tmp_path / "antonym" / sides[0].name
    suite = json.loads((folder / "parity_suite_report.json").read_text())
    wanted = {
        "status",
        "dataset_name",
        "fixed_trials_id",
        "model_name",
        "seed",
        "earliest_failed_stage",
        "stages",
        "paths",
    }
    assert wanted <= suite.keys() and suite["seed"] == 0 and suite["earliest_failed_stage"] is None
    fields = ["name", "status", "cmd", "exit_code", "mismatch_count", "max_abs_diff", "duration_sec"]
    assert [list(stage) for stage in suite["stages"]] == [fields] * 4
    assert [stage["name"] for stage in suite["stages"]] == GATE
    assert all(Path(path).is_file() for path in suite["paths"].values()) and {*suite["paths"]} == {
        "log",
        "csv",
        "report",
    }
    header, *lines = (folder / "parity_suite_stages.csv").read_text().splitlines()
    assert header == "name,status,exit_code,mismatch_count,max_abs_diff,duration_sec,cmd" and len(lines) == 4
    assert "injection_output: PASS" in (folder / "parity_suite.log").read_text()
    header, *lines = (folder / "injection_parity_trials.csv").read_text().splitlines()
    assert header.startswith(
        "trial_idx,target_id,clean_src_logprob,clean_fv_logprob,with_src_logprob,with_fv_logprob,delta_src_logprob,"
        "delta_fv_logprob,clean_equal,with_equal,delta_equal,trial_match,clean_logits_max_abs_diff,"
        "with_logits_max_abs_diff"
    )
    assert [line.split(",")[0] for line in lines] == ["0", "1", "2"] and all("True,True,True,True" in x for x in lines)
    injection = json.loads((folder / "injection_parity_report.json").read_text())
    wanted = {"checked_trials", "edit_layer", "n_top_heads", "token_class_idx", "top_heads", "mismatch_count"}
    wanted |= {"max_abs_diff_clean_logits", "max_abs_diff_with_logits", "trials_csv"}
    assert wanted <= injection.keys() and injection["edit_layer"] == 2 and len(injection["top_heads"]) == 4
    diff = report(tmp_path)
    assert [stage["stage"] for stage in diff["stages"]] == list(STAGES)
    page = (folder.parent / "src_vs_fv_diff_report.md").read_text()
    assert all(f"{n}. {title} | PASS" in page for n, title in enumerate(STAGES.values(), 1)) and "None.\n" in page


# Seeded faults


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults(fault: str, copies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the first divergence, in its stage, file and key; stages before it pass; one line shows it again."""
    side, spoil, stage, file, key = FAULTS[fault]
    spoil(copies[side])
    with pytest.raises(ic.InterpError, match=rf"FAIL\n  {stage} / \S*{re.escape(file)} / {re.escape(key)}"):
        fv_parity(ParityConfig(**copies, save_path_root=tmp_path / "out"))
    found = report(tmp_path / "out")
    first = found["first_divergence"]
    assert (first["stage"], Path(first["file"]).name) == (stage, file) and first["key"].startswith(key)
    states = [one["status"] for one in found["stages"]]
    place = list(STAGES).index(stage)
    assert states[:place] == ["PASS"] * place and states[place] == "FAIL" and found["status"] == "FAIL"
    gate = report(tmp_path / "out", "parity_suite_report.json")
    failed = next(one for one in gate["stages"] if one["status"] == "FAIL")
    assert gate["earliest_failed_stage"] == failed["name"] and failed["exit_code"] == 2 and failed["mismatch_count"] > 0
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file())
    assert command(first["command"], monkeypatch) == 2
    assert first["command"].endswith(f"--stages {stage}") and first["command"] == failed["cmd"]
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file())
    page = next((tmp_path / "out").rglob("*.md")).read_text()
    assert first["command"] in page and STAGES[stage] in page and first["key"] in page


@pytest.mark.parametrize("hole", HOLES)
def test_faults_that_both_sides_share(hole: str, copies: dict[str, Path], tmp_path: Path) -> None:
    """Parts are held against what they derive from, and against what the trials ask: agreement alone is no pass."""
    spoil, stage, file, key = HOLES[hole]
    spoil(copies["a"], copies["b"])
    with pytest.raises(ic.InterpError, match=rf"FAIL\n  {stage} / \S*{re.escape(file)} / {re.escape(key)}"):
        fv_parity(ParityConfig(**copies, save_path_root=tmp_path / "out"))
    failed = [one for one in report(tmp_path / "out")["stages"] if one["status"] != "PASS"]
    assert failed[0]["stage"] == stage and all(one["mismatch_count"] > 0 for one in failed)
    for mode in ("fast", "replay"):
        (again,) = Comparison(*(read_folder(copies[side]) for side in "ab"), mode).stages([stage])  # type: ignore[arg-type]
        assert again.status == "FAIL" and again.mismatch_count > 0


def test_a_wrong_edit_layer(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """Answers at another layer than the other side's, or than asked for; the settings say why."""
    settings = some("tiny-llama2-7b", 3, tmp_path) | {"n_top_heads": 4, "edit_layer": 3}
    b = fv_runtime(RuntimeConfig(**settings, save_path_root=tmp_path / "other"))
    with pytest.raises(ic.InterpError, match=rf"{EVAL} / edit_layer: a has \[2\], b has \[3\]\n"):
        fv_parity(ParityConfig(a=sides[0], b=b, save_path_root=tmp_path))
    assert report(tmp_path)["settings_that_differ"]["edit_layer"] == [2, 3]
    with pytest.raises(ic.InterpError, match=rf"{DUMP} / edit_layer: a has \[2\], b has \[3\]; asked for: 3"):
        fv_parity(ParityConfig(a=sides[0], b=b, edit_layer=3, save_path_root=tmp_path, overwrite=True))
    with pytest.raises(ic.InterpError, match=rf"prompt_boundary / .*{EVAL} / prompt_kind: a has \['corr"):
        fv_parity(
            ParityConfig(a=sides[0], b=sides[1], edit_layer=2, prompt_kind="clean", save_path_root=tmp_path / "kind")
        )


def test_a_folder_against_itself_is_said(sides: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """It passes, and says that this means nothing; also under another name."""
    link = tmp_path / "link"
    link.symlink_to(sides[0])
    for b in (sides[0], link):
        fv_parity(ParityConfig(a=sides[0], b=b, save_path_root=tmp_path / "out", overwrite=True))
        said = "are the same folder, .*: nothing was held against another side"
        assert re.search(f"note: a and b {said}", capsys.readouterr().out)
        assert re.fullmatch(f"a and b {said}", report(tmp_path / "out")["remarks"][0])
        assert re.search(said, next((tmp_path / "out").rglob("*.md")).read_text())


def test_folders_of_other_trials_than_the_file(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """Both agree with each other, and not with the trials that were given."""
    settings = some("tiny-llama2-7b", 3, tmp_path) | {"a": sides[0], "b": sides[1], "dataset_name": "antonym"}
    fv_parity(ParityConfig(**settings, save_path_root=tmp_path))
    for change, says in (
        (lambda d: swap(d["trials"], 0, 1), r"trial \(0, 0\), corrupted: prompt: is 'Q: .* the fixed trials have 'Q: "),
        (
            lambda d: (d["trials"].pop(), d["meta"].update(n_trials=2)),
            "effects shape: effects of 3 trials, there are 2",
        ),
    ):
        data = json.loads(settings["fixed_trials_path"].read_text())
        change(data)
        (tmp_path / "other.json").write_text(json.dumps(data))
        with pytest.raises(ic.InterpError, match="FAIL"):
            fv_parity(
                ParityConfig(
                    **settings | {"fixed_trials_path": tmp_path / "other.json"}, save_path_root=tmp_path / "out"
                )
            )
        findings = [one for stage in report(tmp_path / "out")["stages"] for one in stage["findings"]]
        assert any(re.search(says, f"{one['key']}: {one['why']}") for one in findings)


def test_a_scaled_injection_is_found_by_its_logits(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """All rows of the table agree; only the logits do not."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    b = shutil.copytree(sides[1], tmp_path / "b")
    with safe_open(b / "injection_logits.safetensors", "pt") as file:
        found, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    found["with"][1, 40] += 1e-3
    save_file(found, b / "injection_logits.safetensors", about)
    with pytest.raises(ic.InterpError, match=r"safetensors / trial \(1, 1\), corrupted, layer 2: with logits"):
        fv_parity(ParityConfig(a=sides[0], b=b, save_path_root=tmp_path))
    assert report(tmp_path, "injection_parity_report.json")["max_abs_diff_with_logits"] == pytest.approx(1e-3, rel=0.1)
    (b / "injection_logits.safetensors").unlink()  # the published code leaves none
    fv_parity(ParityConfig(a=sides[0], b=b, save_path_root=tmp_path))
    assert report(tmp_path, "injection_parity_report.json")["max_abs_diff_with_logits"] is None
    assert "not compared: no " in report(tmp_path)["stages"][-1]["notes"]["logits"]


def test_the_first_of_several(copies: dict[str, Path], tmp_path: Path) -> None:
    for fault in ("vector scaled", "slot", "mean"):
        FAULTS[fault][1](copies["b"])
    with pytest.raises(ic.InterpError, match="slot_map / "):
        fv_parity(ParityConfig(**copies, save_path_root=tmp_path / "out"))
    gate = report(tmp_path / "out", "parity_suite_report.json")["stages"]
    assert [stage["status"] for stage in gate] == ["PASS", "FAIL", "FAIL", "PASS"]


# How far numbers may lie apart


@pytest.mark.parametrize(
    ("by", "fast", "replay"), [(0.0, "PASS", "PASS"), (0.9e-5, "PASS", "FAIL"), (1.2e-5, "FAIL", "FAIL")]
)
def test_tolerance_of_means(by: float, fast: str, replay: str, copies: dict[str, Path]) -> None:
    mean = torch.load(copies["a"] / MEAN, weights_only=True)
    assert float(mean[0, 0, 2, 0].abs()) < 1.0  # so that the sum keeps the difference
    torch.save(put((0, 0, 2, 0), by, add=True)(mean), copies["b"] / "mean_activations.pt")
    a, b = (read_folder(copies[side]) for side in "ab")
    for mode, wanted in (("fast", fast), ("replay", replay)):
        (stage,) = Comparison(a, b, mode).stages(["mean_activations"])  # type: ignore[arg-type]
        assert stage.status == wanted and stage.max_abs_diff == pytest.approx(by, abs=1e-7)
    (stage,) = Comparison(a, b, tolerances=Tolerances(mean=1.0)).stages(["mean_activations"])
    assert stage.status == "PASS"


def test_heads_that_the_effects_do_not_determine(tmp_path: Path) -> None:
    """One head more or less makes the difference, on the same numbers."""
    for k, passes in ((9, True), (10, False)):
        settings = {**trials("tiny-llama3-8b"), "n_top_heads": k, "edit_layer": 1}
        a = fv_golden(GoldenConfig(**settings, by="sweep", save_path_root=tmp_path / f"a{k}"))
        b = fv_runtime(RuntimeConfig(**settings, save_path_root=tmp_path / f"b{k}"))
        (fast,) = Comparison(read_folder(a), read_folder(b)).stages(["top_heads"])
        (replay,) = Comparison(read_folder(a), read_folder(b), "replay").stages(["top_heads"])
        assert replay.status == "PASS" and fast.status == ("PASS" if passes else "FAIL")
        assert fast.notes["gap_at_k"][0] == fast.notes["gap_at_k"][1] > 0


def test_effects_of_all_classes_against_the_last_token(copies: dict[str, Path]) -> None:
    """The class by which heads are chosen is compared; two folders with all classes are compared in all."""
    last = torch.load(copies["a"] / "antonym_indirect_effect.pt", weights_only=True)
    torch.save(torch.stack([*[1e-3 - last] * 9, last], -1), copies["a"] / "antonym_indirect_effect.pt")
    one, two = read_folder(copies["a"]), read_folder(copies["b"])
    assert [stage.status for stage in Comparison(one, two).stages()] == ["PASS"] * 6
    (stage,) = Comparison(one, two, token_class_idx=3).stages(["top_heads"])
    assert stage.status == "FAIL" and stage.findings[0].key.startswith("effects[trial")
    (whole,) = Comparison(one, one).stages(["top_heads"])
    assert whole.compared == 10 * last.numel() + 1 + 4


# What is refused


def test_trials_are_checked_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed prompt, and an answer that is none: report, no model, and one line that shows it again."""
    data = json.loads(toy_trials(tmp_path).read_text())
    data["trials"][1]["corrupted_prompt_str"] += " "
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(data))
    monkeypatch.setattr(ic, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(
        ic.InterpError, match="prompt_boundary / .*changed.json / trial 1, corrupted_prompt_str: prompt p"
    ):
        fv_parity(ParityConfig(fixed_trials_path=path, save_path_root=tmp_path / "out"))
    found = report(tmp_path / "out")
    assert [stage["status"] for stage in found["stages"]] == ["FAIL", "PASS", *["SKIPPED"] * 4]
    gate = report(tmp_path / "out", "parity_suite_report.json")
    assert [stage["status"] for stage in gate["stages"]] == ["FAIL", "PASS", "SKIPPED", "SKIPPED"]
    assert gate["dataset_name"] == "antonym" and gate["fixed_trials_id"] == "changed"
    assert found["first_divergence"]["command"] == f"interp run fv_fixed_trials --out_path {path}"
    assert command(found["first_divergence"]["command"], monkeypatch) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "takes two folders, a and b; or fixed_trials_path"),
        ({"a": Path("/nowhere/a"), "b": Path("/nowhere/b")}, "there is no folder /nowhere/a; `interp run fv_golden`"),
        ({"a": golden.FOLDER, "b": golden.FOLDER}, "holds no artefacts of function vectors: none of <ds>_dummy_labels"),
        ({"stages": "slots", "a": golden.FOLDER, "b": golden.FOLDER}, "there is no stage 'slots'. Did you mean 'slot_map'"),
        (trials("gpt2-xl") | {"fixed_trials_model": None}, "the model is .*pass fixed_trials_model=gpt2-xl"),
        (trials("gpt2-xl") | {"model_name": trials("tiny-pythia")["model_name"], "fixed_trials_model": None}, "model_name_for_tokenizer is gpt2-xl, the model is"),
        (trials("tiny-llama3-8b") | {"model_name": trials("gpt2-xl")["model_name"]}, "meta.model_prepend_bos is True, but"),
        (trials("gpt2-xl") | {"seed": 1}, "seed is 1, the fixed trials of .* have 0"),
        (trials("gpt2-xl") | {"dataset_name": "synonym"}, "dataset_name is 'synonym', .* have 'antonym'"),
        (trials("gpt2-xl") | {"fixed_trials_id": "../up"}, "fixed_trials_id is '../up', which is no name of a folder"),
        (trials("gpt2-xl") | {"max_trials": 0}, "max_trials is 0: give at least 1, or leave it out"),
        (trials("gpt2-xl") | {"edit_layer": 4}, "edit_layer is 4, this model has layers 0 to 3"),
        (trials("gpt2-xl") | {"n_top_heads": 40}, "n_top_heads is 40, this model has 32 heads"),
    ],
)  # fmt: skip
def test_what_is_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    """Named before a model runs; nothing is written."""
    with pytest.raises(ic.InterpError, match=says):
        fv_parity(ParityConfig(**settings, save_path_root=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_trials_of_another_tokenizer(tmp_path: Path) -> None:
    settings = trials("tiny-llama3-8b") | {"model_name": trials("tiny-llama2-7b")["model_name"]}
    with pytest.raises(ic.InterpError, match=r"trial 0, answer_ids\[0\]: verify: .* is 1341, should be 1449"):
        fv_parity(ParityConfig(**settings, save_path_root=tmp_path))
    with pytest.raises(ic.TextError, match=r"trial 0, answer_ids\[0\] is 1341, should be 1449"):
        fv_runtime(RuntimeConfig(**settings, save_path_root=tmp_path / "runtime"))
    assert not (tmp_path / "runtime").exists()


def test_the_command_line(sides: tuple[Path, Path], copies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """`--a … --b …`; 0 for PASS, 2 for FAIL."""
    line = f"interp run fv_parity --a {copies['a']} --b {copies['b']} --save-path-root {tmp_path}/out --max_trials 2"
    assert command(line, monkeypatch) == 0
    assert re.search(r"injection_output +PASS +20 ", capsys.readouterr().out)
    FAULTS["rank"][1](copies["b"])  # of the third trial
    assert command(line, monkeypatch) == 0
    assert command(line.replace("--max_trials 2", "--overwrite"), monkeypatch) == 2
    said = capsys.readouterr().err
    assert "with_rank" in said and "again: interp run fv_parity --a " in said and "Traceback" not in said
    assert command(line + " --stages fv_vector,slot_map --compare=replay", monkeypatch) == 0
    assert command(line + " --compair replay", monkeypatch) == 2
    assert "recipe fv_parity has no setting 'compair'. Did you mean 'compare'" in capsys.readouterr().err


def test_the_commands_of_the_milestones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden artefacts and gate with every setting named, as scripts give them."""
    settings = some("tiny-llama2-7b", 2, tmp_path)
    named = (
        f"--dataset_name antonym --fixed_trials_path {settings['fixed_trials_path']} --model_name {settings['model_name']} "
        "--fixed_trials_model tiny-llama2-7b --device cpu --seed 0 --edit_layer 1"
    )
    golden_files = f"{named} --n_shots 10 --n_trials 2 --save_path_root {tmp_path}/results"
    assert command(f"interp run fv_golden {golden_files}", monkeypatch) == 0
    files = {path.name for path in (tmp_path / "results/antonym/some").iterdir()}
    wanted = {MEAN, "antonym_dummy_labels.json", "antonym_indirect_effect.pt", DUMP, "src_fv.pt", "top_heads_src.json"}
    assert wanted <= files
    gate = f"{named} --fixed_trials_id mine --n_top_heads 10 --token_class_idx -1 --max_trials 5 --a {tmp_path}/results/antonym/some"
    assert command(f"interp run fv_parity {gate} --save_path_root {tmp_path}/results_fv", monkeypatch) == 0
    found = json.loads((tmp_path / "results_fv/antonym/mine/parity_suite_report.json").read_text())
    assert (found["status"], found["fixed_trials_id"], found["model_name"]) == ("PASS", "mine", settings["model_name"])
    assert (tmp_path / "results_fv/antonym/mine/fv/eval_meta.json").is_file()


def test_stages_by_name() -> None:
    assert chosen("") == chosen([]) == tuple(STAGES)
    assert chosen("fv_vector, prompt_boundary") == ("prompt_boundary", "fv_vector")
