"""Edits of what a router selects: bans in three modes, forced experts, boosts, and the proof that each carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from layouts import DENSE, LAYOUT
from routed import route_edited
from test_moe import MIXTURES, poisoned
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.architectures import rerouting, scored

IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])


def routed(model: ic.Model) -> tuple[int, int, int]:
    """The last layer with experts, how many there are, and how many a token takes."""
    layer = model.atlas.layers("router_logits")[-1]
    entry = model.atlas.entries["router_indices", layer]
    return layer, int(model.atlas.entries["router_logits", layer].n_units or 0), entry.sizes["k"]


def edits(layer: int, used: int, rare: int) -> list[ic.Edit]:
    """Every edit of a router, of an expert that is used much and of one that is used little, in one layer."""
    logits, weights = S.router_logits[layer], S.router_weights[layer]
    return [
        logits.mask([used, rare]), logits.mask(used, mode="keep"), logits.mask([used, rare], mode="drop"),
        logits.at([1, 4]).mask(used), logits.at(ic.Span(2, 5)).mask(used, mode="keep"),
        logits.force(rare), logits.at([0, 3]).force([rare, used]),
        logits.force(rare, mode="steermoe"), logits.at(-1).force([rare, used], mode="steermoe"),
        weights.boost([used, rare], 3.0), weights.at([1, 4, 5]).boost(used, 0.25, renormalise=True),
    ]  # fmt: skip


@pytest.mark.parametrize("at", [None, -1, [1, 4]])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "deepseek_v3"])
def test_edits_of_some_experts_are_those_of_all_with_the_others_kept(family: str, one: bool, at: Any) -> None:
    model = tiny_model(family, torch.float64)
    layer, n, _ = routed(model)
    sites = [S.router_weights[layer], S.router_indices[layer]]
    plain = model.run(IDS, read=sites)
    executed = int(plain[sites[1]].as_subclass(Tensor)[0, 1 if at == [1, 4] else -1, 0])
    experts: Any = executed if one else [executed, (executed + 1) % n]
    change = torch.zeros(n, dtype=torch.float64)
    change[experts] = -3.0
    some = S.router_logits[layer, experts].at(at).add(change[experts])
    part = model.run(IDS, read=sites, edits=some, allow_noop=True)
    whole = model.run(IDS, read=sites, edits=S.router_logits[layer].at(at).add(change), allow_noop=True)
    for site in sites:
        assert torch.equal(part[site].as_subclass(Tensor), whole[site].as_subclass(Tensor))
    assert part.receipts[0].routing == whole.receipts[0].routing and part.receipts[0].routing is not None
    assert not torch.equal(part[sites[0]].as_subclass(Tensor), plain[sites[0]].as_subclass(Tensor))


@pytest.mark.parametrize("family", MIXTURES)
def test_every_edit_is_that_by_hand(family: str) -> None:
    """Dense executed weights against a selector written token by token; tokens beside the span keep every bit."""
    model = tiny_model(family, torch.float64)
    layer, n, _ = routed(model)
    plain = model.run(IDS, read=[S.router_logits[layer], S.router_weights[layer]])
    logits, weights = (plain[site].as_subclass(Tensor) for site in (S.router_logits[layer], S.router_weights[layer]))
    counts = (weights != 0).flatten(0, 1).sum(0)
    used, rare = int(counts.argmax()), int(counts.argmin())
    gate = model.hf.get_submodule(f"{LAYOUT[family]['blocks']}.{layer}.{LAYOUT[family]['router']}")
    config = model.hf.config.get_text_config()
    moved = 0
    for edit in edits(layer, used, rare):
        run = model.run(IDS, read=[S.router_weights[layer], S.router_indices[layer]], edits=edit, allow_noop=True)
        got, chosen = (run[site].as_subclass(Tensor) for site in run)
        here = torch.zeros(2, 7, dtype=torch.bool)
        here[:, list(range(7)) if edit.site.pos is None else _columns(edit)] = True
        wanted = weights.clone()
        by_hand = route_edited(family, config, gate, logits[here], edit.op, edit.value)
        wanted[here] = by_hand.to(wanted.dtype)
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5, msg=lambda m, e=edit: f"{e}: {m}")
        assert torch.equal(got[~here], weights[~here]), edit
        assert torch.equal(got != 0, torch.zeros_like(got).scatter(-1, chosen, 1).bool() & (got != 0))
        proof = run.receipts[0].routing
        assert proof is not None and (proof.broken, proof.differing, proof.held) == (0, 0, 14)
        assert proof.tokens + proof.unmasked == int(here.sum())
        gone = ((weights != 0) & ~torch.zeros_like(got).scatter(-1, chosen, 1).bool()).sum()
        assert proof.changed == int(gone)
        moved += proof.changed
    assert moved and n == logits.shape[-1]


def _columns(edit: ic.Edit) -> list[int]:
    pos = edit.site.pos
    return [6] if pos == -1 else list(range(2, 5)) if isinstance(pos, ic.Span) else list(pos)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [family for family in MIXTURES if family != "llama4"])
@pytest.mark.parametrize("mode", ["keep", "drop"])
def test_what_is_kept_out_is_not_executed(family: str, mode: str) -> None:
    """NaN for the weights of a banned expert changes nothing at the tokens that it is banned from."""
    model = tiny_model(family)
    weights = model.run(IDS, read=S.router_weights)[S.router_weights].as_subclass(Tensor)
    sole = [e for e in range(weights.shape[-1]) if not ((weights != 0).sum(-1) == 1)[weights[..., e] != 0].any()]
    ban = S.router_logits.mask(sole[0], mode=mode)
    wanted = model.run(IDS, edits=ban, allow_noop=True)
    with poisoned(model.hf, family, sole[:1], float("nan")):
        run = model.run(IDS, edits=ban, allow_noop=True)
    assert torch.equal(run.logits, wanted.logits)
    assert wanted.receipts[0].routing == run.receipts[0].routing and not run.receipts[0].routing.unmasked


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("mode", ["own_weight", "steermoe"])
def test_forced_experts_are_executed_at_every_selected_position(family: str, mode: str) -> None:
    model = tiny_model(family)
    layer, n, k = routed(model)
    for first in range(0, n, 2):
        experts = [(first + i) % n for i in range(k)]
        run = model.run(
            IDS, read=[S.router_indices[layer], S.router_weights[layer]],
            edits=S.router_logits[layer].at(slice(1, None)).force(experts, mode=mode), allow_noop=True,
        )  # fmt: skip
        chosen, weights = (run[site].as_subclass(Tensor)[:, 1:] for site in run)
        assert all(sorted(row) == sorted(experts) for row in chosen.flatten(0, 1).tolist())
        assert (weights[..., experts] > 0).all()


def test_steermoe_weights_are_those_of_the_paper() -> None:
    """Two of three forced: all three within e^0.01, the strongest that was not forced last (newer than any rounding)."""
    hf = testing.tiny("mixtral", num_experts_per_tok=3)
    model = ic.load(hf)
    logits = model.run(IDS, read=S.router_logits[0])[S.router_logits[0]].as_subclass(Tensor)
    run = model.run(
        IDS, read=S.router_weights[0], edits=S.router_logits[0].force([1, 2], mode="steermoe"), allow_noop=True
    )
    weights = run[S.router_weights[0]].as_subclass(Tensor)
    strongest = logits.argmax(-1)
    apart = (strongest != 1) & (strongest != 2)
    assert apart.any()
    wanted = torch.tensor([0.334, 0.334, 0.331])
    found = torch.cat([weights[apart][:, [1, 2]], weights[apart].gather(-1, strongest[apart][:, None])], -1)
    assert (found - wanted).abs().max() < 5e-4


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_no_bias_and_no_group_keeps_a_forced_expert_out(family: str) -> None:
    hf = testing.tiny(family)
    layer = tiny_model(family).atlas.layers("router_logits")[0]
    gate = hf.get_submodule(f"{LAYOUT[family]['blocks']}.{layer}.{LAYOUT[family]['router']}")
    gate.e_score_correction_bias[0] = -50.0
    model = ic.load(hf, check=False)
    for mode in ("own_weight", "steermoe"):
        edit = S.router_logits[layer].force(0, mode=mode)
        weights = model.run(IDS, read=S.router_weights[layer], edits=edit)[S.router_weights[layer]]
        assert (weights[..., 0] > 0).all() and ((weights != 0).sum(-1) == 3).all()


def test_bans_and_forces_together_hold_in_any_order() -> None:
    model = tiny_model("qwen3_moe", torch.float64)
    ban, force, other = (
        S.router_logits[2].mask([0, 1]),
        S.router_logits[2].force(3),
        S.router_logits[2].force(4, "steermoe"),
    )
    runs = [
        model.run(IDS, read=S.router_weights[2], edits=order)
        for order in ([ban, force, other], [other, force, ban], [force, ban, other])
    ]
    weights = [run[S.router_weights[2]].as_subclass(Tensor) for run in runs]
    assert all(torch.equal(each, weights[0]) for each in weights)
    assert (weights[0][..., [3, 4]] > 0).all() and not weights[0][..., [0, 1]].any()


def test_a_token_whose_whole_set_is_banned_keeps_it() -> None:
    model = tiny_model("mixtral")
    plain = model.run(IDS, read=[S.router_weights[0], S.router_indices[0]])
    weights, chosen = (plain[site].as_subclass(Tensor) for site in plain)
    experts = chosen[0, 2].tolist()
    whole = (chosen.sort(-1).values == torch.tensor(sorted(experts))).all(-1)
    for mode in ("keep", "drop"):
        run = model.run(IDS, read=S.router_weights[0], edits=S.router_logits[0].mask(experts, mode=mode))
        got = run[S.router_weights[0]].as_subclass(Tensor)
        assert torch.equal(got[whole], weights[whole]) and not got[~whole][:, experts].any()
        proof = run.receipts[0].routing
        assert proof is not None and proof.unmasked == int(whole.sum()) and proof.tokens == int((~whole).sum())
        assert f"{proof.unmasked} tokens left as they are" in str(run.receipts[0])


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_while_generating_with_every_kernel(kernel: str, dtype: torch.dtype) -> None:
    """Edits act in every step, in rows of different lengths: beside the forced expert, the best that is not banned, by
    the very logits of that step. In float32 text and experts are those of one pass over all of it; half precision may
    round steps and passes to different sides of a tie, and everything after it is then another text.
    """
    hf = testing.tiny("qwen3_moe", dtype=dtype)
    hf.config._experts_implementation = kernel
    model = ic.load(hf)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    tokens = ic.Tokens(IDS, mask)
    plan = [S.router_logits.mask(2), S.router_logits.force(1), S.router_weights.boost(1, 1.5)]
    with poisoned(hf, "qwen3_moe", [2], float("nan")):
        read = [S.router_logits[2], S.router_indices[2], S.router_weights[2]]
        made = model.generate(tokens, edits=plan, read=read, max_new_tokens=4, stop_at_eos=False)
        whole = model.run(made.tokens, edits=plan, read=S.router_indices[2])
    chosen = made[S.router_indices[2]].as_subclass(Tensor)
    real = made.tokens.mask[:, :-1]
    assert not (chosen == 2).any() and ((chosen == 1).any(-1))[real].all()
    logits = made[S.router_logits[2]].as_subclass(Tensor)[real]
    others = chosen[real][chosen[real] != 1].view(-1, 1)
    best = logits.index_fill(-1, torch.tensor([1, 2]), float("-inf")).amax(-1)
    assert len(others) == int(real.sum()) and torch.equal(logits.gather(-1, others)[:, 0], best)
    if dtype == torch.float32:
        assert torch.equal(chosen.sort(-1).values[real], whole[S.router_indices[2]][:, :-1].sort(-1).values[real])
        assert whole.logits[:, 6:-1].argmax(-1).tolist() == made.ids.tolist()
    for receipt in made.receipts:
        proof = receipt.routing
        assert proof is not None and proof.broken == proof.differing == 0
        assert proof.tokens == 2 * (7 + 4 + 3 + 3)  # two layers; text of the prompt, and three steps of two rows


def test_padding_is_not_counted() -> None:
    model = tiny_model("qwen3_moe")
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    for edit in (S.router_logits.mask(1), S.router_logits.at(slice(1, None)).mask(1, mode="keep")):
        together = model.run(ic.Tokens(IDS, mask), edits=edit)
        alone = [model.run(IDS[:1], edits=edit), model.run(IDS[1:, :4], edits=edit)]
        proofs = [run.receipts[0].routing for run in alone]
        found = together.receipts[0].routing
        assert found is not None and all(proof is not None for proof in proofs)
        for field in ("tokens", "held", "changed", "unmasked"):
            assert getattr(found, field) == sum(getattr(proof, field) for proof in proofs)
        torch.testing.assert_close(together.logits[1, :4], alone[1].logits[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "llama4", "olmoe"])
def test_sweeps_are_runs(family: str) -> None:
    """Variants that ban, force and boost at the target's positions alone, by every strategy of a sweep."""
    model = tiny_model(family, torch.float64)
    layer, n, _ = routed(model)
    first = model.atlas.layers("router_logits")[0]
    variants = [edit for at in (layer, first) for e in range(0, n, 3) for edit in edits(at, e, (e + 1) % n)]
    variants = [ic.Edit(edit.site.at(slice(4, None)), edit.op, edit.value) for edit in variants]
    pairs: list[list[ic.Edit]] = [[edit] for edit in variants]
    pairs.append([S.router_logits[layer].at(-1).mask(0), S.router_logits[first].at(5).force(1)])
    tokens = IDS[:1]
    swept = model.sweep(tokens, pairs, score=ic.score.logprob(7))
    wanted = torch.stack([
        model.run(tokens, edits=each, allow_noop=True).logits[0, -1].log_softmax(-1)[7] for each in pairs
    ])  # fmt: skip
    torch.testing.assert_close(swept.values.flatten(), wanted.flatten().double(), atol=1e-5, rtol=1e-5)


