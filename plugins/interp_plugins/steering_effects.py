"""What steering does, and what it costs: a score of prompts and the fluency of neutral text, for each multiplier.

    effect(m)     score(prompt with m · v added) - score(prompt)
    nll(m)        nats per token of neutral texts with m · v added at all of their tokens; a model that no longer speaks
                  may well say the answer

The same of a random direction and of shuffled labels, each as long as v, says what any change of that size does.

Source: Rimsky et al. (2023), arXiv:2312.06681, section 4, who judge multipliers by behaviour and by general ability.
Cost: two sweeps of vectors × multipliers variants.
Must equal: a run for each (tests/test_steering_vectors.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import score as scores

from .steering_vectors import SteeringResult

STEERING, RANDOM, SHUFFLED = "steering", "random", "shuffled"


@dataclass(frozen=True, eq=False)
class SteeringEffects(ic.Result):
    """Scores and fluency by vector and multiplier.

    Attributes:
        effect: change of the score.
        clean: the score without steering.
        nll, clean_nll: of the neutral texts, in nats per token; None without such.
        vectors: names: `steering` and its controls.
        multipliers: numbers along `multiplier`.
        layer, score: where, and what was scored.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "effect": ("vector", "multiplier", "batch"), "clean": ("batch",),
        "nll": ("vector", "multiplier", "text"), "clean_nll": ("text",),
    }  # fmt: skip
    effect: Float[Tensor, "vector multiplier batch"]
    clean: Float[Tensor, " batch"]
    nll: Float[Tensor, "vector multiplier text"] | None
    clean_nll: Float[Tensor, " text"] | None
    vectors: tuple[str, ...]
    multipliers: tuple[float, ...]
    layer: int
    score: str

    def table(self) -> list[dict[str, Any]]:
        """One row per vector and multiplier, means over prompts and texts."""
        rows = []
        for i, vector in enumerate(self.vectors):
            for k, multiplier in enumerate(self.multipliers):
                row = {"vector": vector, "multiplier": multiplier, self.score: float(self.effect[i, k].mean())}
                rows.append(row if self.nll is None else row | {"nll per token": float(self.nll[i, k].mean())})
        return rows

    @property
    def finding(self) -> str:
        """The multiplier that moves the score most, beside the controls, and what it costs."""
        means = self.effect.mean(-1)
        k = int(means[0].abs().argmax())
        controls = ", ".join(f"{name} {float(means[i, k]):+.3g}" for i, name in enumerate(self.vectors) if i)
        said = (
            f"Times {self.multipliers[k]:g} in layer {self.layer}, the vector moves {self.score} by "
            f"{float(means[0, k]):+.3g} ({controls})"
        )
        if self.nll is None or self.clean_nll is None:
            return f"{said}."
        steered, plain = float(self.nll[0, k].mean()), float(self.clean_nll.mean())
        return f"{said}; neutral text then takes {steered:.2f} nats per token, {plain:.2f} without."

    def __str__(self) -> str:
        return "\n".join([self.finding, *("  ".join(f"{k} {v}" for k, v in row.items()) for row in self.table())])

    def charts(self) -> list[ic.report.Curves]:
        """Score against multipliers, and fluency."""
        places = [f"{multiplier:g}" for multiplier in self.multipliers]
        kinds = [(self.effect, f"change of {self.score}", f"What steering in layer {self.layer} does to {self.score}")]
        if self.nll is not None:
            kinds.append((self.nll, "nats per token", f"What steering in layer {self.layer} does to neutral text"))
        return [
            ic.report.Curves(
                [ic.report.Line(name, row.tolist()) for name, row in zip(self.vectors, numbers.mean(-1), strict=True)],
                places, xlabel="multiplier", ylabel=unit, title=title,
            )
            for numbers, unit, title in kinds
        ]  # fmt: skip


def steering_effects(
    model: ic.Model,
    vectors: SteeringResult,
    layer: int,
    multipliers: Sequence[float],
    prompts: Any,
    score: scores.Score,
    *,
    at: Any = None,
    neutral: Any = None,
    seed: int = 0,
) -> SteeringEffects:
    """Try multipliers of a vector and of its controls.

    Args:
        prompts: what is steered and scored, as `model.run` takes it.
        score: of `ic.score`.
        at: where the prompts are steered, as in `SteeringResult.edits`.
        neutral: texts that have nothing to do with it, whose likelihood says whether the model still speaks; steered at
            all tokens.
        seed: of the controls.

    Raises:
        PlanError: no multipliers, or one that is 0 and changes nothing.
    """
    if not multipliers or not all(multipliers):
        raise ic.PlanError(
            f"steering_effects: multipliers {list(multipliers)}; give some, none of them 0 (clean has it)"
        )
    own = {STEERING: vectors.vector(layer)}
    own |= {name: vectors.control(layer, name, seed) for name in (RANDOM, SHUFFLED)}  # type: ignore[arg-type]

    def swept(x: Any, where: Any, judged: scores.Score) -> tuple[Tensor, Tensor]:
        variants = [
            vectors.edits(layer, multiplier, where, vector=vector)
            for vector in own.values()
            for multiplier in multipliers
        ]
        sweep = model.sweep(x, variants, judged)
        return sweep.values.unflatten(0, (len(own), len(multipliers))), sweep.clean

    values, clean = swept(prompts, at, score)
    nll = clean_nll = None
    if neutral is not None:
        tokens = neutral if isinstance(neutral, ic.Tokens) else model.tokens(neutral)
        tokens = tokens.name(rest=[ic.Span(1, length) for length in tokens.lengths])
        count = torch.tensor(tokens.lengths) - 1
        nll, clean_nll = (part / count for part in swept(tokens, None, scores.nll(tokens, "rest")))
    return SteeringEffects(
        effect=values - clean, clean=clean, nll=nll, clean_nll=clean_nll, vectors=tuple(own),
        multipliers=tuple(map(float, multipliers)), layer=layer, score=score.name,
    )  # fmt: skip
