"""Rules of relevance propagation: against rules hung on the graph by hand, conservation, and what cannot be reached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pictures
import pytest
import torch
from conftest import sampled, tiny_model
from interp_plugins.attribution.relevance import rules as R
from interp_plugins.attribution.relevance.passes import Explained, relevance, relevance_rows
from layouts import DEEPSTACK, LINEAR
from relevance_by_hand import relevance as by_hand
from sweeping import ROWS
from tolerances import GROWTH, close, rounding

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.batteries.sites import coarsest
from interp_core.testing.state import State

AT, TOKEN = 7, 11
MIXTURES = ("qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "qwen3_next")


def row() -> ic.Tokens:
    ids = torch.tensor([ROWS[0]])
    return ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


KINDS = (
    "gpt2",
    "gptj",
    "gemma2",
    "gpt_neo",
    "opt",
    "qwen3",
    "olmo2",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_vl",
)
"""Composed and plain activations, LayerNorm and RMSNorm, parallel and post-normed blocks, attention of its own, mixtures."""


@pytest.mark.parametrize("family", sampled(fast=KINDS))
def test_relevance_is_that_by_hand(family: str) -> None:
    check_by_hand(family, R.rules("attnlrp"))


@pytest.mark.parametrize("rule", ["cp_lrp", "gradient"])
@pytest.mark.parametrize("family", sampled(fast=("llama",)))
def test_other_rules_are_those_by_hand(family: str, rule: str) -> None:
    check_by_hand(family, R.rules(rule))


@pytest.mark.parametrize("family", sampled(MIXTURES, ("qwen3_moe", "deepseek_v3")))
def test_halved_routers_are_those_by_hand(family: str) -> None:
    check_by_hand(family, R.rules("attnlrp", router="halved"))


def check_by_hand(family: str, chosen: R.Rules) -> None:
    model = tiny_model(family, torch.float64)
    hf = testing.tiny(family, dtype=torch.float64)
    hf.set_attn_implementation("eager")
    wanted = by_hand(hf, family, row().ids, AT, TOKEN, chosen.name, chosen.router)
    ours = relevance(model, row(), chosen, [AT], [TOKEN])
    close(torch.tensor(ours.objective), model.run(row()).logits.plain[0, AT, TOKEN].float(), model)
    assert wanted.abs().max() > 1e-3
    slack = torch.float32 if family in ("gptj", "opt") else coarsest(model)  # their eager attention narrows
    far = GROWTH * torch.finfo(slack).eps * float(wanted.abs().sum())
    torch.testing.assert_close(ours.tokens, wanted, atol=far, rtol=0)


def without_biases(family: str) -> ic.Model:
    hf = testing.tiny(family, dtype=torch.float64)
    for name, weight in hf.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    return ic.load(hf)


@pytest.mark.parametrize("family", sampled([name for name in testing.families() if name != "gpt_oss"], KINDS))
def test_constant_patterns_and_routers_conserve(family: str) -> None:
    """In every layer above one of linear attention. GPT-OSS adds one to a factor, which is a bias."""
    model = without_biases(family)
    first = 1 + max(LINEAR.get(family, [-1]))
    for chosen, epsilon in ((R.SETS["cp_lrp"], R.PUBLISHED), (R.relp(R.RELP_RULES), R.RELP)):
        assert chosen.conserving
        found = relevance(model, row(), chosen, [AT], [TOKEN], sites=[S.resid_pre])
        slack = (rounding(model) + 100 * epsilon) * max(1.0, abs(found.objective))
        for layer in range(first, model.n_layers):
            assert abs(float(found.relevance[S.resid_pre[layer]].sum()) - found.objective) < slack, (chosen.name, layer)
    lost = relevance(model, row(), R.rules("attnlrp"), [AT], [TOKEN], sites=[S.resid_pre])
    assert not R.SETS["attnlrp"].conserving
    assert abs(float(lost.relevance[S.resid_pre[0]].sum()) - lost.objective) > 1e-3  # softmax keeps a part


@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp", "pa_lrp"])
@pytest.mark.parametrize("family", sampled(fast=("gpt2", "qwen3_moe")))
def test_logits_and_the_model_stay_what_they_are(family: str, rule: str) -> None:
    model = tiny_model(family)
    before = State.of(model.hf)
    plain = model.run(row()).logits
    try:
        with R.rules(rule).on(model):
            ruled = model.run(row(), edits=S.embed.add(torch.zeros(64, requires_grad=True)), allow_noop=True).logits
    except ic.CapabilityError:
        assert rule == "pa_lrp" and family == "llama4"
    else:
        assert torch.equal(ruled.plain.detach(), plain.plain)
    after = State.of(model.hf)
    assert not [before.changes(part, after) for part in vars(before) if before.changes(part, after)]


def test_rows_and_spans_share_a_pass() -> None:
    """Rows are those of passes of their own; a span is the sum of its rows; what is predicted owes nothing to later."""
    model = tiny_model("qwen3", torch.float64)
    ids = row().ids[0].tolist()
    for chosen in (R.rules("attnlrp"), R.rules("gradient")):
        rows = relevance_rows(model, row(), chosen, range(2, 7), ids[3:])
        for i, at in enumerate(range(2, 7)):
            close(rows[i], relevance(model, row(), chosen, [at], [ids[at + 1]]).tokens, model)
            assert not rows[i, at + 1 :].any()
        span = relevance(model, row(), chosen, range(2, 7), ids[3:])
        close(span.tokens, rows.sum(0), model)
        weights = torch.tensor([0.5, 0.0, 2.0, 0.0, -1.0])
        weighted = relevance(model, row(), chosen, range(2, 7), ids[3:], weights=weights)
        close(weighted.tokens, (rows * weights[:, None]).sum(0), model)


def test_a_row_passes_only_over_the_tokens_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes: one per group of rows, each as long as its last; backward passes: one per row."""
    model, widths, backward = tiny_model("llama"), list[int](), list[int]()
    ids = torch.arange(3, 67)[None]
    tokens = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    run, ask = ic.Model.run, Explained.relevance
    monkeypatch.setattr(
        ic.Model, "run", lambda self, x, *a, **k: widths.append(x.ids.shape[1]) or run(self, x, *a, **k)
    )
    monkeypatch.setattr(Explained, "relevance", lambda self, *a, **k: backward.append(1) or ask(self, *a, **k))
    rows = relevance_rows(model, tokens, R.rules("attnlrp"), range(31, 63), ids[0, 32:].tolist())
    assert widths == [42, 53, 63] and len(backward) == len(rows) == 32