def test_edits_are_data(tmp_path: Path) -> None:
    every = edits(2, 1, 0)
    assert len(set(every)) == len(every)
    plan = ic.Plan.of([S.router_indices], every)
    assert ic.Plan.from_json(plan.to_json()) == plan
    assert "router_logits[2]@span(2,5) mask_keep experts=1" in plan.describe()
    assert "router_weights[2] boost experts=1,0 × 3" in plan.describe()
    run = tiny_model("qwen3_moe").run(IDS, read=S.router_indices, edits=every[:2], allow_noop=True)
    run.save(tmp_path)
    again = ic.open_run(tmp_path)
    assert again.receipts == run.receipts and again.receipts[1].routing.tokens > 0
    assert torch.equal(again[S.router_indices], run[S.router_indices]) and again[S.router_indices].dtype == torch.long


def test_what_cannot_hold_is_refused_before_the_run() -> None:
    model = tiny_model("qwen3_moe")
    L, W = S.router_logits[2], S.router_weights[2]
    passes: list[int] = []
    handle = model.hf.register_forward_pre_hook(lambda *_: passes.append(1))
    for plan, said in (
        ([L.force([0, 1, 2])], "3 experts are forced, and a token takes 2"),
        ([L.force([0, 1]), L.at(3).force(2)], "layer 2: 3 experts are forced at a token, which takes 2"),
        ([L.mask([0, 4]), L.at(5).force(4)], "layer 2: expert 4 is both banned and forced at a token"),
        ([L.mask(0, mode="keep"), L.force(1)], "'keep' or 'drop' leaves a token's set as it is, and force changes it"),
        ([L.force(6)], "no expert 6, there are 6, 0 to 5"),
        ([W.boost(-1, 2.0)], "no expert -1, there are 6, 0 to 5"),
    ):  # fmt: skip
        with pytest.raises(ic.PlanError, match=said):
            model.run(IDS, edits=plan)
        assert not passes
    handle.remove()
    model.run(IDS, edits=[L.at(2).mask([0, 4]), L.at(5).force(4)], allow_noop=True)  # at other tokens both hold
    for make, said in (
        (lambda: L.mask(0, mode="remove"), "mask: no mode is called 'remove'"),
        (lambda: L.force(0, mode="steer"), "Did you mean 'steermoe'"),
        (lambda: S.router_weights[2].mask(0), "mask is for router_logits, not for router_weights"),
        (lambda: L.boost(0, 2.0), "boost is for router_weights, not for router_logits"),
        (lambda: W.boost(0, float("nan")), "a finite factor"),
        (lambda: S.router_logits[2, 1].force(0), "is about whole tokens; leave the expert out of the site"),
    ):
        with pytest.raises(ic.PlanError, match=said):
            make()


