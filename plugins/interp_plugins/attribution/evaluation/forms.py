"""One vector for a matrix of attributions: sequence, row and recursive form.

    N[g]    row g of the matrix M [target pos]: not-a-number → 0, negative → 0, divided by (its sum + 1e-8)
    seq     Σ over all target tokens g of N[g]
    row     Σ over the explained target tokens t of N[t]
    rec     Σ over the explained t of r, where r = N[t], and for k = t-1 … 0:  r += N[k] r[P+k],  r[P+k] := 0

Columns are the P prompt tokens and then the G target tokens. r[P+t], the token's own column, is never pushed on. With
a_t(k) the weight with which N[k] enters r, rec is linear:  a_t (1 - L) = 1_t,  L[j, k] = N[j, P+k] for k < j, one
triangular system for all t; only what stays in the target's columns depends on the order of the pushes.

Where all rows have one prompt part (methods that explain a span by one vector), seq, row and rec are that vector times
a number: they are computed as such, so that equal weights stay equal and all three give one ordering.

Source: the reference implementation of FlashTrace (Pan et al. 2026, arXiv:2602.01914), after CAGE's recursion.
Cost: one pass over M in blocks of rows; rec a [G G] float64 matrix more.
Must equal: the reference's vectors (5e-5, its float32), and the recursion done step by step (float64).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

import interp_core as ic

EPS = 1e-8
BLOCK = 2**22
"""Numbers that are normalised at a time."""


@dataclass(frozen=True, eq=False)
class Forms:
    """The three vectors of one matrix, over prompt and target tokens, in float64.

    Attributes:
        seq, row, rec: see the module.
        prompt: number of prompt tokens, which come first.
        replicated: all computed rows have the same prompt part, so that the three order the prompt alike.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("seq", "row", "rec")
    seq: Float[Tensor, " pos"]
    row: Float[Tensor, " pos"]
    rec: Float[Tensor, " pos"]
    prompt: int
    replicated: bool

    @property
    def prompt_weights(self) -> Float[Tensor, "form prompt"]:
        """What the metrics rank: the prompt's part of seq, row and rec."""
        return torch.stack([self.seq, self.row, self.rec])[:, : self.prompt]


def normalised(matrix: Float[Tensor, "target pos"]) -> Float[Tensor, "target pos"]:
    """The matrix with rows that add up to one (0 where nothing was computed or nothing is positive), in float64."""
    clean = _positive(matrix)
    return clean / (clean.sum(1, keepdim=True) + EPS)


def _positive(values: Float[Tensor, "... pos"]) -> Float[Tensor, "... pos"]:
    """Not-a-number and negative as 0, in float64."""
    return values.double().masked_fill(torch.isnan(values), 0.0).clamp(min=0)


def forms(matrix: Shaped[Tensor, "target pos"], explained: range | ic.Span) -> Forms:
    """Sequence, row and recursive vector of a matrix.

    Args:
        matrix: one row per target token; columns are the prompt's tokens and then the target's.
        explained: target tokens that are explained, counted within the target, half-open.

    Raises:
        PlanError: no such matrix, infinities, or tokens outside the target.
    """
    span = range(explained.start, explained.stop)
    prompt = _checked(matrix, span)
    matrix = matrix.detach()
    generated = normalised(matrix)[:, prompt:] if matrix.numel() <= BLOCK else _columns(matrix, prompt)
    starts = torch.zeros(len(span), len(matrix), dtype=torch.float64, device=matrix.device)
    starts[torch.arange(len(span)), torch.arange(span.start, span.stop)] = 1
    # all recursions at once: a (1 - L) = start, with one row of start per explained token
    pushes = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device) - generated.tril(-1)
    entering = torch.linalg.solve_triangular(pushes, starts, upper=False, left=False, unitriangular=True)
    coefficients = torch.stack([torch.ones_like(starts[0]), starts.sum(0), entering.sum(0)])  # of N's rows, per form
    common = _common_prompt(matrix, prompt)
    out = torch.zeros(3, matrix.shape[1], dtype=torch.float64, device=matrix.device)
    scales = []
    for first, rows in _blocks(matrix):
        part = coefficients[:, first : first + len(rows)]
        out += part @ normalised(rows)
        scales.append(_scales(rows))
    if common is not None:
        # one prompt part for all rows: a multiple of it, so that rounding cannot part equal weights
        out[:, :prompt] = (coefficients @ torch.cat(scales))[:, None] * common
    out[2, prompt:] = _kept(entering, generated, span)
    seq, row, rec = out
    return Forms(seq, row, rec, prompt, common is not None)


def _checked(matrix: Shaped[Tensor, "target pos"], span: range) -> int:
    """Number of prompt tokens.

    Raises:
        PlanError: see `forms`.
    """
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.is_floating_point():
        raise ic.PlanError(ic.errors.wrong("forms", "a matrix [target pos] of floats", matrix))
    target, width = matrix.shape
    if not 0 < target < width:
        raise ic.PlanError(
            f"forms: the matrix is [{target}, {width}]; its columns are prompt and target tokens together, so there "
            f"must be more than {target} of them: pass Attributed.rows at the projected positions"
        )
    if not 0 <= span.start < span.stop <= target:
        raise ic.PlanError(
            f"forms: explained tokens {span.start}:{span.stop} lie outside the target, whose tokens are 0:{target}"
        )
    if bool(torch.isinf(matrix).any()):
        row, column = (int(i) for i in torch.isinf(matrix).nonzero()[0])
        raise ic.PlanError(f"forms: the matrix is infinite at [{row}, {column}]; rows of it have no shares")
    return width - target


def _blocks(matrix: Float[Tensor, "target pos"]) -> Iterator[tuple[int, Float[Tensor, "some pos"]]]:
    size = max(1, BLOCK // matrix.shape[1])
    for first in range(0, len(matrix), size):
        yield first, matrix[first : first + size]


def _columns(matrix: Float[Tensor, "target pos"], start: int) -> Float[Tensor, "target some"]:
    """Columns of the normalised matrix, without holding all of it."""
    return torch.cat([normalised(rows)[:, start:] for _, rows in _blocks(matrix)])


def _scales(rows: Float[Tensor, "target pos"]) -> Float[Tensor, " target"]:
    """What each row is divided by, inverted; 0 for rows that were not computed."""
    return torch.where(torch.isnan(rows).all(1), 0.0, 1 / (_positive(rows).sum(1) + EPS))


def _common_prompt(matrix: Float[Tensor, "target pos"], prompt: int) -> Float[Tensor, " prompt"] | None:
    """The prompt part that all computed rows share, to the bit; None where they differ."""
    computed = matrix[:, :prompt][~torch.isnan(matrix).all(1)]
    if not len(computed):
        return None
    first = computed[0]
    for rows in computed.split(max(1, BLOCK // prompt)):
        if not bool(((rows == first) | (torch.isnan(rows) & torch.isnan(first))).all()):
            return None
    return _positive(first)


def _kept(
    entering: Float[Tensor, "explained target"], generated: Float[Tensor, "target target"], span: range
) -> Float[Tensor, " target"]:
    """What stays of rec in the target's columns: of a column that was pushed on, what came after the push."""
    column = torch.arange(len(generated), device=generated.device)
    token = torch.tensor(list(span), device=generated.device)
    after = entering @ generated.triu(1)
    return torch.where(column < token[:, None], after, entering @ generated).sum(0)
