"""Relations: the table and what is wrong with it, the draws, and numbers against a loop of plain forward passes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, toy_model
from fv_relations import lines, settings, table, toy_pairs
from interp_plugins.function_vectors.files.answers import as_they_are, measured
from interp_plugins.function_vectors.relation.draws import draw
from interp_plugins.function_vectors.relation.run import run_relation
from interp_plugins.function_vectors.relation.source import Question, chosen, folder_names, read_relation
from interp_plugins.function_vectors.rows import tokens
from interp_plugins.function_vectors.tasks import Pair, load_task

import interp_core as ic
from interp_core import sites as S
from interp_core.loading import open_tokenizer, toy_folder

FV = DATA / "fv"
GOLDEN = {name: str(FV / name / "model") for name in ("tiny-llama3-8b", "gpt2-xl")}


@pytest.mark.parametrize(
    "text",
    [
        "id,ex_A,ex_B\nQ2,dog,puppy\nQ1,wet,dry\nQ2,cat,kitten\n",
        "Q;exA;exB\nQ2;dog;puppy\nQ1; wet ;dry\n Q2;cat;kitten",
        "\ufeffEX-B\tqid\tex a\r\npuppy\tQ2\tdog\r\ndry\tQ1\twet\r\nkitten\tQ2\tcat\r\n\r\n",
        'q_id,EXA,note,exb\nQ2,dog,"a, b",puppy\nQ1,wet,,dry\nQ2,"cat",x,kitten\n,,,\n',
    ],
)
def test_a_table_however_it_is_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "relation.csv"
    path.write_bytes(text.encode())
    found = read_relation(path)
    assert [(question.q_id, question.pairs, question.rows) for question in found] == [
        ("Q2", (("dog", "puppy"), ("cat", "kitten")), (2, 4)), ("Q1", (("wet", "dry"),), (3,)),
    ]  # fmt: skip
    assert not any(question.problems for question in found)
    assert [q.q_id for q in chosen(found, ["Q1"], None)] == ["Q1"] and [q.q_id for q in chosen(found, None, 1)] == [
        "Q2"
    ]
    with pytest.raises(ic.PlanError, match=r"no question 'Q12'\. Did you mean"):
        chosen(found, ["Q12"], None)


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = table(tmp_path / "r.csv", {"Q1": [("big", "small")]}, "group,from,to")
    found = read_relation(path, q_column="group", a_column="from", b_column="to")
    assert found[0].pairs == (("big", "small"),) and found[0].columns == ("from", "to")
    with pytest.raises(ic.PlanError, match=r"no column 'grup' \(q_column\)\. Did you mean 'group'"):
        read_relation(path, q_column="grup", a_column="from", b_column="to")


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", ic.LoadError, "holds nothing"),
        ("id,ex_A,ex_B\n\n", ic.LoadError, "holds only a header"),
        ("id,ex_A\nQ1,big\n", ic.PlanError, "has no column for b_column: it has 'id', 'ex_A', none like exb"),
        ("id,q,ex_A,ex_B\n1,Q1,a,b\n", ic.PlanError, "has columns 'id' and 'q', both like q_column"),
        ("id,ex_A,ex_B\nQ1,big,small\nQ1,a,b,c\n", ic.PlanError, "row 3 has 4 cells, the header 3"),
        ("id,ex_A,ex_B\nQ1,big,small\n ,hot,cold\n", ic.PlanError, "row 3, column id is empty"),
        ('id,ex_A,ex_B\nQ1,"big,small\n', ic.LoadError, "is no table of text"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    path = tmp_path / "relation.csv"
    path.write_text(text)
    with pytest.raises(error, match=says):
        read_relation(path)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "relation.csv").write_bytes(b"id,ex_A,ex_B\nQ1,caf\xe9,bar\n")
    with pytest.raises(ic.LoadError, match="save it as CSV in UTF-8"):
        read_relation(tmp_path / "relation.csv")
    with pytest.raises(ic.LoadError, match=r"there is no relation .*relations\.csv\. Did you mean 'relation\.csv'"):
        read_relation(tmp_path / "relations.csv")


def test_bad_rows_are_named(tmp_path: Path) -> None:
    pairs = [("big", "small"), ("", "cold"), ("wet", "7.5"), ("big", "small"), ("nan", "dry"), ("big", "little")]
    path = table(tmp_path / "r.csv", {"Q1": pairs})
    found = [str(problem) for problem in read_relation(path)[0].problems]
    assert found == [
        "row 3, column ex_A: is empty",
        "row 4, column ex_B: '7.5' is a number, not a word (numbers=true allows it)",
        "row 5, column ex_A: 'big' → 'small' is in row 2 already",
        "row 6, column ex_A: 'nan' is a number, not a word (numbers=true allows it)",
    ]
    assert len(read_relation(path, numbers=True)[0].problems) == 2


def test_outputs_that_do_not_continue_the_prompt(tmp_path: Path) -> None:
    """A tokenizer that reads nothing where a word stands: named with row and column, no model loaded."""
    folder = shutil.copytree(toy_folder("toy:text"), tmp_path / "toy")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " void"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    path = table(tmp_path / "r.csv", {"Q1": [*toy_pairs("antonym", 8), ("thing", "void")]})

    def never() -> ic.Model:
        raise AssertionError("the model was loaded")

    with pytest.raises(ic.PlanError, match=r"row 10, column ex_B: 'thing': the answer ' void' adds no tokens"):
        run_relation(settings(path, tmp_path / "out"), open_tokenizer(str(folder)), never)
    found = json.loads((tmp_path / "out/failures.json").read_text())["classes"]
    assert [(group["stage"], group["error_class"], group["q_ids"]) for group in found] == [("rows", "BadRows", ["Q1"])]


def test_names_of_folders() -> None:
    q_ids = ["Q1", "a.b-c_d", "../../etc", "a/b", "a\\b", "", " ", ".", "..", "x" * 64, "x" * 65, "x" * 5000, "Ä", "C:x",
             "q\x00", "-rf", "a.", ".a", "dog", "DOG", "Dog", "a_b", "nul\n"]  # fmt: skip
    found = folder_names(q_ids)
    assert list(found) == q_ids and len({name.casefold() for name in found.values()}) == len(q_ids)
    for q_id, name in found.items():
        assert Path(name).name == name and len(name) <= 64 and name[0].isalnum() and name[-1] != ".", q_id
        assert name.isascii() and ".." not in name
    assert found["Q1"] == "Q1" and found["a.b-c_d"] == "a.b-c_d" and found["dog"] != "dog"
    taken = folder_names(["a/b", found["a/b"]])
    assert len({*taken.values()}) == 2


# the draws


def test_trials_are_those_of_the_rule(tmp_path: Path) -> None:
    """Query by randrange, demonstrations by a shuffle of the rest, answers by a shuffle, at last all trials."""
    question = read_relation(table(tmp_path / "r.csv", {"Q1": toy_pairs("antonym", 12)}))[0]
    work = draw(
        question,
        settings(tmp_path / "r.csv", tmp_path, n_trials=25, n_demos=9, seed=5),
        toy_model().tokenizer,
        tmp_path,
    )
    rng, wanted = random.Random(5), []
    for _ in range(25):
        query = rng.randrange(12)
        rest = [row for row in range(12) if row != query]
        rng.shuffle(rest)
        answers = [question.pairs[row].output for row in rest[:9]]
        shuffled = list(answers)
        rng.shuffle(shuffled)
        if shuffled == answers:
            rng.shuffle(shuffled)
        wanted.append((query, rest[:9], shuffled))
    rng.shuffle(wanted)
    trials = work.sampled["trials"]
    assert [
        (t["query_source_index"], t["demo_source_indices"], [d["output"] for d in t["demos_corrupted"]]) for t in trials
    ] == wanted
    first, zero = trials[0], work.zeroshot["trials"][0]
    x, y = first["query"]["input"], first["query"]["output"]
    assert first["clean_prompt_str"].startswith("Q: ") and first["clean_prompt_str"].endswith(f"\n\nQ: {x}\nA:")
    assert (zero["prompt_str"], zero["target_str"]) == (f"Q: {x}\nA:", f" {y}") == (f"Q: {x}\nA:", first["target_str"])
    assert zero["target_first_token_id"] == first["target_first_token_id"] == first["answer_ids"][0]
    assert first["demo_order"] == list(range(9)) and first["prompt_data_clean"]["query_target"]["output"] == f" {y}"
    assert (
        work.sampled["meta"] | {"n_trials_per_q": 25, "n_demos": 9, "seed": 5, "q_list": ["Q1"]} == work.sampled["meta"]
    )


def test_held_out_pairs_are_in_no_trial(tmp_path: Path) -> None:
    question = Question("Q1", "Q1", tuple(Pair(*pair) for pair in toy_pairs("french", 30)), tuple(range(2, 32)))
    work = draw(question, settings(tmp_path, tmp_path, held_out=10), toy_model().tokenizer, tmp_path)
    held = {row["query_source_index"] for row in work.zeroshot["trials"]}
    shown = {i for t in work.sampled["trials"] for i in (t["query_source_index"], *t["demo_source_indices"])}
    assert len(held) == 10 and not held & shown


# numbers


def by_hand(model: ic.Model, text: str, added: bool, target: int, edit: ic.Edit | None = None) -> tuple[float, ...]:
    """Probability, logit and log-probability of a token after a text, in one plain run; and the likeliest token."""
    ids = torch.tensor([model.tokenizer(text, add_special_tokens=added)["input_ids"]])
    logits = model.run(
        ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), edits=edit or (), allow_noop=True
    ).logits[0, -1]
    return (
        float(logits.softmax(-1)[target]), float(logits[target]), float(logits.log_softmax(-1)[target]), int(logits.argmax()),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["toy", *GOLDEN])
def test_numbers_equal_a_loop_of_runs(family: str, tmp_path: Path) -> None:
    """Effects of some heads and trials, the vector, and the layers, from the files and plain forward passes."""
    pairs = toy_pairs("antonym") if family == "toy" else load_task("antonym", folder=FV / "tasks").pairs[:14]
    path, out = table(tmp_path / "r.csv", {"Q1": pairs}), tmp_path / "out"
    name = "toy:text" if family == "toy" else GOLDEN[family]
    model = toy_model() if family == "toy" else ic.load(name)
    run_relation(settings(path, out, model=name, top_k=4), model.tokenizer, lambda: model)
    folder = out / "questions/Q1"
    trials = json.loads((folder / "sampled_trials.json").read_text())
    added = trials["meta"]["model_prepend_bos"]
    assert added == (family == "tiny-llama3-8b") and not trials["meta"]["prepend_bos_token_used"]
    mean = torch.load(folder / "stepD_mean_acts/qid_Q1_clean_mean.pt", weights_only=True)
    means = torch.zeros(model.n_layers, mean.shape[1], mean.shape[3])
    for trial in trials["trials"]:
        ids = torch.tensor([model.tokenizer(trial["clean_prompt_str"], add_special_tokens=added)["input_ids"]])
        seen = model.run(ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), read=S.z.at(-1))
        means += torch.stack([seen[S.z[layer].at(-1)][0] for layer in range(model.n_layers)]) / len(trials["trials"])
    torch.testing.assert_close(mean[:, :, -1], means, atol=1e-5, rtol=1e-5)
    scores = lines(folder / "cie_scores.csv")
    assert len(scores) == 4 * len(model.heads)
    for row in random.Random(0).sample(scores, 12):
        trial, layer, head = (trials["trials"][int(row["trial_idx"])], int(row["layer"]), int(row["head"]))
        target = trial["target_first_token_id"]
        edit = S.z[layer, head].at(-1).set(mean[layer, head, -1])
        base = by_hand(model, trial["corrupted_prompt_str"], added, target)
        patch = by_hand(model, trial["corrupted_prompt_str"], added, target, edit)
        for place, measure in enumerate(("p", "logit", "logprob")):
            assert float(row[f"{measure}_base"]) == pytest.approx(base[place], abs=3e-5)
            assert float(row[f"{measure}_patch"]) == pytest.approx(patch[place], abs=3e-5)
            assert float(row[f"delta_{measure}"]) == pytest.approx(patch[place] - base[place], abs=3e-5)
    averages_are_those_of(folder, scores)
    heads = json.loads((folder / "top_heads.json").read_text())["heads"]
    vector = sum(
        (model.project(one[None, None], layer)[0, 0] for layer, one in (alone(mean, head) for head in heads)),
        torch.zeros(model.atlas.shape.d_model),
    )
    kept = torch.load(folder / "fv_global_resid.pt", weights_only=True)["fv_global_resid"]
    torch.testing.assert_close(kept, vector.detach(), atol=1e-5, rtol=1e-5)
    layers_are_those_of(model, folder, kept, added)


def alone(mean: torch.Tensor, head: dict[str, Any]) -> tuple[int, torch.Tensor]:
    """A head's mean at the last token, all others zero."""
    one = torch.zeros(mean.shape[1], mean.shape[3])
    one[head["head"]] = mean[head["layer"], head["head"], -1]
    return head["layer"], one


