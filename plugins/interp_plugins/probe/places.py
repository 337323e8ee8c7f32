"""Which token a probe reads: the positions of vision-language studies by their names, or any position of a run.

    answer_token             p0, the position that predicts the first answer token: the last token of the prompt
    text_instruction_token   the last text token of the user's turn
    visual_token             the visual rows: their mean, their largest numbers, or the one in the middle
    answer_label             the last token of the answer itself, which tells the label: only if leaks are allowed

Positions come from the prompt's own tokens, never from a search for the answer's. A prompt that holds its answer is
refused, unless leaks are allowed.

Source: ours; `answer_label` is what some studies called the answer token, and decoded at 1.0 in every layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

Pooling = Literal["mean", "max", "midpoint"]
NAMED = ("text_instruction_token", "visual_token", "answer_token", "answer_label")
LEAKY = "answer_label"
TURNS = ("user", "question", "instruction")
"""Spans that may hold the user's turn, in this order."""


def default_places(tokens: ic.Tokens) -> tuple[str, ...]:
    """The three positions where there are images, those of them that the prompts have; else p0."""
    if "vision" not in tokens.spans:
        return ("answer_token",)
    turn = ("text_instruction_token",) if any(name in tokens.spans for name in TURNS) else ()
    return (*turn, "visual_token", "answer_token")


def columns_of(tokens: ic.Tokens, place: Any, *, allow_leaky: bool = False) -> list[list[int]]:
    """Columns of each row that a place selects.

    Raises:
        PlanError: the answer is in the prompt, or is asked for, without leave.
        PositionError: a row has no such place.
    """
    if "target" in tokens.spans and not allow_leaky:
        raise ic.PlanError(
            "probe: the prompts hold their answers (span 'target'): states at and after them tell the label. Give "
            "prompts without target, or allow_leaky=True, which marks the result"
        )
    if place == LEAKY:
        if not allow_leaky:
            raise ic.PlanError(
                f"probe: {LEAKY} is the label itself, and says nothing of the model; take 'answer_token', which "
                "predicts it, or allow_leaky=True, which marks the result"
            )
        return [row[-1:] for row in _having(tokens, "target", place)]
    if place == "answer_token":
        if "target" in tokens.spans:
            return [row[-1:] for row in _having(tokens, "prompt", place)]
        return [row[-1:] for row in tokens.columns(None)]
    if place == "text_instruction_token":
        turn = next((name for name in TURNS if name in tokens.spans), None)
        if turn is None:
            raise ic.PositionError(
                "probe: text_instruction_token is the last token of the user's turn, which these prompts do not name. "
                "Make them with model.chat, or name it: tokens.name(user=…); of plain texts, answer_token is the last"
            )
        visual = tokens.columns("vision") if "vision" in tokens.spans else [[] for _ in range(len(tokens))]
        rows = _having(tokens, turn, place)
        text = [[column for column in row if column not in set(skip)] for row, skip in zip(rows, visual, strict=True)]
        return [row[-1:] for row in _filled(text, place)]
    return _having(tokens, "vision" if place == "visual_token" else place, place)


def _having(tokens: ic.Tokens, at: Any, place: Any) -> list[list[int]]:
    return _filled(tokens.columns(at), place)


def _filled(rows: list[list[int]], place: Any) -> list[list[int]]:
    for number, row in enumerate(rows):
        if not row:
            raise ic.PositionError(
                f"probe: prompt {number} has no token at {place!r}; leave it out, or take another place"
            )
    return rows


def pooled(
    stream: Float[Tensor, "batch pos d_model"], columns: list[list[int]], how: Pooling
) -> Float[Tensor, "batch d_model"]:
    """One state per row."""
    out = []
    for values, row in zip(stream, columns, strict=True):
        if how == "midpoint" or len(row) == 1:
            out.append(values[row[len(row) // 2]].float())
        else:
            rows = values[row].float()
            out.append(rows.mean(0) if how == "mean" else rows.amax(0))
    return torch.stack(out)
