"""Mean activations equal the published code's: to the bit where the processor computes as the golden one did."""

from __future__ import annotations

from typing import Any

import fv_golden as golden
import pytest
import torch
from conftest import tiny_model
from fv_golden import FAMILIES
from interp_plugins.function_vectors.means import mean_head_activations, mean_layer_activations
from interp_plugins.function_vectors.prompts import Prompt

import interp_core as ic


def published(family: str) -> torch.Tensor:
    """The published algorithm by hand: hooks on the output projections, a whole forward pass per prompt, a store of all."""
    model, wanted = golden.model(family), golden.tensors(family)["mean"]
    kept: list[torch.Tensor] = []
    names = golden.table(family, "run_info")["model_config"]["attn_hook_names"]
    hooks = [
        dict(model.hf.named_modules())[name].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        for name in names
    ]
    rows = [row for row in golden.table(family, "slot_maps") if row["mode"] == "clean"]
    store = torch.zeros(len(rows), *wanted.shape)
    try:
        for number, row in enumerate(rows):
            kept.clear()
            with torch.no_grad():
                model.hf(torch.tensor([row["input_ids"]]))
            z = torch.vstack([x.view(*x.shape[:-1], wanted.shape[1], -1) for x in kept]).permute(0, 2, 1, 3)
            part = z[:, :, [int(at) for at in row["idx_map"]]]
            for first, last in row["idx_avg"].values():
                part[:, :, row["idx_map"][str(first)]] = z[:, :, first : last + 1].mean(2)
            store[number] = part
    finally:
        for hook in hooks:
            hook.remove()
    return store.mean(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_means_equal_the_published_codes(family: str) -> None:
    """To the bit against its algorithm in this process; against its own output as far as processors agree."""
    found = mean_head_activations(golden.model(family), golden.prompts(family, "clean"), batch=1)
    assert torch.equal(found, published(family))
    apart = float((found - golden.tensors(family)["mean"]).abs().max())
    assert apart <= (0.0 if golden.same_arithmetic(family) else 1e-5), apart


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_give_the_same_means(family: str) -> None:
    found = mean_head_activations(golden.model(family), golden.prompts(family, "clean"), batch=4)
    torch.testing.assert_close(found, golden.tensors(family)["mean"], atol=2e-5, rtol=0)


def test_passes_end_with_the_last_heads() -> None:
    """No pass reaches the last layer's MLP, nor the unembedding."""
    model = golden.model("tiny-llama3-8b")
    seen: list[str] = []
    block = model.hf.model.layers[-1]
    spied = {"attention": block.self_attn, "mlp": block.mlp, "head": model.hf.lm_head}
    hooks = [module.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, module in spied.items()]
    try:
        mean_head_activations(model, golden.prompts("tiny-llama3-8b", "clean")[:3])
        assert seen == []  # its output projection is the last thing that is reached, not left
        mean_layer_activations(model, golden.prompts("tiny-llama3-8b", "clean")[:3])
        assert seen == ["attention", "mlp"] * 3
    finally:
        for hook in hooks:
            hook.remove()


def made(lengths: list[int], slots: list[int]) -> Prompt:
    ids = tuple(range(5, 5 + sum(lengths)))
    return Prompt("", ids, ("structural_token",) * len(ids), tuple(slots), " x", (1,))


def test_widths_apart_from_the_model() -> None:
    """d_head × heads is not d_model, grouped queries, half precision, and layers without heads."""
    prompts = [made([1, 2, 1], [0, 1, 1, 2]), made([1, 1, 3], [0, 1, 2, 2, 2])]
    for family, sizes in (("qwen3", {"head_dim": 24}), ("qwen3_next", {})):
        model = tiny_model(family, **sizes)
        found = mean_head_activations(model, prompts)
        layers = model.atlas.layers("z")
        heads = model.atlas.entries["z", layers[0]].sizes
        assert found.shape == (model.n_layers, heads["head"], 3, heads["d_head"])
        z = [model.run(torch.tensor([p.ids]), read=ic.sites.z)[ic.sites.z].as_subclass(torch.Tensor) for p in prompts]
        wanted = (z[0][:, 0, 1:3].mean(1) + z[1][:, 0, 1]) / 2
        torch.testing.assert_close(found[layers, :, 1], wanted)
        without = [layer for layer in range(model.n_layers) if layer not in layers]
        assert not found[without].any()
    half = mean_head_activations(tiny_model("llama", torch.bfloat16), prompts)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([made([2], [0, 1]), made([3], [0, 1, 2])], "prompt 1 has 3 slots, prompt 0 has 2"),
        ([made([3], [0, 2, 1])], "prompt 0: its 3 tokens do not run through slots"),
        ([made([3], [0, 1])], "prompt 0: its 3 tokens do not run"),
    ],
)
def test_bad_input(prompts: Any, message: str) -> None:
    with pytest.raises(ic.PlanError, match=message):
        mean_head_activations(tiny_model("llama"), prompts)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_means(family: str) -> None:
    """Of the prompts that the published code drew by itself."""
    found = mean_layer_activations(golden.model(family), golden.legacy(family, "mean"))
    torch.testing.assert_close(found, golden.tensors(family)["mean_layer_activations_legacy"], atol=1e-5, rtol=0)
