"""Information-flow routes: scores and edges against matrices by hand, mass that adds up, filtered graphs, drawings."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import sampled, tiny_model
from interp_plugins.attribution.flows.proximity import proximity
from interp_plugins.attribution.flows.route_graph import KINDS, RouteGraph
from interp_plugins.attribution.routes import Routes, RoutesResult
from layouts import LINEAR
from sweeping import ROWS
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

SHOTS = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"


def tokens() -> ic.Tokens:
    ids = torch.tensor([ROWS[0]])
    return ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.fixture(scope="module")
def toy() -> RoutesResult:
    result = Routes()(ic.load("toy:text"), SHOTS)
    assert isinstance(result, RoutesResult)
    return result


def shares_by_hand(model: ic.Model, layer: int, run: ic.Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shares of heads `[head row key]`, residual, bias and MLP of one layer, from what is added there part by part."""
    names = (S.pattern, S.v, S.resid_pre, S.attn_out, S.resid_post)
    pattern, v, before, added, post = (run[site[layer]].plain[0] for site in names)
    w_o, bias = model.weights(S.z[layer]), model.bias(S.z[layer])
    brought = torch.einsum("hij,jhe,hed->hijd", pattern, v.repeat_interleave(len(w_o) // v.shape[1], 1), w_o)
    scale = added / (brought.sum((0, 2)) + bias)  # of a norm after attention; else 1
    mid = before + added
    near = proximity(brought * scale[:, None], mid[:, None])
    rest = proximity(torch.stack([before, bias * scale]), mid)
    whole = near.sum((0, 2)) + rest.sum(0)
    mlp = proximity(torch.stack([post - mid, mid]), post)
    return near / whole[:, None], rest[0] / whole, rest[1] / whole, mlp / mlp.sum(0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gptj"])  # pre-norm, biases, post-norm, parallel
def test_scores_are_products_of_matrices_and_edges_their_shares(family: str) -> None:
    model = tiny_model(family, torch.float64)
    run = model.run(tokens(), read=[S.pattern, S.v, S.resid_pre, S.attn_out, S.resid_post])
    result = Routes()(model, tokens(), threshold=0.01)
    mass = torch.zeros(tokens().lengths[0], dtype=torch.float64)
    mass[-1] = 1
    by_node: dict[tuple[Any, ...], float] = {}
    for layer in reversed(range(model.n_layers)):
        heads, resid, bias, mlp = shares_by_hand(model, layer, run)
        mass = mass @ (heads.sum(0) + torch.diag(resid + bias))
        torch.testing.assert_close(result.layer_scores[0, layer], mass, atol=1e-7, rtol=0)
        for head, row, key in (heads > 0.01).nonzero().tolist():
            by_node["attention", layer, head, key, row] = float(heads[head, row, key])
        for name, shares in (("residual", resid), ("bias", bias), ("mlp", mlp[0]), ("mlp_residual", mlp[1])):
            by_node |= {(name, layer, "", i, i): share for i, share in enumerate(shares.tolist())}
    torch.testing.assert_close(result.scores[0], mass, atol=1e-7, rtol=0)
    lines = result.table()
    assert len(lines) > 20
    for line in lines:
        key = tuple(line[name] for name in ("kind", "layer", "head", "source", "target"))
        assert line["share"] == pytest.approx(by_node[key], abs=1e-7)  # Gemma's norms are in float32
        assert line["share"] > 0.01


@pytest.mark.parametrize("family", sampled([name for name in testing.families() if name not in LINEAR]))
def test_mass_adds_up_after_every_layer(family: str) -> None:
    result = Routes()(tiny_model(family), tokens())
    mass = result.layer_scores.sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-9, rtol=0)
    assert (result.layer_scores >= 0).all() and len(result.graph()) > 5


def test_a_filtered_graph_is_that_of_the_higher_threshold(toy: RoutesResult) -> None:
    model = ic.load("toy:text")
    low = Routes()(model, SHOTS, threshold=0.002)
    assert len(low.graph()) > len(toy.graph()) > 10
    for threshold in (0.04, 0.2):
        high = Routes()(model, SHOTS, threshold=threshold).graph()
        filtered = low.graph().filter(threshold)
        assert edges_of(filtered) == edges_of(high)
        assert low.filter(threshold).graph().columns() == filtered.columns()
    assert len(low.graph().filter(1.0)) == 0


def edges_of(graph: RouteGraph) -> dict[tuple[int, ...], tuple[float, float]]:
    columns = graph.columns()
    names = ("kind", "layer", "head", "source", "target")
    values = zip(graph.strength.tolist(), graph.importance.tolist(), strict=True)
    numbers = [(round(strength, 9), round(importance, 9)) for strength, importance in values]
    return dict(zip(zip(*(columns[name] for name in names), strict=True), numbers, strict=True))


def test_every_edge_leads_to_the_top_and_importances_add_up(toy: RoutesResult) -> None:
    graph = toy.graph()
    sums: dict[tuple[int, int, bool], float] = {}
    starts = {(toy.n_layers, top, False) for top in graph.tops}
    for kind, layer, _, source, target, *_ in zip(*graph.columns().values(), strict=True):
        past = KINDS[kind].startswith("mlp")
        starts.add((layer, source, past))
        node = (layer + 1, target, False) if past else (layer, target, True)
        assert node in starts, (KINDS[kind], layer, source, target)  # edges stand from the top down
    for line in toy.table():
        node = (line["layer"], line["target"], line["kind"].startswith("mlp"))
        sums[node] = sums.get(node, 0) + line["importance"]
    assert all(total == pytest.approx(1) for total in sums.values()) and len(sums) > 10


def test_routes_of_the_toy_lead_to_the_word_asked_for(toy: RoutesResult) -> None:
    assert toy.top(k=1)[0]["token"] == " wet"
    heads = [line for line in toy.table() if line["kind"] == "attention"]
    assert heads[0]["from"] == " wet" and heads[0]["to"] == "A:"


def test_several_tokens_and_rows(tmp_path: Path) -> None:
    model = ic.load("toy:text")
    prompts = ["Q: big\nA:", SHOTS]
    result = Routes()(model, prompts, target=" small\n")
    single = Routes()(model, prompts[0], target=" small\n")
    assert result.graph(0).tops == single.graph().tops and len(result.graph(0).tops) == 2
    kept = result.layer_scores[0][:, result.columns(0)]
    torch.testing.assert_close(kept, single.layer_scores[0], atol=1e-5, rtol=1e-4)
    result.save(tmp_path / "routes")
    assert RoutesResult.load(tmp_path / "routes") == result


def test_drawings(toy: RoutesResult, tmp_path: Path) -> None:
    page = toy.html()
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    lines = ElementTree.fromstring(svg).findall("polyline")
    assert len(lines) == len(toy.graph())
    assert {float(line.attrib["data-s"]) for line in lines} == {round(s, 6) for s in toy.graph().strength.tolist()}
    assert "head 2." in page and "type='range'" in page
    pytest.importorskip("matplotlib")
    assert toy.png(tmp_path / "routes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_kit() -> None:
    testing.check_method(Routes, ic.load(testing.tiny("llama"))).raise_if_failed()


def test_layers_without_patterns_are_refused() -> None:
    family = sorted(LINEAR)[0]
    with pytest.raises(ic.CapabilityError, match="layer"):
        Routes()(tiny_model(family), tokens())
