"""Deletion and insertion curves, and what the best tokens alone are worth.

    deletion     n_i = clip((s_i - s_K) / (s_0 - s_K), 0, 1), its running minimum; tokens go by descending weight
    insertion    the same from the text without any prompt token, which tokens enter by descending weight; its
                 running maximum
    AUC          trapezoids over the share of tokens; deletion: lower is better, insertion: higher
    drop@k       log p(text) - log p(text without its k best tokens); the same in log-odds, Σ log p - log (1 - p)

s is the summed log-probability of the scored target tokens (the mean gives the same areas). Unlike RISE's, these curves
keep the sign of s_0 - s_K: where deletion of everything makes the target likelier the vector is marked degenerate, and
where it changes nothing (|s_0 - s_K| ≤ 1e-8) the curve is a straight line, which is marked too.

Source: Petsiuk et al. (2018), arXiv:1806.07421, normalised as in FlashTrace's multimodal evaluation; drops: Cohen-Wang
et al. (2024), arXiv:2409.00729 (log-probability), Shrikumar et al. (2017), arXiv:1704.02685 (log-odds).
Cost: 2 K passes and one per k for one ordering, less what other metrics of the same text have run.
Must equal: a plain loop, one forward pass per text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

import interp_core as ic

from .orders import STEPS, checked_count, checked_deleted, checked_weights, deletion_steps, named, ordered, step_sizes
from .perturbed import Perturbed

NOTHING = 1e-8
"""Difference of log-probabilities that counts as none."""


@dataclass(frozen=True, eq=False)
class Areas(ic.Result):
    """Areas under deletion and insertion curves, and drops without the best tokens.

    Attributes:
        deletion, insertion: areas; lower and higher are better.
        drop: of the log-probability, without the `ks` best tokens; larger is better.
        odds_drop: the same of the log-odds; None where the text keeps none.
        degenerate: deleting all tokens makes the target likelier, or changes nothing.
        names: of the vectors.
        ks: how many tokens are taken away.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "deletion": ("vector",), "insertion": ("vector",), "drop": ("vector", "best"), "odds_drop": ("vector", "best"),
        "degenerate": ("vector",),
    }  # fmt: skip
    deletion: Float[Tensor, " vector"]
    insertion: Float[Tensor, " vector"]
    drop: Float[Tensor, "vector best"]
    odds_drop: Float[Tensor, "vector best"] | None
    degenerate: Bool[Tensor, " vector"]
    names: tuple[str, ...]
    ks: tuple[int, ...]

    def table(self) -> list[dict[str, Any]]:
        """A row per vector."""
        rows = []
        for number, name in enumerate(self.names):
            row = {"vector": name, "deletion AUC": float(self.deletion[number])}
            row |= {"insertion AUC": float(self.insertion[number])}
            for which, k in enumerate(self.ks):
                row |= {f"drop@{k}": float(self.drop[number, which])}
                row |= {} if self.odds_drop is None else {f"log-odds drop@{k}": float(self.odds_drop[number, which])}
            rows.append({**row, "degenerate AUC": bool(self.degenerate[number])})
        return rows


def areas(
    text: Perturbed,
    weights: Shaped[Tensor, "*vector prompt"],
    *,
    names: Sequence[str] = (),
    kept: Any = None,
    steps: int = STEPS,
    ks: Sequence[int] = (1, 3, 5),
) -> Areas:
    """Deletion and insertion AUC and drops of weight vectors; arguments as `faithfulness`.

    Args:
        ks: how many of the best tokens are taken away.

    Raises:
        PlanError: what does not fit the text, before the model runs.
    """
    weights = checked_weights(weights, text.size, "areas")
    keep = checked_deleted("areas", kept, text.size, steps)
    most = int(keep.sum())
    if any(checked_count("areas: ks=", k, 1) > most for k in ks):
        raise ic.PlanError(ic.errors.wrong("areas: ks=", f"numbers of tokens, 1 to {most}", ks))
    order = ordered(weights, keep)
    step = deletion_steps(order, steps, text.size)[:, None]
    number = torch.arange(int(step.max()) + 2)[:, None]
    shares = torch.tensor([0, *step_sizes(most, steps)], dtype=torch.float64).cumsum(0) / most
    # step -1 is never deleted; of a curve the i-th text has what goes before step i
    down = text.log_prob(((step >= 0) & (step < number)).flatten(0, 1)).view(len(weights), -1)
    up = text.log_prob((step >= number).flatten(0, 1)).view(len(weights), -1)
    deletion, insertion, degenerate = normalised(down, up, shares)
    none = torch.zeros(1, text.size, dtype=torch.bool)
    best = torch.cat([none.repeat(len(order), 1).scatter(1, order[:, :k], True) for k in ks]) if ks else none[:0]

    def drops(score: Callable[[Tensor], Tensor]) -> Float[Tensor, "vector best"]:
        left = score(torch.cat([none, best]))
        return (left[0] - left[1:]).view(len(ks), len(order)).T.contiguous()

    return Areas(
        torch.trapezoid(deletion, shares, dim=1), torch.trapezoid(insertion, shares, dim=1), drops(text.log_prob),
        drops(text.log_odds) if text.odds else None, degenerate,
        named(names, len(weights), "areas"), tuple(ks),
    )  # fmt: skip


def normalised(
    down: Float[Tensor, "vector step"], up: Float[Tensor, "vector step"], shares: Float[Tensor, " step"]
) -> tuple[Float[Tensor, "vector step"], Float[Tensor, "vector step"], Bool[Tensor, " vector"]]:
    """Deletion and insertion curves from 0 to 1, and which vectors are degenerate.

    Args:
        down: log-probabilities from nothing deleted to everything deleted.
        up: from nothing inserted to everything inserted.
        shares: how much is deleted, or inserted, at each step.
    """
    first, last = down[:, :1], down[:, -1:]
    still = (first - last).abs() <= NOTHING
    deletion = ((down - last) / (first - last)).clamp(0, 1).cummin(1).values
    insertion = ((up - last) / (first - last)).clamp(0, 1).cummax(1).values
    deletion, insertion = torch.where(still, 1 - shares, deletion), torch.where(still, shares, insertion)
    return deletion, insertion, (still | (last > first))[:, 0]
