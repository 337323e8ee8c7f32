"""Arguments of a sweep of the wrong kind, and how they are written right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import score as scores
from ..errors import PlanError, several, wrong
from ..score import Score
from ..sites import Edit, Site

VARIANTS = "a list of variants, each an edit or a list of edits"
SCORE = "a score such as ic.score.logprob(target), or several"


def variants_of(variants: Any) -> tuple[Any, ...]:
    """The variants of a sweep, as they were given.

    Raises:
        PlanError: something else, naming how it is written.
    """
    hint = ""
    if isinstance(variants, Edit):
        hint = ": one variant is a list too, [edit]"
    elif isinstance(variants, Site):
        hint = f": say what to do there, [{variants}.zero()]"
    elif isinstance(variants, Score):
        hint = ": it comes after them, model.sweep(text, variants, score)"
    elif isinstance(variants, str):
        hint = ": the text comes first, model.sweep(text, variants, score)"
    if hint or not isinstance(variants, Iterable):
        raise PlanError(wrong("variants", VARIANTS, variants) + hint)
    listed = several("variants", VARIANTS, variants, PlanError)
    for variant in listed:
        if isinstance(variant, Tensor) or not isinstance(variant, (Edit, Site, Iterable)):
            raise PlanError(wrong("a variant", "an edit or a list of edits", variant))
    return listed


def scores_of(score: Any) -> tuple[Score, ...]:
    """The scores of a sweep.

    Raises:
        PlanError: something else, naming how it is written.
    """
    if isinstance(score, Score):
        return (score,)
    if isinstance(score, (str, Tensor)) or not isinstance(score, Iterable):
        raise _no_score(score)
    listed = several("score=", SCORE, score, PlanError)
    for each in listed:
        if not isinstance(each, Score):
            raise _no_score(each)
    return listed


def _no_score(score: Any) -> PlanError:
    hint = ""
    if isinstance(score, str):
        hint = f": write ic.score.{score if score in scores.__all__ else 'logprob'}(' Paris')"
    elif callable(score):
        hint = ": a function of logits [batch d_vocab] is wrapped, ic.score.Score('mine', fn)"
    return PlanError(wrong("score=", SCORE, score) + hint)
