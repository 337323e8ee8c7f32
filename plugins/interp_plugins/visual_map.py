"""Which part of an image the text needs: attention from the text to a block of visual tokens, knocked out.

    loss(b) = log p(answer) - log p(answer, text → b knocked out in every layer)

Blocks are k × k cells of the grid of visual tokens (`model.visual_grid`), of each tile of each image. The text no
longer sees the block; other visual tokens still do, and may have carried off what it shows in layers before. Where an
image has several tiles, what one shows another may show too. The answer is the span `target`, the mean over its tokens,
where the text has one; else a token.

Source: the knockout is Geva et al.'s (2023), arXiv:2304.14767, towards visual tokens as in Zhang et al. (2024),
arXiv:2411.18620; by blocks over all layers it is ours.
Cost: a sweep of one variant per block.
Must equal: one forward pass per block with that attention masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import report
from interp_core import score as scores
from interp_core import sites as S

from ._contrast import JudgedConfig, answers, said
from .attribution.over_image import overlays

Cell = tuple[int, int, int, int]
"""Image, tile, row and column of a visual token in its tile."""


class VisualMapConfig(JudgedConfig):
    """Settings of maps by knockout.

    Attributes:
        block: rows and columns of visual tokens that are knocked out together.
        answer: a token id or a word per row, or one for all (None: the span `target`, or what the model says).
        other: not used.
        layers: in which the attention is knocked out (None: all).
    """

    block: int = 1
    layers: list[int] | None = None


@dataclass(frozen=True, eq=False)
class VisualMapResult(ic.Result):
    """What the answer loses with each block.

    Attributes:
        loss: in nats, of each visual token's block; NaN for tokens without pixels, and beyond a row's last.
        clean: the answer's log-probability.
        cells: of each row's visual tokens: image, tile, row, column; column -1 without pixels.
        boxes: their pixels: left, top, right, bottom.
        block: rows and columns of a block.
        score: what the answer is judged by.
        explain: how it was carried out.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"loss": ("batch", "visual"), "clean": ("batch",)}
    JOINS: ClassVar[Mapping[str, str]] = {"cells": "rows", "boxes": "rows", "explain": "first"}
    loss: Float[Tensor, "batch visual"]
    clean: Float[Tensor, " batch"]
    cells: tuple[tuple[Cell, ...], ...]
    boxes: tuple[tuple[tuple[float, float, float, float], ...], ...]
    block: int
    score: str
    explain: str

    def map(self, row: int = 0, image: int = 0, tile: int = 0) -> Float[Tensor, "row col"]:
        """A tile's losses as a map, one number per visual token: what `localisation` takes.

        Raises:
            PositionError: no such row, image or tile.
        """
        if not -len(self.cells) <= row < len(self.cells):
            raise ic.PositionError(f"visual_map: there is no row {row}; there are {len(self.cells)}")
        places = [(i, r, c) for i, (n, t, r, c) in enumerate(self.cells[row]) if (n, t) == (image, tile) and c >= 0]
        if not places:
            there = sorted({cell[:2] for cell in self.cells[row]})
            raise ic.PositionError(f"visual_map: row {row} has no tile {tile} of image {image}; it has {there}")
        out = torch.full([max(place[axis] for place in places) + 1 for axis in (1, 2)], float("nan"))
        for i, r, c in places:
            out[r, c] = self.loss[row, i]
        return out

    def table(self) -> list[dict[str, Any]]:
        """A row per block, the largest loss first."""
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for number, cells in enumerate(self.cells):
            for i, (image, tile, r, c) in enumerate(cells):
                if c >= 0:
                    key = number, image, tile, r // self.block, c // self.block
                    named = dict(zip(("row", "image", "tile", "block row", "block column"), key, strict=True))
                    rows[key] = named | {"loss": float(self.loss[number, i])}
        return sorted(rows.values(), key=lambda line: -line["loss"])

    def overlays(self, pictures: Sequence[Any] | None = None, row: int = 0) -> dict[str, report.Overlay]:
        """The losses over a row's images, one overlay per tile.

        Args:
            pictures: one per image, as `report.Overlay` takes them; None: the boxes alone.
        """
        kept = [(i, cell) for i, cell in enumerate(self.cells[row]) if cell[3] >= 0]
        places = [(i, cell[0], cell[1], *self.boxes[row][i]) for i, cell in kept]
        return overlays(
            {"loss": self.loss[row].tolist()},
            places,
            pictures,
            title="Loss without each block of the image",
            scale="nats lost",
        )

    @property
    def finding(self) -> str:
        """The block without which the answer loses most."""
        best = self.table()[0]
        where = f"row {best['block row']}, column {best['block column']}"
        of = f" of prompt {best['row']}" if len(self.cells) > 1 else ""
        return f"Without the block in {where}{of} the answer loses most: {best['loss']:.2f} nats of its {self.score}."

    def details(self) -> dict[str, str]:
        """How the losses were worked out."""
        return {"What it cost": self.explain}

    def charts(self) -> list[report.Overlay]:
        """The maps of all rows, image by image."""
        return [chart for row in range(len(self.cells)) for chart in self.overlays(row=row).values()]


