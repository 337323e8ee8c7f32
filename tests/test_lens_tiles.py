"""Reading out by tiles of the vocabulary: the same numbers as whole logits, in every family, in the memory of a tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from interp_plugins.logit_lens import tiles
from torch.utils._python_dispatch import TorchDispatchMode

import interp_core as ic

HEADS = ["llama", "gemma2", "granitemoe", "gptj", "gpt2"]
"""Plain, capped, scaled, with a bias, tied."""


def stream(model: ic.Model, layers: int = 3, n: int = 5, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(layers, n, model.d_model, generator=torch.Generator().manual_seed(seed))
    return model.module("ln_final")(rows.to(model.dtype)).detach()


def narrow(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(tiles, "NARROWEST", 1)
    monkeypatch.setattr(tiles, "WIDEST", width)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("width", [7, 1000])
def test_the_same_as_whole_logits(family: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, so that a wrong formula is no rounding."""
    narrow(monkeypatch, width)
    model = tiny_model(family, torch.float64)
    normed, targets = stream(model), torch.tensor([3, 0, 95, 41, 3])
    found = tiles.read_out(model, normed, targets, top=6, rows=6)
    logits = model.unembed(normed)
    logp = logits.log_softmax(-1)
    mine = logp.gather(-1, targets.expand(3, 5)[..., None])
    close = {"atol": 1e-11, "rtol": 1e-10}
    torch.testing.assert_close(found.logprob, mine[..., 0], **close)
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1), **close)
    torch.testing.assert_close(found.kl, (logp[-1].exp() * (logp[-1] - logp)).sum(-1), **close)
    assert torch.equal(found.rank, (logp > mine).sum(-1))
    assert torch.equal(found.top, logits.topk(6, -1).indices)
    assert not found.kl[-1].any() and (found.kl[:-1] > 0).all()
    plain = tiles.read_out(model, normed, targets, spread=False)
    assert plain.entropy is None and torch.equal(plain.rank, found.rank)


