"""Variants of two texts for sweeps over any family, and how far strategies are from full forward passes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from layouts import OWN_ATTENTION
from tolerances import close

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S

ROWS = ([5, 17, 33, 8, 61, 40, 22, 9], [9, 54, 12, 70, 3])
JUDGED = score.logit_diff(torch.tensor([3, 7]), torch.tensor([9, 11]))
COARSER = {*OWN_ATTENTION, "llama4", "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_vision"}
"""Families in which some layer's attention cannot take keys from the clean pass."""


@cache
def tokens() -> ic.Tokens:
    rows = [torch.tensor([row]) for row in ROWS]
    return ic.Tokens.stack([ic.Tokens(row, torch.ones_like(row, dtype=torch.bool)) for row in rows])


def variants(model: ic.Model) -> list[ic.Edit | list[ic.Edit]]:
    """Heads, streams at several positions, attention inside, several edits at once, values per example."""
    vector = torch.linspace(-2, 2, 64, dtype=model.dtype)
    layer = model.heads[-1][0]
    out: list[ic.Edit | list[ic.Edit]] = [S.z[at, head].at(-1).zero() for at, head in model.heads]
    out += [S.resid_post[at].at(pos).add(vector) for at in range(3) for pos in (0, 2, -1)]
    out += [
        S.pattern[layer].knockout(query=-1, key=1),
        [S.mlp_out[0].scale(0.5), S.z[layer, 1].at(2).scale(3.0)],
        S.resid_pre[1].at(1).set(torch.stack([vector, 2 * vector])),
        S.resid_pre[1].at([1, 3]).project(vector),
    ]
    return out


def everywhere(model: ic.Model) -> list[ic.Edit]:
    """An edit of every site that can be changed, in its last layer."""
    edits: list[ic.Edit] = []
    for name, info in S.SITES.items():
        layers = model.atlas.layers(name)
        if not layers or info.visual or model.can(name, "write"):
            continue
        site = S.named(name)[layers[-1]] if info.layered else S.named(name)
        if info.unit in ("head", "expert") and name not in ("router_logits", "router_weights"):
            site = S.named(name)[layers[-1], min(1, model.atlas.entries[name, layers[-1]].sizes[info.unit] - 1)]
        if "query" in info.axes:
            edits += [site.at(query=-1).scale(0.5), site.at(query=[1, 2], key=0).apply(lambda x: x * 0.3)]
        else:
            edits += [site.at(-1).scale(0.5), site.at([0, 2, 3]).apply(lambda x: x * 0.3), site.scale(2.0)]
        if name == "router_logits":
            edits.append(site.at(-1).mask(experts=[0]))
    return edits


def same(swept: ic.Sweep, wanted: ic.Sweep, model: ic.Model) -> None:
    """Values, sizes of changes and clean scores of two sweeps of the same variants agree."""
    close(swept.values, wanted.values, model)
    close(swept.clean, wanted.clean, model, size=wanted.values.abs().max())
    close(swept.moved, wanted.moved, model)


class Row(NamedTuple):
    """What "auto" took on a family, how far its numbers are from full forward passes, and why it took nothing cheaper."""

    strategy: str
    error: float
    why: str


def against_full(family: str, dtype: torch.dtype) -> Row:
    """Largest difference over the largest value."""
    model = ic.load(testing.tiny(family, dtype=dtype))
    edits = [*variants(model), *everywhere(model)]
    swept, full = (model.sweep(tokens(), edits, JUDGED, strategy=name) for name in ("auto", "full"))
    return Row(
        swept.plan.strategy, float((swept.values - full.values).abs().max() / full.values.abs().max()), swept.plan.why
    )
