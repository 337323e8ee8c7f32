"""Proximities of one layer: how much of a stream is made of what each head brings from each token.

    prox(y, x) = max(|x|_1 - |x - y|_1, 0)                                     of a part y in a whole x
    tokens_ij = Σ_h prox(α_hij f_jh, x_i)        f_jh = v_jh W_O[h], α the pattern, x the stream after attention

Source: information-flow routes, Ferrando and Voita (2024), arXiv:2403.00824; of every position at once in FlashTrace
(2026), arXiv:2602.01914.

How: where y does not overshoot x, a component adds sign(x_k) y_k, which is linear in y. So, with K_i a few components
of a row, those that are smallest against what parts usually have there,

    prox(α f, x) = max(α ⟨O_h^T (sign(x) outside K), v⟩ + Σ_K |x_k| - |α f_k - x_k|, 0)

where nothing is overshot outside K. Its first term is, for all pairs, one matrix product shaped like attention. Nothing
is overshot where t = α max_k |f_k| / c_k stays below all |x_k| / c_k outside K (c_k: the usual size of f_k); the few
pairs beyond that get every component. So scores are exact to rounding. With a `tolerance` a pair may overshoot a little
outside K: by at most 2 Σ c_k max(t - |x_k| / c_k, 0), which is convex in t, so that a chord bounds it and every score
has a bound.

One row alone, a span's, is `proximities_to`: its values are many against one x, so that K is chosen once for all.

Cost: two matrix products of row · key · head · d_head, and |K| · row · key · head element by element (the formula as it
stands: d_model · row · key · head). Temporaries: head · d_model · `chunk_tokens` numbers, and a few MB.
Must equal: the formula, whatever the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic

_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Sizes of K: each chunk of rows takes the cheapest."""
_WHOLE = 4.0
"""What a component of a gathered pair costs, against one that is done for all pairs."""
_SAMPLE = 128
"""Keys by which the cost of a size is estimated."""


class Proximities(NamedTuple):
    """What a layer's heads bring to some rows, in the units of the stream's L1 norm.

    Attributes:
        tokens: sum over heads.
        heads: sum over keys.
        edges: of each head and key, where they were asked for.
        bound: by how much `tokens` may be above the exact value, never below it; zeros where they are exact.
        whole: how many pairs of row, key and head got every component.
    """

    tokens: Float[Tensor, "row key"]
    heads: Float[Tensor, "row head"]
    edges: Float[Tensor, "head row key"] | None
    bound: Float[Tensor, "row key"]
    whole: int