def test_the_last_mlp_runs_where_it_is_read() -> None:
    model, widths = tiny_model("llama", torch.float64), list[int]()
    handle = model.module("mlp", -1).gate_proj.register_forward_hook(lambda m, a, out: widths.append(out.shape[1]))
    try:
        few = relevance(model, row(), R.rules("attnlrp"), [3, 7], [5, 6])
        whole = Explained(model, row(), R.rules("attnlrp"), [3, 7])
    finally:
        handle.remove()
    assert widths == [2, 8]
    close(few.tokens, whole.relevance(whole.chosen([5, 6])).tokens, model)


def test_against_another_token_and_the_largest() -> None:
    model = tiny_model("llama", torch.float64)
    chosen = R.rules("attnlrp")
    one, other = (relevance(model, row(), chosen, [AT], [token]) for token in (3, 9))
    both = relevance(model, row(), chosen, [AT], [3], against=9)
    close(both.tokens, one.tokens - other.tokens, model)
    logits = model.run(row()).logits.plain[0, AT]
    assert relevance(model, row(), chosen, [AT]).objective == pytest.approx(float(logits.max()))


def test_inner_sites() -> None:
    """Under gradient × input, relevance at any site is value times gradient; heads keep their axis."""
    model = tiny_model("llama", torch.float64)
    sites = [S.z, S.mlp_out[1], S.pattern[2], S.final_norm]
    found = relevance(model, row(), R.GRADIENT, [AT], [TOKEN], sites=sites).relevance
    run = model.run(row(), read=sites, grad=lambda logits: logits[0, AT, TOKEN])
    assert list(found) == [S.z[0], S.z[1], S.z[2], S.mlp_out[1], S.pattern[2], S.final_norm]
    for site, shape in ((S.z[1], [8, 4]), (S.mlp_out[1], [8]), (S.pattern[2], [4, 8, 8]), (S.final_norm, [8])):
        product = (run[site].plain * run.grad[site].plain)[0]
        close(found[site], product if site.name == "pattern" else product.sum(-1), model)
        assert list(found[site].shape) == shape
    assert list(found[S.z].shape) == [3, 8, 4] and torch.equal(found[S.z][1], found[S.z[1]])
    assert torch.equal(found[S.mlp_out], found[S.mlp_out[1]][None])
    for site in (S.mlp_out[0], S.attn_out, S.z[1, 2]):
        with pytest.raises(ic.SiteError, match=r"no relevance of .* that of: z\[0\], z\[1\], z\[2\], mlp_out\[1\]"):
            found[site]
    with pytest.raises(ic.PlanError, match="give whole sites, as z"):
        relevance(model, row(), R.GRADIENT, [AT], sites=[S.z[0, 1]])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_positions_take_half_of_what_reaches_the_scores(family: str) -> None:
    """Each rotary product halves what q and k get, and the tables get exactly that half; nothing else changes above."""
    model = tiny_model(family, torch.float64)
    above = relevance(model, row(), R.rules("pa_lrp"), [AT], [TOKEN], sites=[S.rot_q, S.rot_k])
    assert above.positions is not None
    close(above.positions[0].sum(), sum(part.sum() for part in above.relevance.values()) / 2, model)
    assert above.positions[1].sum() > above.positions[0].sum().abs()
    last = model.n_layers - 1
    plain, halved = (
        relevance(model, row(), R.rules(name), [AT], [TOKEN], sites=[S.rot_q[last], S.q[last]]).relevance
        for name in ("attnlrp", "pa_lrp")
    )
    close(halved[S.rot_q[last]], plain[S.rot_q[last]], model)
    close(halved[S.q[last]].sum(), plain[S.q[last]].sum() / 2, model)


