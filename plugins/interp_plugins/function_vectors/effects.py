"""Indirect effects: how far a head's mean on clean prompts brings the answer back on corrupted ones.

    effect[n, l, a] = p(target | corrupted n, z[l, t, a] set to mean[l, a, slot(t)]) - p(target | corrupted n)

t runs over the tokens of one class: the last token alone, or each of `CLASSES`. AIE is the mean over trials n.

Source: Todd et al. (2024), section 2.3, arXiv:2310.15213; token classes as in its code.

Cost: by "sweep" one pass per prompt and (layers from l on) × (tokens from the class's first on) per head; by "replay"
one full forward pass per trial, layer, head and class, as published. Must equal: each other, and the published output,
to 1e-8 plus a ten-thousandth of the largest effect; the last class gives what the last token alone gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import score
from interp_core import sites as S

from .means import head_shape
from .prompts import Prompt
from .rows import targets, tokens

CLASSES = (
    "demonstration", "label", "separator", "predictive", "structural", "end_of_example",
    "query_demonstration", "query_structural", "query_separator", "query_predictive",
)  # fmt: skip
"""Classes of tokens, in the order of the published code's last axis."""
Measure = Literal["probability", "logprob", "logit"]


class Head(NamedTuple):
    """A head and its average indirect effect."""

    layer: int
    head: int
    score: float


def token_class(label: str) -> str | None:
    """The class of a token's label; None where it has none (BOS, instructions)."""
    name = re.sub(
        r"^demonstration_\d+_(label_)?token$", lambda m: f"{'label' if m[1] else 'demonstration'}_token", label
    )
    name = name.removesuffix("_token")
    return name if name in CLASSES else None


class Effects(NamedTuple):
    """Effects by one measure.

    Attributes:
        clean: what the corrupted prompts give as they are.
        effects: what each patch adds to that; see `indirect_effect`.
    """

    clean: Float[Tensor, " trial"]
    effects: Float[Tensor, "trial layer head *token_class"]


def indirect_effect(
    model: ic.Model,
    prompts: Sequence[Prompt],
    mean: Float[Tensor, "layer head slot d_head"],
    *,
    classes: bool = False,
    by: Literal["sweep", "replay"] = "sweep",
    measure: Measure = "probability",
    strategy: str = "auto",
    progress: bool = False,
) -> Float[Tensor, "trial layer head *token_class"]:
    """Effects `[trial layer head]` of the last token, or `[trial layer head class]` of all classes, in float32 (float64
    if the model is); not a number in layers without heads.

    Args:
        prompts: corrupted ones, with targets.
        mean: of clean prompts of the same template and number of shots.
        classes: every token class, instead of the last token alone.
        by: "sweep" runs again only what a patch changes, "replay" everything, one patch at a time.
        measure: what is compared: probability, log-probability (nats) or logit of the target's first token.
        strategy, progress: of the sweep.

    Raises:
        PlanError: prompts and means that do not fit, or a prompt without target.
    """
    how: Any = {"classes": classes, "by": by, "strategy": strategy, "progress": progress}
    return indirect_effects(model, prompts, mean, (measure,), **how)[measure].effects


def indirect_effects(
    model: ic.Model,
    prompts: Sequence[Prompt],
    mean: Float[Tensor, "layer head slot d_head"],
    measures: Sequence[Measure] = ("probability", "logprob", "logit"),
    *,
    classes: bool = False,
    by: Literal["sweep", "replay"] = "sweep",
    strategy: str = "auto",
    progress: bool = False,
) -> dict[Measure, Effects]:
    """Effects by several measures, from the same passes; arguments as for `indirect_effect`."""
    first = targets(prompts)
    _check(model, prompts, mean)
    mean = mean.to(model.device, model.dtype)
    kind = torch.float64 if model.dtype == torch.float64 else torch.float32
    shape = len(measures), len(prompts), *mean.shape[:2], len(CLASSES) if classes else 1
    effects, clean = torch.full(shape, torch.nan, dtype=kind), torch.zeros(shape[:2], dtype=kind)
    # layers without heads stay not a number, so that no ranking takes them; a class that a prompt lacks moves nothing
    for layer, head in model.heads:
        effects[:, :, layer, head] = 0.0
    groups = [list(range(len(prompts)))] if by == "sweep" and not classes else [[n] for n in range(len(prompts))]
    for group in groups:  # the last token is the same position in all prompts, classes are not
        patches = _patches(model, prompts[group[0]], mean, classes)
        judged = [getattr(score, measure)(first[group]) for measure in measures]
        text, edits = tokens([prompts[n] for n in group]), list(patches.values())
        if by == "sweep":
            swept = model.sweep(text, edits, judged, strategy=strategy, progress=progress)
            base, values = (torch.stack([getattr(sweep, side) for sweep in swept]) for side in ("clean", "effects"))
        else:
            base, values = _replayed(model, text, edits, judged)
        clean[:, group] = base
        for (layer, head, place), value in zip(patches, values.unbind(1), strict=True):
            effects[:, group, layer, head, place] = value
    effects = effects if classes else effects[..., 0]
    return {measure: Effects(clean[i], effects[i]) for i, measure in enumerate(measures)}