def averages_are_those_of(folder: Path, scores: Sequence[dict[str, str]]) -> None:
    """`aie_scores.csv`, and the order of heads."""
    table = lines(folder / "aie_scores.csv")
    assert [float(row["mean_delta_p"]) for row in table] == sorted(
        (float(row["mean_delta_p"]) for row in table), reverse=True
    )
    for row in table[:3] + table[-3:]:
        own = [s for s in scores if (s["layer"], s["head"]) == (row["layer"], row["head"])]
        assert int(row["n_trials"]) == len(own) == 4
        for measure in ("p", "logit", "logprob"):
            delta = torch.tensor([float(s[f"delta_{measure}"]) for s in own], dtype=torch.float64)
            assert float(row[f"mean_delta_{measure}"]) == pytest.approx(float(delta.mean()), abs=1e-12)
            assert float(row[f"std_delta_{measure}"]) == pytest.approx(float(delta.std(correction=0)), abs=1e-12)
            assert float(row[f"mean_abs_delta_{measure}"]) == pytest.approx(float(delta.abs().mean()), abs=1e-12)
            for kind in ("base", "patch"):
                own_mean = sum(float(s[f"{measure}_{kind}"]) for s in own) / 4
                assert float(row[f"mean_{measure}_{kind}"]) == pytest.approx(own_mean, abs=1e-9)
        assert (
            row["any_nonzero"] == str(any(float(s["delta_logit"]) != 0 for s in own))
            and float(row["mean_act_norm"]) > 0
        )
    heads = json.loads((folder / "top_heads.json").read_text())["heads"]
    assert [(str(h["layer"]), str(h["head"])) for h in heads] == [(row["layer"], row["head"]) for row in table[:4]]


