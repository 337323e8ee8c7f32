"""Attribution patching: gradients by hand, integrals that add up to what is patched, and how well they rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from interp_plugins.attribution.relevance import rules
from interp_plugins.attribution_patching import agreement
from studying import ANSWERS, CLEAN, FRENCH, IDS, JUDGED, OTHER, study, tokens
from tolerances import close

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S


def attribute(model: ic.Model, *x: Any, **settings: Any) -> Any:
    return study("attribution_patching", model, *x, **settings)


def slope(model: ic.Model, base: ic.Tokens, one: S.Site, place: int, before: list[ic.Edit], by: score.Score) -> Any:
    """Gradient of the score by what is added at a place, which takes another way through the engine than a read."""
    value = model.run(base, read=one)[one].at(place).as_subclass(torch.Tensor)
    step = torch.zeros_like(value).requires_grad_()
    edits = [*before, one.at(place).add(step)]
    by(model.run(base, edits=edits, logits=-1, allow_noop=True)).sum().backward()
    return value, step.grad


@pytest.mark.parametrize("corrupted", [True, False])
@pytest.mark.parametrize("site", ["z", "mlp_out", "resid_mid"])
def test_the_gradient_is_that_of_the_patch(site: str, corrupted: bool) -> None:
    model = tiny_model("qwen3", torch.float64)
    settings: dict[str, Any] = {"answer": [3, 7]} if not corrupted else {"corrupted": tokens(OTHER), **ANSWERS}
    found = attribute(model, tokens(IDS), site=site, at=[-1, 3], **settings)
    base = tokens(OTHER) if corrupted else tokens(IDS)
    by = JUDGED if corrupted else score.logprob(torch.tensor([3, 7]))
    one = S.z[1, 2] if site == "z" else S.named(site)[1]
    value, grad = slope(model, base, one, 3, [], by)
    there = model.run(IDS, read=one)[one].at(3).as_subclass(torch.Tensor) if corrupted else torch.zeros_like(value)
    scale = found.source - found.base if corrupted else 1.0
    close(found.effect[:, 1, 2 if site == "z" else 0, 1], (grad * (there - value)).sum(-1) / scale, model)


def test_the_integral_along_the_inputs_by_hand() -> None:
    """Gradients at runs whose first stream is on the way, by hooks on the model itself."""
    model = tiny_model("llama", torch.float64)
    steps = 3
    found = attribute(model, site="mlp_out", at=[4], steps=steps)
    held: dict[str, torch.Tensor] = {}
    blocks = model.hf.model.layers

    def run(ids: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
        def entering(_m: Any, args: Any) -> Any:
            held["start"] = args[0]
            return None if start is None else (start, *args[1:])

        def leaving(_m: Any, _a: Any, out: torch.Tensor) -> None:
            held["mlp"] = out
            out.retain_grad()

        handles = [blocks[0].register_forward_pre_hook(entering), blocks[1].mlp.register_forward_hook(leaving)]
        try:
            return model.hf(ids).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()

    ends = []
    for ids in (OTHER, IDS):
        run(ids, None)
        ends.append((held["start"].detach(), held["mlp"].detach()))
    (x, before), (y, after) = ends
    total = torch.zeros_like(before)
    for k in range(steps):
        logits = run(OTHER, x + (k + 0.5) / steps * (y - x))
        JUDGED.rows(logits).sum().backward()
        total += held["mlp"].grad / steps
    model.hf.zero_grad()
    wanted = ((after - before) * total)[:, 4].sum(-1) / (found.source - found.base)
    close(found.effect[:, 1, 0, 0], wanted, model)


@pytest.mark.parametrize(
    ("site", "at"),
    [
        ("z", "each"),
        ("mlp_out", [2, -1]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("z", -1), ("resid_pre", "each"), ("resid_post", "all"))
        ),
    ],
)
def test_effects_along_the_activations_add_up(site: str, at: Any) -> None:
    """Completeness: in each layer they make up the effect of patching all heads and places together."""
    model = tiny_model("llama", torch.float64)
    fine = attribute(model, site=site, at=at, steps=64, along="activations")
    together = [2, -1] if at == [2, -1] else ("all" if at == "each" else at)
    whole = study("activation_patching", model, site=site, at=[together], by="layer")
    far = (fine.effect.sum((2, 3)) - whole.effect.sum((2, 3))).abs().max()
    assert far < 1e-2 * whole.effect.abs().max()
    coarse = attribute(model, site=site, at=at, steps=8, along="activations")
    assert far < (coarse.effect.sum((2, 3)) - whole.effect.sum((2, 3))).abs().max()


def test_one_head_alone_is_exact_as_steps_grow() -> None:
    model = tiny_model("gpt2", torch.float64)
    found = attribute(model, site="attn_out", layers=[1], at=4, steps=100, along="activations", compare=True)
    torch.testing.assert_close(found.effect, found.exact, atol=1e-4, rtol=1e-3)
    assert found.pearson is not None and found.pearson.isnan().all()  # of a single patch there is no correlation


def test_it_ranks_like_the_sweep_on_the_toy() -> None:
    found = attribute(toy_model(), CLEAN, corrupted=FRENCH, compare=True, top_k=2)
    exact = study("activation_patching", toy_model(), CLEAN, corrupted=FRENCH)
    assert torch.equal(found.exact, exact.effect)
    assert float(found.spearman) > 0.85 and float(found.pearson) > 0.98 and float(found.overlap) == 1.0
    better = attribute(toy_model(), CLEAN, corrupted=FRENCH, compare=True, steps=8, along="activations")
    assert float(better.pearson) > float(found.pearson) and float(better.spearman) > float(found.spearman)
    assert "Pearson 0.99" in str(found) and "Spearman 0.9" in found.agreement


def test_agreement_by_hand() -> None:
    """Ties share their mean rank; a side that is the same everywhere correlates with nothing."""
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])[:, :, None, None]
    b = torch.tensor([[1.0, 3.0, 2.0, -9.0], [4.0, 3.0, 2.0, 1.0]])[:, :, None, None]
    found = agreement(a, b, 2)
    assert float(found.pearson[0]) == pytest.approx(
        float(torch.corrcoef(torch.stack([a[0].flatten(), b[0].flatten()]))[0, 1])
    )
    assert float(found.spearman[0]) == pytest.approx(-0.4)  # ranks 1 2 3 4 and 2 4 3 1: 1 - 6 · 14 / (4 · 15)
    assert float(found.overlap[0]) == 0.5
    assert found.pearson[1].isnan() and found.spearman[1].isnan()
    noise = torch.tensor([[5.0, 4.0, 1e-7, -1e-7, 2e-7]])[:, :, None, None]
    assert float(agreement(noise, noise[:, [0, 1, 4, 2, 3]], 2).spearman) == pytest.approx(1)


def test_sites_together_are_the_sum_of_their_gradients() -> None:
    model = tiny_model("llama", torch.float64)
    both = attribute(model, site=["attn_out", "mlp_out"], at=[2, -1])
    parts = [attribute(model, site=site, at=[2, -1]).effect for site in ("attn_out", "mlp_out")]
    close(both.effect, parts[0] + parts[1], model)


def test_hidden_scores_do_no_harm() -> None:
    """Scores that the mask hides are minus infinity in both runs."""
    found = attribute(tiny_model("llama", torch.float64), site="scores", at=-1)
    assert torch.isfinite(found.effect).all() and found.effect.any()


def test_other_engines_give_the_same() -> None:
    hf = testing.tiny("llama")
    both = [attribute(ic.load(hf, engine=engine), at=[2, -1], steps=2) for engine in ("torch", "nnsight")]
    torch.testing.assert_close(both[0].effect, both[1].effect, atol=1e-5, rtol=1e-4)


KIT = ("toy:text", "gpt2", "llama", "qwen3_moe")
SETTINGS: dict[str, dict[str, Any]] = {
    "zeros": {},
    "compared": {"corrupted": True, "steps": 2, "compare": True},
    "along": {"corrupted": True, "steps": 2, "along": "activations", "at": "each"},
}
FAST = {("gpt2", "zeros"), ("toy:text", "compared"), ("qwen3_moe", "along")}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, name) in FAST else pytest.mark.slow)
        for family in KIT
        for name in SETTINGS
    ],
)
def test_it_passes_the_kit(family: str, name: str) -> None:
    model = toy_model() if ":" in family else tiny_model(family)
    other = "Q: dog\nA: cats\n\nQ: hot\nA:" if ":" in family else tokens(OTHER[:1])
    settings = {key: other if key == "corrupted" else value for key, value in SETTINGS[name].items()}
    testing.check_method("attribution_patching", model, settings=settings).raise_if_failed()


def test_pictures_and_pages(tmp_path: Path) -> None:
    found = attribute(toy_model(), CLEAN, corrupted=FRENCH, compare=True)
    assert found.png(tmp_path / "map.png").stat().st_size > 10_000
    page = found.to_html(tmp_path / "map.html").read_text()
    assert "by gradient; against the sweep: Pearson 0.99" in page and "by sweep<" in page
    assert page.count("<table class='grid'") == 2 and page.count("-55%<span") == 2  # one scale for both
    assert type(found).load(found.save(tmp_path)) == found
    assert {"effect", "exact"} <= set(found.table()[0])
    alone = attribute(toy_model(), CLEAN, corrupted=FRENCH)
    assert alone.exact is None and alone.agreement == "" and "exact" not in alone.table()[0]
    assert type(alone).load(alone.save(tmp_path)) == alone


def test_bad_input() -> None:
    model = toy_model()
    for settings, message in (
        ({"site": "head_out"}, "head_out: it is computed beside the forward pass; use activation_patching"),
        ({"steps": -1}, "steps=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"along": "weights"}, "'inputs' or 'activations'"),
        ({"score": score.rank(3)}, "score rank has no gradient"),
        ({"score": score.projection(S.resid_pre[1].at(-1), torch.ones(128))}, "gradients go from logits"),
        ({"corrupted": FRENCH[:20]}, "attribution_patching: the prompts have"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            attribute(model, CLEAN, **settings)


RELP = (["ln"], ["ln", "half"], ["ln", "identity", "half"], ["ln", "identity", "half", "ah"])


@pytest.mark.parametrize("chosen", RELP)
def test_relp_is_the_difference_times_the_coefficient(chosen: list[str]) -> None:
    """The coefficient is the gradient under the rules at the base run; the sweep and its comparison stay the model's."""
    model = tiny_model("qwen3", torch.float64)
    settings: dict[str, Any] = {"site": "mlp_out", "at": [3], "corrupted": tokens(OTHER), **ANSWERS}
    ours = attribute(model, tokens(IDS), rule="relp", relp_rules=chosen, compare=True, **settings)
    plain = attribute(model, tokens(IDS), compare=True, **settings)
    with rules.relp(chosen).on(model):
        run = model.run(OTHER, read=S.mlp_out, grad=lambda logits: JUDGED.rows(logits[:, -1]).sum())
    there = model.run(IDS, read=S.mlp_out)
    for layer in range(3):
        site = S.mlp_out[layer]
        wanted = ((there[site].plain - run[site].plain) * run.grad[site].plain)[:, 3].sum(-1)
        wanted = wanted / (ours.source - ours.base)
        close(ours.effect[:, layer, 0, 0], wanted, model)
    assert torch.equal(ours.exact, plain.exact) and not torch.allclose(ours.effect, plain.effect, rtol=1e-3)
    assert str(rules.relp(chosen)) in ours.title and ours.rules and not plain.rules and "gradient" in plain.title