def test_what_does_nothing_is_an_effect_error() -> None:
    model = tiny_model("qwen3_moe")
    weights = model.run(IDS, read=S.router_weights[2])[S.router_weights[2]].as_subclass(Tensor)
    unused = int((weights[0, 2] == 0).nonzero()[0])
    chosen = int((weights[0, 2] != 0).nonzero()[0])
    boost = S.router_weights[2].at(2).boost([chosen, unused], 2.0)
    with pytest.raises(ic.EffectError, match=f"expert {unused} is chosen at none of these positions"):
        model.run(IDS[:1], edits=boost)
    model.run(IDS[:1], edits=boost, allow_noop=True)
    forced = model.run(
        IDS[:1], edits=[S.router_logits[2].at(2).force(unused), S.router_weights[2].at(2).boost(unused, 2.0)]
    )
    assert forced.receipts[1].norm > 0
    with pytest.raises(ic.EffectError, match="changed nothing"):
        model.run(IDS[:1], edits=S.router_logits[2].at(2).force(chosen))
    with pytest.raises(ic.EffectError, match="banned experts were executed after all.*a later edit of the same router"):
        back = torch.nn.functional.one_hot(torch.tensor(chosen), 6).float()
        model.run(IDS, edits=[S.router_logits[2].mask(chosen), S.router_weights[2].set(back)])


