"""Recovery@k and other measures of whether weights find the tokens that are known to matter.

    Recovery@k     share of the gold tokens among the ⌈k P⌉ prompt tokens of highest weight (negative ones count as 0)
    among equals   the tokens at the threshold are tied: a of them have a place, b are gold, of n in all. Declared:
                   lower positions first; at least max(0, a - (n - b)) and at most min(a, b) gold ones, a b / n on
                   average over all orders, which is exact
    by chance      ⌈k P⌉ / P, the hypergeometric mean, whatever the number of gold tokens
    mass           share of the positive weight that lies on gold tokens
    rank AUC       probability that a gold token outweighs another one, ties half (signed weights)

k P is exact: 0.1 is a tenth. With `kept`, only these tokens are ranked, and only gold tokens among them count, as the
reference has it for methods that leave stop words out.

Source: the reference implementation of FlashTrace (arXiv:2602.01914), whose topk is not stable.
Cost: a sort per vector; no model runs.
Must equal: the published numbers where nothing is tied; `expected` the mean over all orders, one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

import interp_core as ic

from .orders import checked_kept, checked_weights, named, ordered, tied_share

SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Recovery(ic.Result):
    """How well weight vectors find gold tokens; NaN everywhere where the example is skipped.

    Attributes:
        recovery: Recovery@k with lower positions first among equals.
        expected: its mean over all orders among equals.
        low, high: its least and largest value over these.
        mass: share of the positive weight on gold tokens; NaN where no weight is positive.
        rank_auc: NaN where all ranked tokens are gold.
        tied: share of ranked tokens whose weight another one has too.
        chance: Recovery@k of random weights, on average.
        names: of the vectors.
        share: k.
        chosen, ranked, gold: numbers of tokens: in the top, ranked, and gold among these.
        skipped: why there is nothing to recover; "" where there is.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("recovery", "expected", "low", "high", "mass", "rank_auc", "tied"), ("vector",)
    )
    recovery: Float[Tensor, " vector"]
    expected: Float[Tensor, " vector"]
    low: Float[Tensor, " vector"]
    high: Float[Tensor, " vector"]
    mass: Float[Tensor, " vector"]
    rank_auc: Float[Tensor, " vector"]
    tied: Float[Tensor, " vector"]
    chance: float
    names: tuple[str, ...]
    share: float
    chosen: int
    ranked: int
    gold: int
    skipped: str

    def table(self) -> list[dict[str, Any]]:
        """A row per vector."""
        numbers = {name: getattr(self, name).tolist() for name in self.AXES}
        return [
            {"vector": label, **{name: values[row] for name, values in numbers.items()}, "chance": self.chance}
            for row, label in enumerate(self.names)
        ]


def recovery(
    weights: Shaped[Tensor, "*vector prompt"],
    gold: Any,
    *,
    share: float = SHARE,
    kept: Any = None,
    names: Sequence[str] = (),
) -> Recovery:
    """Recovery of gold tokens by weight vectors.

    Args:
        weights: one row per vector (or a single vector), a weight per prompt token.
        gold: the tokens that matter, as a mask over the prompt or its indices; none: the example is skipped.
        share: k, the part of the ranked tokens that is taken.
        kept: prompt tokens that are ranked (a mask, or indices); None: all.
        names: of the vectors.

    Raises:
        PlanError: weights that are not finite, tokens outside the prompt, k outside (0, 1].
    """
    size = weights.shape[-1] if isinstance(weights, Tensor) and weights.ndim else 0
    weights = checked_weights(weights, size, "recovery")
    keep = checked_kept(kept, size, "recovery: kept=")
    known = checked_kept(gold, size, "recovery: gold=") if gold is not None and len(gold) else torch.zeros_like(keep)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ic.PlanError(ic.errors.wrong("recovery: share=", "a number above 0, up to 1", share))
    labels, ranked = named(names, len(weights), "recovery"), int(keep.sum())
    reason = _reason(known, keep)
    tied = tied_share(weights.clamp(min=0), keep) if ranked else weights.new_full((len(weights),), torch.nan)
    chosen = top_count(ranked, share)
    if reason:
        none = weights.new_full((len(weights),), torch.nan)
        return Recovery(
            none, none, none, none, none, none, tied, torch.nan, labels, float(share), chosen, ranked, 0, reason
        )
    known &= keep
    stable, expected, low, high = _hits(weights.clamp(min=0), known, keep, chosen) / known.sum()
    mass, ranks = _localisation(weights, known, keep)
    return Recovery(
        stable, expected, low, high, mass, ranks, tied, chosen / ranked, labels, float(share), chosen, ranked,
        int(known.sum()), "",
    )  # fmt: skip


def top_count(ranked: int, share: float) -> int:
    """⌈share × ranked⌉, of the decimal number that the share is written as."""
    # ceil(0.1 · 30) of floats is 4: 0.1 is a little more than a tenth there
    return -int(-ranked * Fraction(str(share)) // 1)


def chance(ranked: int, share: float = SHARE) -> float:
    """Recovery@k of random weights, on average: each token is in the top with probability ⌈k P⌉ / P."""
    return top_count(ranked, share) / ranked


def _reason(gold: Bool[Tensor, " prompt"], keep: Bool[Tensor, " prompt"]) -> str:
    if not bool(gold.any()):
        return "no gold tokens in the prompt"
    return "" if bool((gold & keep).any()) else f"all {int(gold.sum())} gold tokens are left out of the ranking"


def _hits(
    weights: Float[Tensor, "vector prompt"], gold: Bool[Tensor, " prompt"], keep: Bool[Tensor, " prompt"], chosen: int
) -> Float[Tensor, "kind vector"]:
    """Gold tokens in the top: by the declared order, on average over equals, at least, at most."""
    top = ordered(weights, keep)[:, :chosen]
    stable = gold[top].sum(1)
    threshold = weights.gather(1, top[:, -1:])
    above, level = keep & (weights > threshold), keep & (weights == threshold)
    # gold tokens above the threshold are in for certain; the places left go to tokens that are equal
    sure, places = (above & gold).sum(1), chosen - above.sum(1)
    equal, golden = level.sum(1), (level & gold).sum(1)
    low = sure + (places - (equal - golden)).clamp(min=0)
    high = sure + torch.minimum(places, golden)
    return torch.stack([stable.double(), sure + places * golden / equal.double(), low.double(), high.double()])


def _localisation(
    weights: Float[Tensor, "vector prompt"], gold: Bool[Tensor, " prompt"], keep: Bool[Tensor, " prompt"]
) -> tuple[Float[Tensor, " vector"], Float[Tensor, " vector"]]:
    """Mass on gold tokens, and the area under the ROC curve."""
    positive = weights[:, keep].clamp(min=0)
    mass = positive[:, gold[keep]].sum(1) / positive.sum(1)
    if bool(gold[keep].all()):
        return mass, torch.full_like(mass, torch.nan)
    ranks = [ic.stats.auroc(row, gold[keep]) for row in weights[:, keep]]
    return mass, torch.tensor(ranks, dtype=torch.float64)
