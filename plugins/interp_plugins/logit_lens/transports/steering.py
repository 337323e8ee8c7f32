"""Changing a run along a Jacobian lens' directions: steering, ablating, swapping two tokens' coordinates.

    direction   a_v = J_lᵀ W_U[v]                 (fold_gain: W_U[v] times the final norm's gain)
    steering    h ← h + α · m · a_v / ‖a_v‖       m: median of ‖h‖ over positions of the unchanged run
    ablation    h ← h - Q Qᵀ h                    Q: an orthonormal basis of the chosen directions
    swap        h ← h + α · A (c* - A⁺ h)         A = [a_s a_t], c* = the two coordinates of the unchanged run, swapped

Directions of a swap are not made unit vectors: another length is another swap. On one layer this is h + α A (swap(c) -
c), as published, and α = 2 its "double strength". On several, each layer would swap back what the one before has
swapped; coordinates of the unchanged run as the goal make layers agree, and at α = 1 changing twice changes nothing.

Source: Gurnee et al. (2026); the clamp is the remedy that users of the published code found for bands of layers.
Cost: one forward pass for the unchanged run; a product with J per layer.
Must equal: a_v = the gradient of the read-out logit of v without the final norm; α = 1 twice is the unchanged stream.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core.positions import PositionLike

from .jacobian import JacobianLens

ALIKE, SAME = 0.99, 0.999
"""Cosine of two directions at which a swap is warned of, and refused."""


def direction(
    model: ic.Model, lens: JacobianLens, layer: int, token: int, *, fold_gain: bool = False
) -> Float[Tensor, " d_model"]:
    """The direction of a token in a layer's stream, a_v = J_lᵀ W_U[v], float32.

    Args:
        token: its id.
        fold_gain: the final norm's gain first; published forks differ in this.

    Raises:
        PlanError: no such token, or a layer that was not fitted.
    """
    return _directions(model, lens, layer, [token], fold_gain)[0]


def _directions(
    model: ic.Model, lens: JacobianLens, layer: int, tokens: Sequence[int], fold_gain: bool = False
) -> Float[Tensor, "token d_model"]:
    lens.check(model)
    matrix = lens.matrix(layer)
    for token in tokens:
        if not 0 <= token < model.d_vocab:
            raise ic.PlanError(f"no token id {token}, there are {model.d_vocab}, 0 to {model.d_vocab - 1}")
    rows = model.weights(S.logits)[:, list(tokens)].mT.to(matrix)
    if fold_gain:
        rows = rows * model.weights(S.final_norm).to(rows)
    return rows @ matrix


def steering(
    model: ic.Model,
    lens: JacobianLens,
    x: ic.Tokens | str,
    layers: Sequence[int],
    token: int,
    *,
    alpha: float = 4.0,
    at: PositionLike = None,
    fold_gain: bool = False,
) -> list[ic.Edit]:
    """Edits that push the stream towards a token, in each of some layers.

    Args:
        x: whose unchanged run gives the length of a step, the median length of its stream; one forward pass.
        alpha: in such lengths; negative pushes away.
        at: positions that are changed (None: all).
    """
    edits = []
    clean = model.run(x, read=[S.resid_post[layer] for layer in layers], logits=False)
    for layer in layers:
        length = clean[S.resid_post[layer]].plain.float().norm(dim=-1).median()
        unit = torch.nn.functional.normalize(direction(model, lens, layer, token, fold_gain=fold_gain), dim=0)
        edits.append(S.resid_post[layer].at(at).add((alpha * float(length) * unit).to(model.dtype)))
    return edits


def ablation(
    model: ic.Model, lens: JacobianLens, layers: Sequence[int], tokens: Sequence[int], *, at: PositionLike = None
) -> list[ic.Edit]:
    """Edits that take all that lies along some tokens' directions out of the stream."""
    return [
        S.resid_post[layer].at(at).project(_directions(model, lens, layer, tokens).to(model.dtype)) for layer in layers
    ]


def swap(
    model: ic.Model,
    lens: JacobianLens,
    x: ic.Tokens | str,
    layers: Sequence[int],
    tokens: tuple[int, int],
    *,
    alpha: float = 1.0,
    at: PositionLike = None,
) -> list[ic.Edit]:
    """Edits that exchange the coordinates of two tokens, in each of some layers; the run has to be of the same `x`.

    Args:
        x: whose unchanged run gives the coordinates; one forward pass.
        tokens: ids of the two.
        alpha: 1 exchanges them, 2 is the published double strength.

    Raises:
        PlanError: the directions are nearly one.
    """
    sites = [S.resid_post[layer].at(at) for layer in layers]
    clean = model.run(x, read=sites, logits=False)
    edits = []
    for layer, site in zip(layers, sites, strict=True):
        basis = _directions(model, lens, layer, list(tokens)).mT
        _demand_apart(basis, layer, tokens)
        value = clean[site].plain
        # of the unchanged run, whatever earlier layers of the edited run have done to the stream
        goal = (value.to(basis) @ torch.linalg.pinv(basis).mT).flip(-1)
        edits.append(site.apply(_clamp(basis, goal, alpha)))
    return edits


def swapped(resid: Float[Tensor, "... d_model"], basis: Float[Tensor, "d_model 2"], alpha: float = 1.0) -> Tensor:
    """A stream with the coordinates of two directions, the columns of `basis`, exchanged."""
    coordinates = resid @ torch.linalg.pinv(basis).mT
    return resid + alpha * (coordinates.flip(-1) - coordinates) @ basis.mT


def _clamp(basis: Tensor, goal: Tensor, alpha: float) -> Callable[[Tensor], Tensor]:
    inverse = torch.linalg.pinv(basis)

    def clamp(resid: Tensor) -> Tensor:
        wide = resid.to(basis)
        return (wide + alpha * (goal - wide @ inverse.mT) @ basis.mT).to(resid.dtype)

    # edits by a function are told apart by a key, or a cached sweep could not tell two swaps apart
    key = hashlib.sha256(basis.cpu().numpy().tobytes() + goal.cpu().numpy().tobytes()).hexdigest()[:16]
    return ic.keyed(clamp, f"swap {alpha:g} {key}")


def _demand_apart(basis: Tensor, layer: int, tokens: tuple[int, int]) -> None:
    cosine = abs(float(torch.nn.functional.cosine_similarity(basis[:, 0], basis[:, 1], dim=0)))
    if cosine >= SAME:
        raise ic.PlanError(
            f"layer {layer}: the directions of tokens {tokens[0]} and {tokens[1]} are nearly one (cosine "
            f"{cosine:.4f}), so there is nothing to exchange"
        )
    if cosine >= ALIKE:
        warnings.warn(
            f"layer {layer}: the directions of tokens {tokens[0]} and {tokens[1]} are much alike (cosine "
            f"{cosine:.4f}), so coordinates are large and exchange little",
            stacklevel=3,
        )