def test_learnt_positions_are_an_input_of_their_own() -> None:
    model = without_biases("gpt2")
    found = relevance(model, row(), replace(R.SETS["cp_lrp"], positions=True), [AT], [TOKEN])
    assert found.positions is not None
    assert abs(float(found.tokens.sum() + found.positions[0].sum()) - found.objective) < 1e-6
    assert abs(float(found.tokens.sum()) - found.objective) > 1e-3


@pytest.mark.parametrize("family", DEEPSTACK)
def test_deepstack_features_are_inputs(family: str) -> None:
    """Under the gradient each sum is the derivative by a factor of that input; constant patterns conserve the whole;
    without the features there is none of it."""
    model = without_biases(family)
    tokens = model.run(pictures.inputs(family, [[pictures.picture(family)]])).tokens
    at = tokens.ids.shape[1] - 1
    plain = relevance(model, tokens, R.GRADIENT, [at], [TOKEN])
    assert plain.deepstack is not None and plain.deepstack.any()
    for site, part in ((S.deepstack[0], plain.deepstack), (S.resid_pre[0], plain.tokens - plain.deepstack)):
        ends = [model.run(tokens, edits=site.scale(1 + step)).logits.plain[0, at, TOKEN] for step in (1e-3, -1e-3)]
        assert abs(float((ends[0] - ends[1]) / 2e-3 - part.sum())) < 1e-2 * max(1.0, float(part.abs().sum()))
    whole = relevance(model, tokens, R.rules("cp_lrp"), [at], [TOKEN])
    assert abs(float(whole.tokens.sum()) - whole.objective) < 1e-4
    text = [i for i in range(at + 1) if i not in tokens.columns("vision")[0]]
    assert not whole.deepstack[text].any()  # type: ignore[index]
    features = model.run(tokens, read=S.deepstack[0])[S.deepstack[0]].plain
    assert features.any()


def test_visual_tokens_without_deepstack() -> None:
    model = without_biases("llava")
    tokens = model.run(pictures.inputs("llava", [[pictures.picture("llava")]])).tokens
    found = relevance(model, tokens, R.rules("cp_lrp"), [tokens.ids.shape[1] - 1], [TOKEN])
    assert found.deepstack is None and abs(float(found.tokens.sum()) - found.objective) < 1e-5


