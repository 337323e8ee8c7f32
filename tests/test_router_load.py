"""Load, co-activation, specialisation, scores, super experts and imported routing: golden numbers, published counts,
and cases by hand."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import DATA
from interp_plugins.router import coactivation, load, outputs, scores, usage
from interp_plugins.router.coactivation import Coactivation
from interp_plugins.router.imports import decoded, routed_experts
from interp_plugins.router.outputs import SuperExperts, super_experts, warn_super
from interp_plugins.router.points import Point, Points, Shape
from interp_plugins.router.reading import read, usage_of
from interp_plugins.router.routed import Routed, entropy, margin, top1_share, z_loss
from interp_plugins.router.specialisation import Vocabulary, domain_shares, domains
from moe_golden import expected, routing

import interp_core as ic
from interp_core import sites as S
from interp_core import stats, testing
from interp_core.bench.allocations import peak_bytes


def tokens_of(layer: int) -> Routed:
    return Routed.joined([pair[0][layer] for pair in routing()])


# Load


def test_load_is_the_reference() -> None:
    counts = np.stack([tokens_of(layer).chosen.sum(0).numpy() for layer in range(4)])
    found = load.load(counts)
    for ours, theirs in (("cv", "load_cv_a"), ("max_vio", "load_maxvio_a"), ("entropy", "load_entropy_norm_a")):
        np.testing.assert_allclose(found[ours], expected()[theirs], atol=1e-12)
    np.testing.assert_array_equal(found["dead"], expected()["dead_a"])


def test_load_at_its_ends() -> None:
    even, one = np.full((1, 8), 3), np.eye(8)[:1]
    for name, (lowest, highest) in {
        "cv": (0, 7**0.5), "max_vio": (0, 7), "entropy": (1, 0), "gini": (0, 7 / 8), "dead": (0, 7)
    }.items():  # fmt: skip
        assert load.load(even)[name][0] == pytest.approx(lowest, abs=1e-12), name
        assert load.load(one)[name][0] == pytest.approx(highest), name
    assert load.aux_loss(even, np.full((1, 8), 1 / 8))[0] == pytest.approx(1)
    assert load.aux_loss(one, one)[0] == pytest.approx(8)
    rng = np.random.default_rng(0)
    f = rng.integers(0, 40, (3, 7))
    apart = np.abs(f[:, :, None] - f[:, None]).sum((1, 2)) / (2 * 7 * f.sum(1))
    np.testing.assert_allclose(load.gini(f), apart)
    with pytest.raises(ic.PlanError, match="negative, or a layer has none"):
        load.load([[0, 0]])


# Published counts


def published() -> dict[str, np.ndarray]:
    data = json.loads((DATA / "moe" / "olmoe_counts.json").read_text())
    return {name: np.array(value) for name, value in data.items()}


def test_published_counts_give_their_total_variations() -> None:
    """OLMoE's own counts of 208,896 tokens of each of two domains, layers 0, 7 and 15."""
    counts = published()
    for family, wanted in (("olmoe", [0.231, 0.501, 0.627]), ("mistral", [0.041, 0.048, 0.074])):
        pair = [usage.shares(counts[f"{family}/{domain}"]) for domain in ("c4", "github")]
        np.testing.assert_allclose(usage.total_variation(*pair), wanted, atol=5e-4)


def test_published_counts_give_load_and_specialisation_by_their_formulas() -> None:
    counts, n = published(), 208_896
    for name, k, n_experts in (("olmoe/c4", 8, 64), ("mistral/github", 2, 8)):
        share = domain_shares(counts[name], n)
        np.testing.assert_allclose(share, counts[name] / n)
        np.testing.assert_allclose(share.mean(-1), k / n_experts)  # the uniform line: every token has k experts
        f = load.load(counts[name])
        np.testing.assert_allclose(f["cv"], counts[name].std(1) / counts[name].mean(1))
        np.testing.assert_allclose(f["max_vio"], counts[name].max(1) / (n * k / n_experts) - 1)
    mixed = np.stack([counts["olmoe/c4"], counts["olmoe/github"]])
    assert (domain_shares(mixed, [n, n]).max(-1) > domain_shares(published()["mistral/c4"], n).max(-1)).all()
    with pytest.raises(ic.PlanError, match="were slots counted"):
        domain_shares(counts["olmoe/c4"], 1000)


