"""Input × gradient and integrated gradients equal captum's and the published baseline; rollout is the product of its
layers; random scores belong to the row."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from conftest import DATA, tiny_model, toy_model
from interp_plugins.attribution.gradients import quadrature
from interp_plugins.attribution.rollout import last_layer
from tolerances import close, rounding
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

GOLDEN = DATA / "attribution"
TEXT, ANSWER = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:", " dry"
KIT = [
    pytest.param(name, family, marks=() if (name, family) == ("integrated_gradients", "gemma2") else pytest.mark.slow)
    for name in ("input_x_gradient", "integrated_gradients", "attention_rollout", "random_attribution")
    for family in ("gpt2", "gemma2")
]


def row(ids: list[int], prompt: tuple[int, int], target: tuple[int, int]) -> ic.Tokens:
    """One row of ids with its parts."""
    table = torch.tensor([ids])
    spans = {"prompt": ((ic.Span(*prompt),),), "target": ((ic.Span(*target),),)}
    return ic.Tokens(table, torch.ones_like(table, dtype=torch.bool), spans=spans)


IDS = row([5, 17, 33, 8, 61, 40, 22, 9, 54, 12], (2, 6), (8, 10))


@cache
def double_toy() -> ic.Model:
    return ic.load("toy:text", dtype=torch.float64)


@cache
def golden() -> tuple[ic.Model, Any]:
    return ic.load(str(GOLDEN / "models/llama")), np.load(GOLDEN / "alternatives/flashtrace_llama_ex0.npz")


@pytest.mark.parametrize(
    ("rule", "captum"),
    [("gauss_legendre", "gausslegendre"), ("trapezoid", "riemann_trapezoid"), ("left", "riemann_left"),
     ("right", "riemann_right"), ("middle", "riemann_middle")],
)  # fmt: skip
def test_integrated_gradients_equal_captum(rule: str, captum: str) -> None:
    model, recorded = double_toy(), np.load(GOLDEN / "alternatives/captum.npz")
    ids = [*recorded["ids"][0].tolist(), int(recorded["answer"])]
    found = ic.method("integrated_gradients")(
        model, row(ids, (0, len(ids) - 1), (len(ids) - 1, len(ids))), baseline=0, rule=rule, steps=12, batch_tokens=40
    )
    wanted = torch.from_numpy(recorded[captum])
    short = 11 / 12 if rule == "trapezoid" else 1.0  # captum's weights of this rule add up to 1 - 1/n
    close(found.scores[0, :-1] * short, wanted, model, size=float(wanted.abs().sum()))
    notes = found.notes[0]
    assert notes["residue"] == pytest.approx(notes["difference"] - float(found.scores.sum()), abs=1e-9)


def test_input_x_gradient_equals_captum() -> None:
    model, recorded = double_toy(), np.load(GOLDEN / "alternatives/captum.npz")
    ids = [*recorded["ids"][0].tolist(), int(recorded["answer"])]
    found = ic.method("input_x_gradient")(model, row(ids, (0, len(ids) - 1), (len(ids) - 1, len(ids))))
    close(found.scores[0, :-1], torch.from_numpy(recorded["input_x_gradient"]), model)
    assert float(found.scores[0, -1]) == 0


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granitemoe"])
def test_input_x_gradient_is_a_small_step_scaled_up(family: str) -> None:
    """Of a token's embedding towards twice itself; with factors of the embedding, and of both target scales."""
    model = tiny_model(family, torch.float64)
    x, step = model.run(IDS, read=S.embed)[S.embed].plain, 1e-3  # norms in float32: the step is not too small
    for scale in ("logit", "logprob"):
        found = ic.method("input_x_gradient")(model, IDS, target_scale=scale, per_token=True)

        def judged(edits: Any, scale: str = scale) -> Tensor:
            logits = model.run(IDS, edits=edits, logits=[7, 8]).logits.plain[0]
            values = logits if scale == "logit" else torch.log_softmax(logits, -1)
            return values[[0, 1], [54, 12]]

        for place in (0, 3, 7):
            ahead, back = (judged(S.embed.at(place).set(x[:, place] * (1 + sign * step))) for sign in (1, -1))
            slope = (ahead - back) / (2 * step)
            limit = 1e-4 + rounding(model) * 100 / step
            assert (found.rows[0, 8:, place] - slope).abs().max() <= limit
            assert abs(float(found.scores[0, place] - slope.sum())) <= limit
        assert bool(found.rows[0, :8].isnan().all())  # no row for what is no target


