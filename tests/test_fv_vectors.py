"""Function vectors equal the published ones; they add up, are saved, and are refused where they mean nothing."""

from __future__ import annotations

from pathlib import Path

import fv_golden as golden
import pytest
import torch
from conftest import FAMILIES as ALL
from conftest import tiny_model
from fv_golden import FAMILIES
from interp_plugins.function_vectors.effects import Head, average, indirect_effect, top_heads
from interp_plugins.function_vectors.means import mean_head_activations
from interp_plugins.function_vectors.trials import legacy_trials
from interp_plugins.function_vectors.vectors import (
    FunctionVector,
    function_vector,
    head_space,
    mean_vector,
    similarity,
)

import interp_core as ic
from interp_core import sites as S


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted.flatten()).norm() / wanted.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_equal_the_published_ones(family: str) -> None:
    """From its own means and heads, and from prompts alone; norms as recorded."""
    model, wanted = golden.model(family), golden.tensors(family)["fv"]
    aie = golden.tensors(family)["aie"]
    found = function_vector(model, golden.tensors(family)["mean"], top_heads(aie), task="antonym")
    assert relative(found.vector, wanted) <= 1e-6
    assert found.norm == pytest.approx(golden.table(family, "top_heads_src")["fv_norm"], rel=1e-6)
    mean = mean_head_activations(model, golden.prompts(family, "clean"))
    heads = top_heads(average(indirect_effect(model, golden.prompts(family, "corrupted"), mean)))
    limit = 1e-6 if golden.same_arithmetic(family) else 5e-6  # means of another processor
    assert relative(function_vector(model, mean, heads).vector, wanted) <= limit


@pytest.mark.parametrize("family", ["gpt2-xl", "tiny-pythia"])
def test_the_bias_comes_once_per_head(family: str) -> None:
    model, mean = golden.model(family), golden.tensors(family)["mean"]
    heads = top_heads(golden.tensors(family)["aie"])
    name = golden.table(family, "run_info")["model_config"]["attn_hook_names"]
    bias = [dict(model.hf.named_modules())[path].bias.detach() for path in name]
    vectors = {kind: function_vector(model, mean, heads, bias=kind) for kind in ("per_head", "per_layer", "none")}
    torch.testing.assert_close(
        vectors["per_head"].vector - vectors["none"].vector, sum(bias[head.layer] for head in heads), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        vectors["per_layer"].vector - vectors["none"].vector,
        sum(bias[layer] for layer in {head.layer for head in heads}), atol=1e-5, rtol=0,
    )  # fmt: skip
    assert relative(vectors["none"].vector, golden.tensors(family)["fv"]) > 1e-3


@pytest.mark.parametrize("family", ALL)
def test_all_heads_and_the_bias_are_what_attention_adds(family: str) -> None:
    """On one token, whose mean is its value: through post-norms and multipliers, with d_head × heads apart from d_model."""
    model = tiny_model(family)
    layer = model.atlas.layers("z")[-1]
    run = model.run(torch.tensor([[5, 17, 33]]), read=[S.z[layer].at(-1), S.attn_out[layer].at(-1)])
    z = run[S.z[layer].at(-1)][0]
    mean = torch.zeros(model.n_layers, z.shape[0], 1, z.shape[1])
    mean[layer, :, 0] = z
    heads = [Head(layer, head, 0.0) for head in range(len(z))]
    found = function_vector(model, mean, heads, bias="per_layer", through_post_norm=True)
    torch.testing.assert_close(found.vector, run[S.attn_out[layer].at(-1)][0], atol=2e-5, rtol=1e-4)


def test_through_post_norm_is_no_different_without_one() -> None:
    heads = [Head(1, 2, 0.0)]
    for family, differs in (("llama", False), ("gemma2", True)):
        model = tiny_model(family)
        sizes = model.atlas.entries["z", 0].sizes
        mean = torch.randn(3, sizes["head"], 2, sizes["d_head"], generator=torch.Generator().manual_seed(0))
        plain, through = (function_vector(model, mean, heads, through_post_norm=way) for way in (False, True))
        assert torch.allclose(plain.vector, through.vector, atol=1e-6) is not differs


def made(*numbers: float, task: str = "a", **more: object) -> FunctionVector:
    return FunctionVector(torch.tensor(numbers), task=task, model="m", **more)  # type: ignore[arg-type]


