"""Linear probes in their dual form: scores of test rows from inner products, for many labelings at once.

    ridge       min Σ (t - f)² + λ ‖w‖², f = w·z + b, t = ±1, λ = penalty · mean diagonal of K:
                α = (K + λI)⁻¹ (t - t̄), f = K_test α + t̄. Held-out scores of an inner fold B without fitting again:
                t_B - (P_BB)⁻¹ α_B, P = (K + λI)⁻¹ less its projection on the constant. The penalty is that of the least
                class-balanced square error of held-out scores; the threshold lies halfway between their class means
    means       f = z·(m_1 - m_0) - half of it at the classes' mean
    lda         f = z·Σ⁻¹(m_1 - m_0) - the same, Σ within classes, shrunk to its mean diagonal (Ledoit and Wolf)

More than two classes: one score per class (against the rest for ridge), the largest wins.

Source: Hastie, Tibshirani and Friedman (2009), sections 3.4, 4.3; Ledoit and Wolf (2004); the block formula is that of
leave-one-out, e.g. Golub, Heath and Wahba (1979), for more rows than one.
Shapes: targets `[t column score]`; scores `[layer s column score]`.
Cost: ridge t³ per penalty, shared by all labelings, and t² per labeling; means t² and lda t³ per labeling.
Must equal: a direct solve in the states themselves, split by split, to 1e-8; held-out scores those of fits without the
inner fold (under the outer fold's scaling).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .gram import Split


@dataclass(frozen=True, eq=False)
class Scores:
    """What a probe says.

    Attributes:
        test: scores of test rows; two classes have one, above 0 for the second.
        held: held-out scores of train rows over inner folds; None where a probe was not asked for them.
        penalty: that was chosen, per layer and labeling; NaN where there is none.
    """

    test: Float[Tensor, "layer s column score"]
    held: Float[Tensor, "layer t column score"] | None
    penalty: Float[Tensor, "layer column"]


def members(labels: Int[Tensor, "n column"], n_classes: int) -> Bool[Tensor, "n column score"]:
    """Which rows a score is to be high for: one score of two classes, else one per class."""
    classes = torch.arange(1, 2) if n_classes == 2 else torch.arange(n_classes)
    return labels[..., None] == classes.to(labels.device)


def predicted(scores: Float[Tensor, "*batch score"]) -> Int[Tensor, "*batch"]:
    """The class that scores say."""
    return (scores[..., 0] > 0).long() if scores.shape[-1] == 1 else scores.argmax(-1)


def typical(split: Split) -> Float[Tensor, " layer"]:
    """Mean squared length of train rows; 1 where all are the same, so that penalties stay above 0."""
    length = split.train.diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(length > 0, length, 1.0)


def ridge(split: Split, labels: Int[Tensor, "t column"], n_classes: int, penalties: tuple[float, ...]) -> Scores:
    """Ridge regression on ±1, with the penalty and the threshold of held-out scores."""
    high = members(labels, n_classes)
    t, columns, width = high.shape
    target = (2.0 * high.double() - 1).reshape(t, -1)
    there, absent = _weights(high)
    best = _Best()
    scale = typical(split)
    for penalty in penalties:
        system = split.train.clone()
        system.diagonal(dim1=1, dim2=2).add_((penalty * scale)[:, None])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
        dual = inverse @ (target - target.mean(0))
        held = target - _left_out(inverse, dual, split.inner)
        # halfway between the two class means of held-out scores: `there` and `absent` are the weights of those means
        middle = (held * (there + absent)).sum(1) / 2
        error = ((held - target).square() * (there + absent)).sum(1)
        error = error.unflatten(1, (columns, width)).sum(-1)
        scores = split.test @ dual + target.mean(0)
        best.offer(error, penalty, *(
            (value - middle[:, None]).unflatten(2, (columns, width)) for value in (scores, held)
        ))  # fmt: skip
    return Scores(best.test, best.held, best.penalty)


def difference_of_means(split: Split, labels: Int[Tensor, "t column"], n_classes: int) -> Scores:
    """The nearest class mean; of two classes the projection on the difference of their means."""
    share = class_shares(labels, n_classes)  # [t column class]
    along = torch.einsum("lst,tpc->lspc", split.test, share)
    half = torch.einsum("tpc,ltu,upc->lpc", share, split.train, share) / 2
    return Scores(against(along - half[:, None]), None, no_penalty(along))


def lda(split: Split, labels: Int[Tensor, "t column"], n_classes: int) -> Scores:
    """Linear discriminant analysis with equal priors and shrunk covariance."""
    t = len(labels)
    eye = torch.eye(t, dtype=torch.float64, device=split.train.device)
    shares, scores = class_shares(labels, n_classes), []
    for column in range(labels.shape[1]):
        share = shares[:, column]  # [t class]
        same = (labels[:, column, None] == labels[None, :, column]).double()
        within = eye - same / same.sum(0)
        inside = within @ split.train @ within
        shrinkage, mean_variance = _ledoit_wolf(inside, split.d)
        # solved as a ridge: (1 - s) Σ + s v I, in inner products of rows within classes
        ridge_ = shrinkage * torch.where(mean_variance > 0, mean_variance, 1.0)
        system = inside + (ridge_ * t / (1 - shrinkage).clamp(min=1e-12))[:, None, None] * eye
        solved = within @ torch.linalg.solve(system, within @ split.train @ share)
        dual = (share - solved) / ridge_[:, None, None]
        half = torch.einsum("tc,ltu,luc->lc", share, split.train, dual) / 2
        scores.append(split.test @ dual - half[:, None])
    whole = torch.stack(scores, 2)
    return Scores(against(whole), None, no_penalty(whole))


class _Best:
    """The scores of the penalty with the least error so far, for each layer and labeling by itself."""

    def __init__(self) -> None:
        self.error: Tensor | None = None

    def offer(self, error: Tensor, penalty: float, test: Tensor, held: Tensor) -> None:
        """Take over where the error is less."""
        if self.error is None:
            self.error, self.test, self.held = error, test, held
            self.penalty = torch.full_like(error, penalty)
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.penalty = torch.where(better, penalty, self.penalty)
        self.test = torch.where(better[:, None, :, None], test, self.test)
        self.held = torch.where(better[:, None, :, None], held, self.held)


def _left_out(
    inverse: Float[Tensor, "layer t t"], dual: Float[Tensor, "layer t q"], inner: Int[Tensor, " t"]
) -> Float[Tensor, "layer t q"]:
    """Residuals of train rows by fits without their inner fold."""
    # the bias is fitted too: the inverse less its projection on the constant, of which a block is taken
    constant = inverse.sum(2, keepdim=True)
    whole = constant.sum(1, keepdim=True)
    residual = torch.empty_like(dual)
    for fold in inner.unique():
        rows = _places(inner == fold)
        block = inverse[:, rows][:, :, rows] - constant[:, rows] @ (constant[:, rows] / whole).mT
        residual[:, rows] = torch.cholesky_solve(dual[:, rows], torch.linalg.cholesky(block))
    return residual


def _places(there: Bool[Tensor, " t"]) -> slice | Int[Tensor, " row"]:
    """The rows that are there; as a slice, which copies nothing, where they follow each other."""
    rows = there.nonzero().flatten()
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _weights(high: Bool[Tensor, "t column score"]) -> tuple[Float[Tensor, "t q"], Float[Tensor, "t q"]]:
    """One over the number of rows that a score is high for, of those rows; and of the others."""
    inside = high.double().flatten(1)
    return inside / inside.sum(0).clamp(min=1), (1 - inside) / (1 - inside).sum(0).clamp(min=1)


def class_shares(labels: Int[Tensor, "t column"], n_classes: int) -> Float[Tensor, "t column class"]:
    """Weights that make a mean of each class."""
    one_hot = (labels[..., None] == torch.arange(n_classes, device=labels.device)).double()
    return one_hot / one_hot.sum(0).clamp(min=1)


def balanced(
    guess: Int[Tensor, "layer n column"], labels: Int[Tensor, "n column"], n_classes: int
) -> Float[Tensor, "layer column"]:
    """Mean over classes of the share of right guesses."""
    right = (guess == labels).double()
    return torch.einsum("lnp,npc->lpc", right, class_shares(labels, n_classes)).mean(-1)


def against(scores: Float[Tensor, "layer s column class"]) -> Float[Tensor, "layer s column score"]:
    """Of two classes, the second's score above the first's."""
    return scores[..., 1:] - scores[..., :1] if scores.shape[-1] == 2 else scores


def no_penalty(scores: Float[Tensor, "layer s column class"]) -> Float[Tensor, "layer column"]:
    """NaN for every layer and labeling, of probes that choose none."""
    return torch.full((scores.shape[0], scores.shape[2]), torch.nan, dtype=torch.float64, device=scores.device)


def _ledoit_wolf(inside: Float[Tensor, "layer t t"], d: int) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
    """Shrinkage of the covariance of rows with these inner products, and its mean diagonal."""
    t = inside.shape[-1]
    norms = inside.diagonal(dim1=1, dim2=2)
    trace = norms.sum(1) / t
    squared = inside.square().sum((1, 2)) / t**2
    spread = (squared - trace.square() / d) / d
    noise = (norms.square().sum(1) / t - squared) / (d * t)
    # rows that do not differ within classes give 0 / 0: nothing is known of their covariance, and shrinkage is whole
    return (noise / spread).nan_to_num(1.0).clamp(1e-6, 1.0), trace / d
