"""Draws docs/images/staircase.svg from the plans of two sweeps on the toy: python scripts/staircase.py

What a pass computes is a cell: one token in one layer. The plans say where each variant begins; all else follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import interp_core as ic
from interp_core import sites as S
from interp_core.sweep.plan import Step

PICTURE = Path(__file__).parent.parent / "docs/images/staircase.svg"
TEXT = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"
CELL, LEFT, WIDTH = 12, 50, 500
STYLE = """
text { font: 14px sans-serif; fill: #424a53 } .small { font-size: 12px }
.run { fill: #4b8fd6 } .kept { fill: none } .run, .kept { stroke: #8b949e; stroke-width: .6 } .edit { fill: #b3400f }
@media (prefers-color-scheme: dark) { text { fill: #c9d1d9 } .edit { fill: #ffd0a8 } }
"""
Cells = set[tuple[int, int]]


def planned(model: ic.Model, edits: list[ic.Edit]) -> list[Step]:
    """Where each variant begins, by a plan that was not run."""
    plan = ic.Sweep.planned(model, TEXT, edits, ic.score.logprob(" dry"))
    return [step for group in plan.groups for one in group.passes for step in one.steps]


def svg(model: ic.Model) -> str:
    """The picture."""
    layers, tokens = model.n_layers, model.tokens(TEXT).lengths[0]
    (step,) = planned(model, [S.resid_pre[2].at(10).zero()])
    steps = planned(model, [S.z[layer, head].at(-1).zero() for layer, head in model.heads])
    every = {(column, layer) for column in range(tokens) for layer in range(layers)}
    above = {(column, layer) for column, layer in every if column >= step.start and layer >= step.layer}
    stairs = {(i, layer) for i, step in enumerate(steps) for layer in range(step.layer, layers)}
    begins = {(i, step.layer) for i, step in enumerate(steps)}
    half = WIDTH // 2
    parts = [
        *grid(LEFT, 40, tokens, layers, every, set()),
        *says(LEFT, 16, "The clean pass", f"{len(every)} token-layers"),
        *grid(half + LEFT, 40, tokens, layers, above, {(step.start, step.layer)}),
        *says(half + LEFT, 16, "One variant: token 10, layer 2", f"{len(above)} token-layers"),
        *axis(LEFT, 40 + layers * CELL, ["token 0", f"token {tokens - 1}"], tokens),
        *axis(half + LEFT, 40 + layers * CELL, ["token 0", f"token {tokens - 1}"], tokens),
        *grid(LEFT, 178, len(steps), layers, stairs, begins),
        *says(
            LEFT, 154, f"{len(steps)} variants in one pass: each head, at the last token", f"{len(stairs)} token-layers"
        ),
        *axis(LEFT, 178 + layers * CELL, ["variant 0", f"variant {len(steps) - 1}"], len(steps)),
        *legend(LEFT, 292),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 304" role="img"><title>Staircase</title>'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def grid(left: int, top: int, columns: int, layers: int, run: Cells, edited: Cells) -> Iterator[str]:
    """Cells, layer 0 at the bottom as the stream flows upwards."""
    for layer in range(layers):
        y = top + (layers - 1 - layer) * CELL
        name = f"layer {layer}" if layer in (0, layers - 1) else str(layer)
        yield f'<text class="small" x="{left - 5}" y="{y + 10}" text-anchor="end">{name}</text>'
    every = {(column, layer) for column in range(columns) for layer in range(layers)}
    corner = {(c, layer): (left + c * CELL, top + (layers - 1 - layer) * CELL) for c, layer in every}
    for kind, cells in (("kept", every - run), ("run", run)):
        squares = "".join("M{} {}h{}v{}h-{}z".format(*corner[cell], CELL, CELL, CELL) for cell in sorted(cells))
        yield f'<path class="{kind}" d="{squares}"/>'
    for x, y in sorted(corner[cell] for cell in edited):
        yield f'<circle class="edit" cx="{x + CELL / 2:g}" cy="{y + CELL / 2:g}" r="3.2"/>'


def says(left: int, y: int, title: str, small: str) -> Iterator[str]:
    yield f'<text x="{left}" y="{y}">{title}</text>'
    yield f'<text class="small" x="{left}" y="{y + 15}">{small}</text>'


def axis(left: int, y: int, ends: Iterable[str], columns: int) -> Iterator[str]:
    for name, x, anchor in zip(ends, (left, left + columns * CELL), ("start", "end"), strict=True):
        yield f'<text class="small" x="{x}" y="{y + 13}" text-anchor="{anchor}">{name}</text>'


def legend(left: int, y: int) -> Iterator[str]:
    for x, kind, words in (
        (0, "run", "computed"),
        (90, "kept", "taken from the clean pass"),
        (262, "edit", "the edit"),
    ):
        mark = (
            f'<circle class="edit" cx="{left + x + 6}" cy="{y - 4}" r="3.2"/>'
            if kind == "edit"
            else f'<rect class="{kind}" x="{left + x}" y="{y - 10}" width="{CELL}" height="{CELL}"/>'
        )
        yield f'{mark}<text class="small" x="{left + x + 18}" y="{y}">{words}</text>'


if __name__ == "__main__":
    PICTURE.write_text(svg(ic.load("toy:text")), encoding="utf-8")
