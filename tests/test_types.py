"""Every causal model type of transformers: it is built, it opens or is refused by name, and what it serves is true.

`matrix.row` measures a type on an engine by hooks written by hand; the file that docs/compatibility.md shows is what was
measured, and no row may get worse. The fast suite has a fixed sample; `slow` has all of them, on all engines.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import pytest
import torch
from matrix import row
from parity import IDS
from typer.testing import CliRunner

import interp_core as ic
from interp_core import compatibility, testing
from interp_core import sites as S
from interp_core.cli import app
from interp_core.compatibility import ENGINES, WORDS, matrix, sites_of
from interp_core.sites import Site
from interp_core.testing.types import types, visual

SAMPLE = (
    "afmoe", "axk2", "bart", "bert", "bitnet", "cohere", "codegen", "dbrx", "deepseek_v32", "dots3_note_text", "falcon",
    "gemma4_unified_text", "glm4", "gpt_bigcode", "jamba", "laguna", "lfm2", "llama", "mamba", "mimo_v2_flash",
    "minicpm3", "modernbert-decoder", "persimmon", "qwen3_moe", "youtu",
)  # fmt: skip
SPARSE = ("deepseek_v32", "glm_moe_dsa")
"""Types whose attention sees the keys that an indexer chooses."""
MEASURED = matrix()["versions"]["transformers"]
CASES = [
    pytest.param(name, engine, marks=[] if name in SAMPLE and engine == "torch" else [pytest.mark.slow])
    for name in [*types(), *visual()]
    for engine in ENGINES
]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # as bridges call modules
@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")  # as Llama 4's tower is built
@pytest.mark.parametrize(("model_type", "engine"), CASES)
def test_what_is_served_is_true_and_no_row_gets_worse(model_type: str, engine: str) -> None:
    cell = row(model_type, engine)
    assert "false" not in cell, cell
    if version("transformers") != MEASURED:  # which has other types, and others of what it has
        pytest.skip(f"rows are those of transformers {MEASURED}; install that, or measure anew")
    known = (matrix()["types"] | matrix()["visual"])[model_type][engine]
    words = list(WORDS)
    assert words.index(cell["word"]) <= words.index(known["word"]), (cell, known)
    assert set(known.get("held", "").split()) <= set(cell.get("held", "").split())
    assert set(sites_of(known)) <= set(sites_of(cell))


def test_how_much() -> None:
    types_known = matrix()["types"]
    assert len(types_known) >= 189
    cells = [row["torch"] for row in types_known.values()]
    loaded = [cell for cell in cells if cell["word"] in ("verified", "partial")]
    assert len(loaded) >= 130 and sum(cell["word"] == "refused" for cell in cells) <= 40
    assert sum({"z", "pattern"} <= set(sites_of(cell)) for cell in loaded) >= 110
    assert sum("router_weights" in sites_of(cell) for cell in loaded) >= 30
    assert not any("false" in row[engine] for row in types_known.values() for engine in ENGINES)
    assert all(cell["why"] for cell in cells if cell["word"] in ("refused", "not built"))


def test_tiny_models_have_sizes_that_tell_their_axes_apart() -> None:
    hf = testing.tiny("qwen3_moe")
    again = testing.tiny("qwen3_moe")
    assert all(torch.equal(a, b) for a, b in zip(hf.parameters(), again.parameters(), strict=True))
    built = testing.types.build("glm4_moe", {})
    config = built.config
    sizes = (
        config.num_key_value_heads, config.num_experts_per_tok, config.num_attention_heads, config.n_routed_experts,
        config.moe_intermediate_size, config.hidden_size, config.intermediate_size,
    )  # fmt: skip
    assert len(set(sizes)) == len(sizes)
    with pytest.raises(ic.LoadError, match="transformers cannot build a tiny arcee: "):
        testing.tiny("arcee", hidden_act="no such")
    with pytest.raises(ic.LoadError, match=r"no tiny model of 'mambo'\. Did you mean 'mamba"):
        testing.tiny("mambo")


@pytest.mark.parametrize("model_type", SPARSE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_open_attention_sees_the_keys_that_the_indexer_chose(model_type: str, attention: str) -> None:
    hf = testing.tiny(model_type)
    hf.set_attn_implementation(attention)
    model = ic.load(hf)
    plain = model.run(IDS).logits
    run = model.run(IDS, read=S.pattern, edits=S.z.scale(1.0), allow_noop=True)
    assert torch.allclose(run.logits, plain, atol=1e-4)
    chosen = hf.config.index_topk
    assert IDS.shape[1] > chosen
    assert (run[Site("pattern")] > 0).sum(-1).max() == chosen
    assert not model.can("scores", "write")  # the self-check edits a score that the indexer shows


@pytest.mark.parametrize("seed", range(3))
def test_parts_beside_others_add_up_by_the_rounding_of_those(seed: int) -> None:
    model = ic.load(testing.tiny("granitemoehybrid", dtype=torch.float64, seed=seed))
    assert model.atlas.layers("mlp_out") == [0, 1, 2]


def test_several_streams_are_no_site(ids: torch.Tensor) -> None:
    model = ic.load(testing.tiny("deepseek_v4"))
    with pytest.raises(ic.CapabilityError, match="the model has several residual streams, and a site is of one"):
        model.run(ids, read=S.resid_post)


def interp(*words: str) -> Any:
    return CliRunner().invoke(app, ["families", *words])


def test_families_on_the_command_line() -> None:
    shown = interp()
    assert shown.exit_code == 0
    assert "llama" in shown.output and "false" not in shown.output
    assert all(sentence in shown.output for sentence in compatibility.counts(matrix()["types"]))
    one = interp("xmod").output
    assert "torch: partial" in one and "missing mlp_out: an adapter of the language reads the sum" in one
    assert json.loads(interp("xmod", "--json").output)["torch"]["word"] == "partial"
    assert json.loads(interp("--json").output) == {part: matrix()[part] for part in ("types", "visual")}
    images = matrix()["visual"]
    assert all(name in shown.output for name in images) and compatibility.counts_of_images(images) in shown.output
    for name in matrix()["types"] | matrix()["visual"]:
        assert compatibility.of_type(name).startswith(name)
    wrong = interp("falcan")
    assert isinstance(wrong.exception, ic.LoadError) and "Did you mean 'falcon'" in str(wrong.exception)
