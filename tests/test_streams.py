"""`*_out` is what is added to the residual stream, or it is withdrawn: families that add, scale and norm in many ways.

By hand: the stream that enters and leaves a block is kept by plain PyTorch hooks, and what the block makes of it and of
what is added is written out family by family.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import interp_core as ic
from interp_core import sites as S
from interp_core.architectures import gemma4

LLAMA: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {name: value for name, value in LLAMA.items() if "key_value" not in name}
FALCON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
BLOOM = {"vocab_size": 96, "hidden_size": 64, "n_layer": 3, "n_head": 4}
BART = {
    "vocab_size": 96, "d_model": 64, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 96,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MINIMAX = {
    "head_dim": 16, "num_local_experts": 4, "layer_types": ["full_attention"] * 3, "full_attn_alpha_factor": 2.0,
    "full_attn_beta_factor": 0.7, "mlp_alpha_factor": 1.3, "mlp_beta_factor": 0.8,
}  # fmt: skip
GEMMA4 = {
    "head_dim": 16, "global_head_dim": 16, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM),
    "bloom_normed": ("BloomForCausalLM", "BloomConfig", {**BLOOM, "apply_residual_connection_post_layernorm": True}),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": 96, "d_model": 64, "n_layers": 3, "n_heads": 4}),
    "falcon": ("FalconForCausalLM", "FalconConfig", FALCON),
    "falcon_new": ("FalconForCausalLM", "FalconConfig", {**FALCON, "new_decoder_architecture": True}),
    "falcon_sequential": ("FalconForCausalLM", "FalconConfig", {**FALCON, "parallel_attn": False, "alibi": True}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**LLAMA, "residual_multiplier": 0.3, "logits_scaling": 2.0}),
    "hyperclovax": ("HyperCLOVAXForCausalLM", "HyperCLOVAXConfig", {**LLAMA, "residual_multiplier": 0.4}),
    "minimax": ("MiniMaxForCausalLM", "MiniMaxConfig", {**LLAMA, **MINIMAX}),
    "doge": ("DogeForCausalLM", "DogeConfig", LLAMA),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**BERT, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt_normed": (
        "OPTForCausalLM",
        "OPTConfig",
        {**BERT, "ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": False},
    ),
    "bart": ("BartForCausalLM", "BartConfig", BART),
    "mbart": ("MBartForCausalLM", "MBartConfig", BART),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "roberta_prelayernorm": ("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig", BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 96, "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "pad_token_id": 0},
    ),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**BERT, "embedding_size": 32, "num_hidden_groups": 1}),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", {**LLAMA, **GEMMA4}),
}


def built(name: str) -> Any:
    """A random-weight model whose multipliers are none of them one."""
    kind, config, settings = MODELS[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = getattr(transformers, kind)(getattr(transformers, config)(**settings))
        for path, parameter in hf.named_parameters():
            nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.1)
            if parameter.ndim == 1 and path.endswith(("norm.weight", "Norm.weight", "residual")):
                parameter.data += 0.8
        for path, buffer in hf.named_buffers():
            if path.endswith("layer_scalar"):
                buffer.fill_(0.4)
    return hf.eval()


@cache
def loaded(name: str) -> ic.Model:
    return ic.load(built(name))


def summed(_block: Any, pre: Tensor, attn: Tensor, mlp: Tensor) -> Tensor:
    return pre + attn + mlp


def bloom(block: Any, pre: Tensor, attn: Tensor, mlp: Tensor) -> Tensor:
    return block.post_attention_layernorm(block.input_layernorm(pre) + attn) + mlp


def minimax(block: Any, pre: Tensor, attn: Tensor, mlp: Tensor) -> Tensor:
    return block.post_attention_layernorm(block.input_layernorm(pre) * 2.0 + attn) * 1.3 + mlp


def doge(block: Any, pre: Tensor, attn: Tensor, mlp: Tensor) -> Tensor:
    return block.post_attention_residual * (block.input_residual * pre + attn) + mlp


def rwkv(block: Any, pre: Tensor, attn: Tensor, mlp: Tensor) -> Tensor:
    return (block.pre_ln(pre) if hasattr(block, "pre_ln") else pre) + attn + mlp


def bart(block: Any, pre: Tensor, attn: Tensor, mlp: Tensor) -> Tensor:
    return block.final_layer_norm(block.self_attn_layer_norm(pre + attn) + mlp)


def bert(block: Any, pre: Tensor, attn: Tensor, mlp: Tensor) -> Tensor:
    return block.output.LayerNorm(block.attention.output.LayerNorm(pre + attn) + mlp)


def distilbert(block: Any, pre: Tensor, attn: Tensor, mlp: Tensor) -> Tensor:
    return block.output_layer_norm(block.sa_layer_norm(pre + attn) + mlp)


BY_HAND: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(("bloom", "mpt", "falcon", "falcon_new", "falcon_sequential", "granite", "hyperclovax"), summed),
    **dict.fromkeys(("opt", "mbart", "roberta_prelayernorm"), summed),
    "bloom_normed": bloom, "minimax": minimax, "doge": doge, "rwkv": rwkv, "opt_normed": bart, "bart": bart,
    "bert": bert, "distilbert": distilbert,
}  # fmt: skip
"""What each family's block makes of the stream and of what is added, written out."""


