"""A sparse autoencoder: features of a state, what they add up to, and edits of a site by them.

The formulas, their sources and what holds them are in `method`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

CHUNK_BYTES = 1 << 28
"""Of features that are in memory at a time."""


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder of one site.

    Attributes:
        site: what it reads and reconstructs, such as `S.resid_pre[6]`.
        architecture: "standard", "jumprelu", "topk" or "gated".
        weights: by SAELens' names.
        k: how many features of "topk" are active.
        subtract: b_dec is taken from what is read.
        centred: the mean over d_model is taken out before and put back after.
        source: the folder, and which model it was trained on, for messages.
    """

    site: S.Site
    architecture: str
    weights: Mapping[str, Tensor] = field(repr=False)
    k: int = 0
    subtract: bool = True
    centred: bool = False
    source: str = ""

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return len(self.weights["b_dec"])

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.weights["W_dec"])

    def check(self, model: ic.Model) -> SAE:
        """The same, if it fits the model.

        Raises:
            CapabilityError, SiteError: the model does not have the site.
            PlanError: another width.
        """
        if why := model.can(self.site, "read"):
            raise ic.CapabilityError(f"the autoencoder reads {self.site}: {why}")
        model.layers(self.site)
        sizes = model.sizes(self.site)
        if math.prod(sizes.values()) != self.d_in:
            has = " × ".join(f"{name} {size}" for name, size in sizes.items())
            raise ic.PlanError(
                f"{self.source} reads {self.d_in} numbers, {self.site} of this model has {has}; load the model that it "
                "was trained on"
            )
        return self

    def to(self, like: Tensor) -> SAE:
        """With weights where a value is, and at least as precise as it."""
        dtypes = {name: torch.promote_types(weight.dtype, like.dtype) for name, weight in self.weights.items()}
        weights = {name: weight.to(like.device, dtypes[name]) for name, weight in self.weights.items()}
        return replace(self, weights=weights)

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Activations of all features; of `z` x is `[… head d_head]`, or flat."""
        w = {
            name: weight.to(x.device, torch.promote_types(weight.dtype, x.dtype))
            for name, weight in self.weights.items()
        }
        u, _ = self._split(self.flat(x).to(w["b_dec"].dtype))
        u = u - w["b_dec"] if self.subtract else u
        if self.architecture == "gated":
            before = u @ w["W_enc"]
            return (before * w["r_mag"].exp() + w["b_mag"]).relu() * (before + w["b_gate"] > 0)
        p = u @ w["W_enc"] + w["b_enc"]
        if self.architecture == "jumprelu":
            return p.relu() * (p > w["threshold"])
        if self.architecture == "topk":
            best = p.topk(self.k, dim=-1)
            return torch.zeros_like(p).scatter(-1, best.indices, best.values.relu())
        return p.relu()

    def decode(self, f: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """What features add up to, b_dec with them; of a centred stream without its mean."""
        w_dec, b_dec = (self.weights[name].to(f) for name in ("W_dec", "b_dec"))
        return f @ w_dec + b_dec

    def reconstruct(
        self, x: Float[Tensor, "*axes"], f: Float[Tensor, "n d_sae"] | None = None
    ) -> Float[Tensor, "*axes"]:
        """x̂, of the shape and dtype of x.

        Args:
            f: features of the positions of x, if they are known; else they are worked out, some positions at a time.
        """
        parts = self.chunks(x)
        known = [None] * len(parts) if f is None else f.split([len(part) for part in parts])
        built = [
            self.decode(self.encode(part) if each is None else each) + self._split(part)[1]
            for part, each in zip(parts, known, strict=True)
        ]
        return torch.cat(built).to(x.dtype).view(x.shape)

    def chunks(self, x: Float[Tensor, "*axes"]) -> tuple[Float[Tensor, "n d_in"], ...]:
        """Positions one after the other, in parts whose features fit into memory together."""
        return self.flat(x).flatten(0, -2).split(max(CHUNK_BYTES // (8 * self.d_sae), 1))

    def direction(self, feature: int) -> Float[Tensor, " d_in"]:
        """What an activation of 1 adds to the reconstruction, in units of the site: a vector to steer with.

        Raises:
            PlanError: no such feature.
        """
        return self.weights["W_dec"][self._known(feature)]

    def replace(self, at: Any = None) -> ic.Edit:
        """An edit that puts the reconstruction in the place of the site.

        Args:
            at: where, as `Site.at` takes it (None: everywhere).
        """
        return self.where(at).apply(self.reconstruct)

    def scale(self, feature: int, factor: float, at: Any = None) -> ic.Edit:
        """An edit that multiplies a feature's activation and keeps all that the autoencoder does not explain: 0 takes
        the feature out.

        Raises:
            PlanError: no such feature.
        """
        return self.where(at).apply(_Moved(self, self._known(feature), factor=factor))

    def set(self, feature: int, activation: float, at: Any = None) -> ic.Edit:
        """An edit that gives a feature this activation, and keeps all that the autoencoder does not explain.

        Raises:
            PlanError: no such feature.
        """
        return self.where(at).apply(_Moved(self, self._known(feature), factor=0.0, offset=activation))

    def where(self, at: Any) -> S.Site:
        """The site at positions; everywhere, if they are None."""
        return self.site if at is None else self.site.at(at)

    def flat(self, x: Float[Tensor, "*axes"]) -> Float[Tensor, "... d_in"]:
        """A value of the site with its heads, where it has any, behind each other."""
        return x.flatten(-2) if self.site.info.unit == "head" and x.shape[-1] != self.d_in else x

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """What is encoded, and what is put back after decoding."""
        if not self.centred:
            return x, 0.0
        mean = x.mean(-1, keepdim=True)
        return x - mean, mean

    def _known(self, feature: int) -> int:
        if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < self.d_sae:
            raise ic.PlanError(f"there is no feature {feature!r}: {self.source} has {self.d_sae}, from 0 on")
        return feature


@dataclass(frozen=True, eq=False)
class _Moved:
    """A site with a feature's activation f at factor · f + offset; all that the autoencoder does not explain stays."""

    sae: SAE
    feature: int
    factor: float
    offset: float = 0.0

    def __call__(self, x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        active = torch.cat([self.sae.encode(part)[:, self.feature] for part in self.sae.chunks(x)])
        change = active * (self.factor - 1) + self.offset
        added = change[:, None] * self.sae.direction(self.feature).to(active)
        return (x.to(added.dtype) + added.view(x.shape)).to(x.dtype)

    def __repr__(self) -> str:
        change = f"× {self.factor:g}" if not self.offset else f":= {self.offset:g}"
        return f"feature {self.feature} {change}"
