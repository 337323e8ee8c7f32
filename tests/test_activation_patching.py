"""Activation patching finds what carries the toy's answer, and equals runs made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_model, toy_model

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S

CLEAN = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"
CORRUPTED = "Q: big\nA: grand\n\nQ: hot\nA: chaud\n\nQ: wet\nA:"
IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])


def patch(model: ic.Model, x: object, **settings: object) -> object:
    return ic.method("activation_patching")(model, x, **settings)  # type: ignore[arg-type]


def test_it_names_the_heads_that_carry_the_answer() -> None:
    found = patch(toy_model(), CLEAN, corrupted=CORRUPTED)
    assert found.effect.shape == (1, 6, 4, 1)
    best = found.mean.flatten().topk(2)
    assert {divmod(i, 4) for i in best.indices.tolist()} == {(2, 2), (2, 3)}
    assert best.values.sum() > 0.8
    assert "layer 2 head 2" in str(found).splitlines()[1]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize(("site", "at"), [("z", [-1, 2]), ("resid_pre", "all"), ("mlp_out", -1)])
def test_it_equals_runs_by_hand(site: str, at: object, direction: str) -> None:
    model = tiny_model("llama", torch.float64)
    texts = [ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in (IDS, IDS.flip(1))]
    found = patch(
        model, texts[0], corrupted=texts[1], site=site, at=at, direction=direction, answer=[3, 7], other=[9, 11]
    )
    base, source = texts if direction == "noising" else texts[::-1]
    judged = score.logit_diff(torch.tensor([3, 7]), torch.tensor([9, 11]))
    low, high = (judged(model.run(text, logits=-1)) for text in (base, source))
    places = [int(name.split()[0]) for name in found.places]
    for layer, head, place in ((0, 0, 0), (1, min(2, len(found.heads) - 1), len(places) - 1), (2, 0, 0)):
        one = S.named(site)[layer] if found.heads == ("-",) else S.named(site)[layer, head]
        value = model.run(source, read=one)[one].at(places[place]).as_subclass(torch.Tensor)
        changed = judged(model.run(base, edits=one.at(places[place]).set(value), logits=-1))
        torch.testing.assert_close(found.effect[:, layer, head, place], (changed - low) / (high - low))
    torch.testing.assert_close(found.base, low)
    torch.testing.assert_close(found.source, high)


def test_without_another_prompt_it_ablates() -> None:
    model = tiny_model("qwen3")
    found = patch(model, IDS)
    answer = model.run(IDS, logits=-1).logits.as_subclass(torch.Tensor).argmax(-1)
    judged = score.logprob(answer)
    without = judged(model.run(IDS, edits=S.z[1, 3].at(-1).zero(), logits=-1))
    torch.testing.assert_close(found.effect[:, 1, 3, 0], without - found.base, atol=1e-5, rtol=1e-4)
    assert found.direction == "ablation" and torch.equal(found.answer, answer)


@pytest.mark.parametrize("corrupted", [True, False])
@pytest.mark.parametrize("site", ["z", "mlp_out"])
def test_the_gradient_is_that_of_the_patch(site: str, corrupted: bool) -> None:
    """By the gradient of an edit's value there, which takes another way through the engine."""
    model = tiny_model("qwen3", torch.float64)
    texts = [ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in (IDS, IDS.flip(1))]
    more = {"corrupted": texts[1], "other": [9, 11]} if corrupted else {}
    found = patch(model, texts[0], site=site, at=[-1, 3], by="gradient", answer=[3, 7], **more)
    base = texts[1] if corrupted else texts[0]
    targets = (torch.tensor([3, 7]), torch.tensor([9, 11]))
    judged = score.logit_diff(*targets) if corrupted else score.logprob(targets[0])
    one = S.named(site)[1] if site == "mlp_out" else S.z[1, 2]
    value = model.run(base, read=one)[one].at(3).as_subclass(torch.Tensor)
    there = model.run(texts[0], read=one)[one].at(3).as_subclass(torch.Tensor) if corrupted else torch.zeros_like(value)
    step = torch.zeros_like(value).requires_grad_()
    judged(model.run(base, edits=one.at(3).add(step), logits=-1, allow_noop=True)).sum().backward()
    assert step.grad is not None
    scale = found.source - found.base if corrupted else 1.0
    wanted = (step.grad * (there - value)).sum(-1) / scale
    torch.testing.assert_close(found.effect[:, 1, 2 if site == "z" else 0, 1], wanted)


def test_the_gradient_ranks_like_the_sweep_on_the_toy() -> None:
    both = [patch(toy_model(), CLEAN, corrupted=CORRUPTED, by=by).mean.flatten() for by in ("sweep", "gradient")]
    ranks = torch.stack([values.argsort().argsort().float() for values in both])
    assert torch.corrcoef(ranks)[0, 1] > 0.5
    assert set(both[0].topk(2).indices.tolist()) == set(both[1].topk(2).indices.tolist())


def test_the_streams_at_one_layer_make_the_whole_difference() -> None:
    """At the last layer's input, the last position is all that is left."""
    model = toy_model()
    found = patch(model, CLEAN, corrupted=CORRUPTED, site="resid_post", layers=[5], at="all")
    assert float(found.mean[0, -1]) == pytest.approx(1, abs=1e-4)
    assert float(found.mean[0, :-1].abs().max()) < 1e-4


def test_it_passes_the_kit() -> None:
    testing.check_method("activation_patching").raise_if_failed()
    testing.check_method("activation_patching", tiny_model("gpt2"), settings={"site": "mlp_out"}).raise_if_failed()


def test_pictures_and_pages(tmp_path: Path) -> None:
    found = patch(toy_model(), CLEAN, corrupted=CORRUPTED, site="resid_pre", at="all")
    assert found.png(tmp_path / "map.png").stat().st_size > 10_000
    page = found.to_html(tmp_path / "map.html").read_text()
    assert "layer 5" in page and "token-layers" in page
    assert type(found).load(found.save(tmp_path)) == found
    assert len(found.table()) == 6 * 16


def test_bad_input() -> None:
    model = toy_model()
    for settings, message in (
        ({"corrupted": CORRUPTED[:20]}, r"the prompts have \[16\] tokens, the corrupted ones"),
        ({"corrupted": CLEAN}, "row 0 has the answer ' dry' for both prompts"),
        ({"site": "zz"}, "no site is called 'zz'. Did you mean 'z'"),
        ({"site": "pattern"}, "takes sites along pos"),
        ({"site": "router_logits"}, "has no mixture-of-experts router"),
        ({"layers": [9]}, "9"),
        ({"answer": [1, 2]}, "2 answers for 1 rows"),
        ({"at": 40}, "no position 40"),
        ({"direction": "sideways"}, "direction"),
        ({"site": "head_out", "by": "gradient"}, "head_out by gradient: it is computed beside the forward pass"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            patch(model, CLEAN, **settings)
    with pytest.raises(ic.PlanError, match="choose positions that all have"):
        patch(model, [CLEAN, CLEAN[:30]], at="all")
