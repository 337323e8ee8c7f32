"""The other engines: the same plans, the same numbers, the user's own model left alone."""

from __future__ import annotations

from functools import cache

import pictures
import pytest
import torch
from conftest import sampled, tiny_model
from layouts import OWN_ATTENTION
from parity import cell
from reference import Reference
from tolerances import in_float32

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

ENGINES = ("nnsight", "transformer_lens")
_ROUTERS = dict.fromkeys(("router_logits", "router_weights"), "all")
_ROTARY = dict.fromkeys(("rot_q", "rot_k"), "all")
_DELEGATED = _ROTARY | {"scores": "all", "pattern": "write"}  # attention is the model's own module, hooked afterwards
_GATED = {"q": "all", "mixer_gate": "all"}
REFUSED = {
    "gpt_neox": _ROTARY, "phi3": _ROTARY, "gptj": {"pattern": "write"} if "gptj" in OWN_ATTENTION else _DELEGATED, "gpt_neo": {"scores": "all", "pattern": "write"},
    "opt": {"scores": "all", "pattern": "write"}, "granitemoe": _ROUTERS | {"embed": "all"},
    "deepseek_v3": _ROUTERS | _ROTARY | {"q": "all", "v": "all"}, "llama4": _ROUTERS | _DELEGATED | {"mlp_out": "all"},
    "qwen3_next": _ROUTERS | {"q": "all"}, "qwen3_5": _GATED, "qwen3_5_vision": _GATED, "qwen3_5_moe": _ROUTERS | _GATED,
    "qwen2_5_vl": _DELEGATED, "qwen3_vl": _DELEGATED, "qwen3_vl_moe": _ROUTERS | _DELEGATED,
} | dict.fromkeys(("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe"), _ROUTERS)  # fmt: skip
"""What the bridge cannot do, by family: no hook point that fires, or edits that it discards."""
NO_BRIDGE = ("internvl", "smolvlm")
FLOAT32_INSIDE = ("gpt_neox", "phi3", "gpt_oss", "gptj")
"""Families in which the bridge's own attention computes in float32."""
IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])


@cache
def other(engine: str, family: str, dtype: torch.dtype = torch.float32) -> ic.Model:
    """The same weights as `tiny_model`, behind another engine."""
    hf = testing.tiny(family, dtype=dtype)
    hf.set_attn_implementation("eager")
    return ic.load(hf, engine=engine)


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(torch.Tensor)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", sampled())
def test_every_site_agrees_with_hooks_by_hand(engine: str, family: str) -> None:
    hf = testing.tiny(family, dtype=torch.float64)
    hf.set_attn_implementation("eager")
    if engine == "transformer_lens" and family in NO_BRIDGE:
        with pytest.raises(
            ic.CapabilityError, match="Unsupported architecture.*; load with engine='torch' or 'nnsight'"
        ):
            ic.load(hf, engine=engine)
        return
    model, reference = ic.load(hf, engine=engine), Reference(family, hf)
    known = REFUSED.get(family, {}) if engine == "transformer_lens" else {}
    assert model.check is not None
    # transformers' eager attention gives NaN in float64 for rows of padding
    assert {row.site for row in model.check.rows if not row.ok} <= {*known, "left padding"}
    inside = engine == "transformer_lens" and family in FLOAT32_INSIDE
    for site in reference.sites():
        found = cell(model, reference, site, edit=not known.get(site)) if model.atlas.layers(site) else None
        assert (found is None) == (known.get(site) == "all"), (site, model.atlas.lacking.get(site))
        if found is not None:
            assert max(found) <= (2e-5 if inside or in_float32(family, site) else 1e-9), site
        if known.get(site) == "write":
            with pytest.raises(ic.CapabilityError, match="cannot be changed: self-check"):
                model.run(IDS, edits=S.named(site)[0].scale(2.0))


