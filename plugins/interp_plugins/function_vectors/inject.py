"""Injection: a function vector added to the residual stream, in a forward pass, under a target, or while generating.

    resid_post[layer] at a position  +=  strength · vector

`injection` is an edit for `model.run`, `model.generate` and `model.sweep`; position -1 is the prompt's last token, and
while generating every new one after it too, as in the published code. `by_layer` tries every layer in one sweep: a
prompt of T tokens costs L·T + L(L + 1)/2 token-layers at most, where forward passes with and without the vector for
every layer cost 2·L²·T.

Source: Todd et al. (2024), section 2.2, arXiv:2310.15213. Must equal: a forward pass per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import score
from interp_core import sites as S

from .effects import Head
from .prompts import Prompt
from .rows import targets, tokens
from .vectors import FunctionVector

Vectors = FunctionVector | Mapping[int, FunctionVector]
"""One for all layers, or one per layer (the mean-hidden-state baseline)."""
Judged = Literal["rank", "logprob", "probability", "logit", "top", "nll"]
_TOP = score.Score("top", lambda logits: logits.argmax(-1).to(logits.dtype))  # ids are whole numbers in float32 too


def injection(
    model: ic.Model,
    vector: FunctionVector,
    layer: int,
    *,
    at: Any = -1,
    strength: float = 1.0,
    site: str = "resid_post",
) -> ic.Edit:
    """The edit that adds the vector.

    Args:
        at: positions, as `Site.at` takes them.
        strength: factor.
        site: where: any site `[batch pos d_model]`.

    Raises:
        PlanError: a vector in head space or of another width, or a site of other axes.
    """
    place = S.named(site)
    if place.info.axes != ("batch", "pos", "d_model"):
        raise ic.PlanError(
            f"function vectors are added at sites [batch pos d_model], {site} is [{' '.join(place.info.axes)}]; use "
            "resid_post, resid_pre, attn_out or mlp_out"
        )
    return (place[layer] if place.info.layered else place).at(at).add(strength * vector.to(model))


def head_injection(
    mean: Float[Tensor, "layer head slot d_head"],
    heads: Sequence[Head],
    model: ic.Model,
    *,
    op: Literal["set", "add"] = "set",
    slot: int = -1,
    at: Any = -1,
) -> list[ic.Edit]:
    """The heads' means put in place of their z, or added to it: each at its own layer, no vector made of them."""
    values = mean.to(model.device, model.dtype)
    edits = []
    for layer, head, _ in heads:
        site = S.z[layer, head].at(at)
        value = values[layer, head, slot]
        edits.append(site.set(value) if op == "set" else site.add(value))
    return edits


class Scored(NamedTuple):
    """What prompts score as they are, and with each edit."""

    clean: Float[Tensor, " prompt"]
    values: Float[Tensor, "variant prompt"]


def scored(
    model: ic.Model,
    prompts: Sequence[Prompt],
    edits: Sequence[ic.Edit | Sequence[ic.Edit]],
    judged: Sequence[Judged] = ("rank",),
    *,
    strategy: str = "auto",
    progress: bool = False,
) -> dict[Judged, Scored]:
    """Scores of the targets under each edit, all of them from the same sweep.

    Args:
        edits: with "nll", at positions that `prompt_ends` gives, since targets follow the prompts there.
        judged: of the target's first token its rank (0 is best), log-probability (nats), probability, logit, and the id
            of the likeliest token ("top"); or alone "nll", the negative log-likelihood of the whole target, the mean
            over its tokens (nats).

    Raises:
        PlanError: prompts without targets, or "nll" with others.
    """
    first, whole = targets(prompts), list(judged) == ["nll"]
    if "nll" in judged and not whole:
        raise ic.PlanError("nll reads the targets' positions, the other scores the prompt's end: ask for it alone")
    text = tokens(prompts, answered=whole)
    measures = [score.nll(text)] if whole else scores_of(first, judged)
    by_measure = model.sweep(text, edits, measures, strategy=strategy, progress=progress)
    per = torch.tensor([len(prompt.target_ids) if whole else 1 for prompt in prompts]).to(by_measure[0].clean)
    return {name: Scored(sweep.clean / per, sweep.values / per) for name, sweep in zip(judged, by_measure, strict=True)}


def scores_of(first: Tensor, judged: Sequence[Judged]) -> list[score.Score]:
    """The scores of these names, of the targets' first tokens `[prompt]`."""
    return [_TOP if name == "top" else getattr(score, name)(first) for name in judged]


def prompt_ends(prompts: Sequence[Prompt], judged: Judged) -> Any:
    """The position of each prompt's last token, where the target follows it and where it does not."""
    return ic.PerRow(tuple(len(prompt.ids) - 1 for prompt in prompts)) if judged == "nll" else -1


def by_layer(
    model: ic.Model,
    prompts: Sequence[Prompt],
    vectors: Vectors,
    judged: Judged = "rank",
    *,
    layers: Sequence[int] | None = None,
    strength: float = 1.0,
    site: str = "resid_post",
    strategy: str = "auto",
    progress: bool = False,
) -> Scored:
    """Scores with the vector at the prompt's last token, layer by layer, in one sweep; see `scored`.

    Args:
        layers: where to inject (None: everywhere).

    Raises:
        PlanError: prompts without targets, or a vector that does not fit.
    """
    at = prompt_ends(prompts, judged)
    edits = [
        injection(
            model, vectors if isinstance(vectors, FunctionVector) else vectors[layer], layer,
            at=at, strength=strength, site=site,
        )
        for layer in (range(model.n_layers) if layers is None else layers)
    ]  # fmt: skip
    return scored(model, prompts, edits, (judged,), strategy=strategy, progress=progress)[judged]


class Continued(NamedTuple):
    """What was generated.

    Attributes:
        ids: new tokens.
        texts: their text, up to the end-of-sequence token.
        receipts: what the injection did.
    """

    ids: Tensor
    texts: tuple[str, ...]
    receipts: tuple[ic.Receipt, ...]


def continued(
    model: ic.Model,
    x: Any,
    edits: ic.Edit | Sequence[ic.Edit] = (),
    *,
    steps: int | None = None,
    max_new_tokens: int = 16,
    **options: Any,
) -> Continued:
    """Generate with injections at every step, or at the first `steps` and none after them.

    What comes after the first steps is generated from the tokens that they left, read again without injection, as in
    the published code.

    Args:
        x: text, texts or tokens.
        edits: as `injection` makes them.
        steps: how many new tokens come under the injection (None: all).
        options: of `model.generate`.

    Raises:
        PlanError: fewer than one step.
    """
    if steps is not None and steps < 1:
        raise ic.PlanError(f"steps is at least 1, not {steps}; leave edits out to generate without injection")
    first = max_new_tokens if steps is None else min(steps, max_new_tokens)
    generation = model.generate(x, edits=edits, max_new_tokens=first, **options)
    ids, texts, rest = generation.ids, generation.texts, max_new_tokens - first
    if rest and ids.shape[1] == first:
        more = model.generate(generation.tokens, max_new_tokens=rest, **options)
        over = generation.ended  # what has come to its end does not go on
        added = torch.where(torch.tensor(over)[:, None], ids[:, -1:], more.ids)
        ids = torch.cat([ids, added], 1)
        texts = [a if end else a + b for a, b, end in zip(texts, more.texts, over, strict=True)]
    return Continued(ids, tuple(texts), tuple(generation.receipts))
