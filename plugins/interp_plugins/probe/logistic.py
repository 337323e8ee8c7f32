"""L2 logistic regression in its dual form, by Newton's method, many at once.

    min ½ ‖w‖² + C Σ_i s_i log(1 + exp(-t_i f_i)), f = w·z + b, t = ±1, b free; s_i = n / (2 n_class): balanced
    w = Zᵀ α: a Newton step solves (K + W⁻¹) α + b = f + g / W, W = C s p (1 - p), g = C s (y - p), as
    α = (I - √W B⁻¹ √W K)(…), B = I + √W K √W, whose eigenvalues are at least 1 however sure p is; steps that would
    raise the objective are halved

Newton's steps converge in about ten, where L-BFGS takes hundreds, and layers are matrices of one batch. More than two
classes: each against the rest.

Source: Rasmussen and Williams (2006), algorithm 3.1; the objective and its balanced weights are those of scikit-learn's
`LogisticRegression(class_weight="balanced")`.
Cost: about ten t³ / 3 per fit; nested choice of C: 7 · (5 + 1) fits per layer, split and labeling.
Must equal: the gradient is 0: ‖Zᵀ(α - g)‖ and |Σ g| below 1e-7 of ‖Zᵀ g‖ at α = 0; scikit-learn's coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

import interp_core as ic

from .decoders import Scores, balanced, members, predicted
from .gram import Split

STEPS = 60
"""Newton steps at most."""
TOLERANCE = 1e-9
"""Of the gradient, relative to that of α = 0."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted regression per problem.

    Attributes:
        dual: α.
        bias: b.
        gradient: norm of the gradient by w and b, over its norm at α = b = 0.
    """

    dual: Float[Tensor, "m t"]
    bias: Float[Tensor, " m"]
    gradient: Float[Tensor, " m"]


def fit(gram: Float[Tensor, "m t t"], high: Bool[Tensor, "m t"], c: float) -> Fit:
    """Fit a batch of problems.

    Args:
        gram: inner products of the rows.
        high: which rows are of the second class.
        c: weight of the loss, as scikit-learn's C.

    Raises:
        PlanError: a problem that does not converge.
    """
    y = high.double()
    balance = c * y.shape[1] / 2 * (y / y.sum(1, keepdim=True).clamp(min=1)
                                    + (1 - y) / (1 - y).sum(1, keepdim=True).clamp(min=1))  # fmt: skip
    dual, bias = torch.zeros_like(y), y.new_zeros(len(y))
    # at α = b = 0 every p is ½: what the gradient is measured by
    first = _gradient(gram, dual, balance * (y - 0.5)).clamp(min=1e-300)
    gradient = torch.ones_like(bias)
    for _ in range(STEPS):
        score = torch.einsum("mtu,mu->mt", gram, dual) + bias[:, None]
        p = torch.sigmoid(score)
        pull = balance * (y - p)
        gradient = _gradient(gram, dual, pull) / first
        if bool((gradient <= TOLERANCE).all()):
            return Fit(dual, bias, gradient)
        step, shift = _newton(gram, score, balance * p * (1 - p), pull)
        size = _line(gram, y, balance, (dual, bias), (step - dual, shift - bias))
        if not bool((size > 0).any()):
            break
        dual, bias = dual + size[:, None] * (step - dual), bias + size * (shift - bias)
    if bool((gradient > 1e-6).any()):
        raise ic.PlanError(
            f"logistic regression did not converge in {STEPS} steps (C {c:g}, relative gradient "
            f"{float(gradient.max()):.1e}); take a smaller C, or the ridge probe"
        )
    return Fit(dual, bias, gradient)


def logistic(split: Split, labels: Int[Tensor, "t column"], n_classes: int, penalties: tuple[float, ...]) -> Scores:
    """Scores of the regression whose C (the penalties here) has the best held-out balanced accuracy; the smaller of two
    equal ones."""
    high = members(labels, n_classes)
    inner = split.inner.unique()
    accuracies, helds = [], []
    for c in sorted(penalties):
        held = torch.zeros(len(split.train), *high.shape, dtype=torch.float64, device=split.train.device)
        for fold in inner if len(penalties) > 1 else ():
            rows, others = (split.inner == fold).nonzero().flatten(), (split.inner != fold).nonzero().flatten()
            inside = split.train[:, others[:, None], others]
            held[:, rows] = _scores(inside, split.train[:, rows[:, None], others], high[others], c)
        helds.append(held)
        accuracies.append(balanced(predicted(held), labels, n_classes))
    best = torch.stack(accuracies).argmax(0)  # [layer column], the first of equal ones
    test = torch.zeros(*split.test.shape[:2], *high.shape[1:], dtype=torch.float64, device=split.train.device)
    kept = torch.zeros_like(helds[0])
    penalty = torch.zeros(best.shape, dtype=torch.float64, device=best.device)
    for number, c in enumerate(sorted(penalties)):
        here = best == number
        if bool(here.any()):
            scores = _scores(split.train, split.test, high, c)
            test = torch.where(here[:, None, :, None], scores, test)
            kept = torch.where(here[:, None, :, None], helds[number], kept)
            penalty[here] = c
    return Scores(test, kept if len(penalties) > 1 else None, penalty)


def _scores(
    inside: Float[Tensor, "layer t t"],
    outside: Float[Tensor, "layer s t"],
    high: Bool[Tensor, "t column score"],
    c: float,
) -> Float[Tensor, "layer s column score"]:
    """Scores of other rows by fits on these, labeling by labeling."""
    out = []
    for column in high.flatten(1).unbind(1):
        fitted = fit(inside, column.expand(len(inside), -1), c)
        out.append(torch.einsum("lst,lt->ls", outside, fitted.dual) + fitted.bias[:, None])
    return torch.stack(out, 2).unflatten(2, high.shape[1:])


def _newton(
    gram: Float[Tensor, "m t t"], score: Float[Tensor, "m t"], weight: Float[Tensor, "m t"], pull: Float[Tensor, "m t"]
) -> tuple[Float[Tensor, "m t"], Float[Tensor, " m"]]:
    """Where Newton's step leads: α and b."""
    root = weight.sqrt()
    # B of the module: K and W⁻¹ themselves cannot be solved with where p is 0 or 1 to the last digit
    system = root[:, :, None] * gram * root[:, None, :]
    system.diagonal(dim1=1, dim2=2).add_(1.0)
    factor = torch.linalg.cholesky(system)
    right = torch.stack([weight * score + pull, weight], 2)
    solved = torch.cholesky_solve(root[:, :, None] * (gram @ right), factor)
    free, constant = (right - root[:, :, None] * solved).unbind(2)
    # the free bias asks that Σ α = 0, which two solutions of one system give
    bias = free.sum(1) / constant.sum(1)
    return free - bias[:, None] * constant, bias


