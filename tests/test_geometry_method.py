"""The method `geometry`: equal to the pure functions on a run's rows, batches, files, pages, the conformance kit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from conftest import tiny_model
from interp_plugins.geometry.directions import anisotropy
from interp_plugins.geometry.result import GeometryResult
from interp_plugins.geometry.similarity import Rows, debiased_cka
from interp_plugins.geometry.spectrum import effective_rank

import interp_core as ic
from interp_core import sites as S
from interp_core import testing


def prompts(family: str = "qwen3_vl", n: int = 6) -> list[ic.Tokens]:
    """Texts with a picture each, one of which differs in a word, too."""
    model = tiny_model(family)
    out = []
    for seed in range(n):
        values = pictures.inputs(family, [[pictures.picture(family, seed)]])
        values["input_ids"] = torch.where(values["input_ids"] == 33, 33 + seed, values["input_ids"])
        out.append(model.tokens(values))
    return out


def batch(family: str = "qwen3_vl", n: int = 6) -> ic.Tokens:
    rows = [[pictures.picture(family, seed)] for seed in range(n)]
    tokens = tiny_model(family).tokens(pictures.inputs(family, rows))
    ids = tokens.ids + torch.arange(n)[:, None] * (tokens.ids == 33)
    return replace(tokens, ids=ids, texts=None, offsets=None, labels=())


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_numbers_are_those_of_a_runs_rows(family: str) -> None:
    model, tokens = tiny_model(family), batch(family)
    blind = prompts(family)[::-1]
    result: GeometryResult = ic.method("geometry")(model, tokens, against=blind, cliff_boundary=1)
    assert result.groups == ("vision", "text") and result.layers == (0, 1, 2) and result.cliff == 1
    run = model.run(tokens, read=[S.resid_pre[1].at("vision"), S.resid_pre[2].at("vision")], logits=False)
    here, there = (run[S.resid_pre[layer].at("vision")].plain for layer in (1, 2))
    other = model.run(blind[0], read=S.resid_pre[1].at("vision"), logits=False)[S.resid_pre[1].at("vision")].plain
    n = here.shape[1]
    ranks = result.per_sample("effective_rank", "vision", equal=False)
    assert ranks[0, 1] == pytest.approx(effective_rank(here[0]), rel=1e-4)
    assert result.per_sample("anisotropy", "vision", "raw", equal=False)[0, 1] == pytest.approx(
        anisotropy(here[0]), rel=1e-4
    )
    cka = debiased_cka(Rows(here[0], range(n)), Rows(there[0], range(n)))
    assert float(result.steps[0, 0, 1]) == pytest.approx(cka, rel=1e-3)
    assert result.against is not None
    wanted = debiased_cka(Rows(here[0], range(n)), Rows(other[0], range(n)))
    assert float(result.against[0, 0, 1]) == pytest.approx(wanted, rel=1e-3)
    torch.testing.assert_close(result.pooled[0, 0, 1], here[0].mean(0), atol=1e-5, rtol=1e-5)
    pooled = result.pooled_cka(20)
    means = [result.pooled[:, group, 2] for group in (0, 1)]
    assert pooled[2]["cka"] == pytest.approx(debiased_cka(*(Rows(rows, range(6)) for rows in means)), rel=1e-6)
    assert result.baseline_anisotropy("text").shape == (3,)


def test_curves_ratio_page_and_file(tmp_path: Path) -> None:
    result: GeometryResult = ic.method("geometry")(tiny_model("qwen3_vl"), batch(), cliff_boundary=2)
    ratio = result.er_ratio()
    ranks = result.per_sample("effective_rank")
    assert ratio.ratio.value == pytest.approx((ranks[:, 2] / ranks[:, :2].mean(1)).mean())
    text = result.er_ratio(group="text").per_sample
    assert result.ratio_of_ratios().value == pytest.approx((ratio.per_sample / text).mean())
    assert result.er_ratio(1).cut == 1 and result.band("stable_rank", "text").n == 6
    assert "dimension of vision" in repr(_error(lambda: result.band("dimension", "vision")))
    assert len(result.table()) == 6 and "effective rank" in str(result) and "<svg" in result.html()
    result.save(tmp_path)
    assert GeometryResult.load(tmp_path) == result
    shared = ic.method("geometry")(tiny_model("qwen3_vl"), batch(), clusters=[0, 0, 1, 1, 2, 2])
    assert shared.boot().mean(np.arange(6)).units == 3


def _error(call: object) -> Exception:
    with pytest.raises(ic.PlanError) as caught:
        call()  # type: ignore[operator]
    return caught.value


def test_text_models_have_one_group(toy: ic.Model) -> None:
    texts = ["Q: big\nA: small\n\nQ: hot\nA:", "Q: old\nA:"]
    result: GeometryResult = ic.method("geometry")(toy, texts)
    assert result.groups == ("all",) and bool(result.gap.isnan().all())
    alone: GeometryResult = ic.method("geometry")(toy, texts[1])
    torch.testing.assert_close(result.whole[1:], alone.whole, atol=1e-3, rtol=1e-3, equal_nan=True)
    named = toy.tokens(texts[0]).name(question="Q: big", answer=" small")
    with pytest.raises(ic.PositionError, match=r"prompt 0 has 1 token\(s\) of 'answer', 2 are compared"):
        ic.method("geometry")(toy, named, groups=("question", "answer"))
    with pytest.raises(ic.PlanError, match="two groups of rows; there is 'all' alone"):
        result.pooled_cka()


@pytest.mark.parametrize("family", ["gpt2"])
def test_conformance(family: str) -> None:
    settings = {"repeats": 2, "variants": ("centred", "sink_free")}
    testing.check_method("geometry", ic.load(testing.tiny(family)), settings=settings).raise_if_failed()


def test_batches_and_padding_change_nothing() -> None:
    model = tiny_model("qwen3_vl")
    whole: GeometryResult = ic.method("geometry")(model, batch())
    for number, tokens in enumerate(prompts(n=2)):
        alone: GeometryResult = ic.method("geometry")(model, tokens)
        torch.testing.assert_close(whole.whole[number], alone.whole[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(whole.separability[number], alone.separability[0], atol=0.2, rtol=0)


def test_what_is_refused() -> None:
    model, tokens = tiny_model("qwen3_vl"), batch(n=2)
    geometry = ic.method("geometry")
    larger = model.tokens(pictures.inputs("qwen3_vl", [[torch.randn(3, 16, 16)]]))
    for settings, error, message in (
        ({"variants": ("centred", "centred")}, ic.PlanError, "each once"),
        ({"cliff_boundary": 3}, ic.PlanError, "cliff_boundary 3 of 3 layers; 1 to 2"),
        ({"rows": 40}, ic.PositionError, "prompt 0 has 6 token"),
        ({"clusters": [1]}, ic.PlanError, "1 clusters for 2 prompts"),
        ({"against": [larger]}, ic.PlanError, "has 1 prompts for 2"),
        ({"against": [larger, larger]}, ic.PlanError, "only the same positions have rows in common"),
        ({"against": 3}, ic.PlanError, "a list of prompts"),
        ({"groups": ("visoin",)}, ic.PositionError, "visoin"),
    ):
        with pytest.raises(error, match=message):
            geometry(model, tokens, **settings)
    result = geometry(model, tokens)
    with pytest.raises(ic.PlanError, match="give the cut"):
        result.er_ratio()
    with pytest.raises(ic.PlanError, match="no measure 'effectiv_rank' here. Did you mean 'effective_rank'"):
        result.per_sample("effectiv_rank")
    with pytest.raises(ic.PlanError, match="no measure 'against' here"):
        result.per_sample("against")
    with pytest.raises(ic.PlanError, match="fewer than four|four rows at least"):
        result.pooled_cka()
