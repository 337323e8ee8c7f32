"""Activation patching: which part of a model carries the difference between two prompts.

    denoising   effect(v) = (score(corrupted with v from clean) - score(corrupted)) / (score(clean) - score(corrupted))
    noising     effect(v) = (score(clean with v from corrupted) - score(clean)) / (score(corrupted) - score(clean))
    zero        effect(v) = score(clean with v set to zero) - score(clean)              (without a corrupted prompt)

v runs over layers, heads and positions of a site; score is the logit of the clean answer minus that of the other (of
zeros: the log-probability of the answer), at the last token. 1 is the whole difference, 0 none of it.

Source: Vig et al. (2020), arXiv:2004.12265; Meng et al. (2022), arXiv:2202.05262; denoising and noising as in
Heimersheim and Nanda (2024), arXiv:2404.15255.

Cost: two forward passes and the sweep: one clean pass, and (layers from v on) × (tokens from v on) per v.
Must equal: one full forward pass per v (the sweep's tests); patching everything at the first layer gives 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import interp_core as ic

from ._contrast import ContrastConfig, Contrasted, contrast
from ._maps import MapConfig, MapResult, grid_of, named, patches, swept, values


class PatchingConfig(MapConfig, ContrastConfig):
    """Settings of activation patching."""

    def cost(self, work: ic.Work) -> ic.Cost | None:
        """The runs of both prompts, and a sweep of the strategies that an ordinary model takes."""
        patched = self.patched(work)
        if patched is None or self.strategy not in ("auto", "staircase", "full"):
            return None
        both = work.forward() if self.corrupted is None else work.forward() + work.forward()
        if self.strategy == "full":
            return both + work.forward(work.prompts * (1 + sum(patched.values())), batch=1)
        return both + work.swept(patched)


@dataclass(frozen=True, eq=False)
class PatchingResult(Contrasted, MapResult):
    """Effects of patching."""

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {**MapResult.AXES, **Contrasted.AXES}
    JOINS: ClassVar[Mapping[str, str]] = {**MapResult.JOINS, **Contrasted.JOINS}


class ActivationPatching(ic.Method):
    """Which layers, heads and positions carry the difference between two prompts: exactly, by a sweep."""

    name = "activation_patching"
    Config = PatchingConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: PatchingConfig) -> None:
        """Sites, layers and positions that all prompts have."""
        grid_of(self.name, model, tokens, config)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: PatchingConfig) -> PatchingResult:
        """Sweep over the patches."""
        grid = grid_of(self.name, model, tokens, config)
        pair = contrast(self.name, model, tokens, config, there=grid.reads)
        source = None if pair.source is None else values(pair.source, grid)
        sweep = swept(model, pair.base.tokens, patches(grid, source), pair.judged, config)
        effect = grid.shaped(pair.share(sweep.effects))
        return PatchingResult(effect=effect, explain=sweep.plan.explain(), **named(grid), **pair.named())
