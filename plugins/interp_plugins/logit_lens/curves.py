"""Curves by layer over samples of pairs: NLL and the rest of the lens, in two contexts, with bands and tests.

    x[s, l]         mean over a sample's targets ("all"), or its last target ("last")
    macro[l]        mean over samples of x[s, l]; its band by a bootstrap over samples
    micro[l]        mean over all targets of all samples
    delta[s, l]     agentic minus assisted of the same sample: paired

Which layers differ is told by sign flips of the samples' differences, with the largest |mean| of all layers under the
same flips: the chance of naming any layer where none differs is 5 %.

Source: Westfall and Young (1993) for the maximum; `interp_core.stats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import stats
from interp_plugins.pairs.pair import SIDES

from .aligned import PairScores
from .tiles import Divergence, Readout

Array = np.ndarray[Any, Any]
SCOPES = ("all", "last")
METRICS = ("nll", "logitlens", "rank", "entropy", "top1", "kl")
"""Of each context. `rank` is log10(1 + rank), whose mean is not ruled by a few targets; `top1` whether it is 0."""
KEPT = ("logprob", "rank", "entropy", "kl", "lse")
"""Of a readout, in files."""
APART = ("js", "js_upper", "kl_ab")
"""Of both contexts together, where they were worked out."""


def tensors_of(scores: PairScores) -> dict[str, Tensor]:
    """Scores as tensors `[layer target]` by name, for a file; `scores_of` reads them back."""
    tensors = {"layers": torch.tensor(scores.layers)}
    for side in SIDES:
        readout: Readout = getattr(scores, side)
        tensors |= {f"{name}_{side}": getattr(readout, name).contiguous() for name in KEPT}
    if scores.apart is not None:
        named = {"js": scores.apart.js, "js_upper": scores.apart.js_upper, "kl_ab": scores.apart.kl}
        tensors |= {name: value.contiguous() for name, value in named.items() if value is not None}
    return tensors


def scores_of(sample: str, tensors: Mapping[str, Tensor]) -> PairScores:
    """Scores of a file's tensors.

    Raises:
        LoadError: some are missing.
    """
    try:
        sides = [Readout(**{name: tensors[f"{name}_{side}"] for name in KEPT}) for side in SIDES]
        layers = tuple(tensors["layers"].tolist())
    except KeyError as error:
        raise ic.LoadError(f"{sample}: no {error} among the scores; delete the file, and it is made again") from error
    apart = None
    if "js" in tensors:
        apart = Divergence(tensors["js"], tensors.get("js_upper"), tensors.get("kl_ab"))
    return PairScores(sample, layers, sides[0], sides[1], apart)


@dataclass(frozen=True, eq=False)
class Curves:
    """Numbers by sample and layer.

    Attributes:
        samples: their names.
        layers: of the rows, -1 for the embedding.
        targets: how many each sample has.
        values: `[sample layer]` by name: `{metric}_{agentic|assisted}_{all|last}`, `delta_{metric}_{all|last}`,
            `js_{all|last}` and so on.
        micro: `[layer]` by the same names, of all targets of all samples together.
    """

    samples: tuple[str, ...]
    layers: tuple[int, ...]
    targets: tuple[int, ...]
    values: Mapping[str, Float[np.ndarray, "sample layer"]]
    micro: Mapping[str, Float[np.ndarray, " layer"]]

    @staticmethod
    def of(scores: Sequence[PairScores]) -> Curves:
        """The curves of some samples.

        Raises:
            PlanError: no samples, or samples with other layers.
        """
        if not scores:
            raise ic.PlanError("no sample has scores, so there are no curves")
        layers = scores[0].layers
        for pair in scores:
            if pair.layers != layers:
                raise ic.PlanError(
                    f"{pair.sample} has layers {pair.layers[0]} to {pair.layers[-1]}, {scores[0].sample} "
                    f"{layers[0]} to {layers[-1]}; curves are of the same layers: read all states from one kind of file"
                )
        each = [_per_target(pair) for pair in scores]
        values, micro = {}, {}
        for name in each[0]:
            values[f"{name}_all"] = np.stack([curves[name].mean(1) for curves in each])
            values[f"{name}_last"] = np.stack([curves[name][:, -1] for curves in each])
            micro[f"{name}_all"] = np.concatenate([curves[name] for curves in each], 1).mean(1)
        for metric in METRICS:
            for scope in SCOPES:
                a, b = (values[f"{metric}_{side}_{scope}"] for side in SIDES)
                # per sample, before any mean: contexts of one sample are a pair
                values[f"delta_{metric}_{scope}"] = a - b
            micro[f"delta_{metric}_all"] = micro[f"{metric}_agentic_all"] - micro[f"{metric}_assisted_all"]
        samples = tuple(pair.sample for pair in scores)
        return Curves(samples, layers, tuple(pair.agentic.logprob.shape[1] for pair in scores), values, micro)

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple("embed" if layer < 0 else str(layer) for layer in self.layers)

    def mean(self, name: str) -> Float[np.ndarray, " layer"]:
        """Mean over samples."""
        return self.values[name].mean(0)

    @cached_property
    def bands(self) -> dict[str, stats.Band]:
        """By name, each mean with its 95 % interval, all from the same resamples of the samples; of one sample none."""
        if len(self.samples) < 2:
            return {}
        boot = stats.Bootstrap()
        return {name: boot.band(x, axes=("layer",), name=name) for name, x in self.values.items()}

    @cached_property
    def tests(self) -> dict[str, stats.PermutationTests]:
        """Of the differences of NLL, by scope: which layers differ; of one sample none."""
        if len(self.samples) < 2:
            return {}
        return {s: stats.sign_flips(self.values[f"delta_nll_{s}"], axes=("layer",), adjust="max") for s in SCOPES}


def _per_target(scores: PairScores) -> dict[str, Array]:
    """Numbers `[layer target]` by name."""
    curves: dict[str, Array] = {}
    for side in SIDES:
        readout: Readout = getattr(scores, side)
        logprob, rank = readout.logprob.double().numpy(), readout.rank.double().numpy()
        curves |= {
            f"nll_{side}": -logprob, f"logitlens_{side}": logprob, f"rank_{side}": np.log10(1 + rank),
            f"top1_{side}": (rank == 0).astype(float),
        }  # fmt: skip
        assert readout.entropy is not None and readout.kl is not None
        curves |= {f"entropy_{side}": readout.entropy.double().numpy(), f"kl_{side}": readout.kl.double().numpy()}
    if scores.apart is not None:
        named = zip(APART, (scores.apart.js, scores.apart.js_upper, scores.apart.kl), strict=True)
        curves |= {name: value.double().numpy() for name, value in named if value is not None}
    return curves


def progress(scores: Sequence[PairScores], bins: int = 50) -> Float[np.ndarray, "layer bin"]:
    """Difference of NLL by layer and by how far a sample's target text has got, mean over the samples that have targets
    there; NaN where none has.

    Args:
        bins: equal parts of each target text, at most as many as the longest has targets.
    """
    bins = min(bins, max(pair.agentic.logprob.shape[1] for pair in scores))
    total, count = np.zeros((len(scores[0].layers), bins)), np.zeros(bins)
    for pair in scores:
        delta = (pair.assisted.logprob - pair.agentic.logprob).double().numpy()
        # by the share of the target text that has passed: texts of other lengths meet in one bin
        place = np.arange(delta.shape[1]) * bins // delta.shape[1]
        for bin_ in np.unique(place):
            total[:, bin_] += delta[:, place == bin_].mean(1)
            count[bin_] += 1
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
