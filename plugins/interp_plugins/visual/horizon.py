"""The information horizon: the layer from which on single visual tokens carry nothing that the answer needs.

    I_l(v)     mean log p(answer) - mean log p(answer | v removed from layer l on), nats, per visual token and layer
    Ī_l        mean over v; with Gini and coefficient of variation over v
    ε          95 % quantile of |I_l(v)| over tokens of a blank image of the same size, in the same dtype
    (i)        first layer from which on the upper one-sided 95 % bound of Ī_l is below ε
    A_l(f)     score with the best-ranked share f of tokens kept - mean score with random shares of the same size kept
    (ii)       first layer from which on no A_l(f) has an interval above the margin (0 unless given)
    claim      a cliff c: A pooled over layers below c lies above 0; A pooled over layers from c on is no better than
               random: its interval lies below the margin, or includes 0 and lies below that before c

Removed from layer l on: no other token sees v in layers ≥ l, positions of all others as they were.

Source: the notion of arXiv:2512.07580, whose probability, norm and threshold cannot be read from the paper: the
definition is ours. (i) and (ii) are told apart, since they ask different things.
Shapes: information `[layer visual]` per sample, advantage `[sample layer fraction]`.
Cost: removals.py has the runs; here resamples · layers.
Must equal: planted tables by hand (tests/test_visual_horizon.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

import interp_core as ic
from interp_core import stats

from . import depth
from .depth import Layers

Information = Float[np.ndarray, "layer visual"]
"""Of one sample; others have other numbers of visual tokens."""
QUANTILE = 0.95
SUBSETS = 5
"""Random subsets of each size that a comparison needs."""


@dataclass(frozen=True, eq=False)
class Horizon:
    """What is known of where information ends.

    Attributes:
        layers: that were looked at.
        mean: Ī_l with its interval at each layer.
        gini, cv: over tokens, means over samples.
        epsilon: noise floor.
        information: (i), a decoder layer; the number of layers: nowhere.
        ranking: (ii), the same.
        fractions: that were kept.
        advantage: A_l(f) with its intervals, `[layer fraction]`.
        margin: that (ii) allows.
    """

    layers: Layers
    mean: stats.Band
    gini: Float[np.ndarray, " layer"]
    cv: Float[np.ndarray, " layer"]
    epsilon: float
    information: int
    ranking: int
    fractions: tuple[float, ...]
    advantage: stats.Band
    margin: float

    def table(self) -> list[dict[str, Any]]:
        """One row per layer."""
        rows = []
        for i, layer in enumerate(self.layers.numbers):
            row: dict[str, Any] = {
                "layer": layer, "information": float(self.mean.value[i]), "low": float(self.mean.low[i]),
                "high": float(self.mean.high[i]), "gini": float(self.gini[i]), "cv": float(self.cv[i]),
            }  # fmt: skip
            for j, fraction in enumerate(self.fractions):
                row[f"advantage_{fraction:g}"] = float(self.advantage.value[i, j])
                row[f"advantage_{fraction:g}_low"] = float(self.advantage.low[i, j])
            rows.append(row)
        return rows

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "information": self.information, "ranking": self.ranking, "epsilon": self.epsilon, "margin": self.margin,
            "n": self.mean.n, "units": self.mean.units, "n_layers": self.layers.count,
            "fractions": list(self.fractions), "layers": self.table(),
        }  # fmt: skip

    def __str__(self) -> str:
        def told(layer: int) -> str:
            return "nowhere" if layer == self.layers.count else f"from layer {layer} on"

        return (
            f"information horizon: (i) mean information below ε = {self.epsilon:.3g} nats {told(self.information)}; "
            f"(ii) ranked no better than random {told(self.ranking)} ({self.mean.units} images)"
        )


@dataclass(frozen=True)
class Claim:
    """Whether a cliff is one of information: ranked beats random before it, and not after.

    Attributes:
        cliff: the layer.
        before, after: pooled advantage below it, and from it on; None where there is no layer.
        margin: nats by which ranked may beat random from the cliff on and still count as no better.
    """

    cliff: int
    before: stats.Interval | None
    after: stats.Interval | None
    margin: float = 0.0

    @property
    def no_better(self) -> bool:
        """Whether ranked is no better than random from the cliff on. An interval that includes 0 says so only where it
        lies below that before the cliff: a wide one says nothing."""
        if self.before is None or self.after is None:
            return False
        return self.after.high <= self.margin or (self.after.low <= 0 and self.after.high < self.before.low)

    @property
    def holds(self) -> bool:
        """Whether the cliff may be claimed."""
        return self.before is not None and self.before.low > 0 and self.no_better

    def row(self) -> dict[str, Any]:
        """As JSON."""
        both = {name: None if estimate is None else estimate.row() for name, estimate in
                (("before", self.before), ("after", self.after))}  # fmt: skip
        return {"cliff": self.cliff, "holds": self.holds, "margin": self.margin} | both

    def __str__(self) -> str:
        parts = [f"{name} {part:.3g}" for name, part in (("before", self.before), ("after", self.after)) if part]
        return (
            f"cliff {self.cliff} {'claimed' if self.holds else 'not claimed'}: ranked - random {', '.join(parts)} nats"
            + (f", of which {self.margin:.3g} would count as nothing" if self.margin else "")
        )


def noise(blanks: Sequence[np.ndarray]) -> float:
    """ε of tokens' information in blank images.

    Raises:
        PlanError: none, or numbers that are not finite.
    """
    values = np.concatenate([np.abs(np.asarray(blank, dtype=np.float64)).ravel() for blank in blanks] or [np.zeros(0)])
    if not len(values) or not np.isfinite(values).all():
        raise ic.PlanError(f"information horizon: {len(values)} numbers of blank images; give finite ones, or epsilon=")
    return float(np.quantile(values, QUANTILE))


def gini(information: Information) -> Float[np.ndarray, " layer"]:
    """Of |I_l(v)| over tokens: 0 all alike, near 1 one token has all; 0 where all are 0."""
    values = np.sort(np.abs(np.asarray(information, dtype=np.float64)), axis=-1)
    n, total = values.shape[-1], values.sum(-1)
    place = 2 * np.arange(1, n + 1) - n - 1
    return np.asarray(np.divide((place * values).sum(-1), n * total, out=np.zeros_like(total), where=total > 0))


def variation(information: Information) -> Float[np.ndarray, " layer"]:
    """Standard deviation over tokens by the size of their mean; 0 where all are 0."""
    values = np.asarray(information, dtype=np.float64)
    size = np.abs(values.mean(-1))
    return np.asarray(np.divide(values.std(-1), size, out=np.zeros_like(size), where=size > 0))


def horizon(
    information: Sequence[Float[np.ndarray, "layer _"]],
    advantage: Float[np.ndarray, "sample layer fraction"],
    layers: Layers,
    fractions: Sequence[float],
    epsilon: float,
    *,
    margin: float = 0.0,
    images: Sequence[Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Horizon:
    """Both criteria, from what was measured.

    Args:
        information: I_l(v) of each sample, which may have different numbers of tokens.
        advantage: ranked minus mean of random, of the same samples.
        epsilon: ε.
        margin: nats by which ranked may beat random and still count as no better.
        images: of the samples.

    Raises:
        PlanError: shapes that do not agree, ε below 0.
    """
    gains = np.asarray(advantage, dtype=np.float64)
    wanted = (len(information), len(layers.numbers), len(fractions))
    if gains.shape != wanted or any(len(each) != wanted[1] for each in information) or epsilon < 0:
        raise ic.PlanError(
            f"information horizon: advantages {list(gains.shape)} and ε = {epsilon:g}; they are {list(wanted)} for "
            "these samples, layers and fractions, and ε is not below 0"
        )
    means = np.stack([np.asarray(each, dtype=np.float64).mean(-1) for each in information])
    boot = stats.Bootstrap(images, resamples=resamples, seed=seed)
    # the upper end of a two-sided 90 % interval is a one-sided 95 % bound
    upper = replace(boot, level=0.9).band(means, axes=("layer",))
    better = boot.band(gains, axes=("layer", "fraction"), name="ranked - random")
    return Horizon(
        layers, boot.band(means, axes=("layer",), name="information"),
        np.mean([gini(each) for each in information], 0), np.mean([variation(each) for each in information], 0),
        float(epsilon), int(layers.at(depth.falls_below(upper.high, epsilon))),
        int(layers.at(depth.falls_below((better.low > margin).any(-1).astype(float), 0.5))), tuple(fractions), better,
        float(margin),
    )  # fmt: skip


def claim(
    advantage: Float[np.ndarray, "sample layer fraction"],
    layers: Layers,
    cliff: int,
    *,
    margin: float = 0.0,
    images: Sequence[Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Claim:
    """Whether a cliff may be claimed.

    Args:
        cliff: a decoder layer; the number of layers is no cliff, and none that can be claimed.
        margin: nats that count as nothing from the cliff on, such as τ; without one any advantage of ranked ends the
            claim that can be told from 0, however small.
    """
    gains, boot = np.asarray(advantage, dtype=np.float64), stats.Bootstrap(images, resamples=resamples, seed=seed)
    # pooled over layers and shares before resampling: one number per sample, and one claim
    low = np.array([layer < cliff for layer in layers.numbers])

    def pooled(chosen: np.ndarray, name: str) -> stats.Interval | None:
        return boot.mean(gains[:, chosen].mean((1, 2)), name=name) if chosen.any() else None

    before, after = pooled(low, f"ranked - random below layer {cliff}"), pooled(~low, f"from layer {cliff} on")
    return Claim(cliff, before, after, float(margin))