def test_domains_stand_out_from_permuted_labels() -> None:
    rng = np.random.default_rng(1)
    labels = ["a", "b"] * 8
    favourite = np.array([[8, 1, 1, 1], [1, 8, 1, 1]])
    counts = np.stack([rng.multinomial(40, favourite[i % 2] / 11) for i in range(16)])[:, None]
    found = domains(counts, np.full(16, 40), labels)
    assert found.names == ("a", "b") and (found.p < 0.01).all() and (found.spread > 4 * found.null).all()
    assert found.share[0, 0].argmax() == 0 and found.share[1, 0].argmax() == 1
    plain = domains(
        np.stack([rng.multinomial(40, np.full(4, 1 / 4)) for _ in labels])[:, None], np.full(16, 40), labels
    )
    assert (plain.p > 0.05).all()
    with pytest.raises(ic.PlanError, match="two domains at least"):
        domains(counts, np.full(16, 40), ["a"] * 16)


# Co-activation


def test_coactivation_is_the_reference() -> None:
    made = Coactivation()
    for pair in routing():
        for layer, routed in pair[0].items():
            made.add_layer(layer, routed)
    np.testing.assert_array_equal(made.counts, expected()["coact_count_a"])
    np.testing.assert_allclose(
        coactivation.given(made.counts).nan_to_num(), expected()["coact_given_row_a"], atol=1e-12
    )
    assert made.tokens == 79 and made.steps.shape == (3, 8, 8)
    step = coactivation.conditional(made.steps[0], made.counts[0].diagonal())
    np.testing.assert_allclose(step.sum(-1)[made.counts[0].diagonal() > 0], 2)  # k experts of the next layer each
    wanted = torch.einsum("ni,nj->ij", tokens_of(0).chosen.long(), tokens_of(1).chosen.long())
    assert torch.equal(made.steps[0], wanted)


def test_coactivation_of_all_pairs_and_of_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 9, generator=generator, dtype=torch.float64)
    ids = logits.topk(4).indices
    routed = Routed.of_ids(
        ids, 9, torch.zeros(500, 9, dtype=torch.float64).scatter_(1, ids, logits.exp().gather(1, ids))
    )
    pairs, near = coactivation.together(routed, routed), coactivation.neighbours(routed)
    own = pairs.diagonal().double()
    assert torch.equal(own, near.diagonal().double()) and torch.equal(near, near.T)
    for counts, mean in ((pairs, 3.0), (near, 1.5)):
        off = counts.double() - torch.diag(own)
        assert float((off.sum(1)).sum() / own.sum()) == pytest.approx(mean)
    by_hand = torch.zeros(9, 9, dtype=torch.long)
    for row in ids.tolist():
        for first, second in pairwise(row):
            by_hand[first, second] += 1
            by_hand[second, first] += 1
    assert torch.equal(near - torch.diag(near.diagonal()), by_hand)
    lift = coactivation.lift(pairs, 500)
    assert float(lift[0, 1]) == pytest.approx(float(pairs[0, 1]) * 500 / float(own[0] * own[1]))


# Tokens


def test_token_statistics_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ids = torch.tensor([[0, 1], [0, 1]])
    probs = logits.softmax(-1)
    routed = Routed.of_ids(ids, 4, torch.where(Routed.of_ids(ids, 4).chosen, probs, 0), probs, logits)
    assert margin(routed).tolist() == [0.5, 0.0] and margin(routed)[0] == logits[0].sort().values.diff()[1]
    assert entropy(routed)[1] == pytest.approx(np.log(4)) and float(entropy(routed)[1].exp()) == pytest.approx(4)
    assert top1_share(routed).tolist() == pytest.approx([1 / (1 + np.exp(-1)), 0.5])
    assert z_loss(routed).tolist() == pytest.approx([float(logits[0].exp().sum().log()) ** 2, np.log(4) ** 2])
    assert margin(Routed.of_ids(torch.arange(4)[None], 4, probs[:1], probs[:1], logits[:1])).isnan().all()
    with pytest.raises(ic.ReadError, match="holds expert ids alone"):
        entropy(Routed(routed.chosen))


# Vocabulary


