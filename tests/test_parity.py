"""Our reads and edits equal hand-written hooks, family by family and site by site."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, FEW, sampled
from layouts import LAYOUT
from parity import battery, cell
from reference import Reference
from tolerances import in_float32

import interp_core as ic
from interp_core import testing
from interp_core.architectures import gpt2
from interp_core.architectures.family import Family, fused_per_head

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.mark.parametrize("family", sampled())
def test_every_site_equals_hand_written_hooks(family: str) -> None:
    holds(family, torch.float64)


@pytest.mark.parametrize("family", sampled(fast=FEW))
def test_every_site_in_float32(family: str) -> None:
    holds(family, torch.float32)


def holds(family: str, dtype: torch.dtype) -> None:
    found = battery(family, dtype)
    worst = {site: max(cell) for site, cell in found.cells.items()}
    assert not found.refused
    for site, apart in worst.items():
        assert apart <= TOLERANCE[torch.float32 if in_float32(family, site) else dtype], (site, worst)


def test_the_battery_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads split the wrong way round fit every shape; the battery must see them."""
    for row in ic.registry("architectures"):
        if row.name == "gpt2":
            wrong = Family("gpt2", fused=fused_per_head, refuse=gpt2.FAMILY.refuse)
            monkeypatch.setattr(row, "value", wrong)
            monkeypatch.setattr(row, "state", "ok")
    hf = testing.tiny("gpt2", dtype=torch.float64)
    model, reference = ic.load(hf, check=False), Reference("gpt2", hf)
    assert min(cell(model, reference, "v")) > 1e-3
    assert max(cell(model, reference, "z")) < 1e-9


def test_the_reference_covers_every_family() -> None:
    assert sorted(LAYOUT) == sorted(FAMILIES)