def test_relp_of_a_turned_vector_is_exact() -> None:
    """m = w · RMSNorm(y) with y_c across y_r and as long: 1.41421, where the gradient gives 2.82843; over random pairs
    RelP is the effect, and the gradient correlates with it by 1/√2."""
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    base, other = torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 3.0], dtype=torch.float64)

    def m(y: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
        return (weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True)))).sum(-1)

    for chosen, wanted in ((rules.relp(("ln",)), 1.41421), (rules.GRADIENT, 2.82843)):
        grad = gradient_inside(m, base, chosen)
        assert float(((other - base) * grad).sum()) == pytest.approx(wanted, abs=1e-5)
    assert float(m(other) - m(base)) == pytest.approx(1.41421, abs=1e-5)
    pick = torch.Generator().manual_seed(0)
    weight, base, other = (torch.randn(4000, 64, generator=pick, dtype=torch.float64) for _ in range(3))
    other = other - (other * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True) * base
    other = other * base.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True)
    exact = m(other, weight) - m(base, weight)
    found = [
        ((other - base) * gradient_inside(lambda y: m(y, weight), base, chosen)).sum(-1)
        for chosen in (rules.relp(("ln",)), rules.GRADIENT)
    ]
    torch.testing.assert_close(found[0], exact, atol=1e-10, rtol=0)
    assert float(ic.stats.pearson(found[1], exact)) == pytest.approx(0.7071, abs=0.03)


