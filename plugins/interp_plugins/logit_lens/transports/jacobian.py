"""Jacobian lens: a layer's stream, carried to the end by the mean Jacobian of everything that follows.

    J_l[i, j] = mean over prompts of 1/|V| Σ_{t∈V} Σ_{t'∈V} ∂f[t', i] / ∂h_l[t, j]        V = {skip_first, …, T - 2}
    read out    logits = readout(J_l h_l)                direction of a token    a_v = J_lᵀ W_U[v]

h_l is the output of block l, f that of the last block, before the final norm. Targets are summed over and sources are
averaged over; the first positions, whose attention sinks are like no others, and the last, which has no target of its
own, are left out on both sides. Row i of J is a coordinate of the output. Rows `h @ J.T` are read out, directions are
`W_U[v] @ J`: reading applies J, steering its transpose.

Source: Gurnee et al. (2026), "Verbalizable Representations Form a Global Workspace in Language Models".
Cost: reading out one product [d_model d_model] per row; fitting see `fitting`.
Must equal: the sum of autograd's Jacobians; I + c A for blocks that add A times the mean of what came before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic


@dataclass(frozen=True, eq=False)
class JacobianLens:
    """Matrices by layer. Called with a layer and rows of its stream it gives them as the last block would.

    Attributes:
        matrices: per source layer J_l, float32 or wider.
        n_prompts: that the mean is over.
        metadata: how it was fitted: plain values, as files carry them.
        halves: the means over every other prompt, where the fit kept them.
    """

    matrices: Mapping[int, Float[Tensor, "d_model d_model"]]
    n_prompts: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    halves: tuple[Mapping[int, Tensor], Mapping[int, Tensor]] | None = None

    FIRST = 0
    """The first layer that a lens of this kind can have: the embedding (-1) is none of its rows."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that it has a matrix for."""
        return tuple(sorted(self.matrices))

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return next(iter(self.matrices.values())).shape[0]

    def matrix(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """J of a layer.

        Raises:
            PlanError: it was not fitted.
        """
        if layer not in self.matrices:
            raise ic.PlanError(
                f"the Jacobian lens has no layer {layer}; it was fitted for {listed(self.layers)}. Fit it for this "
                "one, or read the layer without a lens"
            )
        return self.matrices[layer]

    def __call__(self, layer: int, resid: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Rows of a layer's stream as the last block would give them; worked out in float32."""
        matrix = self.matrix(layer).to(resid.device)
        return (resid.to(matrix.dtype) @ matrix.mT).to(resid.dtype)

    def check(self, model: ic.Model) -> JacobianLens:
        """The lens itself, if it fits a model.

        Raises:
            PlanError: another width or other layers, or entries that are not finite.
        """
        if self.d_model != model.d_model:
            raise ic.PlanError(f"the Jacobian lens is of width {self.d_model}, the model's stream of {model.d_model}")
        if outside := [layer for layer in self.layers if not 0 <= layer < model.n_layers - 1]:
            raise ic.PlanError(
                f"the Jacobian lens has layer {outside[0]}, this model's source layers are 0 to {model.n_layers - 2}"
            )
        if bad := [layer for layer, matrix in self.matrices.items() if not bool(matrix.isfinite().all())]:
            raise ic.PlanError(f"the Jacobian lens has entries that are not finite, in layer {bad[0]}")
        return self

    def agreement(self) -> dict[int, tuple[float, float]]:
        """How far fits on the two halves of the prompts are apart, per layer: relative Frobenius distance, and cosine.

        Raises:
            PlanError: the halves are not there, or one of them is empty.
        """
        if self.halves is None or self.n_prompts < 2:
            raise ic.PlanError("this Jacobian lens does not hold its halves: fit it on two prompts or more")
        return {layer: apart(self.halves[0][layer], self.halves[1][layer]) for layer in self.layers}

    def __str__(self) -> str:
        return f"Jacobian lens of layers {listed(self.layers)}, width {self.d_model}, {self.n_prompts} prompts"


def apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Relative Frobenius distance of two matrices, by their mean norm, and their cosine."""
    norms = a.norm(), b.norm()
    return float((a - b).norm() * 2 / sum(norms)), float((a * b).sum() / (norms[0] * norms[1]))


def merged(lenses: Sequence[JacobianLens]) -> JacobianLens:
    """One lens of several fits, each as heavy as its prompts.

    Raises:
        PlanError: they were not fitted in the same way, or have other layers.
    """
    first, n = lenses[0], sum(lens.n_prompts for lens in lenses)
    for lens in lenses[1:]:
        if lens.layers != first.layers:
            raise ic.PlanError(f"fits of layers {listed(first.layers)} and {listed(lens.layers)} cannot be merged")
        names = {*lens.metadata, *first.metadata} - COUNTS
        if differs := sorted(name for name in names if lens.metadata.get(name) != first.metadata.get(name)):
            raise ic.PlanError(f"these fits cannot be merged: they differ in {', '.join(differs)}")
    sums = {
        layer: torch.stack([lens.matrices[layer] * (lens.n_prompts / n) for lens in lenses]).sum(0)
        for layer in first.layers
    }
    return JacobianLens(sums, n, {**first.metadata, "n_prompts": n})


COUNTS = frozenset({"n_prompts", "texts", "seconds", "stopped"})
"""Metadata in which fits that belong together may differ."""


def listed(layers: Sequence[int]) -> str:
    """Layers as people write them."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers)) or "no layer"