@pytest.mark.parametrize("mode", ["exact", "topk_rest", "topk_renorm"])
def test_divergences(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 10)
    model = tiny_model("gemma2", torch.float64)
    both = stream(model), stream(model, seed=1)
    targets = torch.arange(5)
    readouts = tuple(tiles.read_out(model, x, targets, top=8, rows=7) for x in both)
    found = tiles.divergence(model, both, readouts, mode, rows=12)
    logp = [model.unembed(x).log_softmax(-1) for x in both]
    exact = js(*logp)
    if mode == "exact":
        torch.testing.assert_close(found.js, exact, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(found.kl, (logp[0].exp() * (logp[0] - logp[1])).sum(-1), atol=1e-12, rtol=1e-9)
        same = tiles.divergence(model, (both[0], both[0]), (readouts[0], readouts[0]))
        assert not same.js.any() and not same.kl.any()
        return
    union = torch.zeros_like(logp[0], dtype=torch.bool)
    for one in logp:
        union.scatter_(-1, one.topk(8, -1).indices, True)
    parts = [torch.where(union, one, -torch.inf) for one in logp]
    if mode == "topk_renorm":
        torch.testing.assert_close(found.js, js(*(p.log_softmax(-1) for p in parts)), atol=1e-12, rtol=1e-9)
        return
    whole = [torch.cat([p, (1 - p.exp().sum(-1, keepdim=True)).log()], -1) for p in parts]
    torch.testing.assert_close(found.js, js(*whole), atol=1e-12, rtol=1e-9)
    assert found.js_upper is not None
    assert (
        (found.js < exact).all()
        and (exact < found.js_upper).all()
        and (found.js_upper <= torch.log(torch.tensor(2.0))).all()
    )


def js(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    middle = ((a.exp() + b.exp()) / 2).clamp_min(1e-300).log()
    return sum(torch.where(x == -torch.inf, 0, x.exp() * (x - middle)).sum(-1) for x in (a, b)) / 2


def test_the_bound_is_tight_where_all_tokens_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float64)
    both = stream(model), stream(model, seed=1)
    readouts = tuple(tiles.read_out(model, x, torch.arange(5), top=model.d_vocab) for x in both)
    exact, rest = (tiles.divergence(model, both, readouts, mode) for mode in ("exact", "topk_rest"))
    torch.testing.assert_close(rest.js, exact.js, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(rest.js_upper, exact.js, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_as_the_model_rounds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 96)  # one tile, as the model has it
    model = tiny_model("llama", dtype)
    normed, targets = stream(model), torch.tensor([3, 0, 95, 41, 3])
    found = tiles.read_out(model, normed, targets)
    logits = model.unembed(normed).float()
    mine = logits.gather(-1, targets.expand(3, 5)[..., None])
    step = torch.finfo(dtype).eps * logits.abs().max()
    low, high = ((logits > mine + side * step).sum(-1) for side in (1, -1))
    assert ((low <= found.rank) & (found.rank <= high)).all()
    exact = (normed.float() @ model.module("unembed").weight.float().T).log_softmax(-1)
    wanted = exact.gather(-1, targets.expand(3, 5)[..., None])[..., 0].double()
    assert (found.logprob - wanted).abs().max() < step


def test_memory_is_that_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that is made is wider than a tile, whatever the vocabulary; the largest ones are counted."""
    monkeypatch.setattr(tiles, "NARROWEST", 1)
    monkeypatch.setattr(tiles, "WIDEST", 64)
    largest = {}
    for d_vocab in (500, 3000):
        model = ic.load(ic.testing.tiny("llama", vocab_size=d_vocab), check=False)
        both = stream(model), stream(model, seed=1)
        with Largest() as seen:
            readouts = tuple(tiles.read_out(model, x, torch.arange(5)) for x in both)
            tiles.divergence(model, both, readouts)
        largest[d_vocab] = seen.numel
    assert largest[500] == largest[3000] == 2 * 15 * 64


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that is made; views of weights are none."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = func.is_view or "detach" in str(func)
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor) and not views:
                self.numel = max(self.numel, value.numel())
        return out


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    normed = stream(model)
    normed[1, 2] = torch.inf
    with pytest.raises(ic.PlanError, match="row 1 of the lens gives logits that are not finite at target 2"):
        tiles.read_out(model, normed, torch.arange(5))


# The core's part


@pytest.mark.parametrize("family", HEADS)
def test_parts_of_the_unembedding(family: str) -> None:
    model = tiny_model(family)
    resid = torch.randn(2, 3, model.d_model, generator=torch.Generator().manual_seed(0))
    normed, ids = model.module("ln_final")(resid), torch.tensor([95, 3, 3, 0])
    whole = model.readout(resid)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(model.unembed(normed), whole, **close)
    torch.testing.assert_close(model.unembed(normed, ids), whole[..., ids], **close)
    torch.testing.assert_close(model.unembed(normed, slice(10, 20)), whole[..., 10:20], **close)
    parts = list(model.unembed_tiles(normed, 40))
    assert [part.shape[-1] for part in parts] == [40, 40, model.d_vocab - 80]
    torch.testing.assert_close(torch.cat(parts, -1), whole, **close)


def test_a_hooked_head_is_asked_whole() -> None:
    """A hook on the head changes what the model says, so it changes parts of it too."""
    model = tiny_model("llama")
    normed = stream(model)[0]
    seen = []
    handle = model.hf.lm_head.register_forward_hook(lambda _m, _a, out: (seen.append(len(out)), out + 1)[1])
    try:
        parts = [
            torch.cat(list(model.unembed_tiles(normed, 40)), -1),
            model.unembed(normed, torch.arange(model.d_vocab)),
        ]
    finally:
        handle.remove()
    for part in parts:
        torch.testing.assert_close(part, model.unembed(normed) + 1)
    assert seen == [5, 5]


def test_what_is_no_token_or_width_is_refused() -> None:
    model = tiny_model("llama")
    normed = stream(model)[0]
    with pytest.raises(ic.PlanError, match=f"no token id {model.d_vocab}, there are {model.d_vocab}"):
        model.unembed(normed, torch.tensor([3, model.d_vocab]))
    with pytest.raises(ic.PlanError, match="takes a slice or a tensor of ids"):
        model.unembed(normed, [3])
    with pytest.raises(ic.PlanError, match="takes a number of tokens, 1 or more, not int 0"):
        model.unembed_tiles(normed, 0)
    with pytest.raises(ic.PlanError, match="unembed takes a tensor of numbers"):
        model.unembed(normed[:, :3])
