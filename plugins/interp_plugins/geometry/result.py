"""What the method `geometry` returns: curves over layers with intervals over samples, and the ratio at a cliff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic
from interp_core import stats

from .._columns import TITLE, legend
from .directions import anisotropy
from .measured import MEASURES
from .ratios import CutRatio, cut_ratio, ratio_of_ratios
from .rows import coordinates
from .similarity import Rows, debiased_cka

COLUMNS = {
    "effective_rank": "how many directions states use, by the entropy of their singular values",
    "effective_rank_share": "the same over the most that so many states can use",
    "participation_ratio": "the same by squared singular values",
    "stable_rank": "the same against the strongest direction alone",
    "anisotropy": "mean cosine of two states: 0 if they point everywhere alike",
    "mean_direction": "squared length of the mean of states that all have length 1",
    "dimension": "intrinsic dimension, by distances to the nearest two states",
    "gap": "distance of the first two groups' means in units of their spread",
    "separability": "how well a line tells the first two groups apart: 0.5 by chance, 1 always",
}
"""Measures in words."""
SHOWN = 500
"""Resamples of the bands on a page."""


@dataclass(frozen=True, eq=False)
class GeometryResult(ic.Result):
    """Geometry of groups of rows at `resid_pre[l]`, sample by sample; NaN where a number does not exist.

    Attributes:
        equal: measures of as many rows of each group, mean over draws; comparable between groups.
        whole: measures of all rows of each group; comparable between layers.
        dimension: intrinsic dimension of all rows, from 50 on.
        gap, separability: of the first two groups.
        steps: debiased CKA of the same rows at a layer and the next.
        against: debiased CKA with the rows at the same positions of `against=` (a blind image); None without.
        pooled: mean row of each group.
        drawn: one row of each group, drawn: of different samples, they are the baseline of anisotropy.
        rows: how many each group has.
        sinks: per sample, its sinks as (group, layer, position among its real tokens).
        groups, variants, layers: names along the axes.
        clusters: what samples share (an image); intervals draw them together.
        cliff: the first layer after the cliff, found on other samples; None: none given.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("equal", "whole"), ("batch", "group", "layer", "variant", "measure")),
        "dimension": ("batch", "group", "layer"),
        **dict.fromkeys(("gap", "separability"), ("batch", "layer")),
        "steps": ("batch", "group", "step"),
        "against": ("batch", "group", "layer"),
        **dict.fromkeys(("pooled", "drawn"), ("batch", "group", "layer", "d_model")),
        "rows": ("batch", "group"),
    }
    JOINS: ClassVar[Mapping[str, str]] = {"sinks": "rows", "clusters": "rows"}
    equal: Float[Tensor, "batch group layer variant measure"]
    whole: Float[Tensor, "batch group layer variant measure"]
    dimension: Float[Tensor, "batch group layer"]
    gap: Float[Tensor, "batch layer"]
    separability: Float[Tensor, "batch layer"]
    steps: Float[Tensor, "batch group step"]
    against: Float[Tensor, "batch group layer"] | None
    pooled: Float[Tensor, "batch group layer d_model"]
    drawn: Float[Tensor, "batch group layer d_model"]
    rows: Int[Tensor, "batch group"]
    sinks: tuple[tuple[tuple[str, int, int], ...], ...]
    groups: tuple[str, ...]
    variants: tuple[str, ...]
    layers: tuple[int, ...]
    clusters: tuple[Any, ...]
    cliff: int | None = None

    def per_sample(
        self, measure: str, group: str = "", variant: str = "centred", *, equal: bool = True
    ) -> Float[np.ndarray, "sample layer"]:
        """A measure of each sample.

        Args:
            measure: one of `MEASURES`, or "dimension", "gap", "separability", "against".
            group: its name; the first if empty.
            variant: of the rows.
            equal: of as many rows of each group; else of all.

        Raises:
            PlanError: no such measure, group or variant here.
        """
        extra = {name: getattr(self, name) for name in ("dimension", "gap", "separability", "against")}
        if measure not in (*MEASURES, *extra) or extra.get(measure, 0) is None:
            raise ic.PlanError(f"no measure {measure!r} here. {ic.errors.nearest(measure, (*MEASURES, *extra))}")
        of = self._place("group", group or self.groups[0], self.groups)
        if measure in extra:
            values = extra[measure]
            assert values is not None
            return (values[:, of] if values.ndim == 3 else values).double().numpy()
        table = self.equal if equal else self.whole
        place = self._place("variant", variant, self.variants)
        return table[:, of, :, place, MEASURES.index(measure)].double().numpy()

    @staticmethod
    def _place(axis: str, name: str, names: tuple[str, ...]) -> int:
        if name not in names:
            raise ic.PlanError(f"no {axis} {name!r} here. {ic.errors.nearest(name, names)}")
        return names.index(name)

    def boot(self, **settings: Any) -> stats.Bootstrap:
        """A bootstrap over the samples, clusters together."""
        return stats.Bootstrap(clusters=self._clusters([True] * len(self.rows)), **settings)

    def _clusters(self, kept: Sequence[bool]) -> list[Any] | None:
        """Labels of the samples that are kept; None where samples share nothing."""
        labels = [label for label, keep in zip(self.clusters, kept, strict=True) if keep]
        return None if all(label is None for label in labels) else labels

    def band(
        self, measure: str, group: str = "", variant: str = "centred", *, equal: bool = True,
        boot: stats.Bootstrap | None = None,
    ) -> stats.Band:  # fmt: skip
        """The curve of a measure over layers with its interval over samples; samples without a number at some layer are
        left out, and `n` says how many are not.

        Raises:
            PlanError: no such measure; fewer than two samples with numbers.
        """
        values = self.per_sample(measure, group, variant, equal=equal)
        good = np.isfinite(values).all(1)
        if good.sum() < 2:
            raise ic.PlanError(
                f"{measure} of {group or self.groups[0]}: {int(good.sum())} of {len(good)} samples have it at every "
                "layer; a curve with its interval takes two"
            )
        if boot is None:
            boot = stats.Bootstrap(clusters=self._clusters(good.tolist()))
        return boot.band(values[good], axes=("layer",), name=f"{measure} of {group or self.groups[0]}")

    def er_ratio(
        self, cut: int | None = None, group: str = "", variant: str = "centred", *, equal: bool = True,
        boot: stats.Bootstrap | None = None,
    ) -> CutRatio:  # fmt: skip
        """Effective rank from a layer on over that before it, with the band of random cuts.

        Raises:
            PlanError: no cut, here or given as `cliff_boundary`; samples without a rank.
        """
        values = self.per_sample("effective_rank", group, variant, equal=equal)
        return cut_ratio(values, self._cut(cut), boot or self.boot())

    def ratio_of_ratios(
        self, cut: int | None = None, variant: str = "centred", boot: stats.Bootstrap | None = None
    ) -> stats.Interval:
        """The first group's ratio of effective ranks over the second's.

        Raises:
            PlanError: one group, no cut, or samples without a rank.
        """
        if len(self.groups) < 2:
            raise ic.PlanError(f"ratio_of_ratios compares two groups of rows; there is {self.groups[0]!r} alone")
        first, second = (self.per_sample("effective_rank", group, variant) for group in self.groups[:2])
        return ratio_of_ratios(first, second, self._cut(cut), boot or self.boot())

    def _cut(self, cut: int | None) -> int:
        cut = self.cliff if cut is None else cut
        if cut is None:
            raise ic.PlanError("give the cut: er_ratio(cut=…), or cliff_boundary= of the method; from other samples")
        return cut

    def baseline_anisotropy(self, group: str = "") -> Float[np.ndarray, " layer"]:
        """Mean cosine of rows of different samples, one drawn of each.

        Raises:
            PlanError: no such group, or a single sample.
        """
        drawn = self.drawn[:, self._place("group", group or self.groups[0], self.groups)]
        return np.array([anisotropy(drawn[:, layer]) for layer in range(len(self.layers))])

    def pooled_cka(self, permutations: int = 200, seed: int = 0) -> list[dict[str, float]]:
        """Debiased CKA of the two groups' mean rows, a row per sample, layer by layer; and what samples paired at
        random give: the 97.5 % quantile and p. NaN where the rows of a group are all the same, as those of one prompt's
        text at layer 0 are.

        Raises:
            PlanError: one group, or fewer than four samples.
        """
        if len(self.groups) < 2:
            raise ic.PlanError(f"pooled_cka compares two groups of rows; there is {self.groups[0]!r} alone")
        rng, n, out = np.random.default_rng(seed), len(self.pooled), []
        orders = [torch.from_numpy(rng.permutation(n)) for _ in range(permutations)]
        keys = tuple(range(n))
        for number, layer in enumerate(self.layers):
            first, second = (coordinates(self.pooled[:, group, number].double()) for group in (0, 1))
            try:
                value = debiased_cka(Rows(first, keys), Rows(second, keys))
            # rows that are all the same have no CKA, which is told per layer; too few samples, for all
            except ic.PlanError:
                if n < 4:
                    raise
                out.append({"layer": layer, "cka": np.nan, "random_97.5": np.nan, "p": np.nan})
                continue
            null = [debiased_cka(Rows(first, keys), Rows(second[order], keys)) for order in orders]
            high = float(np.quantile(null, 0.975))
            p = stats.p_value(value, null, alternative="greater")
            out.append({"layer": layer, "cka": value, "random_97.5": high, "p": p})
        return out

    def _shown(self, measure: str) -> str:
        """The variant of a measure that tables and charts show."""
        return "raw" if measure in ("anisotropy", "mean_direction") and "raw" in self.variants else self.variants[0]

    def table(self) -> list[dict[str, Any]]:
        """One row per group and layer: means over samples, NaN left out; ranks of the first variant, directions of raw
        rows where they are there (of centred rows the mean cosine is about -1 / (n - 1), whatever they are)."""
        rows = []
        for group in self.groups:
            curves = {name: self.per_sample(name, group, self._shown(name)) for name in MEASURES}
            curves["dimension"] = self.per_sample("dimension", group)
            if len(self.groups) > 1:
                curves |= {"gap": self.gap.numpy(), "separability": self.separability.numpy()}
            rows += [
                {"group": group, "layer": layer} | {name: _mean(curve[:, i]) for name, curve in curves.items()}
                for i, layer in enumerate(self.layers)
            ]
        return rows

    def __str__(self) -> str:
        numbers = ", ".join(
            f"{int(n)} {group}" for n, group in zip(self.rows.double().mean(0), self.groups, strict=True)
        )
        shown = f"ranks {self._shown('effective_rank')}, directions {self._shown('anisotropy')}"
        lines = [f"{len(self.rows)} samples, rows on average: {numbers}; measures of equal numbers, {shown}"]
        lines += [
            f"  {row['group']:<8} layer {row['layer']:<3} effective rank {row['effective_rank']:7.2f} "
            f"({row['effective_rank_share']:.2f})  participation {row['participation_ratio']:7.2f}  "
            f"anisotropy {row['anisotropy']:.3f}" for row in self.table()
        ]  # fmt: skip
        with_sinks = sorted({(group, layer) for sample in self.sinks for group, layer, _ in sample})
        lines += [f"  sinks in {len(with_sinks)} groups and layers; see `sinks`"] if with_sinks else []
        return "\n".join(lines)

    def details(self) -> dict[str, str]:
        """The columns of the table in words."""
        return {TITLE: legend(COLUMNS, self.table()[0])}

    def curves(self, measure: str = "effective_rank") -> ic.report.Curves:
        """A measure over layers, a line per group; with bands where there are several samples."""
        lines, variant = [], self._shown(measure)
        for group in self.groups:
            values = self.per_sample(measure, group, variant)
            units = len(set(self._clusters([True] * len(values)) or range(len(values))))
            whole = units > 1 and np.isfinite(values).all()
            boot = self.boot(method="percentile", resamples=SHOWN)
            band = self.band(measure, group, variant, boot=boot) if whole else None
            means = [_mean(values[:, i]) for i in range(values.shape[1])]
            lines.append(ic.report.Line.of(group, band) if band else ic.report.Line(group, means))
        return ic.report.Curves(
            lines, [str(layer) for layer in self.layers], title=measure.replace("_", " "), xlabel="decoder layer",
            ylabel=measure.replace("_", " "),
            caption=f"{measure.replace('_', ' ')} of equal numbers of rows, {variant}; {len(self.rows)} samples.",
        )  # fmt: skip

    def charts(self) -> list[ic.report.Curves]:
        """Effective rank and anisotropy over layers."""
        return [self.curves(), self.curves("anisotropy")]

    @property
    def heading(self) -> str:
        """What the page is about."""
        return "Geometry of hidden states"

    @property
    def finding(self) -> str:
        """How the effective rank of each group changes from the first to the last layer."""
        said = []
        for group in self.groups:
            curve = self.per_sample("effective_rank", group, self._shown("effective_rank"))
            first, last = _mean(curve[:, 0]), _mean(curve[:, -1])
            said.append(f"{group} from {first:.1f} to {last:.1f}")
        return f"Effective rank, layer {self.layers[0]} to {self.layers[-1]}: {', '.join(said)}."


def _mean(values: Float[np.ndarray, " sample"]) -> float:
    good = values[np.isfinite(values)]
    return float(good.mean()) if len(good) else float("nan")
