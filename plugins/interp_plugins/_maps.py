"""What studies over layers, heads and positions share: what is changed, the changes as edits, and the map of effects.

    patch (layer, head, place)    the site's value there := another; several sites together are one patch

Source: the maps of TransformerLens' `patching`, by sites, heads and positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import positions
from interp_core import score as scores
from interp_core import sites as S

from ._contrast import JudgedConfig
from ._pictures import Picture, Pictured, effect_words, of_rows

Values = Mapping[tuple[str, int, int], Tensor]
"""Values by site name, layer and number of the place: `[batch (pos) (head) d]`, or without batch for all rows."""
EACH = "each"


class MapConfig(JudgedConfig):
    """What maps can be set to.

    Attributes:
        site: what is changed: "z", "resid_pre", "attn_out", "mlp_out", "pattern" and the like; several change together.
        by: "head" changes the units of a site (heads, experts) one by one, "layer" all of a layer together.
        layers: which layers (None: all that have the site).
        at: where: a position as `Site.at` takes it, or a list of them, one after the other; "each" takes every token
            by itself, "all" all of them together.
    """

    site: str | list[str] = "z"
    by: Literal["head", "layer"] = "head"
    layers: list[int] | None = None
    at: Any = -1


class Grid(NamedTuple):
    """Everything that is changed, one patch per layer, head and place.

    Attributes:
        sites: changed together.
        layers, heads: numbers; a single None where units are not told apart.
        places: positions as `Site.at` takes them.
        names: of the places.
    """

    sites: tuple[S.Site, ...]
    layers: list[int]
    heads: list[int | None]
    places: list[Any]
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of layers, heads and places."""
        return len(self.layers), len(self.heads), len(self.places)

    @property
    def label(self) -> str:
        """The sites, for titles."""
        return " + ".join(site.name for site in self.sites)

    @property
    def reads(self) -> list[S.Site]:
        """What a run has to read; of many places, the whole site once."""
        whole = [site[layer] for site in self.sites for layer in self.layers]
        return whole if len(self.places) > 1 else [site.at(self.places[0]) for site in whole]

    def where(self, site: S.Site, layer: int, place: int) -> S.Site:
        """A site in one layer at one place, all units."""
        return site[layer].at(self.places[place])

    def axis(self, site: S.Site, place: int) -> int:
        """Where a value has its heads, counted from the end."""
        single = single_place(self.places[place])
        axes = [axis for axis in site.info.axes if not (single and axis in ("pos", "query"))]
        return axes.index(str(site.info.unit)) - len(axes)

    def shaped(self, effects: Float[Tensor, "patch batch"]) -> Float[Tensor, "batch layer head pos"]:
        """Effects in the order of `patches`, as a map."""
        return effects.unflatten(0, self.shape).movedim(-1, 0).contiguous()


def grid_of(owner: str, model: ic.Model, tokens: ic.Tokens, config: MapConfig) -> Grid:
    """Layers, heads and places that a study changes.

    Raises:
        SiteError, PositionError: they do not exist.
        CapabilityError: the site cannot be changed.
        PlanError: a site without positions, sites with different heads, rows that do not have the same positions.
    """
    names = [config.site] if isinstance(config.site, str) else config.site
    sites = tuple(S.named(name) for name in dict.fromkeys(names))
    if not sites:
        raise ic.PlanError(f"{owner}: site=[] names nothing; give a site, or several that are changed together")
    units: dict[str, list[int | None]] = {}
    layers: list[int] = []
    for site in sites:
        if why := model.can(site.name, "write"):
            raise ic.CapabilityError(f"{owner} of {site}: {why}")
        if not site.info.positions or not site.info.layered:
            raise ic.PlanError(f"{owner} takes sites of a layer along pos, {site} goes along {site.info.axes}")
        # layers that all sites have, in the order of the first
        having = model.layers(site if config.layers is None else site[config.layers])
        layers = [layer for layer in having if site is sites[0] or layer in layers]
        whole = site.info.unit is None or config.by == "layer"
        units[site.name] = [None] if whole else list(range(model.sizes(site[having[0]])[str(site.info.unit)]))
    if not layers:
        raise ic.PlanError(f"{owner}: no layer has all of {', '.join(units)}; patch them one by one")
    heads = units[sites[0].name]
    if any(of_site != heads for of_site in units.values()):
        counts = ", ".join(f"{name} {len(of_site)}" for name, of_site in units.items())
        raise ic.PlanError(f"{owner}: sites changed together need the same heads, here {counts}; by='layer' takes all")
    if tokens.padded and any("query" in site.info.axes for site in sites):
        raise ic.PlanError(f"{owner}: attention of padded rows differs in width; give rows of one length")
    return Grid(sites, layers, heads, *_places(owner, tokens, config.at))


