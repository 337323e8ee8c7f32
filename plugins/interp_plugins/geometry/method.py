"""Method `geometry`: what space visual and text rows take up at each layer, sample by sample.

    at resid_pre[l], rows of each group of positions (default: `vision` and `text`; of a text without images all)
    measures     effective rank, its share, participation ratio, stable rank, anisotropy, mean direction  (measured.py)
    variants     raw, centred, row_normalised, sink_free                                                  (rows.py)
    between      modality gap, separability; CKA from layer to layer and with a blind run   (directions, similarity)
    at a cliff   ratio of effective ranks, beside random cuts                                             (ratios.py)

Source: the modules named above say whose each number is; docs/methods/geometry.md has all formulas.
Cost: one forward pass; per sample, layer, variant and group one decomposition of n rows (n³) and `repeats` of as many
rows as the smallest group has; a layer's rows are held at a time, those of `against` in all layers.
Must equal: the pure functions on rows of `model.run(…, read=S.resid_pre[l].at(group))`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .._prompts import prompts_of
from .measured import How, Layer, measure_layer, same_rows
from .result import GeometryResult
from .rows import VARIANTS, Variant, single

Groups = dict[str, list[list[int]]]
"""Per group and prompt, positions among its real tokens."""


class GeometryConfig(ic.Config):
    """Settings of the geometry.

    Attributes:
        groups: names of positions whose rows are compared; None: `vision` and `text`, or `all` without images.
        variants: of the rows.
        rows: how many rows of each group are compared; None: as many as the smallest group of the sample has.
        repeats: draws of that many rows.
        seed: of the draws.
        against: prompts with the same positions (blind images), for CKA with their rows; one per prompt.
        clusters: what prompts share (an image), one per prompt; intervals draw them together.
        cliff_boundary: the first layer after the cliff, found on other samples.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"against", "clusters"})
    groups: tuple[str, ...] | None = None
    variants: tuple[Variant, ...] = ("centred", "raw", "row_normalised", "sink_free")
    rows: int | None = Field(None, ge=2)
    repeats: int = Field(20, ge=1)
    seed: int = Field(0, ge=0)
    against: Any = None
    clusters: Any = None
    cliff_boundary: int | None = None


class Geometry(ic.Method):
    """How many directions rows use at each layer, how alike they point, and how visual and text rows differ."""

    name = "geometry"
    requires = frozenset({"resid_pre"})
    Config = GeometryConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: GeometryConfig) -> None:
        """Every prompt has enough rows of every group, and `against` as many tokens at the same places."""
        if not config.variants or len(set(config.variants)) < len(config.variants):
            raise ic.PlanError(f"geometry: variants {config.variants}; give some of {VARIANTS}, each once")
        cliff = config.cliff_boundary
        if cliff is not None and not 1 <= cliff < model.n_layers:
            raise ic.PlanError(
                f"geometry: cliff_boundary {cliff} of {model.n_layers} layers; 1 to {model.n_layers - 1}"
            )
        groups = _places(tokens, config)
        for row in range(len(tokens)):
            for name, places in groups.items():
                if len(places[row]) < max(2, config.rows or 2):
                    raise ic.PositionError(f"geometry: prompt {row} has {len(places[row])} token(s) of {name!r}, "
                                           f"{max(2, config.rows or 2)} are compared")  # fmt: skip
        if config.clusters is not None and len(config.clusters) != len(tokens):
            raise ic.PlanError(f"geometry: {len(config.clusters)} clusters for {len(tokens)} prompts")
        if config.against is not None:
            _blind(model, tokens, groups, config)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: GeometryConfig) -> GeometryResult:
        """One pass per set of prompts, measured layer by layer."""
        groups = _places(tokens, config)
        how = How(config.variants, config.rows, config.repeats, config.seed)
        blind = None
        if config.against is not None:
            others = _blind(model, tokens, groups, config)
            blind = [_all_layers(model, other, groups, row) for row, other in enumerate(others)]
        book = _Book(groups, how, tokens)
        before: dict[int, list[list[Tensor]]] = {}

        def each(layer: int, values: ic.LayerReadings) -> None:
            stream = values[S.resid_pre].detach().cpu().double().as_subclass(Tensor)
            rows = _rows(stream, tokens, groups)
            book.layer(rows, before.get(layer - 1), None if blind is None else [of[layer] for of in blind])
            # two layers at a time: that is all that CKA from layer to layer needs
            before.clear()
            before[layer] = rows

        model.run(tokens, read=S.resid_pre, each=each, logits=False)
        return book.result(config, tuple(model.layers(S.resid_pre)))


