"""Types whose blocks are not one attention and one MLP on one stream: what they serve, and why they lack the rest.

The matrix (`test_types.py`) holds all their sites; here are those that were missing, wrong or given a reason that was
not so.
"""

from __future__ import annotations

import pytest
import torch
from parity import cell
from reference import Reference

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

SERVED = {
    "dory": ("attn_out", "resid_mid", "mlp_out"),
    "GraniteDoclingForConditionalGeneration": ("attn_out", "mlp_out"),
    "moshi": ("head_out",),
    "deepseek_v4": ("q", "k", "v", "z", "head_out", "pattern"),
    "jetmoe": ("q", "v", "z", "rot_k", "pattern"),
    "zamba": ("attn_in", "mlp_in", "mlp_act"),
    "gemma3n_text": ("final_norm",),
    "hy_v4": ("q", "v", "rot_q"),
    "zaya": ("q", "k", "v", "attn_out", "resid_mid", "mlp_out"),
}
"""Sites that these had not."""


def eager(model_type: str) -> ic.Model:
    hf = testing.tiny(model_type, dtype=torch.float64)
    hf.set_attn_implementation("eager")
    return ic.load(hf)


@pytest.mark.parametrize("model_type", SERVED)
def test_sites_are_those_of_hooks_written_by_hand(model_type: str) -> None:
    model = eager(model_type)
    reference = Reference(model_type, model.hf)
    for name in SERVED[model_type]:
        assert not model.can(name, "write"), name
        assert max(cell(model, reference, name)) < 1e-4, name


@pytest.mark.parametrize(
    ("model_type", "site", "why"),
    [
        ("rwkv", "q", "no layer of this rwkv is softmax attention"),
        ("nemotron_h", "resid_mid", "no block of this nemotron_h has both a mixer and an MLP"),
        ("doge", "router_logits", "doge has no mixture-of-experts router"),
        ("longcat_flash", "z", "has two attentions and two dense MLPs"),
        ("jetmoe", "head_out", "by the experts that the token chose"),
        ("jetmoe", "mlp_act", "every MLP of this jetmoe is a mixture of experts"),
        ("gemma3n_text", "attn_out", "the model has several residual streams, and a site is of one"),
    ],
)
def test_reasons_are_of_the_models_own_code(model_type: str, site: str, why: str) -> None:
    assert why in ic.load(testing.tiny(model_type)).can(site, "read")


def test_layers_with_compressed_keys_have_no_pattern(ids: torch.Tensor) -> None:
    """Also where the text is so short that there is no compressed key yet."""
    model = ic.load(testing.tiny("deepseek_v4", compress_rate_csa=64, compress_rate_hca=64))
    assert model.layers(S.pattern) == [0] and model.layers(S.z) == [0, 1, 2]
    with pytest.raises(ic.SiteError, match="attends to compressed keys behind those of the text's tokens"):
        model.run(ids, read=S.pattern[1])


def test_doge_with_experts_says_what_they_are() -> None:
    model = ic.load(testing.tiny("doge", is_moe=True, num_experts=16))
    assert "no tensor has a score or a weight for each expert" in model.can("router_logits", "read")


@pytest.mark.parametrize("engine", ["torch", "nnsight"])
def test_blocks_that_run_again_are_refused_on_every_engine(engine: str) -> None:
    with pytest.raises(ic.CapabilityError, match="this hrm_text runs the same block 6 times in a pass"):
        ic.load(testing.tiny("hrm_text"), engine=engine)
    model = ic.load(testing.tiny("dory", n_recurrent_loops=3), engine=engine)
    assert {tuple(model.layers(name)) for name in ("resid_pre", "z", "mlp_out", "resid_post")} == {(0, 3)}
    with pytest.raises(ic.SiteError, match="passes once fails .3 times, as its block runs again"):
        model.run(torch.tensor([[5, 17, 33]]), read=S.resid_post[1])
    once = ic.load(testing.tiny("dory", n_recurrent_loops=1), engine=engine)
    assert once.layers(S.resid_post) == [0, 1, 2, 3]


@pytest.mark.parametrize("engine", ["torch", "nnsight"])
def test_attention_that_cannot_be_opened_costs_its_own_sites_alone(engine: str, ids: torch.Tensor) -> None:
    """Inkling adds to the scores inside attention what the attention hook is not handed."""
    hf = testing.tiny("inkling2_text")
    model = ic.load(hf, engine=engine)
    assert "is the attention that the model does fails" in model.can("pattern", "read")
    plain = hf(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(model.run(ids, read=S.resid_pre).logits.plain, plain, atol=1e-4, rtol=1e-4)
