"""Residual norm: how long the residual stream is after each layer.

    norm[layer] = ‖resid_post[layer]‖

Source: this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S


class NormConfig(ic.Config):
    """Settings.

    Attributes:
        power: of the norm.
    """

    power: int = 1


@dataclass(frozen=True, eq=False)
class Norms(ic.Result):
    """Norms of the residual stream."""

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"norm": ("layer", "batch", "pos")}
    norm: Float[Tensor, "layer batch pos"]


class ResidNorm(ic.Method):
    """How long the residual stream is."""

    name = "resid_norm"
    requires = frozenset({"resid_post"})
    Config = NormConfig

    def run(self, model: ic.Model, tokens: ic.Tokens, config: NormConfig) -> Norms:
        """One run."""
        stream = model.run(tokens, read=S.resid_post, logits=False)[S.resid_post]
        return Norms(stream.norm(dim=-1) ** config.power)
