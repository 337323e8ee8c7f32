"""Function vectors: what the chosen heads add to the residual stream at the last token, on average over a task.

    v = Σ_{(l, a) chosen} P_l(mean[l, a, last slot])          P_l: output projection of layer l, other heads zero

The published code calls the projection once per head, so a bias comes in once per head too (GPT-2, GPT-NeoX); that is
`bias="per_head"`, the default. Families that norm what attention gives before they add it (Gemma 2, OLMo 2) do not add
P_l(…) to the stream: `through_post_norm=True` sends each head's part through the norm at the scale that it has on the
mean of all heads, so that the parts of all heads and the bias sum to what attention adds.

Source: Todd et al. (2024), section 2.2, arXiv:2310.15213.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .effects import Head

Bias = Literal["per_head", "per_layer", "none"]


@dataclass(frozen=True, eq=False)
class FunctionVector(ic.Result):
    """A direction, with where it comes from. Vectors of the residual stream can be added, subtracted, scaled.

    Attributes:
        vector: float32; `d_model` numbers, or of `head_space` all heads of one layer side by side.
        kind: `resid`, or `head_space` (before the output projection: it means nothing in the residual stream, and
            cannot be injected).
        task: what it was made from, in words.
        model: the model it was made on.
        heads: `(layer, head, AIE)` of the heads that it sums.
        layer: of `resid` where it works best, if known; of `head_space` the heads' layer.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"vector": ("d",)}
    vector: Float[Tensor, " d"]
    kind: Literal["resid", "head_space"] = "resid"
    task: str = ""
    model: str = ""
    heads: tuple[tuple[int, int, float], ...] = ()
    layer: int | None = None

    @property
    def norm(self) -> float:
        """Euclidean length."""
        return float(self.vector.norm())

    def __add__(self, other: FunctionVector) -> FunctionVector:
        return self._joined(other, "+", self.vector + self._fitting(other))

    def __sub__(self, other: FunctionVector) -> FunctionVector:  # type: ignore[override]  # vectors make a vector
        return self._joined(other, "-", self.vector - self._fitting(other))

    def __mul__(self, factor: float) -> FunctionVector:
        task = f"{factor:g} ({self.task})" if " " in self.task else f"{factor:g} {self.task}"
        return replace(self, vector=factor * self.vector, task=task)

    __rmul__ = __mul__

    def __neg__(self) -> FunctionVector:
        return -1.0 * self

    def _fitting(self, other: FunctionVector) -> Tensor:
        if self.kind != other.kind or self.vector.shape != other.vector.shape:
            raise ic.PlanError(
                f"{self.task or 'one'} is {self.kind} of {len(self.vector)} numbers, {other.task or 'the other'} "
                f"{other.kind} of {len(other.vector)}: they do not add up; make both on one model"
            )
        if self.kind == "head_space" and self.layer != other.layer:
            raise ic.PlanError(f"heads of layers {self.layer} and {other.layer} do not add up; sum them as resid")
        return other.vector

    def _joined(self, other: FunctionVector, sign: str, vector: Tensor) -> FunctionVector:
        layer = self.layer if self.layer == other.layer else None
        model = self.model if self.model == other.model else f"{self.model}, {other.model}"
        heads = self.heads if self.heads == other.heads else ()
        return FunctionVector(vector, self.kind, f"{self.task} {sign} {other.task}", model, heads, layer)

    def random(self, seed: int = 0) -> FunctionVector:
        """A random direction of the same length: the control."""
        noise = torch.randn(self.vector.shape, generator=torch.Generator().manual_seed(seed))
        return replace(self, vector=noise * (self.norm / noise.norm()), task=f"random {seed}", heads=())

    def to(self, model: ic.Model) -> Float[Tensor, " d_model"]:
        """The vector as this model's residual stream takes it.

        Raises:
            PlanError: of another width, or in head space.
        """
        if self.kind != "resid":
            raise ic.PlanError(
                f"the vector of {self.task!r} is in head space, before the output projection of layer {self.layer}: it "
                "cannot be added to the residual stream. Use vector.projected(model)."
            )
        if len(self.vector) != model.d_model:
            raise ic.PlanError(
                f"the vector of {self.task!r} has {len(self.vector)} numbers (made on {self.model}), this model's "
                f"residual stream {model.d_model}; make it on this model"
            )
        return self.vector.to(model.device, model.dtype)

    def projected(self, model: ic.Model) -> FunctionVector:
        """A vector in head space as what it adds to the residual stream, without bias."""
        if self.kind == "resid":
            return self
        assert self.layer is not None
        sizes = model.sizes(ic.sites.z[self.layer])
        shape = sizes["head"], sizes["d_head"]
        if len(self.vector) != shape[0] * shape[1]:
            raise ic.PlanError(
                f"{len(self.vector)} numbers are not {shape[0]} heads of {shape[1]} in layer {self.layer}"
            )
        vector = _part(model, self.layer, self.vector.view(shape)) - _part(model, self.layer, torch.zeros(shape))
        return replace(self, vector=vector, kind="resid", layer=None)


