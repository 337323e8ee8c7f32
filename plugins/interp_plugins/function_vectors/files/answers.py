"""What prompts answer, as they are and with edits: the one place where answers are scored for files.

    `measured`       one sweep over many edits: probability, logit, log-probability of the targets, likeliest tokens
    `as_they_are`    the same of whole passes without edits, one per prompt
    `answers`        without a function vector and with it, and the logits themselves: by replay (one whole pass per
                     prompt), by hand (the hooks of `plain`), or by sweep, where logits come from padded batches

Log-probabilities are in float32 or wider. Must equal: the same measures of one `model.run` per edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic

from ..inject import Judged, injection, scored, scores_of
from ..means import BATCH
from ..prompts import Prompt
from ..rows import batches, targets, tokens
from ..vectors import FunctionVector
from .extraction import By, Clock
from .fixed_run import FixedRun, PromptKind
from .plain import plain_logits

MEASURES = ("p", "logit", "logprob")
"""What the files of relations call the measures of a target, in this order."""
_JUDGED: tuple[Judged, ...] = ("probability", "logit", "logprob", "top")


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
    swept = scored(model, prompts, edits, _JUDGED, strategy=strategy)
    clean, values = (torch.stack(column) for column in zip(*swept.values(), strict=True))
    _demand_numbers(clean, values)
    return Measured(clean[:3], values[:3], clean[3].long(), values[3].long())


def as_they_are(model: ic.Model, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """The measures `[measure prompt]` and likeliest tokens `[prompt]` without edits, one pass per prompt.

    Raises:
        PlanError: prompts without targets.
        CapabilityError: logits that are not numbers.
    """
    scores, logits = scores_of(targets(prompts), _JUDGED), _last_logits(model, prompts)
    rows = torch.stack([score.rows(logits) for score in scores]).cpu()
    _demand_numbers(rows)
    return rows[:3], rows[3].long()


@dataclass(frozen=True)
class TargetScores:
    """How each prompt's target stands at its last token.

    Attributes:
        logits: of all tokens, in float32 at least.
        logprob: of the target's first token (nats).
        rank: how many tokens have a larger logit.
    """

    logits: Float[Tensor, "trial vocab"]
    logprob: Float[Tensor, " trial"]
    rank: Int[Tensor, " trial"]
    targets: Int[Tensor, " trial"] = field(repr=False)

    @property
    def logit(self) -> Float[Tensor, " trial"]:
        """Logit of the target."""
        return self.logits.gather(-1, self.targets[:, None])[:, 0]

    @property
    def p(self) -> Float[Tensor, " trial"]:
        """Probability of the target."""
        return self.logprob.exp()

    @property
    def pred_id(self) -> Int[Tensor, " trial"]:
        """Likeliest token."""
        return self.logits.argmax(-1)


@dataclass(frozen=True)
class Answers:
    """What prompts answer, as they are and with the vector.

    Attributes:
        prompts: what was asked.
        kind: which prompts of the trials they are.
        layer: where the vector was added, at the last token.
        alpha: factor of the vector.
        base, steered: without it and with it.
    """

    prompts: tuple[Prompt, ...]
    kind: PromptKind
    layer: int
    alpha: float
    base: TargetScores
    steered: TargetScores


def answers(
    model: ic.Model,
    run: FixedRun,
    vector: FunctionVector,
    layer: int,
    *,
    kind: PromptKind = "corrupted",
    by: By = "sweep",
    by_hand: bool = False,
    alpha: float = 1.0,
    clock: Clock | None = None,
) -> Answers:
    """Answers of all trials, without the vector and with it; `by_hand` as `extract` has it."""
    prompts = run.prompts(kind, model.tokenizer)
    with (clock or Clock())("injection"):
        if by_hand:
            added = alpha * vector.vector.to(model.device, model.dtype)
            base, steered = (_of_logits(plain_logits(model, prompts, v, layer), prompts) for v in (None, added))
            return Answers(tuple(prompts), kind, layer, alpha, base, steered)
        edit, replay = injection(model, vector, layer, strength=alpha), by == "replay"
        base, steered = (
            _of_logits(_last_logits(model, prompts, edits, batch=1 if replay else BATCH, whole=replay).cpu(), prompts)
            for edits in ((), (edit,))
        )
        if not replay:  # padded batches round differently from passes of one prompt: what is compared is a sweep's
            logprob, rank = scored(model, prompts, [edit], ("logprob", "rank")).values()
            base = replace(base, logprob=logprob.clean, rank=rank.clean.long())
            steered = replace(steered, logprob=logprob.values[0], rank=rank.values[0].long())
    return Answers(tuple(prompts), kind, layer, alpha, base, steered)


def _of_logits(logits: Tensor, prompts: Sequence[Prompt]) -> TargetScores:
    first = targets(prompts)
    logprob, rank = (score.rows(logits) for score in scores_of(first, ("logprob", "rank")))
    return TargetScores(logits, logprob, rank.long(), first)


def _last_logits(
    model: ic.Model, prompts: Sequence[Prompt], edits: tuple[ic.Edit, ...] = (), *, batch: int = 1, whole: bool = False
) -> Float[Tensor, "prompt vocab"]:
    """Logits at each prompt's last token, in float32 at least.

    Args:
        whole: logits of all positions are computed, as the published code has it: one row and many of the same product
            may differ in the last bit.
    """
    passes = [
        model.run(tokens(part), edits=edits, logits=True if whole else -1).logits.plain
        for part in batches(prompts, batch)
    ]
    joined = torch.cat([logits[:, -1] if whole else logits for logits in passes])
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def _demand_numbers(*values: Tensor) -> None:
    if not all(bool(part.isfinite().all()) for part in values):
        raise ic.CapabilityError(
            "the model gives logits that are not finite numbers here; load it with another dtype (float16 overflows in "
            "models that were trained in bfloat16)"
        )