def gradient_inside(function: Any, y: torch.Tensor, chosen: rules.Rules) -> torch.Tensor:
    """Gradient of a function's sum where a model under rules would compute it."""
    model, grads = ic.load(testing.tiny("llama"), check=False), list[torch.Tensor]()
    leaf = y.clone().requires_grad_()

    def computing(module: Any, forward: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            grads.append(torch.autograd.grad(function(leaf).sum(), leaf)[0])
        return forward(x)

    own = model.hf.model.layers[0].mlp.forward
    model.hf.model.layers[0].mlp.forward = lambda x: computing(None, own, x)
    with chosen.on(model):
        model.run(IDS)
    return grads[0]


def test_half_leaves_an_activation_whole() -> None:
    """GPT-2 has no gated product: "half" changes nothing there, though its GELU is made of products."""
    ones = [attribute(tiny_model("gpt2"), rule="relp", relp_rules=chosen).effect for chosen in (["ln"], ["ln", "half"])]
    assert torch.equal(*ones)


def test_relp_by_name_and_what_it_refuses() -> None:
    model = tiny_model("llama")
    assert attribute(model, rule="relp").rules == "relp:ln+identity+half (norm, activation, product halved)"
    demo = attribute(model, rule="relp", relp_rules="published_demo")
    assert demo.rules == "relp:ln+half (norm, product halved)"
    with pytest.raises(ic.PlanError, match="RelP has no rule 'identiy'. Did you mean 'identity'"):
        attribute(model, rule="relp", relp_rules=["identiy"])
    with pytest.raises(ic.PlanError, match="leave steps out"):
        attribute(model, rule="relp", steps=4)