class VisualMap(ic.Method):
    """Which blocks of an image the text needs, by knocking out its attention to each."""

    name = "visual_map"
    requires = frozenset({"pattern", "vision_embed"})
    Config = VisualMapConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: VisualMapConfig) -> None:
        """Every row has an image whose grid is known."""
        if config.block < 1:
            raise ic.PlanError(ic.errors.wrong("visual_map: block", "a whole number from 1 on", config.block))
        if config.other is not None:
            raise ic.PlanError("visual_map judges one answer; leave other= out")
        answers(self.name, model, config.answer, len(tokens))
        there = model.layers(S.pattern)
        for layer in config.layers or ():
            if layer not in there:
                raise ic.SiteError(f"visual_map: there is no attention in layer {layer}; it is in layers {list(there)}")
        if any(not span for span in tokens.spans.get("vision", ((),) * len(tokens))):
            raise ic.PositionError("visual_map: a row has no image; give texts with images")
        model.visual_grid(tokens)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: VisualMapConfig) -> VisualMapResult:
        """A sweep per row: rows have different blocks."""
        grid = model.visual_grid(tokens)
        rows = [tokens] if len(tokens) == 1 else list(tokens)
        judged = [self._judged(model, row, config, number, len(rows)) for number, row in enumerate(rows)]
        losses, clean, explain = torch.full((len(rows), max(map(len, grid))), float("nan")), [], []
        with ic.Progress("visual_map, texts", len(rows)) as progress:
            for number, (row, score) in enumerate(zip(rows, judged, strict=True)):
                blocks = _blocks(grid[number], config.block)
                sweep = model.sweep(
                    row, [_knockouts(grid[number], block, config) for block in blocks], score, strategy=config.strategy,
                    progress=config.progress,
                )  # fmt: skip
                scale = -1 / len(row.columns("target")[0]) if score.name == "nll" else 1.0  # else a log-probability
                for block, effect in zip(blocks, sweep.effects[:, 0].tolist(), strict=True):
                    losses[number, block] = -scale * effect
                clean.append(scale * float(sweep.clean[0]))
                explain.append(sweep.plan.explain())
                progress.add()
        cells = tuple(tuple(_cell(token) for token in row) for row in grid)
        boxes = tuple(tuple(_box(token) for token in row) for row in grid)
        named = "mean log-probability of the target" if judged[0].name == "nll" else judged[0].name
        return VisualMapResult(losses, torch.tensor(clean), cells, boxes, config.block, named, explain[0])

    def _judged(
        self, model: ic.Model, row: ic.Tokens, config: VisualMapConfig, number: int, count: int
    ) -> scores.Score:
        ids = answers(self.name, model, config.answer, count)
        if ids is None and any(row.spans.get("target", ((),))[0]):
            return scores.nll(row)
        return scores.logprob(said(model.run(row, logits=-1)) if ids is None else ids[number : number + 1])


def _cell(token: ic.VisualToken) -> Cell:
    """A token's place; column -1 of those that end a row, or stand for the whole."""
    return token.image, token.tile, token.row, -1 if token.col is None or token.box is None else token.col


def _box(token: ic.VisualToken) -> tuple[float, float, float, float]:
    left, top, right, bottom = token.box or (0, 0, 0, 0)
    return float(left), float(top), float(right), float(bottom)


def _blocks(visual: Sequence[ic.VisualToken], side: int) -> list[list[int]]:
    """Indices of the visual tokens of each block."""
    blocks: dict[tuple[int, ...], list[int]] = {}
    for i, token in enumerate(visual):
        image, tile, row, col = _cell(token)
        if col >= 0:
            blocks.setdefault((image, tile, row // side, col // side), []).append(i)
    return list(blocks.values())


def _knockouts(visual: Sequence[ic.VisualToken], block: Sequence[int], config: VisualMapConfig) -> list[ic.Edit]:
    """The text no longer attends to a block."""
    sites = [S.pattern] if config.layers is None else [S.pattern[layer] for layer in config.layers]
    return [site.knockout(query="text", key=[visual[i].position for i in block]) for site in sites]
