"""Interventions on images by hooks on the models' own modules, for tests: nothing here uses the engine.

A layer's input is replaced by a forward pre-hook, DeepStack's additions in the language model's keyword, attention is
hidden by an additive mask [1 1 query key], all in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from layouts import LAYOUT
from torch import Tensor

import interp_core as ic
from interp_core import testing

TEXT, ANSWER = "what color is the circle ?", " red yes"


@cache
def model_of(family: str) -> ic.Model:
    return ic.load(testing.tiny(family, dtype=torch.float64), processor=testing.processor(family))


@cache
def texts(family: str) -> tuple[ic.Tokens, ...]:
    """The same text with three images."""
    return tuple(model_of(family).tokens(TEXT, ANSWER, images=image) for image in testing.pictures(3, (16, 16)))


def language(model: ic.Model, family: str) -> tuple[Any, Any]:
    """The language model, and its layers."""
    name = LAYOUT[family]["blocks"]
    return model.hf.get_submodule(name.rpartition(".")[0]), model.hf.get_submodule(name)


def logp_by_hand(model: ic.Model, tokens: ic.Tokens) -> Tensor:
    """Log-probabilities of the answer's tokens, by the model alone `[m]`."""
    with torch.no_grad():
        logits = model.hf(
            input_ids=tokens.ids, attention_mask=tokens.mask.long(), **tokens.inputs, use_cache=False
        ).logits
    logp, answer = torch.log_softmax(logits[0], -1), tokens.spans["target"][0][0]
    return torch.stack([logp[place - 1, tokens.ids[0, place]] for place in answer])


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seen(model: ic.Model, family: str, tokens: ic.Tokens) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of all layers, and DeepStack's additions, of a plain pass."""
    inputs: list[Tensor] = []
    added: list[Tensor] = []
    outer, layers = language(model, family)

    def keep(_: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        added.extend(kwargs.get("deepstack_visual_embeds") or [])

    handles = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    with hooked([*handles, outer.register_forward_pre_hook(keep, with_kwargs=True)]):
        logp_by_hand(model, tokens)
    return inputs, added


def replaced_by_hand(
    model: ic.Model, family: str, tokens: ic.Tokens, layer: int, places: Sequence[int], rows: Tensor,
    additions: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The answer with rows of a layer's input replaced, and of DeepStack's additions from that layer on."""
    outer, layers = language(model, family)

    def put(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].clone()
        hidden[:, list(places)] = rows
        return hidden, *args[1:]

    def follow(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        own = kwargs.get("deepstack_visual_embeds")
        if own and additions:
            own = [additions[i] if i >= layer else one for i, one in enumerate(own)]
        return args, {**kwargs, "deepstack_visual_embeds": own} if "deepstack_visual_embeds" in kwargs else kwargs

    handles = [layers[layer].register_forward_pre_hook(put), outer.register_forward_pre_hook(follow, with_kwargs=True)]
    with hooked(handles):
        return logp_by_hand(model, tokens)


def hidden_by_hand(
    model: ic.Model, family: str, tokens: ic.Tokens, layers: Sequence[int], query: Sequence[int], key: Sequence[int]
) -> Tensor:
    """The answer with keys hidden from queries in some layers."""
    n = tokens.ids.shape[1]
    mask = torch.full((1, 1, n, n), float("-inf"), dtype=torch.float64).triu(1)
    mask[..., torch.tensor(list(query))[:, None], torch.tensor(list(key))] = float("-inf")
    blocks = language(model, family)[1]
    put = lambda _, args, kwargs: (args, {**kwargs, "attention_mask": mask})  # noqa: E731
    with hooked([blocks[i].self_attn.register_forward_pre_hook(put, with_kwargs=True) for i in layers]):
        return logp_by_hand(model, tokens)


def places(tokens: ic.Tokens) -> tuple[list[int], list[int], int]:
    """V, what is behind it, and p0, from the ids alone."""
    visual = [i for i, token in enumerate(tokens.ids[0].tolist()) if token == 90]
    behind = [i for i in range(visual[0], tokens.ids.shape[1]) if i not in visual]
    return visual, behind, tokens.spans["target"][0][0].start - 1
