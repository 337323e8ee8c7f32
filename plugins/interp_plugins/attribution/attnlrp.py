"""AttnLRP: relevance of tokens by a backward pass under rules, for a span, for each target token, or hop by hop.

    span         v = relevance of Σ logits of the sink's tokens                                         signed
    per_token    row g = relevance of the logit of target token g; v = sum of the sink's rows           signed
    hop0         v = shaped(relevance of the sink's mean logit), copied into every row
    multi_hop    v₀ as hop0; ρ₀ = share of v₀ on the thinking span; then, n_hops times,
                 v_h = shaped(relevance of Σ over thinking of v_{h-1}(t) · logit(t)),
                 v = v₀ + Σ_h ρ_{h-1} v_h outside of thinking, sink and what follows; ρ_h = ρ_{h-1} · share of v_h

    shaped       negatives dropped, or taken as absolute; with "norm" divided by the sum over prompt and target
                 (with "no_norm" sums in the place of means, and every ρ is 1)

The token at position p is predicted at p - 1: its logit is taken there, and its row ends there. Rules and their names
are those of `rules`: attnlrp, cp_lrp, pa_lrp, gradient.

LRP is patented: the authors' package says that it is free for personal and scientific use only.
See docs/methods/attnlrp.md.

Source: Achtibat et al. (2024), arXiv:2402.05602; hops by Pan et al. (2026), arXiv:2602.01914; positions Bakish et al.
(2025), arXiv:2506.02138.

Cost: span and hop0 one forward and one backward pass, multi_hop one more backward pass per hop, per_token one per
target token (see `relevance`).
Must equal: LXT on Llama and Qwen3; without biases, `cp_lrp` adds up to the logit, and what is missing elsewhere is the
note `residue`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .layout import Layout
from .method import Attributed, Attribution, AttributionConfig
from .relevance.passes import Explained, Relevances, group_size, relevance_rows
from .relevance.rules import Rules, rules, unruled


class AttnLRPConfig(AttributionConfig):
    """Settings of AttnLRP.

    Attributes:
        variant: "span", "per_token", "hop0" or "multi_hop".
        rules: the rule set.
        router: of mixtures of experts: "frozen" weights of experts are constants, "halved" ones take half.
        n_hops: hops after the first, of "multi_hop".
        objective: the logit of the "generated" token, or the "max" logit there.
        normalise: explain the mean of the logits rather than their sum, in "span" and "per_token".
        neg_handling: what "hop0" and "multi_hop" do with negative relevance: "drop" or "abs".
        norm_mode: whether their vectors are divided by their sums.
    """

    variant: Literal["span", "per_token", "hop0", "multi_hop"] = "span"
    rules: Literal["attnlrp", "cp_lrp", "pa_lrp", "gradient"] = "attnlrp"
    router: Literal["frozen", "halved"] = "frozen"
    n_hops: int = 1
    objective: Literal["generated", "max"] = "generated"
    normalise: bool = False
    neg_handling: Literal["drop", "abs"] = "drop"
    norm_mode: Literal["norm", "no_norm"] = "norm"

    @property
    def by_token(self) -> bool:
        """Whether tokens of the target get rows of their own, which differ."""
        return self.variant == "per_token"

    def cost(self, work: ic.Work) -> ic.Cost:
        """A pass under rules with a backward pass per question, and half of one for attention sinks."""
        sinks = work.forward(stop=(work.layers - 1) // 2 + 1, read_out=0, batch=1)
        if self.variant == "per_token" and work.target:
            ends = range(work.tokens - work.target, work.tokens)
            size = group_size(work.tokens)
            groups = [ends[start : start + size] for start in range(0, len(ends), size)]
            passes = (
                work.forward(columns=group[-1], read_out=len(group), backward=len(group), batch=1) for group in groups
            )
            return sum(passes, sinks)
        hops = self.n_hops if self.variant == "multi_hop" and work.target else 0
        read_out = max(work.target, 1) if self.variant == "multi_hop" else self.explained(work)
        return sinks + work.forward(read_out=read_out, backward=hops + 1, batch=1)


class AttnLRP(Attribution):
    """Relevance of tokens by layer-wise relevance propagation, or input × gradient."""

    name = "attnlrp"
    requires = frozenset({"causal", "embed"})
    Config = AttnLRPConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: AttnLRPConfig) -> None:
        """As of any method; and numbers that make sense."""
        if config.n_hops < 0:
            raise ic.PlanError(f"{self.name}: n_hops={config.n_hops}: 0 or more")
        super().check(model, tokens, config)
        rules(config.rules).demand_reach(model)

    def attribute(self, model: ic.Model, layout: Layout, config: AttnLRPConfig) -> Attributed:
        """Scores of one row."""
        chosen = rules(config.rules, router=config.router, profile=config.profile)
        notes: dict[str, Any] = {"rules": str(chosen), "unruled_layers": unruled(model) if not chosen.empty else []}
        if config.variant == "per_token" and layout.target:
            at = range(layout.target.start - 1, layout.target.stop - 1)
            ids = _ids(layout, at, config)
            rows = relevance_rows(model, layout.tokens, chosen, at, ids, against=layout.against)
            scores = rows[_within(layout, layout.sink)].sum(0) / (len(layout.sink) if config.normalise else 1)
            return Attributed(scores, _cut(rows, layout), notes=notes)
        explained, logits = _explained(model, layout, chosen, config)
        if config.variant in ("span", "per_token"):
            # without a target the sink is empty, and the next token's logit is the only one
            count = max(1, len(layout.sink))
            weights = torch.full((count,), 1 / count if config.normalise else 1.0)
            relevance = explained.relevance(logits, weights, last=True)
            notes |= {"objective": relevance.objective, "residue": relevance.objective - float(relevance.tokens.sum())}
            return Attributed(_with_positions(relevance, config.profile, notes), notes=notes)
        n_hops = config.n_hops if config.variant == "multi_hop" and layout.target else 0
        hops, mass = _hops(explained, logits, layout, n_hops, config)
        scores = hops[0] if config.variant == "hop0" else observed(hops, mass, layout)
        copies = _cut(scores.expand(len(layout.target), -1), layout) if layout.target else None
        return Attributed(scores, copies, hops, mass, notes=notes)


def observed(hops: Float[Tensor, "hop pos"], mass: Float[Tensor, " hop"], layout: Layout) -> Float[Tensor, " pos"]:
    """What all hops say of the tokens outside of thinking, sink and all that follows the thinking."""
    seen = torch.zeros_like(hops[0])
    seen[list(layout.prompt)] = 1
    seen[layout.target.start : layout.thinking.start] = 1
    for part in (layout.thinking, layout.sink):
        seen[part.start : part.stop] = 0
    # a hop counts by what the one before it passed on, the first by all
    shares = torch.cat([mass.new_ones(1), mass[:-1]]).to(hops)
    return (hops * shares[:, None]).sum(0) * seen


def _explained(
    model: ic.Model, layout: Layout, chosen: Rules, config: AttnLRPConfig
) -> tuple[Explained, Float[Tensor, " target"]]:
    """The pass under rules, and the logit of each target token (of the next token, without a target)."""
    if not layout.target:
        explained = Explained(model, layout.tokens, chosen, layout.predictors, alone=True)
        return explained, explained.chosen(None, layout.against)
    at = range(layout.target.start - 1, layout.target.stop - 1)
    if config.variant != "multi_hop":
        at = range(layout.sink.start - 1, layout.sink.stop - 1)
    explained = Explained(model, layout.tokens, chosen, at, alone=True)
    return explained, explained.chosen(_ids(layout, at, config), layout.against)


def _ids(layout: Layout, at: range, config: AttnLRPConfig) -> list[int] | None:
    """The tokens whose logits are meant at their predicting positions; None: each position's largest."""
    ids: list[int] = layout.tokens.ids[0, at.start + 1 : at.stop + 1].tolist()
    return None if config.objective == "max" else ids


