"""What wraps a model: adapters, torch's compiler and heads of other kinds. Sites are held against hooks that are written
by hand on the wrapped model's own modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layouts import LAYOUT
from torch import Tensor, nn
from wrapping import FAMILIES, IDS, hold, output_projection

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.testing.state import State

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:Already unmerged:UserWarning",
    "ignore:fan_in_fan_out is set:UserWarning",
)


# torch's compiler


@pytest.mark.parametrize("where", ["", "model.layers.1", "model.layers.1.mlp", "forward", "whole"])
def test_compiled_modules_run_as_written(where: str) -> None:
    hf = testing.tiny("llama")
    source = torch.compile(hf, backend="eager") if where == "whole" else hf
    block = hf.model.layers[1]
    if where == "forward":
        block.forward = torch.compile(block.forward, backend="eager")
    elif where != "whole":
        hf.get_submodule(where).compile(backend="eager")
    compiled = [(module, dict(vars(module))) for module in hf.modules()]
    model = ic.load(source)
    assert model.hf is hf
    hold(model, testing.tiny("llama"), "llama")
    edited = model.run(IDS, edits=S.mlp_act[1, 3].zero())
    assert torch.equal(
        edited.logits.plain, ic.load(testing.tiny("llama")).run(IDS, edits=S.mlp_act[1, 3].zero()).logits.plain
    )
    silenced, score = S.z[0, 2].zero(), ic.score.logprob(3)
    swept, alone = model.sweep(IDS[:1], [silenced], score=score), score(model.run(IDS[:1], edits=silenced))
    torch.testing.assert_close(swept.values.flatten(), alone.to(swept.values), atol=1e-4, rtol=1e-4)
    assert model.generate(IDS, max_new_tokens=2, read=S.mlp_out[1]).steps[1][S.mlp_out[1]].shape == (2, 1, 64)
    for module, own in compiled:  # what was compiled is in its place again
        assert vars(module).get("_compiled_call_impl") is own.get("_compiled_call_impl")
        assert vars(module).get("forward") is own.get("forward")
    if where == "forward":
        with pytest.raises(
            ic.CapabilityError, match=r"forward of model\.layers\.1 is a compiled function of the origi"
        ):
            ic.load(hf, engine="nnsight")


# Heads of other kinds


def classifier(kind: str, family: str = "llama", labels: int = 3) -> Any:
    base = testing.tiny(family)
    base.config.num_labels, base.config.pad_token_id = labels, 0
    torch.manual_seed(0)
    hf = getattr(transformers, f"AutoModelFor{kind}").from_config(base.config).eval()
    hf.base_model.load_state_dict(base.base_model.state_dict())
    return hf


@pytest.mark.parametrize(("family", "labels"), [("llama", 1), ("gpt2", 3), ("mixtral", 2), ("gemma2", 1)])
def test_sequence_classifiers_give_their_verdict_at_every_position(family: str, labels: int) -> None:
    hf = classifier("SequenceClassification", family, labels)
    before, model = State.of(hf), ic.load(hf)
    run = model.run(IDS, read=S.resid_post[-1])
    with torch.no_grad():
        for end in range(2, 8):
            torch.testing.assert_close(
                run.logits.plain[:, end - 1], hf(input_ids=IDS[:, :end]).logits, atol=1e-5, rtol=1e-5
            )
    if labels == 1:
        assert f"after 6:22  LABEL_0 {float(run.logits.plain[0, -1]):.4g}" in str(run)
    assert model.d_vocab == labels and "labels, at every position" in str(model.atlas.notes)
    torch.testing.assert_close(model.weights(S.logits), hf.score.weight.mT)
    torch.testing.assert_close(model.readout(run[S.resid_post[-1]].plain), run.logits.plain, atol=1e-5, rtol=1e-5)
    block = hf.get_submodule(LAYOUT.get(family, LAYOUT["llama"])["blocks"])[1]
    handle = block.register_forward_hook(lambda _m, _a, out: out.mul(2) if isinstance(out, Tensor) else (out[0] * 2,))
    with torch.no_grad():
        doubled = hf(input_ids=IDS).logits
    handle.remove()
    edited = model.run(IDS, edits=S.resid_post[1].scale(2.0))
    torch.testing.assert_close(edited.logits.plain[:, -1], doubled, atol=1e-5, rtol=1e-5)
    assert not any(before.changes(part, State.of(hf)) for part in ("hooks", "weights", "modes", "config"))


def test_a_classifier_on_disk_is_opened_with_its_head(tmp_path: Path) -> None:
    hf = classifier("SequenceClassification", "llama", 2)
    hf.config.tie_word_embeddings = True  # so that a language model would lack nothing of it
    hf.save_pretrained(tmp_path)
    model = ic.load(tmp_path)
    assert model.d_vocab == 2
    torch.testing.assert_close(
        model.run(IDS).logits.plain[:, -1], hf(input_ids=IDS).logits.detach(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("family", "setting"), [("gemma2", "final_logit_softcapping"), ("minicpm3", "dim_model_base")])
def test_scales_and_caps_of_tokens_are_not_those_of_labels(family: str, setting: str) -> None:
    """And the classifier's own settings stay as they are, and are followed."""
    hf = classifier("SequenceClassification", family)
    kept, model = getattr(hf.config, setting), ic.load(hf)
    rows = ic.Tokens.stack([ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in (IDS[:1], IDS[1:, :3])])
    for row, found in zip((IDS[:1], IDS[1:, :3]), model.run(rows, logits=-1).logits.plain, strict=True):
        torch.testing.assert_close(found, hf(input_ids=row).logits[0].detach(), atol=1e-5, rtol=1e-5)
    hf.config.id2label = {0: "bad", 1: "good", 2: "none"}
    assert model.run(IDS).logits.shape == (2, 7, 3) and model.word(1) == "good" and getattr(hf.config, setting) == kept


