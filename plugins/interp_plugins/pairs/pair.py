"""One sample: two contexts, and where in each the tokens of the text stand that they share.

Two layouts of the second context, which give different numbers:

    packed    its own sequence of tokens, at its own positions
    padded    its tokens at the columns that the shared ones have in the first context, the columns between masked, and
              every token at the absolute position of its column, as transformers' forward has it where nobody gives
              positions. (With positions that count real tokens, the numbers would be those of the packed layout.)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

import interp_core as ic

Side = Literal["agentic", "assisted"]
SIDES: tuple[Side, Side] = ("agentic", "assisted")
Layout = Literal["packed", "padded"]


@dataclass(frozen=True)
class Pair:
    """Two contexts that share a target text.

    Attributes:
        name: of the sample.
        agentic, assisted: the contexts, one row each; the second packed or padded (see the module).
        agentic_positions, assisted_positions: of the shared tokens in each, in order, from 1 on. They count the row's
            real tokens, as `Site.at` takes them: `S.router_logits.at(pair.assisted_positions)` in both layouts, and
            p - 1 is the token before. `pair.assisted.columns(pair.assisted_positions)` are columns of its `ids`.
        dropped: how many targets were left out, by reason.
        more: what the sample's row of a file has beside this.

    Raises:
        PlanError: no targets, or not as many here as there; positions outside a context, out of order or at a first
            token, which nothing predicts; target tokens whose ids differ. It names sample and field.
    """

    name: str
    agentic: ic.Tokens
    assisted: ic.Tokens
    agentic_positions: tuple[int, ...]
    assisted_positions: tuple[int, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for side in SIDES:
            self._check_positions(side)
        here, there = len(self.agentic_positions), len(self.assisted_positions)
        if here != there:
            raise ic.PlanError(
                f"sample {self.name!r}: {here} agentic_positions and {there} assisted_positions; a target has one of "
                "each"
            )
        agentic, assisted = (self.target_ids(side).tolist() for side in SIDES)
        if wrong := [n for n, (a, b) in enumerate(zip(agentic, assisted, strict=True)) if a != b]:
            n = wrong[0]
            raise ic.PlanError(
                f"sample {self.name!r}: {len(wrong)} of {here} targets have other ids in the two contexts, the first "
                f"at position {self.agentic_positions[n]} (agentic: {agentic[n]}) and {self.assisted_positions[n]} "
                f"(assisted: {assisted[n]}); a target is the same token in both. Build the pair again with one "
                "tokenizer, or leave these positions out"
            )

    def _check_positions(self, side: Side) -> None:
        tokens, positions = self.tokens(side), self.positions(side)
        if len(tokens) != 1:
            raise ic.PlanError(f"sample {self.name!r}: {side} has {len(tokens)} rows; a context is one row")
        if not positions:
            raise ic.PlanError(f"sample {self.name!r}: {side}_positions is empty; a pair has one target at least")
        length = tokens.lengths[0]
        if outside := [p for p in positions if not 1 <= p < length]:
            raise ic.PlanError(
                f"sample {self.name!r}: {side}_positions has {outside[0]}; of {length} tokens, targets are 1 to "
                f"{length - 1} (nothing predicts the first)"
            )
        if any(a >= b for a, b in itertools.pairwise(positions)):
            raise ic.PlanError(
                f"sample {self.name!r}: {side}_positions do not increase; give each target once, in order"
            )

    def __len__(self) -> int:
        """Number of targets."""
        return len(self.agentic_positions)

    @property
    def layout(self) -> Layout:
        """How the assisted context lies."""
        return "padded" if self.assisted.padded else "packed"

    def tokens(self, side: Side) -> ic.Tokens:
        """A context by its name."""
        return self.agentic if side == "agentic" else self.assisted

    def positions(self, side: Side) -> tuple[int, ...]:
        """Where the targets stand in a context."""
        return self.agentic_positions if side == "agentic" else self.assisted_positions

    def target_ids(self, side: Side = "agentic") -> Int[Tensor, " target"]:
        """Ids of the targets, the same in both contexts."""
        tokens = self.tokens(side)
        return tokens.ids[0, tokens.columns(list(self.positions(side)))[0]]

    def record(self) -> list[Any]:
        """All that a number of the pair depends on, as plain data."""
        contexts = [[tokens.ids.tolist(), tokens.mask.tolist()] for tokens in (self.agentic, self.assisted)]
        return [self.name, contexts, list(self.agentic_positions), list(self.assisted_positions)]

    def packed(self) -> Pair:
        """The same targets with the assisted context's tokens moved together."""
        real = self.assisted.ids[0][self.assisted.mask[0]].tolist()
        return self if self.layout == "packed" else replace(self, assisted=tokens_of(real))


def tokens_of(ids: Sequence[int], mask: Sequence[int] | None = None) -> ic.Tokens:
    """One row of ids. With a mask that has a hole or begins late, every token keeps the position of its column."""
    row = torch.tensor([list(ids)], dtype=torch.long)
    seen = torch.ones_like(row, dtype=torch.bool) if mask is None else torch.tensor([list(mask)]).bool()
    whole = bool(seen[0, : int(seen.sum())].all())  # real tokens first: positions are columns by themselves
    return ic.Tokens(row, seen, inputs={} if whole else {"position_ids": torch.arange(row.shape[1])[None]})
