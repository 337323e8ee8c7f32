"""A sample as a causal study sees it: which rows are visual, which come after, where the answer is predicted from.

    V      visual positions: a set, of every image and tile of this sample, never one range for all samples
    after  text positions behind the first visual token: all that can see the image
    p0     the position that predicts the answer's first token; its tokens a_1 … a_m stand at p0 + 1 … p0 + m and are
           read at p0 … p0 + m - 1. Positions come from the tokens' spans, not from a search in the text.

Source: specification of this project. Cost: none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic
from interp_core import score as scores

SCORES = ("mean", "first", "kl", "p", "right", "token", "foil")
"""What every run is read for; `foil` where there is one."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One row with an image and a teacher-forced answer.

    Attributes:
        tokens: the row, by itself.
        visual: V.
        after: text positions behind the first visual token.
        answer: positions of the answer's tokens.
        ids: these tokens.
        foil: a wrong first token to compare with; None: none.
    """

    tokens: ic.Tokens
    visual: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]
    ids: Int[Tensor, " m"]
    foil: int | None = None

    @property
    def reads(self) -> list[int]:
        """Positions whose logits say the answer: p0 … p0 + m - 1."""
        return [place - 1 for place in self.answer]

    @property
    def last(self) -> list[int]:
        """p0 and all that follow."""
        return list(range(self.answer[0] - 1, self.tokens.lengths[0]))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the scores."""
        return SCORES if self.foil is not None else SCORES[:-1]


def sample_of(tokens: ic.Tokens, answer: str = "target", foil: int | None = None, row: int = 0) -> Sample:
    """A row of one image or several, with its answer.

    Args:
        tokens: a single row.
        answer: name of the span of the answer's tokens.
        foil: id of a wrong first token.
        row: its number, for messages.

    Raises:
        PlanError: no image, no answer, or an answer that is empty, in pieces, or not behind the image.
    """
    names = tokens.rows.names
    visual = names.get("vision", [[]])[0]
    if not visual:
        raise ic.PlanError(
            f"row {row} has no visual tokens; give texts with images: model.tokens(text, target, images=…)"
        )
    if answer not in names:
        known = ic.errors.nearest(answer, names)
        raise ic.PlanError(f"row {row} has no span {answer!r} of the answer: model.tokens(text, target). {known}")
    places = names[answer][0]
    whole = bool(places) and places == list(range(places[0], places[-1] + 1))
    # p0 itself must not be a visual token: interventions there would change what is read
    if not whole or places[0] - 1 <= visual[-1]:
        raise ic.PlanError(
            f"row {row}: the answer {answer!r} is at {places or 'no position'}, the image ends at {visual[-1]}; an "
            "answer is one piece of text behind the image, with a token between that predicts its first one"
        )
    length, seen = tokens.lengths[0], set(visual)
    after = tuple(i for i in range(visual[0] + 1, length) if i not in seen)
    real = tokens.rows.real[0]
    ids = tokens.ids[0, [real[i] for i in places]]
    return Sample(tokens, tuple(visual), after, tuple(places), ids, foil)


def rows_of(tokens: ic.Tokens) -> list[ic.Tokens]:
    """Rows by themselves."""
    return [tokens] if len(tokens) == 1 else [tokens.row(i) for i in range(len(tokens))]


def demand_twin(sample: Sample, other: ic.Tokens, what: str) -> None:
    """Refuse another image that does not put its visual tokens where the sample has its own.

    Raises:
        PlanError: other text, or visual tokens elsewhere or more or fewer of them.
    """
    own = sample.tokens
    theirs = other.rows.names.get("vision", [[]])[0]
    if len(other) == 1 and len(theirs) != len(sample.visual):
        raise ic.PlanError(
            f"{what} has {len(theirs)} visual tokens, the sample {len(sample.visual)}: its image is processed to "
            "another grid. Resize it to the sample's image, or draw donors of the same grid"
        )
    if len(other) != 1 or not torch.equal(other.ids[other.mask], own.ids[own.mask]) or tuple(theirs) != sample.visual:
        raise ic.PlanError(f"{what} differs from the sample in more than its image; give the same text and answer")


class AnswerScores:
    """Scores of a teacher-forced answer, for runs and sweeps, all of one look at the logits.

    mean   1/m Σ_j log p(a_j);  first  log p(a_1);  p  p(a_1);  kl  KL(clean ‖ this) at p0
    right  1 if every a_j is the likeliest;  token  the likeliest at p0;  foil  logit of a_1 minus the foil's
    """

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.reference: Float[Tensor, " d_vocab"] | None = None
        """Log-probabilities of the clean run at p0, once it ran."""
        self._seen: Tensor | None = None
        self._values: dict[str, Tensor] = {}

    def listed(self) -> list[scores.Score]:
        """For a sweep."""
        self._seen = None
        places, ids = [self.sample.reads], (self.sample.ids,)
        return [scores.Score(name, self._one(name), places, (ids,), span=True) for name in self.sample.names]

    def of(self, logits: Float[Tensor, "row m d_vocab"]) -> dict[str, Float[Tensor, " row"]]:
        """All scores of logits at the reads."""
        # a sweep hands the same logits to one score after the other: softmax and all go over them once
        if logits is not self._seen:
            self._seen, self._values = logits, self._worked_out(logits)
        return self._values

    def _one(self, name: str) -> Any:
        return lambda logits, _ids: self.of(logits)[name]

    def _worked_out(self, logits: Float[Tensor, "row m d_vocab"]) -> dict[str, Tensor]:
        ids = self.sample.ids.to(logits.device)
        logp = torch.log_softmax(logits, -1)
        each = logp.gather(-1, ids.expand(logits.shape[:-1])[..., None])[..., 0]
        best = logits.argmax(-1)
        wanted = logp[0, 0] if self.reference is None else self.reference.to(logp.device, logp.dtype)
        by_name = {
            "mean": each.mean(-1), "first": each[:, 0], "p": each[:, 0].exp(), "right": (best == ids).all(-1).to(logp),
            "token": best[:, 0].to(logp), "kl": (wanted.exp() * (wanted - logp[:, 0])).sum(-1),
        }  # fmt: skip
        if self.sample.foil is not None:
            by_name["foil"] = logits[:, 0, ids[0]] - logits[:, 0, self.sample.foil]
        return by_name


def per_row(value: Any, rows: int, what: str) -> Sequence[Any]:
    """A setting that may have one item per row: tokens of a batch, a list, or one thing for all.

    Raises:
        PlanError: another number than rows.
    """
    if isinstance(value, ic.Tokens):
        value = rows_of(value)
    items = list(value) if isinstance(value, (list, tuple)) else [value] * rows
    if len(items) != rows:
        raise ic.PlanError(f"visual: {what} has {len(items)} items for {rows} rows; give one per row")
    return items


def modes_of(item: Any, what: str) -> Mapping[str, ic.Tokens]:
    """Other images of one row, by mode; nothing for None.

    Raises:
        PlanError: something that is no tokens.
    """
    modes = {} if item is None else {"image": item} if isinstance(item, ic.Tokens) else item
    if not isinstance(modes, Mapping) or not all(isinstance(x, ic.Tokens) for x in modes.values()):
        raise ic.PlanError(ic.errors.wrong(what, "tokens of the same text with another image, or some by mode", item))
    return modes
