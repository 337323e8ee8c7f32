"""Trials of function vectors: draws of the reference, the file of fixed trials, its checks and the recipe."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interp_plugins.function_vectors.files.checks import prompt_parity, slot_parity, verify_answers
from interp_plugins.function_vectors.files.trials import Trials, to_json
from interp_plugins.function_vectors.files.trials_json import read_json
from interp_plugins.function_vectors.tasks import Task
from interp_plugins.function_vectors.template import Template
from interp_plugins.function_vectors.trials import fixed_trials, legacy_trials, relation_trials
from interp_recipes.fv_fixed_trials import FixedTrialsConfig, fv_fixed_trials
from test_fv_text import FIXED, FV, GOLDEN, TOKENIZERS, task, tokenizer

import interp_core as ic
from interp_core.cli import main

ANTONYM = FV / "tasks/abstractive/antonym.json"
CHECKS = (prompt_parity, slot_parity, verify_answers)


@pytest.mark.parametrize("family", GOLDEN)
def test_fixed_trials_of_the_reference(family: str, tmp_path: Path) -> None:
    """Every field of the file, and the trials that are read back from it."""
    golden = read_json(FV / family / FIXED)
    trials = fixed_trials(task("antonym"), tokenizer(family))
    made = to_json(trials)
    named = {"dataset_json", "model_name_for_tokenizer"}
    assert made["meta"].keys() - golden["meta"].keys() == {"rng"} and golden["meta"].keys() <= made["meta"].keys()
    assert {k: v for k, v in golden["meta"].items() if k not in named}.items() <= made["meta"].items()
    assert made["splits"] == golden["splits"] and made["trials"] == golden["trials"]
    assert Trials.load(trials.save(tmp_path / "new/trials.json"), tokenizer(family)).items == trials.items
    assert Trials.load(FV / family / FIXED, tokenizer(family), model=f"somebody/{family}").items == trials.items
    assert read_json(tmp_path / "new/trials.json") == made
    for check in CHECKS:
        found = check(golden, tokenizer(family))
        assert (found.checked_trials, found.mismatch_count) == (10, 0)
    assert str(found) == "verify: checked_trials=10 mismatch_count=0"


@pytest.mark.parametrize("family", GOLDEN)
def test_legacy_stream_of_the_reference(family: str) -> None:
    golden = json.loads((FV / family / "legacy_stream.json").read_text())
    mean = legacy_trials(task("antonym"), tokenizer(family), shuffle=False)
    effect = legacy_trials(task("antonym"), tokenizer(family))
    assert [trial.clean.text for trial in mean] == golden["mean_prompts"]
    assert [trial.corrupted.text for trial in effect] == golden["ie_prompts"]
    assert all(trial.clean == trial.corrupted for trial in mean) and mean.meta["rng"] == "numpy.random.RandomState"


def test_legacy_draws() -> None:
    """Against numpy's global stream, in the order in which the reference calls it."""
    antonym, reader = task("antonym"), tokenizer("toy")
    state = np.random.get_state()
    try:
        np.random.seed(3)
        wanted = []
        for _ in range(4):
            demos = np.random.choice(1678, 5, replace=False).tolist()
            query = int(np.random.choice([7, 3, 90], 1, replace=False)[0])
            words = np.random.permutation([antonym.pairs[antonym.train[row]].output for row in demos]).tolist()
            wanted.append((demos, query, words))
    finally:
        np.random.set_state(state)
    found = legacy_trials(antonym, reader, n_trials=4, n_shots=5, seed=3, filter_set=[7, 3, 90])
    assert [(list(t.demo_indices), t.query_index, [p.output for p in t.corrupted_demos]) for t in found] == wanted
    stream = np.random.RandomState(3)
    parts = [
        legacy_trials(antonym, reader, n_trials=2, n_shots=5, seed=stream, filter_set=[7, 3, 90]) for _ in range(2)
    ]
    assert [trial.clean for part in parts for trial in part] == [trial.clean for trial in found]
    assert parts[0].meta["seed"] is None


def test_legacy_evaluation_asks_rows_in_order() -> None:
    antonym, reader = task("antonym"), tokenizer("tiny-llama3-8b")
    settings: dict[str, Any] = {"split": "test", "n_shots": 5, "slots": False}
    every = legacy_trials(antonym, reader, queries=range(6), **settings)
    assert [trial.query for trial in every] == [antonym.pairs[row] for row in antonym.test[:6]]
    assert every.slots is None and every[0].clean.labels == () and len(every[2:4]) == 2
    some = legacy_trials(antonym, reader, queries=range(6), filter_set=[1, 4], **settings)
    assert [trial.query_index for trial in some] == [1, 4]
    assert some[1].demos == every[1].demos  # rows outside the filter set draw nothing
    alone = legacy_trials(antonym, reader, queries=[0], **{**settings, "n_shots": 0})
    with pytest.raises(ic.PlanError, match="these queries are test rows, built without slots"):
        to_json(every)
    assert alone[0].clean.text == f"Q: {antonym.pairs[antonym.test[0]].input}\nA:"