def test_heads_that_cannot_be_served_are_told_what_is_so() -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    tagger = transformers.BertForTokenClassification(transformers.BertConfig(intermediate_size=48, **sizes)).eval()
    with pytest.raises(ic.LoadError, match="cannot take the place of BertLMHeadModel's unembedding, which lies in"):
        ic.load(tagger)
    bart = transformers.BartConfig(vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, pad_token_id=0)
    with pytest.raises(
        ic.LoadError, match="BartForSequenceClassification is an encoder-decoder, which cannot be served"
    ):
        ic.load(transformers.BartForSequenceClassification(bart).eval())


def test_labels_are_no_tokens_and_the_head_is_the_present_one() -> None:
    hf = classifier("SequenceClassification", "llama", 2)
    hf.config.id2label = {0: "bad", 1: "good"}
    model = ic.load(hf)
    assert model.word(1) == "good"
    with pytest.raises(ic.TextError, match="token id 2 does not exist"):
        model.word(2)
    with pytest.raises(ic.CapabilityError, match="logits of this model are of 2 labels, not of tokens"):
        model.generate(IDS)
    with pytest.raises(ic.TextError, match="token id 96 does not exist: the model has 96 tokens"):
        model.run(torch.tensor([[96, 1]]))
    hf.score = nn.Linear(64, 5, bias=False)
    run = model.run(IDS)
    assert model.d_vocab == 5
    torch.testing.assert_close(run.logits.plain[:, -1], hf(input_ids=IDS).logits.detach(), atol=1e-5, rtol=1e-5)


def test_other_heads_load_where_they_are_made_of_each_position() -> None:
    hf = classifier("TokenClassification", "llama", 3)
    hold(ic.load(hf), hf, "llama")
    hf = classifier("QuestionAnswering", "llama", 2)
    out = hf(input_ids=IDS)
    ends = torch.stack([out.start_logits, out.end_logits], -1).detach()
    torch.testing.assert_close(ic.load(hf).run(IDS).logits.plain, ends, atol=1e-5, rtol=1e-5)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
    )
    pooled = transformers.BertForSequenceClassification(config).eval()
    with pytest.raises(ic.LoadError, match="head of BertForSequenceClassification cannot take the place of"):
        ic.load(pooled)


# Adapters


