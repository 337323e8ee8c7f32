"""Attribution patching: the effects of all patches at once, estimated by gradients.

    gradient      effect(v) ≈ <v' - v, d score / d v>                               at the base run
    inputs        effect(v) ≈ <v' - v, mean over α of d score / d v>                at the run whose inputs are
                                                                                    x + α (x' - x)
    activations   effect(v) ≈ <v' - v, mean over α of d score / d v>                at the base run with the site of v's
                                                                                    layer set to v + α (v' - v), at all
                                                                                    heads and places asked for at once;
                                                                                    layers above follow
    α = (k - 1/2) / steps, k = 1 … steps
    relp          effect(v) ≈ <v' - v, relevance coefficient of v>                  at the base run

With `rule="relp"` the gradient's place is taken by coefficients of layer-wise relevance propagation: the same backward
pass with other rules (`relp_rules`) for norms, activations, gated products and patterns, see
`interp_plugins.attribution.relevance.rules`.

v is the base run's value of a patch, v' the source run's (zero without a corrupted prompt), x and x' the streams that
enter the first block. Effects are shares of the difference, as in activation patching.

Source: the gradient Nanda (2023), "Attribution Patching"; Syed et al. (2023), arXiv:2310.10348. The integrals Hanna et
al. (2024), arXiv:2403.17806: "inputs" is their EAP-IG, "activations" the variant of it that moves the activations of a
layer; both by the midpoint rule, where theirs is k / steps. Integrated gradients: Sundararajan et al. (2017),
arXiv:1703.01365. RelP: Jafari et al. (2025), "RelP: Faithful and Efficient Circuit Discovery via Relevance Patching".

Cost: of the gradient, with rules or without, two forward passes and one backward; of "inputs" steps × (forward +
backward), of "activations" steps × layers × (forward + backward). `compare` adds the exact sweep.
Must equal: the gradient is the effect of a small step of the patch, scaled up; the effects by "activations" in a layer
add up to that of patching all its heads and places together, as steps grow. RelP of what turns a normed vector and
keeps its length is the effect itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core.score import Score

from ._contrast import Contrast, ContrastConfig, Contrasted, contrast
from ._maps import Grid, MapConfig, MapResult, Values, grid_of, named, patches, swept, values
from ._pictures import Picture
from .attribution.relevance.rules import GRADIENT, Rules, relp

ROUNDING = 1e-6
"""Of the largest effect, below which the order of patches is left to chance."""


class AttributionPatchingConfig(MapConfig, ContrastConfig):
    """Settings of attribution patching.

    Attributes:
        steps: points of the integral; 0 takes the gradient of the base run alone.
        along: what moves from one run to the other in the integral: the "inputs" of the first block, or the
            "activations" of the site, layer by layer.
        compare: also sweep, and say how well the estimate ranks the patches.
        top_k: of how many strongest patches to count the overlap.
        rule: how the backward pass goes: by the "gradient", or by "relp".
        relp_rules: of "relp": "paper" is ln, identity and half, "published_demo" what the published demo switches on
            (ln and half); or names of ln, identity, half and ah (patterns are constants) as a list.
    """

    steps: int = 0
    along: Literal["inputs", "activations"] = "inputs"
    compare: bool = False
    top_k: int = 10
    rule: Literal["gradient", "relp"] = "gradient"
    relp_rules: str | list[str] = "paper"


class Agreement(NamedTuple):
    """How well estimates fit exact effects, per batch row."""

    pearson: Float[Tensor, " batch"]
    spearman: Float[Tensor, " batch"]
    overlap: Float[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class AttributionPatchingResult(Contrasted, MapResult):
    """Estimated effects.

    Attributes:
        exact: effects by the sweep, if they were compared.
        pearson, spearman: correlation of estimated and exact effects over all patches, and of their ranks.
        overlap: share of the `top_k` strongest patches (by size) that both name.
        steps, along: of the integral.
        top_k: at most the number of patches.
        rules: the rules of the backward pass that held; empty for the gradient.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **MapResult.AXES, **Contrasted.AXES, "exact": ("batch", "layer", "head", "pos"), "pearson": ("batch",),
        "spearman": ("batch",), "overlap": ("batch",),
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = {**MapResult.JOINS, **Contrasted.JOINS}
    exact: Float[Tensor, "batch layer head pos"] | None
    pearson: Float[Tensor, " batch"] | None
    spearman: Float[Tensor, " batch"] | None
    overlap: Float[Tensor, " batch"] | None
    steps: int
    along: str
    top_k: int
    rules: str = ""

    @property
    def title(self) -> str:
        """What the map shows."""
        how = f"{self.steps} steps along the {self.along}" if self.steps else self.rules or "gradient"
        return f"{super().title}, by {how}"

    @property
    def agreement(self) -> str:
        """The comparison with the sweep in a sentence; empty without one."""
        if self.pearson is None or self.spearman is None or self.overlap is None:
            return ""
        return (
            f"against the sweep: Pearson {self.pearson.mean():.3f}, Spearman {self.spearman.mean():.3f}, "
            f"{self.overlap.mean():.0%} of the {self.top_k} strongest"
        )

    def table(self) -> list[dict[str, Any]]:
        """One row per patch, averaged over batch rows, beside the exact effect if there is one."""
        rows = super().table()
        exact = [] if self.exact is None else self.exact.mean(0).flatten().tolist()
        return [row | {"exact": value} for row, value in zip(rows, exact, strict=True)] if exact else rows

    def __str__(self) -> str:
        return "\n".join(part for part in (super().__str__(), self.agreement) if part)

    def pictures(self) -> list[Picture]:
        """The estimate, and the exact effects if there are some."""
        first, exact = super().pictures()[0], self.exact
        if exact is None:
            return [first]
        folded = self._folded(exact)
        top = max(float(self.mean.abs().max()), float(folded.abs().max())) or 1.0
        title = f"{first.title}; {self.agreement}"
        beside = Picture(f"{super().title}, by sweep", folded.tolist(), self.rows, self.columns, (-top, top))
        return [first._replace(title=title, limits=(-top, top)), beside]


