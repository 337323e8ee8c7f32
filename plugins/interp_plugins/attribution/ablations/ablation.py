"""Ablations of a prompt: what is taken away, how, where the others then stand, and what it costs before it runs.

    convention               what happens to what is taken away                      position ids of the others
    delete_text              its characters go, the rest is tokenised again           0, 1, 2, ... of what is left
    delete_tokens            its ids go                                               0, 1, 2, ... of what is left
    delete_keep_positions    its ids go                                               their own
    mask                     its keys are hidden from all other tokens, all layers    their own
    replace                  its embeddings become those of another token             their own
    blur                     its block of the image is blurred                        their own

With `delete_text` the white space before a unit goes with it, and that before the first which is kept. Where the token
that predicts the answer is taken away, the last one that is kept before it predicts (except by `replace`). What is left
must hold a token before the answer. `mask` equals `delete_keep_positions`, which is held against it on the text.

Source: Cohen-Wang et al. (2024), arXiv:2409.00729, for `delete_text`; Pan et al. (2026), arXiv:2602.01914, for
`replace` and `blur`.
Cost: `mask` and `replace` are sweeps, layers × (tokens from the first one taken away on) per variant, as their plan
says; deletions are texts of their own, layers × tokens left; `blur` is a forward pass per variant.
Must equal: one forward pass per variant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from ..gate import RESIDUE
from ..layout import Layout
from .blurring import blurred
from .deletion import Shortened, predictors, shortened
from .judge import Judge, StandIn, embedded, stand_in
from .units import Unit

Convention = Literal["delete_text", "delete_tokens", "delete_keep_positions", "mask", "replace", "blur"]
POSITIONS = {
    "delete_text": "counted anew", "delete_tokens": "counted anew", "delete_keep_positions": "those of the whole text",
    "mask": "those of the whole text", "replace": "those of the whole text", "blur": "those of the whole text",
}  # fmt: skip
"""Position ids of what is left, by convention."""
ROUNDING = 256 * torch.finfo(torch.float32).eps
"""How far two computations of a number of order one by other shapes lie apart: most families' norms are float32."""


@dataclass(frozen=True)
class Price:
    """What ablations of a text cost.

    Attributes:
        token_layers: that are executed.
        naive: of one full forward pass per variant.
        how: a line per part of the work.
    """

    token_layers: int
    naive: int
    how: tuple[str, ...]

    def explain(self) -> str:
        """For people."""
        fewer = f" ({self.naive / self.token_layers:.1f}× fewer)" if self.token_layers < self.naive else ""
        total = f"token-layers {self.token_layers:,} against {self.naive:,} of one full pass per variant{fewer}"
        return "\n".join((total, *self.how))

    def __str__(self) -> str:
        return self.explain()


class Part(NamedTuple):
    """Variants that are judged at the same positions, as edits of one sweep; no edits, where nothing that is judged
    sees what is taken away."""

    judge: Judge
    numbers: list[int]
    edits: list[ic.Edit]


