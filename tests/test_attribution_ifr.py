"""Information flow: published numbers, shares that add up over all families, hops by hand, and the method."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from conftest import sampled, tiny_model
from interp_plugins.attribution.flows.flow import Flow
from interp_plugins.attribution.flows.hops import Parts, multi_hop, segments, split_hop
from interp_plugins.attribution.ifr import IFR, IFRConfig
from interp_plugins.attribution.layout import Layout, layout_of
from interp_plugins.attribution.named import NAMES
from torch import Tensor
from transformers import AutoModelForCausalLM

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.engines import attention_rows
from interp_core.testing.visual import VISUAL

DATA = Path(__file__).parent / "data" / "attribution"
LINEAR = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_vision")
"""Families with linear attention in their first layer."""
GATED = {"layer_types": ["full_attention"] * 3}
IDS = torch.tensor([[5, 9, 33, 12, 60, 7, 21, 80, 44, 3, 17, 28]])


@cache
def published(family: str) -> tuple[ic.Model, Any]:
    """A tiny model, and what the published package gave for it."""
    return ic.load(AutoModelForCausalLM.from_pretrained(DATA / "models" / family)), np.load(
        DATA / "ifr" / f"{family}.npz"
    )


def tokens_of(numbers: Any, example: str, *, spans: bool = True, template: bool = True) -> ic.Tokens:
    ids = torch.tensor(numbers[f"{example}/ids"][None].astype(np.int64))
    user, sink, thinking = ((ic.Span(int(a), int(b)),) for a, b in numbers[f"{example}/spans"])
    start = int(numbers[f"{example}/prompt_len"])
    places = {"prompt": (user if template else (ic.Span(0, start),),), "target": ((ic.Span(start, ids.shape[1]),),)}
    more = {"sink": (sink,), "thinking": (thinking,)} if spans else {}
    labels = (tuple(map(str, numbers[f"{example}/labels"])),)
    return ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), labels=labels, spans={**places, **more})


def cases(family: str) -> list[tuple[str, str]]:
    """Examples and the variants that they were explained by."""
    names = np.load(DATA / "ifr" / f"{family}.npz").files
    return sorted({(a, b) for a, b, _ in (n.split("/") for n in names if n.count("/") == 2) if "ifr_" in b})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_variant_gives_the_published_numbers(family: str) -> None:
    """Within the tolerances of the published data: all positions 2e-5, hop vectors 1e-4."""
    model, numbers = published(family)
    seen = set()
    for example, name in cases(family):
        told = re.fullmatch(r"(head_)?(ifr_.*?)(?:_thr([\d.]+))?(_nospans)?(?:_n(\d))?", name)
        assert told is not None
        head, variant, threshold, bare, hops = told.groups()
        tokens = tokens_of(numbers, example, spans=not bare, template=not head)
        layout = layout_of(model, tokens)
        config = IFRConfig(
            **NAMES[variant][1], profile="reference", threshold=float(threshold or 0), n_hops=int(hops or 1),
            hop0="sink" if head else "all",
        )  # fmt: skip
        found, at = IFR().attribute(model, layout, config), list(layout.projected)
        assert found.rows is not None
        rows, wanted = found.rows[:, at].numpy(), {
            key.split("/")[2]: numbers[key] for key in numbers.files if key.startswith(f"{example}/{name}/")
        }  # fmt: skip
        if "matrix" in wanted:
            np.testing.assert_allclose(rows, wanted["matrix"], atol=2e-5, rtol=0)
        else:
            assert np.flatnonzero(~np.isnan(rows).all(1)).tolist() == wanted["rows"].tolist(), name
            np.testing.assert_allclose(
                rows[wanted["rows"]], wanted["row"][None].repeat(len(wanted["rows"]), 0), atol=2e-5
            )
        if "vh" in wanted:
            np.testing.assert_allclose(found.hops[:, at].numpy(), wanted["vh"], atol=1e-4, rtol=0)
        if "ratios" in wanted:
            np.testing.assert_allclose(found.mass.numpy(), wanted["ratios"], atol=5e-6, rtol=0)
        if "obs_avg" in wanted and hops == "3":
            mean = IFR().attribute(model, layout, config.model_copy(update={"combine": "avg"}))
            np.testing.assert_allclose(mean.scores[at].numpy(), wanted["obs_avg"], atol=2e-5, rtol=0)
        if "split_details" in wanted and hops != "0":
            start = layout.target.start
            details = [
                [s["segment"], s["start"] - start, s["stop"] - 1 - start, s["pending"], s["total"], s["share"]]
                for s in found.notes["segments"]
            ]
            np.testing.assert_allclose(details, wanted["split_details"], atol=5e-4, rtol=0)
        seen.add((bool(head), variant))
    assert {variant for _, variant in seen} >= {name for name in NAMES if name.startswith("ifr_")}
    assert family != "llama" or (True, "ifr_multi_hop_both") in seen


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shares_of_each_layer_are_the_published_ones(family: str) -> None:
    model, numbers = published(family)
    example = cases(family)[0][0]
    names = {key.split("/")[1] for key in numbers.files if "/core_" in key}
    assert len(names) == 4
    for name in names:
        one = {key.split("/")[2]: numbers[key] for key in numbers.files if f"{example}/{name}/" in key}
        rows = range(int(one["span"][0]), int(one["span"][1]) + 1)
        flow = Flow(model, tokens_of(numbers, example), tuple(rows), "reference", float(name.rpartition("_")[2]))
        weights = torch.tensor(one["weights"]).double() if "weights" in one else None
        shares = flow.shares(rows, None if weights is None else weights / weights.sum())
        for part, key in ((shares.token, "token"), (shares.head, "head"), (shares.resid, "resid_attn")):
            np.testing.assert_allclose(part.numpy(), one[f"layer_{key}"], atol=5e-5, rtol=0)


def by_hand(model: ic.Model, flow: Flow, tokens: ic.Tokens, rows: list[int], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of tokens, residual and bias `[layer pos + 2]`, part by part, from patterns, values, z and weights; and
    how far parts and bias are off attn_out."""
    sites = (S.pattern, S.v, S.z, S.attn_out, S.resid_pre)
    run, linear = by_rule(model, tokens, sites)
    found, off = [], []
    for layer in range(model.n_layers):
        added, before = (run[site[layer]].plain[0] for site in sites[3:])
        pattern, v, z = linear[layer] if layer in linear else (run[site[layer]].plain[0] for site in sites[:3])
        heads = pattern.shape[0]
        v = v.transpose(0, 1).repeat_interleave(heads // v.shape[1], 0)  # [head key d_head]
        mixed = (pattern @ v).transpose(0, 1)
        value = v[:, None] * (z / mixed)[rows].transpose(0, 1)[:, :, None]  # 1, or the gate
        value = torch.where(pattern[:, rows, :, None] != 0, value, 0)
        if layer in linear:
            w_o = model.module("linear_attn", layer).out_proj.weight.detach().mT.unflatten(0, v.shape[::2])
            bias = torch.zeros(len(rows), w_o.shape[-1], dtype=w_o.dtype)
        else:
            w_o, bias = model.weights(S.z[layer]), model.bias(S.z[layer]).expand(len(rows), -1)
        parts = torch.einsum("hrk,hrkd,hdm->rhkm", pattern[:, rows], value, w_o)
        whole = parts.sum((1, 2)) + bias
        ratio = added[rows] / whole  # a post-norm, a multiplier, or 1
        if layer not in linear and float((ratio - 1).abs().max()) > 1e-9:
            gains = model.weights(S.attn_out[layer]) if flow._layers[layer].out.normed else torch.ones_like(bias[0])
            ratio = ((gains * whole * added[rows]).sum(-1) / (gains * whole).square().sum(-1))[:, None] * gains
        parts, bias = parts * ratio[:, None, None], bias * ratio
        off.append(float((parts.sum((1, 2)) + bias - added[rows]).norm() / added[rows].norm()))
        x = weights @ (before + added)[rows]

        def near(part: Tensor, x: Tensor = x) -> Tensor:
            return (x.abs().sum() - (x - part).abs().sum(-1)).clamp_min(0)

        token = near(torch.einsum("r,rhkm->hkm", weights, parts)).sum(0)
        others = torch.stack([near(weights @ before[rows]), near(weights @ bias)])
        found.append(torch.cat([token, others]) / (token.sum() + others.sum()))
    return torch.stack(found), torch.tensor(off)


def by_rule(model: ic.Model, tokens: ic.Tokens, sites: Any) -> tuple[ic.Run, dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """A run; and of layers of linear attention what each position takes from each value, step by step in float64, with
    values and what the output projection reads."""
    layers = [layer for layer in range(model.n_layers) if layer not in model.layers("pattern")]
    seen: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    with ExitStack() as stack, noted_rules(seen, model):
        for layer in layers:
            projection = model.module("linear_attn", layer).out_proj
            note = partial(lambda kept, _, args: kept.update(z=args[0]), seen[layer])
            stack.callback(projection.register_forward_pre_hook(note).remove)
        run = model.run(tokens, read=sites)
    found = {}
    for layer, called in seen.items():
        q, k, v, g, beta = (called[name][0].double() for name in ("query", "key", "value", "g", "beta"))
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q * q.shape[-1] ** -0.5, k))
        mix = torch.zeros(v.shape[1], len(v), len(v), dtype=torch.float64)
        for source in range(len(v)):
            state = torch.zeros_like(k[0])
            for t in range(source, len(v)):
                state = state * g[t].exp()[:, None]
                told = float(t == source) - (state * k[t]).sum(-1)
                state = state + k[t] * (told * beta[t])[:, None]
                mix[:, t, source] = (state * q[t]).sum(-1)
        found[layer] = mix, v, called["z"][0].double().view(v.shape)
    return run, found


