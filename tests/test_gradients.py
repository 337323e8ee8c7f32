"""Gradients of what was read, and edits that are differentiated through."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, tiny_model
from reference import Reference
from tolerances import rounding

import interp_core as ic
from interp_core import sites as S


def scalar(logits: torch.Tensor) -> torch.Tensor:
    return (logits[0, -1, 5] - logits[1, -2, 7]) + logits[:, 3].pow(2).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_by_hand(family: str, ids: torch.Tensor) -> None:
    """By hand: a zero is added to the site by a hand-written hook, and the gradient taken with respect to it."""
    model = tiny_model(family, torch.float64, "eager")
    reference = Reference(family, model.hf)
    names = [name for name in reference.sites() if name != "head_out" and "router" not in name and name != "logits"]
    names = [name for name in names if not (name == "resid_mid" and family == "opt")]  # it has none, by name
    layers = {name: 1 if 1 in reference.layers(name) else reference.layers(name)[0] for name in names}
    sites = {name: S.named(name)[layer] if S.SITES[name].layered else S.named(name) for name, layer in layers.items()}
    reference.shape = ids.shape
    run = model.run(ids, read=list(sites.values()), grad=scalar)
    for name, site in sites.items():
        zero = torch.zeros_like(run[site].as_subclass(torch.Tensor), requires_grad=True)
        with torch.enable_grad(), reference.hooked(name, layers[name], lambda x, zero=zero: x + zero):
            logits = model.hf(input_ids=ids, use_cache=False).logits
            (wanted,) = torch.autograd.grad(scalar(logits), zero)
        far = rounding(model) if family == "gptj" else 1e-9  # whose own function takes the scores in float32
        torch.testing.assert_close(run.grad[site].as_subclass(torch.Tensor), wanted, atol=far, rtol=1e-7)


def test_parts_and_selection(ids: torch.Tensor) -> None:
    model = tiny_model("qwen3")
    whole = model.run(ids, read=[S.z, S.resid_post], grad=scalar)
    part = model.run(ids, read=[S.z[1, 2].at(-1), S.resid_post[0].at([1, 3])], grad=scalar)
    torch.testing.assert_close(part.grad[S.z[1, 2].at(-1)], whole.grad[S.z[1, 2]].at(-1))
    torch.testing.assert_close(part.grad[S.resid_post[0].at([1, 3])], whole.grad[S.resid_post[0]].at([1, 3]))
    assert whole.grad[S.z].shape == (3, 2, 7, 4, 24)
    assert not whole[S.z[0]].requires_grad and not whole.logits.requires_grad
    with pytest.raises(ic.ReadError, match="was not read"):
        whole.grad[S.mlp_out[0]]


def test_of_a_score_each_row_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, texts, words = ic.load("toy:text"), ["Q: big\nA:", "Q: big\nA: small\n\nQ: hot\nA:"], [" small", " cold"]
    both = toy.run(texts, read=S.resid_post[2].at(-1), grad=ic.score.logprob(words)).grad[S.resid_post[2].at(-1)]
    for row, (text, word) in enumerate(zip(texts, words, strict=True)):
        target = int(toy.tokens(word, bos=False).ids[0, 0])
        alone = toy.run(text, read=S.resid_post[2], grad=lambda x, t=target: x[0, -1].log_softmax(-1)[t])
        torch.testing.assert_close(both[row], alone.grad[S.resid_post[2]].at(-1)[0], atol=1e-5, rtol=1e-3)
    kept = toy.run(texts, read=S.resid_post[2].at(-1), grad=ic.score.logprob(words), logits=-1)
    torch.testing.assert_close(kept.grad[S.resid_post[2].at(-1)].plain, both.plain, atol=1e-6, rtol=1e-4)
    monkeypatch.setattr(toy.hf, "forward", None)  # refused before the model runs
    with pytest.raises(ic.PlanError, match="the target 'dry' is 3 tokens"):
        toy.run(texts, read=S.resid_post[2], grad=ic.score.logprob("dry"))


def test_weights_get_no_gradient(ids: torch.Tensor) -> None:
    model = tiny_model("gpt2")
    model.run(ids, read=S.resid_post, grad=scalar)
    assert all(p.grad is None for p in model.hf.parameters())


def test_frozen_weights(ids: torch.Tensor) -> None:
    model = ic.load(ic.testing.tiny("llama").requires_grad_(False))
    free = tiny_model("llama").run(ids, read=[S.embed, S.z[1]], grad=scalar)
    frozen = model.run(ids, read=[S.embed, S.z[1]], grad=scalar)
    torch.testing.assert_close(
        frozen.grad[S.z[1]].as_subclass(torch.Tensor), free.grad[S.z[1]].as_subclass(torch.Tensor)
    )
    torch.testing.assert_close(
        frozen.grad[S.embed].as_subclass(torch.Tensor), free.grad[S.embed].as_subclass(torch.Tensor)
    )


def test_optimising_a_vector_through_an_edit(toy: ic.Model) -> None:
    text = "Q: big\nA:"
    target = toy.tokens(" Katze").ids[0, 0]
    vector = torch.zeros(128, requires_grad=True)
    optimizer = torch.optim.Adam([vector], lr=2.0)
    losses = []
    for _ in range(60):
        run = toy.run(text, edits=S.resid_post[3].at(-1).add(vector), logits=-1, allow_noop=True)
        loss = -torch.log_softmax(run.logits, -1)[0, target]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 < losses[0]
    assert toy.generate(text, edits=S.resid_post[3].at(-1).add(vector.detach()), max_new_tokens=1).texts == [" Katze"]


def test_gradient_through_every_operation(ids: torch.Tensor) -> None:
    model = tiny_model("llama", torch.float64)
    value = torch.randn(64, dtype=torch.float64, requires_grad=True)
    for edit in (S.resid_post[1].set(value), S.resid_mid[1].at(2).add(value), S.mlp_out[0].at([0, 3]).set(value)):
        run = model.run(ids, edits=[edit, S.attn_out[2].scale(0.5), S.z[2, 1].zero()], read=S.resid_post[0], grad=True)
        (grad,) = torch.autograd.grad(run.logits.pow(2).sum(), value)
        assert grad.abs().sum() > 0


def test_what_has_no_gradient_is_refused(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(ic.CapabilityError, match="head_out.* has no gradient: it is computed beside"):
        model.run(ids, read=S.head_out, grad=scalar)
    with pytest.raises(ic.ReadError, match="has no gradients; pass grad"):
        _ = model.run(ids, read=S.z).grad
    with pytest.raises(ic.ReadError, match="returns one number"):
        model.run(ids, read=S.z, grad=lambda logits: logits)


def test_unused_sites_have_zero_gradient(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    run = model.run(ids, read=S.resid_post[2], grad=lambda logits: logits[:, 0].sum())
    assert not run.grad[S.resid_post[2]][:, 1:].any() and run.grad[S.resid_post[2]][:, 0].any()


def test_projections_of_groups_have_gradients(ids: torch.Tensor) -> None:
    """DeepSeek-V4's output projection takes its input group by group, and is differentiated like any other."""
    model = tiny_model("deepseek_v4", torch.float64)
    (layer, *_), step = model.layers(S.mlp_in), 1e-4
    site = S.mlp_in[layer]
    gradient = model.run(ids, read=site, grad=scalar).grad[site].plain
    way = torch.linspace(-1, 1, gradient.numel(), dtype=torch.float64).view_as(gradient)
    ends = [scalar(model.run(ids, edits=site.add(sign * step * way)).logits.plain) for sign in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), (gradient * way).sum(), atol=1e-2, rtol=1e-2)