class AttributionPatching(ic.Method):
    """All effects of patching at once, estimated by gradients; how well, on request."""

    name = "attribution_patching"
    Config = AttributionPatchingConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: AttributionPatchingConfig) -> None:
        """Sites, layers and positions that all prompts have; rules that the model can follow."""
        grid_of(self.name, model, tokens, config)
        _rules(config).demand_reach(model)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: AttributionPatchingConfig) -> AttributionPatchingResult:
        """Gradients at one run or along a line of them; then the sweep, if asked for."""
        grid = grid_of(self.name, model, tokens, config)
        for site in grid.sites:
            if why := model.can(site.name, "grad"):
                raise ic.CapabilityError(f"{self.name} of {site}: {why}; use activation_patching")
        if isinstance(config.score, Score) and config.score.of is not None:
            raise ic.PlanError(
                f"{self.name}: score {config.score.name} reads {config.score.of}, gradients go from logits"
            )
        if config.steps < 0 or config.top_k < 1:
            raise ic.PlanError(f"{self.name}: steps={config.steps}, top_k={config.top_k}: at least 0 and 1")
        inputs = [S.resid_pre[0]] if config.steps and config.along == "inputs" else []
        pair = contrast(self.name, model, tokens, config, [*grid.reads, *inputs], [*grid.reads, *inputs])
        here = values(pair.base, grid)
        there = values(pair.source, grid) if pair.source else {k: torch.zeros_like(v) for k, v in here.items()}
        effect = grid.shaped(pair.share(self._estimated(model, pair, grid, here, there, config)))
        exact: Tensor | None = None
        agreed: Agreement | tuple[None, None, None] = (None, None, None)
        chosen = _rules(config)
        explain, top_k = _cost(config, grid), min(config.top_k, effect[0].numel())
        if config.compare:
            edits = patches(grid, None if pair.source is None else there)
            sweep = swept(model, pair.base.tokens, edits, pair.judged, config)
            exact = grid.shaped(pair.share(sweep.effects))
            agreed, explain = agreement(effect, exact, top_k), f"{explain}\n{sweep.plan.explain()}"
        return AttributionPatchingResult(
            effect=effect, explain=explain, exact=exact, pearson=agreed[0], spearman=agreed[1], overlap=agreed[2],
            steps=config.steps, along=config.along, top_k=top_k, rules="" if chosen.empty else str(chosen),
            **named(grid), **pair.named(),
        )  # fmt: skip

    def _estimated(
        self,
        model: ic.Model,
        pair: Contrast,
        grid: Grid,
        here: Values,
        there: Values,
        config: AttributionPatchingConfig,
    ) -> Float[Tensor, "patch batch"]:
        """First-order effects of all patches, summed over the sites that are changed together."""
        grads: dict[tuple[str, int, int], Tensor] = {}
        with _rules(config).on(model):
            for layers, edits, share in _runs(pair, grid, here, there, config):
                for key, grad in _gradients(model, pair, grid._replace(layers=layers), edits).items():
                    grads[key] = grads.get(key, 0) + share * grad
        steps = {key: torch.where(there[key] == here[key], 0, there[key] - here[key]) for key in grads}  # also of -inf
        effects = torch.zeros(*grid.shape, len(pair.low), dtype=pair.low.dtype)
        for site in grid.sites:
            for i, layer in enumerate(grid.layers):
                for n in range(len(grid.places)):
                    step, grad = steps[site.name, layer, n], grads[site.name, layer, n]
                    part = step.to(torch.promote_types(step.dtype, torch.float32)) * grad
                    part = part[:, None] if grid.heads == [None] else part.movedim(grid.axis(site, n), 1)
                    effects[i, :, n] += part.reshape(*part.shape[:2], -1).sum(-1).T.to(effects)
        return effects.flatten(0, 2)


