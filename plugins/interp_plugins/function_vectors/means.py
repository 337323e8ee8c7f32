"""Mean activations over prompts of a task: of heads in every slot, of layers at the last token.

    heads   mean[l, a, s] = 1/N Σ_n avg_{t in slot s of prompt n} z_n[l, t, a]
    layers  mean[l]       = 1/N Σ_n resid_post_n[l, last]

Cost: one forward pass per prompt that ends with the last layer's heads, and computes no logits. Memory: what the passes
give is kept until the end, N × layers × heads × slots × d_head float32, because the order of summation is then that of
the published code: with `batch=1` the means equal its own to the bit. Several prompts per pass take a tenth less time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .prompts import Prompt
from .rows import batches, tokens

BATCH = 8
"""Prompts per pass, where nothing is to be equal to the bit."""


def head_shape(model: ic.Model) -> tuple[int, int]:
    """Heads and d_head.

    Raises:
        CapabilityError: the layers' heads differ in number or width, or the family has none.
    """
    layers = model.layers(S.z)
    if not layers:
        raise ic.CapabilityError(f"function vectors need z: {model.can('z', 'read')}")
    sizes = {(size["head"], size["d_head"]) for size in (model.sizes(S.z[layer]) for layer in layers)}
    if len(sizes) > 1:
        shown = ", ".join(f"{heads} of {width}" for heads, width in sorted(sizes))
        raise ic.CapabilityError(f"function vectors need the same heads in every layer; this model has {shown}")
    return sizes.pop()


def mean_head_activations(
    model: ic.Model, prompts: Sequence[Prompt], *, batch: int = BATCH
) -> Float[Tensor, "layer head slot d_head"]:
    """Mean z per slot, float32, on the CPU; zero in layers without heads.

    Args:
        prompts: of one template and number of shots, so that slots mean the same in all.
        batch: prompts of one length per pass, at most. Kernels may sum more rows in another order: only one prompt per
            pass is sure to give the published code's bits.

    Raises:
        PlanError: no prompts, or prompts with different slots.
        CapabilityError: a model whose layers differ in heads.
    """
    heads, d_head = head_shape(model)
    n_slots = _common_slots(prompts)
    layers = model.layers(S.z)
    means_by_prompt = torch.zeros(len(prompts), model.n_layers, heads, n_slots, d_head)
    for numbers in _alike(prompts, batch):
        run = model.run(tokens([prompts[number] for number in numbers]), read=S.z[layers], logits=False)
        z = run[S.z[layers]].plain
        for row, number in enumerate(numbers):
            means = _by_slot(z[:, row], prompts[number].slots).transpose(1, 2)
            for layer, layer_means in zip(layers, means, strict=True):
                means_by_prompt[number, layer] = layer_means
    return means_by_prompt.mean(0)


def mean_layer_activations(
    model: ic.Model, prompts: Sequence[Prompt], *, batch: int = 1
) -> Float[Tensor, "layer d_model"]:
    """Mean residual stream after every block at the last token, float32, on the CPU: the baseline that the published
    code adds in place of the function vector, layer by layer."""
    streams = []
    for part in batches(prompts, batch):
        run = model.run(tokens(part), read=S.resid_post.at(-1), logits=False)
        streams += list(run[S.resid_post.at(-1)].plain.float().cpu().unbind(1))
    return torch.stack(streams).mean(0)


def slot_starts(slots: Sequence[int]) -> list[int]:
    """The first token of each slot."""
    # tokens of one word stand together and share a slot: a slot begins where the number changes
    return [at for at, slot in enumerate(slots) if at == 0 or slot != slots[at - 1]]


def _by_slot(z: Tensor, slots: Sequence[int]) -> Tensor:
    """`[layer pos head d_head]` averaged over the tokens of each slot: `[layer slot head d_head]`."""
    starts = slot_starts(slots)
    out = z[:, starts]
    for start, stop in zip(starts, [*starts[1:], len(slots)], strict=True):
        if stop - start > 1:
            out[:, slots[start]] = z[:, start:stop].mean(1)
    return out


def _alike(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Numbers of the prompts in groups of one length."""
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.ids), []).append(number)
    return [list(part) for group in by_length.values() for part in batches(group, size)]


def _common_slots(prompts: Sequence[Prompt]) -> int:
    if not prompts:
        raise ic.PlanError("means need at least one prompt")
    counts = []
    for number, prompt in enumerate(prompts):
        seen = [slot for slot, _ in groupby(prompt.slots)]
        if seen != list(range(len(seen))) or len(prompt.slots) != len(prompt.ids):
            raise ic.PlanError(f"prompt {number}: its {len(prompt.ids)} tokens do not run through slots 0, 1, 2, …")
        counts.append(len(seen))
        if counts[-1] != counts[0]:
            raise ic.PlanError(
                f"prompt {number} has {counts[-1]} slots, prompt 0 has {counts[0]}: slots mean the same only in "
                "prompts of one template with the same number of shots"
            )
    return counts[0]
