"""Proximities of a layer against the formula as it stands, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interp_plugins.attribution.flows.proximity import Proximities, proximities, proximities_to, proximity
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.bench.allocations import peak_bytes

Case = tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]


def formula(pattern: Tensor, values: Tensor, w_o: Tensor, mid: Tensor, scale: Tensor | None = None) -> Tensor:
    """prox(α f, x) of every head, row and key, with all of `[head row key d_model]` in memory."""
    brought = torch.einsum("khe,hed->hkd", values.repeat_interleave(len(w_o) // values.shape[1], 1), w_o)
    parts = pattern[..., None] * brought[:, None]
    return proximity(parts if scale is None else parts * scale[:, None], mid[:, None])


def case(seed: int, dtype: torch.dtype = torch.float64) -> Case:
    """A random layer: some causal, some with hard attention, ties, zeros, a scale per row."""
    torch.manual_seed(seed)
    heads, kv = ((1, 1), (2, 1), (4, 2), (6, 6), (8, 2))[seed % 5]
    rows, keys, d_head, d_model = torch.randint(1, 40, (4,)).tolist()
    d_model += 80 * (seed % 4 == 1)  # wider than the largest number of components that all pairs get
    tied = seed % 3 == 1

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64)
        return values.round() if tied else values

    pattern = (2 * torch.randn(heads, rows, keys, dtype=torch.float64)).softmax(-1)
    if seed % 4 == 2:
        pattern = (pattern == pattern.amax(-1, keepdim=True)).double()
    pattern *= torch.rand(rows, keys) < 0.7
    mid = random(rows, d_model) * (0.1, 1.0, 10.0)[seed % 3]
    mid[torch.rand(rows) < 0.1] = 0
    scale = random(rows, d_model) * (torch.rand(rows, d_model) < 0.8) if seed % 2 else None
    layer = (pattern, random(keys, kv, d_head), random(heads, d_head, d_model), mid)
    return tuple(x.to(dtype) for x in layer), None if scale is None else scale.to(dtype)  # type: ignore[return-value]


def compute(layer: Any, scale: Tensor | None, seed: int, **settings: Any) -> Proximities:
    """In chunks of random sizes."""
    sizes = torch.randint(1, 50, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    chunks = {"chunk_tokens": sizes[0], "sink_chunk_tokens": sizes[1]}
    return proximities(*layer, row_scale=scale, edges=True, **{**chunks, **settings})


@pytest.mark.parametrize("seed", range(40))
def test_exact_proximities_are_the_formula(seed: int) -> None:
    layer, scale = case(seed)
    exact = formula(*layer, scale)
    rounding = 1e-13 * (layer[3].abs().sum(-1).amax() + exact.amax() + 1)
    for attempt in range(2):
        result = compute(layer, scale, 2 * seed + attempt)
        assert result.edges is not None and (result.edges - exact).abs().amax() <= rounding
        assert (result.tokens - exact.sum(0)).abs().amax() <= 10 * rounding
        assert (result.heads - exact.sum(-1).mT).abs().amax() <= 40 * rounding
        assert not result.bound.any()
        assert not result.edges[layer[0] == 0].any()  # to the bit: what is not seen brings nothing


@pytest.mark.parametrize("seed", range(0, 40, 2))
@pytest.mark.parametrize("tolerance", [1e-3, 0.1])
def test_with_a_tolerance_scores_lie_above_the_exact_by_at_most_their_bound(seed: int, tolerance: float) -> None:
    for each in (seed, seed + 1):
        layer, scale = case(each)
        exact = formula(*layer, scale)
        size = layer[3].abs().sum(-1)
        rounding = 1e-12 * (size.amax() + exact.amax() + 1)
        result = compute(layer, scale, each, tolerance=tolerance)
        above = result.tokens - exact.sum(0)
        assert (above >= -rounding).all() and (above <= result.bound + rounding).all()
        assert (result.bound <= len(layer[0]) * tolerance * size[:, None] + rounding).all()


def test_few_pairs_get_every_component_and_the_bound_is_of_use() -> None:
    torch.manual_seed(0)
    layer = (torch.rand(4, 50, 60).softmax(-1), torch.randn(60, 2, 8), torch.randn(4, 8, 96), 3 * torch.randn(50, 96))
    layer[0][:, :, 7] = 0.6
    exact, near = proximities(*layer), proximities(*layer, tolerance=1e-3)
    assert 0 < exact.whole < layer[0].numel() / 50 and near.whole < layer[0].numel() / 50
    off = (near.tokens - exact.tokens).amax()
    assert 0 < off <= near.bound.amax() < exact.tokens.amax() / 2


@pytest.mark.parametrize("seed", range(12))
def test_float32_and_half_widths_are_computed_in_float32(seed: int) -> None:
    layer, scale = case(seed, torch.float32)
    wide: Any = [x.double() for x in layer]
    exact = formula(wide[0], wide[1], wide[2], wide[3], None if scale is None else scale.double())
    result = compute(layer, scale, seed)
    assert result.tokens.dtype == torch.float32
    room = 100 * torch.finfo(torch.float32).eps * (layer[3].abs().sum(-1).amax() + exact.amax() + 1)
    assert result.edges is not None and (result.edges - exact).abs().amax() <= room
    half = tuple(x.bfloat16() for x in layer)
    again = compute(half, scale, seed)
    assert torch.equal(again.tokens, compute(tuple(x.float() for x in half), scale, seed).tokens)


def test_no_more_memory_than_its_chunks() -> None:
    torch.manual_seed(0)
    heads, rows, keys, d_head, d_model = 4, 200, 200, 16, 128
    pattern = torch.randn(heads, rows, keys).tril().softmax(-1).tril()
    layer = (pattern, torch.randn(keys, 2, d_head), torch.randn(heads, d_head, d_model), torch.randn(rows, d_model))
    needed = peak_bytes(lambda: proximities(*layer, chunk_tokens=32, sink_chunk_tokens=16))
    assert needed < 6e6 < 4 * heads * rows * keys * d_model / 10


def test_a_threshold_counts_small_proximities_as_nothing() -> None:
    layer, scale = case(3)
    exact = formula(*layer, scale)
    cut = float(exact[exact > 0].median())
    result = compute(layer, scale, 0, threshold=cut)
    torch.testing.assert_close(result.tokens, torch.where(exact >= cut, exact, 0).sum(0))
    with pytest.raises(ic.PlanError, match="exact"):
        compute(layer, scale, 0, threshold=cut, tolerance=1e-3)


def test_parts_of_a_model_are_its_heads() -> None:
    model = ic.load(testing.tiny("llama"))
    run = model.run(torch.arange(5, 25)[None], read=[S.pattern[1], S.v[1], S.head_out[1], S.resid_mid[1]])
    pattern, values, mid = (run[site].plain[0] for site in (S.pattern[1], S.v[1], S.resid_mid[1]))
    w_o = model.weights(S.z[1])
    brought = torch.einsum("hij,jhe,hed->ihd", pattern, values.repeat_interleave(len(w_o) // values.shape[1], 1), w_o)
    torch.testing.assert_close(brought, run[S.head_out[1]].plain[0], atol=1e-5, rtol=1e-4)  # the parts are the model's
    exact = formula(pattern.double(), values.double(), w_o.double(), mid.double())
    result = proximities(pattern, values, w_o, mid)
    room = 10 * torch.finfo(torch.float32).eps * mid.abs().sum(-1, keepdim=True)  # what the formula rounds in float32
    assert ((result.tokens - exact.sum(0)).abs() <= room).all() and exact.sum(0).amax() > 1e3 * room.amax()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("loud", [0.01, 1.0, 30.0])
def test_one_row_is_the_formula(loud: float, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that overshoot nowhere, in some dimensions, in all, however little fits a temporary; a whole with a zero."""
    draw = torch.Generator().manual_seed(0)
    whole, values, w_o, mix = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((64,), (40, 2, 8), (64, 4, 8), (4, 40))
    )
    whole[5], mix = 0, mix.abs() ** 3 * loud
    mix = mix[..., None] * torch.rand(8, generator=draw, dtype=torch.float64) if gated else mix
    by_head = values.transpose(0, 1).repeat_interleave(2, 0) * (mix if gated else mix[..., None])
    wanted = proximity(torch.einsum("hkd,mhd->hkm", by_head, w_o), whole)
    longest = w_o.norm(dim=-1).amax(0)
    for room in (1 << 17, 64):
        monkeypatch.setattr("interp_plugins.attribution.flows.proximity._room", lambda _, room=room: room)
        near = proximities_to(whole, mix, values, w_o, longest, chunk_tokens=7)
        torch.testing.assert_close(near, wanted, atol=1e-11, rtol=0)
    assert wanted.any() and not wanted.all()
