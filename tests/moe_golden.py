"""The golden mixture of experts of tests/data/moe: its model, pairs, and float64 numbers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interp_plugins.router.routed import Routed

import interp_core as ic
from interp_core import sites as S

DATA = Path(__file__).parent / "data" / "moe"


@cache
def expected() -> dict[str, Any]:
    """Every array of the reference, by name."""
    with np.load(DATA / "expected_packed.npz") as arrays:
        return {name: arrays[name] for name in arrays}


@cache
def model() -> ic.Model:
    """The tiny Qwen3-MoE."""
    return ic.load(str(DATA / "model"), check=False)


def pairs() -> list[dict[str, Any]]:
    """Each pair's ids and aligned positions, in packed and padded layout."""
    found: list[dict[str, Any]] = json.loads((DATA / "pairs.json").read_text())["pairs"]
    return found


@cache
def routing() -> list[tuple[dict[int, Routed], dict[int, Routed]]]:
    """Both variants' routing at the aligned positions of every pair."""
    return [
        (_read(pair["a_ids"], pair["canonical_nonws_a"]), _read(pair["b_ids"], pair["canonical_nonws_b"]))
        for pair in pairs()
    ]


def _read(ids: list[int], positions: list[int]) -> dict[int, Routed]:
    run = model().run(torch.tensor([ids]), read=[S.router_logits, S.router_weights], logits=False)
    layers = {}
    for layer in model().layers(S.router_logits):
        logits, weights = (run[site[layer]].plain[0, positions] for site in (S.router_logits, S.router_weights))
        layers[layer] = Routed(weights > 0, weights, logits.softmax(-1), logits)
    return layers
