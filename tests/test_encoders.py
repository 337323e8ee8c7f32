"""Encoders, and the decoder halves of encoder-decoders: held against what transformers itself says of its patterns and
streams, and against attention written out; what cannot be served is refused by name.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_model
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core.architectures import gpt2
from interp_core.architectures.atlas import Entry
from interp_core.architectures.hook_points import HookPoint
from interp_core.architectures.unfit import UNFIT
from interp_core.testing.types import encoders, types

DECODERS = (
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small",
    "camembert", "ctrl", "data2vec-text", "electra", "ernie", "git", "marian", "mbart", "megatron-bert", "mvp",
    "openai-gpt", "pegasus", "plbart", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr",
    "whisper", "xglm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Causal model types whose blocks are BERT's, BART's, or of an own old form."""
ENCODERS = tuple(
    f"{name}ForMaskedLM"
    for name in (
        "Bert", "BigBird", "Camembert", "Data2VecText", "DistilBert", "Electra", "Ernie", "EuroBert", "Gte",
        "JinaEmbeddingsV3", "LayoutLM", "MPNet", "MegatronBert", "ModernBert", "NomicBert", "RemBert", "RoCBert",
        "RoFormer", "Roberta", "RobertaPreLayerNorm", "XLMRoberta", "XLMRobertaXL", "Xmod",
    )
)  # fmt: skip
FAST = (
    "bart", "bert", "ctrl", "git", "openai-gpt", "roformer", "xglm", "BertForMaskedLM", "DistilBertForMaskedLM",
    "MPNetForMaskedLM", "ModernBertForMaskedLM",
)  # fmt: skip
"""Of each way to attend and to norm one."""
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in (*DECODERS, *ENCODERS)]
HEADS = ("q", "k", "v", "z", "head_out", "attn_in", "attn_out", "mlp_in", "mlp_act", "resid_mid", "embed")


@cache
def eager(name: str) -> ic.Model:
    """In float64, which XGLM cannot run in."""
    return tiny_model(name, torch.float32 if name == "xglm" else torch.float64, "eager")


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.as_subclass(Tensor), b.as_subclass(Tensor), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_patterns_and_streams_are_those_that_transformers_gives(name: str, ids: Tensor) -> None:
    model = eager(name)
    assert not [row for row in model.check.rows if not row.ok and "padding" not in row.site]
    with torch.no_grad():
        said = model.hf(ids, output_attentions=True, output_hidden_states=True)
    lacking = {name for name in HEADS if not model.layers(name)}
    assert lacking == set() and bool(model.layers("mlp_out")) == ("xmod" not in name.lower())
    run = model.run(ids, read=[S.resid_pre, S.pattern])
    for layer in range(model.n_layers):
        close(run[S.resid_pre[layer]], said.hidden_states[layer])
        close(run[S.pattern[layer]], said.attentions[layer])


@pytest.mark.parametrize("name", EVERY)
def test_heads_attend_as_attention_written_out(name: str, ids: Tensor) -> None:
    """Where positions are not inside attention: the softmax of q and k, mixing v, is z, and its projection is added. An
    edit of a head's queries moves its pattern as the formula says."""
    model = eager(name)
    if any(word in name.lower() for word in ("roformer", "modernbert", "mpnet", "eurobert", "gte", "jina", "nomic")):
        pytest.skip("positions are inside attention")
    run = model.run(ids, read=[S.q[1], S.k[1], S.v[1], S.z[1], S.attn_out[1]])
    q, k, v, z = (run[site[1]].as_subclass(Tensor) for site in (S.q, S.k, S.v, S.z))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(model.d_head)
    if "causal" not in model.atlas.lacking:
        scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    close(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), z)
    close(model.project(run[S.z[1]], 1, added=True), run[S.attn_out[1]])
    moved = model.run(ids, read=S.z[1, 2], edits=S.q[1, 2].zero())[S.z[1, 2]]
    uniform = (scores * 0)[:, 2].masked_fill(scores[:, 2].isinf(), -torch.inf).softmax(-1)
    close(moved, uniform @ v[:, :, 2])


