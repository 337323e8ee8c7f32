"""Some visual tokens taken away from a layer on, chosen by a ranking (FastV), and the question frozen.

    removed    from layer l on, no token but the dropped ones themselves attends to a dropped one
    pruned     the ⌈f |V|⌉ tokens of the highest rank stay in each row, the others are removed from layer l on

Rankings, each a number per visual token, ties to the earlier one:

    last_token   mean over heads of pattern[l-1](p0, v): what FastV's published code ranks by
    mean_text    mean over heads and over the prompt's text after v of pattern[l-1](q, v)
    random       a random order by seed; the kept sets of a seed are nested over fractions
    uniform      evenly over the grid for every fraction (the order of Bayer's dither matrix), images in turn

p0 is the predicting token: the last of the prompt. Kept tokens keep their positions, as in truncation. f = 0 is
truncation from l, f = 1 the clean run.

`state_transplant` removes V from layer l on and holds the rows of the question (text after the first visual token,
before p0) at their values at `resid_pre[l]`: only p0 and what follows it goes on.

Cost: a forward pass each; a ranking by attention one more, up to layer l.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .. import sites as S
from ..errors import PlanError, PositionError, ReadError, nearest, wrong
from ..positions import AFTER_VISION, VISION, PerRow, PositionLike, Slice, position, resolve
from ..run import Run
from ..vision.places import runs
from .attending import layer_number, layers_of, truncated
from .replacing import replaced
from .states import States, demand_images, rows_read

if TYPE_CHECKING:
    from ..model import Model
    from ..session import Input
    from ..sites import Edit
    from ..text import Tokens
    from ..vision import VisualToken

BITS = 12
"""Grids have fewer than two to this rows and columns."""
RANKINGS = ("last_token", "mean_text", "random", "uniform")


def places(tokens: Tokens, at: PositionLike) -> list[list[int]]:
    """Per row, the positions that a name or a position selects, counted over real tokens.

    Raises:
        PositionError: the text has none of them.
    """
    columns = resolve(position(at), tokens.rows)
    if not any(columns):
        raise PositionError(f"{at!r} selects no position in any row")
    numbered = [{column: place for place, column in enumerate(real)} for real in tokens.rows.real]
    return [[number[c] for c in row] for number, row in zip(numbered, columns, strict=True)]


def predicting(tokens: Tokens) -> list[int]:
    """Per row, the token that predicts the answer: the last of the prompt, or of the text."""
    names = tokens.rows.names
    return [names["prompt"][i][-1] if "prompt" in names else n - 1 for i, n in enumerate(tokens.lengths)]


def removed(model: Model, x: Input, dropped: PositionLike, layers: int | Iterable[int]) -> list[Edit]:
    """Edits that take tokens away in some layers: no other token attends to them there, generated ones included.

    Args:
        x: the text, of which this makes use of the length alone.
        dropped: positions, a list per row, or a name; rows without any stay as they are.
        layers: `range(l, model.n_layers)` for "from layer l on".

    Raises:
        SiteError, CapabilityError, PositionError: as `blocked`; a row of which nothing is left.
    """
    demand_images(model)
    at, tokens = layers_of(model, layers), model.input(x)
    gone, visual = [set(row) for row in places(tokens, dropped)], tokens.rows.names.get(VISION)
    if not at:
        return []
    queries, keys = [], []
    for i, (row, n) in enumerate(zip(gone, tokens.lengths, strict=True)):
        first = min(row, default=n)
        # Families whose images look both ways see it from their first token on.
        while visual and first - 1 in visual[i]:
            first -= 1
        seeing = runs(sorted({*range(first, n)} - row))
        queries.append((*(Slice(run.start, run.stop) for run in seeing), Slice(n, None)))
        keys.append(tuple(sorted(row)))
    return [S.pattern[at].knockout(query=PerRow(tuple(queries)), key=PerRow(tuple(keys)))]


def ranked(
    model: Model, x: Input, by: str, *, layer: int | None = None, seed: int = 0
) -> list[Float[Tensor, " visual"]]:
    """A number per visual token of each row, the higher the sooner it is kept.

    Args:
        by: one of `RANKINGS`.
        layer: from which tokens will be dropped; attention is that of the layer before it.
        seed: of the order, for "random".

    Raises:
        PlanError: no such ranking, or one by attention without a layer before.
        SiteError: no such layer.
    """
    demand_images(model)
    if by not in RANKINGS:
        raise PlanError(f"no ranking is called {by!r}. {nearest(by, RANKINGS)}")
    tokens = model.input(x)
    visual = places(tokens, VISION)
    if by == "random":
        return [_shuffled(len(row), seed) for row in visual]
    if by == "uniform":
        return [_spread(row) for row in model.visual_grid(tokens)]
    number = 0 if layer is None else layer_number(layer, model.n_layers)
    if number < 1:
        raise PlanError(wrong(f"ranking by {by}", "layer=, from 1 on, whose predecessor's attention it is", layer))
    layers_of(model, number - 1)
    pattern = _attention(model, tokens, number - 1, by)
    return [pattern[i][[tokens.rows.real[i][v] for v in row]] for i, row in enumerate(visual)]


def _attention(model: Model, tokens: Tokens, layer: int, by: str) -> list[Float[Tensor, " key"]]:
    """Per row, the attention that each column gets, as a ranking has it."""
    ends, real = predicting(tokens), tokens.rows.real
    if by == "last_token":
        site = S.pattern[layer].at(query=PerRow(tuple(ends)))
        return list(model.run(tokens, read=site, logits=False)[site].plain.mean(1))
    site = S.pattern[layer]
    pattern = model.run(tokens, read=site, logits=False)[site].plain
    rows = []
    for i, own in enumerate(places(tokens, AFTER_VISION)):
        queries = torch.tensor([real[i][q] for q in own if q <= ends[i]], dtype=torch.long)
        later = queries[:, None] > torch.arange(pattern.shape[-1])
        rows.append(pattern[i].mean(0)[queries].sum(0) / later.sum(0).clamp(min=1).to(pattern.device))
    return rows


def _shuffled(n: int, seed: int) -> Float[Tensor, " visual"]:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise PlanError(wrong("seed=", "an integer", seed))
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _spread(tokens: Sequence[VisualToken]) -> Float[Tensor, " visual"]:
    """The order of a dither matrix: bits of row and column, the lowest first, decide which cells come sooner."""
    orders = []
    for token in tokens:
        order = 0
        for bit in range(BITS):
            row, col = token.row >> bit & 1, (token.col or 0) >> bit & 1
            order = order << 2 | (row ^ col) << 1 | row
        orders.append(-float(order))
    return torch.tensor(orders, dtype=torch.float64)


def top(ranks: Sequence[Float[Tensor, " visual"]], fraction: float) -> list[list[int]]:
    """Per row, which of the visual tokens stay, in order: the ⌈f n⌉ of the highest rank.

    Raises:
        PlanError: a fraction that is none.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise PlanError(wrong("fraction", "a number from 0 to 1", fraction))
    rows = []
    for ranks_of_row in ranks:
        n = len(ranks_of_row)
        kept = math.ceil(round(fraction * n, 9))  # 0.07 * 100 is a little above 7, and means 7
        rows.append(sorted(ranks_of_row.argsort(descending=True, stable=True)[:kept].tolist()))
    return rows


