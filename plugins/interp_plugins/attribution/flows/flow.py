"""Information flow into residual streams, from what one forward pass kept.

In each layer the stream after attention is a sum of parts: the stream before it, what each head takes from each token,
and the output bias. A part y counts for the whole x by how much nearer it brings to it (L1 norm):

    prox(y, x) = max(|x| - |x - y|, 0)
    x          = sum over sinks i of w_i * (resid_pre + attn_out)[i]
    part(h, j) = sum over sinks i of w_i * pattern[h, i, j] * scale_i * v[j, h] @ W_O[h]
    share(j)   = sum over heads of prox(part(h, j), x) / (all of them + prox(resid_pre, x) + prox(bias, x))
    flow(j)    = sum over layers of share(j)

Per layer the shares of tokens, residual and bias add up to 1; parts and bias add up to `attn_out`. `scale_i` is 1, or
the post-norm's 1 / rms (its gains go into W_O) and the block's multiplier; where z is gated, the gate multiplies v. The
profile "reference" does as the published code: values by an eps of 1e-6 and without biases, no part for the bias, a
threshold in units of the stream.

Source: Ferrando and Voita (2024), arXiv:2403.00824, for proximities; Pan et al. (2026), arXiv:2602.01914, for spans.

Cost: one forward pass with the model's own attention; per span the attention of its rows again, and for each head and
token a product with W_O, of which only those columns are done that can count (see `proximities_to`). Kept per layer:
values `[pos kv_head d_head]`, rotated queries and streams of the rows that spans may ask for, rotated keys; and rows of
the pattern in as many layers as take no more than all this, for spans that come again. Linear attention: see `linear`.
Must equal: the sum over all parts one by one (the tests, float64), and the published numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import interp_core as ic
from interp_core import sites as S

from ..method import stream_site
from .linear import ROUNDED, LinearMixing
from .out_maps import OutMap, Profile, demand_patterns, maps_of, reference_values
from .proximity import per_head, proximities, proximities_to, proximity

FITTED = {torch.float64: 1e-5, torch.float32: 1e-3}
"""How well what a layer adds must be the sum of its parts, in parts of its norm; 5e-2 in half precision."""
ELEMENTS = 1 << 24
"""How many numbers of a layer's pattern are held at a time."""


@dataclass(eq=False)
class KeptLayer:
    """What is kept of one layer, linear in the length of the text.

    Attributes:
        values: of all tokens `[key kv_head d_head]`.
        before, added: `resid_pre` and `attn_out` of the rows `[row d_model]`.
        z: what the output projection read there, where it is gated `[row head d_head]`; else None.
        scale: what the layer multiplies each row's parts by `[row]`.
        out: what makes parts of values.
        attention: rows of the pattern; None where they must be read again, and in layers of linear attention.
        linear: what those mix tokens by.
    """

    values: Tensor
    before: Tensor
    added: Tensor
    z: Tensor | None
    scale: Tensor
    out: OutMap
    attention: ic.AttentionRows | None
    linear: LinearMixing | None = None

    @property
    def nbytes(self) -> int:
        """Of what grows with the text."""
        pattern_parts = [] if self.attention is None else [self.attention.query, self.attention.key]
        return sum(x.nbytes for x in (self.values, self.before, self.added, *pattern_parts))


class Shares(NamedTuple):
    """What the parts of each layer's stream count for in one set of sinks; together 1 per layer.

    Attributes:
        token: of each token, over all heads.
        head: of each head, over all tokens; 0 of heads that a layer does not have.
        resid, bias: of the stream before attention, and of biases.
    """

    token: Float[Tensor, "layer pos"]
    head: Float[Tensor, "layer head"]
    resid: Float[Tensor, " layer"]
    bias: Float[Tensor, " layer"]