def test_relation_draws() -> None:
    """As specified: query, shuffle of the rest, shuffle of the answers (once more if equal), shuffle of all."""
    words = Task.of("pairs", [(f"w{i}", "same" if i < 8 else f"v{i}") for i in range(12)])
    found = relation_trials(words, tokenizer("tiny-llama3-8b"), n_trials=40, n_demos=3, seed=5)
    rng, wanted, retried = random.Random(5), [], 0
    for _ in range(40):
        query = rng.randrange(12)
        rest = [i for i in range(12) if i != query]
        rng.shuffle(rest)
        answers = [words.pairs[i].output for i in rest[:3]]
        shuffled = list(answers)
        rng.shuffle(shuffled)
        if shuffled == answers:
            rng.shuffle(shuffled)
            retried += 1
        wanted.append((tuple(rest[:3]), query, shuffled))
    rng.shuffle(wanted)
    assert [(t.demo_indices, t.query_index, [p.output for p in t.corrupted_demos]) for t in found] == wanted
    assert 5 < retried < 35 and [trial.number for trial in found] == list(range(40))
    assert all(t.query_index not in t.demo_indices and t.query == words.pairs[t.query_index] for t in found)
    stream = random.Random(5)
    assert relation_trials(words, tokenizer("toy"), n_trials=40, n_demos=3, seed=stream)[0].query == found[0].query
    assert stream.random() != random.Random(5).random()
    with pytest.raises(
        ic.PlanError, match="whose queries are validation rows; these queries are all rows, built with slots"
    ):
        to_json(found)
    with pytest.raises(ic.PlanError, match="12 rows; 12 demonstrations and a query need 13. Ask for n_demos=11"):
        relation_trials(words, tokenizer("toy"), n_demos=12)


def test_trials_that_cannot_be_drawn() -> None:
    small, reader = Task.of("small", [(f"w{i}", f"v{i}") for i in range(9)]), tokenizer("toy")
    for sampler in (fixed_trials, legacy_trials):
        with pytest.raises(ic.PlanError, match=r"task small has 6 training rows \(of 9 pairs\) for 10 .* n_shots=6 or"):
            sampler(small, reader)
        with pytest.raises(ic.PlanError, match="0 trials with 2 demonstrations"):
            sampler(small, reader, n_trials=0, n_shots=2)
    with pytest.raises(ic.PlanError, match="task one has no valid rows .* give more pairs"):
        fixed_trials(Task("one", (("a", "b"),), (0,), (), ()), reader, n_shots=1)  # type: ignore[arg-type]
    with pytest.raises(ic.PlanError, match="filter_set: no rows; split valid of small has rows 0 to 0"):
        legacy_trials(small, reader, n_shots=2, filter_set=[])
    with pytest.raises(ic.PlanError, match=r"queries: \[5\]; split test of small has rows 0 to 1"):
        legacy_trials(small, reader, n_shots=2, split="test", queries=[5])
    with pytest.raises(ic.TextError, match=r"trial \d, \w+ prompt: .* do not align"):
        fixed_trials(task("antonym"), reader, template=Template.of(("x:", "y:"), (" ", "")), n_shots=5)


