"""Causal curves of one sample: every intervention at every layer, through sweeps.

    curve name      "replace:blind random", "knockout:text window 3", "truncation": intervention and mode
    value           a score of the intervened run (sample.py); of noise the mean over draws, of `token` the first draw's

Source: interventions.py. Shapes: per score `[layer]`. Cost: a clean run, one per other image, a sweep per curve:
knockout, truncation, text rows and blind replacement with additions following change text rows alone.
Must equal: one run with hooks per layer (tests/test_visual_method.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import visual

from .interventions import (
    Clean,
    Deepstack,
    Intervention,
    Variant,
    band_width,
    knockouts,
    noisy,
    read_clean,
    replacements,
)
from .sample import AnswerScores, Sample, demand_twin


@dataclass(frozen=True)
class Plan:
    """What is run on every sample.

    Attributes:
        interventions: parsed.
        layers: of each curve.
        n_layers: of the model.
        width: of knockouts, in layers.
        deepstack: policy of replacements.
        reference: rows of replace:mean_dataset.
        scale, draws, seed: of noise.
        strategy: of the sweeps.
    """

    interventions: tuple[Intervention, ...]
    layers: tuple[int, ...]
    n_layers: int
    width: int = 1
    deepstack: Deepstack = "follow"
    reference: visual.States | None = None
    scale: float = 1.0
    draws: int = 5
    seed: int = 0
    strategy: str = "auto"


@dataclass(frozen=True, eq=False)
class Measured:
    """What one sample gave.

    Attributes:
        clean: scores without intervention.
        blind: by mode, scores of the run with that blind image.
        curves: by curve name, scores by layer.
        hit: by curve name, layers really changed.
    """

    clean: Mapping[str, float]
    blind: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Mapping[str, Float[Tensor, " layer"]]]
    hit: Mapping[str, tuple[int, ...]]


class Measuring:
    """One sample's runs.

    Args:
        blind, swap: other images of the same text, by mode.
    """

    def __init__(
        self, model: ic.Model, sample: Sample, plan: Plan, blind: Mapping[str, ic.Tokens], swap: Mapping[str, ic.Tokens]
    ) -> None:
        self.model, self.sample, self.plan = model, sample, plan
        self.others = {"blind": blind, "swap": swap}
        for kind, modes in self.others.items():
            for mode, tokens in modes.items():
                demand_twin(sample, tokens, f"the {kind} image {mode!r}")
        self.scores = AnswerScores(sample)
        self.sources: dict[tuple[str, str], Clean] = {}

    def run(self) -> Measured:
        """All curves."""
        self.clean, logits = read_clean(self.model, self.sample, self.sample.tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # before any sweep: KL is from the clean run, in every score that follows
        self.scores.reference = torch.log_softmax(logits[0, 0], -1)
        clean = _numbers(self.scores.of(logits))
        blind = {}
        for kind, modes in self.others.items():
            for mode, tokens in modes.items():
                self.sources[kind, mode], other = read_clean(self.model, self.sample, tokens)
                if kind == "blind":
                    blind[mode] = _numbers(self.scores.of(other.to(logits.dtype)))
        curves, hit = {}, {}
        for intervention in self.plan.interventions:
            for mode in self.others[intervention.sources] if intervention.sources else [""]:
                name = curve_name(intervention, mode, self.plan)
                curves[name], hit[name] = self._curve(intervention, mode)
        return Measured(clean, blind, curves, hit)

    def _curve(self, intervention: Intervention, mode: str) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        plan, sample, clean = self.plan, self.sample, self.clean
        if intervention.kind in ("knockout", "truncation", "band"):
            return self._swept(sample.tokens, knockouts(self.model, sample, intervention, plan.layers, plan.width))
        source = self.sources[intervention.sources, mode] if intervention.sources else None
        if source is not None and intervention.kind == "text":
            return self._swept(sample.tokens, replacements(source.text, plan.layers))
        if source is not None and plan.deepstack == "follow":
            # with all visual rows and additions of the other run, the text rows are all that is not that run
            return self._swept(self.others[intervention.sources][mode], replacements(clean.text, plan.layers))
        if intervention.what == "noise":
            seeds = [plan.seed + draw for draw in range(plan.draws)]
            return self._swept(
                sample.tokens, noisy(sample, clean.image, plan.layers, plan.deepstack, plan.scale, seeds)
            )
        replacement = self._made(intervention.what) if source is None else source.image
        return self._swept(sample.tokens, replacements(replacement, plan.layers, plan.deepstack))

    def _made(self, what: str) -> visual.States:
        """Rows made of the sample's own, or of the data set's."""
        if what == "mean_dataset":
            assert self.plan.reference is not None
            return self.plan.reference
        return visual.zeros(self.clean.image) if what == "zero" else visual.own_mean(self.clean.image)

    def _swept(self, tokens: ic.Tokens, variants: Sequence[Variant]) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        edits = [variant.edits for variant in variants]
        sweeps = self.model.sweep(tokens, edits, self.scores.listed(), strategy=self.plan.strategy)
        per = len(variants) // len(self.plan.layers)
        values = {sweep.score: sweep.values[:, 0].reshape(-1, per) for sweep in sweeps}
        # ids of tokens have no mean: the first draw's stands for all
        means = {name: x[:, 0] if name == "token" else x.mean(-1) for name, x in values.items()}
        return means, tuple(variant.hit for variant in variants[::per])


def curve_name(what: Intervention, mode: str, plan: Plan) -> str:
    """Intervention and mode, by which records know a curve."""
    said = [mode] if mode else []
    if what.kind == "knockout":
        said.append(f"window {plan.width}")
    if what.kind == "replace" and plan.deepstack == "keep":
        said.append("keep")
    return " ".join([what.name, *said])


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value[0]) for name, value in values.items()}


def demand(model: ic.Model, plan: Plan, blind: bool, swap: bool) -> None:
    """Refuse what this model or these settings cannot do, before anything runs.

    Raises:
        PlanError: another image that is needed and not given, layers that there are not, no reference rows.
        CapabilityError: a site that cannot be changed.
    """
    available = {"blind": blind, "swap": swap, "": True}
    for intervention in plan.interventions:
        name, other = intervention.name, intervention.sources
        if not available[other]:
            raise ic.PlanError(f"{name} needs another image: visual(model, tokens, {other}=tokens_with_it)")
        site = "pattern" if intervention.kind in ("knockout", "truncation", "band") else "resid_pre"
        if intervention.kind == "band":
            band_width(model, intervention)
        if why := model.can(site, "write"):
            raise ic.CapabilityError(f"{name}: {why}")
        if intervention.what == "mean_dataset" and not isinstance(plan.reference, visual.States):
            raise ic.PlanError("replace:mean_dataset needs reference=ic.visual.dataset_mean(runs)")
    # refuse layers and widths that there are not, by what would refuse them later
    model.layers(S.resid_pre[list(plan.layers)])
    visual.window(model, plan.layers[0], plan.width)
