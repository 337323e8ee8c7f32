"""Prompts as the rows of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

import interp_core as ic

from .prompts import Prompt

T = TypeVar("T")


def tokens(prompts: Sequence[Prompt], *, answered: bool = False) -> ic.Tokens:
    """A batch, padded on the left.

    Args:
        answered: each prompt is followed by its target, with the spans `prompt` and `target`.

    Raises:
        PlanError: a prompt without target.
    """
    rows = []
    for number, prompt in enumerate(prompts):
        if answered and not prompt.target_ids:
            raise ic.PlanError(f"prompt {number} has no target tokens")
        end = len(prompt.ids)
        ids = torch.tensor([[*prompt.ids, *prompt.target_ids] if answered else prompt.ids])
        spans = {"prompt": ic.Span(0, end), "target": ic.Span(end, ids.shape[1])} if answered else {}
        named = {name: ((span,),) for name, span in spans.items()}
        rows.append(ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), spans=named))
    return rows[0] if len(rows) == 1 else ic.Tokens.stack(rows)


def batches(prompts: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Prompts, or whatever it is, so many at a time.

    Raises:
        PlanError: less than one at a time.
    """
    if size < 1:
        raise ic.PlanError(f"batch is at least 1, not {size}")
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def targets(prompts: Sequence[Prompt]) -> torch.Tensor:
    """First target token of each prompt `[batch]`.

    Raises:
        PlanError: none, or one without target.
    """
    if not prompts:
        raise ic.PlanError("at least one prompt is needed")
    for number, prompt in enumerate(prompts):
        if not prompt.target_ids:
            raise ic.PlanError(f"prompt {number} has no target tokens, and nothing to measure")
    return torch.tensor([prompt.target_ids[0] for prompt in prompts])


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes: of which numbers a run's rows are."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
