"""What pages and pictures of function vectors show: the map of heads, and accuracies by layer.

Source: this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp_core import report

from .effects import ranking
from .evaluate import Evaluation


def heads_map(aie: Float[Tensor, "layer head"], title: str, caption: str) -> report.Heatmap:
    """The average indirect effect of every head."""
    rows, columns = [f"layer {i}" for i in range(len(aie))], [f"head {i}" for i in range(aie.shape[1])]
    return report.Heatmap(
        aie.nan_to_num(), rows, columns, diverging=True, title=title, caption=caption,
        colorbar="average indirect effect",
    )  # fmt: skip


def strongest(
    aie: Float[Tensor, "layer head"], chosen: Sequence[tuple[int, int, float]], count: int = 10
) -> list[dict[str, Any]]:
    """The heads of largest effect in size, whatever its sign, and all that the vector sums, as rows of a table."""
    summed = {(layer, head) for layer, head, _ in chosen}
    ranked = sorted(ranking(aie), key=lambda each: -abs(each.score))
    return [
        {
            "head": f"z[{each.layer},{each.head}]", "AIE": f"{each.score:+.4g}",
            "in the vector": "✓" * ((each.layer, each.head) in summed),
        }
        for place, each in enumerate(ranked)
        if place < count or (each.layer, each.head) in summed
    ]  # fmt: skip


def accuracy_curves(evaluations: Iterable[Evaluation], layers: Sequence[int], caption: str) -> report.Curves:
    """Accuracies with the vector against layers, with their intervals; those without it dashed."""
    lines = [
        report.Line(evaluation.name, evaluation.accuracies(), evaluation.bands(), evaluation.accuracy())
        for evaluation in evaluations
    ]
    return report.Curves(
        lines,
        [str(layer) for layer in layers],
        percent=True,
        limits=(0.0, 1.0),
        base="without",
        xlabel="vector added after layer",
        ylabel="answered right",
        caption=caption,
    )
