"""Shared fixtures: real small models, loaded once per session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start: two threads on two busy cores are slower

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import interp_core as ic
from interp_core import testing

DATA = Path(__file__).parent / "data"
FAMILIES = testing.families()
torch.set_num_threads(1)


@cache
def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, attention: str | None = None, **config: Any
) -> ic.Model:
    """A tiny model of a family, shared by all tests of a session: tests leave it as they found it."""
    hf = testing.tiny(family, dtype=dtype, **config)
    if attention is not None:
        hf.set_attn_implementation(attention)
    return ic.load(hf)


def nth(model: ic.Model, name: str, n: int) -> int:
    """The n-th layer that has a site (the last, if there are fewer)."""
    layers = model.atlas.layers(name)
    return layers[min(n, len(layers) - 1)]


@cache
def toy_model() -> ic.Model:
    return ic.load("toy:text")


@pytest.fixture
def toy() -> ic.Model:
    return toy_model()


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of seven ordinary ids, no padding."""
    return torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])


@pytest.fixture
def padded() -> ic.Tokens:
    """Three rows of five, seven and two tokens, padded on the left."""
    rows = [[5, 17, 33, 8, 61], [9, 54, 12, 70, 3, 28, 45], [7, 30]]
    return ic.Tokens.stack([ic.Tokens(torch.tensor([r]), torch.ones(1, len(r), dtype=torch.bool)) for r in rows])