def pruned(
    model: Model, x: Input, ranks: Sequence[Float[Tensor, " visual"]], fraction: float, layers: int | Iterable[int]
) -> list[Edit]:
    """Edits that keep the best-ranked visual tokens in some layers, and take the others away.

    Args:
        ranks: per row a number per visual token, of `ranked` or your own.
        fraction: how many stay, 0 to 1.
        layers: `range(l, model.n_layers)` for "from layer l on".

    Raises:
        PlanError: ranks for other tokens than the text has, or no fraction.
        SiteError, CapabilityError: as `removed`.
    """
    demand_images(model)
    tokens = model.input(x)
    visual = places(tokens, VISION)
    sizes, ranked = [len(row) for row in visual], [len(row) for row in ranks]
    if sizes != ranked:
        raise PlanError(f"ranks of {ranked} visual tokens per row, the text has {sizes}")
    kept = top(ranks, fraction)
    dropped = [[v for i, v in enumerate(row) if i not in set(own)] for row, own in zip(visual, kept, strict=True)]
    return removed(model, tokens, PerRow(tuple(map(tuple, dropped))), layers) if any(dropped) else []


def state_transplant(run: Run, layer: int, question: PositionLike = None) -> list[Edit]:
    """Edits that take the image away from a layer on, and hold the question's rows at what they are there.

    Args:
        run: the clean run, which has read `S.resid_pre[layer]`.
        layer: 0 to L - 1.
        question: rows that are held (default: text after the first visual token, before the predicting one).

    Raises:
        ReadError: the run has not read that layer.
        SiteError, CapabilityError, PositionError: as `truncated`; a text without such rows.
    """
    if not isinstance(run, Run):
        raise PlanError(wrong("state_transplant", "a run of the model", run))
    model, tokens = run.model, run.tokens
    layer = layer_number(layer, model.n_layers)
    edits = truncated(model, layer)
    if not edits:
        return []
    if question is None:
        ends = predicting(tokens)
        rows = [[q for q in row if q < p0] for p0, row in zip(ends, places(tokens, AFTER_VISION), strict=True)]
        if not any(rows):
            raise PositionError("there is no text between the image and the predicting token; say question=")
        question = PerRow(tuple(map(tuple, rows)))
    held = rows_read(run, S.resid_pre[layer].at(question))
    if held is None:
        raise ReadError(f"the run has not read resid_pre[{layer}] at the question; run with read=S.resid_pre[{layer}]")
    later = range(layer + 1, model.n_layers)
    frozen = States(dict.fromkeys(later, held), {}, model.n_layers, question, "the question")
    return [*edits, *(replaced(frozen, later) if later else [])]