class Beside(nn.Module):
    """A projection with something beside it, as adapters put one in its place."""

    def __init__(self, base: Any, width: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.base_layer, self.more = base, nn.Linear(64, width, bias=False)

    def get_base_layer(self) -> Any:
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.more(x)


def test_an_engine_whose_copy_leaves_an_adapter_out_is_refused() -> None:
    """The bridge splits a fused projection by its weight, beside which the adapter lies."""
    hf = testing.tiny("gpt2")
    attention = hf.transformer.h[0].attn
    attention.c_attn = Beside(attention.c_attn, 192)
    hold(ic.load(hf), hf, "gpt2")
    with pytest.raises(
        ic.CapabilityError, match="'transformer_lens' gives other logits than this GPT2LMHeadModel itself"
    ):
        ic.load(hf, engine="transformer_lens")


class Around(nn.Module):
    """Something around a router that hides what the router is."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor) -> Any:
        return self.router(x)


def test_what_hides_a_router_is_named() -> None:
    hf = testing.tiny("mixtral")
    hf.model.layers[0].mlp.gate = Around(hf.model.layers[0].mlp.gate)
    model = ic.load(hf)
    hold(model, hf, "mixtral")
    with pytest.raises(
        ic.SiteError, match=r"layer 0 has no router_logits \(what is around the router \(Around\) does not"
    ):
        model.run(IDS, read=S.router_logits[0])
    assert model.run(IDS, read=S.router_logits[1])[S.router_logits[1]].shape == (2, 7, 6)


PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(
    not PEFT, reason="peft is not installed: pip install -c constraints.txt -e '.[wrapped]'"
)


def adapted(family: str = "llama", kind: str = "LoraConfig", name: str = "default", **more: Any) -> Any:
    import peft

    settings = {"init_lora_weights": False, "r": 4} if kind == "LoraConfig" else {}
    names = ["c_proj", "c_attn"] if family == "gpt2" else ["o_proj", "q_proj", "lm_head", "embed_tokens"]
    settings |= {} if "num_virtual_tokens" in more else {"target_modules": names}
    config = getattr(peft, kind)(**({"task_type": "CAUSAL_LM"} | settings | more))
    torch.manual_seed(0)
    model = peft.get_peft_model(testing.tiny(family), config, adapter_name=name)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


INSIDE = "base_model.model."


@needs_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_part_of_what_every_site_shows(family: str) -> None:
    peft_model = adapted(family)
    before = State.of(peft_model)
    model = ic.load(peft_model)
    hold(model, peft_model, family, INSIDE)
    projection = output_projection(peft_model, family, 1, INSIDE)
    low = projection.lora_B["default"].weight @ projection.lora_A["default"].weight * projection.scaling["default"]
    base = projection.base_layer.weight
    whole = low + (base.mT if family == "gpt2" else base)
    torch.testing.assert_close(model.weights(S.z[1]).flatten(0, 1), whole.mT, atol=1e-5, rtol=1e-5)
    assert not any(before.changes(part, State.of(peft_model)) for part in ("hooks", "weights", "modes", "config"))
    run, graded = model.run(IDS, read=S.head_out[1]), model.run(IDS, read=S.z[1], grad=lambda x: x.pow(2).sum())
    merged = ic.load(peft_model.merge_and_unload())
    again = merged.run(IDS, read=S.head_out[1])
    by_merged = merged.run(IDS, read=S.z[1], grad=lambda x: x.pow(2).sum())
    torch.testing.assert_close(graded.grad[S.z[1]].plain, by_merged.grad[S.z[1]].plain, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(run.logits.plain, again.logits.plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run[S.head_out[1]].plain, again[S.head_out[1]].plain, atol=1e-4, rtol=1e-4)


@needs_peft
@pytest.mark.parametrize("engine", ["torch", "nnsight"])
def test_adapters_switched_after_load_are_followed(engine: str) -> None:
    import peft

    peft_model = adapted(name="one")
    config = peft.LoraConfig(target_modules=["o_proj", "v_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    peft_model.add_adapter("two", config)
    model = ic.load(peft_model.eval(), engine=engine)
    seen, prints = [model.run(IDS).logits.plain], [model.fingerprint()]

    def followed() -> None:
        hold(model, peft_model, "llama", INSIDE)
        logits = model.run(IDS).logits.plain
        assert all(not torch.allclose(logits, other, atol=1e-3) for other in seen)
        seen.append(logits)
        prints.append(model.fingerprint())
        assert len({*prints}) == len(prints)

    peft_model.set_adapter("two")
    followed()
    with peft_model.disable_adapter():
        followed()
    peft_model.base_model.model.model.layers[1].self_attn.o_proj.set_scale("two", 3.0)
    followed()
    peft_model.merge_adapter()
    hold(model, peft_model, "llama", INSIDE)
    peft_model.unmerge_adapter()
    peft_model.delete_adapter("one")
    hold(model, peft_model, "llama", INSIDE)


@needs_peft
def test_adapters_attached_and_taken_off_after_load() -> None:
    """`inject_adapter_in_model` is what transformers' own `add_adapter` calls."""
    import peft

    hf = testing.tiny("llama")
    model = ic.load(hf)
    clean = model.run(IDS, read=S.head_out[1])
    config = peft.LoraConfig(target_modules=["o_proj", "lm_head"], r=4, init_lora_weights=False)
    peft_model = peft.get_peft_model(hf, config).eval()
    hold(model, peft_model, "llama", INSIDE)
    assert not torch.allclose(model.run(IDS).logits.plain, clean.logits.plain, atol=1e-3)
    peft_model.unload()
    again = model.run(IDS, read=S.head_out[1])
    assert torch.equal(again.logits.plain, clean.logits.plain)
    assert torch.equal(again[S.head_out[1]].plain, clean[S.head_out[1]].plain)
    peft.inject_adapter_in_model(config, hf)
    hold(model, hf.eval(), "llama")


@needs_peft
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("LoraConfig", {"use_dora": True, "target_modules": ["o_proj"]}),
        ("LoraConfig", {"lora_bias": True, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}),
        ("IA3Config", {"target_modules": ["k_proj", "o_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("OFTConfig", {"oft_block_size": 8, "r": 0, "target_modules": ["o_proj"]}),
        ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
        ("VeraConfig", {"target_modules": ["o_proj"]}),
    ],
)
def test_adapters_of_other_kinds(kind: str, more: dict[str, Any]) -> None:
    peft_model = adapted("llama", kind, **more)
    hold(ic.load(peft_model), peft_model, "llama", INSIDE)


@needs_peft
def test_adapters_on_experts() -> None:
    peft_model = adapted("mixtral", target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"])
    model = ic.load(peft_model)
    hold(model, peft_model, "mixtral", INSIDE)
    run = model.run(IDS, read=[S.expert_out[1], S.mlp_out[1]])
    torch.testing.assert_close(run[S.expert_out[1]].plain.sum(2), run[S.mlp_out[1]].plain, atol=1e-4, rtol=1e-4)


@needs_peft
def test_wrappers_that_are_more_than_their_layers_are_refused() -> None:
    for kind in ("PromptTuningConfig", "PrefixTuningConfig"):
        with pytest.raises(
            ic.LoadError, match=r"_TUNING of this PeftModelForCausalLM acts by what the wrapper puts before"
        ):
            ic.load(adapted("llama", kind, num_virtual_tokens=3))
    with pytest.raises(
        ic.LoadError, match="LORA of this PeftModelForCausalLM gives other logits than the model that it"
    ):
        ic.load(adapted("llama", target_modules=["o_proj"], alora_invocation_tokens=[3, 4]))
    with pytest.raises(ic.CapabilityError, match=r"p=0.5 of .*lora_dropout.default \(Dropout\) makes runs differ"):
        ic.load(adapted("llama", lora_dropout=0.5).train())
    with pytest.raises(
        ic.LoadError, match="POLY of this PeftModelForCausalLM cannot run a text: task_ids should not be"
    ):
        ic.load(adapted("llama", "PolyConfig", target_modules=["o_proj"], r=4))


@needs_peft
def test_an_adapted_classifier() -> None:
    import peft

    hf = classifier("SequenceClassification", "llama", 2)
    model = ic.load(hf)
    before = model.run(IDS).logits.plain
    config = peft.LoraConfig(target_modules=["o_proj"], r=4, init_lora_weights=False, task_type="SEQ_CLS")
    peft_model = peft.get_peft_model(hf, config).eval()
    with torch.no_grad():
        peft_model.base_model.model.score.modules_to_save["default"].weight.add_(1)
        verdict = peft_model(input_ids=IDS).logits
    for there in (model, ic.load(peft_model)):
        torch.testing.assert_close(there.run(IDS).logits.plain[:, -1], verdict, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, -1], verdict, atol=1e-3)
