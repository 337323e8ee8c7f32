"""Layer by layer, how well a model predicts given targets of a text: the lens on aligned positions.

    h[l, p]   = stream after layer l at the token before target p;  l = -1 is the embedding
    NLL[l, p] = -log softmax(readout(h[l, p]))[y_p]                  nats; and rank, entropy, KL(last ‖ l)
    JS[l, p]  = JS(A's distribution, B's) for targets that two contexts share

A target is predicted at p - 1: that is where the stream is read, and nowhere else. Rows of all layers, of both contexts
and of several samples go through the unembedding in one product (`tiles`).

Source: nostalgebraist (2020), "interpreting GPT: the logit lens". "Logit-lens scores" in published tables of agentic
and assisted code are minus this NLL.
Cost: one forward pass per context, then as `tiles` says for (n_layers + 1) · targets rows.
Must equal: its last row is the model's own log-probability. That is checked at each context's last target; transformers
gives the last hidden state already normed, and norming it again is the field's commonest error here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic
from interp_core import runs
from interp_core import sites as S
from interp_plugins.pairs import Pair
from interp_plugins.pairs.pair import SIDES

from .tiles import ROWS, Divergence, JsMode, Readout, divergence, read_out

Part = TypeVar("Part", Readout, Divergence)
EMBEDDING = -1
"""The layer of the first row: what enters the first block."""


@dataclass(frozen=True, eq=False)
class States:
    """The stream of one context where its targets are predicted.

    Attributes:
        sample, side: whose.
        layers: decoder layers of the rows, -1 for the embedding; the last is the model's last.
        positions: of the targets, counted over real tokens.
        ids: of the targets.
        stream: before the final norm.
        final: the model's own log-probability of the last target, and how far rounding may take the lens from it; None
            where the forward pass was not ours.
        normed_last: the last row has been through the final norm already, as transformers gives it.
        context: digest of the context's tokens and layout (`context_of`).
    """

    sample: str
    side: str
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    ids: Int[Tensor, " target"]
    stream: Float[Tensor, "layer target d_model"]
    final: tuple[float, float] | None = None
    normed_last: bool = False
    context: str = ""

    def take(self, count: int | None) -> States:
        """The first so many targets; None for all."""
        if count is None or count >= len(self.ids):
            return self
        positions, ids, stream = self.positions[:count], self.ids[:count], self.stream[:, :count]
        return replace(self, positions=positions, ids=ids, stream=stream, final=None)


@dataclass(frozen=True, eq=False)
class PairScores:
    """What the layers say about a pair's targets.

    Attributes:
        sample: its name.
        layers: of the rows, -1 for the embedding.
        agentic, assisted: readouts of both contexts.
        apart: how far the two are apart, if it was asked for.
    """

    sample: str
    layers: tuple[int, ...]
    agentic: Readout
    assisted: Readout
    apart: Divergence | None = None


def read_states(
    model: ic.Model, tokens: ic.Tokens, positions: Sequence[int], sample: str = "", side: str = ""
) -> States:
    """The stream before each target, from one forward pass.

    Args:
        tokens: one row.
        positions: of the targets, counted over real tokens, from 1 on.

    Raises:
        PositionError: a target that nothing predicts, or outside the text.
        CapabilityError: the model's stream cannot be read.
    """
    if not positions or min(positions) < 1:
        raise ic.PositionError(f"{sample} {side}: targets are from position 1 on (nothing predicts the first)".strip())
    before = [p - 1 for p in positions]
    sites = [S.resid_pre[0].at(before), *(S.resid_post[layer].at(before) for layer in range(model.n_layers))]
    run = model.run(tokens, read=sites, logits=before[-1:])
    rows = [run[site].plain[0] for site in sites]
    ids = tokens.ids[0, tokens.columns(list(positions))[0]]
    logits = run.logits.plain[0, 0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    final = float(torch.log_softmax(logits, -1)[ids[-1]])
    return States(
        sample, side, (EMBEDDING, *range(model.n_layers)), tuple(positions), ids.cpu(),
        torch.stack([row.to(rows[-1].device) for row in rows]), (final, _rounding(model.dtype, logits)),
        context=context_of(tokens),
    )  # fmt: skip


def context_of(tokens: ic.Tokens) -> str:
    """Digest of all that a context's stream depends on beside the model: ids, and the columns where they are (positions
    and ids of targets are the same in the packed and the padded layout, the stream is not)."""
    return runs.digest([tokens.ids.tolist(), tokens.mask.long().tolist()])


def _rounding(dtype: torch.dtype, logits: Tensor) -> float:
    """How far two ways of working out the same log-probability may be apart."""
    # logits round in proportion to the largest; 8 keeps the bound from vanishing where all are small
    largest = max(float(logits.abs().max()), 8.0)
    return 2 * torch.finfo(dtype).eps * largest if dtype.itemsize < 4 else 1e-4 + 64 * torch.finfo(dtype).eps * largest


def pair_states(model: ic.Model, pair: Pair, max_tokens: int | None = None) -> tuple[States, States]:
    """Both contexts of a pair.

    Args:
        max_tokens: the first so many targets; None for all.
    """
    agentic, assisted = (
        read_states(model, pair.tokens(side), pair.positions(side)[:max_tokens], pair.name, side) for side in SIDES
    )
    return agentic, assisted


def normed(model: ic.Model, states: States) -> Float[Tensor, "layer target d_model"]:
    """The stream through the model's final norm, once."""
    norm = model.module("ln_final")
    stream = states.stream.to(device=model.device, dtype=model.dtype)
    if not states.normed_last:
        return norm(stream)
    return torch.cat([norm(stream[:-1]), stream[-1:]])


