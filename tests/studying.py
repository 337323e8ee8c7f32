"""What the tests of studies share: two prompts, ids of two rows, the four methods by name."""

from __future__ import annotations

from typing import Any

import torch

import interp_core as ic
from interp_core import score
from interp_core import sites as S

CLEAN = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"
FRENCH = "Q: big\nA: grand\n\nQ: hot\nA: chaud\n\nQ: wet\nA:"
IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])
OTHER = torch.tensor([[5, 17, 50, 8, 23, 40, 61], [9, 31, 12, 70, 66, 28, 7]])
ANSWERS: dict[str, Any] = {"answer": [3, 7], "other": [9, 11]}
JUDGED = score.logit_diff(torch.tensor([3, 7]), torch.tensor([9, 11]))


def tokens(ids: torch.Tensor) -> ic.Tokens:
    return ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def study(name: str, model: ic.Model, x: Any = None, **settings: Any) -> Any:
    """A method on a text; without one, on two rows of ids against two others."""
    if x is None:
        x, settings = tokens(IDS), {"corrupted": tokens(OTHER), **ANSWERS} | settings
    return ic.method(name)(model, x, **settings)


def judged(model: ic.Model, text: ic.Tokens, edits: Any = (), by: score.Score = JUDGED) -> torch.Tensor:
    """The score of one run with edits."""
    return by(model.run(text, edits=edits, logits=by.at, allow_noop=True))


def patched(
    model: ic.Model, base: ic.Tokens, source: ic.Tokens, site: str, layer: int, head: int | None, place: Any
) -> torch.Tensor:
    """The score of the base run with a part of a site from the source run, by one full forward pass."""
    one = S.named(site)[layer] if head is None else S.named(site)[layer, head]
    value = model.run(source, read=one)[one].at(place).as_subclass(torch.Tensor)
    return judged(model, base, one.at(place).set(value))
