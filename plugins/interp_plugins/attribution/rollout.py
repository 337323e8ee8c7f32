"""Attention rollout: attention multiplied through the layers, half of each the residual stream.

    R_l = (r I + (1 - r) A_l) R_(l-1),  R_0 = I        A_l the mean of layer l's patterns over heads, r = 1/2
    score(j) = mean over the answer's predictors i of R_L[i, j]

profile="reference" is the baseline that published experiments call attention: the last layer's patterns alone, averaged
over heads and over *all* queries before the explained token (not those that predict it), times integrated gradients of
that token in the reference profile:

    row(p) = (mean over queries i < p of A_L[i]) · IG(p)        score = mean over the sink's tokens p of row(p)

Source: Abnar and Zuidema (2020), arXiv:2005.00928; the reference is FlashTrace (Pan et al. 2026), arXiv:2602.01914.
Cost: a forward pass with attention in the open, layer by layer, and a product `[query key]` by `[query key]` per layer.
Must equal: the product of all layers' matrices; rows add up to 1 where patterns do.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .ablations.judge import wide
from .gradients import IntegratedConfig, IntegratedGradients
from .layout import Layout
from .method import Attributed, Attribution, AttributionConfig


class RolloutConfig(AttributionConfig):
    """Settings of attention rollout.

    Attributes:
        residual: share of the residual stream in each layer.
        steps: of integrated gradients, in the reference profile.
    """

    residual: float = 0.5
    steps: int = 20


class AttentionRollout(Attribution):
    """Attention from the answer's predictors through all layers to the tokens."""

    name = "attention_rollout"
    requires = frozenset({"causal", "pattern", "resid_post"})
    Config = RolloutConfig
    contrastive = False

    def check(self, model: ic.Model, tokens: ic.Tokens, config: RolloutConfig) -> None:
        """Every layer has a pattern; the share is one."""
        if not 0 <= config.residual < 1:
            raise ic.PlanError(f"{self.name}: residual={config.residual}; take a share of at least 0 and less than 1")
        lacking = sorted({*range(model.n_layers)} - {*model.layers(S.pattern)})
        if lacking and config.profile == "sound":
            raise ic.CapabilityError(
                f"{self.name} multiplies the patterns of all layers, and layers {lacking} of {model.source} have none "
                "(linear attention); use a method by gradient or ablation"
            )
        if config.profile == "reference":
            IntegratedGradients().check(model, tokens, _integrated(config))
        super().check(model, tokens, config)

    def attribute(self, model: ic.Model, layout: Layout, config: RolloutConfig) -> Attributed:
        """One pass, layer by layer."""
        if config.profile == "reference":
            return self._reference(model, layout, config)
        flow = rollout(model, layout.tokens, config.residual)
        scores = flow[list(layout.predictors)].mean(0)
        notes = {"explains": "attention, no logit", "residual": config.residual, "heads": "mean"}
        return Attributed(scores, flow[[p - 1 for p in layout.target]] if len(layout.target) else None, notes=notes)

    def _reference(self, model: ic.Model, layout: Layout, config: RolloutConfig) -> Attributed:
        integrated = IntegratedGradients().attribute(model, layout, _integrated(config))
        stops = list(layout.target) or [layout.length]
        attention = last_layer(model, layout.tokens, stops)
        gradients = integrated.scores[None] if integrated.rows is None else integrated.rows
        rows = attention * gradients.to(attention)
        sink = [stops.index(p) for p in layout.sink] or [0]
        notes = {**integrated.notes, "attention": "last layer, mean over heads and over all queries before the token"}
        return Attributed(
            rows[sink].mean(0), rows if len(layout.target) else None, stream=integrated.stream, notes=notes
        )


def rollout(model: ic.Model, tokens: ic.Tokens, residual: float = 0.5) -> Float[Tensor, "query key"]:
    """The product of all layers' matrices, of one row."""
    flow: list[Tensor] = []

    def layer(_: int, values: ic.LayerReadings) -> None:
        step = wide(values[S.pattern][0]).mean(0).mul_(1 - residual)
        # written into the step itself: one matrix [query key] per layer is alive beside the product
        step.diagonal().add_(residual)
        flow[:] = [step @ flow[0] if flow else step]

    model.run(tokens, read=S.pattern, each=layer, logits=False)
    return flow[0]


def last_layer(model: ic.Model, tokens: ic.Tokens, stops: list[int]) -> Float[Tensor, "stop key"]:
    """The last layer's attention, mean over heads and over the queries before each stop."""
    site = S.pattern[model.layers(S.pattern)[-1]]
    # running sums: the mean over the queries before any stop is one row over its number
    sums = wide(model.run(tokens, read=site, logits=False)[site].plain[0]).mean(0).cumsum(0)
    return torch.stack([sums[stop - 1] / stop for stop in stops])


def _integrated(config: RolloutConfig) -> IntegratedConfig:
    return IntegratedConfig(profile="reference", steps=config.steps, sink=config.sink, thinking=config.thinking)
