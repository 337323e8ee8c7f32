"""Indirect effects equal the published code's, by sweep and by replay, and cost what they change."""

from __future__ import annotations

from typing import Any

import fv_golden as golden
import pytest
import torch
from conftest import tiny_model
from fv_golden import FAMILIES
from interp_plugins.function_vectors.effects import (
    CLASSES,
    average,
    gap,
    indirect_effect,
    indirect_effects,
    ranking,
    token_class,
    top_heads,
    universal,
)
from interp_plugins.function_vectors.prompts import Prompt
from torch import Tensor

import interp_core as ic


def close(found: Tensor, wanted: Tensor) -> None:
    """The stated tolerance: 1e-8 plus a ten-thousandth of the largest effect."""
    limit = 1e-8 + 1e-4 * float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= limit


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_of_the_last_token(family: str) -> None:
    model, wanted = golden.model(family), golden.tensors(family)["ie"]
    found = indirect_effect(model, golden.prompts(family, "corrupted"), golden.tensors(family)["mean"])
    assert found.shape == wanted.shape == (10, 4, 8)
    close(found, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_of_all_token_classes(family: str) -> None:
    model, wanted = golden.model(family), golden.tensors(family)["ie_classes"]
    prompts, mean = golden.prompts(family, "corrupted")[:3], golden.tensors(family)["mean"]
    found = indirect_effect(model, prompts, mean, classes=True)
    assert found.shape == wanted.shape == (3, 4, 8, 10)
    for number in range(len(CLASSES)):  # each by its own largest
        close(found[..., number], wanted[..., number])
    close(found[..., -1], indirect_effect(model, prompts, mean))


def published(family: str, number: int) -> Tensor:
    """The published algorithm by hand: a whole forward pass per layer and head, the projection worked out in its hook."""
    model, mean = golden.model(family), golden.tensors(family)["mean"]
    prompt = golden.prompts(family, "corrupted")[number]
    ids = torch.tensor([prompt.ids])
    names = golden.table(family, "run_info")["model_config"]["attn_hook_names"]
    effects = torch.zeros(mean.shape[:2])
    with torch.no_grad():
        clean = torch.softmax(model.hf(ids).logits[0, -1], -1)[prompt.target_ids[0]]
        for layer, name in enumerate(names):
            module = dict(model.hf.named_modules())[name]
            for head in range(mean.shape[1]):

                def patch(module: Any, args: Any, _: Any, layer: int = layer, head: int = head) -> Tensor:
                    z = args[0].view(*args[0].shape[:-1], mean.shape[1], -1).clone()
                    z[:, -1, head] = mean[layer, head, prompt.slots[-1]]
                    x = z.view(*args[0].shape)
                    if family == "gpt2-xl":
                        return torch.addmm(module.bias, x.squeeze(), module.weight)[None]
                    out = torch.matmul(x, module.weight.T)
                    return out if module.bias is None else out + module.bias

                hook = module.register_forward_hook(patch)
                logits = model.hf(ids).logits[0, -1]
                hook.remove()
                effects[layer, head] = torch.softmax(logits, -1)[prompt.target_ids[0]] - clean
    return effects


@pytest.mark.parametrize("family", FAMILIES)
def test_replay(family: str) -> None:
    """One full forward pass per head, in the published order: to the bit in this process (GPT-NeoX: the published hook
    adds the bias after the product, the model's own module with it), and the golden output where processors agree."""
    model, golden_effects = golden.model(family), golden.tensors(family)["ie"]
    prompts, mean = golden.prompts(family, "corrupted")[:1], golden.tensors(family)["mean"]
    found, wanted = indirect_effect(model, prompts, mean, by="replay"), published(family, 0)
    if family == "tiny-pythia":
        close(found[0], wanted)
    else:
        assert torch.equal(found[0], wanted)
    close(found, golden_effects[:1])
    if golden.same_arithmetic(family) and family != "tiny-pythia":
        assert torch.equal(found, golden_effects[:1])
    if family == "tiny-llama3-8b":
        every = indirect_effect(model, prompts, mean, by="replay", classes=True)
        close(every, golden.tensors(family)["ie_classes"][:1])
        assert torch.equal(every[..., -1], found)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_those_of_the_published_code(family: str) -> None:
    """All heads in order, by raw AIE; the gap where the list is cut."""
    table = golden.table(family, "top_heads_src")
    mean, prompts = golden.tensors(family)["mean"], golden.prompts(family, "corrupted")
    aie = average(indirect_effect(golden.model(family), prompts, mean))
    wanted = golden.tensors(family)["aie"]
    close(aie, wanted)
    heads = top_heads(aie)
    assert [(h.layer, h.head) for h in heads] == [(layer, head) for layer, head, _ in table["top_heads"]]
    assert [round(h.score, 4) for h in heads] == [score for _, _, score in table["top_heads"]]
    assert gap(wanted) == pytest.approx(table["gap_k_to_k1"], rel=1e-3)
    assert [[h.layer, h.head] for h in ranking(wanted)] == [row[:2] for row in table["aie_sorted_full"]]
    from_classes = average(golden.tensors(family)["ie_classes"], "query_predictive")
    assert [[h.layer, h.head] for h in top_heads(from_classes)] == [row[:2] for row in table["top_heads_from_rank4"]]


def test_ties_go_by_layer_then_head() -> None:
    aie = torch.tensor([[0.1, 0.5, torch.nan], [0.5, 0.1, 0.5]])
    assert [(h.layer, h.head) for h in ranking(aie)] == [(0, 1), (1, 0), (1, 2), (0, 0), (1, 1)]
    assert gap(aie, 2) == 0 and gap(aie, 3) == pytest.approx(0.4) and gap(aie, 5) == float("inf")
    with pytest.raises(ic.PlanError, match="k is 6, this model has 5 heads"):
        top_heads(aie, 6)
    assert torch.equal(universal([aie, 3 * aie])[0, :2], torch.tensor([0.2, 1.0]))
    with pytest.raises(ic.PlanError, match="AIEs of one model"):
        universal([aie, aie[:1]])


def test_token_classes() -> None:
    assert [token_class(f"{name}_token") for name in CLASSES[2:]] == list(CLASSES[2:])
    assert (
        token_class("demonstration_10_token") == "demonstration"
        and token_class("demonstration_3_label_token") == "label"
    )
    assert token_class("bos_token") is token_class("instructions_token") is None


def test_token_layers_are_those_of_the_arithmetic() -> None:
    """Counted at the attention modules: one pass over texts filled up to the longest, then one column per head and layer
    from its own on."""
    family = "tiny-llama3-8b"
    model, mean = golden.model(family), golden.tensors(family)["mean"]
    prompts = golden.prompts(family, "corrupted")[:2]
    indirect_effect(model, prompts[:1], mean)  # the strategy is tried on the model once
    seen: list[int] = []
    hooks = [
        block.self_attn.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["hidden_states"].shape[:2].numel()), with_kwargs=True
        )
        for block in model.hf.model.layers
    ]
    try:
        indirect_effect(model, prompts, mean)
    finally:
        for hook in hooks:
            hook.remove()
    layers, heads = 4, 8
    width = max(len(prompt.ids) for prompt in prompts)
    assert sum(seen) == len(prompts) * (width * layers + heads * layers * (layers + 1) // 2)


def made(slots: list[int], target: tuple[int, ...] = (3,)) -> Prompt:
    return Prompt(
        "", tuple(range(5, 5 + len(slots))), ("query_predictive_token",) * len(slots), tuple(slots), "", target
    )


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next", "granitemoe", "opt"])
def test_sweep_and_replay_agree_on_other_families(family: str) -> None:
    """Post-norms, layers without heads, multipliers, biases; in float64, where rounding is out of the way."""
    model = tiny_model(family, torch.float64)
    sizes = model.atlas.entries["z", model.atlas.layers("z")[0]].sizes
    mean = torch.randn(model.n_layers, sizes["head"], 4, sizes["d_head"], generator=torch.Generator().manual_seed(0))
    prompts = [made([0, 1, 1, 2, 3]), made([0, 1, 2, 3], (9,))]
    for classes in (False, True):
        swept, replayed = (indirect_effect(model, prompts, mean, classes=classes, by=by) for by in ("sweep", "replay"))
        torch.testing.assert_close(swept, replayed, equal_nan=True, atol=1e-7, rtol=1e-5)
    lacking = [layer for layer in range(model.n_layers) if layer not in model.atlas.layers("z")]
    assert swept[:, lacking].isnan().all() and not swept[:, model.atlas.layers("z")].isnan().any()
    assert len(ranking(average(swept))) == len(model.heads)


def test_measures() -> None:
    model = tiny_model("llama", torch.float64)
    mean = torch.randn(3, 4, 3, 24, generator=torch.Generator().manual_seed(0))
    prompts = [made([0, 1, 2])]
    every = indirect_effects(model, prompts, mean)
    logit, logprob, probability = (every[m].effects for m in ("logit", "logprob", "probability"))
    for measure, (base, effects) in every.items():
        torch.testing.assert_close(effects, indirect_effect(model, prompts, mean, measure=measure))
        replayed = indirect_effects(model, prompts, mean, (measure,), by="replay")[measure]
        torch.testing.assert_close(replayed, (base, effects), atol=1e-7, rtol=1e-5)
    clean = model.run(torch.tensor([prompts[0].ids]), logits=-1).logits[0].as_subclass(Tensor)
    start = torch.log_softmax(clean, -1)[3]
    torch.testing.assert_close((start + logprob).exp() - start.exp(), probability)
    assert not torch.allclose(logit, logprob)


@pytest.mark.parametrize(
    ("prompts", "shape", "message"),
    [
        ([made([0, 1])], (3, 4, 3, 24), "prompt 0 ends in slot 1, the means have slots 0 to 2"),
        (
            [made([0, 1])],
            (3, 4, 2, 8),
            r"the means are \[3, 4, 2, 8\], this model needs \[layer 3, head 4, slot, d_head 24\]",
        ),
        ([made([0, 1], ())], (3, 4, 2, 24), "prompt 0 has no target tokens"),
        ([], (3, 4, 2, 24), "at least one prompt"),
    ],
)
def test_bad_input(prompts: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ic.PlanError, match=message):
        indirect_effect(tiny_model("llama"), prompts, torch.zeros(shape))
