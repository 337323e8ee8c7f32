"""Method `route_utility`: what the token that follows would have been worth under other routes of the same cost.

    u(A)      log p(next token | one token's experts in one layer are A), everything else as it is
    regret    G = max(0, max over alternatives u(A) - u(native))
    better    share of alternatives with u(A) > u(native)
    spearman  over {native} + alternatives, of Σ log p_router(e in A) with u(A): how well the router ranks routes
    control   the same maximum over as many random sets: a maximum over draws is above 0 by luck alone, so that
              regret means something above `regret_random` only
    fragile   the quarter of the tokens with the lowest u(native)

Alternatives are sets of as many experts (routes.py). Weights: `own`, by the family's rule on the router's own logits
(`S.router_logits.force`: renormalised only if the family does); or `native_renorm`, these rescaled to the sum of the
native set's, so that routes differ in their experts and not in how much is added at all. The two are one where a family
renormalises. Differences within rounding count as none; rounding is measured on the model, by forcing the native set
beside the alternatives.

Source: after arXiv:2605.07260, whose abstract leaves number, temperature, weights and layers open: they are settings
here. The control is this package's.
Cost: of a token at position t, in a model of L layers, (t + 1) L token-layers, and L - l for each set in layer l, of
which there are 2 m + 1 or fewer: one sweep of the text that ends there. One pass over a whole text reads the routing.
Must equal: a forward pass per route; the native set gives the native run within 1e-6; identical experts swapped give 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

import interp_core as ic
from interp_core import score
from interp_core import sites as S

from .._places import PlacesConfig
from .reading import SITES, demand_reading, read
from .route_results import RouteUtilityResult
from .routed import Routed
from .routes import COUNTS, Kind, Route, alternatives, log_score, random_routes

Weights = Literal["own", "native_renorm"]


class RouteUtilityConfig(PlacesConfig):
    """Settings of route utility.

    Attributes:
        at: which tokens are routed otherwise, as `Site.at` takes positions, each with a token after it; None: all such.
        layers: in which layers, one at a time; None: all that have experts.
        routes: "gumbel" draws sets by the router's probabilities, "swap_last" replaces the weakest expert.
        alternatives: how many; None: 16 draws, or 4 swaps.
        weights: "own" weighs a set as the family does, "native_renorm" rescales that to the native set's sum.
        temperature: of the draws; above 1 they are more even.
        seed: of draws and random sets; they depend on the text before a token and its layer, not on the batch.
        progress: tell on standard error how far the work is.
    """

    layers: list[int] | None = None
    routes: Kind = "gumbel"
    alternatives: int | None = Field(default=None, ge=1, le=1024)
    weights: Weights = "own"
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)
    progress: bool = False

    @property
    def count(self) -> int:
        """How many alternatives are wanted."""
        return COUNTS[self.routes] if self.alternatives is None else self.alternatives


class Cell(NamedTuple):
    """A token in a layer: its native set first and then the alternatives; random sets; and Σ log p of the former."""

    layer: int
    sets: list[Route]
    random: list[Route]
    scores: list[float]
    total: float

    def edits(self, route: Route, weights: Weights) -> list[ic.Edit]:
        """What makes the last token take a route here."""
        force = S.router_logits[self.layer].at(-1).force(list(route))
        if weights == "own":
            return [force]
        total = self.total

        def rescaled(w: Tensor) -> Tensor:
            own = w.sum(-1, keepdim=True)
            return w * torch.where(own == 0, 1, total / own)

        return [force, S.router_weights[self.layer].at(-1).apply(rescaled)]


class RouteUtility(ic.Method):
    """What other routes of the same cost would have been worth, token by token and layer by layer."""

    name = "route_utility"
    requires = frozenset(site.name for site in SITES)
    Config = RouteUtilityConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: RouteUtilityConfig) -> None:
        """The model has routers that leave a choice, and every prompt tokens with another one after them."""
        demand_reading(self.name, model)
        layers_of(model, config)
        if tokens.inputs:
            raise ic.TextError(f"{self.name} takes text alone, not {', '.join(tokens.inputs)}")
        for row in tokens:
            columns_of(row, config.at)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: RouteUtilityConfig) -> RouteUtilityResult:
        """One sweep per token, on the text up to it."""
        layers = layers_of(model, config)
        n_experts, k = model.sizes(S.router_logits[layers[0]])["expert"], model.sizes(S.router_indices)["k"]
        table = Table(tokens, len(layers), config.count, k)
        for number, row in enumerate(tokens):
            text_columns = tokens.rows.real[number]
            table.token_layers += row.ids.shape[1] * (model.layers(S.router_logits)[-1] + 1)  # reading the routing
            for place, column, cells in _cells(model, row, layers, config):
                table.add(number, text_columns[place], cells, *_swept(model, row, column, cells, config))
            at = [row.rows.real[0].index(column) for column in columns_of(row, config.at)]
            table.labels.append(tuple(row.labels[0][place] for place in at))
            table.targets.append(tuple(row.labels[0][place + 1] for place in at))
        return RouteUtilityResult(
            **table.tensors(), token_labels=tuple(table.labels), target_labels=tuple(table.targets),
            layers=tuple(layers), model=Path(model.source).name, n_layers=model.n_layers, n_experts=n_experts, top_k=k,
            routes=config.routes, alternatives=config.count, weights=config.weights,
            temperature=config.temperature, seed=config.seed, dtype=str(model.dtype).removeprefix("torch."),
        )  # fmt: skip


class Table:
    """The tensors of a result, filled token by token: not a number, or 0, where nothing is asked for."""

    def __init__(self, tokens: ic.Tokens, n_layers: int, count: int, k: int) -> None:
        shape = *tokens.ids.shape, n_layers

        def empty(*sizes: int) -> Tensor:
            return torch.full(sizes, torch.nan, dtype=torch.float64)

        self.native, self.rounding = empty(*shape[:2]), empty(*shape[:2])
        self.utility, self.scores = empty(*shape, count + 1), empty(*shape, count + 1)
        self.random = empty(*shape, count)
        self.experts = torch.zeros(*shape, count + 1, k, dtype=torch.int16)
        self.labels: list[tuple[str, ...]] = []
        self.targets: list[tuple[str, ...]] = []
        self.token_layers = self.naive = 0

    def add(self, row: int, column: int, cells: list[Cell], values: list[dict[Route, float]], swept: ic.Sweep) -> None:
        """A token's routes, and what each of them is worth."""
        native = float(swept.clean[0])
        self.native[row, column] = native
        # the native set, forced, is the same computation by another path: what it is off by is what rounding can do
        self.rounding[row, column] = max(abs(of[cell.sets[0]] - native) for cell, of in zip(cells, values, strict=True))
        for i, (cell, of) in enumerate(zip(cells, values, strict=True)):
            here = row, column, i, slice(len(cell.sets))
            worth = [native, *(of[route] for route in cell.sets[1:])]
            self.utility[here] = torch.tensor(worth, dtype=torch.float64)
            self.scores[here] = torch.tensor(cell.scores, dtype=torch.float64)
            self.experts[here] = torch.tensor(cell.sets, dtype=torch.int16)
            drawn = torch.tensor([of[route] for route in cell.random], dtype=torch.float64)
            self.random[row, column, i, : len(drawn)] = drawn
        self.token_layers += swept.plan.token_layers
        self.naive += swept.plan.naive

    def tensors(self) -> dict[str, Tensor]:
        """By the result's fields."""
        names = ("native", "rounding", "utility", "scores", "random", "experts")
        return {name: getattr(self, name) for name in names} | {
            "token_layers": torch.tensor(self.token_layers), "naive": torch.tensor(self.naive)
        }  # fmt: skip


