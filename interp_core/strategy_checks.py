"""What a model remembers of the strategies of sweeps that were tried on it."""

from __future__ import annotations

from typing import NamedTuple


class Trial(NamedTuple):
    """What it took to try strategies on a model: calls of layers, token-layers, and how many layers were called."""

    calls: int
    token_layers: int
    layers: int
