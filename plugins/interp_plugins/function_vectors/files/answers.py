"""Probability, logit and log-probability of the targets, and the likeliest token, all from the same passes.

Must equal: the same measures of one `model.run` per edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic
from interp_core import score

from ..prompts import Prompt
from ..rows import targets, tokens

MEASURES = ("p", "logit", "logprob")
_TOP = score.Score("top", lambda logits: logits.argmax(-1).to(logits.dtype))  # ids are whole numbers in float32 too


class Measured(NamedTuple):
    """What prompts measure as they are, and with each edit.

    Attributes:
        clean, values: along the axis `measure` probability, logit, log-probability (nats) of the target's first token.
        clean_top, top: id of the likeliest token.
    """

    clean: Float[Tensor, "measure prompt"]
    values: Float[Tensor, "measure variant prompt"]
    clean_top: Int[Tensor, " prompt"]
    top: Int[Tensor, "variant prompt"]


def measured(
    model: ic.Model, prompts: Sequence[Prompt], edits: Sequence[ic.Edit | Sequence[ic.Edit]], *, strategy: str = "auto"
) -> Measured:
    """The measures under each edit, in one sweep.

    Raises:
        PlanError: prompts without targets.
        CapabilityError: logits that are not numbers.
    """
    found = model.sweep(tokens(prompts), edits, _scores(targets(prompts)), strategy=strategy)
    clean, values = torch.stack([one.clean for one in found]), torch.stack([one.values for one in found])
    _demand_numbers(clean, values)
    return Measured(clean[:3], values[:3], clean[3].long(), values[3].long())


def as_they_are(model: ic.Model, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """The measures `[measure prompt]` and likeliest tokens `[prompt]` without edits, one pass per prompt.

    Raises:
        PlanError: prompts without targets.
        CapabilityError: logits that are not numbers.
    """
    found = []
    for prompt, target in zip(prompts, targets(prompts), strict=True):
        logits = model.run(tokens([prompt]), logits=-1).logits.plain
        wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
        found.append(torch.cat([one.rows(wide).cpu() for one in _scores(target[None])]))
    rows = torch.stack(found, -1)
    _demand_numbers(rows)
    return rows[:3], rows[3].long()


def _scores(target: Tensor) -> tuple[score.Score, ...]:
    return score.probability(target), score.logit(target), score.logprob(target), _TOP


def _demand_numbers(*values: Tensor) -> None:
    if not all(bool(part.isfinite().all()) for part in values):
        raise ic.CapabilityError(
            "the model gives logits that are not finite numbers here; load it with another dtype (float16 overflows in "
            "models that were trained in bfloat16)"
        )