def layers_of(model: ic.Model, config: RouteUtilityConfig) -> list[int]:
    """The layers that are asked for, in order.

    Raises:
        SiteError: one without experts.
        PlanError: none, or routers that give every token all experts, so that there is one route.
    """
    routed = model.layers(S.router_logits)
    layers = routed if config.layers is None else sorted({i + model.n_layers if i < 0 else i for i in config.layers})
    for layer in layers:
        if layer not in routed:
            raise ic.SiteError(
                f"route_utility: layer {layer} of {model.source} has no experts; those that have: {routed}"
            )
    if not layers:
        raise ic.PlanError("route_utility: layers=[] names none; leave it out for all that have experts")
    k = model.sizes(S.router_indices)["k"]
    for layer in layers:
        if (n := model.sizes(S.router_logits[layer])["expert"]) <= k:
            raise ic.PlanError(
                f"route_utility: layer {layer} of {model.source} gives every token all {n} experts: there is one "
                "route, and nothing to compare it with"
            )
    return layers


def columns_of(row: ic.Tokens, at: Any) -> list[int]:
    """Columns of a row's tokens that are routed otherwise; each has a token after it.

    Raises:
        PositionError: one that has none, or no position at all.
    """
    last = row.rows.real[0][-1]
    columns = row.columns(at)[0]
    if at is None:
        columns = columns[:-1]
    if last in columns or not columns:
        raise ic.PositionError(
            f"route_utility: at={at!r} in a text of {row.lengths[0]} tokens: a route is judged by the token that "
            "follows, and the last one has none; at=-2 is the last that has"
        )
    return columns