def layers_are_those_of(model: ic.Model, folder: Path, vector: torch.Tensor, added: bool) -> None:
    """Every line of two layers' evaluations, their summaries, and the summary of all layers."""
    zero = json.loads((folder / "sampled_trials_zeroshot.json").read_text())["trials"]
    total = json.loads((folder / "step6/step6_all_layers_summary.json").read_text())
    assert (
        total["expected_layers"] == total["completed_layers"] == list(range(model.n_layers))
        and not total["missing_layers"]
    )
    scores = {layer: summary["mean_delta_p"] for layer, summary in total["per_layer"].items()}
    assert total["best_score"] == max(scores.values()) == scores[str(total["best_layer"])]
    for layer in (1, model.n_layers - 1):
        rows = [
            json.loads(line) for line in (folder / f"step6/layer_{layer}/eval_trials.jsonl").read_text().splitlines()
        ]
        summary = json.loads((folder / f"step6/layer_{layer}/eval_summary.json").read_text())
        assert summary == total["per_layer"][str(layer)] and len(rows) == len(zero) == summary["n_eval"]
        for row, trial in zip(rows, zero, strict=True):
            target = trial["target_first_token_id"]
            assert (row["prompt"], row["answer"], row["target_id"]) == (
                trial["prompt_str"],
                trial["target_str"],
                target,
            )
            base = by_hand(model, row["prompt"], added, target)
            edited = by_hand(model, row["prompt"], added, target, S.resid_post[layer].at(-1).add(vector))
            for place, measure in enumerate(("p", "logit", "logprob")):
                assert row[f"{measure}_base"] == pytest.approx(base[place], abs=5e-5)
                assert row[f"{measure}_with"] == pytest.approx(edited[place], abs=5e-5)
            assert (row["pred_id_base"], row["pred_id_with"]) == (base[3], edited[3])
            assert row["accuracy_with"] == float(edited[3] == target)
        assert summary["acc_with"] == sum(row["accuracy_with"] for row in rows) / len(rows)
        assert summary["mean_delta_p"] == pytest.approx(sum(row["delta_p"] for row in rows) / len(rows))


