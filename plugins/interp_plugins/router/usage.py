"""Usage of experts: how often, with what weight and with what probability tokens go to each expert.

    weight  U[l, e] = 1/N Σ_t w̃_t(e)           w̃ the normalised weights
    count   U[l, e] = Σ_t 1[e in S_t] / Σ_t |S_t|     (1 / N k of the selections, where every token has k)
    prob    U[l, e] = 1/N Σ_t p_t(e)

Rows sum to 1 in all three. micro: N counts tokens of all samples; macro: the mean over samples of each one's matrix.
Dense layers have no row. One `Usage` is one view (all positions, the last, a span): it takes the tokens of that view.

Source: the micro average is that of Geuan666/XAI4Agent (2026).
Shapes: `[layer expert]`, layers named in `layers`.
Cost: three sums over n · expert per batch and layer; memory layer · expert, whatever the number of tokens. Per-sample
matrices, kept on request, cost sample · layer · expert.
Must equal: golden float64 numbers within 1e-6; one batch = any split into batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic

from .routed import Layers, Routed

Statistic = Literal["weight", "count", "prob"]
STATISTICS: tuple[Statistic, ...] = ("weight", "count", "prob")
Average = Literal["micro", "macro"]
SPLIT = 64
"""Samples of a batch up to which each is summed by itself."""


@dataclass(frozen=True, eq=False)
class LayerSums:
    """Sums over the tokens of each sample of a batch, in one layer; weight and prob are None of ids alone.

    Attributes:
        tokens: `[sample]`.
        count, weight, prob: `[sample expert]`.
        executed: `[sample]`, of the executed weights' sums.
    """

    tokens: Float[Tensor, " sample"]
    count: Float[Tensor, "sample expert"]
    weight: Float[Tensor, "sample expert"] | None
    prob: Float[Tensor, "sample expert"] | None
    executed: Float[Tensor, " sample"] | None

    def shares(self, statistic: str) -> Float[Tensor, "sample expert"]:
        """Each sample's own usage; NaN of a sample without tokens.

        Raises:
            ReadError: ids alone have no weights.
        """
        value = self.count if statistic == "count" else present(getattr(self, statistic), statistic)
        below = self.count.sum(-1) if statistic == "count" else self.tokens.to(value.device)
        return value / below[:, None]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        sums = {name: getattr(self, name) for name in ("tokens", "count", "weight", "prob", "executed")}
        return {name: value for name, value in sums.items() if value is not None}

    def cpu(self) -> LayerSums:
        """The same in the host's memory."""
        return replace(self, **{name: value.cpu() for name, value in self.tensors.items()})


def layer_sums(routed: Routed, samples: Int[Tensor, " n"] | None = None, n_samples: int = 1) -> LayerSums:
    """Sums of each sample's tokens in float64.

    Args:
        routed: of n tokens.
        samples: which sample each token is of; None: all of one.
        n_samples: how many samples there are.
    """
    rows = torch.zeros(len(routed), dtype=torch.long) if samples is None else samples.cpu()
    tokens = torch.bincount(rows, minlength=n_samples)  # where the ids are, so that no device is waited for
    ordered = n_samples <= SPLIT and bool((rows.diff() >= 0).all())

    def add(values: Tensor) -> Tensor:
        # sums of slices have one order; index_add_ on a GPU adds in any, and its last digits change from run to run
        if ordered:
            return torch.stack([part.sum(0, dtype=torch.float64) for part in values.split(tokens.tolist())])
        out = torch.zeros(n_samples, values.shape[1], dtype=torch.float64, device=values.device)
        return out.index_add_(0, rows.to(values.device), values.double())

    bare = routed.weights is None
    return LayerSums(
        tokens.double(),
        add(routed.chosen),
        None if bare else add(routed.normalised),
        None if routed.probs is None else add(routed.probs),
        None if bare else add(routed.need("weights").sum(-1, keepdim=True))[:, 0],
    )


@dataclass(eq=False)
class _Layer:
    """What is kept of one layer, over all batches."""

    tokens: float = 0.0
    samples: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)
    each: list[LayerSums] = field(default_factory=list)


