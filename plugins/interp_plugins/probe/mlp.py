"""A small network as a capacity check: one hidden layer of 64, trained on the same inner products.

States enter in an orthonormal basis of what the train rows span (their inner products are all that is needed); weights
are Gaussian, so the basis does not matter before training. Full batches, Adam, classes balanced, weight decay; settings
are fixed, so that none is chosen by test rows.

Source: Hewitt and Liang (2019), arXiv:1909.03368, whose MLP probes are the reason to have a control task.
Cost: steps · t · t · 64 per layer and labeling.
Must equal: itself under one seed; above chance on labels that no linear score tells (exclusive or).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .decoders import Scores, against, no_penalty, typical
from .gram import Split

HIDDEN, LEARNING_RATE, DECAY, TRAINING = 64, 1e-2, 1e-3, 150


def mlp(split: Split, labels: Int[Tensor, "t column"], n_classes: int, seed: int) -> Scores:
    """Scores of a network for each layer and labeling."""
    fitted, other = _coordinates(split)
    scores = _trained(fitted, other, labels, n_classes, seed)
    return Scores(against(scores), None, no_penalty(scores))


def _coordinates(split: Split) -> tuple[Float[Tensor, "layer t r"], Float[Tensor, "layer s r"]]:
    """Train and test rows in a basis of the train rows, of mean squared length 1."""
    values, vectors = torch.linalg.eigh(split.train)
    rank = min(split.train.shape[1], split.d)
    values, vectors = values[:, -rank:], vectors[:, :, -rank:]
    values = values.clamp(min=values[:, -1:].clamp(min=1e-300) * 1e-10)
    length = typical(split).sqrt()[:, None, None]
    basis = vectors / values.sqrt()[:, None]
    return split.train @ basis / length, split.test @ basis / length


def _trained(
    fitted: Float[Tensor, "layer t r"], other: Float[Tensor, "layer s r"], labels: Int[Tensor, "t column"],
    n_classes: int, seed: int,
) -> Float[Tensor, "layer s column class"]:  # fmt: skip
    n, _t, r = fitted.shape
    columns = labels.shape[1]
    of = (labels.T[..., None] == torch.arange(n_classes)).double()  # [column t class]
    weight = of / (n_classes * of.sum(1, keepdim=True).clamp(min=1))
    random = torch.Generator().manual_seed(seed)
    shapes = [(r, HIDDEN), (1, HIDDEN), (HIDDEN, n_classes), (1, n_classes)]
    scales = [2**0.5, 0.0, HIDDEN**-0.5, 0.0]
    with torch.inference_mode(False), torch.enable_grad():
        parameters = [
            (scale * torch.randn(*shape, generator=random, dtype=torch.float64))
            .repeat(n, columns, 1, 1)
            .requires_grad_()
            for shape, scale in zip(shapes, scales, strict=True)
        ]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=DECAY)
        inside = fitted.clone()[:, None]
        for _ in range(TRAINING):
            optimizer.zero_grad()
            (-(_forward(inside, parameters).log_softmax(-1) * weight).sum()).backward()
            optimizer.step()
    with torch.no_grad():
        return _forward(other[:, None], [parameter.detach() for parameter in parameters]).transpose(1, 2)


def _forward(rows: Tensor, parameters: list[Tensor]) -> Tensor:
    first, shift, second, bias = parameters
    return torch.relu(rows @ first + shift) @ second + bias