def test_vocabulary_specialisation_against_permuted_ids() -> None:
    """Tokens whose id decides their expert have share 1; permuted ids come down to chance."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (4000,), generator=generator)
    routed = Routed.of_ids((ids % 8)[:, None], 8)
    made, whole = Vocabulary(8), Vocabulary(8)
    for part in torch.arange(4000).split(700):
        made.add(ids[part], routed.take(part))
    whole.add(ids, routed)
    assert torch.equal(made.counts, whole.counts) and torch.equal(made.ids, whole.ids)
    found = made.specialisation()
    assert found["share"] == 1.0 and found["permuted"] < 0.25 and found["ids"] == 20
    assert [row[:2] for row in sorted(made.best(3, 3))] == [(3, 1.0), (11, 1.0), (19, 1.0)]
    random = Vocabulary(8)
    random.add(ids, Routed.of_ids(torch.randint(0, 8, (4000, 1), generator=generator), 8))
    assert random.specialisation()["share"] == pytest.approx(random.specialisation()["permuted"], abs=0.02)
    made.add(torch.tensor([-1, 50]), Routed.of_ids(torch.tensor([[0], [1]]), 8))
    assert int(made.occurrences.sum()) == 4001
    assert (Vocabulary(2).shares() == 0).all()
    everyone = Vocabulary(3)
    everyone.add(ids, Routed(torch.ones(4000, 3, dtype=torch.bool)))
    assert (everyone.shares() == 1).all()
    with pytest.raises(ic.PlanError, match="no token id occurs 5000 times"):
        made.specialisation(5000)


# Scores


def test_risk_difference_by_hand_and_over_texts() -> None:
    first, second = np.array([[[4, 1, 0]], [[4, 1, 0]]]), np.array([[[1, 0, 2]], [[2, 2, 3]]])
    found = scores.risk_difference(first, [5, 5], second, [5, 5])
    np.testing.assert_allclose(found.first, [[0.8, 0.2, 0.0]])
    np.testing.assert_allclose(found.value, [[0.5, 0.0, -0.5]])
    np.testing.assert_array_equal(found.counts[:, 0, 0], [8, 2, 3, 7])
    assert [(row["layer"], row["expert"], row["a1"], row["d2"]) for row in found.table([7])] == [
        (7, 0, 8, 7), (7, 2, 0, 5), (7, 1, 2, 8)
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    a, b = (rng.binomial(20, p, (30, 2, 4)) for p in (0.4, 0.3))
    n = np.full(30, 20)
    boot = stats.Bootstrap(method="percentile", resamples=500, seed=3)
    found = scores.risk_difference(a, n, b, n, boot)
    band = boot.band((a - b) / 20, axes=("layer", "expert"))  # texts of equal length: the mean of paired differences
    for ours, theirs in ((found.value, band.value), (found.low, band.low), (found.high, band.high)):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    with pytest.raises(ic.PlanError, match="the texts of both sets are pairs"):
        scores.risk_difference(a, n, b[:-1], n)


def test_npmi_at_its_ends_and_bounded_by_base_rates() -> None:
    assert scores.npmi([10, 1, 0], 10, [10, 10, 10], 100).tolist() == pytest.approx([1, 0, -1])
    assert scores.npmi([100], 100, [625], 10_000)[0] == pytest.approx(0.602, abs=1e-3)
    assert np.isnan(scores.npmi([0], 0, [3], 9)[0]) and scores.npmi([9], 9, [9], 9)[0] == 1
    with pytest.raises(ic.PlanError, match="cannot outnumber its sides"):
        scores.npmi([5], 4, [9], 20)


def test_association_of_a_planted_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    of_class = torch.rand(600, generator=generator) < 0.2
    ids = torch.randint(0, 6, (600, 1), generator=generator)
    ids[of_class & (torch.rand(600, generator=generator) < 0.7)] = 2
    found = scores.associated(Routed.of_ids(ids, 6), of_class)
    assert found.value.argmax() == 2 and found.p[2] < 0.01 and (np.delete(found.p, 2) > 0.05).all()
    assert abs(found.null).max() < 0.1 and found.class_tokens == int(of_class.sum())
    with pytest.raises(ic.PlanError, match="50 at least and not all"):
        scores.associated(Routed.of_ids(ids, 6), torch.arange(600) < 20)


# Outputs of experts


def padded(seed: int = 0) -> ic.Tokens:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (3, 9), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    return ic.Tokens(ids, mask)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_outputs_are_those_of_the_sites(family: str) -> None:
    """Weighted contributions over weights, expert by expert; padding counts for nothing."""
    of = ic.load(testing.tiny(family), check=False)
    tokens = padded()
    made = outputs.outputs_of(of, [tokens], piece_bytes=2000)
    run = of.run(tokens, read=[S.expert_out, S.router_weights], logits=False)
    for row, layer in enumerate(made.layers):
        weights = run[S.router_weights[layer]].plain[tokens.mask].double()
        added = run[S.expert_out[layer]].plain[tokens.mask].double()
        norms = added.norm(dim=-1)
        raw = torch.where(weights > 0, norms / weights, 0)
        wanted = {
            "frequency": (weights > 0).sum(0), "weighted_ean_sum": norms.sum(0), "ean_sum": raw.sum(0),
            "largest": torch.where(weights > 0, added.abs().amax(-1) / weights, 0).amax(0),
        }  # fmt: skip
        for name, value in wanted.items():
            np.testing.assert_allclose(made.score(name)[row], value, rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(made.score("frequency") * made.score("reap"), made.score("weighted_ean_sum"), atol=1e-9)
    assert (made.score("reap")[made.score("frequency") == 0] == 0).all()
    assert made.agreement().shape == (len(made.layers),) and (np.abs(made.agreement()) <= 1).all()


def test_outputs_apart_from_weights_that_scale_the_input_are_refused_before_the_run() -> None:
    of = ic.load(testing.tiny("llama4"), check=False)
    calls: list[int] = []
    of.hf.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(
        ic.CapabilityError, match=r"Llama4TextExperts of Llama4ForCausalLM takes hidden_states, not hidden"
    ):
        outputs.outputs_of(of, [padded()])
    assert not calls


def test_reap_of_two_batches_is_that_of_one_and_follows_an_expert() -> None:
    hf = testing.tiny("qwen3_moe", dtype=torch.float64)
    of = ic.load(hf, check=False)
    whole = outputs.outputs_of(of, [padded()])
    parts = outputs.outputs_of(of, [ic.Tokens.stack([row]) for row in padded()])
    np.testing.assert_allclose(parts.score("reap"), whole.score("reap"), rtol=1e-12)
    last = of.layers(S.router_logits)[-1]
    of.module("experts", last).down_proj.data[2] *= 2
    doubled = outputs.outputs_of(of, [padded()])
    ratio = doubled.score("reap")[-1] / whole.score("reap")[-1]
    np.testing.assert_allclose(ratio[2], 2, rtol=1e-12)
    np.testing.assert_allclose(np.delete(ratio, 2), 1, rtol=1e-12)
    with pytest.raises(ic.PlanError, match="no score 'raep' here. Did you mean 'reap'"):
        whole.score("raep")
    with pytest.raises(ic.CapabilityError, match="needs? a mixture of experts"):
        outputs.outputs_of(ic.load(testing.tiny("llama"), check=False), [padded()])


def test_a_planted_super_expert_is_found_alone() -> None:
    hf = testing.tiny("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=4)
    of = ic.load(hf, check=False)
    of.module("experts", 2).down_proj.data[3] *= 1000
    made = outputs.outputs_of(of, [padded(seed) for seed in range(3)])
    found = super_experts(made.score("largest"), made.layers, made.n_layers)
    assert found.cells == ((2, 3),) and found.last_layer == 3
    points = Points((Point(2, 3, 1.0), Point(2, 1, 0.5)))
    with pytest.warns(UserWarning, match="1 super expert.s.: layer 2 expert 3"):
        assert warn_super(points, found) == ((2, 3),)
    assert warn_super({2: [0, 1]}, found) == () and warn_super(Points(()), SuperExperts((), 0.0, (), 3)) == ()


def test_floors_of_super_experts() -> None:
    """995 / 10 = 99.5: 99.4 is above its whole part alone. Layers from round(.75 L) on do not count."""
    values = np.ones((4, 500))
    values[0, :2], values[3, 0] = (995, 99.4), 5000
    exact = super_experts(values, range(4), 4)
    assert exact.cells == ((0, 0),) and exact.bound == 99.5
    assert super_experts(values, range(4), 4, floor="reference").cells == ((0, 0), (0, 1))
    assert super_experts(values, range(4), 61, floor="reference").last_layer == 46
    shared = [[6000.0]] * 4
    assert super_experts(values, range(4), 4, shared=shared).cells == ((0, 0),)
    with pytest.raises(ic.PlanError, match="no layer below 3 of 4"):
        super_experts(values[:1], [3], 4)


# Other programs' arrays


def recorded() -> Iterator[tuple[ic.Model, np.ndarray]]:
    for family in ("qwen2_moe", "mixtral"):  # a dense layer first; none
        of = ic.load(testing.tiny(family), check=False)
        run = of.run(torch.arange(3, 20)[None], read=S.router_indices, logits=False)
        array = np.zeros((17, of.n_layers, 2), dtype=np.int16)
        for layer in of.layers(S.router_logits):
            array[:, layer] = run[S.router_indices[layer]].plain[0]
        yield of, array


def test_recorded_ids_give_the_models_counts() -> None:
    for of, array in recorded():
        shape = Shape.of(of)
        wanted = usage_of(of, [of.run(torch.arange(3, 20)[None], logits=-1).tokens])["all"]
        text = base64.b64encode(array.astype("<i4").tobytes())
        moe = array[:, list(shape.moe_layers)]
        for form in (array, decoded(text, of.n_layers, 2), moe):
            made = usage.Usage()
            made.add(routed_experts(form, shape))
            assert made.layers == wanted.layers and torch.equal(made.counts, wanted.counts)
        broken = array.copy()
        broken[3, 2] = 0
        with pytest.raises(ic.LoadError, match=r"token 3 in layer 2 has an expert twice: \[0, 0\]"):
            routed_experts(broken, shape)
        with pytest.raises(ic.LoadError, match="has 1 experts per token, .* takes 2"):
            routed_experts(array[..., :1], shape)
        with pytest.raises(ic.LoadError, match="has 7 layers"):
            routed_experts(np.zeros((2, 7, 2), dtype=int), shape)
        with pytest.raises(ic.LoadError, match="went to"):
            routed_experts(np.where(array == array.max(), 99, array), shape)
        with pytest.raises(ic.LoadError, match="whole numbers"):
            routed_experts(array.astype(float), shape)
        with pytest.raises(ic.LoadError, match="not whole tokens of 4 layers"):
            decoded(text, 4, 7)
        if 0 not in shape.moe_layers:
            with pytest.raises(ic.LoadError, match="names experts in layer 0, where"):
                routed_experts(np.where(np.arange(3)[:, None] == 0, 1, array), shape)
    with pytest.raises(ic.LoadError, match="is no base64"):
        decoded("§", 3, 2)


# Reading


def test_views_of_a_padded_batch_are_those_of_its_rows() -> None:
    of = ic.load(testing.tiny("qwen3_moe"), check=False)
    tokens = padded()
    views = {"all": None, "last": -1, "some": [1, 2]}
    found = usage_of(of, [tokens], views)
    alone = usage_of(of, [ic.Tokens.stack([row]) for row in tokens], views)
    for name in views:
        assert torch.equal(found[name].counts, alone[name].counts) and found[name].layers == (0, 2)
        np.testing.assert_allclose(found[name].matrix(), alone[name].matrix(), atol=1e-6)
        np.testing.assert_allclose(found[name].matrix(average="macro"), alone[name].matrix(average="macro"), atol=1e-6)
    assert (found["all"].tokens, found["last"].tokens, found["some"].tokens) == (23, 3, 6)
    layers = read(of, tokens, at=-1)
    run = of.run(tokens, read=[S.router_weights, S.router_indices], logits=False)
    for layer, routed in layers.items():
        assert torch.equal(routed.weights, run[S.router_weights[layer].at(-1)].plain)
        assert torch.equal(routed.chosen, routed.weights > 0)
    with pytest.raises(ic.CapabilityError, match=r"needs a mixture of experts; .*llama.* has no router"):
        read(ic.load(testing.tiny("llama"), check=False), tokens)
    with pytest.raises(ic.PositionError):
        read(of, tokens, at=7)


def test_memory_does_not_grow_with_the_number_of_tokens() -> None:
    of = ic.load(testing.tiny("qwen3_moe"), check=False)
    views: dict[int, dict[str, usage.Usage]] = {}

    def gather(n: int) -> None:
        views[n] = usage_of(of, (padded(seed) for seed in range(n)))

    gather(1)
    most = {n: peak_bytes(lambda n=n: gather(n)) for n in (2, 12)}  # type: ignore[misc]
    assert views[12]["all"].tokens == 6 * views[2]["all"].tokens == 276
    assert views[12]["all"].nbytes() == views[2]["all"].nbytes() == 8 * 2 * (3 * 6 + 3 * 6 + 1)
    assert most[12] < 1.5 * most[2]
