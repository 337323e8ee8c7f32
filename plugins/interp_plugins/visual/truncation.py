"""What a model says when the image is taken away from a layer on, and from which layer on that costs nothing.

    answered   greedy texts with V gone from layer l on, in the prompt and for every new token; layer L: clean
    Drop(l)    score(L) - score(l), sample by sample; means with intervals over images
    enough     min{l : the upper one-sided 95 % bound of Drop(l) ≤ δ}, the non-inferiority margin; L: none
    for good   the same of all layers from l on

Source: specification of this project. Shapes: scores `[sample layer]`. Cost: one generation per layer.
Must equal: generation with a mask by hand, planted scores (tests/test_visual_truncation.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

import interp_core as ic
from interp_core import report, stats, visual

from . import depth
from .depth import Layers


def answered(
    model: ic.Model, prompts: ic.Tokens, layers: Sequence[int], *, max_new_tokens: int, stop: int | None = None,
    progress: bool = False,
) -> dict[int, list[str]]:  # fmt: skip
    """Greedy answers by layer, one text per prompt.

    Args:
        prompts: texts with images, without an answer.
        layers: 0 to L; at L nothing is taken away.
        stop: the layer from which on the image is there again, for a band (None: none).
        max_new_tokens: the same for all, so that answers can be compared.
        progress: show from the beginning how much is done.

    Raises:
        PlanError: no images, or prompts that hold their answer.
        SiteError: a layer that there is not.
    """
    if not any(prompts.spans.get("vision", ())):
        raise ic.PlanError("no prompt has visual tokens; give texts with images")
    if any(prompts.spans.get("target", ())):
        raise ic.PlanError("the prompts hold their answers (span 'target'); tokenize them without, to generate answers")
    # all made before the first generation, so that a layer that there is not is refused at once
    edits = {layer: visual.truncated(model, layer, stop) for layer in layers}
    texts = {}
    with ic.Progress("answers without the image", len(edits), shown=progress) as shown:
        for layer, gone in edits.items():
            texts[layer] = list(model.generate(prompts, gone, max_new_tokens=max_new_tokens).texts)
            shown.add()
    return texts


@dataclass(frozen=True, eq=False)
class Drops:
    """What is lost without the image.

    Attributes:
        layers: that it was taken away from.
        drop: mean Drop(l) with its two-sided interval.
        upper: one-sided 95 % bound.
        margin: δ.
        enough, for_good: decoder layers; L: none.
        per_sample: Drop of each sample `[sample layer]`.
    """

    layers: Layers
    drop: stats.Band
    upper: Float[np.ndarray, " layer"]
    margin: float
    enough: int
    for_good: int
    per_sample: Float[np.ndarray, "sample layer"]

    def at(self, layer: int) -> Float[np.ndarray, " sample"] | None:
        """Each sample's Drop at a layer; None where it was not run, which a gate tells as missing."""
        numbers = self.layers.numbers
        return self.per_sample[:, numbers.index(layer)] if layer in numbers else None

    def table(self) -> list[dict[str, Any]]:
        """One row per layer."""
        columns = zip(self.layers.numbers, self.drop.value, self.drop.low, self.drop.high, self.upper, strict=True)
        return [
            {"layer": layer, "drop": float(value), "low": float(low), "high": float(high), "upper": float(upper)}
            for layer, value, low, high, upper in columns
        ]

    def __str__(self) -> str:
        told = "at no layer" if self.enough == self.layers.count else f"from layer {self.enough}"
        return f"the image can go {told} for a loss of {self.margin:g} at most ({self.drop.units} images)"

    def chart(self) -> report.Curves:
        """Drop by layer, and the margin."""
        lines = [report.Line.of("drop", self.drop), report.Line("margin", [self.margin] * len(self.layers.numbers))]
        return report.Curves(
            lines, list(map(str, self.layers.numbers)), title="Score lost without the image", xlabel="gone from layer",
            ylabel="score", caption=f"Clean score minus score; 95 % intervals over images: {self}.",
        )  # fmt: skip


def drops(
    scores: Float[np.ndarray, "sample layer"],
    clean: Float[np.ndarray, " sample"],
    layers: Layers,
    *,
    margin: float,
    boot: stats.Bootstrap | None = None,
) -> Drops:
    """Drops of scores.

    Args:
        scores: of the answers without the image, by layer.
        clean: with it.
        margin: δ, what may be lost.
        boot: with the samples' images as clusters.

    Raises:
        PlanError: shapes that do not agree, numbers that are not finite, a margin below 0.
    """
    values, whole = np.asarray(scores, dtype=np.float64), np.asarray(clean, dtype=np.float64)
    if values.shape != (len(whole), len(layers.numbers)) or margin < 0:
        wanted = f"[{len(whole)}, {len(layers.numbers)}]"
        raise ic.PlanError(
            f"drops: scores {list(values.shape)} and margin {margin:g}; they are {wanted} and not below 0"
        )
    boot = boot or stats.Bootstrap()
    lost = whole[:, None] - values
    # the upper end of a two-sided interval of 1 - 2 α is a one-sided bound of 1 - α
    upper = replace(boot, level=1 - 2 * (1 - boot.level)).band(lost, axes=("layer",), name="drop").high
    costs = (upper > margin).astype(float)
    return Drops(
        layers, boot.band(lost, axes=("layer",), name="drop"), upper, float(margin),
        int(layers.at(depth.first_below(costs, 0.5))), int(layers.at(depth.falls_below(costs, 0.5))), lost,
    )  # fmt: skip