def score(model: ic.Model, states: States, *, spread: bool = True, top: int = 0, rows: int = ROWS) -> Readout:
    """What each layer says about each target of one context.

    Args:
        spread, top, rows: as of `tiles.read_out`.

    Raises:
        CapabilityError: the last row is not what the model itself says.
        PlanError, CapabilityError: as `tiles.read_out`.
    """
    with torch.no_grad():
        readout = read_out(model, normed(model, states), states.ids, spread=spread, top=top, rows=rows)
    _check_last(states, readout)
    return readout


def score_pairs(
    model: ic.Model, states: Iterable[tuple[States, States]], js: JsMode | Literal["none"] = "none", *,
    top: int = 512, rows: int = ROWS,
) -> Iterator[PairScores]:  # fmt: skip
    """What the layers say about the targets of pairs, as many pairs at a time as fill `rows`.

    Args:
        states: of both contexts of each pair, drawn as they are needed.
        js: how to tell how far two contexts are apart: "none", or a mode of `tiles.divergence`.
        top: likeliest tokens of either side that its modes "topk_rest" and "topk_renorm" look at.
        rows: that go through the unembedding together.

    Raises:
        as `score`.
    """
    waiting: list[tuple[States, States]] = []
    for pair in states:
        # states of two kinds of file have other rows, and cannot lie in one tensor
        if waiting and waiting[0][0].layers != pair[0].layers:
            yield from _scored(model, waiting, js, top, rows)
            waiting = []
        waiting.append(pair)
        if 2 * len(pair[0].layers) * sum(len(left.ids) for left, _ in waiting) >= rows:
            yield from _scored(model, waiting, js, top, rows)
            waiting = []
    if waiting:
        yield from _scored(model, waiting, js, top, rows)


@torch.no_grad()
def _scored(
    model: ic.Model, pairs: Sequence[tuple[States, States]], js: JsMode | Literal["none"], top: int, rows: int
) -> Iterator[PairScores]:
    """Some pairs together."""
    # all agentic contexts and then all assisted ones, so that the two halves of the rows are the two sides of JS
    flat = [states for side in (0, 1) for states in (pair[side] for pair in pairs)]
    stream = [normed(model, states) for states in flat]
    sizes = [len(states.ids) for states in flat]
    keep = top if js.startswith("topk") else 0
    joined = torch.cat(stream, 1)
    whole = read_out(model, joined, torch.cat([states.ids for states in flat]), top=keep, rows=rows)
    parts = _split(whole, sizes)
    for states, part in zip(flat, parts, strict=True):
        _check_last(states, part)
    half, n = len(pairs), sum(sizes) // 2
    apart: list[Divergence | None] = [None] * half
    if js != "none":
        sides = (_part(whole, slice(n)), _part(whole, slice(n, None)))
        apart = [*_split(divergence(model, (joined[:, :n], joined[:, n:]), sides, js, rows=rows), sizes[:half])]
    for i, (agentic, _) in enumerate(pairs):
        yield PairScores(agentic.sample, agentic.layers, parts[i], parts[half + i], apart[i])


def _part(whole: Part, targets: slice) -> Part:
    """The same of some targets."""
    return replace(whole, **{name: x[:, targets] for name, x in vars(whole).items() if x is not None})


def _split(whole: Part, sizes: Sequence[int]) -> list[Part]:
    """The same sample by sample."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [_part(whole, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def _check_last(states: States, readout: Readout) -> None:
    """Refuse a lens whose last row is not the model's own output."""
    if states.final is None:
        return
    wanted, rounding = states.final
    last = float(readout.logprob[-1, -1])
    if not abs(last - wanted) <= rounding:
        raise ic.CapabilityError(
            f"{states.sample} {states.side}: the last row of the lens gives the last target {last:.4f} nats, the model "
            f"itself {wanted:.4f}: final norm and unembedding are not all that lies between its last block and its "
            "logits, or the stream is of another model, or normed twice"
        )