class Ablation:
    """Variants of a row, each without some of its units.

    Args:
        owner: whose work it is, for messages.
        removals: per variant, the numbers of the units that are taken away.
        token: what takes their place, for "replace".
        batch_tokens: tokens that go together in a pass, for deletions.

    Raises:
        PositionError: a variant leaves no token before the answer.
        CapabilityError, PlanError, TextError: the convention cannot be carried out here.
    """

    def __init__(
        self, owner: str, model: ic.Model, layout: Layout, units: Sequence[Unit], removals: Sequence[Sequence[int]],
        convention: Convention, token: StandIn = "eos", batch_tokens: int = 4096,
    ) -> None:  # fmt: skip
        self.owner, self.model, self.layout, self.units, self.removals = owner, model, layout, units, removals
        self.convention, self.batch_tokens = convention, batch_tokens
        self.gone = [sorted({p for n in removed for p in units[n].positions}) for removed in removals]
        self.token = stand_in(owner, model, token) if convention == "replace" else None
        demand_possible(owner, model, layout, units, convention)
        self.rows: list[Shortened] = []
        if convention.startswith("delete"):
            self.rows = shortened(owner, model, layout, units, removals, self.gone, convention)

    def price(self, judge: Judge) -> Price:
        """What it will cost; no variant runs."""
        layers, width = self.model.n_layers, max(judge.positions) + 1
        naive = layers * width * len(self.removals)
        if self.rows:
            checks = layers * 2 * width if self._must_be_checked() else 0
            own = layers * sum(row.width for row in self.rows)
            how = f"{len(self.rows)} shorter texts in {len(list(self._batches()))} passes, one of the whole text"
            more = ", two to hold one of them against mask" if checks else ""
            return Price(own + layers * width + checks, naive, (how + more,))
        if self.convention == "blur":
            return Price(naive + layers * width, naive, (f"{len(self.removals)} passes with another image",))
        parts = list(self._parts(judge, self.gone))
        plans = [
            ic.Sweep.planned(self.model, self.layout.tokens, part.edits, part.judge.score())
            for part in parts
            if part.edits
        ]
        whole = sum(not part.edits for part in parts) + all(not _is_clean(part, judge) for part in parts)
        said = [plan.explain() for plan in plans] + [f"{whole} passes of the whole text"] * bool(whole)
        return Price(sum(plan.token_layers for plan in plans) + whole * layers * width, naive, tuple(said))

    def run(self, judge: Judge) -> tuple[Tensor, Tensor]:
        """What the judge says of the text as it is (one number), and of each variant `[variant]`."""
        if not self.rows and self.convention != "blur":
            return self._sweeps(judge)
        clean = self._judged(judge)
        values = torch.zeros(len(self.removals), dtype=clean.dtype)
        with ic.Progress("ablations", len(self.removals)) as progress:
            for numbers in self._batches() if self.rows else ([number] for number in range(len(self.removals))):
                values[numbers] = self._of_variants(judge, numbers).to(values)
                progress.add(len(numbers))
        if self.rows and self._must_be_checked():
            self._demand_equal_to_mask(judge, values)
        return clean, values

    def _of_variants(self, judge: Judge, numbers: Sequence[int]) -> Float[Tensor, " variant"]:
        """One pass: shorter texts of one length, or one with another image."""
        if self.rows:
            return self._of_rows(judge, [self.rows[n] for n in numbers])
        (number,) = numbers
        cells = [cell for n in self.removals[number] if (cell := self.units[n].cell) is not None]
        return self._judged(judge, blurred(self.owner, self.model, self.layout.tokens, cells))[None]

    def _sweeps(self, judge: Judge) -> tuple[Tensor, Tensor]:
        """As `run`, by sweeps, whose own clean pass says what the text as it is gives."""
        clean: Tensor | None = None
        values = torch.zeros(len(self.removals), dtype=torch.promote_types(self.model.dtype, torch.float32))
        for part in self._parts(judge, self.gone):
            scores, base = self._of_part(part)
            values[part.numbers] = scores.to(values)
            clean = base if _is_clean(part, judge) else clean
        return self._judged(judge) if clean is None else clean, values

    def _judged(self, judge: Judge, tokens: ic.Tokens | None = None) -> Tensor:
        """One pass over the text, or over one with other images."""
        run = self.model.run(tokens or self.layout.tokens, logits=list(judge.positions))
        return judge.rows(run.logits.plain)[0].cpu()

    def _of_rows(self, judge: Judge, rows: Sequence[Shortened]) -> Float[Tensor, " row"]:
        """Shorter texts of one length."""
        ids = torch.tensor([row.ids for row in rows])
        mask = torch.ones_like(ids, dtype=torch.bool)
        inputs: dict[str, Any] = {}
        if self.convention == "delete_keep_positions":  # the mask says that gaps do not part two texts
            inputs = {"position_ids": torch.tensor([row.position_ids for row in rows]), "attention_mask": mask.long()}
        tokens = ic.Tokens(ids, mask, inputs=inputs)
        return judge.rows(self.model.run(tokens, logits=[list(row.predictors) for row in rows]).logits.plain).cpu()

    def _batches(self) -> Iterator[list[int]]:
        """Numbers of texts of one length, as many as go into a pass; so nothing is padded."""
        widths: dict[int, list[int]] = {}
        for number, row in enumerate(self.rows):
            widths.setdefault(row.width, []).append(number)
        for width, numbers in widths.items():
            count = max(1, self.batch_tokens // width)
            yield from (numbers[i : i + count] for i in range(0, len(numbers), count))

    def _parts(self, judge: Judge, gone: Sequence[Sequence[int]]) -> Iterator[Part]:
        """Variants by the positions at which they are judged."""
        parts: dict[tuple[tuple[int, ...], bool], Part] = {}
        embedding = None if self.token is None else embedded(self.model, self.token)
        for number, places in enumerate(gone):
            positions, edit = judge.positions, None
            if embedding is not None and places:
                edit = S.embed.at(list(places)).set(embedding)
            elif embedding is None:
                positions = predictors(self.owner, judge.positions, places)
                edit = _hidden(places, max(positions) + 1)
            # one sweep has one place to be judged at; variants whose predictor is gone are judged before it, in another
            moved = replace(judge, positions=positions)
            part = parts.setdefault((positions, edit is None), Part(moved, [], []))
            part.numbers.append(number)
            part.edits.extend([] if edit is None else [edit])
        yield from parts.values()

    def _of_part(self, part: Part) -> tuple[Float[Tensor, " variant"], Tensor]:
        """Variants, and the text as it is, at the part's positions."""
        if not part.edits:
            clean = self._judged(part.judge)
            return clean.expand(len(part.numbers)), clean
        sweep = self.model.sweep(self.layout.tokens, part.edits, part.judge.score())
        return sweep.values[:, 0], sweep.clean[0]

    def _must_be_checked(self) -> bool:
        """Whether keeping position ids can be held against hiding keys."""
        open_everywhere = len(self.model.layers(S.pattern)) == self.model.n_layers
        return self.convention == "delete_keep_positions" and open_everywhere and any(self.gone)

    def _demand_equal_to_mask(self, judge: Judge, values: Tensor) -> None:
        """Refuse a model that does not read the position ids that it is given, or counts what is left for windows.

        Raises:
            CapabilityError: naming how far the two are apart.
        """
        number = next(n for n, places in enumerate(self.gone) if places)
        (part,) = self._parts(judge, [self.gone[number]])
        masked = float(self._of_part(part)[0][0])
        # two ways to the same number by other shapes: rounding of the norms, or of the model's own half precision
        limit = max(ROUNDING, RESIDUE.get(self.model.dtype, 0.0) if self.model.dtype.itemsize < 4 else 0.0)
        limit *= max(1.0, abs(masked))
        if not abs(masked - float(values[number])) <= limit:
            unit = self.units[self.removals[number][0]].name
            raise ic.CapabilityError(
                f"{self.owner}: in {self.model.source} tokens do not keep their positions when others are deleted: "
                f"without {unit!r:.40} the {judge.name} is {float(values[number]):.4g}, and {masked:.4g} with its keys "
                "hidden. It takes positions from elsewhere, or its windows count what is left; use 'mask' or "
                "'delete_tokens'"
            )


def _is_clean(part: Part, judge: Judge) -> bool:
    """Whether a part's clean pass is judged where the text is."""
    return part.judge.positions == judge.positions


def demand_possible(owner: str, model: ic.Model, layout: Layout, units: Sequence[Unit], convention: Convention) -> None:
    """Refuse a convention that this model or text cannot have.

    Raises:
        CapabilityError, PlanError: naming what stands in the way, and what can be had.
    """
    inputs = ", ".join(layout.tokens.inputs)
    if convention == "blur":
        if any(unit.cell is None for unit in units):
            raise ic.PlanError(f"{owner}: blur is for blocks of an image: units='visual'")
        blurred(owner, model, layout.tokens, [])
    elif any(unit.cell is not None for unit in units) and convention != "mask":
        raise ic.PlanError(f"{owner}: blocks of an image are blurred or masked, not {convention}d")
    if convention.startswith("delete") and inputs:
        raise ic.CapabilityError(f"{owner}: {convention} does not fit {inputs}, which come with the tokens; use 'mask'")
    lacking = sorted({*range(model.n_layers)} - {*model.layers(S.pattern)})
    if convention == "mask" and (lacking or model.can("pattern", "write")):
        why = model.can("pattern", "write") or f"layers {lacking} have no pattern: they are recurrent or linear"
        raise ic.CapabilityError(f"{owner}: mask cannot hide keys in {model.source}: {why}; use a delete_ convention")
    if convention == "replace" and (why := model.can("embed", "write")):
        raise ic.CapabilityError(f"{owner}: replace edits the token embeddings: {why}")


def _hidden(places: Sequence[int], width: int) -> ic.Edit | None:
    """Keys hidden from all other tokens up to a width; None if no such token sees them."""
    away = set(places)
    queries = [q for q in range(min(places, default=width) + 1, width) if q not in away]
    if not queries:
        return None
    return S.pattern.knockout(query=queries, key=[p for p in places if p < queries[-1]])