CASES = torch.tensor([-3.0, -1e-10, -1e-20, 0.0, 1e-20, 1e-10, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(("signed", "epsilon"), [(True, 1e-10), (False, 1e-10), (True, 1e-6)])
def test_the_activation_is_a_factor(signed: bool, epsilon: float) -> None:
    """d y / d x = f(x) / (x + ε sign x); the published ε has no sign, and is nought at x = -ε."""
    x = CASES[CASES != -1e-10] if not signed else CASES
    slope = vjp(torch.nn.functional.silu, x, replace(R.SETS["attnlrp"], signed=signed, activations=epsilon))
    sign = torch.ones_like(x).copysign(x) if signed else 1.0
    torch.testing.assert_close(slope, torch.nn.functional.silu(x) / (x + epsilon * sign), atol=0, rtol=1e-12)
    assert slope.isfinite().all()


def test_a_gate_that_is_open_at_nought_is_a_constant() -> None:
    assert not vjp(torch.sigmoid, CASES, R.SETS["attnlrp"]).any()
    assert not vjp(torch.nn.functional.softplus, CASES, R.SETS["attnlrp"]).any()


def vjp(function: Any, x: torch.Tensor, chosen: R.Rules) -> torch.Tensor:
    """Gradient of a function's sum where the model would compute it."""
    hf = testing.tiny("llama", dtype=torch.float64)
    own, seen = type(hf.model.layers[0].mlp), list[torch.Tensor]()

    class Changed(own):  # type: ignore[misc,valid-type]
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            if not hidden.requires_grad:
                return hidden
            leaf = x.clone().requires_grad_()
            seen.extend(torch.autograd.grad(function(leaf).sum(), leaf, retain_graph=True, allow_unused=True,
                                            materialize_grads=True) if function(leaf).requires_grad else [x * 0])  # fmt: skip
            return hidden

    hf.model.layers[0].mlp.__class__ = Changed
    model = ic.load(hf, check=False)
    with chosen.on(model):
        model.run(row(), edits=S.embed.add(torch.zeros(64, dtype=torch.float64, requires_grad=True)), allow_noop=True)
    return seen[0]


def test_layer_norm_keeps_its_mean_linear() -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (4,), WEIGHT, None, 1e-5) * FACTOR

    x = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    scale = (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    grad = FACTOR * WEIGHT * scale
    torch.testing.assert_close(vjp(norm, x, R.SETS["attnlrp"]), grad - grad.mean(), atol=1e-14, rtol=0)

    def rms(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (4,), WEIGHT, 1e-5) * FACTOR

    scale = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(vjp(rms, x, R.SETS["attnlrp"]), FACTOR * WEIGHT * scale, atol=1e-14, rtol=0)


WEIGHT = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
FACTOR = torch.tensor([[2.0, -1.0, 3.0, 1.0]], dtype=torch.float64)


def test_products_share_and_gates_do_not() -> None:
    def gated(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * (2 * x)

    x = torch.tensor([-1.5, 0.5, 2.0], dtype=torch.float64)
    silu = torch.nn.functional.silu(x)
    torch.testing.assert_close(vjp(gated, x, R.SETS["attnlrp"]), 2 * silu)  # half by each factor, each once
    torch.testing.assert_close(vjp(gated, x, R.SETS["cp_lrp"]), 2 * silu)
    torch.testing.assert_close(vjp(lambda x: (3 * x) * (2 * x), x, R.SETS["attnlrp"]), 6 * x)
    torch.testing.assert_close(vjp(lambda x: (3 * x) * (2 * x), x, R.relp(("ln",))), 12 * x)

    def one_sided(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x[:1]) * x[1:]

    pair = torch.tensor([0.7, -1.3], dtype=torch.float64)
    act = float(torch.nn.functional.silu(pair[0]))
    halves = torch.tensor([act / 0.7 * -1.3 / 2, act / 2], dtype=torch.float64)
    torch.testing.assert_close(vjp(one_sided, pair, R.SETS["attnlrp"]), halves, atol=1e-9, rtol=0)
    wholes = torch.tensor([0.0, act], dtype=torch.float64)
    torch.testing.assert_close(vjp(one_sided, pair, R.SETS["cp_lrp"]), wholes, atol=1e-9, rtol=0)


def test_refusals() -> None:
    with pytest.raises(ic.PlanError, match="no set of rules is called 'attn_lrp'. Did you mean 'attnlrp'"):
        R.rules("attn_lrp")
    with pytest.raises(ic.PlanError, match="RelP has no rule 'identiy'. Did you mean 'identity'"):
        R.relp(("ln", "identiy"))
    with pytest.raises(ic.PlanError, match="'frozen' or 'halved'"):
        R.rules("attnlrp", router="softmax")
    with pytest.raises(ic.CapabilityError, match="not handed cosines and sines"):
        relevance(tiny_model("llama4"), row(), R.rules("pa_lrp"), [AT])
    assert R.unruled(tiny_model("qwen3_5")) == [0] and not R.unruled(tiny_model("llama"))


def test_sets_say_what_is_on() -> None:
    assert str(R.relp()) == "relp:ln+identity+half (norm, activation, product halved)"
    assert str(R.relp("published_demo")) == "relp:ln+half (norm, product halved)"
    assert str(R.GRADIENT) == "gradient (the gradient alone)" and R.GRADIENT.empty and not R.relp(("ln",)).empty
