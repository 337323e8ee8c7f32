"""What a vector says in words: its decoded vocabulary, and a vector made only to say the same.

    decoded(v) = softmax(unembed(final norm(v)))
    reconstructed(v): w that minimises the cross-entropy from decoded(v) to decoded(w), by Adam, then of v's length

If w did what v does, the words alone would explain v.

Source: Todd et al. (2024), section 3.2; after nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .vectors import FunctionVector


@torch.no_grad()
def decoded(model: ic.Model, vector: FunctionVector) -> Float[Tensor, " d_vocab"]:
    """Probabilities of the tokens that the model would read out of the vector, float32.

    Raises:
        PlanError: a vector that does not fit the model.
        CapabilityError: a model without a readout.
    """
    return torch.softmax(model.readout(vector.to(model)).float(), -1).cpu()


def words(model: ic.Model, probabilities: Float[Tensor, " d_vocab"], k: int = 10) -> list[tuple[str, float]]:
    """The k likeliest tokens and their probabilities."""
    top = probabilities.topk(min(k, len(probabilities)))
    return [(model.word(token), float(p)) for p, token in zip(top.values, top.indices.tolist(), strict=True)]


class Reconstruction(NamedTuple):
    """A vector that decodes as another one does.

    Attributes:
        vector: of the other's length.
        kl: KL divergence from the other's decoded distribution to its own, over the tokens that were to match (nats).
        cosine: with the other.
    """

    vector: FunctionVector
    kl: float
    cosine: float


def reconstructed(
    model: ic.Model, vector: FunctionVector, *, top: int | None = 100, steps: int = 1000, lr: float = 0.5, seed: int = 0
) -> Reconstruction:
    """Fit a vector, from a random start, until its decoded distribution is that of another.

    Args:
        top: match the probabilities of the other's likeliest tokens (None: of all).
        steps, lr: of Adam.
        seed: of the start.
    """
    wanted = decoded(model, vector).to(model.device)
    chosen = wanted.topk(min(top or len(wanted), len(wanted))).indices
    start = torch.randn(len(vector.vector), generator=torch.Generator().manual_seed(seed))
    fitted = start.to(model.device, model.dtype).requires_grad_()
    adam = torch.optim.Adam([fitted], lr=lr)
    for _ in range(steps):
        logprob = torch.log_softmax(model.readout(fitted).float(), -1)
        loss = -(wanted[chosen] * logprob[chosen]).sum()
        (fitted.grad,) = torch.autograd.grad(loss, [fitted])
        adam.step()
    direction = fitted.detach().float().cpu()
    same_words = replace(
        vector, vector=direction * (vector.norm / direction.norm()), task=f"decodes as {vector.task}", heads=()
    )
    p, q = (x[chosen.cpu()] / x[chosen.cpu()].sum() for x in (wanted.cpu(), decoded(model, same_words)))
    kl = float((p * (p / q).log()).nan_to_num().sum())
    return Reconstruction(same_words, kl, float(torch.cosine_similarity(same_words.vector, vector.vector, 0)))
