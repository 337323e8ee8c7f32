"""Answers without the image: generation against a mask by hand, and drops of planted scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_hooks import hooked, language, model_of
from interp_plugins.visual.depth import Layers
from interp_plugins.visual.truncation import answered, drops

import interp_core as ic
from interp_core import stats, testing

FEW = stats.Bootstrap(resamples=400)
EIGHT = Layers(tuple(range(8)), 8)


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_answers_equal_generation_by_hand(family: str) -> None:
    """By hand: no cache, the whole text again for every token, V masked for all text behind it."""
    model = model_of(family)
    prompt = model.tokens("what color is the circle ?", images=testing.pictures(1, (16, 16))[0])
    found = answered(model, prompt, [0, 2, model.n_layers], max_new_tokens=3)
    visual = prompt.rows.names["vision"][0]
    for layer, texts in found.items():
        ids, inputs = prompt.ids, dict(prompt.inputs)
        for _ in range(3):
            n = ids.shape[1]
            mask = torch.full((1, 1, n, n), float("-inf"), dtype=torch.float64).triu(1)
            mask[..., visual[-1] + 1 :, visual] = float("-inf")

            def put(_: object, args: object, kwargs: dict[str, object], mask: torch.Tensor = mask) -> object:
                return args, {**kwargs, "attention_mask": mask}

            blocks = language(model, family)[1][layer:]
            handles = [block.self_attn.register_forward_pre_hook(put, with_kwargs=True) for block in blocks]
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = (ids == 90).int()
            with hooked(handles), torch.no_grad():
                logits = model.hf(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        new = ids[0, prompt.ids.shape[1] :].tolist()
        wanted = model.tokenizer.decode(new[: new.index(2) + 1] if 2 in new else new, skip_special_tokens=True)
        assert texts == [wanted], (layer, texts, wanted)


def test_planted_drops() -> None:
    rng = np.random.default_rng(0)
    clean = rng.normal(0.9, 0.05, 60)
    scores = clean[:, None] - np.where(np.arange(8) < 5, 0.3, 0.0) + rng.normal(0, 0.02, (60, 8))
    found = drops(scores, clean, EIGHT, margin=0.02, boot=FEW)
    assert found.enough == found.for_good == 5 and "from layer 5" in str(found)
    np.testing.assert_allclose(found.drop.value, (clean[:, None] - scores).mean(0))
    assert (found.upper <= found.drop.high).all() and (found.upper > found.drop.value).all()
    assert found.at(9) is None and np.array_equal(found.at(5), found.per_sample[:, 5])  # type: ignore[arg-type]
    scores[:, 6] -= 0.3  # a layer that costs again: enough by the letter, not for good
    again = drops(scores, clean, EIGHT, margin=0.02, boot=FEW)
    assert (again.enough, again.for_good) == (5, 7)
    never = drops(scores - 1, clean, EIGHT, margin=0.02, boot=FEW)
    assert never.enough == never.for_good == 8 and "at no layer" in str(never)
    noisy = drops(clean[:, None] + rng.normal(0, 1, (60, 8)), clean, EIGHT, margin=0.02, boot=FEW)
    assert noisy.enough == 8  # too uncertain to say that nothing is lost
    assert len(found.table()) == 8 and "<svg" in found.chart().html()


def test_what_is_refused() -> None:
    model = model_of("llava")
    image = testing.pictures(1, (16, 16))[0]
    with pytest.raises(ic.PlanError, match="hold their answers"):
        answered(model, model.tokens("what color ?", " red", images=image), [0], max_new_tokens=1)
    with pytest.raises(ic.PlanError, match="no prompt has visual tokens"):
        answered(model, model.tokens("what color ?"), [0], max_new_tokens=1)
    with pytest.raises(ic.SiteError, match="no layer 9"):
        answered(model, model.tokens("what color ?", images=image), [9], max_new_tokens=1)
    with pytest.raises(ic.PlanError, match="drops: scores"):
        drops(np.zeros((3, 2)), np.zeros(3), EIGHT, margin=0.1)