def _line(
    gram: Float[Tensor, "m t t"],
    y: Float[Tensor, "m t"],
    balance: Float[Tensor, "m t"],
    now: tuple[Tensor, Tensor],
    step: tuple[Tensor, Tensor],
) -> Float[Tensor, " m"]:
    """The largest of 1, ½, ¼ … of a step that does not raise the objective; 0 where none is found."""

    def objective(size: Tensor) -> Tensor:
        dual, bias = now[0] + size[:, None] * step[0], now[1] + size * step[1]
        inner = torch.einsum("mtu,mu->mt", gram, dual)
        score = inner + bias[:, None]
        return (dual * inner).sum(1) / 2 + (balance * (softplus(score) - y * score)).sum(1)

    start = objective(torch.zeros_like(now[1]))
    size = torch.ones_like(start)
    for _ in range(30):
        # near the minimum steps change the objective by rounding alone
        worse = objective(size) > start * (1 + 1e-14)
        if not bool(worse.any()):
            return size
        size = torch.where(worse, size / 2, size)
    return torch.where(objective(size) > start * (1 + 1e-14), 0.0, size)


def _gradient(
    gram: Float[Tensor, "m t t"], dual: Float[Tensor, "m t"], pull: Float[Tensor, "m t"]
) -> Float[Tensor, " m"]:
    """Norm of the gradient by w and by b."""
    off = dual - pull
    by_weights = torch.einsum("mt,mtu,mu->m", off, gram, off).clamp(min=0)
    return (by_weights + pull.sum(1).square()).sqrt()
