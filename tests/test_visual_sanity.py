"""The sanity battery: it holds on the tiny families, and finds what is broken on purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interp_plugins.visual.sample import sample_of
from interp_plugins.visual.sanity import Sanity, battery

import interp_core as ic
from interp_core import testing

FAST = ("qwen3_vl", "llava")
FAMILIES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in testing.VISUAL
    if name != "qwen3_5_vision"  # linear attention, from which no token can be hidden
]
CHECKS = ["tokens", "projector", "other image", "identity", "blind", "knockout", "last layer", "repeated", "plain pass"]


def checked(family: str, model: ic.Model | None = None) -> Sanity:
    model = model or ic.load(testing.tiny(family), processor=testing.processor(family))
    images = testing.pictures(3, (16, 16))
    rows = [model.tokens("what color ?", " red yes", images=image) for image in images]
    return battery(model, [(f"s{i}", sample_of(rows[i]), rows[i + 1]) for i in range(2)])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_holds(family: str) -> None:
    found = checked(family)
    assert list(found.checks) == CHECKS and all(found.checks.values()), str(found)
    found.demand()
    assert len(found.ranges) == 2 and "visual in" in str(found) and found.row()["checks"]["blind"]["holds"]
    assert all(one.visual == sum(stop - start for start, stop in one.runs) for one in found.ranges)


def test_linear_attention_is_refused_by_name() -> None:
    with pytest.raises(ic.CapabilityError, match="layer 0 of this qwen3_5"):
        checked("qwen3_5_vision")


def test_a_model_that_answers_otherwise_each_time_is_found() -> None:
    """Bit for bit: noise of 1e-6 in a block is enough."""
    model = ic.load(testing.tiny("llava"), processor=testing.processor("llava"))
    block = model.hf.get_submodule("model.language_model.layers.1.mlp")
    handle = block.register_forward_hook(lambda _, __, out: out + 1e-6 * torch.randn_like(out))
    try:
        found = checked("llava", model)
    finally:
        handle.remove()
    assert not found.checks["repeated"] and found.checks["tokens"]
    with pytest.raises(ic.EffectError, match="repeated: .* in sample s"):
        found.demand()


def test_misplaced_tokens_are_found() -> None:
    """Positions called visual that are text: a placeholder too few."""
    model = ic.load(testing.tiny("llava"), processor=testing.processor("llava"))
    rows = [model.tokens("what color ?", " red yes", images=image) for image in testing.pictures(2, (16, 16))]
    spans = rows[0].spans["vision"][0][0]
    wrong = [
        replace(row, spans={**row.spans, "vision": ((ic.Span(spans.start + 1, spans.stop + 1),),)}) for row in rows
    ]
    found = battery(model, [("moved", sample_of(wrong[0]), wrong[1])])
    assert not found.checks["tokens"]
    with pytest.raises(ic.EffectError, match="tokens: 1 in sample moved"):
        found.demand()
    with pytest.raises(ic.PlanError, match="needs a sample"):
        battery(model, [])
