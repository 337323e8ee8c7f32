"""Information-flow routes (IFR): which tokens the states that give an answer take from, directly or hop by hop.

    flow(j)  = sum over layers of the share of token j in the stream after attention, at the positions of the sink
    span     the flow into all of the sink together
    all_positions, all_positions_output_only   a row for each token of the target, or of the sink
    multi_hop           from the sink through the reasoning (`thinking`), `n_hops` times; see `hops`
    multi_hop_stop_words, in_all_gen, multi_hop_both   without stop words; into all of the answer; both (FlashTrace)
    multi_hop_split_hop   the reasoning in `n_hops` segments, from the last to the first

`flow` has the formula of a share. In profile "sound" a token's sink is the position that predicts it, the one before.

Source: Ferrando and Voita (2024), arXiv:2403.00824, for shares; Pan et al. (2026), arXiv:2602.01914 (FlashTrace), for
spans and hops.

Shapes: scores `[pos]`, rows `[target pos]`, hops `[hop pos]`.
Cost: one forward pass without unembedding; then what `flow_operations` says, a fifth of one per hop at most;
for all positions see `proximity`. Memory is linear in the length of the text, beside the rows asked for.
Must equal: FlashTrace 075e7e4 in profile "reference" (all positions 2e-5, hop vectors 1e-4), and shares that add up to
1 in each layer (float64, every family).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

import interp_core as ic

from .flows.flow import Flow, flow_operations
from .flows.hops import Hops, Parts, multi_hop, split_hop
from .flows.out_maps import demand_patterns
from .layout import Layout, is_stop
from .method import Attributed, Attribution, AttributionConfig

ROWS = ("all_positions", "all_positions_output_only")
STOPS = ("multi_hop_stop_words", "multi_hop_both")
ALL = ("in_all_gen", "multi_hop_both")
Variant = Literal[
    "span", "all_positions", "all_positions_output_only", "multi_hop", "multi_hop_stop_words", "in_all_gen",
    "multi_hop_both", "multi_hop_split_hop",
]  # fmt: skip


class IFRConfig(AttributionConfig):
    """Settings of information-flow routes.

    Attributes:
        variant: what flows go into; see the module.
        n_hops: hops through the reasoning (segments of it, with "multi_hop_split_hop").
        combine: what hops observe is added up, or averaged.
        hop0: with "multi_hop_both" and "in_all_gen", whether the first flow goes into all of the answer, as in the
            paper, or into the sink, as in the later package.
        read_at: where hops go on into the reasoning: at its "tokens", whose streams the hop before took from, or at the
            "predictors" (what made the model write them); "reference" is always at the tokens.
        threshold: parts of heads that count for less are left out: in parts of the stream's length (reference: in its
            own units).
        tolerance: for all positions, how far above its exact value the part of a head may be, in parts of the stream's
            length; the notes say by how much a score may then be off (None: exact).
        chunk_tokens: tokens that are worked on at a time; bounds memory, and changes no result.
        sink_chunk_tokens: sinks that are worked on at a time; the same.
    """

    variant: Variant = "multi_hop_both"
    n_hops: int = Field(1, ge=0)
    combine: Literal["sum", "avg"] = "sum"
    hop0: Literal["all", "sink"] = "all"
    read_at: Literal["tokens", "predictors"] = "tokens"
    threshold: float = Field(0.0, ge=0)
    tolerance: float | None = Field(None, ge=0)
    chunk_tokens: int = Field(128, ge=1)
    sink_chunk_tokens: int = Field(32, ge=1)

    @property
    def by_token(self) -> bool:
        """Whether tokens of the target get rows of their own, which differ."""
        return self.variant in ROWS

    def cost(self, work: ic.Work) -> ic.Cost:
        """A pass of each text by itself, without logits; of all layers the stream, what attention adds, z and v are
        kept. Beside it the flows, of which hops go into all of the target."""
        kept = work.prompts * work.layers * work.tokens * 4 * work.d_model * work.itemsize
        sinks = self.explained(work) if self.variant in ("span", "all_positions_output_only") else max(work.target, 1)
        flows = 0 if self.variant in ROWS else 1 if self.variant == "span" else 1 + self.n_hops
        return work.forward(read_out=0, batch=1) + ic.Cost(kept=kept, beside=flow_operations(work, sinks, flows))


class IFR(Attribution):
    """Where the states that give an answer take from: information-flow routes, and their multi-hop forms."""

    name = "ifr"
    Config = IFRConfig
    requires = frozenset({"causal", "resid_pre", "attn_out", "v", "z", "pattern"})
    contrastive: ClassVar[bool] = False

    def check(self, model: ic.Model, tokens: ic.Tokens, config: IFRConfig) -> None:
        """As all attribution methods; every layer mixes tokens by a pattern, and nothing contradicts."""
        demand_patterns(model, linear=True)
        if config.tolerance and config.threshold:
            raise ic.PlanError(f"threshold={config.threshold} needs exact parts; leave tolerance= out")
        super().check(model, tokens, config)

    def attribute(self, model: ic.Model, layout: Layout, config: IFRConfig) -> Attributed:
        """One pass, then the flows that the variant asks for."""
        parts = parts_of(model, layout, config)
        wanted = layout.target if config.variant in ROWS else (*parts.answer, *parts.reasoning, *layout.sink)
        sinks = (*_sinks(layout, wanted, config.profile), *(parts.reasoning if config.read_at == "tokens" else ()))
        # a first flow into all of the answer goes into the reasoning, too
        into_reasoning = config.n_hops + (config.variant in ALL and config.hop0 == "all")
        again = config.variant in (*STOPS, *ALL, "multi_hop") and into_reasoning > 1
        flow = Flow(
            model, layout.tokens, sinks, config.profile, config.threshold,
            config.chunk_tokens, config.sink_chunk_tokens, config.tolerance, again,
        )  # fmt: skip
        if config.variant in ROWS:
            return _by_rows(flow, layout, config)
        return _by_hops(flow, layout, config, parts)


def parts_of(model: ic.Model, layout: Layout, config: IFRConfig) -> Parts:
    """Answer and reasoning that hops go between; without a final end-of-text token where they are one stretch."""
    parts = Parts(layout.sink, layout.thinking, layout.length)
    if config.variant not in ALL or not len(layout.target):
        return parts
    reference, last = config.profile == "reference", layout.target.stop - 1
    alone = layout.thinking == layout.sink or layout.sink == layout.target
    # the published code has spans for the reasoning or none: without one it takes all that was generated
    hull = layout.target if reference and alone else parts.hull
    # the published code drops the last token, whatever it is; here it goes if it ends the text
    ends = reference or int(layout.tokens.ids[0, last]) in _ends(model)
    stop = last if ends and hull.stop > last and len(hull) > 1 else hull.stop
    answer = range(layout.sink.start, max(min(layout.sink.stop, stop), layout.sink.start + 1))
    return Parts(answer, range(hull.start, stop), layout.length)


def _ends(model: ic.Model) -> set[int]:
    """Ids of tokens that end a text."""
    told = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
    own = getattr(model.tokenizer, "eos_token_id", None)
    return {int(i) for x in (told, own) if x is not None for i in (x if isinstance(x, list) else [x])}


def _sinks(layout: Layout, tokens: Any, profile: str) -> tuple[int, ...]:
    """Positions of the streams that stand for tokens of the target: those that predict them, or their own."""
    if not len(layout.target):
        return (layout.length - 1,)
    return tuple(position - (profile == "sound") for position in tokens)


def _by_rows(flow: Flow, layout: Layout, config: IFRConfig) -> Attributed:
    """A row per token; scores are the mean of the sink's rows."""
    if not len(layout.target):
        scores, error = flow.all_rows(_sinks(layout, (), config.profile))
        return Attributed(scores[0], stream=flow.stream, notes={"error": error})
    wanted = layout.target if config.variant == "all_positions" else layout.sink
    rows = torch.full((len(layout.target), layout.length), float("nan"), dtype=torch.float64)
    start = layout.target.start
    flows, error = flow.all_rows(_sinks(layout, wanted, config.profile))
    rows[wanted.start - start : wanted.stop - start] = flows
    scores = rows[layout.sink.start - start : layout.sink.stop - start].mean(0)
    return Attributed(scores, rows=rows, stream=flow.stream, notes={"error": error})