def _rules(config: AttributionPatchingConfig) -> Rules:
    """The rules of the backward pass.

    Raises:
        PlanError: a rule that RelP does not have, or an integral of coefficients.
    """
    if config.rule == "gradient":
        return GRADIENT
    if config.steps:
        raise ic.PlanError(
            f'attribution_patching: rule="relp" takes one run, not steps={config.steps}; leave steps out'
        )
    return relp(config.relp_rules)


def _runs(
    pair: Contrast, grid: Grid, here: Values, there: Values, config: AttributionPatchingConfig
) -> Iterable[tuple[list[int], list[ic.Edit], float]]:
    """The runs whose gradients are averaged: layers that are differentiated, edits, weight."""
    if not config.steps:
        yield grid.layers, [], 1.0
        return
    points = [(k + 0.5) / config.steps for k in range(config.steps)]
    if config.along == "inputs":
        first = S.resid_pre[0]
        x = pair.base[first].plain
        y = torch.zeros_like(x) if pair.source is None else pair.source[first].plain
        for point in points:
            yield grid.layers, [first.set(torch.lerp(x, y, point))], 1 / config.steps
        return
    for layer in grid.layers:
        starts, stops = ([part for site in grid.sites for part in _joined(grid, site, layer, x)] for x in (here, there))
        for point in points:
            edits = [at.set(torch.lerp(a, b, point)) for (at, a), (_, b) in zip(starts, stops, strict=True)]
            yield [layer], edits, 1 / config.steps


def _joined(grid: Grid, site: S.Site, layer: int, patched: Values) -> list[tuple[S.Site, Tensor]]:
    """A layer's values at all places, and where they belong; all tokens as one, since each edit copies the site."""
    parts = [patched[site.name, layer, place] for place in range(len(grid.places))]
    if len(parts) > 1 and grid.places == list(range(len(parts))):
        axis = next(i for i, name in enumerate(site.info.axes) if name in ("pos", "query"))
        return [(site[layer].at(grid.places), torch.stack(parts, axis))]
    return [(grid.where(site, layer, place), part) for place, part in enumerate(parts)]


def _gradients(model: ic.Model, pair: Contrast, grid: Grid, edits: list[ic.Edit]) -> Values:
    """Gradients of the score at every layer and place of a run."""

    def total(logits: Tensor) -> Tensor:
        score = pair.judged.rows(logits).sum()
        if not score.requires_grad:
            raise ic.PlanError(
                f"attribution_patching: score {pair.judged.name} has no gradient; use activation_patching"
            )
        return score

    reads = [site[layer] for site in grid.sites for layer in grid.layers]
    run = model.run(pair.base.tokens, read=reads, edits=edits, grad=total, logits=pair.judged.at, allow_noop=True)
    return values(run.grad, grid)


def _cost(config: AttributionPatchingConfig, grid: Grid) -> str:
    passes = max(1, config.steps) * (len(grid.layers) if config.steps and config.along == "activations" else 1)
    return f"{passes} forward and backward pass(es) for {torch.Size(grid.shape).numel()} patches"


def agreement(
    estimated: Float[Tensor, "batch layer head pos"], exact: Float[Tensor, "batch layer head pos"], top_k: int
) -> Agreement:
    """Correlation of values and of ranks, and overlap of the strongest, over all patches of each batch row; not a
    number where one side is the same everywhere. Effects under a millionth of the largest are rounding, and count as
    nought."""
    sides = [side.flatten(1).double() for side in (estimated, exact)]
    a, b = (side.where(side.abs() > ROUNDING * side.abs().amax(1, keepdim=True), 0) for side in sides)
    rows = range(len(a))
    pearson, spearman = (
        torch.tensor([correlation(a[i], b[i]) if len(a[i]) > 1 else math.nan for i in rows])
        for correlation in (ic.stats.pearson, ic.stats.spearman)
    )
    tops = [[set(x[i].abs().topk(top_k).indices.tolist()) for x in (a, b)] for i in rows]
    overlap = torch.tensor([len(mine & right) / top_k for mine, right in tops])
    return Agreement(pearson, spearman, overlap)