def _cut(rows: Float[Tensor, "target pos"], layout: Layout) -> Float[Tensor, "target pos"]:
    """Rows up to the token that they explain; behind it nothing is computed."""
    behind = torch.arange(rows.shape[1], device=rows.device) >= torch.tensor(layout.target, device=rows.device)[:, None]
    return rows.masked_fill(behind, float("nan"))


def _within(layout: Layout, part: range) -> slice:
    """A part of the target in the target's own places."""
    return slice(part.start - layout.target.start, part.stop - layout.target.start)


def _hops(
    explained: Explained, logits: Float[Tensor, " target"], layout: Layout, n_hops: int, config: AttnLRPConfig
) -> tuple[Float[Tensor, "hop pos"], Float[Tensor, " hop"]]:
    """Vectors of all hops, and what each passes on; one backward pass each."""
    norm = config.norm_mode == "norm"
    shaped = _shaping(layout, config)
    weights = torch.zeros(len(logits))
    if len(logits) == len(layout.target):
        weights[_within(layout, layout.sink)] = 1.0
    else:
        weights += 1.0
    weights = weights / weights.sum() if norm else weights
    vectors, masses, mass = list[Tensor](), list[float](), 1.0
    inside = slice(layout.thinking.start, layout.thinking.stop)
    for hop in range(n_hops + 1):
        vector = shaped(explained.relevance(logits, weights, last=hop == n_hops).tokens)
        total = float(vector[list(layout.projected)].sum())
        # without norms every ρ is 1, as published; with them a vector without any mass passes nothing on
        mass *= float(vector[inside].sum()) / total if norm and total else 1.0 if not norm else 0.0
        vectors.append(vector)
        masses.append(mass)
        if hop < n_hops:
            weights = torch.zeros(len(logits))
            weights[_within(layout, layout.thinking)] = vector[inside].to(weights)
    return torch.stack(vectors), torch.tensor(masses)


def _shaping(layout: Layout, config: AttnLRPConfig) -> Callable[[Tensor], Tensor]:
    """Signed relevance made into weights."""
    seen = list(layout.projected)

    def shaped(vector: Tensor) -> Tensor:
        vector = vector.clamp(min=0) if config.neg_handling == "drop" else vector.abs()
        total = vector[seen].sum()
        return vector / total if config.norm_mode == "norm" and total > 0 else vector

    return shaped


def _with_positions(relevance: Relevances, profile: str, notes: dict[str, Any]) -> Float[Tensor, " pos"]:
    """Relevance of tokens with that of their positions: signed, or without sign and relative to the largest as
    published."""
    if relevance.positions is None:
        return relevance.tokens
    signed, absolute = relevance.positions.to(relevance.tokens)
    notes |= {"positions": float(signed.sum()), "positions_absolute": float(absolute.sum())}
    if profile == "sound":
        notes["residue"] -= notes["positions"]
        return relevance.tokens + signed
    published = relevance.tokens + absolute
    return published / published.abs().max()
