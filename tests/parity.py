"""The parity battery: our reads and edits against hand-written hooks, one number per family and site."""

from __future__ import annotations

from typing import NamedTuple

import torch
from reference import Reference
from torch import Tensor

import interp_core as ic
from interp_core import testing
from interp_core.sites import SITES, Site

IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])

HIDDEN = -5e3
"""What is lower is the score of a hidden key; how low that is set is the family's, and the engine's."""


class Cell(NamedTuple):
    """Largest absolute differences, over layers, to the hand-written hooks."""

    read: float
    edit: float


class Battery(NamedTuple):
    """One family on one engine: a cell per site that works, and why the others do not (edits: as `site edits`)."""

    cells: dict[str, Cell]
    refused: dict[str, str]


def battery(family: str, dtype: torch.dtype, engine: str = "torch") -> Battery:
    """Every site of a family, read and edited in every layer."""
    hf = testing.tiny(family, dtype=dtype)
    hf.set_attn_implementation("eager")
    reference = Reference(family, hf)
    try:
        model = ic.load(hf, engine=engine)
    except ic.CapabilityError as error:
        return Battery({}, {"every site": str(error)})
    cells, refused = {}, {}
    for site in reference.sites():
        if why := model.can(site, "read"):
            refused[site] = why
            continue
        if why := model.can(site, "write"):
            refused[f"{site} edits"] = why
        cells[site] = cell(model, reference, site, edit=not why)
    return Battery(cells, refused)


def cell(model: ic.Model, reference: Reference, name: str, *, edit: bool = True) -> Cell:
    """One site in all its layers."""
    inputs = {"input_ids": IDS}
    read = edited = 0.0
    assert model.atlas.layers(name) == reference.layers(name)
    for layer in reference.layers(name):
        site = Site(name, layer if SITES[name].layered else None)
        wanted = reference.value(name, layer, inputs)
        got = model.run(IDS, read=site)[site]
        assert got.shape == wanted.shape, (name, got.shape, wanted.shape)
        read = max(read, _distance(got, wanted))
        if edit:
            edited = max(edited, _edited(model, reference, site, layer, wanted))
    return Cell(read, edited)


def _edited(model: ic.Model, reference: Reference, site: Site, layer: int, value: Tensor) -> float:
    """Logits after one entry of the site was changed, at one position."""
    inputs = {"input_ids": IDS}
    attention = "query" in SITES[site.name].axes
    if site.name == "router_weights":
        edit = site.at(-2).scale(0.5)
        wanted = reference.logits(site.name, layer, inputs, lambda x: _scaled(x))
    elif attention:
        # most queries, so that all of the attention is opened as by hand: tests/test_attention_few.py has few
        noise = _noise(value[0, :, 1:, -2].numel(), value.dtype).view_as(value[0, :, 1:, -2])
        scores = value[value > torch.finfo(value.dtype).min / 2]
        noise *= 0.1 * (scores.std().clamp(min=1) if site.name == "scores" else 1)
        edit = site.at(query=slice(1, None), key=-2).add(noise)
        where = (slice(None), slice(None), slice(1, None), -2)
        wanted = reference.logits(site.name, layer, inputs, lambda x: _added(x, where, noise))
    else:
        noise = 2 * _noise(value.shape[-1], model.dtype)  # some give float32 logits whatever their dtype
        edit = site.at(-2).add(noise)
        wanted = reference.logits(site.name, layer, inputs, lambda x: _added(x, (slice(None), -2), noise))
    got = model.run(IDS, edits=edit).logits
    plain = model.run(IDS).logits
    assert _distance(got, plain) > 1e-4, f"{site}: the edit changed nothing"
    return _distance(got, wanted)


def _noise(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(dtype)


def _added(x: Tensor, index: tuple[object, ...], noise: Tensor) -> Tensor:
    x = x.clone()
    x[index] += noise
    return x


def _scaled(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, -2] *= 0.5
    return x


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.clamp(min=HIDDEN), b.clamp(min=HIDDEN)
    return apart(a - b)


def apart(difference: Tensor) -> float:
    """The largest absolute difference; infinite where one is no number, which no maximum would show."""
    return float("inf") if difference.isnan().any() else float(difference.abs().max())