@contextmanager
def noted_rules(seen: dict[int, dict[str, Tensor]], model: ic.Model) -> Iterator[None]:
    """While it lasts, rules note what they are called with, layer by layer."""
    if not seen:
        yield
        return
    module, order = sys.modules[type(model.module("linear_attn", next(iter(seen)))).__module__], iter(seen.values())
    rule = module.torch_chunk_gated_delta_rule

    def noting(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        next(order).update(query=query, key=key, value=value, g=kwargs["g"], beta=kwargs["beta"])
        return rule(query, key, value, **kwargs)

    module.torch_chunk_gated_delta_rule = noting
    try:
        yield
    finally:
        module.torch_chunk_gated_delta_rule = rule


def flow_law(model: ic.Model, tokens: ic.Tokens, limit: float) -> None:
    """In float64: parts and bias add up to attn_out, shares to 1; spans and rows are those by hand."""
    last = tokens.lengths[0] - 1
    rows, weights = [last - 6, last - 3, last], torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    flow = Flow(model, tokens, tuple(range(last + 1)))
    shares = flow.shares(rows, weights)
    wanted, off = by_hand(model, flow, tokens, rows, weights)
    assert float(off.max()) < limit
    found = torch.cat([shares.token, shares.resid[:, None], shares.bias[:, None]], 1)
    torch.testing.assert_close(found, wanted, atol=limit, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(model.n_layers, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(shares.head.sum(1), shares.token.sum(1), atol=1e-12, rtol=0)
    alone, error = flow.all_rows([last - 4, last])
    assert error == 0
    for row, position in zip(alone, (last - 4, last), strict=True):
        torch.testing.assert_close(row, flow.span([position]), atol=1e-12, rtol=0)
        assert row.any() and (bool(tokens.inputs) or not row[position + 1 :].any())


@pytest.mark.parametrize("family", sampled())
def test_shares_add_up_in_every_family(family: str) -> None:
    """Grouped and latent heads, windows, sinks, caps, parallel blocks, post-norms, multipliers, biases, mixtures,
    images. Post-norms compute in float32, whatever the dtype."""
    model = tiny_model(family, torch.float64)
    values: Any = IDS
    if family in VISUAL:
        values = pictures.inputs(family, [[pictures.picture(family)]])
        values["pixel_values"] = values["pixel_values"].double()
    tokens = model.input(values)
    if family in LINEAR:  # its rule takes float32, whatever the dtype
        flow_law(model, tokens, 1e-5)
        return
    flow_law(model, tokens, 1e-6 if family.startswith(("gemma", "olmo2")) else 1e-9)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_linear_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of later tokens bring nothing, hops go through, and a layer that does something else is refused."""
    model = tiny_model(family)
    places = {"prompt": (0, 8), "target": (8, 12), "thinking": (8, 10), "sink": (10, 12)}
    spans = {name: ((ic.Span(*place),),) for name, place in places.items()}
    tokens = ic.Tokens(IDS, torch.ones_like(IDS, dtype=torch.bool), spans=spans)
    hops = IFR()(model, tokens, n_hops=1).hops
    assert hops is not None and hops[0, 1].any()
    flow = Flow(model, model.input(IDS), tuple(range(12)))
    assert not flow.shares([4]).token[0, 5:].any() and flow.shares([4]).token[0, :5].any()
    with pytest.raises(ic.CapabilityError, match="knows no linear attention, which layer 0"):
        IFR()(model, IDS, profile="reference")
    with pytest.raises(ic.CapabilityError, match=r"layer 0 of .* mixes tokens by linear attention without v and z"):
        ic.method("ifr_routes")(model, IDS)
    module = model.module("linear_attn", 0)
    monkeypatch.setattr(
        module, "forward", partial(lambda call, *args, **kwargs: 2 * call(*args, **kwargs), module.forward)
    )
    with pytest.raises(
        ic.CapabilityError, match="layer 0 of .* does not add the values of its tokens, mixed by its rule"
    ):
        Flow(model, model.input(IDS), (11,))


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_gated_heads(family: str) -> None:
    model = ic.load(testing.tiny(family, dtype=torch.float64, **GATED))
    flow_law(model, model.input(IDS), 1e-9)


def test_other_engines_and_pieces_give_the_same() -> None:
    """Rows that are read again (bridge), kept on nnsight, and work in small pieces."""
    hf = testing.tiny("llama", dtype=torch.float64)
    flows = [
        Flow(ic.load(hf, engine=engine), ic.load(hf).input(IDS), tuple(range(12)), chunk=chunk, sink_chunk=chunk)
        for engine, chunk in (("torch", 128), ("torch", 3), ("nnsight", 128), ("transformer_lens", 5))
    ]
    weights = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    for flow, slack in zip(flows[1:], (1e-9, 1e-9, 1e-6), strict=True):  # the bridge has norms of its own
        torch.testing.assert_close(
            flow.span(range(6, 12), weights), flows[0].span(range(6, 12), weights), atol=slack, rtol=0
        )
        torch.testing.assert_close(flow.all_rows([3, 7])[0], flows[0].all_rows([3, 7])[0], atol=slack, rtol=0)


@pytest.mark.parametrize("layers", [{}, GATED], ids=["linear", "gated"])
def test_gates_are_seen_where_patterns_are_read_again(layers: dict[str, Any]) -> None:
    """The bridge keeps nothing to make patterns of; linear attention has none."""
    hf = testing.tiny("qwen3_next", **layers)
    flows = [
        Flow(ic.load(hf, engine=engine), ic.load(hf).input(IDS), tuple(range(12)))
        for engine in ("torch", "transformer_lens")
    ]
    spans, rows = (
        [ask(flow) for flow in flows] for ask in (lambda f: f.span([4, 7, 11]), lambda f: f.all_rows([3])[0])
    )
    torch.testing.assert_close(*spans, atol=1e-5, rtol=0)
    torch.testing.assert_close(*rows, atol=1e-5, rtol=0)


def test_one_pass_serves_all_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run again for spans, hops and rows, and what is kept grows with the text, not with its square."""
    model = tiny_model("llama")
    tokens = model.input(torch.randint(3, 90, (1, 96), generator=torch.Generator().manual_seed(0)))
    flow = Flow(model, tokens, tuple(range(80, 96)))
    monkeypatch.setattr(type(model.engine), "acquire", lambda engine: pytest.fail("another pass"))
    flow.span(range(80, 96))
    flow.all_rows([85, 95])
    kept = [layer.attention for layer in flow._layers]
    assert all(rows is not None and rows.query.shape[2] == 16 and rows.mask is None for rows in kept)


def test_rows_that_hops_ask_for_again_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers stay, memory at most doubles, and held layers make their rows once."""
    model, plain, made = tiny_model("llama"), attention_rows.softmax, list[int]()
    tokens = model.input(torch.randint(3, 90, (1, 32), generator=torch.Generator().manual_seed(0)))
    flow, again = (Flow(model, tokens, tuple(range(16, 32)), again=flag) for flag in (False, True))
    monkeypatch.setattr(
        attention_rows, "softmax", lambda scores, *rest: made.append(scores.shape[2]) or plain(scores, *rest)
    )

    def rows(ask: Flow, *at: int) -> int:
        made.clear()
        torch.testing.assert_close(ask.span(range(*at)), flow.span(range(*at)), atol=1e-6, rtol=0)
        return sum(made) - len(range(*at)) * len(flow.layers)

    assert rows(again, 28, 32) == 4 * model.n_layers  # few: not worth it
    rows(again, 16, 31)
    held = [layer for layer in again.layers if layer.attention and layer.attention.made]
    assert held and sum(part.nbytes for layer in held if layer.attention for _, part in layer.attention.made) <= sum(
        layer.nbytes for layer in again.layers
    )
    for at in ((16, 31), (17, 32), (20, 24)):
        assert rows(again, *at) == len(range(*at)) * (model.n_layers - len(held))
    assert not any(layer.attention and layer.attention.made for layer in flow.layers)


def test_hops_by_hand() -> None:
    """The recursion on a chain: the answer (5) flows from 4 and 0, the reasoning (3, 4) from 1, 2 and itself."""
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[5, 4], matrix[5, 0], matrix[4, 3], matrix[4, 1], matrix[3, 2] = 0.75, 0.25, 0.5, 0.5, 1.0

    def flow(tokens: Any, weights: Tensor | None) -> Tensor:
        own = torch.full((len(tokens),), 1 / len(tokens), dtype=torch.float64) if weights is None else weights
        return own @ matrix[list(tokens)]

    parts = Parts(range(5, 6), range(3, 5), 6)
    hops = multi_hop(flow, parts, 3)
    assert hops.vectors.tolist() == [[0.25, 0, 0, 0, 0.75, 0], [0, 0.5, 0, 0.5, 0, 0], [0, 0, 1, 0, 0, 0], [0] * 6]
    assert hops.mass.tolist() == [0.75, 0.375, 0, 0]
    assert hops.observed.tolist() == [0.25, 0.375, 0.375, 0, 0, 0]  # all of it has come to the prompt
    assert multi_hop(flow, parts, 3, combine="avg").observed.tolist() == [x / 4 for x in hops.observed.tolist()]
    keep = torch.tensor([True, False, True, True, True, True])
    assert multi_hop(flow, parts, 1, keep=keep).vectors[1].tolist() == [0, 0, 0, 0.5, 0, 0]
    split = split_hop(flow, parts, 2)
    assert split.observed.tolist() == [0.25, 0.375, 0.375, 0, 0, 0]
    assert [note["pending"] for note in split.notes["segments"]] == [0.75, 0.375]
    whole = multi_hop(flow, parts, 1, into_all=True)
    assert whole.vectors[0].tolist() == ((matrix[3] + matrix[4] + matrix[5]) / 3).tolist()
    assert not whole.observed[3:].any() and [list(s) for s in segments(range(3, 8), 2)] == [[3, 4, 5], [6, 7]]


def test_what_predicts_the_answer_is_explained() -> None:
    """Sound: the stream before the target's token; without a target, the last one; no thinking, no hops."""
    model = tiny_model("llama", torch.float64)
    bare = layout_of(model, model.input(IDS[:, :11]))
    spans = {"prompt": ((ic.Span(0, 11),),), "target": ((ic.Span(11, 12),),)}
    tokens = ic.Tokens(IDS, torch.ones_like(IDS, dtype=torch.bool), spans=spans)
    config = IFRConfig(variant="span")
    found = [IFR().attribute(model, layout, config).scores[:11] for layout in (bare, layout_of(model, tokens))]
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)
    rows = IFR().attribute(model, layout_of(model, tokens), IFRConfig(variant="all_positions")).rows
    assert rows is not None
    torch.testing.assert_close(rows[0, :11], found[0], atol=1e-12, rtol=0)
    hops = IFR().attribute(model, bare, IFRConfig(n_hops=2))
    assert hops.hops is not None and not hops.hops[1:].any() and not bool(hops.mass.any())  # type: ignore[union-attr]


def test_the_error_of_a_tolerance_is_certified() -> None:
    model = tiny_model("llama")
    layout = Layout(model.input(IDS), tuple(range(6)), range(6, 12), range(6, 12), range(6, 12), range(6, 12))
    exact, rough = (
        IFR().attribute(model, layout, IFRConfig(variant="all_positions", tolerance=tolerance))
        for tolerance in (None, 0.01)
    )
    off = float((exact.rows - rough.rows).abs().max())  # type: ignore[operator]
    assert 0 < off <= rough.notes["error"] + 1e-6 and exact.notes["error"] == 0
    with pytest.raises(ic.PlanError, match="leave tolerance= out"):
        IFR()(model, IDS, variant="all_positions", tolerance=0.01, threshold=0.1)


def test_the_reference_refuses_what_it_does_not_know() -> None:
    for family, what in (("gemma2", "norms behind attention"), ("gpt_neox", "parallel blocks")):
        with pytest.raises(ic.CapabilityError, match=f"knows no {what}"):
            IFR()(tiny_model(family), IDS, profile="reference")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_conformance(family: str) -> None:
    testing.check_method(IFR, tiny_model(family), settings={"n_hops": 1}).raise_if_failed()
