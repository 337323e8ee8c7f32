"""Types whose blocks are not one attention and one MLP on one stream: what they serve, and why they lack the rest.

The matrix (`test_types.py`) holds all their sites; here are those that were missing, wrong or given a reason that was
not so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from parity import cell
from reference import Reference
from test_attention_few import CASES, same
from test_attention_masks import batch
from test_attention_rows import kept
from tolerances import close
from transformers.models.llama import modeling_llama

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.engines.attention import AttentionHook

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
def test_attention_that_cannot_be_opened_costs_its_own_sites_alone(
    engine: str, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attention function that adds to the scores what it is not handed."""
    own = modeling_llama.eager_attention_forward

    def biased(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **rest: Any) -> Any:
        nearer = torch.arange(key.shape[2], dtype=query.dtype)
        return own(module, query, key, value, nearer if mask is None else mask + nearer, **rest)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)
    hf = testing.tiny("llama")
    hf.set_attn_implementation("eager")
    model = ic.load(hf, engine=engine)
    assert "is the attention that the model does fails" in model.can("pattern", "read")
    plain = hf(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(model.run(ids, read=S.resid_pre).logits.plain, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_sinks_of_each_query(layer: int, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inkling 2 works them out of what attention reads: of some queries or all, rows of the pattern have room for them,
    and a receipt says what a knockout took."""
    model, read = tiny_model("inkling2_text"), S.pattern[layer].at(query=[-1, -2])
    assert model.run(ids, read=S.pattern[layer])[S.pattern[layer]].sum(-1).min() < 0.9
    tokens = batch(left=False)
    for make in CASES.values():
        found = model.run(tokens, read=read, edits=make(layer), allow_noop=True)
        with monkeypatch.context() as patch:
            patch.setattr(AttentionHook, "has_kernel", False)
            wanted = model.run(tokens, read=read, edits=make(layer), allow_noop=True)
        same(found, wanted, model, tokens, read)
    pattern = model.run(ids, read=S.pattern[layer])[S.pattern[layer]].plain
    rows = kept(model, batch(left=False).row(0))[layer]
    alone = model.run(batch(left=False).row(0), read=S.pattern[layer])[S.pattern[layer]].plain
    close(rows.pattern([6, 1]), alone[:, :, [6, 1]], model)
    close(rows.at([3, 6]).pattern([6]), alone[:, :, [6]], model)
    for query in (-1, slice(None)):
        run = model.run(ids, edits=S.pattern[layer].knockout(query=query, key=-2), allow_noop=True)
        close(torch.tensor(run.receipts[0].norm), pattern[:, :, query, -2].norm(), model)


@pytest.mark.parametrize("every", [1, 2, 6])
def test_streams_that_begin_anew(every: int, ids: torch.Tensor) -> None:
    """Inkling 2 lays the stream aside every few blocks: what attention gives then is all of it."""
    model = ic.load(testing.tiny("inkling2_text", n_layers_per_attn_res_block=every))
    run = model.run(ids, read=[S.resid_pre, S.attn_out, S.resid_mid, S.mlp_out, S.resid_post])
    for layer in range(3):
        before, added = run[S.resid_pre[layer]], run[S.attn_out[layer]]
        close(run[S.resid_mid[layer]], added if layer % every == 0 else before + added, model)
        close(run[S.resid_post[layer]], run[S.resid_mid[layer]] + run[S.mlp_out[layer]], model)


def test_a_bias_that_the_block_adds(ids: torch.Tensor) -> None:
    """GPT-NeoX-Japanese: attention hands it to the last block."""
    model = tiny_model("gpt_neox_japanese")
    run, bias = model.run(ids, read=[S.z, S.attn_out]), model.hf.gpt_neox_japanese.layers[2].attention.dense_bias
    assert bias.abs().max() > 1e-3
    for layer in range(3):
        close(model.project(run[S.z[layer]], layer, added=True), run[S.attn_out[layer]], model)
    close(model.run(ids, edits=S.attn_out[2].zero(), read=S.resid_mid[2])[S.resid_mid[2]],
          model.run(ids, read=S.resid_pre[2])[S.resid_pre[2]], model)  # fmt: skip