def _by_hops(flow: Flow, layout: Layout, config: IFRConfig, parts: Parts) -> Attributed:
    """One vector for the whole sink, the same in each of its rows."""

    def into(tokens: Any, weights: Tensor | None) -> Tensor:
        return flow.span(_sinks(layout, tokens, config.profile), weights)

    def through(tokens: Any, weights: Tensor | None) -> Tensor:
        return flow.span(tuple(tokens), weights) if config.read_at == "tokens" else into(tokens, weights)

    keep = _kept(layout) if config.variant in STOPS else None
    # as published: the mean is over hops, without the first flow
    divisor = max(1, config.n_hops) if config.profile == "reference" else 0
    shared: Any = {"through": through, "combine": config.combine, "divisor": divisor}
    if config.variant == "span":
        vector = into(layout.sink, None)
        hops = Hops(vector, vector[None], vector.new_ones(1), {})
    elif config.variant == "multi_hop_split_hop":
        hops = split_hop(into, parts, config.n_hops, **shared)
    else:
        hops = multi_hop(
            into, parts, config.n_hops, keep=keep, into_all=config.variant in ALL, hop0=config.hop0, **shared
        )
    rows = None
    if len(layout.target):
        rows = torch.full((len(layout.target), layout.length), float("nan"), dtype=torch.float64)
        own = [
            p for p in layout.sink if (keep is None or keep[p]) and (config.variant not in ALL or p in parts.reasoning)
        ]
        rows[[p - layout.target.start for p in own]] = hops.observed
    return Attributed(
        hops.observed, rows=rows, hops=hops.vectors, mass=hops.mass, stream=flow.stream, notes=dict(hops.notes)
    )


def _kept(layout: Layout) -> Tensor:
    """Which tokens may explain `[pos]`: all but stop words of prompt and target; a template's may."""
    keep = torch.ones(layout.length, dtype=torch.bool)
    labels = layout.tokens.labels[0]
    keep[[p for p in layout.projected if is_stop(labels[p])]] = False
    return keep
