"""Reading a stream out by tiles of the vocabulary: what is wanted of its logits, without logits as wide as it.

    z_t    = unembed(norm(h))[tile t]                            one product for the rows of all layers and texts
    lse    = ln Σ_t e^lse_t,   lse_t = z - log_softmax(z) of any token of the tile     (one fused pass)
    log p(y) = z_y - lse        rank(y) = Σ_t #{v ≠ y : z_v > z_y}          (0 is best)
    H      = Σ_t w_t (H_t - ln w_t),   w_t = e^(lse_t - lse)     the chain rule of entropy
    KL(final ‖ l) = Σ_t w_t (E_t[ln p_final|t - ln p_l|t] + ln w_t - ln w_lt),   w and E_t of the final row
    JS(a, b) = ½ Σ p_a (ln 2 - softplus(b - a)) + ½ Σ p_b (ln 2 - softplus(a - b)),   a = ln p_a, b = ln p_b

All in nats, in log space, without any epsilon; what can only be negative by rounding is 0. JS needs both lse first: a
second pass over the tiles. With `m` likeliest tokens of either side and all others as one (`topk_rest`) it is at most
the exact one, which is at most ½ (r_a + r_b) H₂(r_a / (r_a + r_b)) larger (r: the mass of the others).

Source: nostalgebraist (2020), "interpreting GPT: the logit lens"; Lin (1991), "Divergence measures based on the Shannon
entropy", of which the grouping law gives the bound.
Cost: 2 · rows · d_model · d_vocab multiply-adds, the same once more for JS; memory of one tile, whatever d_vocab is.
Must equal: `log_softmax` of `model.readout` and what is worked out of it, to rounding. In half precision logits are
rounded as the model rounds them; the target's own is worked out in float32, which halves the error of its NLL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic

JsMode = Literal["exact", "topk_rest", "topk_renorm"]
ROWS = 1024
"""Rows of the stream that go through the unembedding together."""
TILE_BYTES = 1 << 25
"""Of the logits of one tile, in float32."""
NARROWEST, WIDEST = 1024, 8192
"""Tokens of a tile; threads that share one take as many each."""


@dataclass(frozen=True, eq=False)
class Readout:
    """What layers say about a target, per layer and target.

    Attributes:
        logprob: of the target, in nats.
        rank: how many tokens have a larger logit; 0 is best.
        lse: log of the sum of exponentials of its logits.
        entropy: of the layer's distribution, in nats, if it was asked for.
        kl: from the last layer's distribution to it, KL(last ‖ layer), in nats, if it was asked for.
        top, top_logprob: the likeliest tokens and their log-probabilities, if they were asked for.
    """

    logprob: Float[Tensor, "layer target"]
    rank: Int[Tensor, "layer target"]
    lse: Float[Tensor, "layer target"]
    entropy: Float[Tensor, "layer target"] | None = None
    kl: Float[Tensor, "layer target"] | None = None
    top: Int[Tensor, "layer target k"] | None = None
    top_logprob: Float[Tensor, "layer target k"] | None = None


@dataclass(frozen=True, eq=False)
class Divergence:
    """How far two readouts of the same targets are apart, per layer and target, in nats.

    Attributes:
        js: Jensen-Shannon, by the mode asked for.
        js_upper: what the exact one is at most (`topk_rest`; else None).
        kl: KL(a ‖ b) (`exact`; else None).
    """

    js: Float[Tensor, "layer target"]
    js_upper: Float[Tensor, "layer target"] | None = None
    kl: Float[Tensor, "layer target"] | None = None


def tile_width(rows: int, device: torch.device) -> int:
    """How many tokens a tile has: as many as fit, up to what makes a thread's work long enough to be worth starting."""
    # a product's columns are shared out among threads; a device takes several such widths at a time
    share = torch.get_num_threads() if device.type == "cpu" else 8
    return min(max(TILE_BYTES // (4 * max(rows, 1)), NARROWEST), WIDEST * share)


@torch.no_grad()
def read_out(
    model: ic.Model,
    normed: Float[Tensor, "layer target d_model"],
    targets: Int[Tensor, " target"],
    *,
    spread: bool = True,
    top: int = 0,
    rows: int = ROWS,
) -> Readout:
    """What each layer says about each target.

    Args:
        normed: streams that have been through the final norm, the last layer last.
        targets: token ids.
        spread: entropy and KL too, which go over each tile three times more.
        top: how many of the likeliest tokens to keep.
        rows: that go through the unembedding together.

    Raises:
        PlanError: a layer's logits are not finite.
        CapabilityError: the model cannot be read out.
    """
    n_layers, n = normed.shape[:2]
    parts = [
        _read_out(model, normed[:, i:j].flatten(0, 1), targets[i:j], n_layers, spread, top)
        for i, j in _spans(n, max(1, rows // n_layers))
    ]
    joined = {name: torch.cat([part[name].unflatten(0, (n_layers, -1)) for part in parts], 1) for name in parts[0]}
    if not bool(joined["lse"].isfinite().all()):
        layer, target = (~joined["lse"].isfinite()).nonzero()[0].tolist()
        raise ic.PlanError(
            f"row {layer} of the lens gives logits that are not finite at target {target}; the stream or its norm "
            f"overflows {str(model.dtype).removeprefix('torch.')}: load the model with dtype='bfloat16' or 'float32'"
        )
    return Readout(**joined)


def _read_out(
    model: ic.Model, rows: Tensor, targets: Tensor, n_layers: int, spread: bool, top: int
) -> dict[str, Tensor]:
    """Values `[(layer target) …]` of a few targets in all layers."""
    ids = targets.to(rows.device).repeat(n_layers)
    target = _target_logits(model, rows, ids)
    tiles, best = _Tiles(n_layers, ids, target.to(rows.dtype).to(target.dtype), spread), None
    for start, z in _tiles(model, rows):
        tiles.add(z, start)
        best = _best(best, z, start, top) if top else None
    readout = tiles.joined()
    readout["logprob"] = (target - readout["lse"]).clamp(max=0)
    if best is not None:
        readout |= {"top": best[1], "top_logprob": (best[0] - readout["lse"][:, None]).clamp(max=0)}
    return {name: value.cpu() for name, value in readout.items()}


def _target_logits(model: ic.Model, rows: Tensor, ids: Tensor) -> Tensor:
    """The logit of each row's own token."""
    unique, place = ids.unique(return_inverse=True)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return model.unembed(rows.to(wide), unique).to(wide).gather(1, place[:, None])[:, 0]


def _tiles(model: ic.Model, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First token and logits of each tile, in float32 at least; the next one may be written where it is."""
    start, wide = 0, torch.empty(0)
    for z in model.unembed_tiles(rows, tile_width(len(rows), rows.device)):
        if z.dtype.itemsize < 4:
            wide = wide if wide.shape == z.shape else torch.empty_like(z, dtype=torch.float32)
            z = wide.copy_(z)
        yield start, z
        start += z.shape[-1]


class _Tiles:
    """What is kept of every tile, and joined in float64.

    Logits are gone over twice, or five times, into the same scratch, so that a tile costs little beside its product.
    """

    def __init__(self, n_layers: int, ids: Tensor, bar: Tensor, spread: bool) -> None:
        self.spread = spread
        self.n_layers, self.ids, self.bar = n_layers, ids, bar[:, None]  # as the model rounds it, so that ties are ties
        self.rank = torch.zeros_like(ids)
        self.lse: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self.cross: list[Tensor] = []
        self.scratch = self.logp = bar.new_empty(0)

    def add(self, z: Tensor, start: int) -> None:
        """Logits `[(layer target) tile]`."""
        if self.scratch.shape != z.shape:
            self.scratch, self.logp = torch.empty_like(z), torch.empty_like(z)
        self._count(z, start)
        logp = torch.log_softmax(z, -1, out=self.logp)
        # the fused softmax has the tile's lse in every entry: one subtraction instead of another pass
        self.lse.append((z[:, 0] - logp[:, 0]).double())
        if not self.spread:
            return
        p = torch.exp(logp, out=self.scratch)
        final, layers = p.unflatten(0, (self.n_layers, -1))[-1], logp.unflatten(0, (self.n_layers, -1))
        self.cross.append(-torch.bmm(layers.transpose(0, 1), final[:, :, None])[..., 0].T.double())
        self.entropy.append(-torch.mul(p, logp, out=self.scratch).sum(-1).double())

    def _count(self, z: Tensor, start: int) -> None:
        """Add how many logits are above the target's own, which is another product and may differ in its last digit."""
        above = torch.gt(z, self.bar, out=self.scratch)
        own = ((self.ids >= start) & (self.ids < start + z.shape[-1])).nonzero()[:, 0]
        above[own, self.ids[own] - start] = 0
        self.rank += above.sum(-1).to(self.rank.dtype)

    def joined(self) -> dict[str, Tensor]:
        """Values `[(layer target)]` of the whole vocabulary."""
        each = torch.stack(self.lse).unflatten(1, (self.n_layers, -1))  # [tile layer target]
        lse = each.logsumexp(0)
        if not self.spread:
            return {"lse": lse.flatten(), "rank": self.rank}
        logw = each - lse
        weights, last = logw.exp(), logw[:, -1:]
        cross = torch.stack(self.cross)
        # the tile's own cross-entropy less its entropy, in the last row's weights; and how the tiles' weights differ
        kl = (last.exp() * (cross - cross[:, -1:] + last - logw)).sum(0)
        entropy = (weights * (torch.stack(self.entropy).view_as(logw) - logw)).sum(0)
        readout = {"lse": lse, "entropy": entropy.clamp(min=0), "kl": kl.clamp(min=0)}
        return {name: value.flatten() for name, value in readout.items()} | {"rank": self.rank}


def _best(best: tuple[Tensor, Tensor] | None, z: Tensor, start: int, top: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens so far: logits and ids."""
    values, ids = z.topk(min(top, z.shape[-1]), -1)
    ids = ids + start
    if best is not None:
        values, ids = torch.cat([best[0], values], 1), torch.cat([best[1], ids], 1)
        values, order = values.topk(min(top, values.shape[-1]), -1)
        ids = ids.gather(1, order)
    return values, ids


# Two contexts


@torch.no_grad()
def divergence(
    model: ic.Model,
    normed: tuple[Float[Tensor, "layer target d_model"], Float[Tensor, "layer target d_model"]],
    readouts: tuple[Readout, Readout],
    mode: JsMode = "exact",
    *,
    rows: int = ROWS,
) -> Divergence:
    """How far the layers' distributions in two contexts are apart.

    Args:
        normed: streams of both, as for `read_out`.
        readouts: of both; with `top` for the modes that look at likeliest tokens.
        mode: "exact"; "topk_rest", a lower bound from the likeliest tokens of either and one bucket for all others; or
            "topk_renorm", these tokens alone with probabilities that sum to one, which is no bound of anything.
        rows: as of `read_out`.
    """
    n_layers, n = normed[0].shape[:2]
    parts = []
    for i, j in _spans(n, max(1, rows // (2 * n_layers))):
        both = torch.cat([side[:, i:j].flatten(0, 1) for side in normed])
        lse = torch.cat([side.lse[:, i:j].flatten() for side in readouts]).to(both.device)
        if mode == "exact":
            parts.append(_exact(model, both, lse))
            continue
        tops = [side.top[:, i:j].flatten(0, 1) for side in readouts if side.top is not None]
        parts.append(_of_likeliest(model, both, lse, torch.cat(tops, 1).to(both.device), mode))
    joined = {name: torch.cat([part[name].unflatten(0, (n_layers, -1)) for part in parts], 1) for name in parts[0]}
    return Divergence(**joined)


def _exact(model: ic.Model, both: Tensor, lse: Tensor) -> dict[str, Tensor]:
    js, kl = (torch.zeros(len(both) // 2, dtype=torch.float64, device=both.device) for _ in range(2))
    for _, z in _tiles(model, both):
        a, b = (z - lse[:, None].to(z.dtype)).chunk(2)
        js += _js_terms(a, b).sum(-1).double()
        kl += torch.linalg.vecdot(a.exp(), a - b).double()
    return {"js": js.clamp(min=0).cpu(), "kl": kl.clamp(min=0).cpu()}


def _js_terms(a: Tensor, b: Tensor) -> Tensor:
    """What each token adds to the divergence of two distributions, by its log-probabilities."""
    apart = b - a
    towards = math.log(2) - torch.nn.functional.softplus(apart)  # ln p_a - ln m
    return 0.5 * (a.exp() * towards + b.exp() * (towards + apart))


def _of_likeliest(model: ic.Model, both: Tensor, lse: Tensor, top: Tensor, mode: str) -> dict[str, Tensor]:
    """Divergence of the likeliest tokens of either side."""
    union = top.sort(-1).values
    # a token that is among the likeliest of both sides counts once
    again = torch.zeros_like(union, dtype=torch.bool)
    again[:, 1:] = union[:, 1:] == union[:, :-1]
    twice = union.repeat(2, 1)
    logp = torch.zeros(twice.shape, dtype=torch.float64, device=both.device)
    for start, z in _tiles(model, both):
        here = (twice >= start) & (twice < start + z.shape[-1])
        in_tile = z.gather(1, (twice - start).clamp(0, z.shape[-1] - 1))
        logp = torch.where(here, in_tile.double(), logp)
    logp = (logp - lse[:, None]).masked_fill(again.repeat(2, 1), -math.inf)
    if mode == "topk_renorm":
        logp = logp - logp.logsumexp(-1, keepdim=True)
    a, b = logp.chunk(2)
    js = _js_terms(a, b).masked_fill(again, 0).sum(-1)
    if mode == "topk_renorm":
        return {"js": js.clamp(min=0).cpu()}
    # 1 - Σ p without losing the digits where little is left
    rest_a, rest_b = (-torch.expm1(side.logsumexp(-1).clamp(max=0)) for side in (a, b))
    mean = (rest_a + rest_b) / 2
    others = torch.special.entr(mean) - (torch.special.entr(rest_a) + torch.special.entr(rest_b)) / 2
    js = js + others
    # the rest as one bucket hides at most the divergence of two distributions that share nothing within it
    share = torch.where(mean > 0, rest_a / (2 * mean).clamp_min(torch.finfo(mean.dtype).tiny), 0.5)
    spread = mean * (torch.special.entr(share) + torch.special.entr(1 - share))
    return {"js": js.clamp(min=0).cpu(), "js_upper": (js + spread).clamp(0, math.log(2)).cpu()}


def _spans(n: int, size: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + size, n)) for i in range(0, n, size))
