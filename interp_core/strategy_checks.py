"""What a model remembers of the strategies of sweeps that were tried on it.

Plain data: a session holds it and forgets it when it is opened again; `sweep/choose.py` fills it in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Trial(NamedTuple):
    """What it took to try strategies on a model: calls of layers, token-layers, and how many layers were called."""

    calls: int
    token_layers: int
    layers: int


class Relief(Enum):
    """What a sweep does without on a model on which strategies fail with it and hold without it."""

    APART = "texts go one by one"
    PICTURED_APART = "texts with images go one by one"
    ROW_OF_INPUTS_FOR_EACH = "every variant gets a row of inputs"
    """A model that shapes its output like its input cannot be called with one row for all variants."""


class Check(NamedTuple):
    """What was wrong ("" if nothing), and what finding out took."""

    problem: str
    trials: tuple[Trial, ...] = ()


@dataclass
class StrategyChecks:
    """The strategies that were tried on a model.

    Attributes:
        strategies: by strategy and kind of texts.
        reliefs: what sweeps of this model go without, and what was wrong with it.
        window: whether layers tell their attention of sliding windows; None: nobody asked yet.
    """

    strategies: dict[tuple[str, str], Check] = field(default_factory=dict)
    reliefs: dict[Relief, str] = field(default_factory=dict)
    window: Check | None = None