def single_place(place: Any) -> bool:
    """Whether it is one position, whose axis is dropped."""
    return positions.is_single(positions.position(place))


def _places(owner: str, tokens: ic.Tokens, at: Any) -> tuple[list[Any], tuple[str, ...]]:
    """Places, each with as many positions in every row, and their names."""
    if at == EACH and len(set(tokens.lengths)) > 1:
        raise ic.PlanError(f"{owner}: rows have {tokens.lengths} tokens; choose positions that all have: at=-1")
    places = list(range(tokens.lengths[0])) if at == EACH else at if isinstance(at, list) else [at]
    if not places:
        raise ic.PlanError(f"{owner}: at=[] selects nothing; give positions, or at='each'")
    return places, tuple(place_name(owner, tokens, place) for place in places)


def place_name(owner: str, tokens: ic.Tokens, place: Any) -> str:
    """A place's name: with the token, where it is one and all rows have the same.

    Raises:
        PositionError: the text has no such position.
        PlanError: rows have different numbers of them.
    """
    where = positions.position(place)
    counts, shown = [len(row) for row in tokens.columns(where)], positions.format_position(where)
    if len(set(counts)) > 1 or not counts[0]:
        raise ic.PlanError(
            f"{owner}: at {shown} the rows have {counts} positions; run them one by one, or choose positions that all "
            "have"
        )
    if not single_place(place):
        return "all positions" if where == positions.ALL else shown
    words = {label for (label,) in tokens.labels_at(where)}
    return ic.report.place_name(shown, words.pop() if len(words) == 1 else None)


def values(readings: Any, grid: Grid) -> Values:
    """The values of a run which read `grid.reads`, or its gradients, at every layer and place."""
    return {
        (site.name, layer, place): readings[grid.where(site, layer, place)].plain
        for site in grid.sites
        for layer in grid.layers
        for place in range(len(grid.places))
    }


def patches(grid: Grid, replacements: Values | None) -> list[list[ic.Edit]]:
    """One variant per layer, head and place: values there set to those given, or to zero."""

    def edit(site: S.Site, layer: int, head: int | None, place: int) -> ic.Edit:
        where = (site[layer] if head is None else site[layer, head]).at(grid.places[place])
        if replacements is None:
            return where.zero()
        value = replacements[site.name, layer, place]
        return where.set(value if head is None else value.select(grid.axis(site, place), head).contiguous())

    return [
        [edit(site, layer, head, place) for site in grid.sites]
        for layer in grid.layers
        for head in grid.heads
        for place in range(len(grid.places))
    ]


def swept(
    model: ic.Model, base: ic.Tokens, variants: Sequence[Sequence[ic.Edit]], judged: scores.Score, config: JudgedConfig
) -> ic.Sweep:
    """The exact effect of every variant; nought, not rounding, where it changed nothing."""
    sweep = model.sweep(base, variants, judged, strategy=config.strategy, progress=config.progress)
    # rows that an edit did not change come out of other kernels than the clean run: their difference is rounding alone
    return replace(sweep, values=sweep.values.where(sweep.moved != 0, sweep.clean))


