"""Routing read from a model, layer by layer, at any positions.

Of the four sites router_logits, router_probs, router_indices and router_weights one layer is held at a time; what is
kept is up to whoever is handed it. Padding and masked positions are no tokens: positions count real tokens, as
everywhere, and the last is the last real one.

Source: this package.
Cost: one forward pass that ends with the last router; memory batch · pos · expert of one layer.
Must equal: `run[S.router_weights[layer]]` and its like at the same positions, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .points import demand_routers
from .routed import Routed, chosen_of
from .usage import Usage

SITES = (S.router_logits, S.router_probs, S.router_indices, S.router_weights)
Consume = Callable[[int, Routed, "Places"], object]
"""Called as `(layer, routed, places)` in the order of the layers; what is not kept is let go."""


class Places:
    """The tokens of a batch at positions, in the order of rows and then positions.

    Attributes:
        rows, columns: row and column of `tokens.ids` of each token.
        n_rows: rows of the batch.
    """

    def __init__(self, tokens: ic.Tokens, at: Any = None) -> None:
        columns = tokens.columns(at)
        if empty := [row for row, chosen in enumerate(columns) if not chosen]:
            raise ic.PositionError(f"row {empty[0]} of the batch has no token at {at!r}; leave it out")
        self.rows = torch.tensor([row for row, chosen in enumerate(columns) for _ in chosen])
        self.columns = torch.tensor([column for chosen in columns for column in chosen])
        self.n_rows = len(tokens)

    def of(self, values: Tensor) -> Tensor:
        """A value `[batch pos …]` at these tokens, `[n …]`."""
        places = self.rows * values.shape[1] + self.columns
        return values.flatten(0, 1).index_select(0, places.to(values.device))  # whole rows at a time, unlike indexing

    def mask(self, tokens: ic.Tokens) -> Bool[Tensor, " token"]:
        """Which tokens of the batch they are, rows after one another: as blocks of experts are handed them."""
        chosen = torch.zeros(tokens.ids.shape, dtype=torch.bool)
        chosen[self.rows, self.columns] = True
        return chosen.flatten()

    def ids(self, tokens: ic.Tokens) -> Int[Tensor, " n"]:
        """Their token ids."""
        return self.of(tokens.ids)

    def next_ids(self, tokens: ic.Tokens) -> Int[Tensor, " n"]:
        """The token that follows each, -1 after a row's last."""
        following = torch.full_like(tokens.ids, -1)
        for row, real in enumerate(tokens.columns(None)):
            following[row, real[:-1]] = tokens.ids[row, real[1:]]
        return self.of(following)


def demand_reading(owner: str, model: ic.Model) -> None:
    """Refuse a model whose routing cannot be read.

    Raises:
        CapabilityError: a dense model, or a family or engine without one of the sites.
    """
    demand_routers(owner, model)
    for site in SITES:
        if why := model.can(site.name, "read"):
            raise ic.CapabilityError(f"{owner} reads {site.name} of {model.source}: {why}")


def read_layers(
    model: ic.Model, tokens: ic.Tokens, consume: Consume, at: Any = None, edits: Iterable[ic.Edit] | ic.Edit = ()
) -> ic.Run:
    """One pass over a batch; each layer's routing is handed over as it comes.

    Args:
        model: with routers.
        tokens: a batch.
        consume: gets it.
        at: positions, as `Site.at` takes them; None: all real tokens.
        edits: for the pass.

    Raises:
        CapabilityError: routing of this model cannot be read.
        PositionError: a row without a token there.
    """
    demand_reading("router", model)
    places = Places(tokens, at)

    def each(layer: int, values: ic.LayerReadings) -> None:
        logits, probs, ids, weights = (places.of(values[site].detach()) for site in SITES)
        consume(layer, Routed(chosen_of(ids, logits.shape[-1]), weights, probs, logits), places)

    return model.run(tokens, read=SITES, edits=edits, each=each, logits=False)


def read(model: ic.Model, tokens: ic.Tokens, at: Any = None, edits: Any = ()) -> dict[int, Routed]:
    """Routing of all layers at positions, rows after one another: layer · n · expert numbers of each kind.

    Raises:
        CapabilityError, PositionError: as `read_layers`.
    """
    layers: dict[int, Routed] = {}
    read_layers(model, tokens, lambda layer, routed, _: layers.update({layer: routed}), at, edits)
    return layers


def usage_of(
    model: ic.Model, batches: Iterable[ic.Tokens], views: Mapping[str, Any] | None = None, *, keep_samples: bool = False
) -> dict[str, Usage]:
    """Usage of several views from one pass over each batch; every row is a sample.

    Args:
        model: with routers.
        batches: of tokens, also from a generator.
        views: positions by name; all real tokens and the last one if nothing is given.
        keep_samples: as of `Usage`.

    Raises:
        CapabilityError, PositionError: as `read_layers`.
    """
    wanted = {"all": None, "last": -1} if views is None else dict(views)
    usages = {name: Usage(keep_samples=keep_samples) for name in wanted}
    for tokens in batches:
        everywhere = Places(tokens)
        width = tokens.ids.shape[1]
        # one pass hands over all real tokens of a layer; each view picks its own of them, by their numbers in that
        # order
        numbers = torch.full(tokens.ids.shape, -1)
        numbers[everywhere.rows, everywhere.columns] = torch.arange(len(everywhere.rows))
        parts = {name: Places(tokens, at) for name, at in wanted.items()}
        picks = {name: numbers.view(-1)[part.rows * width + part.columns] for name, part in parts.items()}

        def consume(
            layer: int,
            routed: Routed,
            _: Places,
            # defaults bind what is of this batch: the function is made anew for each
            parts: Mapping[str, Places] = parts,
            picks: Mapping[str, Tensor] = picks,
            n_rows: int = len(tokens),
        ) -> None:
            for name, usage in usages.items():
                whole = len(picks[name]) == len(routed)
                part = routed if whole else routed.take(picks[name].to(routed.chosen.device))
                usage.add_layer(layer, part, None if n_rows == 1 else parts[name].rows, n_rows)

        read_layers(model, tokens, consume)
    return usages