def _cells(
    model: ic.Model, row: ic.Tokens, layers: list[int], config: RouteUtilityConfig
) -> Iterator[tuple[int, int, list[Cell]]]:
    """Of each token its number among the row's real ones, its column, and its routes in every layer."""
    routed = read(model, row)
    for column in columns_of(row, config.at):
        place = row.rows.real[0].index(column)
        before = row.ids[0, row.rows.real[0][: place + 1]].tolist()
        yield place, column, [_cell(routed[layer].take([place]), layer, before, config) for layer in layers]


def _cell(routed: Routed, layer: int, before: list[int], config: RouteUtilityConfig) -> Cell:
    """A token's routes in a layer."""
    probs, native = routed.need("probs")[0].double().cpu(), tuple(routed.chosen[0].nonzero()[:, 0].tolist())
    # seeded by the text up to the token and the layer, so that a token's draws do not depend on its batch
    generator = torch.Generator().manual_seed(int(ic.runs.digest([config.seed, layer, before])[:12], 16))
    others = alternatives(config.routes, probs, native, config.count, config.temperature, generator)
    sets = [native, *others]
    # as many as there are alternatives, or the larger maximum would be that of more draws
    random = random_routes(len(probs), native, len(others), generator)
    scores = [log_score(probs, route) for route in sets]
    return Cell(layer, sets, random, scores, float(routed.need("weights")[0].double().sum()))


def _swept(
    model: ic.Model, row: ic.Tokens, column: int, cells: list[Cell], config: RouteUtilityConfig
) -> tuple[list[dict[Route, float]], ic.Sweep]:
    """What every route of a token is worth, by layer; each set runs once."""
    following = row.rows.real[0][row.rows.real[0].index(column) + 1]
    text = ic.Tokens(row.ids[:, : column + 1], row.mask[:, : column + 1])
    wanted = [list(dict.fromkeys((*cell.sets, *cell.random))) for cell in cells]
    variants = [cell.edits(route, config.weights) for cell, sets in zip(cells, wanted, strict=True) for route in sets]
    judged = score.logprob(int(row.ids[0, following]), at=-1)
    swept = model.sweep(text, variants, judged, progress=config.progress)
    if swept.failed:
        raise ic.EffectError(f"route_utility: log-probabilities that are not numbers, first with {swept.failed[0]}")
    values = iter(swept.values[:, 0].double().tolist())
    return [{route: next(values) for route in sets} for sets in wanted], swept