def passed(model: ic.Model, block: nn.Module, ids: Tensor, *edits: Any) -> tuple[Tensor, Tensor]:
    """What enters and leaves a block in a run, by hooks of PyTorch's own."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        seen.extend((first.clone(), (output[0] if isinstance(output, tuple) else output).clone()))

    handle = block.register_forward_hook(keep, with_kwargs=True)
    try:
        model.run(ids, edits=edits)
    finally:
        handle.remove()
    return seen[0], seen[1]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_added_is_what_is_added(name: str, ids: Tensor) -> None:
    """The block makes of the stream and of what is added what is written here, and moves by what an edit adds."""
    model, by_hand, vector = loaded(name), BY_HAND[name], torch.linspace(-1, 1, 64)
    for layer in (0, 2):
        block = model.atlas.entries["resid_pre", layer].module
        assert block is not None
        run = model.run(ids, read=[S.attn_out[layer], S.mlp_out[layer], S.resid_pre[layer], S.resid_post[layer]])
        attn, mlp = (run[site[layer]].as_subclass(Tensor) for site in (S.attn_out, S.mlp_out))
        held = mlp.clone()
        pre, post = passed(model, block, ids)
        with torch.no_grad():
            close(run[S.resid_pre[layer]].as_subclass(Tensor), pre)
            close(run[S.resid_post[layer]].as_subclass(Tensor), post)
            close(by_hand(block, pre, attn, mlp), post)
            _, moved = passed(model, block, ids, S.mlp_out[layer].add(vector))
            close(moved, by_hand(block, pre, attn, mlp + vector))
            _, moved = passed(model, block, ids, S.attn_out[layer].add(vector), S.mlp_out[layer].set(held - 0.5))
            close(moved, by_hand(block, pre, attn + vector, mlp - 0.5))


@pytest.mark.parametrize("name", [name for name in BY_HAND if not name.startswith("falcon") or "seq" in name])
def test_the_stream_between_is_the_stream(name: str, ids: Tensor) -> None:
    """An edit of `resid_mid` is one of the whole stream: attention's part and the MLP's act on it together."""
    model, vector = loaded(name), torch.linspace(-1, 1, 64)
    layer = 1
    run = model.run(ids, read=[S.resid_mid[layer], S.mlp_in[layer]])
    edit = S.resid_mid[layer].add(vector)
    edited = model.run(ids, read=[S.resid_mid[layer], S.mlp_in[layer]], edits=edit)
    close(edited[S.resid_mid[layer]].as_subclass(Tensor), run[S.resid_mid[layer]].as_subclass(Tensor) + vector)
    assert not torch.equal(edited[S.mlp_in[layer]], run[S.mlp_in[layer]])
    again = model.run(ids, edits=S.resid_mid[layer].set(edited[S.resid_mid[layer]].as_subclass(Tensor)))
    close(again.logits.as_subclass(Tensor), edited.logits.as_subclass(Tensor))


def test_what_does_not_add_up_is_withdrawn(
    ids: Tensor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing beside; in one line at load. Gemma 4 changes the stream after its sum, which its file says."""
    gone, line = {"mlp_out"}, "gemma4: .*mlp_out withdrawn: they do not add up"
    hf = built("gemma4")
    monkeypatch.setitem(vars(gemma4.FAMILY), "summed", None)
    with caplog.at_level(logging.WARNING):
        model = ic.load(hf)
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("interp_core"))
    assert "\n" not in said and re.match(line, said), said
    stream = {"attn_out", "resid_mid", "mlp_out", "resid_pre", "resid_post", "z", "head_out", "pattern"}
    assert stream - set(model.sites) == gone
    for site in gone:
        with pytest.raises(ic.CapabilityError, match=r"self-check: adds up: .* fails \(\d"):
            model.run(ids, read=site)
    assert any("they do not add up" in note for note in model.atlas.notes)