def test_the_integral_is_the_difference() -> None:
    """Of both ends, for all tokens or the prompt's alone; other rules come close to it."""
    model = tiny_model("gpt2", torch.float64)
    method = ic.method("integrated_gradients")
    for over in ("all", "prompt"):
        found = method(model, IDS, over=over, steps=200, baseline="eos", target_scale="logprob", batch_tokens=500)
        notes = found.notes[0]
        assert abs(notes["residue"]) < 1e-3 * abs(notes["difference"]) and abs(notes["difference"]) > 0.01
        moved = found.scores[0].nonzero().flatten().tolist()
        assert moved == (list(range(2, 6)) if over == "prompt" else list(range(9)))
        few = method(model, IDS, over=over, steps=3, target_scale="logprob").notes[0]
        assert abs(few["residue"]) > 1e3 * abs(notes["residue"])
    for rule in ("gauss_legendre", "trapezoid", "left", "right", "middle"):
        nodes, weights = quadrature(rule, 7)
        assert weights.sum() == pytest.approx(1) and 0 <= nodes.min() <= nodes.max() <= 1
    assert quadrature("trapezoid", 20, short=True)[1].sum() == pytest.approx(0.95)


def test_gradients_of_one_token_against_another() -> None:
    toy = toy_model()
    for name in ("input_x_gradient", "integrated_gradients"):
        method = ic.method(name)
        both = method(toy, TEXT, target=ANSWER, against=" wet")
        parts = [method(toy, TEXT, target=answer) for answer in (ANSWER, " wet")]
        limit = rounding(toy) * 30
        torch.testing.assert_close(both.scores[0, :16], (parts[0].scores - parts[1].scores)[0, :16], atol=limit, rtol=0)
        assert both.notes[0]["explains"] == "sum of the answer's differences of logits"


def test_the_reference_profile_equals_the_published_baselines() -> None:
    model, recorded = golden()
    prompt, user, rows = len(recorded["prompt_ids"]), recorded["user"], len(recorded["IG20"])
    ids = [*recorded["prompt_ids"].tolist(), *recorded["generation_ids"][:rows].tolist()]
    text = row(ids, (int(user[0]), int(user[-1]) + 1), (prompt, prompt + rows))
    columns = [*user.tolist(), *range(prompt, prompt + rows)]
    gradients = recorded["IG20"][:, : len(columns)]
    known = ~np.isnan(gradients)
    found = ic.method("integrated_gradients")(model, text, profile="reference")
    mine = found.rows[0, prompt:][:, columns].numpy()
    assert np.abs(mine - gradients)[known].max() <= 2e-5 and not mine[~known].any()
    assert found.notes[0]["rule"] == "trapezoid with weights 1/n"
    times = ic.method("attention_rollout")(model, text, profile="reference").rows[0, prompt:][:, columns].numpy()
    attention = recorded["attention_lastlayer"][:rows, : len(columns)]
    assert np.abs(times - attention * gradients)[known].max() <= 1e-6
    whole = [*recorded["prompt_ids"].tolist(), *recorded["generation_ids"].tolist()]
    stops = list(range(prompt, len(whole)))
    every = last_layer(model, row(whole, (0, prompt), (prompt, len(whole))), stops)[:, [*user.tolist(), *stops]].numpy()
    wanted = recorded["attention_lastlayer"]
    assert np.abs(every - wanted)[~np.isnan(wanted)].max() <= 2e-7 and not every[np.isnan(wanted)].any()


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_rollout_is_the_product_of_the_layers(family: str) -> None:
    model = tiny_model(family, torch.float64)
    for share in (0.5, 0.2):
        found = ic.method("attention_rollout")(model, IDS, residual=share)
        patterns = model.run(IDS, read=S.pattern)[S.pattern].plain[:, 0].double().mean(1)
        flow = torch.linalg.multi_dot([*(share * torch.eye(10).double() + (1 - share) * patterns).flip(0)])
        torch.testing.assert_close(found.scores[0].double(), flow[[7, 8]].mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.rows[0, 8:].double(), flow[[7, 8]], atol=1e-6, rtol=0)
        torch.testing.assert_close(flow.sum(-1), torch.ones(10).double(), atol=1e-5, rtol=0)


