"""Shared experts of `interp_plugins.router`, against the modules that they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import sampled, tiny_model
from interp_plugins.router.shared import shared_of
from mixtures import MIXTURES, SHARING
from test_moe_families import routed
from test_router_load import padded

import interp_core as ic
from interp_core import sites as S

KINDS = ("phimoe", "jetmoe", "gemma4", "granitemoeshared", "deepseek_v4", "axk1", "laguna", "minimax_m3_vl_text")
"""None, no experts by themselves, twice beside the block; several streams, a norm on the sum, a factor on the experts."""
BESIDE = ("gemma4", "granitemoehybrid", "granitemoeshared")


@pytest.mark.parametrize(
    ("family", "path", "gate"),
    [
        ("qwen2_moe", "mlp.shared_expert", "mlp.shared_expert_gate"),
        ("deepseek_v3", "mlp.shared_experts", ""),
        ("llama4", "feed_forward.shared_expert", ""),
    ],
)
def test_shared_experts_are_those_of_their_module(family: str, path: str, gate: str) -> None:
    """Norms and gates are those of the modules; padding counts for nothing, and batches are summed."""
    of = tiny_model(family, torch.float64)
    tokens = padded()
    made = shared_of(of, (ic.Tokens.stack([row]) for row in tokens)).table()
    again = shared_of(of, [tokens]).table()
    assert [row["layer"] for row in made] == of.layers(S.router_logits) and made[0]["tokens"] == 23
    for row, whole in zip(made, again, strict=True):
        assert row == pytest.approx(whole, rel=1e-5)
        block = of.module("block", row["layer"])
        parts = {"shared": block.get_submodule(path)} | ({"gate": block.get_submodule(gate)} if gate else {})
        kept = _put_out(of, tokens, parts | {"block": of.module("mlp", row["layer"])})
        shape = (*tokens.ids.shape, -1)
        shared, out = kept["shared"].view(shape)[tokens.mask], kept["block"].view(shape)[tokens.mask]
        if gate:
            opened = kept["gate"].view(shape)[tokens.mask].sigmoid()
            assert row["gate"] == pytest.approx(float(opened.mean()), rel=1e-6)
            shared = shared * opened
        wanted = {
            "share": (shared.norm(dim=-1) / out.norm(dim=-1)).mean(), "shared_norm": shared.norm(dim=-1).mean(),
            "along": ((shared * out).sum(-1) / out.square().sum(-1)).mean(), "block_norm": out.norm(dim=-1).mean(),
        }  # fmt: skip
        for name, value in wanted.items():
            assert row[name] == pytest.approx(float(value), rel=1e-5), name
        assert ("gate" in row) == bool(gate)


@pytest.mark.parametrize("family", sampled(MIXTURES, KINDS))
def test_shared_experts_of_every_mixture(family: str) -> None:
    """Whatever the block does to what its routed experts add up to; or the reason why not."""
    of, mixture = routed(family, torch.float64), MIXTURES[family]
    ids = torch.arange(3, 12)[None]
    tokens = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    if family in BESIDE or not mixture.shared:
        why = "stands beside the block" if family in BESIDE else "has none in its blocks|no expert is known by itself"
        with pytest.raises(ic.CapabilityError, match=why):
            shared_of(of, [tokens])
        return
    made = shared_of(of, [tokens]).table()
    assert [row["layer"] for row in made] == of.layers(S.router_logits)
    for row in made:
        block, mlp = mixture.block(of.hf, row["layer"]), of.module("mlp", row["layer"])
        kept = _put_out(of, tokens, {name: block.get_submodule(name) for name in mixture.shared} | {"mlp": mlp})
        out = kept.pop("mlp").flatten(0, -2)
        with torch.no_grad():
            shared = sum(kept.values(), torch.zeros(())).view_as(out)
            if hasattr(mlp, "shared_expert_gate"):
                shared = shared * _put_out(of, tokens, {"gate": mlp.shared_expert_gate})["gate"].view(-1, 1).sigmoid()
            if hasattr(mlp, "post_mlp_layernorm"):
                shared = mlp.post_mlp_layernorm(shared)
        assert row["shared_norm"] == pytest.approx(float(shared.norm(dim=-1).mean()), rel=1e-5)
        assert row["routed_norm"] == pytest.approx(float((out - shared).norm(dim=-1).mean()), rel=1e-5)
        assert ("gate" in row) == (hasattr(mlp, "shared_expert_gate") or family in SHARING)


def _put_out(of: ic.Model, tokens: ic.Tokens, modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What modules return in a run, by name."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, out: kept.update({name: (out[0] if isinstance(out, tuple) else out).detach().clone()})

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    of.run(tokens, logits=-1)
    for hook in hooks:
        hook.remove()
    return kept


def test_models_without_shared_experts_are_refused() -> None:
    for family in ("qwen3_moe", "gpt_oss"):
        with pytest.raises(ic.CapabilityError, match=rf"\({family}\) has none in its blocks with routers"):
            shared_of(tiny_model(family), [padded()])