def test_what_is_right_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="interp_core"):
        for name in ("bloom", "falcon", "granite", "opt"):
            assert not ic.load(built(name)).atlas.notes
    assert not caplog.records


def test_streams_that_are_no_plain_sum_say_so() -> None:
    for name in ("minimax", "bert", "bloom_normed", "rwkv"):
        assert any("is no plain sum" in note for note in loaded(name).atlas.notes), name


def test_shared_layers_are_refused() -> None:
    with pytest.raises(ic.CapabilityError, match="albert runs the same block 3 times in a pass"):
        loaded("albert")


def test_a_padded_row_that_is_not_the_row_alone_is_refused(ids: Tensor) -> None:
    """RWKV's state runs through padding on the left; on the right it comes too late to matter."""
    model = loaded("rwkv")
    assert "left padding" in model.atlas.lacking and "right padding" not in model.atlas.lacking
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    with pytest.raises(
        ic.CapabilityError, match="padded on the left gets other numbers in this rwkv.*pad on the right"
    ):
        model.run(ic.Tokens(ids, mask))
    alone = model.run(ids[1:, :4]).logits[0]
    right = model.run(ic.Tokens(ids, mask.flip(1))).logits[1, :4]
    close(right.as_subclass(Tensor), alone.as_subclass(Tensor))


def test_padding_that_makes_nan_of_queries_is_refused_on_both_sides() -> None:
    """Gemma 2 in float64: a query that sees padding alone is NaN, on the right one that is a window behind the text."""
    model = ic.load(ic.testing.tiny("gemma2", dtype=torch.float64))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 2:] = False
    with pytest.raises(ic.CapabilityError, match="padded on the right gets other numbers in this gemma2 .*nan"):
        model.run(ic.Tokens(torch.full((2, 9), 7), mask))


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "hyperclovax", "bert"])
def test_padded_rows_are_the_rows_alone(name: str, ids: Tensor) -> None:
    model = loaded(name)
    alone = model.run(ids[1:, :4]).logits[0].as_subclass(Tensor)
    for side in (slice(3, None), slice(0, 4)):
        mask = torch.zeros(2, 7, dtype=torch.bool)
        mask[0], mask[1, side] = True, True
        rows = ids.clone()
        rows[1, side] = ids[1, :4]
        found = model.run(ic.Tokens(rows, mask)).logits[1, side].as_subclass(Tensor)
        torch.testing.assert_close(found, alone, atol=1e-4 * float(alone.abs().max()), rtol=1e-4)