def test_algebra() -> None:
    a, b = made(3.0, 4.0, layer=2, heads=((1, 2, 0.5),)), made(1.0, -1.0, task="b", layer=2)
    assert (a + b - 2.0 * b).vector.tolist() == [2.0, 5.0] and (-a).vector.tolist() == [-3.0, -4.0]
    assert (
        (a - b).task == "a - b" and (2.0 * (a + b)).task == "2 (a + b)" and (a - b).layer == 2 and (a - b).heads == ()
    )
    assert mean_vector([a, b]).vector.tolist() == [2.0, 1.5] and mean_vector([a, b]).task == "mean of a, b"
    assert a.norm == 5 and a.random(1).norm == pytest.approx(5) and a.random(1) == a.random(1) != a.random(2)
    cosines = similarity([a, b, 3.0 * a])
    assert cosines[0, 2] == pytest.approx(1) and cosines[0, 1] == pytest.approx(-1 / (5 * 2**0.5))
    with pytest.raises(ic.PlanError, match="of no vectors"):
        mean_vector([])
    for other, message in (
        (made(1.0), "a is resid of 2 numbers, a resid of 1"),
        (made(1.0, 2.0, kind="head_space", layer=0), "resid of 2 numbers, a head_space of 2"),
    ):
        with pytest.raises(ic.PlanError, match=message):
            a + other
    with pytest.raises(ic.PlanError, match="heads of layers 0 and 1 do not add up"):
        made(1.0, kind="head_space", layer=0) + made(1.0, kind="head_space", layer=1)


def test_saved_and_loaded(tmp_path: Path) -> None:
    family = "tiny-llama2-7b"
    heads = top_heads(golden.tensors(family)["aie"], 3)
    found = function_vector(golden.model(family), golden.tensors(family)["mean"], heads, task="antonym", layer=1)
    again = FunctionVector.load(found.save(tmp_path))
    assert again == found and again.heads == tuple(tuple(h) for h in heads) and again.model.endswith("model")
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "result.safetensors"}


def test_head_space_stays_out_of_the_stream() -> None:
    family = "tiny-llama3-8b"
    model, mean, heads = golden.model(family), golden.tensors(family)["mean"], top_heads(golden.tensors(family)["aie"])
    parts = head_space(model, mean, heads, task="antonym")
    assert set(parts) == {head.layer for head in heads} and all(part.kind == "head_space" for part in parts.values())
    with pytest.raises(ic.PlanError, match="is in head space, before the output projection of layer 0"):
        parts[0].to(model)
    total = sum((part.projected(model).vector for part in parts.values()), torch.zeros(128))
    assert relative(total, golden.tensors(family)["fv"]) <= 1e-6  # no bias in this family
    with pytest.raises(ic.PlanError, match="has 3 numbers .made on m., this model's residual stream 128"):
        made(1.0, 2.0, 3.0).to(model)
    with pytest.raises(ic.PlanError, match="3 numbers are not 8 heads of 16"):
        made(1.0, 2.0, 3.0, kind="head_space", layer=1).projected(model)


def test_bad_heads() -> None:
    model = tiny_model("llama")
    mean = torch.zeros(3, 4, 1, 24)
    with pytest.raises(ic.PlanError, match="at least one head"):
        function_vector(model, mean, [])
    with pytest.raises(ic.SiteError, match="no head 0 in layer 7"):
        function_vector(model, mean, [Head(7, 0, 0.0)])
    with pytest.raises(ic.SiteError, match="no head 9 in layer 1"):
        function_vector(model, mean, [Head(1, 9, 0.0)])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_drawing_by_itself(family: str) -> None:
    """From numpy's stream to the vector: prompts, effects, heads in order, vector."""
    model, wanted = golden.model(family), golden.tensors(family)
    table = golden.table(family, "legacy_stream")
    clean = [t.clean for t in legacy_trials(golden.task(), model.tokenizer, n_trials=10, seed=0, shuffle=False)]
    corrupted = [t.corrupted for t in legacy_trials(golden.task(), model.tokenizer, n_trials=10, seed=0)]
    assert [p.text for p in clean] == table["mean_prompts"] and [p.text for p in corrupted] == table["ie_prompts"]
    mean = mean_head_activations(model, clean)
    effects = indirect_effect(model, corrupted, mean)
    largest = float(wanted["legacy_indirect_effect"].abs().max())
    assert float((effects - wanted["legacy_indirect_effect"]).abs().max()) <= 1e-8 + 1e-4 * largest
    heads = top_heads(average(effects))
    assert [[h.layer, h.head] for h in heads] == [row[:2] for row in table["top_heads"]]
    limit = 1e-6 if golden.same_arithmetic(family) else 5e-6
    assert relative(function_vector(model, mean, heads).vector, wanted["legacy_function_vector"]) <= limit
