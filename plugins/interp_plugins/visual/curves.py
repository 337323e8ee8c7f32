"""A curve of effects over layers, with everything that is said of it: bands, depths, cliff, window, flags.

    mean effect    Δ̄(l) with an interval at each layer, and a band for the curve as a whole
    E(l)           Σ Δ_i(l) / Σ Δ_i(blind), resampled as a ratio of sums
    p              sign flips of whole clusters, Holm over layers

What is drawn are images, with all their questions; never layers. One `stats.Bootstrap` draws the same images for every
number, so that all are paired.

Source: depth.py says whose each number is. Shapes: `[sample layer]`. Cost: resamples · layers, ten times.
Must equal: planted curves, and arrays by hand (tests/test_visual_depth.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

import interp_core as ic
from interp_core import report, stats

from . import depth
from .depth import Delta, LayerEstimate, Layers


@dataclass(frozen=True, eq=False)
class Curve:
    """What is known of one intervention's effects.

    Attributes:
        name: of the intervention.
        layers: that the curve has.
        tau: the threshold.
        mean, band: Δ̄ with an interval at each layer, and with a band of the whole curve.
        share: E; None where blinding does nothing in sum.
        p: of each layer, after Holm.
        depths: EVD of each sample, decoder layers, -1: none.
        evd: of the mean curve.
        cliff: sustained crossing; the number of layers: no cliff.
        first: the first crossing, whatever comes after.
        drop: the layer after which the mean falls most; -1 for a curve of one layer.
        median: of the samples' EVD; the origin's boundary.
        l90, l10: ends of the transfer window; None without E.
        soft: soft depth; None without E.
        notes: what to know before believing it.
    """

    name: str
    layers: Layers
    tau: float
    mean: stats.Band
    band: stats.Band
    share: stats.Band | None
    p: Float[np.ndarray, " layer"]
    depths: Int[np.ndarray, " sample"]
    evd: int
    cliff: LayerEstimate
    first: int
    drop: int
    median: float
    l90: LayerEstimate | None
    l10: LayerEstimate | None
    soft: stats.Interval | None
    notes: tuple[str, ...]

    @property
    def no_cliff(self) -> bool:
        """Whether the curve stays at or above τ up to the last layer."""
        return self.cliff.value == self.layers.count

    @property
    def non_monotone(self) -> bool:
        """Whether first and sustained crossing lie more than two layers apart: go by the window then."""
        return self.cliff.value - self.first > depth.UNEVEN

    def table(self) -> list[dict[str, Any]]:
        """One row per layer."""
        rows = []
        for i, layer in enumerate(self.layers.numbers):
            row = {
                "layer": layer, "delta": self.mean.value[i], "low": self.mean.low[i], "high": self.mean.high[i],
                "band_low": self.band.low[i], "band_high": self.band.high[i], "p_holm": self.p[i],
            }  # fmt: skip
            if self.share is not None:
                row |= {"E": self.share.value[i], "E_low": self.share.low[i], "E_high": self.share.high[i]}
            rows.append({name: value if name == "layer" else float(value) for name, value in row.items()})
        return rows

    def row(self) -> dict[str, Any]:
        """What the curve comes to, for JSON."""
        return {
            "intervention": self.name, "n": self.mean.n, "units": self.mean.units, "tau": self.tau, "evd": self.evd,
            "cliff": self.cliff.row(), "no_cliff": self.no_cliff, "first_crossing": self.first,
            "steepest_drop": self.drop, "median_evd": self.median, "non_monotone": self.non_monotone,
            "l_90": None if self.l90 is None else self.l90.row(), "l_10": None if self.l10 is None else self.l10.row(),
            "soft_depth": None if self.soft is None else self.soft.row(), "layers": list(self.layers.numbers),
            "n_layers": self.layers.count, "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        cliff = "no cliff" if self.no_cliff else f"cliff {self.cliff}"
        more = "" if self.soft is None else f", soft depth {self.soft:.2f}"
        head = f"{self.name}: {cliff}, EVD {self.evd}, median EVD {self.median:g}{more} (n = {self.mean.n} in "
        lines = [f"{head}{self.mean.units} images, τ = {self.tau:.3g} nats)", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)

    def chart(self) -> report.Curves:
        """The mean effect with its band, and τ."""
        lines = [report.Line.of(self.name, self.band), report.Line("τ", [self.tau] * len(self.layers.numbers))]
        return report.Curves(
            lines, list(map(str, self.layers.numbers)), title=f"Effect of {self.name}", xlabel="decoder layer",
            ylabel="nats", caption=f"Mean loss of the answer's log-probability; band of the whole curve. {self}",
        )  # fmt: skip


def curve(
    name: str,
    delta: Delta,
    layers: Layers,
    tau: float,
    *,
    blind: Float[np.ndarray, " sample"] | None = None,
    boot: stats.Bootstrap | None = None,
) -> Curve:
    """Everything that is said of one intervention's effects.

    Args:
        delta: Δ_i(l), finite.
        blind: Δ_i of replacing the whole image at the input; None: no E.
        boot: with the samples' images as clusters.

    Raises:
        PlanError: of another shape than the layers, numbers that are not finite, fewer than two images.
    """
    values = np.asarray(delta, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(layers.numbers) or not np.isfinite(values).all():
        wanted = f"finite numbers [sample, {len(layers.numbers)}]"
        raise ic.PlanError(f"curve of {name}: effects are {wanted}, these are {list(values.shape)}")
    boot = boot or stats.Bootstrap()
    depths = layers.at(depth.visual_depths(values, tau))
    mean = values.mean(0)
    cliff = layers.estimate(boot, lambda x: depth.falls_below(x.mean(0), tau), values)
    first = int(layers.at(depth.first_below(mean, tau)))
    notes = _notes(cliff, first, mean, tau, layers)
    shares = None if blind is None else _shares(values, np.asarray(blind, dtype=np.float64), layers, boot)
    band, l90, l10, soft = shares or (None, None, None, None)
    tests = stats.sign_flips(values, axes=("layer",), clusters=boot.clusters, seed=boot.seed, adjust="holm")
    if blind is not None and shares is None:
        notes.append("blinding does nothing in sum over these samples: no E, window and soft depth")
    return Curve(
        name, layers, float(tau), boot.band(values, axes=("layer",), name=name),
        # an interval at a layer answers for that layer; the band for all of them at once, which a drawn curve claims
        boot.band(values, axes=("layer",), simultaneous=True, name=name), band,
        np.asarray(tests.adjusted), depths, int(layers.at(depth.visual_depths(mean, tau))), cliff, first,
        int(layers.at(depth.steepest_drop(mean))) if len(mean) > 1 else -1, float(np.median(depths)),
        l90, l10, soft, tuple(notes),
    )  # fmt: skip


def _shares(
    delta: Delta, blind: Float[np.ndarray, " sample"], layers: Layers, boot: stats.Bootstrap
) -> tuple[stats.Band, LayerEstimate, LayerEstimate, stats.Interval] | None:
    """E with its band, both ends of the window, soft depth; None without an effect to be a share of."""
    # a share of nothing, or of a gain, has no meaning
    if blind.sum() <= 0:
        return None
    return (
        boot.band(delta, blind, axes=("layer",), statistic=depth.share, name="E"),
        layers.estimate(boot, lambda x, b: depth.first_below(depth.share(x, b), 0.9), delta, blind),
        layers.estimate(boot, lambda x, b: depth.falls_below(depth.share(x, b), 0.1), delta, blind),
        boot.of(lambda x, b: depth.soft_depth(depth.share(x, b)), delta, blind, name="soft depth"),
    )


def _notes(
    cliff: LayerEstimate, first: int, mean: Float[np.ndarray, " layer"], tau: float, layers: Layers
) -> list[str]:
    notes = []
    if cliff.value == layers.count:
        notes.append(f"no cliff: the effect is {mean[-1]:.3g} nats at layer {layers.numbers[-1]}, τ or above")
    elif cliff.value == layers.numbers[0]:
        notes.append("the effect is below τ at every layer: no dependence that this intervention shows")
    if cliff.value - first > depth.UNEVEN:
        notes.append(
            f"non-monotone: it first falls below τ at layer {first} and for good at {cliff.value}; go by the window"
        )
    if len(layers.numbers) < layers.count:
        notes.append(
            f"{len(layers.numbers)} of {layers.count} layers: a crossing lies at or below the layer that is told"
        )
    return notes


def depth_gap(
    hard: Int[np.ndarray, " sample"],
    easy: Int[np.ndarray, " sample"],
    *,
    clusters: tuple[Sequence[Any], Sequence[Any]] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> stats.Interval:
    """EVD gap: mean EVD of hard samples minus that of easy ones, two groups.

    Args:
        hard, easy: EVD of each sample; those of samples without dependence are -1, and count as that.
        clusters: images of both groups.
    """
    labels = None if clusters is None else [*clusters[0], *clusters[1]]
    boot = stats.Bootstrap(labels, resamples=resamples, seed=seed)
    return boot.difference(hard, easy, paired=False, name="EVD gap, hard - easy")


def terciles(gap: Float[np.ndarray, " sample"]) -> tuple[Bool[np.ndarray, " sample"], Bool[np.ndarray, " sample"]]:
    """Hard and easy by behaviour: the thirds of samples that lose most and least by blinding. Ties go together, so that
    a third may be larger than the other; samples in between are neither."""
    low, high = np.quantile(np.asarray(gap, dtype=np.float64), [1 / 3, 2 / 3])
    return np.asarray(gap >= high), np.asarray(gap <= low)


def crossing(visual: Delta, text: Delta, layers: Layers, boot: stats.Bootstrap | None = None) -> LayerEstimate:
    """The layer from which on replacing the text rows harms at least as much as replacing the visual rows.

    Args:
        visual, text: Δ of the same samples under either replacement.
    """
    boot, samples = boot or stats.Bootstrap(), (np.asarray(visual), np.asarray(text))
    return layers.estimate(boot, lambda v, t: depth.crossing(v.mean(0), t.mean(0)), *samples)
