"""The evaluation of attribution methods as a recipe: published numbers, its tree, resuming, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from interp_plugins.attribution.evaluation.tables import read_table
from interp_plugins.attribution.files import traces
from interp_recipes.attribution_eval import AttributionEvalConfig, attribution_eval
from interp_recipes.export_traces import ExportTracesConfig, export_traces
from torch import nn
from typer.testing import CliRunner

import interp_core as ic
from interp_core import cli

HERE = DATA / "attribution"
LLAMA = HERE / "models/llama"
GOLDEN = HERE / "traces/golden/tiny_gen_ruler/tiny-llama"
BOTH_MODES = "faithfulness_gen,recovery_ruler"
TIED = ("attnlrp", "ft_attnlrp")
"""Methods with many equal weights, whose order the reference leaves to torch's sort, which processors do differently."""
FUNCTIONS = (
    "ifr_all_positions", "ifr_multi_hop", "ifr_multi_hop_stop_words", "ifr_multi_hop_both", "ifr_multi_hop_split_hop",
    "ifr_in_all_gen", *TIED,
)  # fmt: skip


def run(out: Path, **more: Any) -> Path:
    settings: dict[str, Any] = {
        "datasets": "tiny_gen_ruler", "data_root": HERE / "traces", "output_root": out, "model": "tiny-llama",
        "model_path": str(LLAMA), "mode": BOTH_MODES, "n_hops": 1, "profile": "reference",
    }  # fmt: skip
    return attribution_eval(AttributionEvalConfig(**settings | more))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("eval") / "out", attr_funcs=list(FUNCTIONS), save_hop_traces=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_reference_profile_gives_the_published_traces(tree: Path, function: str) -> None:
    tag = traces.run_tag(function, BOTH_MODES.split(","), 1)
    ours, theirs = (
        next(traces.read_traces(folder / tag)) for folder in (tree / "traces/tiny_gen_ruler/tiny-llama", GOLDEN)
    )
    for form in traces.FORMS:
        np.testing.assert_allclose(ours.vectors[form], theirs.vectors[form], atol=5e-5, rtol=0)
    if theirs.hops is not None:
        assert ours.hops is not None
        np.testing.assert_allclose(ours.hops, theirs.hops, atol=1e-4, rtol=0)
    assert (ours.explained, ours.sink, ours.thinking) == (theirs.explained, theirs.sink, theirs.thinking)
    assert (ours.prompt_len, ours.length, ours.lrp) == (theirs.prompt_len, theirs.length, theirs.lrp)
    assert {k: v.tolist() for k, v in ours.indices.items()} == {k: v.tolist() for k, v in theirs.indices.items()}
    assert ours.faithfulness is not None and theirs.faithfulness is not None
    if function not in TIED:
        np.testing.assert_allclose(ours.faithfulness, theirs.faithfulness, atol=2e-4)
        np.testing.assert_allclose(ours.recovery, theirs.recovery)


def test_the_tree_is_the_published_one(tree: Path) -> None:
    for kind in ("faithfulness", "recovery"):
        folder = tree / kind / "tiny_gen_ruler/tiny-llama"
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"{f}_100_examples.csv" for f in FUNCTIONS)
        for path in folder.iterdir():
            table = read_table(path.read_text())
            assert table.seconds > 0 and (table.used in (None, 1))
    ours = json.loads((tree / "examples/tiny_gen_ruler/tiny-llama/ifr_multi_hop_100_examples.jsonl").read_text())
    assert [row["form"] for row in ours["forms"]] == ["seq", "row", "rec"] and ours["dropped"] == ""
    page = (tree / "summary/tiny_gen_ruler/tiny-llama/all_100_examples.html").read_text()
    assert all(function in page for function in FUNCTIONS)


def test_traces_go_on_to_exports(tree: Path, tmp_path: Path) -> None:
    name = "ifr_multi_hop_both_n1_mfaithfulness_gen+recovery_ruler_1ex"
    export_traces(ExportTracesConfig(trace_dir=tree / "traces/tiny_gen_ruler/tiny-llama" / name, dataset_jsonl=HERE / "traces/tiny_gen_ruler.jsonl", tokenizer_model=str(LLAMA), out_dir=tmp_path))  # fmt: skip
    with (
        np.load(tmp_path / "ex_000000.npz") as ours,
        np.load(HERE / f"exports/proc/tiny-llama/{name}/ex_000000.npz") as theirs,
    ):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype and ours[key].shape == theirs[key].shape
            if theirs[key].dtype.kind == "U" or key.startswith("span"):
                assert (ours[key] == theirs[key]).all()
            else:
                np.testing.assert_allclose(ours[key], theirs[key], atol=2e-4)


