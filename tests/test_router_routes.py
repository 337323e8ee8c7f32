"""Alternative routes of equal cost: what each is worth equals a forward pass with it, over families of routers."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from interp_plugins.router import routes
from interp_plugins.router.route_results import RouteUtilityResult

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

FAMILIES = [
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "llama4",
]  # no renormalisation; groups and a bias; top-k first; of inputs


def texts(rows: int = 2, width: int = 6) -> ic.Tokens:
    """A batch whose rows but the first are padded on the left."""
    ids = torch.randint(3, 90, (rows, width), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1:, :2] = False
    return ic.Tokens(ids, mask)


def utility(model: ic.Model, tokens: ic.Tokens, **settings: object) -> RouteUtilityResult:
    made: RouteUtilityResult = ic.method("route_utility")(model, tokens, **settings)
    return made


def logprob(model: ic.Model, ids: torch.Tensor, target: int, edits: list[ic.Edit]) -> float:
    run = model.run(ids, edits=edits, logits=-1, allow_noop=True)
    return float(torch.log_softmax(run.logits.plain[0].double(), -1)[target])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["own", "native_renorm"])
def test_a_route_is_worth_what_a_forward_pass_with_it_gives(family: str, weights: str) -> None:
    """Each expert set is executed with the weights that are said, and no other set."""
    model = ic.load(testing.tiny(family, dtype=torch.float64), check=False)
    tokens = texts()
    made = utility(model, tokens, at=2, alternatives=3, weights=weights)
    row, places = 1, [2, 3, 4]  # the second text, without its padding; a route of its third token
    ids, target, column = tokens.ids[[row]][:, places], int(tokens.ids[row, 5]), 4
    assert made.native[row, column] == pytest.approx(logprob(model, ids, target, []), abs=1e-6)
    assert int((~made.native.isnan()).sum()) == 2 and float(made.rounding.nan_to_num().max()) < 1e-6
    for i, layer in enumerate(made.layers):
        read = [site[layer].at(-1) for site in (S.router_weights, S.router_probs)]
        clean = model.run(ids, read=read, logits=False)
        native, probs = (clean[site].plain[0].double() for site in read)
        assert made.experts[row, column, i, 0].tolist() == native.nonzero()[:, 0].tolist()
        for number, experts in enumerate(made.experts[row, column, i].long()):
            force: list[ic.Edit] = [S.router_logits[layer].at(-1).force(experts.tolist())]
            executed = model.run(ids, edits=force, read=read, logits=False, allow_noop=True)[read[0]].plain[0]
            if weights == "native_renorm":
                executed = executed * (native.sum() / executed.sum())
                force = [S.router_weights[layer].at(-1).set(executed)]
            assert executed.nonzero()[:, 0].tolist() == experts.tolist()
            wanted = logprob(model, ids, target, force)
            assert made.utility[row, column, i, number] == pytest.approx(wanted, abs=5e-5)
            assert made.scores[row, column, i, number] == pytest.approx(float(probs[experts].log().sum()), abs=1e-5)
    assert made.token_layers < made.naive


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_identical_experts_swapped_are_worth_the_same(family: str) -> None:
    """All experts alike: as long as routes have the same sum of weights, nothing changes."""
    model = ic.load(testing.tiny(family), check=False)
    for layer in model.layers(S.router_logits):
        for weight in model.module("experts", layer).parameters():
            weight.data[:] = weight.data[:1]
    made = utility(model, texts(), routes="swap_last", weights="native_renorm")
    for name in ("regret", "regret_random", "better", "better_random"):
        assert (made.values(name) == 0).all(), name
    assert np.isnan(made.values("spearman")).all() and not made.utility[0, 0].isnan().any()
    other = utility(ic.load(testing.tiny(family), check=False), texts(), routes="swap_last")
    assert (other.values("regret").max(0) > 0.01).all()


def test_batches_padding_and_repeats_are_the_same(tmp_path: Path) -> None:
    model = ic.load(testing.tiny("qwen3_moe"), check=False)
    settings = {"layers": [-1], "alternatives": 4, "seed": 7}
    whole = utility(model, texts(3), **settings)
    parts = utility(model, texts(3), batch_size=1, **settings)
    assert whole == parts == utility(model, texts(3), **settings) and whole.layers == (2,)
    assert not torch.equal(utility(model, texts(3), **settings | {"seed": 8}).experts, whole.experts)
    assert RouteUtilityResult.load(whole.save(tmp_path)) == whole
    assert whole.texts.tolist() == [0] * 5 + [1] * 3 + [2] * 3 and len(whole.tokens()) == 11
    assert "regret" in whole.to_html(tmp_path / "page.html").read_text() and whole.png(tmp_path / "a.png").exists()
    band = whole.band("excess")
    np.testing.assert_allclose(band.value, whole.mean("regret") - whole.mean("regret_random"), atol=1e-12)
    assert band.units == 3
    fragile = whole.group("fragile")
    native = whole.native[~whole.native.isnan()].numpy()
    assert native[fragile].max() < native[~fragile].min() and fragile.sum() == 3
    assert [row["group"] for row in whole.table()] == ["all", "fragile", "sure"]
    assert "11 tokens of 3 texts" in str(whole)


def test_the_cost_is_what_the_module_says() -> None:
    model = ic.load(testing.tiny("qwen3_moe"), check=False)
    made = utility(model, texts(1), at=3, routes="swap_last", alternatives=2)
    sets = [{tuple(r.tolist()) for r in made.experts[0, 3, i]} for i in range(2)]
    assert [len(s) for s in sets] == [3, 3]
    reading, clean = 6 * 3, 4 * 3
    most = reading + clean + 5 * (3 - 0) + 5 * (3 - 2)  # random sets may be among the others, and run once
    assert reading + clean + 3 * 3 + 3 * 1 <= int(made.token_layers) <= most


def test_what_cannot_be_done_is_refused_before_the_model_runs() -> None:
    dense = ic.load(testing.tiny("llama"), check=False)
    with pytest.raises(
        ic.CapabilityError, match="route_utility needs router_indices of LlamaForCausalLM: llama has no"
    ):
        utility(dense, texts())
    model = ic.load(testing.tiny("qwen3_moe"), check=False)
    with pytest.raises(ic.PositionError, match="the last one has none; at=-2"):
        utility(model, texts(), at=-1)
    with pytest.raises(ic.PositionError, match="in a text of 1 tokens"):
        utility(model, ic.Tokens(torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool)))
    with pytest.raises(ic.SiteError, match=r"layer 1 of .* has no experts; those that have: \[0, 2\]"):
        utility(model, texts(), layers=[1])
    with pytest.raises(ic.PlanError, match="names none"):
        utility(model, texts(), layers=[])
    every = ic.load(testing.tiny("qwen3_moe", num_experts_per_tok=6), check=False)
    with pytest.raises(ic.PlanError, match="layer 0 of .* gives every token all 6 experts: there is one route"):
        utility(every, texts())
    made = utility(model, texts(1), at=2, layers=[0])
    with pytest.raises(ic.PlanError, match="no 'regert' of routes. Did you mean 'regret'"):
        made.band("regert")
    with pytest.raises(ic.PlanError, match="no group 'frail'"):
        made.mean("regret", "frail")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3_moe", {"at": -2, "alternatives": 2, "routes": "swap_last", "layers": [-1]}),
        pytest.param("deepseek_v3", {"at": -2, "alternatives": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_method_passes_the_kit(family: str, settings: dict[str, object]) -> None:
    testing.check_method("route_utility", ic.load(testing.tiny(family)), settings=settings).raise_if_failed()


# Sets


def test_swaps_take_the_place_of_the_weakest() -> None:
    probs = torch.tensor([0.05, 0.3, 0.1, 0.25, 0.2, 0.1])
    assert routes.swapped(probs, (1, 3, 4), 4) == [(1, 2, 3), (1, 3, 5), (0, 1, 3)]
    assert routes.swapped(probs, (0, 1, 4), 2) == [(1, 3, 4), (1, 2, 4)]  # a bias has chosen 0, and not 3


def test_gumbel_draws_follow_the_router() -> None:
    """First draws of sets of two: P({i, j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j), without the native one."""
    probs, native, n = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64), (0, 1), 4000
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(routes.alternatives("gumbel", probs, native, 1, 1.0, generator)[0] for _ in range(n))
    chance = {
        (i, j): float(probs[i] * probs[j] / (1 - probs[i]) + probs[j] * probs[i] / (1 - probs[j]))
        for i, j in combinations(range(4), 2)
        if (i, j) != native
    }
    for pair, p in chance.items():
        p /= sum(chance.values())
        assert abs(drawn[pair] / n - p) < 4 * (p * (1 - p) / n) ** 0.5, pair
    every = routes.alternatives("gumbel", probs, native, 16, 1.0, generator)
    assert sorted(every) == sorted(chance)  # no more are possible
    sure = torch.tensor([1.0, 1e-9, 0, 0])
    assert all(0 in route for route in routes.alternatives("gumbel", sure, native, 16, 1.0, generator))
    hot = Counter(routes.alternatives("gumbel", probs, native, 1, 50.0, generator)[0] for _ in range(n))
    assert max(hot.values()) < 1.2 * min(hot.values()) < 1.2 * n / 5


@pytest.mark.parametrize(("n_experts", "k"), [(6, 2), (64, 8)])
def test_random_sets_are_different_and_not_native(n_experts: int, k: int) -> None:
    native = tuple(range(k))
    sets = routes.random_routes(n_experts, native, 14, torch.Generator().manual_seed(0))
    assert len(set(sets)) == 14 and native not in sets and all(len(set(route)) == k for route in sets)
    many = [routes.random_routes(n_experts, native, 1, torch.Generator().manual_seed(i))[0] for i in range(600)]
    share = np.bincount(np.array(many).ravel(), minlength=n_experts) / 600
    assert np.abs(share - k / n_experts).max() < 0.1
