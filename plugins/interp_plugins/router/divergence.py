"""How differently two variants of a text are routed, token by token, sample by sample, or over a corpus.

    tv            ½ Σ_e |w̃_A - w̃_B|              of normalised weights, per token
    tv_full       ½ Σ_e |p_A - p_B|               of probabilities over all experts, per token
    intersection  |S_A ∩ S_B|                     I
    overlap       I / min(|S_A|, |S_B|)           I / k
    jaccard       I / |S_A ∪ S_B|                 I / (2k - I)
    weighted_jaccard   Σ min(w̃) / Σ max(w̃)       (1 - tv) / (1 + tv) of weights that sum to 1
    top1_same     1 if the expert of largest weight is the same
    TV_usage      ½ Σ_e |U_A - U_B|               per layer; never above the mean of tv (usage.total_variation)

Levels of the sets: `token` (S of each token), `sample` (the union over a sample's tokens), `corpus` (the m most used
experts of a layer, usage.top_sets). Token values are averaged over a sample's tokens and then over samples (macro), or
over all tokens (micro). By chance two sets of k out of E share k²/E.
Saturation of a checkpoint τ is `overlap` of its routing with the final checkpoint's on the same text; by chance k / E.

Source: tv, Jaccard and intersection per token as Geuan666/XAI4Agent (2026); saturation Muennighoff et al. (2024),
OLMoE, arXiv:2409.02060.
Shapes: two `Routed` of the same n tokens; curves `[layer]`, per sample `[sample layer]`.
Cost: n · expert per statistic; memory sample · layer per curve.
Must equal: golden float64 numbers within 1e-6, sets exactly; identical inputs give tv 0 and Jaccard 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import interp_core as ic

from .routed import Layers, Routed
from .usage import Average, top_sets

TOKEN = ("tv", "tv_full", "intersection", "overlap", "jaccard", "weighted_jaccard", "top1_same")
"""Statistics of each token."""
SETS = ("intersection", "overlap", "jaccard")
"""Those that sets alone have, at every level."""


def aligned(first: Routed, second: Routed) -> None:
    """Refuse routing that cannot be compared token by token.

    Raises:
        PlanError: other tokens or other experts.
    """
    if len(first) != len(second):
        raise ic.PlanError(
            f"{len(first)} tokens are compared with {len(second)}; both variants need the same aligned positions"
        )
    if first.n_experts != second.n_experts:
        raise ic.PlanError(
            f"a layer of {first.n_experts} experts is compared with one of {second.n_experts}; compare one architecture"
        )


def token_statistics(first: Routed, second: Routed) -> dict[str, Float[Tensor, " n"]]:
    """Every statistic of every token; without those that ids alone do not have.

    Raises:
        PlanError: other tokens or other experts.
    """
    aligned(first, second)
    statistics = set_statistics(first.chosen, second.chosen)
    if first.weights is not None and second.weights is not None:
        a, b = first.normalised.double(), second.normalised.double()
        statistics["tv"] = (a - b).abs().sum(-1) / 2
        most = torch.maximum(a, b).sum(-1)
        statistics["weighted_jaccard"] = torch.where(most == 0, 1.0, torch.minimum(a, b).sum(-1) / most)
        statistics["top1_same"] = (a.argmax(-1) == b.argmax(-1)).double()
    if first.probs is not None and second.probs is not None:
        statistics["tv_full"] = (first.probs.double() - second.probs.double()).abs().sum(-1) / 2
    return {name: statistics[name] for name in TOKEN if name in statistics}


def set_statistics(first: Bool[Tensor, "n expert"], second: Bool[Tensor, "n expert"]) -> dict[str, Float[Tensor, " n"]]:
    """Intersection, overlap and Jaccard of sets, row by row."""
    both = (first & second).sum(-1).double()
    sizes = first.sum(-1), second.sum(-1)
    return {"intersection": both, "overlap": both / torch.minimum(*sizes), "jaccard": both / (first | second).sum(-1)}


def saturation(early: Routed, final: Routed) -> dict[str, float]:
    """How much of the final checkpoint's routing is there already: mean |S ∩ S'| / k, and the same of the first expert.

    Raises:
        PlanError: other tokens or other experts.
        ReadError: ids alone, which have no first expert.
    """
    final.need("weights")
    early.need("weights")
    statistics = token_statistics(early, final)
    return {"top_k": float(statistics["overlap"].mean()), "top_1": float(statistics["top1_same"].mean())}


class Chance(NamedTuple):
    """What two independent random sets of k out of E have in common on average."""

    intersection: float
    overlap: float
    jaccard: float

    @staticmethod
    def of(k: int, n_experts: int) -> Chance:
        """Exact: the intersection is hypergeometric.

        Raises:
            PlanError: k is no number of experts.
        """
        if not 1 <= k <= n_experts:
            raise ic.PlanError(f"chance: k = {k} of {n_experts} experts; k is 1 to the number of experts")
        below = math.comb(n_experts, k)
        jaccard = 0.0
        for common in range(max(0, 2 * k - n_experts), k + 1):
            p = math.comb(k, common) * math.comb(n_experts - k, k - common) / below
            jaccard += p * common / (2 * k - common)
        return Chance(k * k / n_experts, k / n_experts, jaccard)


def corpus_sets(first: Any, second: Any, m: int) -> dict[str, np.ndarray]:
    """Intersection, overlap and Jaccard of the m most used experts of each layer, from usage matrices `[layer expert]`.

    Raises:
        PlanError: matrices of different shapes; m is no number of experts.
    """
    a, b = top_sets(first, m), top_sets(second, m)
    if a.shape != b.shape:
        raise ic.PlanError(f"usage of {list(a.shape)} is compared with {list(b.shape)}; give matrices of one model")
    statistics = set_statistics(torch.from_numpy(a), torch.from_numpy(b))
    return {name: value.numpy() for name, value in statistics.items()}


class Divergence:
    """Curves over layers of two variants of the same samples, gathered sample by sample."""

    def __init__(self) -> None:
        self._means: dict[int, dict[str, list[Tensor]]] = {}
        self._sets: dict[int, dict[str, list[Tensor]]] = {}
        self._tokens: dict[int, list[Tensor]] = {}

    def add(self, first: Layers, second: Layers) -> None:
        """One sample: both variants' routing at its aligned positions, all layers.

        Raises:
            PlanError: other layers, tokens or experts.
        """
        if set(first) != set(second):
            raise ic.PlanError(f"layers {sorted(first)} are compared with layers {sorted(second)}; read the same")
        for layer in sorted(first):
            self.add_layer(layer, first[layer], second[layer])

    def add_layer(
        self, layer: int, first: Routed, second: Routed, samples: Int[Tensor, " n"] | None = None, n_samples: int = 1
    ) -> None:
        """Tokens of whole samples in one layer.

        Args:
            layer: its decoder number.
            first, second: of the same tokens.
            samples: which sample each token is of; None: all of one.
            n_samples: how many samples there are.

        Raises:
            PlanError: other tokens or experts; a sample without tokens.
        """
        statistics = token_statistics(first, second)
        device = first.chosen.device
        rows = torch.zeros(len(first), dtype=torch.long, device=device) if samples is None else samples.to(device)
        tokens = torch.zeros(n_samples, dtype=torch.float64, device=device)
        tokens.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64, device=device))
        if bool((tokens == 0).any()):
            raise ic.PlanError(f"sample {int((tokens == 0).nonzero()[0])} has no aligned tokens; leave it out")
        for name, values in statistics.items():
            sums = torch.zeros_like(tokens).index_add_(0, rows, values)
            self._means.setdefault(layer, {}).setdefault(name, []).append((sums / tokens).cpu())
        # of the union over a sample's tokens, which a few odd tokens can widen; the means above are token by token
        unions = [_unions(routed.chosen, rows, n_samples) for routed in (first, second)]
        for name, values in set_statistics(*unions).items():
            self._sets.setdefault(layer, {}).setdefault(name, []).append(values.cpu())
        self._tokens.setdefault(layer, []).append(tokens.cpu())

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that were compared."""
        return tuple(sorted(self._means))

    @property
    def names(self) -> tuple[str, ...]:
        """Statistics of tokens that there are."""
        return tuple(next(iter(self._means.values()), {}))

    @property
    def tokens(self) -> Int[np.ndarray, " sample"]:
        """Aligned tokens of each sample."""
        return torch.cat(self._tokens[self.layers[0]]).numpy().astype(np.int64)

    def per_sample(self, name: str, level: str = "token") -> Float[np.ndarray, "sample layer"]:
        """Each sample's value: the mean over its tokens, or that of its tokens' unions (`level="sample"`).

        Raises:
            PlanError: no such statistic or level, or nothing was added.
        """
        kept = {"token": self._means, "sample": self._sets}.get(level)
        if kept is None:
            raise ic.PlanError(f"no level {level!r} of samples. {ic.errors.nearest(level, ('token', 'sample'))}")
        if not kept:
            raise ic.PlanError("no pair was added: a curve needs one sample at least")
        known = next(iter(kept.values()))
        if name not in known:
            raise ic.PlanError(f"no {level} statistic {name!r} here. {ic.errors.nearest(name, known)}")
        return torch.stack([torch.cat(kept[layer][name]) for layer in self.layers], 1).numpy()

    def curve(self, name: str, average: Average = "macro", level: str = "token") -> Float[np.ndarray, " layer"]:
        """The mean over samples (macro), or over all tokens (micro; of level token alone).

        Raises:
            PlanError: as `per_sample`; micro of another level.
        """
        values = self.per_sample(name, level)
        if average == "macro":
            return values.mean(0)
        if level != "token":
            raise ic.PlanError("a micro average pools tokens: take level='token', or average='macro'")
        return np.average(values, axis=0, weights=self.tokens)

    def band(self, name: str, boot: ic.stats.Bootstrap | None = None, level: str = "token") -> ic.stats.Band:
        """The macro curve with its interval over samples; curves of one `boot` are paired."""
        return (boot or ic.stats.Bootstrap()).band(self.per_sample(name, level), axes=("layer",), name=name)


def _unions(chosen: Tensor, rows: Tensor, n_samples: int) -> Bool[Tensor, "sample expert"]:
    counts = torch.zeros(n_samples, chosen.shape[1], dtype=torch.float32, device=chosen.device)
    return counts.index_add_(0, rows, chosen.float()) > 0
