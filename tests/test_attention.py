"""The attention tap: right for every kind of attention, and silent towards all other layers."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, tiny_model
from layouts import OWN_ATTENTION
from test_engine import executed
from tolerances import close

import interp_core as ic
from interp_core import sites as S

TAPPED = [family for family in FAMILIES if family not in OWN_ATTENTION]
COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("family", TAPPED)
def test_reading_attention_changes_no_other_number(family: str, ids: torch.Tensor) -> None:
    model = tiny_model(family, torch.float64)
    plain = model.run(ids, read=S.resid_post)
    read = model.run(ids, read=[S.resid_post, S.pattern, S.scores])
    close(read.logits, plain.logits, model)
    one = model.run(ids, read=[S.resid_post, S.pattern[1]])
    assert torch.equal(one[S.resid_post[0]], plain[S.resid_post[0]])
    with torch.no_grad():
        assert torch.equal(model.hf(input_ids=ids, use_cache=False).logits, model.run(ids).logits)


def test_other_layers_keep_their_kernel(ids: torch.Tensor) -> None:
    model = tiny_model("qwen3")
    assert executed(lambda: model.run(ids)).attentions == 3
    assert executed(lambda: model.run(ids, read=S.pattern[1])).attentions == 2
    assert executed(lambda: model.run(ids, read=S.pattern)).attentions == 0
    assert executed(lambda: model.run(ids, read=[S.z, S.q, S.v])).attentions == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_equal_those_of_eager_attention(family: str, ids: torch.Tensor, padded: ic.Tokens) -> None:
    eager = tiny_model(family, attention="eager")
    with torch.no_grad():
        wanted = eager.hf(input_ids=ids, output_attentions=True, use_cache=False).attentions
    found = tiny_model(family).run(ids, read=S.pattern)
    for layer, pattern in zip(eager.atlas.layers("pattern"), wanted, strict=True):
        torch.testing.assert_close(found[S.pattern[layer]].as_subclass(torch.Tensor), pattern, atol=2e-6, rtol=2e-5)
    inputs = {"attention_mask": padded.mask.long(), "position_ids": (padded.mask.long().cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        wanted = eager.hf(input_ids=padded.ids, **inputs, output_attentions=True, use_cache=False).attentions
    found = tiny_model(family).run(padded, read=S.pattern)
    for layer, pattern in zip(eager.atlas.layers("pattern"), wanted, strict=True):
        real = padded.mask[:, None, :, None].expand_as(pattern)
        torch.testing.assert_close(
            found[S.pattern[layer]].as_subclass(torch.Tensor)[real], pattern[real], atol=2e-6, rtol=2e-5
        )


def _model(name: str, **config: object) -> ic.Model:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**{**COMMON, **config})
    return ic.load(getattr(transformers, f"{name}ForCausalLM")(made).eval())


def test_sinks(ids: torch.Tensor) -> None:
    model = _model(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, intermediate_size=64, sliding_window=4
    )
    torch.nn.init.normal_(model.hf.model.layers[0].self_attn.sinks, std=2.0)
    assert model.check is not None and model.check.ok
    with torch.no_grad():
        wanted = model.hf(input_ids=ids, output_attentions=True, use_cache=False)
    run = model.run(ids, read=S.pattern)
    torch.testing.assert_close(run.logits.as_subclass(torch.Tensor), wanted.logits, atol=1e-5, rtol=1e-5)
    for layer, pattern in enumerate(wanted.attentions):
        torch.testing.assert_close(run[S.pattern[layer]].as_subclass(torch.Tensor), pattern, atol=1e-6, rtol=1e-5)
    assert float(run[S.pattern[0]].sum(-1).max()) < 1


def test_gated_attention(ids: torch.Tensor) -> None:
    model = _model(
        "Qwen3Next", head_dim=16, layer_types=["linear_attention", "full_attention"], num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, intermediate_size=64,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    assert model.atlas.entries["q", 1].sizes == {"head": 4, "d_head": 16}  # its projection also gives the gate
    assert model.atlas.layers("pattern") == [1] and model.atlas.layers("z") == [1]
    with torch.no_grad():
        plain = model.hf(input_ids=ids, use_cache=False).logits
    run = model.run(ids, read=[S.pattern, S.z, S.head_out, S.attn_out[1]])
    torch.testing.assert_close(run.logits.as_subclass(torch.Tensor), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        run[S.head_out[1]].sum(2), run[S.attn_out[1]].as_subclass(torch.Tensor), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ic.SiteError, match="layer 0 has no pattern; layers 1 have"):
        model.run(ids, read=S.pattern[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_knockout_hides_keys_and_renormalises(family: str, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    plain = model.run(ids, read=S.pattern[1])[S.pattern[1]]
    edit = S.pattern[1].knockout(query=[5, 6], key=[4, 5])
    run = model.run(ids, read=S.pattern[1], edits=edit)
    after = run[S.pattern[1]].as_subclass(torch.Tensor)
    assert not after[:, :, 5:7, 4:6].any()
    sinks = 1 - plain.sum(-1, keepdim=True) if family == "gpt_oss" else torch.zeros(2, 4, 7, 1)
    assert torch.equal(after[:, :, :5], plain[:, :, :5])
    rest = plain.clone()
    rest[:, :, :, 4:6] = 0
    rest = rest / (rest.sum(-1, keepdim=True) + sinks)
    if family != "gpt_oss":
        torch.testing.assert_close(after.sum(-1), torch.ones(2, 4, 7))
    # What is left over (a sink's share: one minus the rest) is known to a few eps of one, and becomes the whole.
    left = 1 - plain[:, :, 5:7, 4:6].as_subclass(torch.Tensor).sum(-1, keepdim=True)
    apart = (after - rest)[:, :, 5:7].as_subclass(torch.Tensor).abs()
    assert (apart <= 8 * torch.finfo(torch.float32).eps / left.clamp(min=1e-6)).all(), (apart / left).max()
    taken = plain[:, :, 5:7, 4:6].norm()
    assert run.receipts[0].norm == pytest.approx(float(taken), rel=1e-3)


def test_knockout_of_one_head_only(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    run = model.run(ids, read=S.pattern[1], edits=S.pattern[1, [0, 2]].knockout(query=-1, key=slice(0, 3)))
    after = run[S.pattern[1]]
    assert not after[:, [0, 2], -1, :3].any() and after[:, [1, 3], -1, :3].all()


def test_knockout_needs_something_left(ids: torch.Tensor, padded: ic.Tokens) -> None:
    model = tiny_model("llama")
    with pytest.raises(ic.PlanError, match=r"position 0 of row 0 would have nothing left .*\(query=slice\(1, None\)\)"):
        model.run(ids, edits=S.pattern.knockout(key=0))
    with pytest.raises(ic.PlanError, match="position 1 of row 2 would have nothing left"):
        model.run(padded, edits=S.pattern.knockout(query=-1, key=slice(0, 2)))
    model.run(ids, edits=S.pattern.knockout(query=slice(1, None), key=0))


def test_zero_does_not_renormalise(ids: torch.Tensor) -> None:
    model = tiny_model("qwen2")
    run = model.run(ids, read=S.pattern[0], edits=S.pattern[0].at(query=-1, key=2).zero())
    assert float(run[S.pattern[0]][:, :, -1].sum(-1).min()) < 0.95


def test_pattern_edit_moves_z(ids: torch.Tensor) -> None:
    model = tiny_model("qwen3")
    pattern = torch.zeros(2, 4, 7, 7)
    pattern[..., 0] = 1  # every query looks at the first key only
    run = model.run(ids, read=[S.z[1], S.v[1]], edits=S.pattern[1].set(pattern))
    first = run[S.v[1]][:, :1].repeat_interleave(2, 2).expand(-1, 7, -1, -1)
    torch.testing.assert_close(run[S.z[1]].as_subclass(torch.Tensor), first)


def test_half_precision(ids: torch.Tensor) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_model("llama", dtype)
        run = model.run(ids, read=S.pattern, edits=S.scores[1].at(query=-1, key=0).scale(2.0))
        assert run[S.pattern[0]].dtype == dtype
        torch.testing.assert_close(run[S.pattern[0]].float().sum(-1), torch.ones(2, 4, 7), atol=2e-2, rtol=0)


def test_attention_implementations_without_scores_are_refused(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    model.hf.set_attn_implementation("flex_attention")
    try:
        with pytest.raises(ic.CapabilityError, match="need attn_implementation 'eager' or 'sdpa'.*'flex_attention'"):
            model.engine.compile(ic.Plan.of(S.pattern), model.atlas)
    finally:
        model.hf.set_attn_implementation("sdpa")