def test_a_selection_that_is_not_the_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At load, where nothing may be edited then, and in a run of a model loaded without the check."""

    class Wrong(scored.Scored):
        def weigh(self, router: object, logits: Tensor, chosen: Tensor) -> Tensor:
            return super().weigh(router, logits, chosen) * 1.001

    from interp_core.architectures import qwen3_moe

    router = qwen3_moe.FAMILY.router
    assert router is not None
    object.__setattr__(router, "selection", Wrong(renormalise="norm_topk_prob"))
    try:
        unchecked = ic.load(testing.tiny("qwen3_moe"), check=False)
        with pytest.raises(ic.CapabilityError, match="gives other experts or weights than the model's own router"):
            unchecked.run(IDS, edits=S.router_logits[0].mask(1))
        model = ic.load(testing.tiny("qwen3_moe"))
        with pytest.raises(ic.CapabilityError, match="selects as the family does"):
            model.run(IDS, edits=S.router_logits[0].mask(1))
        model.run(IDS, read=S.router_logits)
    finally:
        object.__setattr__(router, "selection", scored.TOP_K_OF_SOFTMAX)
    assert DENSE and rerouting.ABOVE == 0.01


def test_on_nnsight() -> None:
    torch_engine = tiny_model("qwen3_moe")
    other = torch_engine.on("nnsight")
    for edit in edits(2, 0, 1)[:9:2]:
        read = [S.router_indices, S.router_probs]
        runs = [model.run(IDS, read=read, edits=edit, allow_noop=True) for model in (torch_engine, other)]
        assert runs[0].receipts == runs[1].receipts
        torch.testing.assert_close(runs[0].logits, runs[1].logits)
        assert torch.equal(runs[0][S.router_indices], runs[1][S.router_indices])
