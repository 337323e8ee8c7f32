"""Injection equals the published code's: logits, log-probabilities, ranks and likelihoods at every layer, and text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import fv_golden as golden
import pytest
import torch
from conftest import tiny_model, toy_model
from fv_golden import FAMILIES
from interp_plugins.function_vectors.effects import Head
from interp_plugins.function_vectors.inject import by_layer, continued, head_injection, injection, scored
from interp_plugins.function_vectors.prompts import Prompt
from interp_plugins.function_vectors.rows import tokens
from interp_plugins.function_vectors.vectors import FunctionVector
from torch import Tensor

import interp_core as ic

KINDS = ("corrupted", "clean", "zeroshot")
CLOSE = 5e-5


@cache
def prompts(family: str, kind: str) -> tuple[Prompt, ...]:
    """The prompts that the reference injected into, all ten."""
    if kind != "zeroshot":
        return golden.prompts(family, kind)
    rows = [r for r in golden.table(family, "injection_trials") if r["prompt_kind"] == kind and r["edit_layer"] == 0]
    encode = golden.model(family).tokenizer
    return tuple(
        replace(trial, text=row["prompt"], ids=tuple(encode(row["prompt"]).input_ids))
        for row, trial in zip(rows, golden.prompts(family, "clean"), strict=True)
    )


def rows(family: str, kind: str, key: str) -> Tensor:
    """A column of the reference's table `[layer trial]`."""
    found = [row[key] for row in golden.table(family, "injection_trials") if row["prompt_kind"] == kind]
    return torch.tensor(found, dtype=torch.float64).reshape(10, 4).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_every_layer(family: str, kind: str) -> None:
    model = golden.model(family)
    wanted = golden.tensors(family)[f"inject_{kind}_with_logits"]
    clean = golden.tensors(family)[f"inject_{kind}_clean_logits"]
    for number, prompt in enumerate(prompts(family, kind)[: min(3, len(clean))]):
        text = tokens([prompt])
        assert float((model.run(text, logits=-1).logits[0] - clean[number]).abs().max()) <= CLOSE
        for layer in range(4):
            run = model.run(text, edits=injection(model, golden.vector(family), layer), logits=-1)
            assert float((run.logits[0] - wanted[number, layer]).abs().max()) <= CLOSE
            assert run.receipts[0].norm == pytest.approx(golden.vector(family).norm, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_at_every_layer(family: str, kind: str) -> None:
    """By sweep, ten prompts at once: ranks exactly (but ties), log-probabilities and likelihoods of whole answers closely."""
    model, made = golden.model(family), prompts(family, kind)
    clean, values = by_layer(model, made, golden.vector(family), "rank")
    for layer, (base, rank) in enumerate(
        zip(rows(family, kind, "base_rank"), rows(family, kind, "with_rank"), strict=True)
    ):
        golden.same_ranks(clean, base, model, made)
        golden.same_ranks(values[layer], rank, model, made, injection(model, golden.vector(family), layer))
    for judged in ("logprob", "nll"):
        clean, values = by_layer(model, made, golden.vector(family), judged)
        assert float((clean - rows(family, kind, f"base_{judged}")).abs().max()) <= CLOSE
        assert float((values - rows(family, kind, f"with_{judged}")).abs().max()) <= CLOSE


def test_several_scores_of_one_sweep() -> None:
    model, made = golden.model("gpt2-xl"), prompts("gpt2-xl", "zeroshot")
    vector = golden.vector("gpt2-xl")
    edits = [injection(model, vector, layer) for layer in range(4)]
    found = scored(model, made, edits, ("rank", "logprob", "probability", "logit"))
    for judged, one in found.items():
        alone = by_layer(model, made, vector, judged)
        torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["logprob"].values.exp(), found["probability"].values)
    with pytest.raises(ic.PlanError, match="ask for it alone"):
        scored(model, made, edits, ("rank", "nll"))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family: str) -> None:
    """Greedy text with the vector at every step, and at the first two."""
    model = golden.model(family)
    for row in golden.table(family, "natural_text_generation"):
        ids = torch.tensor([model.tokenizer(row["sentence"]).input_ids])
        edit = injection(model, golden.vector(family), row["edit_layer"])
        made = continued(model, ids, edit, steps=row.get("num_interv_tokens"), max_new_tokens=row["max_new_tokens"])
        assert [*ids[0].tolist(), *made.ids[0].tolist()] == row["interv_ids"]
        plain = continued(model, ids, max_new_tokens=row["max_new_tokens"])
        assert [*ids[0].tolist(), *plain.ids[0].tolist()] == row["clean_ids"]
        assert made.receipts[0].fired == min(row.get("num_interv_tokens") or 99, row["max_new_tokens"])


