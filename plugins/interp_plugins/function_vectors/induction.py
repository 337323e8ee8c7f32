"""Attention of heads: prefix matching on repeated random tokens, and the pattern between the slots of a prompt.

    prefix matching of a head = mean attention from each token of a repetition to what followed it the first time

Heads with high scores copy what came next ("induction heads"); those of a function vector need not be among them.

Source: Olsson et al. (2022), arXiv:2209.11895; as measured by Todd et al. (2024). Cost: one forward pass; patterns of
all layers are kept while it is worked out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .means import slot_starts
from .prompts import Prompt
from .rows import tokens


def prefix_matching(
    model: ic.Model, *, length: int = 100, sequences: int = 4, ids: tuple[int, int] | None = None, seed: int = 0
) -> Float[Tensor, "layer head"]:
    """Prefix-matching score of every head, float32; not a number in layers whose pattern is not known.

    Args:
        length: tokens before they repeat.
        sequences: how many are tried.
        ids: token ids are drawn from here (None: from 1,000 to 10,000, or as far as the vocabulary goes, as published).
        seed: of the draw.

    Raises:
        PlanError: no ids to draw from.
        CapabilityError: a model whose patterns are not known.
    """
    size = model.d_vocab
    low, high = ids or ((1000, min(10_000, size)) if size > 2000 else (0, size))
    if not 0 <= low < high <= size:
        raise ic.PlanError(f"ids {low} to {high} are not those of a vocabulary of {size}")
    once = torch.randint(low, high, (sequences, length), generator=torch.Generator().manual_seed(seed))
    run = model.run(torch.cat([once, once], 1), read=S.pattern, logits=False)
    layers = model.layers(S.pattern)
    scores = [run[S.pattern[i]].plain.diagonal(1 - length, -2, -1).float().mean((0, -1)) for i in layers]
    by_layer = torch.full((model.n_layers, len(scores[0])), torch.nan)
    by_layer[layers] = torch.stack(scores).cpu()
    return by_layer


class SlotAttention(NamedTuple):
    """Attention between slots.

    Attributes:
        pattern: from the first token of a slot to all tokens of another.
        weighted: the same, each key's part times the length of its value.
    """

    pattern: Float[Tensor, "trial layer head query key"]
    weighted: Float[Tensor, "trial layer head query key"]


def slot_attention(model: ic.Model, prompts: Sequence[Prompt]) -> SlotAttention:
    """Attention between the slots of prompts, float32: keys of a word are summed, of its queries the first counts. With
    grouped queries, every head takes the values of its group.

    Raises:
        CapabilityError: a model whose patterns or values are not known in every layer.
    """
    by_prompt: list[Tensor] = []
    for prompt in prompts:
        run = model.run(tokens([prompt]), read=[S.pattern, S.v], logits=False)
        starts, index = slot_starts(prompt.slots), torch.tensor(prompt.slots)
        by_layer: list[Tensor] = []
        for layer in range(model.n_layers):
            pattern = run[S.pattern[layer]].plain[0].float().cpu()
            norm = run[S.v[layer]].plain[0].float().cpu().norm(dim=-1).T
            norm = norm.repeat_interleave(len(pattern) // len(norm), 0)
            rows = pattern[:, starts]
            both = torch.stack([rows, rows * norm[:, None]])
            by_layer.append(both.new_zeros(*both.shape[:-1], len(starts)).index_add_(-1, index, both))
        by_prompt.append(torch.stack(by_layer, 1))
    return SlotAttention(*torch.stack(by_prompt, 1))
