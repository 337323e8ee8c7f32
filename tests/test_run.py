"""Runs: reads, edits, receipts, and errors that come before the model runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import FAMILIES, nth, sampled, tiny_model
from tolerances import close

import interp_core as ic
from interp_core import sites as S
from interp_core.sites import Site

TEXT = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"


def test_plan_without_edits_changes_no_bit(ids: torch.Tensor) -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        with torch.no_grad():
            bare = model.hf(input_ids=ids, use_cache=False).logits
        assert torch.equal(model.run(ids).logits, bare)
        reads = [site for site in (S.resid_post, S.z, S.mlp_act) if site.name in model.sites]
        assert torch.equal(model.run(ids, read=reads).logits, bare), family


def test_shapes_and_parts(toy: ic.Model) -> None:
    run = toy.run(TEXT, read=[S.resid_post, S.z[3], S.pattern[3], S.head_out[2, 1].at(-1), S.k[0, 1].at([0, 2])])
    assert run[S.resid_post].shape == (6, 1, 16, 128)
    assert run[S.resid_post[2]].shape == (1, 16, 128)
    assert run[S.resid_post[-1]].shape == (1, 16, 128)
    assert run[S.z[3]].shape == (1, 16, 4, 32)
    assert torch.equal(run[S.z[3, 2]], run[S.z[3]][:, :, 2])
    assert torch.equal(run[S.z[3, [0, 2]].at(1)], run[S.z[3]][:, 1, [0, 2]])
    assert torch.equal(run[S.pattern[3, 1]], run[S.pattern[3]][:, 1])
    assert torch.equal(run[S.pattern[3, 1].at(query=-1, key=slice(0, 4))], run[S.pattern[3]][:, 1, -1, :4])
    assert run[S.head_out[2, 1].at(-1)].shape == (1, 128)
    assert run[S.k[0, 1].at([0, 2])].shape == (1, 2, 32)
    assert torch.equal(run["resid_post[2]"], run[S.resid_post[2]])
    assert S.resid_post[1] in run and S.mlp_out not in run


def test_parts_read_equal_parts_of_the_whole(ids: torch.Tensor) -> None:
    model = tiny_model("qwen3")
    whole = model.run(ids, read=[S.z, S.pattern, S.rot_k, S.v, S.mlp_act])
    sites = [
        S.z[1, 2], S.z[1].at(-1), S.z[:, [1, 3]].at(slice(1, 5)), S.pattern[2, 1].at(query=[1, 4]),
        S.pattern[0].at(query=-1, key=[0, 3]), S.rot_k[1, 1].at(2), S.v[0].at([[0, 1], [2, 3]]),
        S.mlp_act[1, 7], S.mlp_act[1].at(0),
    ]  # fmt: skip
    parts = model.run(ids, read=sites)
    for site in sites:
        close(parts[site], whole[site], model)  # attention that is opened for few queries leaves the rest to the kernel


def test_readings_know_their_site(toy: ic.Model) -> None:
    run = toy.run(TEXT, read=[S.resid_post, S.z[3, 2], S.pattern[3, 1], S.pattern[2]])
    value = run[S.z[3, 2]]
    assert isinstance(value, torch.Tensor) and value.site == S.z[3, 2]
    assert type(value + 1) is torch.Tensor
    assert torch.equal(value.at(-1), value[:, -1])
    assert torch.equal(run[S.resid_post].at(2), run[S.resid_post][:, :, 2])
    assert torch.equal(run[S.pattern[3, 1]].at(-1), run[S.pattern[3, 1]][:, -1])
    assert torch.equal(run[S.pattern[2]].at(query=-1, key=0), run[S.pattern[2]][:, :, -1, 0])
    assert torch.equal(pickle.loads(pickle.dumps(value)), value)
    assert torch.equal(run.logits.at(-1), run.logits[:, -1])
    with pytest.raises(ic.ReadError, match="already at chosen positions"):
        toy.run(TEXT, read=S.z[0].at(-1))[S.z[0].at(-1)].at(0)


def test_design_example_patch(toy: ic.Model) -> None:
    corrupted = TEXT.replace("small", "grand").replace("cold", "chaud")
    clean = toy.run(TEXT, read=S.z[2, 2])
    patched = toy.run(corrupted, edits=[S.z[2, 2].at(-1).set(clean[S.z[2, 2]].at(-1))], read=S.z[2, 2])
    assert torch.equal(patched[S.z[2, 2]].at(-1), clean[S.z[2, 2]].at(-1))
    assert patched.receipts[0].positions == ((15,),)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, padded: ic.Tokens) -> None:
    # transformers' own eager attention gives NaN in float64 for rows of padding: Gemma 2, which needs it, runs in float32
    dtype = torch.float32 if family == "gemma2" else torch.float64
    model = tiny_model(family, dtype)
    vector = torch.linspace(-2, 2, 64, dtype=dtype)
    edits = [S.resid_post[0].at(1).add(vector), S.z[1, 2].at(-1).zero(), S.pattern[2].at(query=-1, key=-2).scale(0.5)]
    reads = [S.resid_post.at(-1), S.pattern[1], S.v[1].at(0)]
    batch = model.run(padded, read=reads, edits=edits)
    for i, single in enumerate(padded):
        alone = model.run(single, read=reads, edits=edits)
        n = single.lengths[0]
        close(batch.logits[i, -n:], alone.logits[0], model)
        close(batch[S.resid_post.at(-1)][:, i], alone[S.resid_post.at(-1)][:, 0], model)
        close(batch[S.v[1].at(0)][i], alone[S.v[1].at(0)][0], model)
        close(batch[S.pattern[1]][i, :, -n:, -n:], alone[S.pattern[1]][0], model)


def test_edits_in_order_and_reads_after_them(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    plain = model.run(ids, read=S.resid_post[1])[S.resid_post[1]]
    vector = torch.ones(64)
    first = model.run(ids, read=S.resid_post[1], edits=[S.resid_post[1].scale(2.0), S.resid_post[1].add(vector)])
    second = model.run(ids, read=S.resid_post[1], edits=[S.resid_post[1].add(vector), S.resid_post[1].scale(2.0)])
    torch.testing.assert_close(first[S.resid_post[1]].as_subclass(torch.Tensor), plain * 2 + 1)
    torch.testing.assert_close(second[S.resid_post[1]].as_subclass(torch.Tensor), (plain + 1) * 2)


def test_operations(ids: torch.Tensor) -> None:
    model = tiny_model("gpt2")
    site = S.mlp_out[1].at(2)
    old = model.run(ids, read=site)[site].as_subclass(torch.Tensor)
    directions = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(directions.T).Q

    def after(edit: ic.Edit) -> torch.Tensor:
        return model.run(ids, read=site, edits=edit)[site].as_subclass(torch.Tensor)

    torch.testing.assert_close(after(site.set(directions)), directions)
    torch.testing.assert_close(after(site.set(directions[0])), directions[:1].expand(2, -1))
    torch.testing.assert_close(after(site.add(directions)), old + directions)
    torch.testing.assert_close(after(site.scale(-0.5)), old * -0.5)
    assert not after(site.zero()).any()
    torch.testing.assert_close(after(site.project(directions)), old - old @ basis @ basis.T)
    torch.testing.assert_close(after(site.apply(torch.tanh)), old.tanh())


def test_rows_with_different_numbers_of_positions(padded: ic.Tokens) -> None:
    model = tiny_model("llama")
    tokens = ic.Tokens(padded.ids, padded.mask, spans={"middle": tuple((ic.Span(0, n),) for n in (2, 4, 1))})
    site = S.resid_post[1].at("middle")
    run = model.run(tokens, read=[site, S.resid_pre[1]], edits=S.mlp_out[0].at("middle").zero())
    assert [tuple(row.shape) for row in run.rows(site)] == [(2, 64), (4, 64), (1, 64)]
    assert run.receipts[0].positions == ((0, 1), (0, 1, 2, 3), (0,))
    whole = run[S.resid_pre[1]]
    for row, part in enumerate(run.rows(S.resid_pre[1].at("middle"))):
        start = padded.ids.shape[1] - padded.lengths[row]
        assert torch.equal(part, whole[row, start : start + len(part)])
    with pytest.raises(ic.PositionError, match=r"use run\.rows"):
        run[site]
    with pytest.raises(ic.PositionError, match=r"use run\.rows"):
        run[S.resid_pre[1].at("middle")]


def test_logits_where_asked(toy: ic.Model) -> None:
    whole = toy.run(TEXT).logits
    for asked, wanted in ((-1, whole[:, -1]), ([0, 3], whole[:, [0, 3]])):
        torch.testing.assert_close(toy.run(TEXT, logits=asked).logits, wanted, atol=1e-4, rtol=1e-5)
    run = toy.run(TEXT, read=S.resid_post[1], logits=False)
    with pytest.raises(ic.ReadError, match="ended before the logits"):
        _ = run.logits


def test_receipts(toy: ic.Model) -> None:
    before = toy.run(TEXT, read=S.resid_post)
    vector = torch.ones(128)
    run = toy.run(TEXT, edits=[S.resid_post[1].at([0, -1]).add(vector), S.z[:, 0].zero()])
    first, second = run.receipts
    assert (first.fired, first.layers, first.positions) == (1, (1,), ((0, 15),))
    assert first.norm == pytest.approx((2 * 128) ** 0.5, rel=1e-4)
    assert (second.fired, second.layers, second.positions) == (6, (0, 1, 2, 3, 4, 5), None)
    assert "fired 1×, row 0 at 0,15, changed by norm 16" in str(first)
    replaced = toy.run(TEXT, edits=S.resid_post[2].set(torch.zeros(128)))
    norm = before[S.resid_post[2]].norm().item()
    assert replaced.receipts[0].norm == pytest.approx(norm, rel=1e-5)


def test_an_edit_without_effect_is_an_error(toy: ic.Model) -> None:
    clean = toy.run(TEXT, read=S.z)
    same = S.z[1].set(clean[S.z[1]])
    for edit in (same, S.z[1].scale(1.0), S.z[1].add(torch.zeros(32)), S.pattern[0].at(query=0, key=5).zero()):
        with pytest.raises(ic.EffectError, match="changed nothing"):
            toy.run(TEXT, edits=edit)
        run = toy.run(TEXT, edits=edit, allow_noop=True)
        assert run.receipts[0].norm == 0 and run.receipts[0].fired == 1


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (S.z[6, 0].zero(), ic.SiteError, r"no layer 6, there are 6, 0 to 5"),
        (S.z[0, 4].zero(), ic.SiteError, "no head 4, there are 4, 0 to 3"),
        (S.k[0, 2].zero(), ic.SiteError, "no head 2, there are 2"),
        (S.router_logits[0].mask(1), ic.CapabilityError, "no mixture-of-experts router"),
        (S.z[0].at(16).zero(), ic.PositionError, "no position 16 in row 0: it has 16 tokens"),
        (S.z[0].at("subject").zero(), ic.PositionError, "no positions called 'subject'"),
        (S.z[0].at(ic.Span(10, 20)).zero(), ic.PositionError, "lies outside row 0"),
        (
            S.z[0].set(torch.zeros(33)),
            ic.PlanError,
            r"the value is \[33\], the site has \[batch 1, pos 16, head 4, d_head 32\]",
        ),
        (S.z[0].set(torch.zeros(1, 32)), ic.PlanError, "nothing is broadcast"),
        (S.z[0].set(torch.zeros(2, 16, 4, 32)), ic.PlanError, r"the value is \[2, 16, 4, 32\]"),
        (S.z[0, 1].at(-1).add(torch.zeros(32).double()), ic.PlanError, r"write value.to\(torch.float32\)"),
        (S.z[0].set(torch.zeros(32, dtype=torch.long)), ic.PlanError, "the value is torch.int64"),
        (S.z[0].project(torch.ones(31)), ic.PlanError, r"takes \[d\] or \[k d\]"),
        (S.pattern[0].knockout(key=0), ic.PlanError, "position 0 of row 0 would have nothing left"),
        (S.z[0].apply(lambda x: x[:, :2]), ic.PlanError, "the function returned"),
    ],
)
def test_bad_edits_leave_the_model_alone(toy: ic.Model, edit: ic.Edit, error: type[Exception], says: str) -> None:
    before = {name: p.clone() for name, p in toy.hf.named_parameters()}
    ran = _count_forwards(toy)
    with pytest.raises(error, match=says):
        toy.run(TEXT, edits=edit)
    assert ran() == (1 if edit.op == "apply" else 0)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in toy.hf.modules())
    assert all(torch.equal(p, before[name]) for name, p in toy.hf.named_parameters())


def test_bad_reads(toy: ic.Model) -> None:
    with pytest.raises(ic.CapabilityError, match="no mixture-of-experts router"):
        toy.run(TEXT, read=S.router_logits)
    run = toy.run(TEXT, read=[S.z[1], S.resid_post.at(-1)])
    with pytest.raises(ic.ReadError, match=r"mlp_out\[0\] was not read in this run. It holds: z\[1\], resid_post@-1"):
        run[S.mlp_out[0]]
    with pytest.raises(ic.ReadError, match="was not read"):
        run[S.resid_post[1]]
    with pytest.raises(ic.ReadError, match="indexed by sites"):
        run[3]  # type: ignore[index]


def test_stopping_early(toy: ic.Model) -> None:
    with pytest.raises(ic.PlanError, match="asks for nothing"):
        toy.run(TEXT, logits=False)
    with pytest.raises(ic.PlanError, match="lies above the last site read"):
        toy.run(TEXT, read=S.resid_post[2], edits=S.z[3].zero(), logits=False)
    with pytest.raises(ic.PlanError, match="grad needs the logits"):
        toy.run(TEXT, read=S.resid_post[2], grad=lambda logits: logits.sum(), logits=False)
    full = toy.run(TEXT, read=[S.resid_post[2], S.pattern[2]])
    short = toy.run(TEXT, read=[S.resid_post[2], S.pattern[2]], logits=False)
    assert torch.equal(short[S.resid_post[2]], full[S.resid_post[2]])


def _count_forwards(model: ic.Model) -> object:
    from collections import Counter

    counter: Counter[str] = Counter()
    original = type(model.hf).forward

    class Counting(type(model.hf)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            counter["n"] += 1
            return original(self, *args, **kwargs)

    kind = type(model.hf)
    model.hf.__class__ = Counting

    def done() -> int:
        model.hf.__class__ = kind
        return counter["n"]

    return done


def test_model_input_forms(toy: ic.Model) -> None:
    encoded = toy.tokenizer(TEXT, return_tensors="pt")
    want = toy.run(TEXT).logits
    assert torch.equal(toy.run(encoded).logits, want)
    assert torch.equal(toy.run(encoded["input_ids"]).logits, want)
    assert torch.equal(toy.run(encoded["input_ids"][0]).logits, want)
    assert torch.equal(toy.run(toy.tokens(TEXT)).logits, want)
    assert torch.equal(toy.run([TEXT]).logits, want)


def test_compiled_plans_serve_many_values(toy: ic.Model) -> None:
    engine = toy.engine
    compiled = []
    original = engine.compile
    engine.compile = lambda *a: (compiled.append(1), original(*a))[1]  # type: ignore[method-assign]
    try:
        for i in range(5):
            run = toy.run(TEXT, read=S.resid_post[5], edits=S.resid_post[3].at(-2).set(torch.full((128,), float(i))))
            site = S.resid_post[3].at(-2)
            assert run.plan.edits[0] == site.set(torch.full((128,), float(i)))
    finally:
        del engine.compile  # type: ignore[attr-defined]
    assert len(compiled) <= 1
    assert not any(isinstance(v, torch.Tensor) for p in toy._programs.values() for v in p.state.edits)  # type: ignore[attr-defined]


def test_models_copy_untouched(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.hf.state_dict())
    keys = set(vars(model.hf.model.layers[0].self_attn))
    model.run(ids, read=[S.pattern, S.rot_q], edits=S.scores[1].scale(0.5))
    assert set(vars(model.hf.model.layers[0].self_attn)) == keys
    assert model.hf.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("asked", "chosen", "computed"), [(-1, [-1], 1), (slice(2, 5), [2, 3, 4], 5), ([0, 3], [0, 3], 4)]
)
def test_logits_of_some_positions_compute_no_others(asked: object, chosen: list[int], computed: int) -> None:
    model = tiny_model("llama")
    rows = [torch.tensor([row]) for row in ([5, 17, 33, 8, 61], [9, 54, 12, 70, 3, 28, 45])]
    tokens = ic.Tokens.stack([ic.Tokens(row, torch.ones_like(row, dtype=torch.bool)) for row in rows])
    whole = model.run(tokens).logits.as_subclass(torch.Tensor)
    seen: list[int] = []
    handle = model.hf.lm_head.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))
    try:
        some = model.run(tokens, logits=asked).logits.as_subclass(torch.Tensor)
        edited = model.run(tokens, logits=asked, edits=S.logits.at(-1).add(torch.ones(96))).logits
    finally:
        handle.remove()
    assert seen == [computed, 7]  # an edit of logits needs them all
    assert edited.shape == some.shape
    for row, places in enumerate(tokens.rows.real):
        wanted = whole[row, [places[i] for i in chosen]]
        torch.testing.assert_close(some[row].reshape(wanted.shape), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["head_out", "expert_out"])
def test_edits_of_a_computed_site_follow_each_other_and_reads_see_them(name: str, ids: torch.Tensor) -> None:
    """It is worked out from what edits of it never change, so these are kept beside it."""
    model = tiny_model("qwen3_moe", torch.float64)
    site, vector = S.named(name), torch.linspace(-1, 1, 64, dtype=torch.float64)
    before = model.run(ids, read=[site[0, [1, 3]], S.attn_out[0], S.mlp_out[0]])
    edits = [site[0, 1].add(vector), site[0, [3, 1]].scale(0.5), site[0, 3].at(-1).add(2 * vector)]
    after = model.run(ids, edits=edits, read=[site[0, [1, 3]], site[0, 3], S.attn_out[0], S.mlp_out[0]])
    wanted = before[site[0, [1, 3]]].as_subclass(torch.Tensor).clone()
    wanted[..., 0, :] = (wanted[..., 0, :] + vector) * 0.5
    wanted[..., 1, :] *= 0.5
    wanted[:, -1, 1] += 2 * vector
    found = after[site[0, [1, 3]]].as_subclass(torch.Tensor)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(after[site[0, 3]].as_subclass(torch.Tensor), wanted[..., 1, :])
    out = S.attn_out[0] if name == "head_out" else S.mlp_out[0]
    moved = (after[out] - before[out]).as_subclass(torch.Tensor)
    change = found.sum(-2) - before[site[0, [1, 3]]].as_subclass(torch.Tensor).sum(-2)
    torch.testing.assert_close(moved, change)


@pytest.mark.parametrize("site", ["z[1,2]", "z[1]", "resid_post[1]", "pattern[1,2]", "pattern[1]", "head_out[1,[0,2]]"])
def test_receipts_do_not_count_padding(site: str, padded: ic.Tokens) -> None:
    model = tiny_model("llama", torch.float64)
    edit = ic.Site.parse(site).scale(0.5)
    together = model.run(padded, edits=edit).receipts[0].norm
    alone = [model.run(row, edits=edit).receipts[0].norm for row in padded]
    assert together == pytest.approx(sum(norm**2 for norm in alone) ** 0.5, rel=1e-9)
    made = model.generate(padded, edits=edit, max_new_tokens=3, stop_at_eos=False).receipts[0].norm
    singles = [model.generate(row, edits=edit, max_new_tokens=3, stop_at_eos=False).receipts[0].norm for row in padded]
    assert made == pytest.approx(sum(norm**2 for norm in singles) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("family", sampled(fast=("olmo2", "gpt2", "gptj", "gemma3", "qwen3_moe", "opt")))
def test_what_comes_before_an_edit_does_not_see_it(family: str, ids: torch.Tensor) -> None:
    """Also where both sites are one tensor (OLMo 2's MLP reads the stream itself): the edit is of one use of it."""
    model = tiny_model(family)
    inner = ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out")
    layer = nth(model, "mlp_in", 1)
    names = [name for name in inner if layer in model.atlas.layers(name)]
    plain = model.run(ids, read=[Site(name, layer) for name in names])
    compared = 0
    for number, name in enumerate(names):
        if model.can(name, "write") or name == "resid_mid":  # which is changed by what attention adds
            continue
        before = [Site(other, layer) for other in names[:number]]
        run = model.run(ids, read=[*before, Site(name, layer)], edits=Site(name, layer).at(-1).scale(3.0))
        assert not torch.equal(run[Site(name, layer)], plain[Site(name, layer)]), name
        for site in before:
            assert torch.equal(run[site], plain[site]), (name, site)
        compared += len(before)
    assert compared