def test_a_second_run_evaluates_nothing(tmp_path: Path) -> None:
    out = run(tmp_path / "out", attr_funcs="ifr_span,random", save_hop_traces=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    blocks = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: blocks.append(1) if type(module).__name__ == "LlamaDecoderLayer" else None
    )
    try:
        ic.load(str(LLAMA))
        loading = len(blocks)
        blocks.clear()
        run(tmp_path / "out", attr_funcs="ifr_span,random", save_hop_traces=True)
    finally:
        handle.remove()
    assert loading > 0 and len(before) > 5  # the self-check does run blocks, and there are files to compare
    assert len(blocks) == loading  # the self-check at load, and no example
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp_recipes import attribution_eval as recipe

    calls: list[int] = []
    real = recipe.evaluate

    def stopping(model: Any, example: Any, index: int, *rest: Any) -> Any:
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, example, index, *rest)

    settings: dict[str, Any] = {"datasets": "tiny_gen", "attr_funcs": "ifr_span", "mode": "faithfulness_gen"}
    monkeypatch.setattr(recipe, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", **settings)
    assert not list((tmp_path / "out").rglob("*.csv"))
    run(tmp_path / "out", **settings)
    assert calls == [0, 1, 1]


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"attr_funcs": "ifr_multihop_both"}, ic.PlanError, "no attribution method is called 'ifr_multihop_both'"),
        ({"mode": "faithfulness"}, ic.PlanError, "no mode 'faithfulness'. Did you mean"),
        ({"datasets": "tiny_gen_rules"}, ic.LoadError, "tiny_gen_ruler"),
        ({"n_hops": -1}, ic.PlanError, "n_hops is -1"),
        ({"num_examples": 0}, ic.PlanError, "num_examples is 0"),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(
    settings: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        run(tmp_path / "out", **({"model_path": "no/such/model", "attr_funcs": "ifr_span"} | settings))
    assert not (tmp_path / "out").exists()


def test_recovery_needs_needles(tmp_path: Path) -> None:
    row = json.loads((HERE / "traces/tiny_gen_ruler.jsonl").read_text()) | {"metadata": {}}
    (tmp_path / "math.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ic.PlanError, match="recall of needles, and math has none"):
        run(tmp_path / "out", datasets="math", data_root=tmp_path, model_path="no/such/model")


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    number = torch.cuda.device_count()
    with pytest.raises(ic.PlanError, match=rf"not '{number}': this machine has"):
        run(tmp_path / "out", attr_funcs="ifr_span", cuda=f"{number}")


def test_a_bad_example_is_dropped_or_ends_a_strict_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.loads((HERE / "traces/tiny_gen_ruler.jsonl").read_text())
    bad = good | {"indices_to_explain": [900, 901], "sink_span": [900, 901]}
    rows = [json.dumps(bad), "[1]", json.dumps(good | {"sink_span": [2, 1]}), json.dumps(good), json.dumps(good)[:40]]
    (tmp_path / "mixed.jsonl").write_text("\n".join(rows))
    settings: dict[str, Any] = {"datasets": str(tmp_path / "mixed.jsonl"), "attr_funcs": "ifr_span"}
    out = run(tmp_path / "out", **settings)
    said = capsys.readouterr().err
    assert "dropped example 0" in said and "dropped line 2" in said and "line 5, is no JSON" in said
    (kept,) = (out / "examples").rglob("unreadable_100_examples.jsonl")
    assert [json.loads(line)["line"] for line in kept.read_text().splitlines()] == [2, 3, 5]
    (table,) = (out / "recovery").rglob("ifr_span_100_examples.csv")
    assert read_table(table.read_text()).used == 1
    with pytest.raises(ic.LoadError, match="line 2, is a list"):
        run(tmp_path / "strict", strict=True, **settings)
    (tmp_path / "mixed.jsonl").write_text("\n".join([rows[0], rows[3]]))
    with pytest.raises(ic.TextError, match="makes 33 tokens"):
        run(tmp_path / "strict", strict=True, **settings)
    assert not list((tmp_path / "strict").rglob("*.csv"))


def test_the_reference_needs_a_chat_template(tmp_path: Path) -> None:
    """Said once, before a run is begun that would stand in the way of the next."""
    with pytest.raises(ic.PlanError, match="goes through a chat template, and the tokenizer of toy:text has none"):
        run(tmp_path / "out", attr_funcs="ifr_span", model_path="toy:text", profile="reference")
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(tmp_path: Path) -> None:
    shutil.copy(HERE / "traces/tiny_gen_ruler.jsonl", tmp_path / "needles.jsonl")
    words = [
        "run", "attribution_eval", "--datasets", "needles", "--data_root", str(tmp_path), "--output_root",
        str(tmp_path / "out"), "--model", "label", "--model_path", str(LLAMA), "--num_examples", "1", "--mode",
        "recovery_ruler", "--attr_funcs", "random,ifr_span",
    ]  # fmt: skip
    outcome = CliRunner().invoke(cli.app, words)
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "out/recovery/needles/label/random_1_examples.csv").is_file()
    assert not (tmp_path / "out/traces").exists() and not (tmp_path / "out/faithfulness").exists()
