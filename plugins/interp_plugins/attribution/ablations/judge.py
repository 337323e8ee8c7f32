"""By what the alternatives judge an answer: its logits or log-probabilities, at the positions that predict it.

logit      sum over the answer's tokens of logit(token)
logprob    sum over the answer's tokens of log p(token | what precedes it)
against    logit(token) - logit(other), which is also the difference of their log-probabilities
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from ..layout import Layout

TargetScale = Literal["logit", "logprob"]
StandIn = Literal["eos", "pad"] | int
"""A token that takes another's place."""


@dataclass(frozen=True)
class Judge:
    """What is explained, as a number per row of logits.

    Attributes:
        positions: that predict the answer.
        ids: of the answer's tokens.
        scale: logits or log-probabilities.
        against: id of the token whose logit is taken away, if any.
        mean: the mean over the answer's tokens, not their sum.
    """

    positions: tuple[int, ...]
    ids: tuple[int, ...]
    scale: TargetScale = "logit"
    against: int | None = None
    mean: bool = False

    @property
    def name(self) -> str:
        """For records."""
        kind = f"{self.scale}s" if self.against is None else "differences of logits"
        return f"{'mean' if self.mean else 'sum'} of the answer's {kind}"

    def each(self, logits: Float[Tensor, "row predictor d_vocab"]) -> Float[Tensor, "row predictor"]:
        """A number per token of the answer."""
        ids = torch.tensor(self.ids, device=logits.device).expand(logits.shape[:-1])
        if self.against is not None:
            return logits.gather(-1, ids[..., None])[..., 0] - logits[..., self.against]
        values = logits if self.scale == "logit" else torch.log_softmax(wide(logits), -1)
        return values.gather(-1, ids[..., None])[..., 0]

    def rows(self, logits: Float[Tensor, "row predictor d_vocab"]) -> Float[Tensor, " row"]:
        """A number per row."""
        each = self.each(logits)
        return each.mean(-1) if self.mean else each.sum(-1)

    def score(self) -> ic.score.Score:
        """The same for a sweep of one text."""
        ids = torch.tensor(self.ids)
        return ic.score.Score(
            self.name, lambda logits, _: self.rows(logits), [list(self.positions)], ((ids,),), span=True
        )


def judge_of(
    layout: Layout, logits: Float[Tensor, "1 predictor d_vocab"], scale: TargetScale, *, mean: bool = False
) -> Judge:
    """The judge of a row's answer; without a target, of the token that the model gives the largest logit.

    Args:
        logits: of the row as it is, at its predictors.
    """
    ids = layout.answer or tuple(logits[0].argmax(-1).tolist())
    return Judge(layout.predictors, ids, scale, layout.against, mean)


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def stand_in(owner: str, model: ic.Model, token: StandIn) -> int:
    """The id of a token that takes another's place.

    Raises:
        PlanError: the model has none of that name, or not so many tokens.
    """
    if isinstance(token, int):
        if not 0 <= token < model.d_vocab:
            raise ic.PlanError(f"{owner}: no token id {token}; the model has {model.d_vocab}, 0 to {model.d_vocab - 1}")
        return token
    places = (model.tokenizer, getattr(model.hf, "generation_config", None), model.hf.config.get_text_config())
    for place in places:
        number = getattr(place, f"{token}_token_id", None)
        # a generation config may name several end tokens
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < model.d_vocab:
            return number
    raise ic.PlanError(f"{owner}: neither tokenizer nor config of {model.source} knows its {token} token; give its id")


def embedded(model: ic.Model, token: int) -> Float[Tensor, " d_model"]:
    """What the token embedding gives for a token, whatever the family multiplies it by."""
    ids = torch.tensor([[token]])
    alone = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    return model.run(alone, read=S.embed, logits=False)[S.embed].plain[0, 0]