def mean_vector(vectors: Sequence[FunctionVector]) -> FunctionVector:
    """The mean of several.

    Raises:
        PlanError: none, or vectors that do not fit each other.
    """
    if not vectors:
        raise ic.PlanError("the mean of no vectors is not defined")
    total = reduce(lambda a, b: a + b, vectors)
    return replace(total, vector=total.vector / len(vectors), task=f"mean of {', '.join(v.task for v in vectors)}")


def function_vector(
    model: ic.Model,
    mean: Float[Tensor, "layer head slot d_head"],
    heads: Sequence[Head | tuple[int, int, float]],
    *,
    slot: int = -1,
    bias: Bias = "per_head",
    through_post_norm: bool = False,
    task: str = "",
    layer: int | None = None,
) -> FunctionVector:
    """The function vector of these heads.

    Args:
        mean: of the task's clean prompts.
        heads: as `top_heads` gives them.
        slot: whose means; the last one is where the answer is predicted.
        bias: of the output projection: with every head (as published), once per layer, or not at all.
        through_post_norm: as the block adds it; no different in families without post-norm and multiplier.

    Raises:
        PlanError: no heads.
        SiteError: a head that the model does not have.
    """
    if not heads:
        raise ic.PlanError("a function vector needs at least one head")
    total = torch.zeros(model.d_model)
    seen: set[int] = set()
    known = set(model.heads)
    for at, head, _ in heads:
        if (at, head) not in known:
            raise ic.SiteError(
                f"no head {head} in layer {at}: this model has {model.n_layers} layers of {mean.shape[1]} heads"
            )
        alone = torch.zeros(mean.shape[1], mean.shape[3])
        alone[head] = mean[at, head, slot]
        part = _part(model, at, alone)
        # the projection of nothing is its bias: taken away where it is not to be counted with this head
        if bias == "none" or (bias == "per_layer" and at in seen):
            part = part - _part(model, at, torch.zeros_like(alone))
        total += part * _gain(model, at, mean[at, :, slot]) if through_post_norm else part
        seen.add(at)
    kept = tuple((int(at), int(head), float(aie)) for at, head, aie in heads)
    return FunctionVector(total, "resid", task, model.source, kept, layer)


def head_space(
    model: ic.Model,
    mean: Float[Tensor, "layer head slot d_head"],
    heads: Sequence[Head],
    *,
    slot: int = -1,
    task: str = "",
) -> dict[int, FunctionVector]:
    """Per layer of the chosen heads, their means side by side, zero elsewhere: vectors before the output projection."""
    by_layer: dict[int, Tensor] = {}
    for at, head, _ in heads:
        by_layer.setdefault(at, torch.zeros(mean.shape[1], mean.shape[3]))[head] = mean[at, head, slot]
    return {
        at: FunctionVector(
            vector.flatten(), "head_space", task, model.source, tuple((*head,) for head in heads if head[0] == at), at
        )
        for at, vector in sorted(by_layer.items())
    }


def similarity(vectors: Sequence[FunctionVector]) -> Float[Tensor, "task task"]:
    """Cosines between the vectors of several tasks."""
    unit = torch.stack([vector.vector / vector.norm for vector in vectors])
    return unit @ unit.T


@torch.no_grad()
def _part(model: ic.Model, layer: int, z: Tensor, **how: Any) -> Tensor:
    """What a layer's projection makes of heads `[head d_head]`, in float32 on the CPU. Called with batch and position,
    as a forward pass does."""
    return model.project(z[None, None].to(model.device, model.dtype), layer, **how)[0, 0].float().cpu()


def _gain(model: ic.Model, layer: int, z: Tensor) -> Tensor:
    """What the way behind the projection multiplies each number by, when all heads are at their means."""
    before, after = _part(model, layer, z), _part(model, layer, z, added=True)
    return torch.where(before == 0, 0.0, after / before)
