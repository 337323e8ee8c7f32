"""Methods beside each other over samples: means with intervals, and what each has above the baselines, paired.

Only samples that every method has are compared, and how many were left out is said. Intervals are percentiles of 10,000
resamples of samples (or of images), seed 17, the same resamples for all.

Source: the protocol of FlashTrace's multimodal evaluation (arXiv:2602.01914).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import interp_core as ic
from interp_core import stats

BASELINES = ("random", "centre")
RESAMPLES, SEED = 10_000, 17
LOWER = ("deletion", "mas")
"""Metrics of which lower is better."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """One metric of several methods.

    Attributes:
        metric: its name.
        means: by method.
        above: method minus baseline, by (method, baseline).
        samples: compared.
        left_out: samples that some method lacks.
    """

    metric: str
    means: dict[str, stats.Interval]
    above: dict[tuple[str, str], stats.Interval]
    samples: tuple[str, ...]
    left_out: int

    def table(self) -> list[dict[str, Any]]:
        """A row per method."""
        rows = []
        for method, mean in self.means.items():
            row = {"method": method, self.metric: mean.value, "low": mean.low, "high": mean.high, "n": mean.n}
            for baseline in BASELINES:
                if (gain := self.above.get((method, baseline))) is not None:
                    better = gain.high < 0 if self.metric in LOWER else gain.low > 0
                    row |= {f"- {baseline}": gain.value, f"better than {baseline}": better}
            rows.append(row)
        return rows


def compare(
    metric: str,
    values: Mapping[str, Mapping[str, float | None]],
    *,
    images: Mapping[str, Any] | None = None,
    baselines: Sequence[str] = BASELINES,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """A metric of methods, paired over the samples that all of them have.

    Args:
        metric: its name; of "deletion" and "mas" lower is better.
        values: by method and sample; None where a sample has no number.
        images: a label per sample, drawn together; None: each by itself.
        baselines: methods that must be among them.
        resamples, seed: of the bootstrap.

    Raises:
        PlanError: a baseline that is missing, or no common sample.
    """
    if missing := [name for name in baselines if name not in values]:
        raise ic.PlanError(
            f"compare: {metric} of {', '.join(values)} lacks the baseline {missing[0]!r}, without which no number says "
            "anything; add it, or leave it out of baselines="
        )
    every = {sample for scores in values.values() for sample in scores}
    common = sorted(s for s in every if all(scores.get(s) is not None for scores in values.values()))
    if len(common) < 2:
        raise ic.PlanError(f"compare: {len(common)} of {len(every)} samples have {metric} in all methods; it takes two")
    clusters = None if images is None else [images[sample] for sample in common]
    boot = stats.Bootstrap(clusters, method="percentile", resamples=resamples, seed=seed)
    columns = {method: [float(scores[s] or 0.0) for s in common] for method, scores in values.items()}
    means = {method: boot.mean(column, name=f"{metric} of {method}") for method, column in columns.items()}
    above = {
        (method, baseline): boot.difference(column, columns[baseline], name=f"{metric}: {method} - {baseline}")
        for method, column in columns.items()
        for baseline in baselines
        if method != baseline
    }
    return Comparison(metric, means, above, tuple(common), len(every) - len(common))
