"""The method `router`: golden numbers, the conformance kit, batches, files, pages, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from interp_plugins.router.method import PER_TOKEN, RouterResult
from interp_plugins.router.point_files import read_points
from interp_plugins.router.points import Shape
from moe_golden import expected, model, pairs

import interp_core as ic
from interp_core import sites as S
from interp_core import stats, testing


def texts(variant: str) -> tuple[ic.Tokens, list[list[int]]]:
    """All pairs as one padded batch, and their aligned positions."""
    rows = [torch.tensor([pair[f"{variant}_ids"]]) for pair in pairs()]
    tokens = ic.Tokens.stack([ic.Tokens(row, torch.ones_like(row, dtype=torch.bool)) for row in rows])
    return tokens, [pair[f"canonical_nonws_{variant}"] for pair in pairs()]


def result(variant: str, **settings: object) -> RouterResult:
    tokens, at = texts(variant)
    made: RouterResult = ic.method("router")(model(), tokens, at=at, **settings)
    return made


def test_the_method_gives_the_reference() -> None:
    made, other = result("a"), result("b")
    for name, theirs in (("weight", "weight"), ("count", "count"), ("prob", "softmax")):
        np.testing.assert_allclose(made.usage(name), expected()[f"usage_{theirs}_all_a"], atol=1e-6)  # type: ignore[arg-type]
        np.testing.assert_allclose(made.usage(name).sum(-1), 1, atol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_array_equal(made.together, expected()["coact_count_a"])
    np.testing.assert_allclose(made.loads["cv"], expected()["load_cv_a"], atol=1e-6)
    np.testing.assert_array_equal(made.loads["dead"], expected()["dead_a"])
    np.testing.assert_allclose(made.usage() - other.usage(), expected()["diff_all"], atol=1e-6)
    assert made.tokens.tolist() == expected()["tokens_per_sample"].tolist()
    assert made.margin.amin() > float(expected()["margin_topk_min"]) > 0
    boot = stats.Bootstrap(resamples=200)
    band = made.difference(other, boot=boot)
    np.testing.assert_allclose(band.value, made.usage("weight", "macro") - other.usage("weight", "macro"), atol=1e-12)
    assert (band.low <= band.value + 1e-12).all() and band.n == 6
    for name in (*PER_TOKEN, *made.loads):
        assert len(made.band(name, boot)) == 4
    np.testing.assert_allclose(made.band("cv", boot).value, made.loads["cv"])
    points = made.points(other)
    top = max((row for row in made.experts()), key=lambda row: row["weight"])
    assert points.points[0].value == pytest.approx(expected()["diff_all"].max(), abs=1e-6)
    assert made.points().points[0][:2] == (top["layer"], top["expert"])


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("deepseek_v3", {}, marks=pytest.mark.slow),
        ("qwen3_moe", {"at": -1, "pairs": False}),
    ],
)
def test_the_method_passes_the_kit(family: str, settings: dict[str, object]) -> None:
    testing.check_method("router", ic.load(testing.tiny(family)), settings=settings).raise_if_failed()


def test_batches_files_and_pages(tmp_path: Path) -> None:
    tokens, at = texts("a")
    whole = result("a")
    parts = ic.method("router")(model(), tokens, at=-1, batch_size=2, out=tmp_path / "run")
    last = ic.method("router")(model(), tokens, at=-1)
    assert torch.equal(parts.count, last.count) and torch.equal(parts.together, last.together)
    np.testing.assert_allclose(parts.weight, last.weight, atol=1e-6)
    assert RouterResult.load(whole.save(tmp_path / "saved")) == whole
    assert [row["layer"] for row in whole.table()] == [0, 1, 2, 3] and len(whole.experts()) == 32
    page = whole.to_html(tmp_path / "page.html").read_text()
    told = whole.details()["What the columns are"]
    assert set(whole.table()[0]) - {"layer"} == {line.split()[0] for line in told.splitlines()}
    assert "<h1>Routing of tokens to experts</h1>" in page and "by how many even shares the busiest" in page
    assert "dead            experts that no token goes to" in str(whole)
    assert "layer 3, expert 4" in page and "http" not in page.replace("http://www.w3.org", "")
    whole.png(tmp_path / "usage.png")
    assert (tmp_path / "usage.png").stat().st_size > 5000
    assert "79 tokens of 6 texts" in str(whole) and "2 of 8 experts in 4 layers" in str(whole)
    path = whole.points(result("b")).write(tmp_path / "points.json")
    again = read_points(path, Shape.of(model()))
    other = ic.load(testing.tiny("qwen3_moe"), check=False)
    ids = torch.tensor([[5, 17, 33, 8, 21]])
    there = ic.method("router")(other, ids)
    for layer in there.layers:
        other.module("router", layer).weight.data.mul_(1.5)
    mine = there.points().write(tmp_path / "before.json")
    with pytest.raises(ic.PlanError, match="with other weights than"):
        read_points(mine, Shape.of(other))
    with pytest.raises(ic.PlanError, match="compare texts of one model"):
        there.points(ic.method("router")(other, ids))
    assert len(again) > 0 and again.points[0].a is not None and len(at) == 6


def test_layers_are_the_decoders_and_dense_ones_are_absent() -> None:
    of = ic.load(testing.tiny("qwen3_moe"), check=False)  # its layer 1 is dense
    ids = torch.arange(3, 20)[None]
    made = ic.method("router")(of, ids)
    assert made.layers == (0, 2) and made.count.shape == (1, 2, 6) and made.steps.shape == (1, 6, 6)
    run = of.run(ids, read=[S.router_weights[2], S.router_probs[2]], logits=False)
    np.testing.assert_allclose(made.weight[0, 1], run[S.router_weights[2]].plain[0].sum(0), atol=1e-5)
    np.testing.assert_allclose(made.usage("prob")[1], run[S.router_probs[2]].plain[0].mean(0), atol=1e-6)
    assert made.shape == Shape.of(of) and made.shape == Shape(made.model, 3, (0, 2), 6, 2, made.digest)
    assert "no intervals" in made.html()
    with pytest.raises(ic.PlanError, match="no curve 'gnii'"):
        made.band("gnii")
    with pytest.raises(ic.PlanError, match="no usage 'wieght'. Did you mean 'weight'"):
        made.usage("wieght")
    with pytest.raises(ic.PlanError, match="texts are paired"):
        made.difference(result("a"))
    with pytest.raises(ic.PlanError, match="compare texts of one model"):
        made.points(result("a"))


def test_a_dense_model_is_refused_by_name() -> None:
    dense = ic.load(testing.tiny("llama"), check=False)
    with pytest.raises(
        ic.CapabilityError, match=r"router needs router_indices of LlamaForCausalLM: llama has no mixture"
    ):
        ic.method("router")(dense, torch.tensor([[5, 6]]))
    with pytest.raises(ic.PositionError):
        ic.method("router")(model(), torch.tensor([[5, 6]]), at=3)
