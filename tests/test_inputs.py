"""What reaches the model: what the caller gave as it is, and masks and positions that change nothing."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, tiny_model
from transformers import DynamicCache

import interp_core as ic
from interp_core import sites as S
from interp_core.batches import padded_on, some_rows
from interp_core.model_inputs import cache_name
from interp_core.testing import tiny

IDS = torch.tensor([[5, 9, 17, 33, 21, 40, 8], [61, 7, 54, 12, 70, 3, 28]])
KNOWN = 4
KINDS = ("gpt2", "llama", "gemma3", "opt", "qwen3_next", "deepseek_v3")
VISION = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5_vision", "llava", "llava_onevision", "internvl",
          "gemma3_vision", "smolvlm")  # fmt: skip
SAMPLE = [f if f in KINDS else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


def held(model: ic.Model, mask: torch.Tensor | None = None, rows: int = 2) -> Any:
    """A cache of the first tokens."""
    made = DynamicCache(config=model.hf.config.get_text_config())
    with torch.no_grad():
        more = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        model.hf(input_ids=IDS[:rows, :KNOWN], use_cache=True, **{cache_name(model.hf): made}, **more)
    return made


def plainly(model: ic.Model, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(**inputs).logits


@pytest.mark.parametrize("family", SAMPLE)
def test_a_cache_handed_in(family: str) -> None:
    model = tiny_model(family)
    rest = {"input_ids": IDS[:, KNOWN:], "past_key_values": held(model)}
    for _ in range(2):  # the run's own copy grows, not the caller's
        run = model.run(rest, read=[S.resid_post[1], S.mlp_out[2].at(-1)])
        wanted = plainly(model, input_ids=IDS[:, KNOWN:], **{cache_name(model.hf): held(model)})
        torch.testing.assert_close(run.logits.as_subclass(torch.Tensor), wanted, atol=1e-4, rtol=1e-4)
        assert rest["past_key_values"].get_seq_length() == KNOWN
    assert run[S.resid_post[1]].shape[1] == IDS.shape[1] - KNOWN
    edit = S.resid_post[1].at(-1).scale(2.0)
    whole = model.run(IDS, edits=edit).logits[:, -1]
    torch.testing.assert_close(model.run(rest, edits=edit).logits[:, -1], whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("engine", ["torch", "nnsight", "transformer_lens"])
def test_a_cache_on_every_engine(engine: str) -> None:
    model = tiny_model("llama")
    on = model if engine == "torch" else model.on(engine)
    run = on.run({"input_ids": IDS[:, KNOWN:], "cache": held(model)}, read=S.resid_post[2].at(0))
    wanted = model.run(IDS, read=S.resid_post[2].at(KNOWN))
    torch.testing.assert_close(run.logits[:, -1], wanted.logits[:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        run[S.resid_post[2].at(0)].as_subclass(torch.Tensor),
        wanted[S.resid_post[2].at(KNOWN)].as_subclass(torch.Tensor), atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_a_cache_of_padded_rows() -> None:
    model = tiny_model("llama")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    x = {"input_ids": IDS[:, KNOWN:], "attention_mask": mask, "past_key_values": held(model, mask[:, :KNOWN])}
    alone = model.run(IDS[:1, 2:]).logits[0, -1]
    torch.testing.assert_close(model.run(x).logits[0, -1], alone, atol=1e-4, rtol=1e-4)


def test_what_a_cache_is_refused_for() -> None:
    model = tiny_model("llama")
    x = {"input_ids": IDS[:, KNOWN:], "past_key_values": held(model)}
    for site in (S.pattern[1], S.scores[0, 1], S.rot_k[2]):
        with pytest.raises(ic.CapabilityError, match="has keys of the past_key_values handed in"):
            model.run(x, read=site)
    with pytest.raises(ic.PlanError, match=r"past_key_values is for run\(\)"):
        model.generate(x)
    with pytest.raises(ic.TextError, match=r"a mask covers both, \[batch, 7\]"):
        model.run({**x, "attention_mask": torch.ones(2, 3)})
    with pytest.raises(ic.TextError, match="do not fit the model's context"):
        model.run({**x, "input_ids": torch.ones(2, model.atlas.shape.n_ctx - 2, dtype=torch.long)})


def test_sweeps_with_a_cache_and_with_positions() -> None:
    model, variants = tiny_model("llama"), [S.z[0, 1].zero(), S.resid_post[1].at(1).scale(2.0)]
    cached = {"input_ids": IDS[:1, KNOWN:], "past_key_values": held(model, rows=1)}
    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    for x in (cached, packed):
        swept = model.sweep(x, variants, ic.score.logprob(5))
        for variant, value in zip(variants, swept.values[:, 0], strict=True):
            wanted = model.run(x, edits=variant).logits[0, -1].log_softmax(-1)[5]
            torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [f if f in KINDS else pytest.param(f, marks=pytest.mark.slow)
                                    for f in FAMILIES if f not in VISION])  # fmt: skip
def test_position_ids_reach_the_model(family: str) -> None:
    model = tiny_model(family)
    shifted = {"input_ids": IDS, "position_ids": (torch.arange(7) + 20)[None].expand(2, 7)}
    packed = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]])}
    masked = {**packed, "attention_mask": torch.ones_like(IDS)}
    for x in (shifted, packed, masked):
        assert torch.equal(model.run(x).logits.as_subclass(torch.Tensor), plainly(model, **x, use_cache=False))
    mask = torch.ones_like(IDS)
    theirs = model.hf.generate(**shifted, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    made = model.generate(shifted, max_new_tokens=4, read=S.logits)
    assert made.ids.tolist() == theirs[:, 7:].tolist()
    first = made.steps[0][S.logits].as_subclass(torch.Tensor)
    torch.testing.assert_close(first, plainly(model, **shifted), atol=1e-4, rtol=1e-4)


def test_packed_texts_are_kept_apart() -> None:
    model = tiny_model("llama")
    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    edit = S.resid_post[1].at(0).scale(3.0)  # of the first text
    run, alone = model.run(packed, edits=edit).logits[0, 3:], model.run(IDS[:1, 3:]).logits[0]
    torch.testing.assert_close(run, alone, atol=1e-4, rtol=1e-4)


def test_position_ids_follow_padding_to_the_left() -> None:
    model = tiny_model("gpt2")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    x = {"input_ids": IDS[:, :5], "attention_mask": mask, "position_ids": (torch.arange(5) + 9)[None].expand(2, 5)}
    alone = {"input_ids": IDS[:1, :3], "position_ids": (torch.arange(3) + 9)[None]}
    assert (
        model.generate(x, max_new_tokens=4).ids[0].tolist() == model.generate(alone, max_new_tokens=4).ids[0].tolist()
    )


SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
DECODERS = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
ODD: dict[str, dict[str, Any]] = {
    "RobertaForMaskedLM": {}, "XLMRobertaForMaskedLM": {}, "MPNetForMaskedLM": {}, "CamembertForMaskedLM": {},
    "XLMRobertaXLForMaskedLM": {}, "RobertaPreLayerNormForMaskedLM": {}, "Data2VecTextForMaskedLM": {},
    "EsmForMaskedLM": {"mask_token_id": 5}, "IBertForMaskedLM": {}, "XmodForMaskedLM": {"default_language": "en_XX"},
    "BertForMaskedLM": {}, "ElectraForMaskedLM": {"embedding_size": 64}, "RoFormerForMaskedLM": {},
    "RobertaForCausalLM": {"is_decoder": True}, "BioGptForCausalLM": {},
    "XGLMForCausalLM": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
    "BartForCausalLM": DECODERS, "PegasusForCausalLM": DECODERS, "BloomForCausalLM": {"n_layer": 2, "n_head": 4},
    "MptForCausalLM": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
}  # fmt: skip
FROM_THE_EDGE = ("RoFormerForMaskedLM", "BartForCausalLM", "PegasusForCausalLM")
"""They take no positions, and count columns: rows stand on the left."""


@cache
def odd(name: str) -> ic.Model:
    config = getattr(transformers, name.replace("ForMaskedLM", "").replace("ForCausalLM", "") + "Config")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        hf = getattr(transformers, name)(config(**{**SIZES, **ODD[name]})).eval()
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return ic.load(hf, check=False)


@pytest.mark.parametrize("name", ODD)
def test_a_padded_row_is_the_row_alone(name: str) -> None:
    """Whatever a model counts positions from, on either side, whatever id fills up."""
    model, row = odd(name), IDS[:1, :4]
    alone = model.run(row).logits[0]
    torch.testing.assert_close(alone, plainly(model, input_ids=row)[0])
    for side in ("right",) if name in FROM_THE_EDGE else ("right", "left"):
        for filler in (1, 17):
            x = torch.full((1, 3), filler), row
            mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
            order = slice(None) if side == "left" else slice(None, None, -1)
            ids, on = torch.cat(x[order], 1), torch.cat(mask[order], 1)
            run = model.run({"input_ids": ids, "attention_mask": on})
            torch.testing.assert_close(run.logits[0][on[0].bool()], alone, atol=1e-3, rtol=1e-3)


def test_holes_in_a_mask() -> None:
    ids = torch.tensor([[5, 9, 11, 17, 33, 11, 21, 40], [61, 7, 54, 12, 70, 3, 28, 8]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1], [1] * 8])
    x = {"input_ids": ids, "attention_mask": mask}
    families = ("llama", "gpt2", "qwen3_moe", "gpt_oss", "mistral", "gpt_neo", "qwen3_next")
    for model in (*map(tiny_model, families), odd("BloomForCausalLM"), odd("BartForCausalLM")):
        with torch.no_grad():
            plain = model.hf(**x, use_cache=False).logits
        run = model.run(x, read=S.resid_post[-1].at([2, -1]))
        torch.testing.assert_close(run.logits[mask.bool()].as_subclass(torch.Tensor), plain[mask.bool()])
        assert run.tokens.columns([2, -1]) == [[3, 7], [2, 7]]  # positions count real tokens
        assert run.tokens.labels_at([2, -1]) == (("17", "40"), ("54", "8"))
        alone = model.run(run.tokens.row(0)).logits[0]
        assert torch.equal(alone[mask[0].bool()], model.run({k: v[:1] for k, v in x.items()}).logits[0][mask[0].bool()])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mistral"])
def test_rows_with_holes_are_moved_as_they_are(family: str) -> None:
    """Padding around a row changes nothing, on either side; holes stay between the same tokens."""
    model = tiny_model(family)
    ids, mask = torch.tensor([[5, 9, 11, 17, 33, 11]]), torch.tensor([[1, 1, 0, 0, 1, 1]]).bool()
    row, other = ic.Tokens(ids, mask), ic.Tokens(torch.arange(20, 28)[None], torch.ones(1, 8, dtype=torch.bool))
    alone = model.run(row).logits[0][mask[0]]
    stacked = ic.Tokens.stack([row, other])
    assert stacked.mask[0].tolist() == [False, False, True, True, False, False, True, True]
    assert stacked.widths == [6, 8] and stacked.lengths == [4, 8]
    for tokens in (stacked, padded_on(stacked, "right")[0], some_rows(stacked, [0])):
        assert tokens.ids[0][tokens.mask[0]].tolist() == [5, 9, 33, 11]
        found = model.run(tokens).logits[0][tokens.mask[0]]
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)
    edit = S.resid_post[0].at(1).zero()
    swept = model.sweep(stacked, [edit], score=ic.score.logprob(7))
    for number, tokens in enumerate((row, other)):
        wanted = model.run(tokens, edits=edit).logits[0, -1].log_softmax(-1)[7]
        torch.testing.assert_close(swept.values[0, number].float(), wanted.as_subclass(torch.Tensor).float())
    closed = model.run(ids[:, mask[0]]).logits[0]
    assert not torch.allclose(closed, alone, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mistral", "gpt_oss", "gemma3", "qwen3_next"])
def test_holes_and_positions_while_generating(family: str) -> None:
    """transformers' `generate` counts a row's tokens, its `forward` columns; both are what we give."""
    model = tiny_model(family)
    ids = torch.tensor([[5, 9, 11, 17, 33, 11, 21, 40], [61, 7, 54, 12, 70, 3, 28, 8]])
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1], [1] * 8])
    plain = model.hf.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    made = model.generate({"input_ids": ids, "attention_mask": mask}, max_new_tokens=4, stop_at_eos=False)
    assert made.ids.tolist() == plain[:, 8:].tolist()
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    both = {"input_ids": ids, "attention_mask": mask, "position_ids": counted}
    with torch.no_grad():
        wanted = model.hf(**both, use_cache=False).logits
    torch.testing.assert_close(model.run(both).logits[mask.bool()].as_subclass(torch.Tensor), wanted[mask.bool()])
    assert wanted[:, -1].argmax(-1).tolist() == made.ids[:, 0].tolist()


def test_ids_that_look_padded_are_said_once() -> None:
    model = ic.load(tiny("llama"), check=False)
    padded = torch.tensor([[0, 0, 5, 9, 17]])
    with pytest.warns(UserWarning, match="padding id and come without an attention_mask") as told:
        model.run(padded)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.run(padded)
        fresh = ic.load(tiny("llama"), check=False)
        fresh.run({"input_ids": padded, "attention_mask": torch.ones_like(padded)})
        fresh.run(torch.tensor([[5, 0, 0, 9, 17]]))
        fresh.run(ic.Tokens(padded, torch.ones_like(padded, dtype=torch.bool)))


def test_texts_are_padded_on_the_side_that_the_model_takes() -> None:
    model = ic.load("toy:text", check=False)
    texts = ["Q: big\nA:", "Q: hot\nA: cold\n\nQ: wet\nA:"]
    left = model.tokens(texts)
    model.atlas.lacking["left padding"] = "as the self-check finds it in families that count columns"
    right = model.tokens(texts)
    assert left.mask[0].tolist() == sorted(left.mask[0].tolist())
    assert right.mask[0].tolist() == sorted(left.mask[0].tolist(), reverse=True)
    assert right.labels == left.labels and right.texts == left.texts
    assert right.ids[right.mask].tolist() == left.ids[left.mask].tolist()