@pytest.mark.parametrize("strategy", ["staircase", "restart", "full"])
def test_measures_are_the_same_in_any_order_of_passes(strategy: str) -> None:
    model = toy_model()
    question = Question("Q1", "Q1", tuple(Pair(*pair) for pair in toy_pairs("past")), tuple(range(2, 26)))
    work = draw(question, settings(Path("r.csv"), Path()), model.tokenizer, Path())
    prompts = [trial.corrupted for trial in work.trials]
    edits = [S.z[layer, head].at(-1).zero() for layer, head in reversed(model.heads)]
    found = measured(model, prompts, edits, strategy=strategy)
    plain, top = as_they_are(model, prompts)
    torch.testing.assert_close(found.clean, plain, atol=2e-5, rtol=1e-5)
    assert torch.equal(found.clean_top, top)
    for variant in (0, 9, 23):
        logits = [model.run(tokens([p]), edits=edits[variant], logits=-1).logits[0] for p in prompts]
        wanted = torch.stack([x.log_softmax(-1)[p.target_ids[0]] for x, p in zip(logits, prompts, strict=True)])
        torch.testing.assert_close(found.values[2, variant].float(), wanted, atol=2e-5, rtol=1e-5)
        assert found.top[variant].tolist() == [int(x.argmax()) for x in logits]