@dataclass(frozen=True, eq=False)
class MapResult(Pictured, ic.Result):
    """Effects over layers, heads and positions.

    Attributes:
        effect: of every patch, in `unit`s; `head` has size 1 where heads are not told apart.
        base: scores of the run that is changed.
        site, kind, score, unit: what was changed, how, and what effects are counted in.
        layers, heads, places: names along the axes.
        explain: how it was carried out.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"effect": ("batch", "layer", "head", "pos"), "base": ("batch",)}
    JOINS: ClassVar[Mapping[str, str]] = {"explain": "first", "places": "first"}
    effect: Float[Tensor, "batch layer head pos"]
    base: Float[Tensor, " batch"]
    site: str
    kind: str
    score: str
    unit: str
    layers: tuple[str, ...]
    heads: tuple[str, ...]
    places: tuple[str, ...]
    explain: str

    @property
    def mean(self) -> Float[Tensor, "row column"]:
        """Effects averaged over batch rows, as the picture has them: layers against heads or positions, or heads of all
        layers against positions."""
        return self._folded(self.effect)

    def _folded(self, effect: Float[Tensor, "batch layer head pos"]) -> Float[Tensor, "row column"]:
        mean = effect.mean(0)
        return mean.flatten(0, 1) if min(mean.shape[1:]) > 1 else mean.flatten(1)

    @property
    def rows(self) -> list[str]:
        """Names of the rows of `mean`."""
        if min(len(self.heads), len(self.places)) > 1:
            return [f"layer {layer} head {head}" for layer in self.layers for head in self.heads]
        return [f"layer {layer}" for layer in self.layers]

    @property
    def columns(self) -> list[str]:
        """Names of the columns of `mean`."""
        if len(self.places) > 1 or len(self.heads) == 1:
            return list(self.places)
        return [f"head {head}" for head in self.heads]

    @property
    def title(self) -> str:
        """What the map shows."""
        places = "" if len(self.places) > 1 else f" at {ic.report.place_words(self.places[0])}"
        return f"{self.kind} of {self.site}{places}{of_rows(self.base)}"

    def table(self) -> list[dict[str, Any]]:
        """One row per patch, averaged over batch rows."""
        mean = self.effect.mean(0)
        return [
            {"layer": layer, "head": head, "pos": place, "effect": float(mean[i, j, k])}
            for i, layer in enumerate(self.layers)
            for j, head in enumerate(self.heads)
            for k, place in enumerate(self.places)
        ]

    def __str__(self) -> str:
        best = sorted(self.table(), key=lambda row: -abs(row["effect"]))[:10]
        heads = {head: "" if head == "-" else f" head {head}" for head in self.heads}
        lines = [
            f"  {r['effect']:+8.3f}  layer {r['layer']}{heads[r['head']]} at {ic.report.place_words(r['pos'])}"
            for r in best
        ]
        return "\n".join([f"{self.title} ({self.unit}); {self.score} {self.base.mean():.3f} without", *lines])

    def pictures(self) -> list[Picture]:
        """The maps that a page shows, the first of them the main one."""
        return [Picture(self.title, self.mean.tolist(), self.rows, self.columns)]

    @property
    def finding(self) -> str:
        """The patch with the largest effect."""
        best = max(self.table(), key=lambda row: abs(row["effect"]))
        head = "" if best["head"] == "-" else f" head {best['head']}"
        where = f"{self.site} of layer {best['layer']}{head} at {ic.report.place_words(best['pos'])}"
        said = effect_words(best["effect"], self.unit, self.kind, self.score, float(self.base.mean()))
        return f"The largest effect: {where} {said}{of_rows(self.base)}."


def named(grid: Grid) -> dict[str, Any]:
    """The fields of a `MapResult` that a grid gives."""
    return {
        "site": grid.label, "layers": tuple(map(str, grid.layers)), "places": grid.names,
        "heads": tuple("-" if head is None else str(head) for head in grid.heads),
    }  # fmt: skip
