"""Probability, logit and log-probability of the targets, and the likeliest token: four measures for one sweep.

A sweep judges every pass by one score. The score used here writes all measures of a row of logits down, and gives the
place where they stand; places come back in whatever order the passes had, and are looked up. So four measures cost what
one costs. Must equal: the same measures of one `model.run` per edit.
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
_PLACES = 1 << 24  # whole numbers that float32 holds


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
        PlanError: prompts without targets, or more than 2^24 passes at once.
        CapabilityError: logits that are not numbers.
    """
    if (len(edits) + 1) * len(prompts) > _PLACES:
        raise ic.PlanError(f"{len(edits)} edits on {len(prompts)} prompts at once are too many; give fewer prompts")
    seen: list[Tensor] = []

    def place(logits: Tensor, ids: Tensor) -> Tensor:
        start = sum(map(len, seen))
        seen.append(_measures(logits, ids))
        return torch.arange(start, start + len(logits), device=logits.device).to(logits.dtype)

    judge = score.Score("place", place, targets=(targets(prompts),))
    found = model.sweep(tokens(prompts), edits, judge, strategy=strategy)
    rows = _numbers(torch.cat(seen))
    clean, values = rows[found.clean.long()].movedim(-1, 0), rows[found.values.long()].movedim(-1, 0)
    return Measured(clean[:3], values[:3], clean[3].long(), values[3].long())


def as_they_are(model: ic.Model, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """The measures `[measure prompt]` and likeliest tokens `[prompt]` without edits, one pass per prompt.

    Raises:
        PlanError: prompts without targets.
        CapabilityError: logits that are not numbers.
    """
    found = []
    for prompt, target in zip(prompts, targets(prompts), strict=True):
        logits = model.run(tokens([prompt]), logits=-1).logits.as_subclass(Tensor)
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        found.append(_measures(logits.to(kind), target[None].to(logits.device)))
    rows = _numbers(torch.cat(found))
    return rows.T[:3], rows[:, 3].long()


def _measures(logits: Tensor, ids: Tensor) -> Float[Tensor, "row measure"]:
    """Probability, logit, log-probability and likeliest token of each row, on the CPU, in float64."""
    logit, logprob = (values.gather(-1, ids[:, None])[:, 0] for values in (logits, torch.log_softmax(logits, -1)))
    rows = torch.stack([logit, logprob, logits.argmax(-1).to(logits.dtype)], -1).cpu().double()
    return torch.cat([rows[:, 1:2].exp(), rows], -1)


def _numbers(rows: Tensor) -> Tensor:
    if not rows.isfinite().all():
        raise ic.CapabilityError(
            "the model gives logits that are not finite numbers here; load it with another dtype (float16 overflows in "
            "models that were trained in bfloat16)"
        )
    return rows