def changed(tmp_path: Path, *path: Any, value: Any = None, delete: bool = False) -> Path:
    """A golden file with one field changed."""
    data = read_json(FV / "tiny-llama3-8b" / FIXED)
    item: Any = data
    for key in path[:-1]:
        item = item[key]
    if delete:
        del item[path[-1]]
    else:
        item[path[-1]] = value
    out = tmp_path / "trials.json"
    out.write_text(json.dumps(data))
    return out


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("trials", 4, "first_token_id"), 7, "trial 4, first_token_id is 7, should be"),
        (("trials", 4, "answer_ids"), [7, 8], r"trial 4, answer_ids\[0\] is 7, should be 1334"),
        (
            ("trials", 2, "clean_prompt_str"),
            "Q: hot\nA:",
            "trial 2, clean_prompt_str is 'Q: hot.nA:', should be 'Q: prev",
        ),
        (("trials", 2, "demos_corrupted", 3, "output"), " no", "trial 2, corrupted_prompt_str is 'Q: previous"),
        (("trials", 9, "target_str"), " no", "trial 9, target_str is ' no', should be ' infertility'"),
        (("trials", 0, "prompt_data_clean", "instructions"), "x", "trial 0, clean_prompt_str is 'Q: inter"),
        (("trials", 3, "prompt_data_corrupted", "examples"), [], "trial 3, prompt_data_corrupted is"),
        (("meta", "model_prepend_bos"), False, "trial 0, clean_prompt_str|adds a BOS"),
        (("meta", "prepend_bos_token_used"), True, "are both true: a prompt has one BOS"),
        (("meta", "seed"), "0", "meta: field 'seed' is '0', not int"),
        (("meta", "n_shots"), 9, "trial 0: demos_clean has 10 demonstrations, meta.n_shots is 9"),
        (("meta", "n_trials"), 9, "holds 10 trials, its meta.n_trials is 9"),
        (("trials", 1, "query"), " hot", "trial 1: field 'query' is ' hot', not dict"),
        (("trials", 1, "trial_id"), True, "trial 1: field 'trial_id' is True, not int"),
        (("trials", 1, "demos_clean", 0), {"input": " a"}, r"trial 1, demos_clean\[0\] has no field 'output'"),
    ],
)
def test_changed_files_are_refused(path: tuple[Any, ...], value: Any, says: str, tmp_path: Path) -> None:
    file = changed(tmp_path, *path, value=value)
    if path == ("meta", "model_prepend_bos"):  # no BOS at all: prompts and answers are as before
        assert Trials.load(file, tokenizer("tiny-llama3-8b"))[0].clean.labels[0] == "structural_token"
        return
    with pytest.raises(ic.InterpError, match=says):
        Trials.load(file, tokenizer("tiny-llama3-8b"))


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    file = FV / "tiny-llama3-8b" / FIXED
    with pytest.raises(
        ic.TextError, match=r"trial 0, answer_ids\[0\] is 1341, should be 1449 \(and 29 more\)\. The file"
    ):
        Trials.load(file, tokenizer("tiny-llama2-7b"))
    with pytest.raises(
        ic.TextError, match="model_prepend_bos is True, but .*gpt2-xl.* adds none .* for tiny-llama3-8b"
    ):
        Trials.load(file, tokenizer("gpt2-xl"))
    with pytest.raises(ic.TextError, match="meta.model_name_for_tokenizer is gpt2-xl, the model is org/tiny-pythia"):
        Trials.load(FV / "gpt2-xl" / FIXED, tokenizer("tiny-pythia"), model="org/tiny-pythia")
    assert Trials.load(FV / "gpt2-xl" / FIXED, tokenizer("tiny-pythia"))  # the same tokenizer
    with pytest.raises(ic.LoadError, match="trial 3 has no field 'target_str'. "):
        Trials.load(changed(tmp_path, "trials", 3, "target_str", delete=True), tokenizer("tiny-llama3-8b"))
    with pytest.raises(
        ic.LoadError, match="there is no file of fixed trials .*nothing.json; `interp run fv_fixed_trials"
    ):
        Trials.load(tmp_path / "nothing.json", tokenizer("toy"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ic.LoadError, match="is not JSON"):
        Trials.load(tmp_path / "broken.json", tokenizer("toy"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ic.LoadError, match="is list, not an object with meta, splits, trials"):
        Trials.load(tmp_path / "list.json", tokenizer("toy"))


def test_slot_parity_finds_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that are off by one are found in every prompt, clean and corrupted."""
    from interp_plugins.function_vectors import prompts

    golden, reader = read_json(FV / "tiny-llama3-8b" / FIXED), tokenizer("tiny-llama3-8b")
    right = prompts._labels

    def wrong(*args: Any) -> tuple[str, ...]:
        labels = list(right(*args))
        at = labels.index("separator_token")
        labels[at], labels[at + 1] = labels[at + 1], labels[at]
        return tuple(labels)

    monkeypatch.setattr(prompts, "_labels", wrong)
    found = slot_parity(golden, reader)
    assert found.mismatch_count == 1 + 20 and found.mismatches[0].startswith("dummy labels[4] is 'structural_token'")
    assert sum("corrupted prompt, labels" in line for line in found.mismatches) == 10


def test_prompts_that_do_not_align_are_mismatches() -> None:
    data = read_json(FV / "gpt2-xl" / FIXED)
    data["meta"]["prefixes"] = {"input": "x:", "output": "y:"}
    data["meta"]["separators"] = {"input": " ", "output": ""}
    data["meta"]["n_shots"] = 2
    for trial in data["trials"]:
        trial["demos_clean"], trial["demos_corrupted"] = trial["demos_clean"][:2], trial["demos_corrupted"][:2]
    found = slot_parity(data, tokenizer("toy"))
    assert any("do not align" in line for line in found.mismatches) and found.checked_trials == 10
    data["trials"][0]["target_str"] = ""
    assert "trial 0, answer_ids: prompt: the answer ''" in verify_answers(data, tokenizer("toy")).mismatches[0]


def test_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fv_fixed_trials(
        FixedTrialsConfig(dataset_json=ANTONYM, out_path=tmp_path, n_trials=4, n_shots=3, seed=1, verify_n=1)
    )
    assert path == tmp_path / "fixed_trials_antonym_t4_s3_seed1_toy-text.json"
    said = capsys.readouterr().out
    for name in ("prompt parity", "slot parity", "verify"):
        assert f"{name}: checked_trials=4 mismatch_count=0" in said
    assert "trial 0\n" in said and "trial 1\n" not in said and "target" in said
    data = read_json(path)
    assert data["meta"]["model_name_for_tokenizer"] == "toy:text" and data["meta"]["rng"] == "numpy.random.default_rng"
    assert (
        fv_fixed_trials(FixedTrialsConfig(out_path=path, verify=False)) == path
    )  # an existing file names its tokenizer
    assert "verify" not in capsys.readouterr().out
    data["trials"][2]["first_token_id"] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(ic.TextError, match=r"1 mismatches\):\n  trial 2, first_token_id is \d+, should be \d+"):
        fv_fixed_trials(FixedTrialsConfig(out_path=path))
    assert "verify: checked_trials=4 mismatch_count=1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "added", "used", "begins", "says"),
    [
        ("tiny-llama3-8b", None, None, "Q:", ""),
        ("tiny-llama3-8b", True, False, "Q:", ""),
        ("tiny-llama3-8b", False, None, "Q:", ""),
        ("tiny-llama3-8b", None, True, "", "this tokenizer adds a BOS itself: a prompt has one"),
        ("gpt2-xl", None, None, "<|endoftext|>Q:", ""),
        ("gpt2-xl", False, True, "<|endoftext|>Q:", ""),
        ("gpt2-xl", False, False, "Q:", ""),
        ("gpt2-xl", True, None, "", "model_prepend_bos is true, but this tokenizer adds no BOS"),
    ],
)
def test_recipe_with_and_without_bos(
    name: str, added: bool | None, used: bool | None, begins: str, says: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "n_trials": 2, "n_shots": 2, "model_name_for_tokenizer": TOKENIZERS[name], "model_prepend_bos": added,
        "prepend_bos_token_used": used, "separators": {"input": "\n", "output": "\n"},
    }  # fmt: skip
    if says:
        with pytest.raises(ic.TextError, match=says):
            fv_fixed_trials(FixedTrialsConfig(dataset_json=ANTONYM, out_path=tmp_path, **settings))
        return
    data = read_json(fv_fixed_trials(FixedTrialsConfig(dataset_json=ANTONYM, out_path=tmp_path / "t.json", **settings)))
    assert data["trials"][0]["clean_prompt_str"].startswith(begins + " ")
    assert data["meta"]["model_prepend_bos"] is (name != "gpt2-xl" and added is not False)
    assert data["meta"]["prepend_bos_token_used"] is (begins != "Q:")


def test_the_command_line_fails_on_a_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"out_path={FV / 'tiny-llama3-8b' / FIXED}", "verify_n=0", f"log_path={tmp_path}/parity.log"]
    settings += [f"model_name_for_tokenizer={TOKENIZERS['tiny-llama2-7b']}"]
    given = [word for setting in settings for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["interp", "run", "fv_fixed_trials", *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "verify: checked_trials=10 mismatch_count=30" in said.out
    assert "trial 0, answer_ids[0] is 1341, should be 1449" in said.err and "and 20 more" in said.err
    log = (tmp_path / "parity.log").read_text()
    assert log.count("should be") == 30 and "mismatch_count=30" in log and log.endswith("FAIL\n")
    with pytest.raises(ic.LoadError, match="there is no folder /nowhere/at/all; give a folder with a tokenizer"):
        fv_fixed_trials(
            FixedTrialsConfig(dataset_json=ANTONYM, out_path=tmp_path, model_name_for_tokenizer="/nowhere/at/all")
        )


def test_the_commands_of_the_first_milestone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Draw, prompt parity, slot parity, verify: with the flags that scripts give; each leaves its log."""

    def interp(flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["interp", "run", "fv_fixed_trials", *flags.split()])
        try:
            main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
        return 0

    model, path = TOKENIZERS["tiny-llama3-8b"], tmp_path / "t.json"
    drawn = f"--n_trials 3 --n_shots 2 --seed 0 --model_name_for_tokenizer {model} --model_prepend_bos true"
    assert interp(f"--dataset_json {ANTONYM} --out_path {path} {drawn} --prepend_bos_token_used false") == 0
    whole = (tmp_path / "t_parity.log").read_text()
    for check in ("prompt parity", "slot parity", "verify"):
        assert f"{check}: checked_trials=3 mismatch_count=0" in whole
    assert whole.endswith("PASS\n") and f"fixed trials: {path}" in whole and "prompts: clean, corrupted" in whole
    assert interp(f"--fixed_trials_path {path} --max_trials 10 --model_name_for_tokenizer {model}") == 0
    assert (tmp_path / "t_parity.log").read_text() == whole and "same as before" in capsys.readouterr().out
    slots = f"--fixed_trials_path {path} --max_trials 10 --mode corrupted --tokenizer_name {model}"
    assert interp(f"{slots} --assert_zero") == 0
    assert "prompts: corrupted\n" in (tmp_path / "t_parity_corrupted.log").read_text()
    assert interp(f"--verify true --out_path {path} --verify_n 5") == 0
    data = read_json(path)
    data["trials"][1]["demos_clean"][0]["output"] = " other"
    path.write_text(json.dumps(data))
    capsys.readouterr()
    assert interp(f"{slots} --assert_zero") == 0  # the corrupted prompts are as they were
    assert interp(f"--fixed_trials_path {path} --max_trials 1 --assert_zero") == 0  # so is the first trial
    assert "checked_trials=1 " in (tmp_path / "t_parity_first1.log").read_text()
    assert interp(f"--fixed_trials_path {path} --assert_zero") == 2
    failed = (tmp_path / "t_parity.log").read_text()
    assert "  trial 1, clean_prompt_str is 'Q: " in failed and failed.endswith("FAIL\n")
    capsys.readouterr()
    assert interp(f"--fixed_trials_path {path} --assert_zero false") == 0  # only said
    assert "trial 1, clean_prompt_str is 'Q: " in capsys.readouterr().out
    assert interp(f"{slots} --model_name_for_tokenizer toy:text") == 2
    assert "differ; give one of them" in capsys.readouterr().err
    for flags, says in (
        (f"--dataset_json {ANTONYM} --fixed_trials_path {path}", "a file that is only checked"),
        (f"--fixed_trials_path {path} --max_trials 0", "max_trials is 0: give at least 1"),
        (f"--fixed_trials_path {path} --log_path {path}/log", "cannot be written"),
    ):
        assert interp(flags) == 2 and says in " ".join(capsys.readouterr().err.split())


def test_no_trials_are_no_pass(tmp_path: Path) -> None:
    data = read_json(FV / "tiny-llama3-8b" / FIXED)
    data["trials"], data["meta"]["n_trials"] = [], 0
    (tmp_path / "none.json").write_text(json.dumps(data))
    settings = {"tokenizer_name": str(TOKENIZERS["tiny-llama3-8b"]), "verify_n": 0}
    with pytest.raises(ic.TextError, match="prompt parity, slot parity, verify: there are no trials to check"):
        fv_fixed_trials(FixedTrialsConfig(out_path=tmp_path / "none.json", **settings))


def test_another_files_place_is_taken_only_by_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"n_trials": 3, "n_shots": 2, "verify": False}
    path = fv_fixed_trials(FixedTrialsConfig(dataset_json=ANTONYM, out_path=tmp_path / "out", **settings))
    own = path.read_bytes()
    assert (
        fv_fixed_trials(FixedTrialsConfig(dataset_json=ANTONYM, out_path=tmp_path / "out", **settings)) == path
        and path.read_bytes() == own
    )
    assert "same as before" in capsys.readouterr().out
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    other.write_text("{}")
    with pytest.raises(ic.PlanError, match="overwrite"):
        fv_fixed_trials(FixedTrialsConfig(dataset_json=ANTONYM, out_path=other.parent, **settings))
    assert other.read_text() == "{}"
    assert (
        fv_fixed_trials(
            FixedTrialsConfig(dataset_json=ANTONYM, out_path=other.parent, overwrite=True, **settings)
        ).read_bytes()
        == own
    )
