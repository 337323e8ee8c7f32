"""The information horizon: planted tables, removal against masks by hand, and a cliff where attention was cut off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_hooks import hidden_by_hand, logp_by_hand, model_of, places, texts
from interp_plugins.visual import horizon as h
from interp_plugins.visual.depth import Layers
from interp_plugins.visual.removals import HorizonResult

import interp_core as ic
from interp_core import testing

LAYERS = Layers(tuple(range(8)), 8)
FRACTIONS = (0.75, 0.5, 0.25)


def planted(information_ends: int, ranking_ends: int, n: int = 40) -> tuple[list[np.ndarray], np.ndarray]:
    """Samples of 9 or 16 visual tokens with information 0.2 below a layer, and ranked 0.5 better than random below one."""
    rng, numbers = np.random.default_rng(0), np.arange(8)
    information = [
        np.where(numbers < information_ends, 0.2, 0)[:, None] + rng.normal(0, 0.002, (8, (9, 16)[i % 2]))
        for i in range(n)
    ]
    gains = np.where(numbers < ranking_ends, 0.5, 0)[:, None] + rng.normal(0, 0.05, (n, 8, 3))
    return information, gains - gains.mean(0) * (numbers >= ranking_ends)[:, None]


def test_criteria_are_told_apart() -> None:
    for first, second in ((5, 3), (3, 6)):
        information, gains = planted(first, second)
        found = h.horizon(information, gains, LAYERS, FRACTIONS, 0.01, resamples=300)
        assert (found.information, found.ranking) == (first, second)
        assert f"from layer {first} on" in str(found) and len(found.table()) == 8
    information, gains = planted(8, 8)
    found = h.horizon(information, gains, LAYERS, FRACTIONS, 0.01, resamples=300)
    assert (found.information, found.ranking) == (8, 8) and "nowhere" in str(found)
    assert h.horizon(information, gains, LAYERS, FRACTIONS, 0.5, margin=1.0, resamples=300).ranking == 0
    assert h.horizon(information, gains, LAYERS, FRACTIONS, 0.5, resamples=300).information == 0


def test_a_cliff_is_claimed_only_where_ranked_beats_random_before_it_and_not_after() -> None:
    gains = planted(5, 5)[1]
    assert h.claim(gains, LAYERS, 5, resamples=300).holds
    assert not h.claim(gains, LAYERS, 2, resamples=300).holds  # ranked is still better after it
    never = h.claim(planted(5, 0)[1], LAYERS, 5, resamples=300)
    assert not never.holds and "not claimed" in str(never)  # ranked is no better before it
    for cliff in (0, 8):  # nothing before, or nothing after: nothing to claim
        assert not h.claim(gains, LAYERS, cliff, resamples=300).holds
    tiny = gains + np.where(np.arange(8) < 5, 0, 0.001)[:, None]
    tiny[:, 5:] -= 0.99 * (tiny[:, 5:] - tiny[:, 5:].mean(0))  # sure, and next to nothing
    assert (
        not h.claim(tiny, LAYERS, 5, resamples=300).holds and h.claim(tiny, LAYERS, 5, margin=0.01, resamples=300).holds
    )
    unsure = gains.copy()
    unsure[:, 5:] += np.random.default_rng(1).normal(0, 9, (40, 1, 1))  # an interval that is wide shows nothing
    assert not h.claim(unsure, LAYERS, 5, margin=0.01, resamples=300).holds


def test_shape_over_tokens_and_noise_by_hand() -> None:
    values = np.array([[1.0, 1, 1, 1], [0, 0, 0, 4], [0, 0, 0, 0]])
    assert h.gini(values).tolist() == [0, 0.75, 0] and h.variation(values).tolist() == pytest.approx([0, 3**0.5, 0])
    assert h.noise([np.linspace(-1, 0, 101), np.linspace(0, 1, 100)]) == pytest.approx(0.95, abs=0.01)
    with pytest.raises(ic.PlanError, match="give finite ones, or epsilon="):
        h.noise([])
    with pytest.raises(ic.PlanError, match="advantages"):
        h.horizon([values], np.zeros((2, 3, 3)), Layers((0, 1, 2), 3), FRACTIONS, 0.1)


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_removal_equals_masks_by_hand(family: str) -> None:
    model, (clean, blank, _) = model_of(family), texts(family)
    visual, behind, _ = places(clean)
    found = ic.method("information_horizon")(model, clean, blank=blank, keep=[0.5])
    whole, n = logp_by_hand(model, clean).mean(), model.n_layers
    torch.testing.assert_close(found.clean[0], whole, atol=1e-6, rtol=0)
    assert found.information[0].isnan().sum() == n * (clean.ids.shape[1] - len(visual))
    for layer in range(n):
        for v in visual[:2]:
            rest = [place for place in visual + behind if place != v]
            left = hidden_by_hand(model, family, clean, range(layer, n), rest, [v])
            torch.testing.assert_close(found.information[0, layer, v], whole - left.mean(), atol=1e-5, rtol=0)
            first = found.of("first").information[0, layer, v]
            torch.testing.assert_close(first, logp_by_hand(model, clean)[0] - left[0], atol=1e-5, rtol=0)
        order = sorted(visual, key=lambda v: -float(found.information[0, layer, v]))
        gone = order[len(visual) // 2 :]
        rest = [place for place in visual + behind if place not in gone]
        wanted = hidden_by_hand(model, family, clean, range(layer, n), rest, gone).mean()
        torch.testing.assert_close(found.ranked[0, layer, 0], wanted, atol=1e-5, rtol=0)
    assert found.random.shape == (1, n, 1, 5) and found.random[0, 0, 0].unique().numel() > 1
    assert found.blank is not None and not torch.equal(found.blank.nan_to_num(), found.information.nan_to_num())


def test_without_attention_to_the_image_the_horizon_is_there() -> None:
    """All text cut off from the image from layer 1 on, by hand: nothing that is removed from there on matters."""
    model, batch = model_of("qwen3_vl"), texts("qwen3_vl")
    visual, behind, _ = places(batch[0])
    n, width = model.n_layers, batch[0].ids.shape[1]
    mask = torch.full((1, 1, width, width), float("-inf"), dtype=torch.float64).triu(1)
    mask[..., torch.tensor(behind)[:, None], torch.tensor(visual)] = float("-inf")
    loaded = ic.load(testing.tiny("qwen3_vl", dtype=torch.float64), processor=testing.processor("qwen3_vl"))
    blocks = loaded.hf.get_submodule("model.language_model.layers")

    def cut(_: object, args: object, kwargs: dict[str, torch.Tensor]) -> object:
        given = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": mask if given is None else torch.minimum(given, mask)}

    for layer in blocks[1:]:
        layer.self_attn.register_forward_pre_hook(cut, with_kwargs=True)
    found = ic.method("information_horizon")(loaded, ic.Tokens.stack(batch[:2]), strategy="full", keep=[0.5])
    assert isinstance(found, HorizonResult)
    ended = found.horizon(epsilon=1e-6, margin=1e-6, resamples=200)
    assert ended.information <= 1 and ended.ranking <= 1
    assert np.abs(found.tokens(0)[1:]).max() < 1e-9 < 1e-4 < np.abs(found.tokens(0)[0]).max()
    free = ic.method("information_horizon")(model, ic.Tokens.stack(batch[:2]), keep=[0.5]).horizon(
        epsilon=1e-6, margin=1e-6, resamples=200
    )
    assert free.ranking == n  # ranked by information itself: where there is any, the best tokens are better than random


def test_rankings_and_what_is_refused() -> None:
    model, clean = model_of("llava"), texts("llava")[0]
    method = ic.method("information_horizon")
    one, other = (method(model, clean, ranking=by, keep=[0.5], layers=[1]) for by in ("information", "attention"))
    assert torch.equal(one.random, other.random) and float(one.ranked[0, 0, 0]) > float(other.ranked[0, 0, 0])
    assert "ranked by attention" in str(other) and "<svg" in other.html()
    some = method(model, clean, ranking="attention", keep=[0.5], layers=[1], tokens=2)
    seen = ~some.information[0, 0].isnan()
    assert seen.sum() == 2 and torch.equal(some.information[0, 0, seen], other.information[0, 0, seen])
    assert torch.equal(some.kept, other.kept)  # ranked among all of them
    for settings, match in [
        ({"tokens": 2}, "that does not need them all"), ({"tokens": 0, "ranking": "attention"}, "give one at least"),
        ({"subsets": 4}, "needs 5 subsets"), ({"keep": [1.0]}, "lie between 0 and 1"), ({"keep": []}, "one at least"),
    ]:  # fmt: skip
        with pytest.raises(ic.PlanError, match=match):
            method(model, clean, **settings)  # type: ignore[arg-type]
    with pytest.raises(ic.PlanError, match="no row has visual tokens"):
        method(model, model.tokens("what color ?", " red"))


@pytest.mark.slow
def test_conforms() -> None:
    model, images = model_of("llava"), testing.pictures(3, (16, 16))
    asked = zip(["what color ?", "what color ?", "is it red ?"], images, strict=True)
    rows = [model.tokens(text, " red", images=image) for text, image in asked]
    settings = {"keep": [0.5], "layers": [1]}
    testing.check_method("information_horizon", model, rows=rows, settings=settings).raise_if_failed()
