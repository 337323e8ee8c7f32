"""Leave one out: how much the answer loses when a part of the prompt is taken away, exactly.

    loss(unit) = F(text) - F(text without the unit)         F = sum or mean of the answer's log-probabilities
    score(j)   = loss of j's unit / number of its tokens

Units are tokens, words, sentences, spans or blocks of an image; how one is taken away, and where the others then stand,
is part of the result (`ablation`). Tokens of no unit (template, special tokens, target) have score 0.

Source: Li et al. (2016), arXiv:1612.08220; the conventions as `ablation` says.
Cost: as `ablation` says; `price` tells it before anything runs.
Must equal: one forward pass per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .ablations.ablation import POSITIONS, Ablation, Convention, Price
from .ablations.judge import Judge, StandIn, TargetScale, judge_of
from .ablations.units import Chars, Kind, Unit, units_of
from .layout import Layout, with_target
from .method import Attributed, Attribution, AttributionConfig


class AblationConfig(AttributionConfig):
    """Settings that ablations of a prompt share.

    Attributes:
        units: what is taken away as one: a "token", "word", "sentence", "span" or "visual" block (4 × 4 per image).
        spans: for units "span": names of spans, or ranges of characters of the row's text.
        within: a named span of the prompt; only what lies in it is taken away.
        convention: how: "delete_text", "delete_tokens", "delete_keep_positions", "mask", "replace" or "blur".
        replacement: the token that takes the place, for "replace": "eos", "pad" or an id.
        batch_tokens: tokens that go together in a pass, for deletions.
    """

    units: Kind = "token"
    spans: list[str | Chars] | None = None
    within: str = ""
    convention: Convention = "replace"
    replacement: StandIn = "eos"
    batch_tokens: int = 4096


class LeaveOutConfig(AblationConfig):
    """Settings of leave one out.

    Attributes:
        target_scale: log-probabilities or logits of the answer.
        reduce: their sum or their mean.
    """

    target_scale: TargetScale = "logprob"
    reduce: Literal["sum", "mean"] = "sum"


class AblationMethod(Attribution):
    """What methods by ablation share: units, checks, the price."""

    additive = False

    def removals(self, units: Sequence[Unit], config: Any) -> list[list[int]]:
        """Which units each variant is without."""
        raise NotImplementedError

    def check(self, model: ic.Model, tokens: ic.Tokens, config: Any) -> None:
        """Every variant can be made."""
        super().check(model, tokens, config)
        if config.batch_tokens < 1:
            raise ic.PlanError(f"{self.name}: batch_tokens={config.batch_tokens}; take one at least")
        for layout in self.layouts(model, tokens, config):
            self.ablation(model, layout, config)

    def ablation(self, model: ic.Model, layout: Layout, config: Any) -> Ablation:
        """The variants of one row."""
        return self.by_units(model, layout, config, config.units)

    def by_units(self, model: ic.Model, layout: Layout, config: Any, kind: Kind) -> Ablation:
        """The variants of one row taken apart into units of a kind."""
        units = units_of(self.name, model, layout, kind, config.spans or (), config.within)
        return Ablation(
            self.name, model, layout, units, self.removals(units, config), config.convention, config.replacement,
            config.batch_tokens,
        )  # fmt: skip

    def price(self, model: ic.Model, x: Any, *, target: Any = None, **settings: Any) -> list[Price]:
        """What a call with these arguments costs, per prompt; no variant runs. Without a target one pass finds the
        token that is explained.

        Raises:
            PositionError, PlanError, CapabilityError, TextError: as the call.
        """
        config = self.configured(settings)
        if target is not None:
            x = with_target(model, x, target) if isinstance(x, ic.Tokens) else model.tokens(x, target)
        tokens = x if isinstance(x, ic.Tokens) else model.tokens(x)
        self.check(model, tokens, config)
        return [
            self.ablation(model, layout, config).price(self.judge(model, layout, config))
            for layout in self.layouts(model, tokens, config)
        ]

    def judge(self, model: ic.Model, layout: Layout, config: Any) -> Judge:
        """What the answer is judged by."""
        scale: TargetScale = getattr(config, "target_scale", "logprob")
        mean = getattr(config, "reduce", "sum") == "mean"
        if layout.answer:
            return Judge(layout.predictors, layout.answer, scale, layout.against, mean)
        return judge_of(layout, model.run(layout.tokens, logits=list(layout.predictors)).logits.plain, scale, mean=mean)


class LeaveOut(AblationMethod):
    """What the answer loses with each unit of the prompt."""

    name = "leave_out"
    requires = frozenset({"causal", "embed", "resid_post"})
    Config = LeaveOutConfig

    def removals(self, units: Sequence[Unit], config: Any) -> list[list[int]]:
        """One unit each."""
        return [[number] for number in range(len(units))]

    def attribute(self, model: ic.Model, layout: Layout, config: LeaveOutConfig) -> Attributed:
        """All units of one row."""
        work, judge = self.ablation(model, layout, config), self.judge(model, layout, config)
        price = work.price(judge)
        clean, values = work.run(judge)
        losses = clean - values
        notes = {**described(work, judge, price), "full": float(clean), "units": listed(work.units, losses, "loss")}
        return Attributed(spread(layout, work.units, losses), notes=notes)


def spread(layout: Layout, units: Sequence[Unit], values: Float[Tensor, " unit"]) -> Float[Tensor, " pos"]:
    """Each unit's number in equal parts on its tokens."""
    scores = torch.zeros(layout.length, dtype=values.dtype)
    for unit, value in zip(units, values, strict=True):
        scores[list(unit.positions)] += value / len(unit.positions)
    return scores


def described(work: Ablation, judge: Judge, price: Price) -> dict[str, Any]:
    """Convention, target scale and price, for the record."""
    return {
        "explains": judge.name, "answer": list(judge.ids), "convention": work.convention,
        "positions": POSITIONS[work.convention], "replacement": work.token, "token_layers": price.token_layers,
        "naive": price.naive, "plan": price.explain(),
    }  # fmt: skip


def listed(units: Sequence[Unit], values: Tensor, name: str) -> list[dict[str, Any]]:
    """Units with their numbers, for the record."""
    return [
        {"unit": unit.name, "positions": list(unit.positions), name: float(value)}
        for unit, value in zip(units, values, strict=True)
    ]