@pytest.mark.parametrize("name", ["bart", "openai-gpt", "bert-generation", "git"])
def test_a_last_block_that_norms_leaves_the_stream_to_be_unembedded(name: str, ids: Tensor) -> None:
    model = eager(name)
    run = model.run(ids, read=S.resid_post)
    close(model.readout(run[S.resid_post[2]]), run.logits)
    lens = ic.method("logit_lens")(model, ids, targets="final")
    close(lens.target_logprob[:, -1], run.logits.as_subclass(Tensor).log_softmax(-1).amax(-1).float())
    assert model.module("ln_final")(run[S.resid_post[0]]).equal(run[S.resid_post[0]])
    with pytest.raises(ic.CapabilityError, match="resid_post of the last layer is what the unembedding reads"):
        model.run(ids, read=S.final_norm)


# Encoders


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM", "RoFormerForMaskedLM"])
def test_an_encoder_sees_ahead_and_says_so(name: str, ids: Tensor) -> None:
    """In a pattern that is computed inside a module of its own too (RoFormer), where only the check can tell."""
    model = eager(name)
    assert (model.run(ids, read=S.pattern[1])[S.pattern[1]][:, :, 0, 1] > 0).all()
    assert "see later ones too" in model.atlas.lacking["causal"] and not model.atlas.reaches[0].causal
    assert any("see later ones too" in note for note in model.atlas.notes)
    with pytest.raises(ic.CapabilityError, match="generate: positions of this .* see later ones too.*mask token"):
        model.generate(ids, max_new_tokens=2)
    with pytest.raises(ic.CapabilityError, match="input_x_gradient needs causal of .*see later ones too"):
        ic.method("input_x_gradient")(model, ids)
    tokens = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), spans={"target": ((ic.Span(3, 5),),) * 2})
    with pytest.raises(ic.CapabilityError, match="score nll: positions of this .* score the logits at its mask token"):
        model.sweep(tokens, [S.z[0, 0].zero()], ic.score.nll(tokens))
    assert "causal" not in eager("bert").atlas.lacking and eager("bert").atlas.reaches[0].causal


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM"])
def test_a_sweep_of_an_encoder_is_its_runs(name: str, ids: Tensor) -> None:
    """Edits behind the first position change it: no keys of a clean pass may be taken for theirs."""
    model = eager(name)
    edits = [
        S.resid_post[0].at(2).zero(),
        S.z[1, 2].zero(),
        S.pattern[2].knockout(query=0, key=1),
        S.mlp_out[1].at(2).zero(),
    ]
    score = ic.score.logprob(17, at=0)
    swept = model.sweep(ids, edits, score)
    for row, edit in enumerate(edits):
        close(swept.values[row], score(model.run(ids, edits=edit)))
    clean = model.run(ids)
    assert all(abs(float(score(model.run(ids, edits=edit))[0] - score(clean)[0])) > 1e-6 for edit in edits)


def test_a_window_that_reaches_to_both_sides_is_left_a_key() -> None:
    """ModernBERT's: what lies behind it counts, what lies too far does not."""
    from interp_core.architectures.reach import Reach

    near = Reach(causal=False, window=3)
    assert list(near.visible([0, 1, 2, 3, 4, 5, 6], 3)) == [1, 2, 3, 4, 5]
    assert list(near.visible([2, 3, 4], 2)) == [0, 1, 2] and list(Reach(causal=False).visible([2, 3, 4], 2)) == [
        0,
        1,
        2,
    ]
    model = tiny_model("ModernBertForMaskedLM", torch.float64, "eager")
    ids = torch.arange(5, 17)[None]
    windowed = [layer for layer, reach in model.atlas.reaches.items() if reach.window]
    assert windowed
    reach, pattern = model.atlas.reaches[windowed[0]], model.run(ids, read=S.pattern)[S.pattern[windowed[0]]]
    for query in range(12):
        seen = reach.visible(range(12), query)
        assert (pattern[0, :, query] > 0).any(0).nonzero().flatten().tolist() == list(seen)
    with pytest.raises(ic.PlanError, match="would have nothing left to attend to"):
        model.run(ids, edits=S.pattern[windowed[0]].knockout(query=0, key=slice(0, len(reach.visible(range(12), 0)))))


def test_a_padded_row_of_an_encoder_is_the_row_alone(ids: Tensor) -> None:
    model = eager("BertForMaskedLM")
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    close(model.run(ic.Tokens(ids, mask)).logits[1, :4], model.run(ids[1:, :4]).logits[0])


