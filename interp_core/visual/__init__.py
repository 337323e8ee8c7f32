"""Interventions on visual tokens, as plain edits that compose with any others: see docs/visual_edits.md.

    clean, blind = (model.run(x, read=visual.reads(model)) for x in (tokens, blind_tokens))
    model.run(tokens, edits=visual.replaced(blind, 3))       # layer 3 and all after it see the blind image
    model.generate(tokens, visual.truncated(model, 3))       # from layer 3 on there is no image

V are the visual tokens of a row (`"vision"`), L the layers of the model, and layer L the input of the final norm.
"""

from __future__ import annotations

from .attending import blocked, layers_of, truncated, window
from .pruning import RANKINGS, pruned, ranked, removed, state_transplant, top
from .replacing import POLICIES, replaced
from .states import States, dataset_mean, noise, own_mean, reads, states, zeros

__all__ = [
    "POLICIES", "RANKINGS", "States", "blocked", "dataset_mean", "layers_of", "noise", "own_mean", "pruned", "ranked",
    "reads", "removed", "replaced", "state_transplant", "states", "top", "truncated", "window", "zeros",
]  # fmt: skip