class _Book:
    """Numbers of layers, as they come."""

    def __init__(self, groups: Groups, how: How, tokens: ic.Tokens) -> None:
        self.groups, self.how, self.n = groups, how, len(tokens)
        self.layers: list[list[Layer]] = []
        self.steps: list[list[list[float]]] = []
        self.against: list[list[list[float]]] = []
        self.pooled: list[Tensor] = []
        self.drawn: list[Tensor] = []

    def layer(self, rows: list[list[Tensor]], before: list[list[Tensor]] | None, blind: Any) -> None:
        """A layer's rows by sample and group, those of the layer before, and those of a blind run."""
        self.layers.append([measure_layer(of_sample, self.how) for of_sample in rows])
        if before is not None:
            self.steps.append(self._alike(before, rows))
        if blind is not None:
            self.against.append(self._alike(rows, blind))
        self.pooled.append(torch.stack([torch.stack([part.mean(0) for part in of_sample]) for of_sample in rows]))
        # the seed alone decides: the same token of a sample at every layer
        picks = [[single(len(part), self.how.seed) for part in of_sample] for of_sample in rows]
        drawn = [[part[pick] for part, pick in zip(*pair, strict=True)] for pair in zip(rows, picks, strict=True)]
        self.drawn.append(torch.stack([torch.stack(of_sample) for of_sample in drawn]))

    def _alike(self, first: list[list[Tensor]], second: list[list[Tensor]]) -> list[list[float]]:
        """CKA of the same positions' rows, by sample and group."""
        out = []
        for row, pair in enumerate(zip(first, second, strict=True)):
            places = [of_group[row] for of_group in self.groups.values()]
            out.append([same_rows(a, b.double(), at) for a, b, at in zip(*pair, places, strict=True)])
        return out

    def result(self, config: GeometryConfig, layers: tuple[int, ...]) -> GeometryResult:
        """All of it."""
        names = tuple(self.groups)
        sinks = tuple(
            tuple(
                (name, layers[number], self.groups[name][row][i])
                for number, of_layer in enumerate(self.layers)
                for k, name in enumerate(names)
                for i in of_layer[row].dropped[k]
            )
            for row in range(self.n)
        )
        empty = torch.zeros(self.n, len(names), 0, dtype=torch.float64)
        return GeometryResult(
            equal=self._stacked("equal"), whole=self._stacked("whole"), dimension=self._stacked("dimension"),
            gap=self._single("gap"), separability=self._single("separability"),
            steps=_numbers(self.steps) if self.steps else empty,
            against=_numbers(self.against) if self.against else None,
            pooled=torch.stack(self.pooled, 2).float(), drawn=torch.stack(self.drawn, 2).float(),
            rows=torch.tensor([[len(places[row]) for places in self.groups.values()] for row in range(self.n)]),
            sinks=sinks, groups=names, variants=tuple(config.variants), layers=layers,
            clusters=(None,) * self.n if config.clusters is None else tuple(config.clusters),
            cliff=config.cliff_boundary,
        )  # fmt: skip

    def _stacked(self, field: str) -> Tensor:
        return torch.stack([torch.stack([getattr(each, field) for each in row]) for row in self.layers], 2)

    def _single(self, field: str) -> Float[Tensor, "batch layer"]:
        rows = [[getattr(each, field) for each in row] for row in self.layers]
        return torch.tensor(rows, dtype=torch.float64).T.clone()


def _numbers(layers: list[list[list[float]]]) -> Float[Tensor, "batch group layer"]:
    return torch.tensor(layers, dtype=torch.float64).permute(1, 2, 0).contiguous()


def _places(tokens: ic.Tokens, config: GeometryConfig) -> Groups:
    """Positions of each group, prompt by prompt.

    Raises:
        PositionError: a name that a prompt does not have.
    """
    names = config.groups or (("vision", "text") if "vision" in tokens.spans else ("all",))
    real = [{column: i for i, column in enumerate(row)} for row in tokens.columns(None)]
    return {
        name: [[of[column] for column in row]
               for of, row in zip(real, tokens.columns(None if name == "all" else name), strict=True)]
        for name in names
    }  # fmt: skip


def _rows(stream: Float[Tensor, "batch pos d_model"], tokens: ic.Tokens, groups: Groups) -> list[list[Tensor]]:
    """Rows of each prompt and group."""
    columns = tokens.columns(None)
    return [
        [values[[columns[row][i] for i in places[row]]].double() for places in groups.values()]
        for row, values in enumerate(stream)
    ]


def _blind(model: ic.Model, tokens: ic.Tokens, groups: Groups, config: GeometryConfig) -> list[ic.Tokens]:
    """The prompts of `against`.

    Raises:
        PlanError: their rows are not at the positions of the prompts' own.
    """
    others = prompts_of("geometry: against", model, config.against, len(tokens))
    for row, other in enumerate(others):
        there = _places(other, config)
        for name, places in groups.items():
            if there.get(name, [[]])[0] != places[row]:
                raise ic.PlanError(
                    f"geometry: prompt {row} and its `against` have {name!r} at other positions ({len(places[row])} "
                    f"and {len(there.get(name, [[]])[0])} rows); only the same positions have rows in common. Give a "
                    "blind image of the same size, and the same text"
                )
    return others


def _all_layers(model: ic.Model, tokens: ic.Tokens, groups: Groups, row: int) -> dict[int, list[Tensor]]:
    """One prompt's rows of each layer and group, in the model's own precision."""
    columns, kept = tokens.columns(None)[0], {}

    def each(layer: int, values: ic.LayerReadings) -> None:
        stream = values[S.resid_pre].detach()[0].cpu().as_subclass(Tensor)
        kept[layer] = [stream[[columns[i] for i in places[row]]] for places in groups.values()]

    model.run(tokens, read=S.resid_pre, each=each, logits=False)
    return kept
