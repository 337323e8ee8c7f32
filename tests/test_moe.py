"""Routers: an edit really re-routes, and a banned expert is never executed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from conftest import tiny_model
from layouts import DENSE, LAYOUT, SHARED
from routed import GROUPED, route

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

MIXTURES = sorted(DENSE)


def model() -> ic.Model:
    return tiny_model("qwen3_moe")


def test_sites_and_dense_layers(ids: torch.Tensor) -> None:
    assert model().atlas.layers("router_logits") == [0, 2]
    run = model().run(ids, read=[S.router_logits, S.router_weights])
    assert run[S.router_logits[0]].shape == (2, 7, 6)
    weights = run[S.router_weights[2]]
    assert ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7))
    assert run[S.router_logits].shape == (2, 2, 7, 6)
    with pytest.raises(ic.SiteError, match="layer 1 has no router_logits; layers 0, 2 have"):
        model().run(ids, edits=S.router_logits[1].mask(0))


def test_experts_add_up_to_the_mlp(ids: torch.Tensor) -> None:
    run = model().run(ids, read=[S.expert_out[0], S.expert_out[2, 3], S.mlp_out, S.router_weights])
    torch.testing.assert_close(
        run[S.expert_out[0]].sum(2), run[S.mlp_out[0]].as_subclass(torch.Tensor), atol=1e-5, rtol=1e-4
    )
    idle = run[S.router_weights[2]][..., 3] == 0
    assert not run[S.expert_out[2, 3]][idle].any() and run[S.expert_out[2, 3]][~idle].any()


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_add_up_to_the_mlp_in_every_family(family: str, ids: torch.Tensor) -> None:
    """Executed weights have k entries, and experts' outputs, with the shared expert's, are the block's."""
    model = tiny_model(family, torch.float64)
    layer = model.atlas.layers("router_weights")[-1]
    run = model.run(ids, read=[S.expert_out[layer], S.mlp_in[layer], S.mlp_out[layer], S.router_weights[layer]])
    config = model.hf.config.get_text_config()
    weights = run[S.router_weights[layer]].as_subclass(torch.Tensor)
    assert ((weights != 0).sum(-1) == config.num_experts_per_tok).all()
    total = run[S.expert_out[layer]].sum(2)
    block = model.hf.get_submodule(f"{LAYOUT[family]['blocks']}.{layer}")
    if family in SHARED:
        shared, gate = SHARED[family]
        x = run[S.mlp_in[layer]].as_subclass(torch.Tensor)
        with torch.no_grad():
            every = block.get_submodule(shared)(x)
            total = total + (every if gate is None else torch.sigmoid(block.get_submodule(gate)(x)) * every)
    total = total * getattr(config, "residual_multiplier", 1)
    torch.testing.assert_close(total, run[S.mlp_out[layer]].as_subclass(torch.Tensor), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("family", MIXTURES)
def test_what_can_only_be_read(family: str, ids: torch.Tensor) -> None:
    """Probabilities of the family's own scores, the executed set in the router's order, the shared expert's gate."""
    model = tiny_model(family)
    layer = model.atlas.layers("router_logits")[-1]
    read = [S.router_logits[layer], S.router_probs[layer], S.router_weights[layer], S.router_indices[layer]]
    run = model.run(ids, read=read)
    logits, probs, weights, chosen = (run[site].as_subclass(torch.Tensor) for site in read)
    scores = logits.sigmoid() if family in (*GROUPED, "llama4") else logits.exp()
    torch.testing.assert_close(probs, scores / scores.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)
    assert torch.equal(weights != 0, torch.zeros_like(weights).scatter(-1, chosen, 1) != 0)
    assert chosen.dtype == torch.long and chosen.shape[-1] == model.hf.config.get_text_config().num_experts_per_tok
    gate = SHARED.get(family, ("", None))[1]
    if gate is None:
        assert "no gate on a shared expert" in model.can("shared_expert_gate", "read")
    else:
        run = model.run(ids, read=[S.shared_expert_gate[layer], S.mlp_in[layer]])
        module = model.hf.get_submodule(f"{LAYOUT[family]['blocks']}.{layer}.{gate}")
        with torch.no_grad():
            wanted = torch.sigmoid(module(run[S.mlp_in[layer]].as_subclass(torch.Tensor)))
        torch.testing.assert_close(run[S.shared_expert_gate[layer]].as_subclass(torch.Tensor), wanted)
    for site in (S.router_probs, S.router_indices):
        with pytest.raises(ic.CapabilityError, match="is only read; edit router_logits or router_weights"):
            model.run(ids, edits=site[layer].scale(2.0))


@contextmanager
def poisoned(hf: torch.nn.Module, family: str, experts: Sequence[int], fill: float) -> Iterator[None]:
    """All weights of these experts replaced, in every layer."""
    held = []
    for layer in (i for i in range(3) if i not in DENSE[family]):
        module = hf.get_submodule(f"{LAYOUT[family]['blocks']}.{layer}.{LAYOUT[family]['experts']}")
        held += [(weight, weight.data.clone()) for weight in module.parameters()]
    for weight, _ in held:
        weight.data[list(experts)] = fill
    try:
        yield
    finally:
        for weight, before in held:
            weight.data.copy_(before)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_banned_expert_is_executed_zero_times(family: str, ids: torch.Tensor) -> None:
    clean = tiny_model(family)
    n = clean.atlas.entries["router_logits", clean.atlas.layers("router_logits")[0]].n_units
    used = clean.run(ids, read=S.router_weights)[S.router_weights].as_subclass(torch.Tensor).flatten(0, 2).any(0)
    assert int(used.sum()) >= n - 1  # the ban takes something away
    k = clean.hf.config.get_text_config().num_experts_per_tok
    for expert in range(n):
        ban = [S.router_logits[layer].mask(experts=[expert]) for layer in clean.atlas.layers("router_logits")]
        wanted = clean.run(ids, edits=ban, allow_noop=True).logits
        with poisoned(clean.hf, family, [expert], 7.0 if family == "llama4" else float("nan")):
            run = clean.run(ids, read=S.router_weights, edits=ban, allow_noop=True)
        assert torch.isfinite(run.logits).all()
        assert torch.equal(run.logits, wanted)
        weights = run[S.router_weights].as_subclass(torch.Tensor)
        assert not weights[..., expert].any()
        assert ((weights != 0).sum(-1) == k).all()


@pytest.mark.parametrize("family", [family for family in MIXTURES if family != "llama4"])
def test_router_weights_are_what_the_experts_are_called_with(family: str, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    layer = model.atlas.layers("router_weights")[-1]
    experts = model.hf.get_submodule(f"{LAYOUT[family]['blocks']}.{layer}.{LAYOUT[family]['experts']}")
    called = []
    handle = experts.register_forward_pre_hook(lambda _m, args: called.append(args))
    try:
        for edits in ((), S.router_logits[layer].mask([0, 5]), S.router_logits[layer].at(2).scale(-1.0)):
            run = model.run(ids, read=S.router_weights[layer], edits=edits)
            _, chosen, weights = called.pop()
            dense = run[S.router_weights[layer]].flatten(0, 1).as_subclass(torch.Tensor)
            assert torch.equal(dense.gather(-1, chosen), weights)
            assert ((dense != 0).sum(-1) == chosen.shape[-1]).all()
    finally:
        handle.remove()


def test_llama4_runs_every_expert_on_zeros(ids: torch.Tensor) -> None:
    """What transformers does: a banned expert contributes nothing, but NaN in its weights would come through."""
    model = tiny_model("llama4")
    with poisoned(model.hf, "llama4", [1], float("nan")):
        assert model.run(ids, edits=S.router_logits.mask(1)).logits.isnan().any()


@pytest.mark.parametrize("family", MIXTURES)
def test_bans_down_to_fewer_experts_than_a_token_takes(family: str, ids: torch.Tensor) -> None:
    """The one expert left is all that is executed; without any, the run is refused."""
    model = tiny_model(family)
    layer = model.atlas.layers("router_logits")[-1]
    n = model.atlas.entries["router_logits", layer].n_units
    others = [e for e in range(n) if e != 3]
    ban = [S.router_logits[each].mask(others) for each in model.atlas.layers("router_logits")]
    with poisoned(model.hf, family, others if family != "llama4" else [], float("nan")):
        run = model.run(ids, read=S.router_weights[layer], edits=ban)
    assert torch.isfinite(run.logits).all()
    weights = run[S.router_weights[layer]].as_subclass(torch.Tensor)
    assert (weights[..., 3] > 0).all() and int((weights != 0).sum()) == 14
    with pytest.raises(ic.PlanError, match="a token has no expert left to go to"):
        model.run(ids, edits=S.router_logits[layer].mask(list(range(n))))


@pytest.mark.parametrize("family", GROUPED)
def test_bans_act_before_groups_and_correction_bias(family: str, ids: torch.Tensor) -> None:
    """A correction bias that would choose the banned expert for every token does not bring it back."""
    hf = testing.tiny(family)
    layer = tiny_model(family).atlas.layers("router_logits")[0]
    gate = hf.get_submodule(f"{LAYOUT[family]['blocks']}.{layer}.{LAYOUT[family]['router']}")
    gate.e_score_correction_bias[2] = 50.0
    model = ic.load(hf, check=False)
    plain = model.run(ids, read=S.router_weights[layer])[S.router_weights[layer]]
    assert (plain[..., 2] > 0).all()
    run = model.run(ids, read=S.router_weights[layer], edits=S.router_logits[layer].mask(2))
    found = run[S.router_weights[layer]].as_subclass(torch.Tensor)
    assert not found[..., 2].any() and ((found > 0).sum(-1) == 3).all()
    logits = model.run(ids, read=S.router_logits[layer])[S.router_logits[layer]].clone()
    logits[..., 2] = float("-inf")
    wanted = route(family, hf.config, gate, logits.flatten(0, 1).as_subclass(torch.Tensor)).view_as(found)
    torch.testing.assert_close(found, wanted)


def test_receipt_counts_banned_logits(ids: torch.Tensor) -> None:
    run = model().run(ids, edits=S.router_logits[0].mask([1, 4]))
    assert run.receipts[0].norm == pytest.approx((2 * 14) ** 0.5)


def test_router_weights_edit(ids: torch.Tensor) -> None:
    plain = model().run(ids, read=[S.router_weights[0], S.mlp_out[0]])
    run = model().run(ids, read=[S.router_weights[0], S.mlp_out[0]], edits=S.router_weights[0].scale(0.5))
    torch.testing.assert_close(
        run[S.mlp_out[0]].as_subclass(torch.Tensor), plain[S.mlp_out[0]] * 0.5, atol=1e-5, rtol=1e-4
    )
    assert torch.equal(run[S.router_weights[0]], plain[S.router_weights[0]] * 0.5)
    with pytest.raises(ic.PlanError, match="a token can have 2 experts"):
        model().run(ids, edits=S.router_weights[0].add(torch.full((6,), 0.1)))


def test_expert_out_edit(ids: torch.Tensor) -> None:
    plain = model().run(ids, read=[S.expert_out[2, 1], S.mlp_out[2]])
    run = model().run(ids, read=S.mlp_out[2], edits=S.expert_out[2, 1].zero())
    wanted = plain[S.mlp_out[2]] - plain[S.expert_out[2, 1]]
    torch.testing.assert_close(run[S.mlp_out[2]].as_subclass(torch.Tensor), wanted, atol=1e-5, rtol=1e-4)


def test_unknown_expert(ids: torch.Tensor) -> None:
    with pytest.raises(ic.PlanError, match="no expert 6, there are 6, 0 to 5"):
        model().run(ids, edits=S.router_logits[0].mask([6]))
    with pytest.raises(ic.SiteError, match="no expert 9, there are 6"):
        model().run(ids, read=S.expert_out[0, 9])
    with pytest.raises(ic.CapabilityError, match="router_logits.* has no gradient"):
        model().run(ids, read=S.router_logits, grad=lambda logits: logits.sum())


def test_banning_in_generation(ids: torch.Tensor) -> None:
    made = model().generate(
        ids, edits=S.router_logits.mask(2), read=S.router_weights, max_new_tokens=5, stop_at_eos=False
    )
    assert not made[S.router_weights[2]][..., 2].any()
    assert made.receipts[0].fired == 2 * 5