def _replayed(
    model: ic.Model, text: ic.Tokens, edits: Sequence[ic.Edit], judged: Sequence[score.Score]
) -> tuple[Tensor, Tensor]:
    """Scores `[measure trial]` of one prompt, and effects `[measure patch trial]`, one full forward pass each; of
    logits in float32 at least, as a sweep has them."""

    def scores(run: ic.Run) -> Tensor:
        logits = run.logits.plain[:, -1]
        return torch.stack(
            [measure.rows(logits.to(torch.promote_types(logits.dtype, torch.float32))) for measure in judged]
        )

    clean = scores(model.run(text))
    # a mean over one prompt may be the very z that it replaces: an effect of zero, not a mistake
    values = torch.stack([scores(model.run(text, edits=edit, allow_noop=True)) for edit in edits], 1)
    return clean, values - clean[:, None]


def _patches(model: ic.Model, prompt: Prompt, mean: Tensor, classes: bool) -> dict[tuple[int, int, int], ic.Edit]:
    """Edits by layer, head and class; classes that the prompt has no token of are left out."""
    if not classes:
        last = prompt.slots[-1]
        return {(layer, head, 0): S.z[layer, head].at(-1).set(mean[layer, head, last]) for layer, head in model.heads}
    kinds = [token_class(label) for label in prompt.labels]
    places = {kind: [at for at, name in enumerate(kinds) if name == kind] for kind in CLASSES}
    return {
        (layer, head, number): S.z[layer, head].at(at).set(mean[layer, head, [prompt.slots[i] for i in at]])
        for layer, head in model.heads
        for number, at in enumerate(places.values())
        if at
    }


def _check(model: ic.Model, prompts: Sequence[Prompt], mean: Tensor) -> None:
    wanted = (model.n_layers, *head_shape(model))
    if (*mean.shape[:2], mean.shape[-1]) != wanted or mean.ndim != 4:
        raise ic.PlanError(
            f"the means are {list(mean.shape)}, this model needs [layer {wanted[0]}, head {wanted[1]}, slot, d_head "
            f"{wanted[2]}]; take them from this model"
        )
    for number, prompt in enumerate(prompts):
        if prompt.slots[-1] != mean.shape[2] - 1:
            raise ic.PlanError(
                f"prompt {number} ends in slot {prompt.slots[-1]}, the means have slots 0 to {mean.shape[2] - 1}; use "
                "the same template and number of shots for both"
            )


def average(
    effects: Float[Tensor, "trial layer head *token_class"], token_class: int | str = -1
) -> Float[Tensor, "layer head"]:
    """AIE: the mean over trials, of one class where effects have several.

    Args:
        token_class: number or name in `CLASSES`.
    """
    if effects.ndim == 4:
        effects = effects[..., CLASSES.index(token_class) if isinstance(token_class, str) else token_class]
    return effects.mean(0)


def top_heads(aie: Float[Tensor, "layer head"], k: int = 10) -> tuple[Head, ...]:
    """The k heads of largest AIE; ties go to the lower layer, then the lower head.

    Raises:
        PlanError: fewer heads than k.
    """
    ranked = ranking(aie)
    if not 1 <= k <= len(ranked):
        raise ic.PlanError(f"k is {k}, this model has {len(ranked)} heads; choose 1 to {len(ranked)}")
    return ranked[:k]


def ranking(aie: Float[Tensor, "layer head"]) -> tuple[Head, ...]:
    """All heads, the largest AIE first; layers without heads are left out."""
    heads = [Head(layer, head, float(aie[layer, head])) for layer in range(len(aie)) for head in range(aie.shape[1])]
    return tuple(
        sorted((head for head in heads if head.score == head.score), key=lambda h: (-h.score, h.layer, h.head))
    )


def gap(aie: Float[Tensor, "layer head"], k: int = 10) -> float:
    """How far the k-th head's AIE lies above the next one's: below the tolerance of the comparison, the k heads are not
    determined by it. Infinite if there is no next one."""
    ranked = ranking(aie)
    return ranked[k - 1].score - ranked[k].score if k < len(ranked) else float("inf")


def universal(aies: Sequence[Float[Tensor, "layer head"]]) -> Float[Tensor, "layer head"]:
    """Mean AIE over tasks, each of equal weight: heads that carry tasks in general.

    Raises:
        PlanError: none, or of different models.
    """
    if len({tuple(aie.shape) for aie in aies}) != 1:
        raise ic.PlanError(f"universal heads need AIEs of one model, got shapes {[list(aie.shape) for aie in aies]}")
    return torch.stack(list(aies)).mean(0)