@pytest.mark.parametrize("name", ["BertForMaskedLM", "bart"])
def test_nnsight_gives_the_same(name: str, ids: Tensor) -> None:
    model, other = eager(name), eager(name).on("nnsight")
    for site in (S.pattern[1], S.scores[1], S.resid_mid[2], S.embed):
        assert torch.equal(model.run(ids, read=site)[site], other.run(ids, read=site)[site])
    edit = S.pattern[1].knockout(query=3, key=1)
    assert torch.equal(model.run(ids, edits=edit).logits, other.run(ids, edits=edit).logits)


def test_a_folder_of_an_encoder_is_opened_as_one(tmp_path: Path) -> None:
    for name in ("BertForMaskedLM", "ModernBertForMaskedLM"):
        ic.testing.tiny(name).save_pretrained(tmp_path / name)
        assert type(ic.load(tmp_path / name).hf).__name__ == name
    ic.testing.tiny("bert").save_pretrained(tmp_path / "decoder")
    assert type(ic.load(tmp_path / "decoder").hf).__name__ == "BertLMHeadModel"


# What is refused


def small(kind: str, **config: Any) -> Any:
    """A model with weights of chance, of classes that no mapping used here has."""
    sizes = {"vocab_size": 96, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **config}
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**sizes)).eval()


