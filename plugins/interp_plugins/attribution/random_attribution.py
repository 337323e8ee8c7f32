"""Random attribution: what any method must be better than.

    score(j) = a number drawn evenly from [0, 1), the same for the same row and seed

The generator begins with a hash of the row's ids, of what is explained and of the seed, so that a prompt has its scores
whatever else is in the batch. Tokens that the answer is not predicted from have none.

Source: the baseline of Hooker et al. (2019), arXiv:1806.10758.
Cost: none. Must equal: itself, alone and in any batch.
"""

from __future__ import annotations

import hashlib

import torch

import interp_core as ic

from .layout import Layout
from .method import Attributed, Attribution, AttributionConfig


class RandomConfig(AttributionConfig):
    """Settings of random attribution.

    Attributes:
        seed: another one gives other numbers.
    """

    seed: int = 0


class RandomAttribution(Attribution):
    """Random numbers in the place of scores."""

    name = "random_attribution"
    requires = frozenset({"causal", "resid_post"})
    Config = RandomConfig
    additive = False

    def attribute(self, model: ic.Model, layout: Layout, config: RandomConfig) -> Attributed:
        """Numbers of a generator of this row."""
        said = f"{config.seed} {list(layout.sink)} {layout.tokens.ids[0].tolist()}"
        seed = int.from_bytes(hashlib.sha256(said.encode()).digest()[:7], "big")
        scores = torch.rand(layout.length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
        scores[max(layout.predictors) + 1 :] = 0
        return Attributed(
            scores, notes={"sampler": "torch.rand by a hash of the row and the seed", "seed": config.seed}
        )
