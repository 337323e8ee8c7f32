"""The scorers by name."""

from __future__ import annotations

from typing import Any

import interp_core as ic
from interp_core import errors

from .chartqa import ChartQA
from .docvqa import DocVQA
from .pope import POPE
from .scoring import Scorer
from .vqav2 import VQAv2
from .words import Choice, Colour, Contains, Count, YesNo

SCORERS: dict[str, type[Scorer]] = {
    kind.name: kind for kind in (ChartQA, DocVQA, VQAv2, POPE, YesNo, Choice, Count, Colour, Contains)
}
"""Kinds of scorer by name."""


def scorer(name: str, **options: Any) -> Scorer:
    """A scorer by name.

    Args:
        name: one of `SCORERS`.
        options: its own, and `extraction` and `max_words`.

    Raises:
        PlanError: no such scorer, option or value, naming the nearest.
    """
    if name not in SCORERS:
        raise ic.PlanError(f"there is no scorer {name!r}. {errors.nearest(name, SCORERS)}")
    kind = SCORERS[name]
    for option in options:
        if option not in kind.__dataclass_fields__:
            near = errors.nearest(option, kind.__dataclass_fields__)
            raise ic.PlanError(f"scorer {name!r} has no option {option!r}. {near}")
    return kind(**options)