class Usage:
    """Usage of one view, gathered batch by batch.

    Args:
        keep_samples: keep each sample's sums too, for intervals over samples: sample · layer · expert numbers.
    """

    def __init__(self, *, keep_samples: bool = False) -> None:
        self.keep_samples = keep_samples
        self._layers: dict[int, _Layer] = {}

    def add(self, sample: Layers) -> None:
        """The tokens of one sample, all layers."""
        for layer, routed in sample.items():
            self.add_layer(layer, routed)

    def add_layer(
        self, layer: int, routed: Routed, samples: Int[Tensor, " n"] | None = None, n_samples: int = 1
    ) -> None:
        """Tokens of whole samples in one layer; arguments as of `layer_sums`.

        Raises:
            PlanError: another number of experts than before.
        """
        self.add_sums(layer, layer_sums(routed, samples, n_samples))

    def add_sums(self, layer: int, sums: LayerSums) -> None:
        """Sums of whole samples in one layer.

        Raises:
            PlanError: another number of experts than before; a sample without tokens.
        """
        kept = self._layers.setdefault(layer, _Layer())
        known = kept.sums.get("count")
        if known is not None and len(known) != sums.count.shape[1]:
            raise ic.PlanError(
                f"layer {layer} had {len(known)} experts in earlier batches, {sums.count.shape[1]} in this one; "
                "gather models apart"
            )
        if bool((sums.tokens == 0).any()):
            row = int((sums.tokens == 0).nonzero()[0])
            raise ic.PlanError(f"sample {row} of this batch has no tokens at the positions asked for; leave it out")
        kept.tokens += float(sums.tokens.sum())
        kept.samples += len(sums.tokens)
        for name in STATISTICS:
            value = getattr(sums, name)
            if value is not None:
                _add(kept.sums, name, value.sum(0))
                _add(kept.shares, name, sums.shares(name).sum(0))
        if sums.executed is not None:
            _add(kept.sums, "executed", sums.executed.sum(0))
        if self.keep_samples:
            kept.each.append(sums.cpu())

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that have experts."""
        return tuple(sorted(self._layers))

    @property
    def tokens(self) -> int:
        """Tokens seen, in each layer."""
        return int(self._some().tokens)

    @property
    def samples(self) -> int:
        """Samples seen."""
        return self._some().samples

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return len(self._some().sums["count"])

    @property
    def counts(self) -> Int[Tensor, "layer expert"]:
        """Tokens that were routed to each expert."""
        return torch.stack([self._layers[layer].sums["count"] for layer in self.layers]).round().long().cpu()

    @property
    def top_k(self) -> float:
        """Experts per token, on average."""
        return float(self.counts[0].sum()) / self.tokens

    @property
    def executed_sum(self) -> Float[Tensor, " layer"]:
        """Mean sum of a token's executed weights: 1 where the family renormalises."""
        return torch.stack([self._sum(layer, "executed") / self._layers[layer].tokens for layer in self.layers]).cpu()

    def matrix(self, statistic: Statistic = "weight", average: Average = "micro") -> Float[Tensor, "layer expert"]:
        """The usage matrix.

        Raises:
            PlanError: nothing was added, or no such statistic.
            ReadError: weights of what has ids alone.
        """
        if statistic not in STATISTICS or average not in ("micro", "macro"):
            names = (*STATISTICS, "micro", "macro")
            raise ic.PlanError(f"no usage {statistic!r}, {average!r}. {ic.errors.nearest(statistic, names)}")
        self._some()
        rows = []
        for layer in self.layers:
            kept = self._layers[layer]
            if average == "macro":
                rows.append(present(kept.shares.get(statistic), statistic) / kept.samples)
                continue
            value = self._sum(layer, statistic)
            rows.append(value / (value.sum() if statistic == "count" else kept.tokens))
        return torch.stack(rows).cpu()

    def per_sample(self, statistic: Statistic = "weight") -> Float[Tensor, "sample layer expert"]:
        """Each sample's own matrix, in the order in which they came.

        Raises:
            PlanError: they were not kept.
        """
        if not self.keep_samples:
            raise ic.PlanError("per-sample usage was not kept; make it with Usage(keep_samples=True)")
        layers = (torch.cat([sums.shares(statistic) for sums in self._layers[layer].each]) for layer in self.layers)
        return torch.stack(list(layers), 1)

    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        kept = self._layers.values()
        tensors = [value for layer in kept for value in (*layer.sums.values(), *layer.shares.values())]
        tensors += [part for layer in kept for sums in layer.each for part in sums.tensors.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _some(self) -> _Layer:
        if not self._layers:
            raise ic.PlanError("no routing was added: usage needs a token at least")
        return next(iter(self._layers.values()))

    def _sum(self, layer: int, name: str) -> Tensor:
        return present(self._layers[layer].sums.get(name), name)


def present(value: Tensor | None, name: str) -> Tensor:
    """A sum that may not be there.

    Raises:
        ReadError: it is not.
    """
    if value is None:
        raise ic.ReadError(f"there is no {name} usage of expert ids alone, only statistic 'count'")
    return value


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def top_sets(usage: Any, m: int) -> np.ndarray:
    """The m most used experts of each layer, as a mask `[layer expert]`; ties go to the lower expert.

    Raises:
        PlanError: m is no number of experts.
    """
    values = np.asarray(usage, dtype=np.float64)
    if isinstance(m, bool) or not isinstance(m, int) or not 1 <= m <= values.shape[-1]:
        raise ic.PlanError(ic.errors.wrong("top_sets: m", f"a number of experts, 1 to {values.shape[-1]}", m))
    order = np.argsort(-values, axis=-1, kind="stable")[..., :m]
    mask = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(mask, order, True, -1)
    return mask


def total_variation(first: Any, second: Any) -> np.ndarray:
    """½ Σ_e |first - second| along the last axis: of usage matrices, TV_usage by layer.

    Raises:
        PlanError: of different shapes.
    """
    a, b = (np.asarray(value, dtype=np.float64) for value in (first, second))
    if a.shape != b.shape:
        raise ic.PlanError(f"total variation of {list(a.shape)} and {list(b.shape)}; give matrices of the same experts")
    return np.abs(a - b).sum(-1) / 2


def shares(counts: Any) -> np.ndarray:
    """Counts over their sum along the last axis.

    Raises:
        PlanError: a layer without counts, or a negative one.
    """
    values = np.asarray(counts, dtype=np.float64)
    total = values.sum(-1, keepdims=True)
    if (values < 0).any() or not (total > 0).all():
        raise ic.PlanError("expert counts are negative, or a layer has none; a share needs something to be a share of")
    return values / total
