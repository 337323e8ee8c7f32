"""Soft normalised sufficiency and comprehensiveness: the prompt's embeddings blurred by importance instead of deleted.

    a_i            importance of prompt token i: max(weight, 0) / the largest; 0 everywhere where none is positive
    kept(q)        the embedding of each prompt token i times a mask of its own elements, each 1 with probability q_i
    Δ(q)           mean over scored target tokens of the distance between the model's prediction and that of kept(q)
    Soft-NS        1 - Δ(a) / Δ(0):  high if the important tokens suffice
    Soft-NC        Δ(1 - a) / Δ(0):  high if the prediction cannot do without them

The distance is max(0, p - p') of the scored token ("probability", the original), or Hellinger's of the two
distributions ("hellinger", as later used for generation). Both ratios are averaged over `draws` masks, u < q with the
same uniform numbers u for all vectors, from `seed`. The standard error over draws is the noise floor: differences below
it say nothing. Soft-NS may be negative, where blur is worse than no prompt; Δ(0) = 0 leaves both undefined (NaN). With
one target token and the distance "probability" this is the original; for more, means are taken before the ratio. Only
the prompt's own tokens are blurred, at the site `embed`; template and target stay.

Source: Zhao and Aletras (2023), "Incorporating Attribution Importance for Improving Faithfulness Metrics",
arXiv:2305.10496; the Hellinger form Zhao and Shan (2024), arXiv:2402.00794.
Cost: 2 + 2 draws × vectors forward passes, and one read of the embeddings.
Must equal: a plain loop over vectors and masks, one forward pass each, however many go into a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .orders import checked_count, checked_weights, named
from .perturbed import Places, log_probs, places_of, predicting, repeated, rows_at_once, single

Distance = Literal["probability", "hellinger"]


@dataclass(frozen=True, eq=False)
class Soft(ic.Result):
    """Soft-NS and Soft-NC of weight vectors; higher is better in both.

    Attributes:
        sufficiency, comprehensiveness: means over draws.
        sufficiency_noise, comprehensiveness_noise: their standard errors over draws.
        nothing: Δ(0), the distance to the prediction without any prompt.
        names: of the vectors.
        distance, draws, seed: how it was measured.
        passes: forward passes.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("sufficiency", "comprehensiveness", "sufficiency_noise", "comprehensiveness_noise"), ("vector",)
    )
    sufficiency: Float[Tensor, " vector"]
    comprehensiveness: Float[Tensor, " vector"]
    sufficiency_noise: Float[Tensor, " vector"]
    comprehensiveness_noise: Float[Tensor, " vector"]
    nothing: float
    names: tuple[str, ...]
    distance: str
    draws: int
    seed: int
    passes: int

    def table(self) -> list[dict[str, Any]]:
        """A row per vector."""
        numbers = {
            "Soft-NS": self.sufficiency, "Soft-NS ±": self.sufficiency_noise, "Soft-NC": self.comprehensiveness,
            "Soft-NC ±": self.comprehensiveness_noise,
        }  # fmt: skip
        return [
            {"vector": label, **{name: float(values[row]) for name, values in numbers.items()}}
            for row, label in enumerate(self.names)
        ]


def soft(
    model: ic.Model,
    tokens: ic.Tokens,
    weights: Shaped[Tensor, "*vector prompt"],
    *,
    names: Sequence[str] = (),
    scored: Any = "target",
    distance: Distance = "probability",
    draws: int = 10,
    seed: int = 0,
    tokens_at_once: int | None = None,
) -> Soft:
    """Soft-NS and Soft-NC of weight vectors on one text.

    Args:
        tokens: one row with the spans `prompt` and `target`.
        weights: one row per vector (or a single vector), a weight per prompt token.
        names: of the vectors.
        scored: target tokens whose prediction counts, a position as `Site.at` takes it.
        distance: between predictions.
        draws: masks per vector; two at least, for the noise.
        seed: of the masks.
        tokens_at_once: of all rows of one pass (default: by the kind of device).

    Raises:
        PlanError: what does not fit the text, before the model runs.
    """
    tokens = single(tokens)
    places = places_of(tokens, scored)
    weights = checked_weights(weights, len(places.prompt), "soft")
    labels = named(names, len(weights), "soft")
    checked_count("soft: draws=", draws, 2)
    checked_count("soft: seed=", seed, 0)
    if distance not in DISTANCES:
        raise ic.PlanError(f"soft: distance {distance!r}. {ic.errors.nearest(distance, DISTANCES)}")
    blurred = _Blurred(model, tokens, places, DISTANCES[distance], tokens_at_once)
    importance = weights.clamp(min=0) / weights.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    # a mask of zeros: what the prompt as a whole is worth, which both ratios are of
    nothing = blurred([torch.zeros(blurred.embedding.shape, dtype=torch.bool)]).item()
    distances = blurred(_masks(importance, blurred.embedding.shape[-1], draws, seed), 2 * draws * len(weights))
    ratios = distances.view(draws, 2, len(weights)) / (nothing if nothing > 0 else torch.nan)
    means, noise = ratios.mean(0), ratios.std(0) / draws**0.5
    return Soft(1 - means[0], means[1], noise[0], noise[1], nothing, labels, distance, draws, seed, blurred.passes)


def _masks(importance: Float[Tensor, "vector prompt"], width: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Masks [prompt d_model] by draw, then sufficiency before comprehensiveness, then vector."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        u = torch.rand(importance.shape[1], width, generator=generator, dtype=torch.float64)
        # one u for all vectors: a larger importance keeps all that a smaller one keeps, so that noise is shared
        yield from (u < q[:, None] for q in (*importance, *(1 - importance)))


class _Blurred:
    """Distances to a text's prediction when elements of the prompt's embeddings are masked."""

    def __init__(
        self,
        model: ic.Model,
        tokens: ic.Tokens,
        places: Places,
        distance: Callable[..., Tensor],
        tokens_at_once: int | None,
    ) -> None:
        self.model, self.tokens, self.places, self.distance = model, tokens, places, distance
        self.site = S.embed.at(places.prompt)
        run = model.run(tokens, read=self.site, logits=[position - 1 for position in places.scored])
        self.embedding, self.before = run[self.site].plain[0], run.logits.plain[0]
        self.size, self.passes = rows_at_once(model, tokens, len(places.scored), tokens_at_once), 1

    def __call__(self, masks: Iterable[Tensor], count: int = 1) -> Float[Tensor, " mask"]:
        """A distance per mask, in float64; so many are to come."""
        rest, out = iter(masks), []
        with ic.Progress("blurred texts", count) as progress:
            while batch := list(islice(rest, self.size)):
                values = self.embedding * torch.stack(batch).to(self.embedding)
                rows = repeated(self.tokens, self.tokens.ids.repeat(len(batch), 1))
                logits = predicting(self.model, rows, self.places, [self.site.set(values)])
                ids = self.tokens.ids[0, self.places.scored].to(logits.device)
                out += [self.distance(self.before, row, ids).mean().cpu() for row in logits]
                self.passes += len(batch)
                progress.add(len(batch))
        return torch.stack(out)


def _probability(before: Tensor, after: Tensor, ids: Tensor) -> Float[Tensor, " scored"]:
    return (log_probs(before, ids).exp() - log_probs(after, ids).exp()).clamp(min=0)


def _hellinger(before: Tensor, after: Tensor, ids: Tensor) -> Float[Tensor, " scored"]:
    roots = [(x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) / 2).exp() for x in (before, after)]
    return (roots[0] - roots[1]).double().norm(dim=-1) / 2**0.5


DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "probability": _probability,
    "hellinger": _hellinger,
}