def test_random_scores_belong_to_the_row() -> None:
    toy, method = toy_model(), ic.method("random_attribution")
    alone = method(toy, "Q: big\nA:")
    batch = method(toy, ["Q: hot\nA: cold\n\nQ: big\nA:", "Q: big\nA:"])
    assert torch.equal(batch.scores[1, batch.columns(1)], alone.scores[0])
    assert not torch.equal(method(toy, "Q: big\nA:", seed=1).scores, alone.scores)
    assert 0 <= float(alone.scores.min()) < float(alone.scores.max()) < 1


def test_visual_tokens_count_by_what_the_tower_hands_over() -> None:
    """All that comes in at visual tokens, features added in later layers included: in the direction of all inputs at
    once, the scores add up to the slope."""
    model = tiny_model("qwen3_vl", torch.float64)
    values = pictures.inputs("qwen3_vl", [[torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))]])
    values["pixel_values"] = values["pixel_values"].double()
    found = ic.method("input_x_gradient")(model, values)
    seen = [i for i, token in enumerate(values["input_ids"][0].tolist()) if token == pictures.IMAGE]
    assert bool((found.scores[0, seen] != 0).all())
    sites = [S.embed, S.vision_embed, *(S.deepstack[n] for n in model.layers(S.deepstack))]
    step, ends = 1e-3, []
    for sign in (1, -1):
        run = model.run(values, edits=[site.scale(1 + sign * step) for site in sites], logits=-1)
        ends.append(float(run.logits.plain[0, found.notes[0]["answer"][0]]))
    assert float(found.scores.sum()) == pytest.approx(
        (ends[0] - ends[1]) / (2 * step), abs=1e-4 + rounding(model) / step
    )


@pytest.mark.parametrize(("name", "family"), KIT)
def test_conformance(name: str, family: str) -> None:
    testing.check_method(name, tiny_model(family)).raise_if_failed()


@pytest.mark.parametrize(
    ("name", "settings", "error", "says"),
    [
        ("attention_rollout", {"residual": 1.0}, ic.PlanError, "a share of at least 0 and less than 1"),
        ("attention_rollout", {"against": 3}, ic.PlanError, "against= is for methods by gradient or ablation"),
        ("integrated_gradients", {"steps": 0}, ic.PlanError, "take one at least"),
        ("integrated_gradients", {"steps": 1, "rule": "trapezoid"}, ic.PlanError, "two for the trapezoid rule"),
        (
            "integrated_gradients",
            {"steps": 1001, "rule": "gauss_legendre"},
            ic.PlanError,
            "more than 1000 bring nothing",
        ),
        ("integrated_gradients", {"baseline": 96}, ic.PlanError, "no token id 96; the model has 96, 0 to 95"),
        ("integrated_gradients", {"batch_tokens": 0}, ic.PlanError, "batch_tokens=0; take one at least"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], error: type[Exception], says: str) -> None:
    text = row([5, 17, 33], (0, 2), (2, 3))
    with pytest.raises(error, match=says):
        ic.method(name)(tiny_model("llama"), text, **settings)


def test_what_a_model_lacks_is_named() -> None:
    with pytest.raises(ic.CapabilityError, match=r"patterns of all layers, and layers \[0\] .* have none"):
        ic.method("attention_rollout")(tiny_model("qwen3_5"), IDS)
    bare = ic.load(testing.tiny("gpt2", eos_token_id=None))
    with pytest.raises(ic.PlanError, match="neither tokenizer nor config .* knows its eos token; give its id"):
        ic.method("integrated_gradients")(bare, IDS)
    values = pictures.inputs("qwen3_vl", [[torch.zeros(3, 16, 16)]])
    with pytest.raises(ic.CapabilityError, match="moves token embeddings, and these tokens come with"):
        ic.method("integrated_gradients")(tiny_model("qwen3_vl"), values)


def test_data_says_where_it_comes_from() -> None:
    assert "captum 0.9.0" in Path(GOLDEN / "README_alternatives.md").read_text()