SIDES = {
    f"{side}_{what}": size for side in ("encoder", "decoder")
    for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
}  # fmt: skip
SPEECH = {**SIDES, "decoder_start_token_id": 1, "max_source_positions": 8, "num_mel_bins": 4}
WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "T5ForConditionalGeneration": ({"num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 16}, "its decoder alone cannot either"),
    "BartForConditionalGeneration": (SIDES, "its decoder alone can, as BartForCausalLM: docs/families.md"),
    "WhisperForConditionalGeneration": (SPEECH, "its decoder alone can, as WhisperForCausalLM"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_encoder_decoders_are_refused_with_what_can_be_had(kind: str, tmp_path: Path) -> None:
    config, instead = WHOLE[kind]
    hf = small(kind, **config)
    hf.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ic.LoadError, match=f"{kind} is an encoder-decoder, which cannot be served: .*{instead}"):
        ic.load(hf)
    hf.save_pretrained(tmp_path)
    with pytest.raises(ic.LoadError, match=f"is an encoder-decoder, which cannot be served: .*{instead}"):
        ic.load(tmp_path)


def test_a_decoder_made_of_a_whole_is_that_decoder(ids: Tensor) -> None:
    whole = small("BartForConditionalGeneration", **SIDES)
    half = transformers.BartForCausalLM(whole.config).eval()
    half.set_decoder(whole.get_decoder())
    half.set_output_embeddings(whole.get_output_embeddings())
    with torch.no_grad():
        logits = whole.get_output_embeddings()(whole.get_decoder()(input_ids=ids).last_hidden_state)
    model = ic.load(half)
    close(model.run(ids).logits, logits)
    assert any("its cross-attention (encoder_attn) is left out" in note for note in model.atlas.notes)


def test_models_without_a_head_are_told_which_class_has_one() -> None:
    bert = transformers.BertModel(ic.testing.tiny("BertForMaskedLM").config).eval()
    with pytest.raises(ic.LoadError, match=r"its language modelling head, BertLMHeadModel or BertForMaskedLM$"):
        ic.load(bert)
    t5 = small("T5EncoderModel", num_layers=1, num_heads=2, d_ff=32, d_kv=16)
    with pytest.raises(ic.LoadError, match="transformers has no class of 't5' with a language modelling head that can"):
        ic.load(t5)


def test_sparse_attention_that_would_change_for_good_is_refused() -> None:
    with pytest.raises(
        ic.LoadError, match="BigBirdForCausalLM cannot be served: at the first text that is short.*original_full"
    ):
        ic.load(ic.testing.tiny("big_bird", attention_type="block_sparse"))


ODD = ("cpmant", "musicgen", "prophetnet", "reformer", "xlm", "xlnet", "LongformerForMaskedLM")


@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_refused_by_what_is_odd_about_them(name: str) -> None:
    hf = ic.testing.tiny(name)
    with pytest.raises(ic.LoadError) as refused:
        ic.load(hf)
    assert str(refused.value) == f"{type(hf).__name__} cannot be served: {UNFIT[hf.config.model_type]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*types(), *encoders()])
def test_whatever_transformers_builds_is_served_or_refused_in_our_words(name: str, ids: Tensor) -> None:
    try:
        hf = ic.testing.tiny(name)
    except ic.LoadError as error:
        pytest.skip(str(error))
    refused, model = "", None
    try:
        model = ic.load(hf)
    except (ic.LoadError, ic.CapabilityError) as error:
        refused = str(error)
    if model is None:
        assert type(hf).__name__ in refused or hf.config.model_type in refused
    else:
        assert model.run(ids % model.d_vocab).logits.shape == (2, 7, model.d_vocab)


# Loading never dies of one site


def unreadable(block: Any) -> None:
    """`mlp_in` at a place that raises, as code of others may in any way."""

    def get(call: Any, _units: Any) -> Tensor:
        return call.module.no_such_attribute

    block.stack.add(
        Entry("mlp_in", block.layer, HookPoint(f"{block.path}.mlp", "out", get=get), None, block.d_model, WHY)
    )


def uneditable(block: Any) -> None:
    """`mlp_in` that reads well, and raises where it is edited."""

    def get(call: Any, _units: Any) -> Tensor:
        return call.first

    def put(call: Any, _old: Tensor, new: Tensor) -> None:
        raise TypeError(f"no place for {list(new.shape)}")

    point = HookPoint(f"{block.path}.mlp", "out", get=get, put=put)
    block.stack.add(Entry("mlp_in", block.layer, point, point, block.d_model))


WHY = {"write": "it is only read", "grad": "it is only read"}


@pytest.mark.parametrize(
    ("locate", "use", "why"),
    [
        (unreadable, "read", "can be read fails .*no_such_attribute"),
        (uneditable, "write", "can be edited in layer 0 fails .no place for"),
    ],
)  # fmt: skip
def test_a_site_that_raises_is_withdrawn_and_the_rest_works(
    locate: Any, use: str, why: str, of_others: Any, ids: Tensor
) -> None:
    plain = ic.load(ic.testing.tiny("gpt2"))
    of_others(replace(gpt2.FAMILY, sites=(locate,)))
    model = ic.load(ic.testing.tiny("gpt2"))
    assert re.search(why, model.can("mlp_in", use)) and not plain.can("mlp_in", use)
    others = {name for name in plain.sites if name != "mlp_in"}
    assert others <= set(model.sites)
    for name in others:
        assert {use: model.can(name, use) for use in ("read", "write")} == {
            use: plain.can(name, use) for use in ("read", "write")
        }
    edit = S.z[1, 2].zero()
    assert torch.equal(model.run(ids, edits=edit).logits, plain.run(ids, edits=edit).logits)


def test_several_ids_that_end_a_text_do_not_matter(ids: Tensor) -> None:
    """As Llama 3's config lists them."""
    hf = ic.testing.tiny("llama")
    hf.config.eos_token_id = [1, 2]
    assert torch.equal(ic.load(hf).run(ids).logits, ic.load(ic.testing.tiny("llama")).run(ids).logits)


class Strict(transformers.LlamaForCausalLM):
    """Takes a text and its mask and nothing else."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def test_a_class_that_takes_few_arguments_runs_and_sweeps(ids: Tensor) -> None:
    hf = ic.testing.tiny("llama")
    hf.__class__ = Strict
    model, plain, score = ic.load(hf), ic.load(ic.testing.tiny("llama")), ic.score.logprob(7)
    assert set(model.sites) == set(plain.sites) and torch.equal(model.run(ids).logits, plain.run(ids).logits)
    edits = [S.z[1, 2].zero(), S.embed.at(3).scale(2.0)]
    close(model.sweep(ids, edits, score).values, plain.sweep(ids, edits, score).values)


def test_modules_that_layers_share_are_told(ids: Tensor) -> None:
    """In layers between the first and the last as well."""
    hf = ic.testing.tiny("llama", num_hidden_layers=5)
    hf.model.layers[3].mlp = hf.model.layers[2].mlp
    model = ic.load(hf)
    assert model.layers(S.mlp_act) == [0, 1, 4] and model.layers(S.q) == [0, 1, 2, 3, 4]
    hf.model.layers[3] = hf.model.layers[2]
    with pytest.raises(ic.LoadError, match="layers 2, 3 are one and the same block"):
        ic.load(hf)


def test_a_layout_that_nobody_knows_is_refused_in_our_words() -> None:
    hf = ic.testing.tiny("llama")
    hf.get_output_embeddings = object
    with pytest.raises(ic.LoadError, match="LlamaForCausalLM cannot be served: its config or its modules are not as"):
        ic.load(hf)
