"""Means, effects, vector and logits worked out a second time, plainly: what the parity suite's side a is made of.

    means     hooks on the output projections, a whole forward pass per prompt, tokens of a slot averaged one by one
    effects   a hook that puts a head's mean in its place, a whole forward pass per trial, layer, head and class
    vector    one projection per head, added up
    logits    a hook that adds the vector to what a block hands on, a whole forward pass per prompt

No mean, effect, vector, edit or pass of this package is used here, so that a fault in one of them is a difference. The
two ways share the prompts (which `checks` holds against the reference's procedure), and what the atlas says of the
model: which module is a layer's block, which its output projection, how many heads. The order of operations is that of
the published code, and of `replay`: on one machine the numbers are equal to the bit.

Source: Todd et al. (2024), arXiv:2310.15213.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import interp_core as ic

from ..effects import CLASSES, token_class
from ..means import head_shape
from ..prompts import Prompt

Pick = Callable[[Tensor, int], Tensor]
MEASURES: Mapping[str, Pick] = {
    "probability": lambda logits, target: torch.softmax(logits, -1)[target],
    "logprob": lambda logits, target: torch.log_softmax(logits, -1)[target],
}
"""What effects are measured in, of the last token's logits `[vocab]`."""


def plain_means(model: ic.Model, prompts: Sequence[Prompt]) -> Float[Tensor, "layer head slot d_head"]:
    """Mean z per slot; zero in layers without heads."""
    projections, heads, d_head = _projections(model)
    store = torch.zeros(len(prompts), model.n_layers, heads, prompts[0].slots[-1] + 1, d_head)
    for number, prompt in enumerate(prompts):
        seen: list[Tensor] = []
        with ExitStack() as hooks:
            for module in projections.values():
                hooks.enter_context(_before(module, seen.append))
            _last_logits(model, prompt)
        for layer, x in zip(projections, seen, strict=True):
            z = x.reshape(len(prompt), heads, d_head)
            for slot in range(store.shape[3]):
                own = [token for token, where in enumerate(prompt.slots) if where == slot]
                value = z[own[0]] if len(own) == 1 else z[own].mean(0)
                store[number, layer, :, slot] = value.to(store)
    return store.mean(0)


def plain_effects(
    model: ic.Model, prompts: Sequence[Prompt], mean: Float[Tensor, "layer head slot d_head"], *, classes: bool = False
) -> dict[str, Float[Tensor, "trial layer head *token_class"]]:
    """Effects in every measure of `MEASURES`: of the last token, or of every class. Not a number in layers without
    heads, zero of a class that a prompt has no token of."""
    projections, heads, d_head = _projections(model)
    kind = torch.float64 if model.dtype == torch.float64 else torch.float32
    shape = len(prompts), *mean.shape[:2], len(CLASSES)
    by_measure = {measure: torch.full(shape, torch.nan, dtype=kind) for measure in MEASURES}
    for number, prompt in enumerate(prompts):
        target, clean = prompt.target_ids[0], _last_logits(model, prompt)
        names = [token_class(label) for label in prompt.labels]
        places = [[token for token, name in enumerate(names) if name == token_kind] for token_kind in CLASSES]
        places = places if classes else [*[[]] * (len(CLASSES) - 1), [len(prompt) - 1]]
        for layer, module in projections.items():
            for head in range(heads):
                for place, tokens in enumerate(places):
                    values = mean[layer, head, [prompt.slots[token] for token in tokens]]

                    def put(x: Tensor, head: int = head, tokens: list[int] = tokens, values: Tensor = values) -> Tensor:
                        z = x.clone()
                        z.view(-1, heads, d_head)[tokens, head] = values.to(z)
                        return z

                    if tokens:
                        with _before(module, put):
                            patched = _last_logits(model, prompt)
                    for measure, pick in MEASURES.items():
                        effect = pick(patched, target) - pick(clean, target) if tokens else 0.0
                        by_measure[measure][number, layer, head, place] = effect
    return by_measure if classes else {measure: effects[..., -1] for measure, effects in by_measure.items()}


@torch.no_grad()
def plain_vector(
    model: ic.Model, mean: Float[Tensor, "layer head slot d_head"], heads: Iterable[tuple[int, int, float]]
) -> Float[Tensor, " d_model"]:
    """The sum of what the output projections make of each head's mean at the last slot alone; float32, on the CPU."""
    projections, n_heads, d_head = _projections(model)
    total = torch.zeros(model.d_model)
    for layer, head, _ in heads:
        x = torch.zeros(1, 1, n_heads * d_head)
        x[..., head * d_head : (head + 1) * d_head] = mean[layer, head, -1]
        total += projections[layer](x.to(model.device, model.dtype)).flatten().float().cpu()
    return total


def plain_logits(
    model: ic.Model, prompts: Sequence[Prompt], vector: Float[Tensor, " d_model"] | None = None, layer: int = 0
) -> Float[Tensor, "trial vocab"]:
    """Logits at each prompt's last token, on the CPU.

    Args:
        vector: added there to what the block of `layer` hands on.
    """
    block = model.module("block", layer)

    def add(_: nn.Module, __: Any, out: Any) -> Any:
        assert vector is not None
        stream = (out if isinstance(out, Tensor) else out[0]).clone()
        stream[:, -1] += vector.to(stream)
        return stream if isinstance(out, Tensor) else (stream, *out[1:])

    hook = None if vector is None else block.register_forward_hook(add)
    try:
        return torch.stack([_last_logits(model, prompt) for prompt in prompts]).cpu()
    finally:
        if hook is not None:
            hook.remove()


@torch.no_grad()
def _last_logits(model: ic.Model, prompt: Prompt) -> Float[Tensor, " vocab"]:
    """One whole forward pass of the model itself; logits in float32 at least."""
    with model.fresh():
        out = model.hf(input_ids=torch.tensor([prompt.ids], device=model.device), use_cache=False)
    last: Tensor = out.logits[0, -1]
    return last.to(torch.promote_types(last.dtype, torch.float32))


def _projections(model: ic.Model) -> tuple[dict[int, nn.Module], int, int]:
    """Output projections by layer, heads, and d_head."""
    return {layer: model.module("attn.o", layer) for layer in model.layers("z")}, *head_shape(model)


@contextmanager
def _before(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show a module's first input to `see`; what it returns goes in instead."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = None if args else next(iter(kwargs))
        x = args[0] if name is None else kwargs[name]
        new = see(x)
        new = x if new is None else new
        return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
