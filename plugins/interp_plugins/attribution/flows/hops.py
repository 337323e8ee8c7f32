"""The multi-hop recursions of information flow: from an answer through its reasoning to the prompt.

    v0 = flow into the answer                    r0 = v0's share on the reasoning      w = v0 on the reasoning
    vh = flow into the reasoning, by weights w   rh = r(h-1) * vh's share there        w = vh on the reasoning
    observed = v0 * mask + sum over h of r(h-1) * vh * mask

A vector is a number per token of the row; `mask` is 1 on what may explain: not on the reasoning, the answer and what
follows the reasoning. Where a hop has nothing to go on, it and those after it are zero.

    stop_words   tokens "," "." and blanks explain nothing: no weight in the first flow, none in any vector
    over="all"   answer and reasoning are one stretch R, the hull of both: all flows go into it, the mask ends before it
    split        the reasoning in n segments, from the last to the first: each passes on what fell on it,
                     vk = flow into segment k by weights pending_k, without k itself    a = sum(pending_k) / sum(vk)
                     observed += a * vk * mask      pending of earlier segments += a * vk there

Source: Pan et al. (2026), arXiv:2602.01914 (FlashTrace), in the state of the paper; `hop0="sink"` is the later one.
Cost: a flow per hop, or per segment.
Must equal: the recursions above by hand, and the published numbers (the tests).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Flow = Callable[[Sequence[int], Tensor | None], Tensor]
"""The flow into tokens, by their weights or evenly (None): a number per token of the row `[pos]`."""
Combine = Literal["sum", "avg"]


class Parts(NamedTuple):
    """Where the parts stand that hops go between, as tokens of a row of `length`.

    Attributes:
        answer: what is explained.
        reasoning: what hops go through.
        length: of the row.
    """

    answer: range
    reasoning: range
    length: int

    @property
    def hull(self) -> range:
        """Answer and reasoning as one stretch."""
        parts = [part for part in (self.answer, self.reasoning) if len(part)]
        return range(min(part.start for part in parts), max(part.stop for part in parts)) if parts else range(0)


class Hops(NamedTuple):
    """What hops found.

    Attributes:
        observed: what explains the answer.
        vectors: each flow as it was, `v0` first.
        mass: what each hop passes on, in parts of what the answer was given.
        notes: plain values: segments and what they passed on.
    """

    observed: Float[Tensor, " pos"]
    vectors: Float[Tensor, "hop pos"]
    mass: Float[Tensor, " hop"]
    notes: Mapping[str, Any]


def multi_hop(
    flow: Flow, parts: Parts, n_hops: int, *, through: Flow | None = None, keep: Bool[Tensor, " pos"] | None = None,
    into_all: bool = False, hop0: Literal["all", "sink"] = "all", combine: Combine = "sum", divisor: int = 0,
) -> Hops:  # fmt: skip
    """Hops from the answer into the reasoning, again and again.

    Args:
        through: the flow into the reasoning, of all hops after the first (default: `flow`).
        keep: tokens that are no stop words.
        into_all: flows go into the hull of answer and reasoning.
        hop0: with `into_all`, whether the first flow goes into all of it or into the answer.
        combine: "avg" divides what was observed by `divisor`, or by how many vectors it is the sum of.
    """
    through = through or flow
    stretch = parts.hull if into_all else parts.reasoning
    first = parts.answer if not into_all or hop0 == "sink" else stretch
    kept = torch.ones(parts.length, dtype=torch.float64) if keep is None else keep.double()
    mask = _mask(parts, stretch.start if into_all and len(stretch) else None) * kept
    vectors = [flow(first, _even(first, keep)) * kept]
    observed, mass, ratio = vectors[0] * mask, list[Tensor](), vectors[0].new_ones(())
    for hop in range(n_hops + 1):
        last = vectors[-1]
        weights = last[stretch.start : stretch.stop]
        total = last.sum()
        ratio = ratio * (weights.sum() / total if total > 0 else torch.zeros_like(total))
        mass.append(ratio)
        if hop == n_hops:
            break
        # `not >` so that a NaN ends the hops, too
        if not (ratio > 0) or not bool(weights.any()):
            vectors.append(torch.zeros_like(last))
            continue
        vectors.append(through(stretch, weights / weights.sum()) * kept)
        observed = observed + vectors[-1] * mask * ratio
    if combine == "avg":
        observed = observed / (divisor or len(vectors))
    return Hops(observed, torch.stack(vectors), torch.stack(mass), {})


def split_hop(
    flow: Flow, parts: Parts, n_hops: int, *, through: Flow | None = None, combine: Combine = "sum", divisor: int = 0
) -> Hops:
    """One hop per segment of the reasoning, from the last to the first; `n_hops` is how many segments there are."""
    through = through or flow
    mask = _mask(parts, None)
    vectors = [flow(parts.answer, None)]
    first = vectors[0]
    observed, pending = first * mask, first.clone()
    mass = [first.new_ones(())]
    passed_on: list[dict[str, Any]] = []
    for number, segment in reversed(list(enumerate(segments(parts.reasoning, n_hops)))):
        waiting = pending[segment.start : segment.stop].clone()
        if not bool(waiting.any()):
            vectors.append(torch.zeros_like(first))
            mass.append(first.new_zeros(()))
            continue
        vector = through(segment, waiting / waiting.sum()).clone()
        # what a segment takes from itself is explained by nothing earlier: it is left out, and the rest scaled up
        vector[segment.start : segment.stop] = 0
        total = vector.sum()
        share = waiting.sum() / total if total > 0 else torch.zeros_like(total)
        observed = observed + share * vector * mask
        earlier = slice(parts.reasoning.start, segment.start)
        pending[earlier] += share * vector[earlier]
        vectors.append(vector)
        mass.append(waiting.sum() / first.sum())
        passed_on.append({
            "segment": number, "start": segment.start, "stop": segment.stop, "pending": float(waiting.sum()),
            "total": float(total), "share": float(share),
        })  # fmt: skip
    if combine == "avg":
        observed = observed / (divisor or len(vectors))
    return Hops(observed, torch.stack(vectors), torch.stack(mass), {"segments": passed_on})


def segments(stretch: range, n: int) -> list[range]:
    """A stretch in n parts of about one length, the first ones longer; fewer where it has fewer tokens."""
    n = min(n, len(stretch))
    if n <= 0:
        return []
    size, longer = divmod(len(stretch), n)
    starts = [stretch.start + i * size + min(i, longer) for i in range(n + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _mask(parts: Parts, start: int | None) -> Tensor:
    """1 on the tokens that may explain `[pos]`.

    Args:
        start: nothing does from here on (default: from the reasoning's end on, nor reasoning and answer).
    """
    mask = torch.ones(parts.length, dtype=torch.float64)
    if start is not None:
        mask[start:] = 0
        return mask
    for part in (parts.answer, parts.reasoning):
        mask[part.start : part.stop] = 0
    if len(parts.reasoning):
        mask[parts.reasoning.stop :] = 0
    return mask


def _even(part: range, keep: Tensor | None) -> Tensor | None:
    """Weights of a first flow: even, none on stop words if there are any; all even where there is nothing else."""
    if keep is None:
        return None
    weights = keep[part.start : part.stop].double()
    return weights / weights.sum() if 0 < weights.sum() < len(weights) else None
