"""Golden and runtime files: every file and field, equal to the published code's, and to plain forward passes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fv_golden as golden
import pytest
import torch
from fv_golden import FAMILIES
from interp_plugins.function_vectors.effects import average
from interp_plugins.function_vectors.files.answers import answers
from interp_plugins.function_vectors.files.extraction import extract
from interp_plugins.function_vectors.files.fixed_run import fixed_run, put
from interp_plugins.function_vectors.files.published import read_effects, read_means, read_vector
from interp_plugins.function_vectors.vectors import FunctionVector, function_vector
from interp_recipes.fv_golden import GoldenConfig, fv_golden
from interp_recipes.fv_runtime import RuntimeConfig, fv_runtime
from test_fv_means import published
from test_fv_parity import FIXED, some, toy_trials, trials

import interp_core as ic
from interp_core.cli import main
from interp_core.loading import open_tokenizer

EFFECT = 1e-8, 1e-4


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True) if path.suffix == ".pt" else json.loads(path.read_text())


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    floor, share = EFFECT
    assert float((found - wanted).abs().max()) <= floor + share * float(wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_files_equal_the_published_codes(family: str, tmp_path: Path) -> None:
    """From fixed trials alone, within the stated tolerances: by sweep, several prompts share a pass, and kernels may sum
    more rows in another order (test_fv_means and by="replay" hold the means to the bit)."""
    folder = fv_golden(GoldenConfig(**trials(family), by="sweep", edit_layer=2, save_path_root=tmp_path))
    assert folder == tmp_path / "antonym" / FIXED.removesuffix(".json")
    wanted, model = golden.tensors(family), golden.model(family)
    mean = load(folder / "antonym_mean_head_activations_FIXED.pt")
    assert mean.dtype == torch.float32
    for known in (published(family), wanted["mean"]):
        assert float((mean - known).abs().max()) <= 1e-5
    effects = load(folder / "antonym_indirect_effect.pt")
    assert effects.shape == (10, 4, 8)
    close(effects, wanted["ie"])
    labels = "antonym_dummy_labels.json"
    assert load(folder / labels) == golden.table(family, labels.removesuffix(".json"))
    heads, published_heads = load(folder / "top_heads_src.json"), golden.table(family, "top_heads_src")
    assert heads["top_heads"] == published_heads["top_heads"] and heads["n_top_heads"] == 10
    golden.same_order(heads["aie_sorted_full"], published_heads["aie_sorted_full"])
    assert heads["gap_k_to_k1"] == pytest.approx(published_heads["gap_k_to_k1"], abs=1e-8)
    vector = load(folder / "src_fv.pt")
    assert vector.shape == (1, 128) and float((vector - wanted["fv"]).abs().max()) <= 1e-6 * float(wanted["fv"].norm())
    rows = golden.table(family, "slot_maps")
    for made, row in zip(load(folder / "slot_maps.json"), rows, strict=True):
        assert {key: made[key] for key in row if key not in ("tokens", "idx_avg")} == {
            key: row[key] for key in row if key not in ("tokens", "idx_avg")
        }
        assert made["idx_avg"] == row["idx_avg"] and len(made["tokens"]) == len(row["tokens"])
    dump = load(folder / "src_reference_dump.json")
    assert dump["mean_shape"] == list(mean.shape) and dump["query_pred_slot"] == mean.shape[2] - 1
    assert dump["fv"]["norm"] == pytest.approx(published_heads["fv_norm"], rel=1e-6)
    table = [
        r for r in golden.table(family, "injection_trials") if (r["prompt_kind"], r["edit_layer"]) == ("corrupted", 2)
    ]
    assert [(row["trial_id"], row["trial_idx"]) for row in dump["trials"]] == [(n, n) for n in range(10)]
    for row, known in zip(dump["trials"], table, strict=True):
        same = ("trial_id", "trial_idx", "prompt_kind", "edit_layer", "n_tokens", "target_id", "base_rank", "with_rank")
        assert {key: row[key] for key in same} == {key: known[key] for key in same}
        assert (row["base_pred_id"], row["with_pred_id"]) == (known["base_top5"][0], known["with_top5"][0])
        for key in ("base_logprob", "with_logprob", "delta_logprob"):
            assert abs(row[key] - known[key]) <= 5e-5 * (2 if key == "delta_logprob" else 1)
        assert row["boundary_prefix"] == row["prompt"] and row["boundary_answer"].startswith(" ")
        assert row["answer_ids"][0] == row["target_id"]
    assert torch.equal(read_means(folder / "antonym_mean_head_activations_FIXED.pt", model), mean)
    assert torch.equal(read_effects(folder / "antonym_indirect_effect.pt", model), effects)
    assert torch.equal(read_vector(folder / "src_fv.pt", model).vector, vector[0])


def test_all_token_classes(tmp_path: Path) -> None:
    """Rank 4 on request, and heads by another class."""
    settings = some("tiny-llama3-8b", 1, tmp_path) | {
        "by": "sweep",
        "last_token_only": False,
        "save_path_root": tmp_path,
    }
    folder = fv_golden(GoldenConfig(**settings, token_class_idx=1))
    effects = load(folder / "antonym_indirect_effect.pt")
    last = fv_golden(GoldenConfig(**settings | {"last_token_only": True, "save_path_root": tmp_path / "last"}))
    assert effects.shape == (1, 4, 8, 10)
    close(effects[..., -1], load(last / "antonym_indirect_effect.pt"))
    heads = load(folder / "top_heads_src.json")["aie_sorted_full"]
    assert heads[0][2] == pytest.approx(float(average(effects, "label").max()))
    with pytest.raises(
        ic.PlanError, match=r"token_class_idx 1 \(label\) needs effects of all classes: last_token_only"
    ):
        fv_golden(
            GoldenConfig(**settings | {"last_token_only": True, "save_path_root": tmp_path / "bad"}, token_class_idx=1)
        )
    with pytest.raises(ic.PlanError, match="token_class_idx is 10; classes are -1 and 0 to 9: demonstration, label"):
        fv_golden(GoldenConfig(**settings | {"save_path_root": tmp_path / "worse"}, token_class_idx=10))


def test_replay_equals_sweep(tmp_path: Path) -> None:
    """One full forward pass per head and trial, and the same files to the bit when it is done again."""
    settings = some("gpt2-xl", 2, tmp_path)
    slow = fv_golden(GoldenConfig(**settings, save_path_root=tmp_path / "slow"))
    fast = fv_golden(GoldenConfig(**settings, by="sweep", save_path_root=tmp_path / "fast"))
    close(load(fast / "antonym_indirect_effect.pt"), load(slow / "antonym_indirect_effect.pt"))
    again = fv_golden(GoldenConfig(**settings, save_path_root=tmp_path / "again"))
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in slow.iterdir()}


def test_in_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python_bin` runs the recipe there, with the same settings: what it is called with gives the same bytes."""
    settings = {"fixed_trials_path": toy_trials(tmp_path), "n_top_heads": 2, "by": "sweep", "last_token_only": True}
    here = fv_golden(GoldenConfig(**settings, save_path_root=tmp_path / "here", python_bin=Path(sys.executable)))
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    other.chmod(0o755)
    there = fv_golden(GoldenConfig(**settings, save_path_root=tmp_path / "there", python_bin=other))
    assert there == tmp_path / "there" / here.relative_to(tmp_path / "here") and not there.exists()
    option, code, *words = (tmp_path / "words").read_text().splitlines()
    assert (option, code) == ("-c", "from interp_core.cli import main; main()")
    monkeypatch.setattr(sys, "argv", ["interp", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert {p.name: p.read_bytes() for p in there.iterdir()} == {p.name: p.read_bytes() for p in here.iterdir()}
    with pytest.raises(ic.PlanError, match="python_bin is /no/python, which is no program"):
        fv_golden(GoldenConfig(**settings, python_bin=Path("/no/python")))
    other.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(ic.InterpError, match="fv_golden ended with exit code 3 in .*python"):
        fv_golden(GoldenConfig(**settings, save_path_root=tmp_path / "no", python_bin=other))
    assert not (tmp_path / "no").exists()


RUNTIME = {
    "mean_activations_meta.json": "n_mean_trials n_icl_examples seed layers n_layers n_heads head_dim resid_dim dummy_labels "
    "slot_index_map slot_query_pred",
    "top_heads.json": "meta heads",
    "fv_by_layer.pt": "n_heads head_dim resid_dim selected_k alpha_default model_spec fv_by_layer resid_by_layer",
    "fv_global_resid.pt": "fv_global_resid resid_dim head_dim n_heads",
    "fv_global_resid_meta.json": "spec_name model heads token_position_rule",
    "step6_results_toy-text_layer2_n3.json": "config fv summary per_qid matrix metadata results",
    "eval_summary.json": "acc_base acc_with delta_acc mean_logit_base mean_logit_with mean_logprob_base mean_logprob_with "
    "mean_p_base mean_p_with mean_delta_logit mean_delta_logprob mean_delta_p std_delta_logit std_delta_logprob std_delta_p",
    "eval_meta.json": "model edit_layer injection_point slot_rule token_rule score_key heads seed n_eval alpha fv_source "
    "fv_type eval_scope eval_qids config fv fv_meta",
}
ROW = (
    "idx q_id prompt answer target_id target_token leading_space used_id used_token pred_id_base pred_id_with "
    "accuracy_base accuracy_with delta_acc logit_base logit_with logprob_base logprob_with p_base p_with delta_logit "
    "delta_logprob delta_p"
)


def test_every_runtime_file_and_field(tmp_path: Path) -> None:
    folder = fv_runtime(
        RuntimeConfig(
            fixed_trials_path=toy_trials(tmp_path), n_top_heads=4, prompt_kind="zeroshot", save_path_root=tmp_path
        )
    )
    for name, fields in RUNTIME.items():
        assert set(fields.split()) <= load(folder / name).keys(), name
    mean = load(folder / "mean_activations.pt")
    meta = load(folder / "mean_activations_meta.json")
    assert [meta[key] for key in ("n_layers", "n_heads", "head_dim", "resid_dim")] == [6, 4, 32, 128]
    assert mean.shape == (6, 4, len(meta["dummy_labels"]), 32) and meta["layers"] == list(range(6))
    assert meta["slot_index_map"]["query_predictive_token"] == [meta["slot_query_pred"]] == [mean.shape[2] - 1]
    assert sorted(slot for slots in meta["slot_index_map"].values() for slot in slots) == list(range(mean.shape[2]))
    rows = [json.loads(line) for line in (folder / "eval_trials.jsonl").read_text().splitlines()]
    assert all(set(ROW.split()) <= row.keys() for row in rows) and len(rows) == 3
    assert all(row["prompt"].startswith("<|endoftext|>Q: ") and row["prompt"].count("Q:") == 1 for row in rows)
    step6, summary = load(folder / "step6_results_toy-text_layer2_n3.json"), load(folder / "eval_summary.json")
    assert step6["results"] == rows and step6["summary"] == summary == step6["per_qid"]["antonym"]
    assert step6["fv"]["shape"] == [128] and sum(step6["matrix"].values()) == 3
    for key in ("logit", "logprob", "p"):
        deltas = torch.tensor([row[f"delta_{key}"] for row in rows], dtype=torch.float64)
        assert summary[f"mean_delta_{key}"] == pytest.approx(float(deltas.mean()))
        assert summary[f"std_delta_{key}"] == pytest.approx(float(deltas.std(correction=0)))
        assert summary[f"mean_{key}_with"] == pytest.approx(sum(row[f"{key}_with"] for row in rows) / 3)
    said = load(folder / "eval_meta.json")
    assert (said["n_eval"], said["edit_layer"], said["eval_qids"], said["fv_type"]) == (3, 2, ["antonym"], "resid")
    assert said["heads"] == load(folder / "fv_global_resid_meta.json")["heads"] and said["config"]["alpha"] == 1.0


def test_answers_are_those_of_plain_forward_passes(tmp_path: Path) -> None:
    """Logits, probabilities, ranks and likeliest tokens by hand, the vector added by a hook of our own."""
    folder = fv_runtime(
        RuntimeConfig(**some("tiny-pythia", 3, tmp_path), edit_layer=1, alpha=0.5, save_path_root=tmp_path)
    )
    model = golden.model("tiny-pythia")
    vector = load(folder / "fv_global_resid.pt")["fv_global_resid"]

    def add(_: Any, __: Any, out: Any) -> Any:
        out = out.clone()
        out[:, -1] += 0.5 * vector
        return out

    for line in (folder / "eval_trials.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = torch.tensor([model.tokenizer(row["prompt"]).input_ids])
        with torch.no_grad():
            base = model.hf(ids).logits[0, -1]
            hook = model.hf.gpt_neox.layers[1].register_forward_hook(add)
            given = model.hf(ids).logits[0, -1]
            hook.remove()
        for side, logits in (("base", base), ("with", given)):
            logprob = torch.log_softmax(logits.double(), -1)[row["target_id"]]
            assert row[f"logprob_{side}"] == pytest.approx(float(logprob), abs=5e-5)
            assert row[f"p_{side}"] == pytest.approx(math.exp(logprob), rel=1e-4)
            assert row[f"logit_{side}"] == pytest.approx(float(logits[row["target_id"]]), abs=5e-5)
            assert row[f"pred_id_{side}"] == int(logits.argmax())
            assert row[f"accuracy_{side}"] == float(logits.argmax() == row["target_id"])
            assert row[f"rank_{side}"] == int((logits > logits[row["target_id"]]).sum())
        assert row["delta_logprob"] == row["logprob_with"] - row["logprob_base"] and row["used_id"] == row["target_id"]
        assert row["leading_space"] and row["answer"] == f" {row['answer'].strip()}"


def test_spaces_are_kept_apart(tmp_path: Path) -> None:
    """What can be added to the residual stream sums to the vector; what lies before the projections cannot be added."""
    folder = fv_runtime(RuntimeConfig(**some("gpt2-xl", 3, tmp_path), save_path_root=tmp_path))
    model, found = golden.model("gpt2-xl"), load(folder / "fv_by_layer.pt")
    mean, top = load(folder / "mean_activations.pt"), load(folder / "top_heads.json")
    vector = load(folder / "fv_global_resid.pt")["fv_global_resid"]
    layers = sorted({row["layer"] for row in top["heads"]})
    assert sorted(found["fv_by_layer"]) == sorted(found["resid_by_layer"]) == layers
    assert found["space"] == {"fv_by_layer": "head_space", "resid_by_layer": "resid"}
    total = torch.stack([found["resid_by_layer"][layer] for layer in layers]).sum(0)
    torch.testing.assert_close(total, vector, rtol=1e-6, atol=1e-5)
    for layer in layers:
        heads = {row["head"] for row in top["heads"] if row["layer"] == layer}
        own = found["fv_by_layer"][layer].view(8, 16)
        for head in range(8):
            assert torch.equal(own[head], mean[layer, head, -1] if head in heads else torch.zeros(16))
        before = FunctionVector(found["fv_by_layer"][layer], "head_space", layer=layer)
        with pytest.raises(ic.PlanError, match="head space"):
            before.to(model)
        bias = model.hf.transformer.h[layer].attn.c_proj.bias.detach()
        added = before.projected(model).vector + len(heads) * bias
        torch.testing.assert_close(added, found["resid_by_layer"][layer], rtol=1e-5, atol=1e-5)
    heads = [(row["layer"], row["head"], row["rank_score"]) for row in top["heads"]]
    assert torch.equal(function_vector(model, mean, heads).vector, vector)


def test_heads_by_either_score(tmp_path: Path) -> None:
    """Both effects are there; the named one ranks."""
    settings = some("tiny-llama2-7b", 3, tmp_path)
    run = fixed_run(settings["fixed_trials_path"], open_tokenizer(settings["model_name"]), **{
        key: settings[key] for key in ("model_name", "fixed_trials_model")
    })  # fmt: skip
    model = golden.model("tiny-llama2-7b")
    tops = {}
    for key in ("mean_delta_p", "mean_delta_logprob"):
        folder = fv_runtime(RuntimeConfig(**settings, score_key=key, save_path_root=tmp_path / key))  # type: ignore[arg-type]
        tops[key] = load(folder / "top_heads.json")
        rows = tops[key]["heads"]
        assert [row["rank_score"] for row in rows] == [row[key] for row in rows]
        assert [row["rank_score"] for row in rows] == sorted((row["rank_score"] for row in rows), reverse=True)
        assert {row["n_trials"] for row in rows} == {3} and {row["score_key"] for row in rows} == {key}
        assert tops[key]["meta"]["k"] == 10 and tops[key]["meta"]["score_key"] == key
    made = extract(model, run)
    for row in tops["mean_delta_p"]["heads"]:
        for key, measure in (("mean_delta_p", "probability"), ("mean_delta_logprob", "logprob")):
            assert row[key] == pytest.approx(float(made.aie(measure)[row["layer"], row["head"]]), rel=1e-5)  # type: ignore[arg-type]
    assert tops["mean_delta_p"]["heads"] != tops["mean_delta_logprob"]["heads"]


@pytest.mark.parametrize("kind", ["corrupted", "clean", "zeroshot"])
def test_replay_and_sweep_answer_alike(kind: str, tmp_path: Path) -> None:
    model = golden.model("tiny-llama3-8b")
    settings = some("tiny-llama3-8b", 3, tmp_path)
    run = fixed_run(settings["fixed_trials_path"], model.tokenizer, model_name="org/tiny-llama3-8b")
    vector = golden.vector("tiny-llama3-8b")
    slow, fast = (answers(model, run, vector, 3, kind=kind, by=by, alpha=2.0) for by in ("replay", "sweep"))  # type: ignore[arg-type]
    for one, two in ((slow.base, fast.base), (slow.steered, fast.steered)):
        assert torch.equal(one.rank, two.rank) and torch.equal(one.pred_id, two.pred_id)
        assert float((one.logits - two.logits).abs().max()) <= 5e-5
        assert float((one.logprob - two.logprob).abs().max()) <= 5e-5
    assert float((slow.base.logprob - slow.steered.logprob).abs().min()) > 1e-3


# Writing


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert put(tmp_path, {"a.json": "1", "b.pt": b"2"}) == [
        f"{tmp_path / 'a.json'}  written", f"{tmp_path / 'b.pt'}  written",
    ]  # fmt: skip
    assert [line.split("  ")[1] for line in put(tmp_path, {"a.json": "1", "b.pt": b"3"})] == [
        "same as before",
        "replaced",
    ]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, {"a.json": "4"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "1", "b.pt": "3"}


def test_a_killed_run_leaves_whole_files(tmp_path: Path) -> None:
    """Killed while it writes: whatever has its name is whole."""
    code = (
        "import sys; from pathlib import Path; from interp_plugins.function_vectors.files.fixed_run import put\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    put(Path(sys.argv[1]), {'big.json': str(n % 10) * 5_000_000})\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = (tmp_path / "big.json").read_text()
    assert len(found) == 5_000_000 and len(set(found)) == 1


def test_trials_that_do_not_fit(tmp_path: Path) -> None:
    """Each named before a model runs."""
    path, tokenizer = toy_trials(tmp_path), open_tokenizer("toy:text")
    data = json.loads(path.read_text())
    data["trials"][2]["trial_id"] = 0
    (tmp_path / "twice.json").write_text(json.dumps(data))
    with pytest.raises(ic.TextError, match=r"twice.json: 2 trials have trial_id 0; number them apart"):
        fixed_run(tmp_path / "twice.json", tokenizer, model_name="toy:text")
    for settings, says in [
        ({"seed": 3}, "seed is 3, the fixed trials of .* have 0; give their file, or 0"),
        ({"n_shots": 10}, "n_shots is 10, .* have 3"),
        ({"n_trials": 10}, "n_trials is 10, .* have 3"),
        ({"dataset_name": "synonym"}, "dataset_name is 'synonym', .* have 'antonym'"),
        ({"model_name": "gpt2"}, "the model is gpt2: make a file .* pass fixed_trials_model=toy:text"),
        ({"fixed_trials_id": ".hidden"}, "fixed_trials_id is '.hidden', which is no name of a folder"),
    ]:
        with pytest.raises(ic.InterpError, match=says):
            fixed_run(path, tokenizer, **{"model_name": "toy:text", **settings})
    run = fixed_run(path, tokenizer, model_name="/some/copy", fixed_trials_model="toy:text", seed=0, n_shots=3)
    assert run.fixed_trials_id == path.stem and run.dataset_name == "antonym" and run.model_name == "/some/copy"


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    """A model that overflows: the head is named, nothing is written."""
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(golden.FOLDER / "tiny-llama3-8b" / "model")
    with torch.no_grad():
        broken.model.layers[2].self_attn.v_proj.weight[-1] = torch.inf
    model = ic.load(broken, tokenizer=golden.model("tiny-llama3-8b").tokenizer, check=False)
    settings = some("tiny-llama3-8b", 2, tmp_path)
    run = fixed_run(settings["fixed_trials_path"], model.tokenizer, model_name="tiny-llama3-8b")
    with pytest.raises(ic.InterpError, match="mean of layer 2, head 6 is no number in float32; load a wider dtype"):
        extract(model, run)
