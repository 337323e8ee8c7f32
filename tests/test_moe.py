"""Routers: an edit really re-routes, and a banned expert is never executed."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

import interp_core as ic
from interp_core import sites as S
from interp_core import testing


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


@pytest.mark.parametrize("expert", range(6))
def test_a_banned_expert_is_executed_zero_times(expert: int, ids: torch.Tensor) -> None:
    hf = testing.tiny("qwen3_moe")
    poisoned = testing.tiny("qwen3_moe")
    for layer in (0, 2):
        experts = poisoned.get_submodule(f"model.layers.{layer}.mlp.experts")
        experts.gate_up_proj.data[expert] = float("nan")
        experts.down_proj.data[expert] = float("nan")
    ban = [S.router_logits[layer].mask(expert) for layer in (0, 2)]
    clean, sick = ic.load(hf), ic.load(poisoned, check=False)
    run = sick.run(ids, read=S.router_weights, edits=ban, allow_noop=True)
    assert torch.isfinite(run.logits).all()
    assert torch.equal(run.logits, clean.run(ids, edits=ban, allow_noop=True).logits)
    for layer in (0, 2):
        assert not run[S.router_weights[layer]][..., expert].any()
        assert ((run[S.router_weights[layer]] > 0).sum(-1) == 2).all()


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