@dataclass(eq=False)
class Flow:
    """What one forward pass over a row kept, and the flows that follow from it.

    Attributes:
        model: the model.
        tokens: one row without padding.
        rows: positions of sinks that may be asked for.
        profile: "sound", or "reference" for the published code's conventions.
        threshold: parts that count for less are left out: in parts of |x|, or its own units in the reference.
        chunk, sink_chunk: how many tokens and sinks are worked on at a time; results do not depend on it.
        tolerance: how far above its exact value a head's part may be in `all_rows`, in parts of |x| (None: exact).
        again: most of `rows` will be asked for again and again: rows of the pattern are then held for as many layers
            as take no more memory than all that is kept besides.
        stream: lengths of the stream at `stream_site` `[pos]`.

    Raises:
        CapabilityError: a layer that mixes tokens other than by a pattern, or whose parts do not add up.
    """

    model: ic.Model
    tokens: ic.Tokens
    rows: tuple[int, ...]
    profile: Profile = "sound"
    threshold: float = 0.0
    chunk: int = 128
    sink_chunk: int = 32
    tolerance: float | None = None
    again: bool = False
    stream: Tensor = field(init=False)
    _layers: list[KeptLayer] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        demand_patterns(self.model, linear=True)
        self.rows = tuple(sorted(set(self.rows)))
        self._place = {position: place for place, position in enumerate(self.rows)}
        maps = maps_of(self.model, self.profile)
        halfway, later = stream_site(self.model), not self.model.can("pattern", "rows")
        at = _at(self.rows)
        parts = [site.at(at) for site in (S.resid_pre, S.attn_out, S.z)]
        # the last rows see most tokens; a few of them show whether anything stands between pattern · values and z
        few = list(self.rows[-4:])
        linear = sorted({*range(self.model.n_layers)} - {*self.model.layers("pattern")})
        hidden = {layer: S.attn_in[layer] for layer in linear}
        reads = [S.v, *parts, halfway, *hidden.values(), *([S.resid_pre] if self.profile == "reference" else [])]

        def each(layer: int, values: ic.LayerReadings) -> None:
            if layer == halfway.layers:
                self.stream = values[halfway][0].float().norm(dim=-1)
            if layer in hidden:
                before, added = (values[site].plain[0].to(maps[layer].w_o) for site in parts[:2])
                scale, inputs = added.new_ones(len(added)), values[hidden[layer]].plain[0]
                self._layers.append(KeptLayer(inputs, before, added, None, scale, maps[layer], None))
                return
            before, added, z = (values[site].plain[0].to(maps[layer].w_o) for site in parts)
            attention = values.attention.at(self.rows) if later else None
            v, w_v = values[S.v].plain[0], maps[layer].w_v
            if w_v is not None:
                v = reference_values(values[S.resid_pre].plain[0].to(before), *w_v)
            scale = self._scale(layer, z, added, maps[layer])
            kept = KeptLayer(v, before, added, z if w_v is None else None, scale, maps[layer], attention)
            self._layers.append(kept if attention is None else self._ungated(kept, attention.pattern(few)[0]))

        self.model.run(self.tokens, read=reads, logits=False, each=each, attention=later)
        for layer in linear:  # after the pass, whose hooks hang on their modules
            self._mix_linearly(layer)
        # where attention keeps no rows to be asked later, patterns come by a second pass, and z is looked at then
        if not later and self.profile == "sound":
            for place, (kept, pattern) in enumerate(list(self._patterns([self._place[row] for row in few]))):
                self._layers[place] = kept if pattern is None else self._ungated(kept, pattern)

    def _mix_linearly(self, layer: int) -> None:
        """Put what a layer of linear attention mixes tokens by in the place of what it read.

        Raises:
            CapabilityError: its parts are not what it adds.
        """
        kept, module = self._layers[layer], self.model.module("linear_attn", layer)
        mixing = LinearMixing.of(module, kept.values, self.rows)
        most = max(FITTED.get(self.model.dtype, 5e-2), ROUNDED)
        mixing.demand(kept.added, kept.out.w_o, kept.out.bias, most, f"layer {layer} of {self.model.source}")
        self._layers[layer] = replace(kept, values=mixing.values, linear=mixing)

    def _scale(self, layer: int, z: Tensor, added: Tensor, out: OutMap) -> Float[Tensor, " row"]:
        """What the block multiplies the projection by: the post-norm's 1 / rms of each row, or one factor for all.

        Raises:
            CapabilityError: what is added is no multiple of what the projection gives.
        """
        # a norm scales every row by its own number; a multiplier is one for all, which sixteen rows tell
        per_row, few = out.normed, z if out.normed else z[-16:]
        projected = few.flatten(1) @ out.w_o.flatten(1).mT + out.bias
        added = added[-len(few) :] - out.own
        across = (projected * added).sum(-1), projected.square().sum(-1)
        # least squares: <projected, added> / <projected, projected>
        top, bottom = across if per_row else (x.sum().expand(1) for x in across)
        scale = top / bottom.clamp_min(torch.finfo(bottom.dtype).tiny)
        off = float((added - scale[:, None] * projected).norm() / added.norm().clamp_min(1e-30))
        if not off <= FITTED.get(self.model.dtype, 5e-2):
            raise ic.CapabilityError(
                f"layer {layer} of {self.model.source} does not add the output projection of its heads, times a norm "
                f"or a factor, to the stream (off by {off:.1e} of its norm), so its flow has no parts by tokens"
            )
        # a multiplier within rounding of 1 is none: most families have none, and their parts then add up exactly
        if not per_row and abs(float(scale) - 1) < FITTED.get(self.model.dtype, 5e-2):
            scale = torch.ones_like(scale)
        return scale.expand(len(z)).contiguous()

    def _ungated(self, kept: KeptLayer, pattern: Float[Tensor, "head query key"]) -> KeptLayer:
        """A layer without its z, where that is the values mixed by the pattern, of which these are the last rows; where
        there is a gate between, z stays."""
        if kept.z is None:
            return kept
        mixed = torch.matmul(pattern.to(kept.z), per_head(kept.values.to(kept.z), kept.z.shape[1])).transpose(0, 1)
        off = float((mixed - kept.z[-len(mixed) :]).norm() / mixed.norm().clamp_min(1e-30))
        return replace(kept, z=None) if off <= FITTED.get(self.model.dtype, 5e-2) else kept

    # Asking

    @property
    def layers(self) -> Sequence[KeptLayer]:
        """What was kept, layer by layer."""
        return self._layers

    def pattern_at(self, layer: int, positions: Sequence[int]) -> Float[Tensor, "head row key"]:
        """Rows of one layer's pattern; where nothing was kept to make them of, by a pass up to that layer."""
        kept = self._layers[layer]
        if kept.attention is not None:
            return kept.attention.pattern(list(positions))[0].to(kept.scale)
        site = S.pattern[layer].at(query=list(positions))
        return self.model.run(self.tokens, read=site, logits=False)[site].plain[0].to(kept.scale)

    def span(self, positions: Sequence[int], weights: Tensor | None = None) -> Float[Tensor, " pos"]:
        """The flow into sinks taken together, in float64.

        Args:
            positions: of the sinks.
            weights: of each, 1 together (default: all alike).

        Raises:
            PositionError: a sink that was not announced.
        """
        return self.shares(positions, weights).token.sum(0)

    def shares(self, positions: Sequence[int], weights: Tensor | None = None) -> Shares:
        """The same layer by layer, with the shares of heads, residual and biases."""
        index = self._index(positions)
        weight = torch.ones(len(index), dtype=torch.float64) if weights is None else weights.double().cpu()
        shares = [self._share(kept, index, weight, mix) for kept, mix in self._mixes(index, weight)]
        token, head, resid, bias = zip(*shares, strict=True)
        return Shares(
            torch.stack(token), pad_sequence(list(head), batch_first=True), torch.stack(resid), torch.stack(bias)
        )

    def all_rows(self, positions: Sequence[int]) -> tuple[Float[Tensor, "row pos"], float]:
        """The flow into each sink by itself, in float64, and by how much a score may be off at most (0: exact).

        Raises:
            PositionError: a sink that was not announced.
        """
        index, error = self._index(positions), 0.0
        out = torch.zeros(len(positions), self.tokens.lengths[0], dtype=torch.float64)
        rows = max(self.sink_chunk, ELEMENTS // (out.shape[1] * len(self._layers[0].out.longest)))
        unit_weight = torch.ones(1, dtype=torch.float64)
        for start in range(0, len(index), rows):
            part, off = index[start : start + rows], 0.0
            for kept, pattern in self._patterns(part):
                # a chunk's rows go together, but not through a gate, or with a threshold in parts of a row's own |x|
                if pattern is not None and kept.z is None and not (self.threshold and self.profile == "sound"):
                    flows, most = self._rows_of(kept, part, pattern)
                    out[start : start + rows] += flows
                    off += most
                    continue
                for n, row in enumerate(part):
                    mix = self._mix_of(kept, [row], None if pattern is None else pattern[:, n : n + 1], unit_weight)
                    out[start + n] += self._share(kept, [row], unit_weight, mix)[0]
            error = max(error, off)
        return out, error

    def _rows_of(self, kept: KeptLayer, index: Sequence[int], pattern: Tensor) -> tuple[Tensor, float]:
        """One layer's shares of tokens in each of some sinks `[row pos]`, and by how much they may be off."""
        at = _at(index)
        before, added, scale = kept.before[at], kept.added[at], kept.scale[at]
        x = before + added
        near = proximities(
            pattern * scale[:, None], kept.values, kept.out.w_o.permute(1, 2, 0), x, tolerance=self.tolerance,
            threshold=self.threshold, chunk_tokens=self.chunk, sink_chunk_tokens=self.sink_chunk,
        )  # fmt: skip
        other = proximity(before.double(), x.double())
        if kept.out.biased:
            other = other + proximity(scale[:, None].double() * kept.out.bias + kept.out.own, x.double())
        token, bound = near.tokens.double(), near.bound.double()
        whole = self._positive(token.sum(-1) + other)[:, None]
        # exact parts lie between token - bound and token, the whole between whole - Σ bound and whole: so far may a
        # share be off, either way
        shares, least = token / whole, (whole - bound.sum(-1, keepdim=True)).clamp_min(1e-30)
        off = torch.maximum(bound / whole, token / least - shares)
        return shares.cpu(), float(off.max())

    def _positive(self, whole: Tensor) -> Tensor:
        """What shares are parts of, above 0."""
        return whole + 1e-12 if self.profile == "reference" else whole.clamp_min(torch.finfo(torch.float64).tiny)

    def _index(self, positions: Sequence[int]) -> list[int]:
        if missing := [position for position in positions if position not in self._place]:
            raise ic.PositionError(f"the flow into position {missing[0]} was not announced: rows= has {self.rows}")
        if not positions:
            raise ic.PositionError("a flow needs at least one sink")
        return [self._place[position] for position in positions]

    def _mixes(self, index: Sequence[int], weight: Tensor) -> Iterator[tuple[KeptLayer, Tensor]]:
        """Per layer the pattern of sinks taken together: `[head key]`, or by dimension `[head key d_head]`."""
        parts = [slice(start, start + self.sink_chunk) for start in range(0, len(index), self.sink_chunk)]
        if self._once_more:
            sums: dict[int, Tensor] = {}
            for part in parts:
                for layer, (kept, pattern) in enumerate(self._patterns(index[part])):
                    mix = self._mix_of(kept, index[part], pattern, weight[part])
                    sums[layer] = sums[layer] + mix if layer in sums else mix
            yield from zip(self._layers, sums.values(), strict=True)
            return
        queries = [self.rows[place] for place in index]
        # hops come back to the same rows with other weights: holding patterns pays if most rows are asked for again
        if self.again and 2 * len(index) > len(self.rows):
            self._hold()
        for kept in self._layers:
            if kept.attention is None:
                yield kept, self._mix_of(kept, index, None, weight)
            elif kept.z is None:
                scaled = weight.to(kept.scale) * kept.scale[_at(index)]
                yield kept, kept.attention.mixed(queries, scaled[None])[0]
            else:
                rows = ((part, kept.attention.pattern(queries[part])[0].to(kept.scale)) for part in parts)
                mixes = (self._mix_of(kept, index[part], pattern, weight[part]) for part, pattern in rows)
                yield kept, reduce(torch.add, mixes)

    def _mix_of(self, kept: KeptLayer, index: Sequence[int], pattern: Tensor | None, weight: Tensor) -> Tensor:
        """The pattern of some sinks `[head row key]` taken together; linear attention has none."""
        if kept.linear is not None:
            return kept.linear.mix(index, weight).to(kept.scale)
        assert pattern is not None
        scaled = pattern * (weight.to(kept.scale) * kept.scale[index])[:, None]
        if kept.z is None:
            return scaled.sum(1)
        mixed = torch.matmul(pattern, per_head(kept.values.to(pattern), len(pattern)))
        # gates are sigmoids, 0 to 1; 0 / 0 where a head gave nothing, and rounding may take a quotient past the ends
        gate = kept.z[index].transpose(0, 1) / mixed
        return torch.einsum("hik,hid->hkd", scaled, gate.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1))

    def _hold(self) -> None:
        """Make rows of the pattern to last, layer by layer from the first, as far as there is room."""
        self.again, room = False, sum(kept.nbytes for kept in self._layers)
        for place, kept in enumerate(self._layers):
            if kept.attention is None or kept.z is not None:
                continue
            attention = kept.attention.held()
            # as much as all that is kept anyway, no more: memory at most doubles
            room -= sum(rows.nbytes for _, rows in attention.made)
            if room < 0:
                return
            self._layers[place] = replace(kept, attention=attention)

    @property
    def _once_more(self) -> bool:
        """Whether nothing was kept to make patterns of."""
        return all(kept.attention is None for kept in self._layers)

    def _patterns(self, index: Sequence[int]) -> Iterator[tuple[KeptLayer, Tensor | None]]:
        """Per layer, rows of the pattern `[head row key]`, None in linear attention; where nothing was kept to make
        them of, by another pass."""
        queries, read = [self.rows[place] for place in index], dict[int, Tensor]()
        site = S.pattern.at(query=queries)
        if self._once_more:
            self.model.run(
                self.tokens, read=site, logits=False,
                each=lambda layer, values: read.update({layer: values[site].plain[0].to(self._layers[layer].scale)}),
            )  # fmt: skip
        for layer, kept in enumerate(self._layers):
            if kept.attention is not None:
                yield kept, kept.attention.pattern(queries)[0].to(kept.scale)
            else:
                yield kept, read.get(layer)

    def _share(
        self, kept: KeptLayer, index: Sequence[int], weight: Tensor, mix: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shares of one layer: of tokens, heads, residual, bias; on this machine, in float64."""
        w, at = weight.to(kept.before), _at(index)
        before, added = w @ kept.before[at], w @ kept.added[at]
        x = before + added
        seen = torch.nonzero(mix.any(-1).any(0) if mix.ndim == 3 else mix.any(0))  # images see forward, too
        reach = int(seen.max()) + 1 if len(seen) else 1
        values = kept.values[:reach].to(mix)
        near = proximities_to(x, mix[:, :reach], values, kept.out.w_o, kept.out.longest, chunk_tokens=self.chunk)
        limit = self.threshold and self.threshold * (1.0 if self.profile == "reference" else float(x.abs().sum()))
        near = near.masked_fill(near < limit, 0.0).double().cpu() if limit else near.double().cpu()
        resid, bias = proximity(before.double(), x.double()).cpu(), torch.zeros((), dtype=torch.float64)
        if kept.out.biased:
            part = (w * kept.scale[at]).sum() * kept.out.bias + w.sum() * kept.out.own
            bias = proximity(part.double(), x.double()).cpu()
        whole = self._positive(near.sum() + resid + bias)
        token = near.new_zeros(self.tokens.lengths[0])
        token[:reach] = near.sum(0)
        return token / whole, near.sum(1) / whole, resid / whole, bias / whole


def _at(places: Sequence[int]) -> slice | list[int]:
    """Places as an index; a slice, which takes no copy, where they follow each other."""
    first, stop = places[0], places[-1] + 1
    return slice(first, stop) if list(places) == list(range(first, stop)) else list(places)


def flow_operations(work: ic.Work, sinks: int, flows: int) -> int:
    """Operations of products of matrices that flows take beside the pass, in layers with patterns, for all prompts.

    Args:
        sinks: positions that a flow goes into.
        flows: each into all sinks together; 0: into each sink by itself (`all_rows`).
    """
    n, d, total = work.tokens, work.d_model, 0
    for heads, kv_heads, a, b in zip(work.heads, work.kv_heads, work.d_key, work.d_value, strict=True):
        projection, rows = 2 * heads * b * d, 2 * sinks * heads * a * n
        checks = min(sinks, 16) * projection + 8 * heads * (a + b) * n
        if flows:
            # a pair's part overshoots in few dimensions: an eighth of them is what `_split` takes on most texts
            total += checks + flows * (rows + 2 * sinks * heads * n + projection + 2 * heads * b * n)
            total += flows * n * projection // 8
        else:
            # what heads bring from every token, for its peaks and again for the sums, and the components' usual size
            usual = 2 * n * kv_heads * b**2 + b * projection
            total += checks + rows + (2 * n + sinks) * projection + usual + 2 * sinks * heads * b * n
    return work.prompts * total