def proximity(part: Float[Tensor, "*axes d_model"], whole: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes"]:
    """prox(part, whole) in units of the L1 norm: 0 for what is not in it, |whole|_1 for all of it."""
    return (whole.abs().sum(-1) - (whole - part).abs().sum(-1)).clamp_min(0)


@torch.no_grad()
def proximities(
    pattern: Float[Tensor, "head row key"],
    values: Float[Tensor, "key kv_head d_head"],
    w_o: Float[Tensor, "head d_head d_model"],
    mid: Float[Tensor, "row d_model"],
    *,
    row_scale: Float[Tensor, "row d_model"] | None = None,
    tolerance: float | None = None,
    threshold: float = 0.0,
    edges: bool = False,
    chunk_tokens: int = 128,
    sink_chunk_tokens: int = 32,
) -> Proximities:
    """Proximity of every head and key to every row, in float32 or wider: see the module.

    Args:
        pattern: attention of the rows; keys that they do not see are 0.
        values: of all keys, one per KV head.
        w_o: output projection, `model.weights(S.z[layer])`.
        mid: the stream after attention at the rows.
        row_scale: what a row's parts are multiplied by, component by component (a norm after attention).
        tolerance: how far above the exact value a head's proximity may be, as a fraction of |mid|_1 (None: exact).
        threshold: a head's proximity below this counts as 0, in units of the L1 norm.
        edges: keep those of every head.
        chunk_tokens, sink_chunk_tokens: keys and rows at a time: time and memory, not results.
    """
    if tolerance and threshold:
        raise ic.PlanError(
            f"proximities: a threshold ({threshold}) needs exact proximities; leave out tolerance={tolerance}"
        )
    dtype = torch.promote_types(mid.dtype, torch.float32)
    layer = _Layer.of(values.to(dtype), w_o.to(dtype), mid.to(dtype), row_scale)
    peak = layer.peaks(chunk_tokens)
    chunks = layer.plan(pattern, peak, tolerance or 0.0, sink_chunk_tokens)
    sums = _Sums(layer.mid, pattern.shape, tolerance or 0.0, threshold, edges)
    for first in range(0, pattern.shape[-1], chunk_tokens):
        span = slice(first, min(first + chunk_tokens, pattern.shape[-1]))
        near = [chunk for chunk in chunks if chunk.first < span.stop and chunk.end > span.start]
        if near:
            brought = layer.brought(span)
            for chunk in near:
                alpha = pattern[:, chunk.rows, span].to(dtype)
                sums.add(_Block(layer, chunk, span, alpha, peak[:, span], brought))
    return Proximities(sums.tokens, sums.heads, sums.edges, sums.bound, sums.whole)


@torch.no_grad()
def proximities_to(
    whole: Float[Tensor, " d_model"],
    mix: Tensor,
    values: Float[Tensor, "key kv_head d_head"],
    w_o: Float[Tensor, "d_model head d_head"],
    longest: Float[Tensor, " head"],
    *,
    chunk_tokens: int = 128,
) -> Float[Tensor, "head key"]:
    """prox(mix * values @ W_O, whole), exact, mostly without making `values @ W_O`:

        u = sign(x) * y      prox(y, x) = max(sum of u - 2 * sum of max(u - |x|, 0), 0)

    The first sum is a product with `W_O @ sign(x)`. Where it is not positive, nothing is left. The second runs over
    those dimensions only in which |x| is less than u can be, `|mix * value| * |W_O's column|` at most: the smallest of
    |x|, few for most tokens.

    Args:
        mix: what each value is multiplied by `[head key]`, or each number of it `[head key d_head]`.
        longest: each head's longest column of W_O.
        chunk_tokens: tokens that are worked on at a time, at least.
    """
    if mix.ndim == 3:
        # one number per dimension goes into the values themselves, and leaves a mix of ones
        values, mix = (mix * per_head(values, len(mix))).transpose(0, 1), mix.new_ones(mix.shape[:2])
    size, order = whole.abs().sort()
    sign = torch.where(whole < 0, -1.0, 1.0).to(whole)
    by_head, grouped = values.transpose(0, 1), mix.unflatten(0, (values.shape[1], -1))
    total = (sign @ w_o.flatten(1)).view(*grouped.shape[:2], -1)
    linear = (torch.matmul(total, by_head.mT) * grouped).flatten(0, 1)
    reach = by_head.norm(dim=-1)[:, None] * grouped.abs() * longest.view(*grouped.shape[:2], 1)
    # prox is at most its linear part, so that these pairs have none, however far they reach
    reach = reach.flatten(0, 1).masked_fill_(linear <= 0, 0)
    width, more = _split(reach, size)
    near, few = linear.clone(), order[:width]
    signed = (w_o[few] * sign[few, None, None]).unflatten(1, grouped.shape[:2]).permute(1, 3, 2, 0).flatten(2)
    # the temporary is head · token · width numbers: as many tokens as keep it in the caches
    step = max(chunk_tokens, 2 * _room(mix) // (len(mix) * max(width, 1)))
    for start in range(0, mix.shape[1] if width else 0, step):
        part = slice(start, start + step)
        over = torch.matmul(by_head[:, part], signed).unflatten(-1, (-1, width))
        over = over.mul_(grouped[..., part].transpose(1, 2)[..., None]).sub_(size[:width]).clamp_min_(0).sum(-1)
        near[:, part] -= 2 * over.transpose(1, 2).flatten(0, 1)
    if more:
        pairs = torch.nonzero(reach > size[width])
        for head, key in (some.unbind(1) for some in pairs.split(max(1, 8 * _room(mix) // len(size)))):
            parts = values[key, head // grouped.shape[1]] * mix[head, key, None]
            near[head, key] = linear[head, key] - 2 * _beyond(parts, head, whole, sign, w_o)
    return near.clamp_min_(0)


def _beyond(
    parts: Float[Tensor, "pair d_head"], head: Int[Tensor, " pair"], whole: Tensor, sign: Tensor, w_o: Tensor
) -> Float[Tensor, " pair"]:
    """By how much parts go beyond the whole, over all dimensions; they come head by head."""
    left, start = parts.new_empty(len(parts), len(whole)), 0
    for index, count in enumerate(torch.bincount(head, minlength=w_o.shape[1]).tolist()):
        if count:
            span = slice(start, start + count)
            torch.addmm(whole, parts[span], w_o[:, index].mT, alpha=-1, out=left[span])
            start += count
    return -left.mul_(sign).clamp_max_(0).sum(-1)


def _split(reach: Float[Tensor, "head key"], size: Float[Tensor, " d_model"]) -> tuple[int, bool]:
    """How many dimensions, smallest first, are done for all tokens and heads, so that it costs least to do all of them
    for those that reach further; and whether there are such."""
    d = len(size)
    widths = [0, *(d >> shift for shift in (7, 6, 5, 4, 3, 2) if d >> shift)]
    more = [*(reach.flatten() > size[widths, None]).sum(-1).tolist(), 0]
    widths.append(d)
    best = min(range(len(widths)), key=lambda i: widths[i] * reach.numel() + 2 * d * more[i])
    return widths[best], more[best] > 0


def per_head(values: Float[Tensor, "key kv_head d_head"], heads: int) -> Float[Tensor, "head key d_head"]:
    """Values of each head's group."""
    return values.transpose(0, 1).repeat_interleave(heads // values.shape[1], 0)


class _Sums:
    """What blocks add up to."""

    def __init__(self, like: Tensor, shape: Sequence[int], tolerance: float, threshold: float, edges: bool) -> None:
        heads, rows, keys = shape
        self.tokens, self.heads = like.new_zeros(rows, keys), like.new_zeros(rows, heads)
        self.bound = like.new_zeros(rows, keys)
        self.edges = like.new_zeros(heads, rows, keys) if edges else None
        self.tolerance, self.threshold, self.whole = tolerance, threshold, 0

    def add(self, block: _Block) -> None:
        rows, span, near = block.chunk.rows, block.span, block.proximities()
        self.whole += block.whole
        if self.tolerance:
            self.bound[rows, span] = block.bound(near)
        if self.threshold:
            near.masked_fill_(near < self.threshold, 0)
        self.tokens[rows, span] = near.sum(0)
        self.heads[rows] += near.sum(-1).mT
        if self.edges is not None:
            self.edges[:, rows, span] = near


@dataclass(frozen=True)
class _Rows:
    """A chunk of rows, and which components K of them are done one by one.

    Attributes:
        first, end: the keys that they see.
        query: O_h^T (sign(x) outside K), the linear part.
        chosen: the components K. small: x there. scale: what parts are multiplied by there.
        free: t up to which nothing is overshot outside K. limit: up to which no more than `allowed` is.
    """

    rows: slice
    first: int
    end: int
    query: Float[Tensor, "head row d_head"]
    chosen: Int[Tensor, "row chosen"]
    small: Float[Tensor, "row chosen"]
    scale: Float[Tensor, "row chosen"] | None
    free: Float[Tensor, "row 1"]
    limit: Float[Tensor, "row 1"]
    allowed: Float[Tensor, "row 1"]


@dataclass(frozen=True)
class _Layer:
    """What all chunks share. `usual` is the root mean square of what heads bring, by component."""

    values: Float[Tensor, "kv_head key d_head"]
    w_o: Float[Tensor, "head d_head d_model"]
    mid: Float[Tensor, "row d_model"]
    scale: Float[Tensor, "row d_model"] | None
    usual: Float[Tensor, " d_model"]

    @classmethod
    def of(cls, values: Tensor, w_o: Tensor, mid: Tensor, scale: Tensor | None) -> _Layer:
        values = values.transpose(0, 1).contiguous()
        # c_k² is the mean over heads and keys of f_k²: the diagonal of W_Oᵀ (Vᵀ V / n) W_O, without any f
        squares = values.mT @ values / values.shape[1]
        squares = squares.repeat_interleave(len(w_o) // len(values), 0)
        usual = ((squares @ w_o) * w_o).sum(1).mean(0).clamp_min(0).sqrt()
        return cls(values, w_o, mid, None if scale is None else scale.to(mid), torch.where(usual > 0, usual, 1))

    def grouped(self, of_heads: Tensor) -> Tensor:
        """`[head n d]` as `[kv_head (heads of a group, n) d]`."""
        return of_heads.reshape(len(self.values), -1, of_heads.shape[-1])

    def brought(self, span: slice) -> tuple[Float[Tensor, "head d_model key"], Float[Tensor, "head key d_model"]]:
        """What heads bring from some keys, laid out twice: by component, and by key."""
        values = self.values[:, span].repeat_interleave(len(self.w_o) // len(self.values), 0)
        by_key = values @ self.w_o
        return by_key.mT.contiguous(), by_key

    def peaks(self, chunk: int) -> Float[Tensor, "head key"]:
        """max_k |f_k| / c_k of every head and key."""
        w_o, group = self.w_o / self.usual, len(self.w_o) // len(self.values)
        parts = [v.repeat_interleave(group, 0) @ w_o for v in self.values.split(chunk, 1)]
        return torch.cat([torch.maximum(f.amax(-1), -f.amin(-1)) for f in parts], 1)

    def plan(self, pattern: Tensor, peak: Tensor, tolerance: float, size: int) -> list[_Rows]:
        """The rows in chunks that see some key, each with the number of components that costs least."""
        sizes = self.mid.abs()
        weights = self.usual.expand_as(sizes) if self.scale is None else self.scale.abs() * self.usual
        ratio = torch.where(weights > 0, sizes / weights, torch.inf)
        d_model = ratio.shape[-1]
        levels = [level for level in _LEVELS if level < d_model] + [d_model] * (d_model <= _LEVELS[-1])
        smallest, order = ratio.topk(d_model if tolerance else min(levels[-1] + 1, d_model), largest=False)
        allowed = tolerance * sizes.sum(-1)
        # with every component in K nothing is left that could be overshot: no limit
        edge = torch.cat([smallest, smallest.new_full((len(smallest), 1), torch.inf)], 1)
        free = torch.stack([edge[:, level] for level in levels])
        limit = free
        if tolerance:
            limit = torch.stack(
                [_limit(sizes.gather(1, order[:, n:]), weights.gather(1, order[:, n:]), allowed) for n in levels]
            )
        best = _cheapest(pattern, peak, limit, levels, d_model, size)
        seen = torch.stack([part.flatten(0, 1).amax(0) for part in pattern.split(size, 1)]).gt(0).cpu()
        chunks = []
        for index, (n, keys) in enumerate(zip(best, seen, strict=True)):
            seen_keys = keys.nonzero()[:, 0].tolist()
            if seen_keys:
                rows = slice(index * size, min((index + 1) * size, len(ratio)))
                chosen = order[rows, : levels[n]]
                ends = (seen_keys[0], seen_keys[-1] + 1)
                chunks.append(self.chunk(rows, ends, chosen, free[n, rows], limit[n, rows], allowed[rows]))
        return chunks

    def chunk(
        self, rows: slice, ends: tuple[int, int], chosen: Tensor, free: Tensor, limit: Tensor, allowed: Tensor
    ) -> _Rows:
        mid = self.mid[rows]
        signs = mid.sign() if self.scale is None else mid.sign() * self.scale[rows]
        # sign(x) is 0 in K, whose components `add_chosen` does one by one
        query = torch.einsum("rk,hek->hre", signs.scatter(1, chosen, 0), self.w_o)
        scale = None if self.scale is None else self.scale[rows].gather(1, chosen)
        small = mid.gather(1, chosen)
        return _Rows(rows, *ends, query, chosen, small, scale, free[:, None], limit[:, None], allowed[:, None])


def _limit(sizes: Tensor, weights: Tensor, allowed: Tensor) -> Float[Tensor, " row"]:
    """Largest t with 2 Σ max(t w_k - |x_k|, 0) <= allowed, over components in the order of |x_k| / w_k."""
    if not sizes.shape[-1]:
        return torch.full_like(allowed, torch.inf)
    slope = weights.cumsum(-1)
    reach = (allowed[:, None] / 2 + sizes.cumsum(-1)) / slope
    return torch.where(slope > 0, reach, torch.inf).amin(-1)


def _cheapest(pattern: Tensor, peak: Tensor, limit: Tensor, levels: list[int], d_model: int, size: int) -> list[int]:
    """For each chunk of rows, which level costs least, by a sample of the keys."""
    keys = pattern.shape[-1]
    step = max(1, keys // _SAMPLE)
    # which size of K is best changes time alone, so that a sample of keys is enough to choose by
    sample = slice(step // 2, None, step)
    reach = pattern[:, :, sample] * peak[:, None, sample]
    costs = []
    for level, most in zip(levels, limit, strict=True):
        pairs = (reach > most[:, None]).sum((0, 2)) * (keys / reach.shape[-1])
        cost = level * len(pattern) * keys + pairs * d_model * _WHOLE
        costs.append(torch.stack([part.sum() for part in cost.split(size)]))
    best: list[int] = torch.stack(costs).argmin(0).tolist()
    return best


class _Block:
    """Some rows against some keys."""

    def __init__(
        self, layer: _Layer, chunk: _Rows, span: slice, alpha: Tensor, peak: Tensor, brought: tuple[Tensor, Tensor]
    ) -> None:
        self.layer, self.chunk, self.span, self.alpha, self.brought = layer, chunk, span, alpha, brought
        self.reach = alpha * peak[:, None]
        self.beyond = self.reach > chunk.limit
        self.whole = 0

    def proximities(self) -> Float[Tensor, "head row key"]:
        layer, chunk, alpha = self.layer, self.chunk, self.alpha
        linear = layer.grouped(chunk.query) @ layer.values[:, self.span].mT
        near = linear.view_as(alpha).mul_(alpha)
        self.add_chosen(near)
        near.masked_fill_(alpha == 0, 0).clamp_min_(0)
        # the estimate is never below the exact value: where it is 0 already, there is nothing to work out again
        self.beyond &= near > 0
        self.replace_whole(near)
        return near

    def add_chosen(self, near: Tensor) -> None:
        """Σ_K |x_k| - |α f_k - x_k|, a few rows at a time."""
        chunk, n = self.chunk, self.chunk.chosen.shape[-1]
        if not n:
            return
        heads, _, keys = near.shape
        step = max(1, _room(near) // (n * heads * keys))
        for first in range(0, near.shape[1], step):
            rows = slice(first, first + step)
            parts = self.brought[0].index_select(1, chunk.chosen[rows].flatten()).view(heads, -1, n, keys)
            if chunk.scale is not None:
                parts *= chunk.scale[rows, :, None]
            torch.addcmul(-chunk.small[rows, :, None], parts, self.alpha[:, rows, None], out=parts)
            near[:, rows] += chunk.small[rows].abs().sum(-1, keepdim=True)
            near[:, rows] -= parts.abs_().sum(2)

    def replace_whole(self, near: Tensor) -> None:
        """The pairs beyond the limit, component by component."""
        layer, beyond = self.layer, self.beyond.nonzero()
        self.whole = len(beyond)
        for head, row, key in (part.unbind(1) for part in beyond.split(max(1, _room(near) // len(layer.usual)))):
            parts = self.brought[1][head, key] * self.alpha[head, row, key, None]
            rows = row + self.chunk.rows.start
            if layer.scale is not None:
                parts *= layer.scale[rows]
            near[head, row, key] = proximity(parts, layer.mid[rows])

    def bound(self, near: Tensor) -> Float[Tensor, "row key"]:
        """By how much the sums over heads may be too large."""
        chunk = self.chunk
        slope = chunk.allowed / chunk.limit.clamp_min(torch.finfo(chunk.limit.dtype).tiny)
        # what is overshot is convex in t and 0 up to `free`: below the limit it lies under the line to `allowed` there
        chord = torch.where((self.reach > chunk.free) & ~self.beyond, slope * self.reach, 0)
        return torch.minimum(chord, near).sum(0)


def _room(like: Tensor) -> int:
    """Elements of a temporary: what a CPU keeps in its cache, or enough for a device to be busy."""
    return 1 << 17 if like.device.type == "cpu" else 1 << 26