def test_token_layers_of_all_layers() -> None:
    """L·T + L(L + 1)/2 at most; a vector after a block joins before the next one."""
    family = "tiny-llama3-8b"
    model, made = golden.model(family), prompts(family, "zeroshot")[:2]
    by_layer(model, made[:1], golden.vector(family))
    seen: list[int] = []
    hooks = [
        block.self_attn.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["hidden_states"].shape[:2].numel()), with_kwargs=True
        )
        for block in model.hf.model.layers
    ]
    try:
        by_layer(model, made, golden.vector(family))
    finally:
        for hook in hooks:
            hook.remove()
    assert sum(seen) == sum(4 * len(p.ids) + 3 + 2 + 1 + 1 for p in made)
    assert sum(seen) <= sum(4 * len(p.ids) + 10 for p in made)


@pytest.mark.parametrize("family", ["gptj", "gemma2", "gpt_oss", "qwen3_next"])
def test_sweep_equals_runs(family: str) -> None:
    """Any site, strength and layers, one vector per layer, on families of other strategies."""
    model = tiny_model(family, torch.float64)
    made = [Prompt("", ids, (), (), "", (7, 9)) for ids in ((5, 17, 33, 8), (9, 54, 12))]
    noise = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    vectors = {layer: FunctionVector(noise[layer]) for layer in (0, 2)}
    for site in ("resid_post", "mlp_out"):
        found = by_layer(model, made, vectors, "logprob", layers=[0, 2], strength=0.5, site=site)
        for row, layer in enumerate((0, 2)):
            for column, prompt in enumerate(made):
                edit = injection(model, vectors[layer], layer, strength=0.5, site=site)
                logits = model.run(tokens([prompt]), edits=edit, logits=-1).logits[0].as_subclass(Tensor)
                wanted = torch.log_softmax(logits, -1)[7]
                torch.testing.assert_close(found.values[row, column], wanted, atol=1e-6, rtol=1e-6)


def test_positions_and_heads() -> None:
    model = toy_model()
    text = model.tokens(["Q: big\nA: small\n\nQ: hot\nA:", "Q: cat\nA:"])
    direction = FunctionVector(torch.linspace(-1, 1, 128))
    run = model.run(text, edits=injection(model, direction, 2, at=ic.PerRow((3, 1)), strength=2.0))
    assert run.receipts[0].positions == ((3,), (1,))
    assert run.receipts[0].norm == pytest.approx(2 * direction.norm * 2**0.5, rel=1e-4)
    mean = torch.randn(6, 4, 2, 32, generator=torch.Generator().manual_seed(0))
    heads = [Head(1, 2, 0.0), Head(3, 0, 0.0)]
    run = model.run(text, read=ic.sites.z, edits=head_injection(mean, heads, model))
    assert torch.equal(run[ic.sites.z[3, 0].at(-1)][1], mean[3, 0, -1])
    added = model.run(text, read=ic.sites.z, edits=head_injection(mean, heads[:1], model, op="add"))
    plain = model.run(text, read=ic.sites.z)
    one = ic.sites.z[1, 2].at(-1)
    torch.testing.assert_close(added[one] - plain[one], mean[1, 2, -1].expand(2, -1), atol=1e-5, rtol=0)


def test_generating_stops_where_the_text_ends() -> None:
    model = toy_model()
    edit = injection(model, FunctionVector(torch.ones(128)), 1)
    every = continued(model, ["Q: big\nA:", "Q: hot\nA:"], edit, steps=9, max_new_tokens=3)
    assert every.ids.shape == (2, 3) and len(every.texts) == 2 and every.receipts[0].fired == 3


def test_bad_input() -> None:
    model, one = tiny_model("llama"), FunctionVector(torch.ones(64))
    prompt = Prompt("", (5, 6), (), (), "", (3,))
    for act, message in (
        (lambda: injection(model, one, 1, site="pattern"), "at sites .batch pos d_model., pattern is"),
        (lambda: injection(model, FunctionVector(torch.ones(3)), 1), "has 3 numbers"),
        (lambda: injection(model, replace(one, kind="head_space", layer=0), 1), "is in head space"),
        (lambda: by_layer(model, [prompt], one, layers=[7]), "7"),
        (lambda: by_layer(model, [replace(prompt, target_ids=())], one), "prompt 0 has no target tokens"),
        (lambda: by_layer(model, [], one), "at least one prompt"),
        (lambda: continued(model, torch.tensor([[5]]), injection(model, one, 1), steps=0), "steps is at least 1"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            act()