@pytest.mark.parametrize("engine", ENGINES)
def test_generation_with_edits_and_reads(engine: str, padded: ic.Tokens) -> None:
    reads = [S.resid_post, S.pattern[1], S.q[2]]
    edits = [S.resid_post[1].at(-1).add(torch.linspace(-3, 3, 64)), S.z[2, 1].zero()]
    made = [
        m.generate(padded, edits=edits, read=reads, max_new_tokens=6, stop_at_eos=False)
        for m in (tiny_model("llama", attention="eager"), other(engine, "llama"))
    ]
    assert torch.equal(made[0].ids, made[1].ids)
    assert str(made[0].receipts) == str(made[1].receipts)
    for a, b in zip(made[0].steps, made[1].steps, strict=True):
        for site in reads:
            torch.testing.assert_close(plain(a[site]), plain(b[site]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients(engine: str) -> None:
    reads = [S.resid_pre, S.z, S.pattern[1], S.mlp_out]
    runs = [
        m.run(IDS, read=reads, edits=S.resid_post[0].at(2).scale(1.5), grad=lambda logits: logits[:, -1, 7].sum())
        for m in (tiny_model("llama", torch.float64, "eager"), other(engine, "llama", torch.float64))
    ]
    for site in reads:
        torch.testing.assert_close(plain(runs[0].grad[site]), plain(runs[1].grad[site]), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_ends_with_the_last_site_read(engine: str) -> None:
    model = other(engine, "llama")
    above: list[int] = []
    block = model.engine.modules["model.layers.2"]
    with_hook = block.register_forward_pre_hook(lambda *_: above.append(1))
    try:
        run = model.run(IDS, read=S.resid_post[0], logits=False)
    finally:
        with_hook.remove()
    assert not above
    torch.testing.assert_close(
        plain(run[S.resid_post[0]]), plain(tiny_model("llama").run(IDS, read=S.resid_post[0])[S.resid_post[0]])
    )


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_that_raises_leaves_nothing_behind(engine: str, error: type[BaseException]) -> None:
    model = other(engine, "llama")

    def fails(_: torch.Tensor) -> torch.Tensor:
        raise error("on purpose")

    before = plain(model.run(IDS).logits)
    with pytest.raises(error, match="on purpose"):
        model.run(IDS, edits=[S.pattern[1].apply(lambda x: x * 0.5), S.resid_post[1].apply(fails)])
    assert torch.equal(plain(model.run(IDS).logits), before)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_users_model_is_left_alone_and_no_weight_is_copied(engine: str) -> None:
    hf = testing.tiny("qwen3_moe")
    names, forward = list(hf.state_dict()), hf.model.layers[0].forward
    wanted = hf(IDS).logits
    model = ic.load(hf, engine=engine)
    model.run(IDS, read=S.z, edits=S.resid_post[1].scale(2.0))
    assert list(hf.state_dict()) == names
    assert hf.model.layers[0].forward == forward
    assert torch.equal(hf(IDS).logits, wanted)
    assert {p.data_ptr() for p in model.engine.model.parameters()} == {p.data_ptr() for p in hf.parameters()}
    assert f"engine {engine}" in repr(model)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "gemma3_vision"])
def test_images_on_nnsight(family: str) -> None:
    """What is passed in another order, or only with the prompt, is found there."""
    inputs = pictures.inputs(family, [[pictures.picture(family)]])
    here, there = tiny_model(family, attention="eager"), other("nnsight", family)
    names = [S.vision_embed, S.deepstack, S.resid_pre]
    reads = [site for site in names if not here.can(site.name, "read")]
    edits = [S.resid_pre[1].at("vision").scale(1.5)]
    made = [model.generate(inputs, read=reads, edits=edits, max_new_tokens=3) for model in (here, there)]
    assert torch.equal(made[0].ids, made[1].ids)
    assert len(made[0].steps) == len(made[1].steps) == 3
    runs = [model.run(inputs, read=reads, edits=edits) for model in (here, there)]
    for site in reads:
        torch.testing.assert_close(plain(runs[0][site]), plain(runs[1][site]))
    torch.testing.assert_close(plain(runs[0].logits), plain(runs[1].logits))
    assert made[0].receipts == made[1].receipts
    text = [model.run(IDS, read=S.resid_post)[S.resid_post] for model in (here, there)]
    assert torch.equal(*text)
